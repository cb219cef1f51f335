"""CRATE on a CPU: a training step and inference, compared with the alternatives in one run.

    python benchmarks/bench_cpu.py            # an hour or more on two cores; --smoke takes half a minute
    python benchmarks/bench_cpu.py --dtype bfloat16      # autocast, for processors with AVX512-BF16 or AMX

Peers: the released form (explicit attention, ISTA in three products; or CRATE-α), timm's ViT of the same sizes, and
ours, each eager and compiled; for inference also onnxruntime with the file of `crate-fast export`. All CRATEs have
the same weights, and their outputs and gradients are compared first: if a peer fails or is wrong, there are no
numbers. The floor is the time of the model's operations at the rate of a large matrix product with the faster of
PyTorch's two libraries, measured before each model and pass.
"""

import argparse
import sys
from dataclasses import replace

from harness import Run, add_options, earlier_rows, open_run

import torch
from bench_model import CRATES, measure_one
from model_problem import COMPILED, INFERENCE, ONNX, OURS, RELEASED, TRAINING, VIT, Size

SIZES = {name: replace(CRATES[name], batch=4 if name == "S/8" else 8) for name in ("T/16", "S/8", "B/16", "α-B/16")}
SMOKE = {"smoke": Size(64, 2, 2, 16, batch=2, image=64)}
SMOKE |= {"smoke α": replace(SMOKE["smoke"], alpha=True)}
PEERS = [name + suffix for suffix in ("", COMPILED) for name in (OURS, RELEASED, VIT)]
CASES = {"training": (TRAINING, 0), "inference": (INFERENCE, 0), "one image": (INFERENCE, 1)}  # 0: the size's batch


def measure(run: Run, sizes: dict[str, Size], cases: list[str]) -> None:
    """Measure a row per model, pass and peer; stop if a peer fails or gives wrong results."""
    for name, size in sizes.items():
        for what, batch in (CASES[case] for case in cases):
            run.measure_ceilings()
            names = [*PEERS, *[ONNX] * (what == INFERENCE and run.dtype == torch.float32)]
            rows = measure_one(name, replace(size, batch=batch or size.batch), what, names, run)
            for row in rows:
                if row["reason"] is not None:
                    raise SystemExit(f"{row['peer']}: {row['reason']}: no numbers")
            run.rows += rows


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/cpu.{json,md}, or cpu_bfloat16.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default all")
    add_options(parser)
    options = parser.parse_args(argv)
    run = open_run(options, torch.device("cpu"))
    file = "cpu" if run.dtype == torch.float32 else f"cpu_{options.dtype}"
    measure(run, SMOKE if run.smoke else {name: SIZES[name] for name in options.models}, options.cases)
    if not run.smoke:  # keep rows of earlier runs on this machine
        same = {key: run.facts[key] for key in ("device", "torch")}
        run.rows += earlier_rows(run.output / f"{file}.json", run.rows, ("model", "pass", "batch", "peer"), same)
        order = [*SIZES, TRAINING, INFERENCE]
        run.rows.sort(key=lambda row: (order.index(row["model"]), order.index(row["pass"]), -row["batch"]))
    run.report(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
