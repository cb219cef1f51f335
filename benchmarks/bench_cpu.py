"""CRATE on a CPU in fp32: training step and inference against the released form, same weights, in one run.

    python benchmarks/bench_cpu.py            # a quarter of an hour on two cores; --smoke for half a minute

Peers: the released form (three-product ISTA, attention written out, PyTorch's default products), and ours with the
library of products that the processor was not given (`CRATE_FAST_ONEDNN` on or off).
"""

import argparse
import os
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path

from harness import RESULTS, TIGHT, differences, interleaved, peak_mib, write_results

import torch
from bench_model import CRATES
from gpu_report import markdown_table
from model_problem import INFERENCE, OURS, RELEASED, TRAINING, Size, Trial, initial_weights

from crate_fast.cpu_ops import onednn_suits_processor

SIZES = {name: CRATES[name] for name in ("T/16", "S/8", "B/16")}
SMOKE = {"smoke": Size(64, 2, 2, 16, on_gpu=2, on_cpu=2, image=64)}
OTHER, OTHER_ONEDNN = ("ours, oneDNN off", "0") if onednn_suits_processor() else ("ours, oneDNN on", "1")
PEERS = {RELEASED: (RELEASED, None), OTHER: (OURS, OTHER_ONEDNN), OURS: (OURS, None)}
CPU = torch.device("cpu")


class CPUTrial(Trial):
    """A trial with its choice of the library of products."""

    def __init__(self, peer: str, what: str, size: Size, state: dict | None = None):
        kind, self.onednn = PEERS[peer]
        super().__init__(kind, size, size.on_cpu, CPU, what, None, state)

    def step(self) -> torch.Tensor:
        """Set CRATE_FAST_ONEDNN, do the timed work and return the output."""
        os.environ.pop("CRATE_FAST_ONEDNN", None)
        if self.onednn is not None:
            os.environ["CRATE_FAST_ONEDNN"] = self.onednn
        return super().step()


def _fresh_step(peer: str, what: str, size: Size):
    return CPUTrial(peer, what, size).step


def _check_equal(trials: dict[str, CPUTrial]) -> None:
    """Compare output and gradients of every peer with the first's; stop where they differ."""
    found = {peer: {"output": trial.step()} | trial.gradients() for peer, trial in trials.items()}
    first = next(iter(trials))
    for peer in trials:
        for name, value in differences(found[peer], found[first]).items():
            if not value < TIGHT[name]:
                raise SystemExit(
                    f"the peers disagree: {name} of {peer!r} by {value:.1e}, allowed {TIGHT[name]:.0e}: no numbers"
                )


def measure(sizes: dict[str, Size], rounds: int, with_memory: Collection[str] = tuple(PEERS)) -> list[dict]:
    """Measure a row per model, call and peer; the memory of the peers `with_memory`."""
    rows = []
    for name, size in sizes.items():
        state = initial_weights(size, CPU)
        for what in (TRAINING, INFERENCE):
            trials = {peer: CPUTrial(peer, what, size, state) for peer in PEERS}
            _check_equal(trials)
            timings = interleaved({peer: trial.step for peer, trial in trials.items()}, rounds)
            for peer, timing in timings.items():
                rows.append(
                    {
                        "model": name,
                        "what": what,
                        "batch": size.on_cpu,
                        "peer": peer,
                        "latency_ms": timing.median * 1e3,
                        "20-80 %": f"{timing.low * 1e3:.0f}–{timing.high * 1e3:.0f}",
                        "images_per_s": size.on_cpu / timing.median,
                        "speed": timings[RELEASED].median / timing.median,
                        "peak_mib": peak_mib(partial(_fresh_step, peer, what, size)) if peer in with_memory else None,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/cpu.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs; writes nothing")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if options.smoke:
        rows = measure(SMOKE, 2, with_memory=[OURS])
    else:
        rows = measure({name: SIZES[name] for name in options.models}, options.rounds)
    table = markdown_table(rows)
    print("\n" + table)
    if not options.smoke:
        for path in write_results("cpu", rows, table, options.output):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
