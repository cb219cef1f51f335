"""CRATE on a CPU: a training step and inference, compared with the alternatives in one run.

    python benchmarks/bench_cpu.py            # most of an hour on two cores; --smoke takes half a minute
    python benchmarks/bench_cpu.py --dtype bfloat16      # autocast, for processors with AVX512-BF16 or AMX

Peers: the released form (explicit attention, ISTA in three products; or CRATE-α), timm's ViT of the same sizes, and
ours, each eager and compiled; for inference also onnxruntime with the file of `crate-fast export`. All CRATEs have
the same weights, and their outputs and gradients are compared first. The floor is the time of the model's operations
at the rate of a large matrix product with the faster of PyTorch's two libraries, measured in this run.
"""

import argparse
import math
import sys
from dataclasses import replace

from harness import Ceilings, Run, add_options, earlier_rows, interleaved, open_run, write_results

import torch
from bench_model import CRATES
from gpu_report import markdown_table
from measuring import measure_peers
from model_problem import COMPILED, INFERENCE, ONNX, OURS, RELEASED, TRAINING, VIT, Size, make_problem, peers

from crate_fast.cpu_ops import onednn_product

SIZES = {name: replace(CRATES[name], batch=4 if name == "S/8" else 8) for name in ("T/16", "S/8", "B/16", "α-B/16")}
SMOKE = {"smoke": Size(64, 2, 2, 16, batch=2, image=64)}
SMOKE |= {"smoke α": replace(SMOKE["smoke"], alpha=True)}
PEERS = [name + suffix for suffix in ("", COMPILED) for name in (OURS, RELEASED, VIT)]
CASES = {"training": (TRAINING, 0), "inference": (INFERENCE, 0), "one image": (INFERENCE, 1)}  # 0: the size's batch


def product_rate(dtype: torch.dtype, side: int = 1536) -> float:
    """Measure the rate of a large matrix product with the faster library, in FLOP/s."""
    left, right = torch.randn(2, side, side, dtype=dtype).unbind()
    calls = {"MKL": lambda: left @ right.t(), "oneDNN": lambda: onednn_product(left, right)}
    return 2 * side**3 / min(timing.low for timing in interleaved(calls, 3).values())


def measure(run: Run, sizes: dict[str, Size], cases: list[str]) -> list[dict]:
    """Measure a row per model, call and peer; stop if a peer fails or gives wrong results."""
    rows, best = [], 0.0
    for name, size in sizes.items():
        for what, batch in (CASES[case] for case in cases):
            best = max(best, product_rate(run.dtype))
            problem = make_problem(name, replace(size, batch=batch or size.batch), what, run, {})
            names = [*PEERS, *[ONNX] * (what == INFERENCE and run.dtype == torch.float32)]
            found = measure_peers(problem, peers(problem, names, run), run)
            for row in found:
                if row["reason"] is not None:
                    raise SystemExit(f"{row['peer']}: {row['reason']}: no numbers")
            ms = {row["peer"]: row["latency_ms"] for row in found}
            released = min(ms[RELEASED], ms[RELEASED + COMPILED])
            for row in found:
                rows.append(
                    {
                        "model": name,
                        "what": what,
                        "batch": row["batch"],
                        "peer": row["peer"],
                        "latency_ms": row["latency_ms"],
                        "20-80 %": f"{row['low_ms']:.0f}–{row['high_ms']:.0f}",
                        "images_per_s": 1e3 * row["batch"] / row["latency_ms"],
                        "over the faster released form": released / row["latency_ms"],
                        "gflop": row["flops"] / 1e9,
                        "peak_mib": row["peak_mib"] if row["batch"] > 1 else None,
                    }
                )
                print(rows[-1], flush=True)
    for row in rows:
        row["floor_ms"] = row["gflop"] / best * 1e12
        row["share of floor"] = row["floor_ms"] / row["latency_ms"]
        row["commit"] = run.facts["commit"]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/cpu.{json,md}, or cpu_bfloat16.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default all")
    add_options(parser)
    options = parser.parse_args(argv)
    run = open_run(options, torch.device("cpu"))
    file = "cpu" if run.dtype == torch.float32 else f"cpu_{options.dtype}"
    run.ceilings = Ceilings(math.inf, math.inf)  # floors use the best rate of the whole run
    rows = measure(run, SMOKE if options.smoke else {name: SIZES[name] for name in options.models}, options.cases)
    if not options.smoke:  # keep rows of earlier runs on this machine
        keys, same = ("model", "what", "batch", "peer"), {key: run.facts[key] for key in ("device", "torch")}
        rows += earlier_rows(options.output / f"{file}.json", rows, keys, same)
        order = [*SIZES, TRAINING, INFERENCE]
        rows.sort(key=lambda row: (order.index(row["model"]), order.index(row["what"]), -row["batch"]))
    table = markdown_table(rows)
    print("\n" + table)
    shares = [row["share of floor"] for row in rows if row["peer"] == OURS]
    print(f"Ours, eager, reaches {min(shares):.2f} to {max(shares):.2f} of the floor.")
    if not options.smoke:
        for path in write_results(file, rows, table, options.output):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
