"""What each schedule of subspace attention executes, without a GPU: ours, and a FlashAttention-style one.

    python benchmarks/executed_work.py      # writes results/executed.{json,md}

Matrix FLOPs, exponentials and device-memory bytes of one pass over a shape, in bf16 with Hopper's rows of the tile
table, and how long each would take alone at an H200's rates, which are assumed here, not measured: 800 TFLOP/s,
16 exponentials a clock on each of 132 multiprocessors at 1.755 GHz, 4.2 TB/s. The largest of the three is a bound;
their sum is what a schedule takes that overlaps nothing. SDPA on (w, w, w) reads W once (its three operands are one
memory); its backward writes dQ in fp32 by atomics and reads it again, writes dK and dV, and autograd adds the three.
"""

import torch
from bench_mssa import SHAPES, Shape
from harness import publish
from tile_work import Executed, attention_executed, flash_executed, row_blocks_executed

MATRIX_FLOPS_PER_S, EXPS_PER_S, BYTES_PER_S = 800e12, 16 * 132 * 1.755e9, 4.2e12
PASSES = {"forward": (2, 1), "backward": (5, 2)}  # products and exponentials a logit, nominal
OURS, ROWS, FLASH = "ours", "ours, blocks of rows", "FlashAttention-style"
TENSORS = {"forward": 2, "backward": 4}  # of B·N·H·D, read or written once
FLASH_BACKWARD_BYTES = 3 * 2 + 2 * 2 + 2 * 4 + 2 * 2 + 2 + 3 * 2 + 2  # W, O, dO; dK, dV; dQ fp32; its bf16; the sum


def _row(name: str, shape: Shape, what: str, schedule: str, executed: Executed) -> dict:
    elements = shape.batch * shape.n_tokens * shape.heads * shape.head_dim
    moved = 2 * TENSORS[what] * elements
    if schedule == FLASH and what == "backward":
        moved = FLASH_BACKWARD_BYTES * elements
    logits = shape.batch * shape.heads * shape.n_tokens**2
    times = [executed.flops / MATRIX_FLOPS_PER_S, executed.exps / EXPS_PER_S, moved / BYTES_PER_S]
    return {
        "shape": name,
        "pass": what,
        "schedule": schedule,
        "matrix GFLOP": executed.flops / 1e9,
        "of nominal": executed.flops / (2 * PASSES[what][0] * logits * shape.head_dim),
        "exps, G": executed.exps / 1e9,
        "MB": moved / 1e6,
        "matrix µs": times[0] * 1e6,
        "exp µs": times[1] * 1e6,
        "bytes µs": times[2] * 1e6,
        "bound µs": max(times) * 1e6,
        "sum µs": sum(times) * 1e6,
    }


def rows() -> list[dict]:
    """A row a shape, pass and schedule; blocks of rows only where ours is something else."""
    device, found = torch.device("cpu"), []
    for name, shape in SHAPES.items():
        size = (shape.batch * shape.heads, shape.n_tokens, shape.head_dim)
        ours = attention_executed(*size, device, torch.bfloat16)
        by_rows = row_blocks_executed(*size, device, torch.bfloat16)
        flash = flash_executed(*size)
        for what in PASSES:
            found.append(_row(name, shape, what, OURS, ours[what]))
            if ours[what] != by_rows[what]:
                found.append(_row(name, shape, what, ROWS, by_rows[what]))
            found.append(_row(name, shape, what, FLASH, flash[what]))
    return found


if __name__ == "__main__":
    publish("executed", rows())
