"""CRATE on a CPU: training step and inference against everything that a user would run instead, in one run.

    python benchmarks/bench_cpu.py            # half an hour on two cores; --smoke for half a minute

Peers: the released form (three-product ISTA, attention written out), timm's ViT of the same sizes, and ours, each
eager and under `torch.compile`; in inference onnxruntime on the file of `crate-fast export` too. CRATEs have the same
weights, and their outputs and gradients are compared first. The floor is the time of the model's operations at the
rate of a large product by the faster of PyTorch's two libraries, measured in this run.
"""

import argparse
import json
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
from crate_fast.env import provenance
from crate_fast.export import export_model
from crate_fast.exported import open_exported

SIZES = {name: CRATES[name] for name in ("T/16", "S/8", "B/16")}
SMOKE = {"smoke": Size(64, 2, 2, 16, on_gpu=2, on_cpu=2, image=64)}
ONNX = "ours, onnxruntime"
EAGER = (RELEASED, VIT, OURS)
PEERS = tuple(name + suffix for suffix in ("", COMPILED) for name in EAGER)
CPU = torch.device("cpu")
CASES = {"training": (TRAINING, 0), "inference": (INFERENCE, 0), "one image": (INFERENCE, 1)}  # 0: the size's batch


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


def _trials(what: str, size: Size, batch: int, state: dict, compiler: str) -> dict:
    """Return the peers by name."""
    trials = {
        peer: Trial(peer, size, batch, CPU, what, None, None if peer.startswith(VIT) else state, compiler=compiler)
        for peer in PEERS
    }
    if what == INFERENCE:
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
    sizes: dict[str, Size],
    rounds: int,
    compiler: str = "inductor",
    memory: tuple[str, ...] = EAGER,
    cases: tuple[str, ...] = tuple(CASES),
) -> list[dict]:
    """Measure a row per model, call and peer; the memory of the peers in `memory`."""
    rows, best, commit = [], 0.0, provenance()["commit"]
    for name, size in sizes.items():
        state = initial_weights(size, CPU)
        for what, batch in (CASES[case] for case in cases):
            batch = batch or size.on_cpu
            torch.compiler.reset()
            trials = _trials(what, size, batch, state, compiler)
            check_equal(trials)
            best = max(best, product_rate())
            timings = interleaved({peer: trial.step for peer, trial in trials.items()}, rounds)
            released = min(timings[peer].median for peer in (RELEASED, RELEASED + COMPILED))
            for peer, timing in timings.items():
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
                        "gflop": cost(peer, size, batch, what, torch.float32).flops / 1e9,
                        "peak_mib": peak_mib(partial(_fresh_step, peer, what, size, batch)) if measured else None,
                    }
                )
                print(rows[-1], flush=True)
    for row in rows:
        row["floor_ms"] = row["gflop"] / best * 1e12
        row["share of floor"] = row["floor_ms"] / row["latency_ms"]
        row["commit"] = commit
    return rows


def _with_earlier(rows: list[dict], folder: Path) -> list[dict]:
    """Return the rows and those of an earlier run on this machine that are not measured again, in order."""
    path = folder / "cpu.json"
    if not path.is_file():
        return rows
    earlier, now = json.loads(path.read_text()), provenance()
    if (earlier["device"], earlier["torch"]) != (now["device"], now["torch"]):
        return rows
    new = {(row["model"], row["what"], row["batch"], row["peer"]): row for row in rows}
    old = {(row["model"], row["what"], row["batch"], row["peer"]): row for row in earlier["rows"]}
    places = list(SIZES), [TRAINING, INFERENCE]
    merged = {**old, **new}.values()
    return sorted(
        merged, key=lambda row: (places[0].index(row["model"]), places[1].index(row["what"]), -row["batch"])
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/cpu.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs; writes nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if options.smoke:
        rows = measure(SMOKE, 1, "eager", memory=(OURS,))
    else:
        sizes = {name: SIZES[name] for name in options.models}
        rows = _with_earlier(measure(sizes, options.rounds, cases=tuple(options.cases)), options.output)
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
