"""Whole models: a training step and inference of CRATE, a training step of CRATE-MAE, and growth with N.

    python benchmarks/bench_model.py                      # all on a GPU, bf16 autocast; CRATE-T/16 on a CPU, fp32
    python benchmarks/bench_model.py --models B/16 B/8    # only these; autoencoders are CRATE-MAE-T, …
    python benchmarks/bench_model.py --growth             # CRATE-B on one image of 197 to 16,385 tokens
    python benchmarks/bench_model.py --smoke              # everything with tiny models, also on a CPU; writes nothing

Peers have the same images and, except the ViT, the same weights: the released form and ours, each eager and compiled,
and timm's ViT of the same width, depth, heads and patch, compiled, with SDPA's fastest backend for its tensors. A
training step is forward, cross-entropy, backward and AdamW (fused on a GPU); inference is a forward in
`inference_mode`, in which ours folds G in every call on a GPU and keeps it on a CPU. The gate of `model_problem.py`
comes first: a peer that differs from the released form has no numbers; if it is ours, eager or compiled, the exit
status is 1. One model is in memory at a time, with all its peers, which are measured in turn. Calls follow each other
without a pause, so a host that is slower than the device counts. `model_problem.cost` documents the FLOPs and bytes.
"""

import argparse
import sys
from dataclasses import replace

import harness
from harness import Run

from measuring import measure_peers
from model_problem import (
    COMPILED,
    INFERENCE,
    OURS,
    RELEASED,
    TRAINING,
    VISIBLE,
    VIT,
    Size,
    make_problem,
    peers,
)

CRATES = {  # models with goals first, in case the run is interrupted
    "B/16": Size(768, 12, 12, 16, on_gpu=256, on_cpu=8),
    "B/8": Size(768, 12, 12, 8, on_gpu=64, on_cpu=4),
    "S/8": Size(384, 12, 6, 8, on_gpu=64, on_cpu=4),  # the emergence paper's
    "T/16": Size(384, 12, 6, 16, on_gpu=256, on_cpu=8),
    "S/16": Size(576, 12, 12, 16, on_gpu=256, on_cpu=8),
    "L/16": Size(1024, 24, 16, 16, on_gpu=128, on_cpu=2),
    "α-B/16": Size(768, 12, 12, 16, on_gpu=128, on_cpu=8, alpha=True),
}
MAES = {
    "CRATE-MAE-T": Size(384, 12, 6, 16, on_gpu=256, on_cpu=8, masked=True),
    "CRATE-MAE-S": Size(576, 12, 12, 16, on_gpu=256, on_cpu=4, masked=True),
    "CRATE-MAE-B": Size(768, 12, 12, 16, on_gpu=256, on_cpu=4, masked=True),
    "CRATE-MAE-L": Size(1024, 24, 16, 16, on_gpu=128, on_cpu=2, masked=True),
}
GROWTH = {  # CRATE-B on one image
    "N = 197": Size(768, 12, 12, 16, 1, 1),
    "N = 785": Size(768, 12, 12, 8, 1, 1),
    "N = 3601": Size(768, 12, 12, 8, 1, 1, image=480),
    "N = 16385": Size(768, 12, 12, 8, 1, 1, image=1024),
}
ON_A_CPU = ("T/16",)
GROWTH_ON_A_CPU = ("N = 197", "N = 785", "N = 3601")
_TINY = Size(32, 1, 2, 16, on_gpu=2, on_cpu=2, image=64, classes=10)
SMOKE_CRATES, SMOKE_MAES = {"tiny": _TINY}, {"tiny MAE": replace(_TINY, masked=True)}
SMOKE_GROWTH = {"N = 17": _TINY}

CRATE_PEERS = [OURS, RELEASED, OURS + COMPILED, VIT + COMPILED, RELEASED + COMPILED]
MAE_PEERS = [OURS, RELEASED, VISIBLE]
GROWTH_PEERS = [OURS, RELEASED]


def measure(file: str, sizes: dict[str, Size], passes: tuple[str, ...], names: list[str], run: Run) -> bool:
    """Measure the models and passes of one file of results; return True unless a row is red.

    The first peer is ours. The rows are written after each pass.
    """
    run.rows = []
    for model, size in sizes.items():
        for what in passes:
            run.rows += measure_one(model, size, what, names, run)
            run.timer.free_memory()
            run.report(file, quiet=True)  # in case the run is interrupted
    run.report(file)
    return not any(row.get("red") for row in run.rows)


def measure_one(model: str, size: Size, what: str, names: list[str], run: Run) -> list[dict]:
    """Measure one pass of a model with the named peers; add images/s, the factors to two peers, and the MFU."""
    problem = make_problem(model, size, what, run, {"patch": size.patch, "image": size.image})
    rows = measure_peers(problem, peers(problem, names, run), run)
    measured = {row["peer"]: row["latency_ms"] for row in rows if row["latency_ms"] is not None}
    for row in rows:
        latency_ms = row["latency_ms"]
        row |= dict.fromkeys(("images_per_s", "of_released", "of_vit", "mfu"))
        if latency_ms is not None:
            row["images_per_s"] = 1e3 * row["batch"] / latency_ms
            row["of_released"], row["of_vit"] = (
                measured[peer] / latency_ms if peer in measured else None for peer in (RELEASED, VIT + COMPILED)
            )
            row["mfu"] = row["flops"] / (row["matrix_tflops_per_s"] * latency_ms * 1e9)
    return rows


def _parts(options: argparse.Namespace, on_gpu: bool) -> list[tuple]:
    """Return file, models, passes and peers for each call of `measure`."""
    crates, maes, growth = CRATES, MAES, {}
    if options.smoke:
        crates, maes, growth = SMOKE_CRATES, SMOKE_MAES, SMOKE_GROWTH
    elif options.growth:
        crates, maes = {}, {}
        growth = {name: GROWTH[name] for name in (GROWTH if on_gpu else GROWTH_ON_A_CPU)}
    elif chosen := options.models or ([] if on_gpu else ON_A_CPU):
        crates, maes = ({name: size for name, size in table.items() if name in chosen} for table in (CRATES, MAES))
    both, kind = (TRAINING, INFERENCE), "gpu" if on_gpu else "cpu"
    parts = [
        (f"crate_{kind}", crates, both, CRATE_PEERS),
        (f"model_{kind}", maes, (TRAINING,), MAE_PEERS),
        (f"growth_{kind}", growth, both, GROWTH_PEERS),
    ]
    return [part for part in parts if part[1]]


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/{crate,model,growth}_{cpu,gpu}.{json,md}; return 1 if a row is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*CRATES, *MAES], help="default: all; T/16 on a CPU")
    parser.add_argument("--growth", action="store_true", help="growth with N instead of the models")
    harness.add_options(parser, "of products, under autocast unless float32; bfloat16, float32 on a CPU")
    options = parser.parse_args(argv)
    if options.models and options.growth:
        parser.error("--growth has its own models: leave --models out")
    run = harness.open_run(options, on_cpu=True)
    run.measure_ceilings()
    right = [measure(*part, run) for part in _parts(options, run.timer.on_gpu)]
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
