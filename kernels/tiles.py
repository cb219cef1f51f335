"""The static tile table: which block sizes, warps and pipeline stages each kernel runs with. Never tuned at run time.

Ranks agree and the first step does not stall. `benchmarks/gpu_check.py` measures candidates on a GPU and writes rows
to a file; `settings.tiles_file` names one whose rows take precedence over these.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from crate_fast.kernels.support import architecture
from crate_fast.settings import tiles_file

__all__ = ["ARCHITECTURES", "SHARED_MEMORY", "TABLE", "Tile", "find", "lookup"]

SHARED_MEMORY = {  # bytes a program may use
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
}
ARCHITECTURES = tuple(SHARED_MEMORY)


@dataclass(frozen=True)
class Tile:
    """Block sizes in tokens (and channels, for products), warps a program, software pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_k: int = 0  # of products only
    one_exp: bool = False  # attention's gradient: one exponential for two weights first
    persistent: bool = False  # products: one program a multiprocessor, which prefetches its next tile
    chosen: bool = True  # the output map: False where PyTorch's product runs by itself instead


# (kernel, precision), and where they differ an architecture, and a head width to the next power of two: the tile.
# Precisions: "half" (float16, bfloat16), "tf32" (float32). The row with the most words counts.
TABLE: dict[tuple[str | int, ...], Tile] = {
    ("attention_forward", "half"): Tile(128, 64, 8, 3),
    ("attention_forward", "half", "sm_80", 128): Tile(32, 32, 4, 2),
    ("attention_forward", "half", "sm_86", 128): Tile(32, 32, 4, 2),
    ("attention_forward", "tf32"): Tile(64, 32, 4, 2),
    ("attention_forward", "tf32", 128): Tile(32, 32, 8, 2),
    ("attention_backward", "half"): Tile(128, 32, 8, 2),
    ("attention_backward", "half", "sm_90"): Tile(128, 64, 8, 2, one_exp=True),
    ("attention_backward", "half", "sm_90", 128): Tile(128, 32, 8, 2, one_exp=True),
    ("attention_backward", "half", 128): Tile(64, 32, 8, 2),
    ("attention_backward", "tf32"): Tile(32, 16, 8, 1),
    ("attention_backward", "tf32", 32): Tile(32, 32, 8, 1),
    ("attention_backward", "tf32", 128): Tile(32, 32, 8, 1),
    ("whole_head_forward", "half", "sm_90", 64): Tile(64, 32, 4, 1),
    ("whole_head_forward", "half", "sm_100", 64): Tile(64, 32, 4, 1),
    ("whole_head_backward", "half", "sm_90", 64): Tile(64, 16, 4, 1),
    ("whole_head_backward", "half", "sm_100", 64): Tile(64, 16, 4, 1),
    ("ista_forward", "half"): Tile(128, 128, 8, 3, 64),
    ("ista_forward", "half", "sm_86"): Tile(128, 128, 8, 3, 32),
    ("ista_forward", "half", "sm_90"): Tile(128, 256, 8, 4, 64, persistent=True),
    ("ista_forward", "half", "sm_100"): Tile(128, 256, 8, 3, 64, persistent=True),
    ("ista_forward", "tf32"): Tile(128, 64, 8, 3, 32),
    ("ista_backward_input", "half"): Tile(128, 128, 8, 3, 64),
    ("ista_backward_input", "half", "sm_86"): Tile(128, 128, 8, 3, 32),
    ("ista_backward_input", "half", "sm_90"): Tile(128, 256, 8, 4, 64, persistent=True),
    ("ista_backward_input", "half", "sm_100"): Tile(128, 256, 8, 3, 64, persistent=True),
    ("ista_backward_input", "tf32"): Tile(128, 64, 8, 3, 32),
    ("output_map", "half"): Tile(128, 128, 8, 3, 64),
    ("output_map", "half", "sm_86"): Tile(128, 128, 8, 3, 32),
    ("output_map", "half", "sm_90"): Tile(128, 256, 8, 4, 64, persistent=True),
    ("output_map", "half", "sm_100"): Tile(128, 256, 8, 3, 64, persistent=True),
    ("weight_gradient", "half"): Tile(128, 128, 8, 3, 64),
    ("weight_gradient", "half", "sm_86"): Tile(128, 128, 8, 3, 32),
    ("weight_gradient", "half", "sm_90"): Tile(128, 256, 8, 3, 64),
    ("weight_gradient", "half", "sm_100"): Tile(128, 256, 8, 3, 64),
    ("weight_gradient", "tf32"): Tile(128, 64, 8, 3, 32),
}


@functools.cache
def _measured() -> dict[tuple[str, str, str, int], Tile | None]:
    """The rows of `settings.tiles_file`: kernel, architecture, precision, block_d, tile (null: not this kernel)."""
    path = tiles_file()
    rows = [] if path is None else json.loads(Path(path).read_text())
    keys = ("kernel", "precision", "architecture", "block_d")
    return {tuple(row[key] for key in keys): Tile(**row["tile"]) if row["tile"] else None for row in rows}


def find(kernel: str, device: torch.device, precision: str, block_d: int = 0) -> Tile | None:
    """`lookup` for a kernel that not every device and precision has a row for: None where there is none."""
    name = architecture(device)
    if (kernel, precision, name, block_d) in _measured():
        return _measured()[kernel, precision, name, block_d]
    keys = [(kernel, precision, name, block_d), (kernel, precision, name), (kernel, precision, block_d)]
    return next((TABLE[key] for key in [*keys, (kernel, precision)] if key in TABLE), None)


def lookup(kernel: str, device: torch.device, precision: str, block_d: int = 0) -> Tile:
    """The tile of a kernel on a CUDA device; on the CPU, where only the interpreter runs, Hopper's.

    `precision` as `launch.precision` gives it; `block_d` is the head width to the next power of two, 0 for products.
    """
    tile = find(kernel, device, precision, block_d)
    if tile is None:
        raise KeyError(f"the tile table has no row for {kernel}, {precision}, on {architecture(device)}")
    return tile
