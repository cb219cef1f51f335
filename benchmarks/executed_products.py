"""What ISTA behind a LayerNorm executes, without a GPU: with its operands prepared first, and inside the products.

    python benchmarks/executed_products.py      # writes results/executed_products.{json,md}

A product's tile of BLOCK_M rows and BLOCK_N columns reads BLOCK_M rows of one operand and BLOCK_N of the other from
the L2 cache, so an operand that is made where it is loaded (LayerNorm(x) from fp32 x, the masked gradient from g and
y) is read with all its bytes as often as there are blocks of the other. Prepared first, it costs one pass over device
memory and is read in bf16 from then on. Rates are an H200's and assumed, not measured: 800 TFLOP/s, 6 TB/s from L2
(what a plain 128×256 Triton product takes at 502 TFLOP/s on an H100), 4.2 TB/s from memory. A kernel's bound is the
largest of its three times; "bound µs" is the sum over the pass's kernels. LayerNorm's own backward is the same for
both and not counted, nor is folding G.
"""

from dataclasses import dataclass

import torch
from bench_ista import SHAPES, Shape
from harness import publish
from tile_work import padded

from crate_fast.kernels.product import fitted, fitted_product
from crate_fast.kernels.tiles import Tile, lookup

FLOPS_PER_S, L2_BYTES_PER_S, BYTES_PER_S = 800e12, 6e12, 4.2e12
LOW = 2  # bytes of what the tensor cores multiply
INSIDE = Tile(128, 128, 8, 3, 32)  # the largest that did not spill with the preparation inside
PREPARED, IN_THE_PRODUCT = "ours: prepared first", "prepared in the product"


@dataclass(frozen=True)
class Kernel:
    """What one kernel executes: operations, bytes from L2 (a product's operands) and bytes of device memory."""

    flops: float
    l2_bytes: float
    moved_bytes: float

    @property
    def seconds(self) -> float:
        """Its bound."""
        return max(self.flops / FLOPS_PER_S, self.l2_bytes / L2_BYTES_PER_S, self.moved_bytes / BYTES_PER_S)


def _pass_over(moved_bytes: float) -> Kernel:
    return Kernel(0.0, 0.0, moved_bytes)


def _product(m: int, n: int, k: int, tile: Tile, a_bytes: int, b_bytes: int, moved_bytes: float) -> Kernel:
    rows, columns, depth = padded(m, tile.block_m), padded(n, tile.block_n), padded(k, tile.block_k)
    tiles = rows // tile.block_m * columns // tile.block_n
    operands = tiles * depth * (tile.block_m * a_bytes + tile.block_n * b_bytes)
    return Kernel(2.0 * rows * columns * depth, operands, moved_bytes)


def schedules(shape: Shape, stored: int) -> dict[str, dict[str, list[Kernel]]]:
    """The kernels of each pass and schedule, tokens being `stored` bytes an element."""
    rows, width = shape.rows, shape.width
    low, tokens, square = rows * width * LOW, rows * width * stored, 4 * width**2
    precision, device = "half" if stored == LOW else "mixed", torch.device("cpu")
    forward, backward = (lookup(f"ista_{way}", device, precision) for way in ("forward", "backward_input"))
    gradient = lookup("weight_gradient", device, "half")
    signs = rows * width  # [y ≠ 0], a byte each
    added = 0 if stored == LOW else tokens  # else the masked gradient is what is added
    normalize = _pass_over(tokens + low)
    return {
        PREPARED: {
            "forward": [
                normalize,
                _product(rows, width, width, fitted_product(forward, width), LOW, LOW, low + 2 * tokens + signs),
            ],
            "backward": [
                _pass_over(tokens + signs + low),
                _product(rows, width, width, fitted_product(backward, width), LOW, LOW, low + added + tokens),
                *([] if stored == LOW else [_pass_over(low)]),  # n, written beside LayerNorm's gradient; else kept
                _product(width, width, rows, fitted(gradient, width), LOW, LOW, 2 * low + square),
            ],
        },
        IN_THE_PRODUCT: {
            "forward": [_pass_over(tokens), _product(rows, width, width, INSIDE, stored, LOW, 2 * tokens)],
            "backward": [
                _product(rows, width, width, INSIDE, 2 * stored, LOW, 3 * tokens),
                _product(width, width, rows, INSIDE, stored, 2 * stored, 3 * tokens + square),
            ],
        },
    }


def rows() -> list[dict]:
    """A row a shape, dtype of the tokens, pass and schedule."""
    found = []
    for name, shape in SHAPES.items():
        for stored, dtype in ((4, "fp32 (autocast)"), (2, "bf16")):
            kernels = schedules(shape, stored)
            for what in ("forward", "backward"):
                found += [_row(name, dtype, what, schedule, kernels[schedule][what]) for schedule in kernels]
    return found


def _row(name: str, dtype: str, what: str, schedule: str, kernels: list[Kernel]) -> dict:
    flops, l2_bytes, moved = (
        sum(getattr(k, field) for k in kernels) for field in ("flops", "l2_bytes", "moved_bytes")
    )
    return {
        "shape": name,
        "tokens": dtype,
        "pass": what,
        "schedule": schedule,
        "matrix GFLOP": flops / 1e9,
        "L2 GB": l2_bytes / 1e9,
        "MB": moved / 1e6,
        "matrix µs": flops / FLOPS_PER_S * 1e6,
        "L2 µs": l2_bytes / L2_BYTES_PER_S * 1e6,
        "bytes µs": moved / BYTES_PER_S * 1e6,
        "bound µs": sum(kernel.seconds for kernel in kernels) * 1e6,
    }


if __name__ == "__main__":
    publish("executed_products", rows())
