"""What kernels over whole rows share: their tile, and sums over all rows by shares that are added in order."""

import torch
import triton
from torch import Tensor

from crate_fast.kernels.tiles import Tile

__all__ = ["row_constants", "row_programs", "rows_tile", "shares"]

ROW_ELEMENTS = 4096  # of a tile of whole rows
MAX_PROGRAMS = 1024  # of a kernel that sums over rows: each writes one row of shares


def rows_tile(width: int) -> Tile:
    """Whole rows of `width` columns, padded to a power of two."""
    block_c = triton.next_power_of_2(width)
    return Tile(block_m=max(1, ROW_ELEMENTS // block_c), block_n=block_c, num_warps=4, num_stages=1)


def row_constants(width: int) -> dict:
    """The tile as a kernel's constants WIDTH, BLOCK_M and BLOCK_C."""
    tile = rows_tile(width)
    return {"WIDTH": width, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n}


def row_programs(n_rows: int, width: int, partial: Tensor | None) -> int:
    """How many programs there are: a block of rows each, or as many as there are shares."""
    return triton.cdiv(n_rows, rows_tile(width).block_m) if partial is None else partial.shape[1]


def shares(count: int, rows: Tensor) -> Tensor:
    """Room for each program's share of `count` sums over rows [M, C]: [count, programs, C] in fp32."""
    n_rows, width = rows.shape
    programs = min(MAX_PROGRAMS, row_programs(n_rows, width, None))
    return torch.empty(count, programs, width, dtype=torch.float32, device=rows.device)
