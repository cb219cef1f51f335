"""CRATE on a CPU: training step and inference against everything that a user would run instead, in one run.

    python benchmarks/bench_cpu.py            # half an hour on two cores; --smoke for half a minute

Peers: the released form (three-product ISTA, attention written out), timm's ViT of the same sizes, and ours, each
eager and under `torch.compile`; in inference onnxruntime on the file of `crate-fast export` too. CRATEs have the same
weights, and their outputs and gradients are compared first. The floor is the time of the model's operations at the
rate of a large product by the faster of PyTorch's two libraries, measured in this run.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness import RESULTS, TIGHT, differences, interleaved, peak_mib, write_results

import torch
from bench_model import CRATES
from gpu_report import markdown_table
from model_problem import COMPILED, INFERENCE, OURS, RELEASED, TRAINING, VIT, Size, Trial, cost, initial_weights

from crate_fast.cpu_ops import onednn_product
from crate_fast.export import export_model
from crate_fast.exported import open_exported

SIZES = {name: CRATES[name] for name in ("T/16", "S/8", "B/16")}
SMOKE = {"smoke": Size(64, 2, 2, 16, on_gpu=2, on_cpu=2, image=64)}
ONNX = "ours, onnxruntime"
EAGER = (RELEASED, VIT, OURS)
PEERS = tuple(name + suffix for suffix in ("", COMPILED) for name in EAGER)
CPU = torch.device("cpu")


class ONNXTrial:
    """onnxruntime on the exported file of a trial's model."""

    def __init__(self, trial: Trial):
        with tempfile.TemporaryDirectory() as folder:
            export_model(trial.model, folder, formats=["onnx"])
            self.run = open_exported(Path(folder) / "model.onnx")
        self.images = trial.inputs[0]

    def step(self) -> torch.Tensor:
        """Return the logits."""
        return self.run(self.images)["logits"]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return none."""
        return {}


def product_rate(side: int = 1536) -> float:
    """Measure the rate of a large product, the faster library's, in FLOP/s."""
    left, right = torch.randn(2, side, side).unbind()
    calls = {"MKL": lambda: left @ right.t(), "oneDNN": lambda: onednn_product(left, right)}
    return 2 * side**3 / min(timing.low for timing in interleaved(calls, 3).values())


def _trials(what: str, size: Size, batch: int, state: dict, compiler: str, cast: torch.dtype | None) -> dict:
    """Return the peers by name."""
    trials = {
        peer: Trial(peer, size, batch, CPU, what, cast, None if peer.startswith(VIT) else state, compiler=compiler)
        for peer in PEERS
    }
    if what == INFERENCE and cast is None:
        trials[ONNX] = ONNXTrial(trials[OURS])
    return trials


def check_equal(trials: dict[str, Trial]) -> None:
    """Compare output and gradients of every CRATE with the released form's; stop where they differ."""
    found = {peer: {"output": t.step()} | t.gradients() for peer, t in trials.items() if not peer.startswith(VIT)}
    for peer, results in found.items():
        for name, value in differences(results, {key: found[RELEASED][key] for key in results}).items():
            if not value < TIGHT[name]:
                raise SystemExit(
                    f"the peers disagree: {name} of {peer!r} by {value:.1e}, allowed {TIGHT[name]:.0e}: no numbers"
                )


def _fresh_step(peer: str, what: str, size: Size, batch: int) -> Callable[[], object]:
    return Trial(peer, size, batch, CPU, what, None).step


def measure(
    sizes: dict[str, Size], rounds: int, compiler: str = "inductor", memory: tuple[str, ...] = EAGER
) -> list[dict]:
    """Measure a row per model, call and peer; the memory of the peers in `memory`."""
    rows = []
    for name, size in sizes.items():
        state = initial_weights(size, CPU)
        for what, batch in ((TRAINING, size.on_cpu), (INFERENCE, size.on_cpu), (INFERENCE, 1)):
            torch.compiler.reset()
            trials = _trials(what, size, batch, state, compiler, None)
            check_equal(trials)
            rate = product_rate() if compiler == "inductor" else 1e11
            timings = interleaved({peer: trial.step for peer, trial in trials.items()}, rounds)
            released = min(timings[peer].median for peer in (RELEASED, RELEASED + COMPILED))
            for peer, timing in timings.items():
                floor = cost(peer, size, batch, what, torch.float32).flops / rate
                measured = peer in memory and batch > 1
                rows.append(
                    {
                        "model": name,
                        "what": what,
                        "batch": batch,
                        "peer": peer,
                        "latency_ms": timing.median * 1e3,
                        "20-80 %": f"{timing.low * 1e3:.0f}–{timing.high * 1e3:.0f}",
                        "images_per_s": batch / timing.median,
                        "over the faster released form": released / timing.median,
                        "floor_ms": floor * 1e3,
                        "share of floor": floor / timing.median,
                        "peak_mib": peak_mib(partial(_fresh_step, peer, what, size, batch)) if measured else None,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/cpu.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs; writes nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if options.smoke:
        rows = measure(SMOKE, 1, "eager", memory=(OURS,))
    else:
        rows = measure({name: SIZES[name] for name in options.models}, options.rounds)
    table = markdown_table(rows)
    print("\n" + table)
    shares = [row["share of floor"] for row in rows if row["peer"] == OURS]
    print(f"Ours, eager, reaches {min(shares):.2f} to {max(shares):.2f} of the floor.")
    if not options.smoke:
        for path in write_results("cpu", rows, table, options.output):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
