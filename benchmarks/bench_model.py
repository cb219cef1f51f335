"""Whole models on a GPU: a training step and inference of CRATE, a training step of CRATE-MAE, and growth with N.

    python benchmarks/bench_model.py                      # all, in bf16 autocast; bench_cpu.py measures a CPU
    python benchmarks/bench_model.py --models B/16 "N = 785"     # only these
    python benchmarks/bench_model.py --smoke              # everything with tiny models, also on a CPU; writes nothing

Peers have the same images and, except the ViT, the same weights: the released form and ours, each eager and compiled,
ours with CUDA graphs, and timm's ViT of the same width, depth, heads and patch, compiled, with PyTorch's choice of
SDPA's backend. A training step is forward, cross-entropy, backward and AdamW (fused on a GPU); inference is a forward
in `inference_mode`, in which ours folds G in every call on a GPU and keeps it on a CPU. The gate of
`model_problem.py` comes first: a peer that differs from the released form has no numbers; if it is ours, eager or
compiled, the exit status is 1. One model is in memory at a time, with all its peers, which are measured in turn.
Calls follow each other without a pause, so a host that is slower than the device counts. `model_problem.cost`
documents the FLOPs and bytes.
"""

import sys
from dataclasses import replace

from harness import Run, run_benchmark

import model_problem
from measuring import measure_peers
from model_problem import COMPILED, GRAPHS, INFERENCE, OURS, RELEASED, TRAINING, VISIBLE, VIT, Size, make_problem

CRATES = {  # models with goals first, in case the run is interrupted
    "B/16": Size(768, 12, 12, 16, batch=256),
    "B/8": Size(768, 12, 12, 8, batch=64),
    "S/8": Size(384, 12, 6, 8, batch=64),  # the emergence paper's
    "T/16": Size(384, 12, 6, 16, batch=256),
    "S/16": Size(576, 12, 12, 16, batch=256),
    "L/16": Size(1024, 24, 16, 16, batch=128),
    "α-B/16": Size(768, 12, 12, 16, batch=128, alpha=True),
}
MAES = {
    "CRATE-MAE-T": Size(384, 12, 6, 16, batch=256, masked=True),
    "CRATE-MAE-S": Size(576, 12, 12, 16, batch=256, masked=True),
    "CRATE-MAE-B": Size(768, 12, 12, 16, batch=256, masked=True),
    "CRATE-MAE-L": Size(1024, 24, 16, 16, batch=128, masked=True),
}
GROWTH = {  # CRATE-B on one image
    "N = 197": Size(768, 12, 12, 16, batch=1),
    "N = 785": Size(768, 12, 12, 8, batch=1),
    "N = 3601": Size(768, 12, 12, 8, batch=1, image=480),
    "N = 16385": Size(768, 12, 12, 8, batch=1, image=1024),
}
_TINY = Size(32, 1, 2, 16, batch=2, image=64, classes=10)
# by table of results
MODELS = {"crate": CRATES, "model": MAES, "growth": GROWTH}
SMOKE = {"crate": {"tiny": _TINY}, "model": {"tiny MAE": replace(_TINY, masked=True)}, "growth": {"N = 17": _TINY}}
PASSES = {"crate": (TRAINING, INFERENCE), "model": (TRAINING,), "growth": (TRAINING, INFERENCE)}
PEERS = {  # the first is ours
    "crate": [OURS, RELEASED, OURS + COMPILED, OURS + GRAPHS, VIT + COMPILED, RELEASED + COMPILED],
    "model": [OURS, RELEASED, VISIBLE],
    "growth": [OURS, RELEASED],
}


def measure(table: str, model: str, size: Size, run: Run) -> list[dict]:
    """Measure the passes of a model in a table of results."""
    return [row for what in PASSES[table] for row in measure_one(model, size, what, PEERS[table], run)]


def measure_one(model: str, size: Size, what: str, names: list[str], run: Run) -> list[dict]:
    """Measure one pass of a model with the named peers; add images/s, the factors to two peers, and the MFU."""
    problem = make_problem(model, size, what, run)
    rows = measure_peers(problem, model_problem.peers(problem, names, run), run)
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


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/{crate,model,growth}.{json,md}; return 1 if a row is red."""
    return run_benchmark((MODELS, {}, SMOKE), measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
