"""aᵀg, summed over all rows: the gradient of ISTA's G (kernels/README.md §5)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, matmul_precision
from crate_fast.kernels.product import fitted, load_tile
from crate_fast.kernels.support import processors
from crate_fast.kernels.tiles import Tile, lookup

__all__ = ["plan", "splits", "weight_gradient"]


@triton.jit
def _weight_gradient_kernel(
    a_ptr,  # [M, C], contiguous
    grad_ptr,  # g [M, J], contiguous, a's dtype
    partial_ptr,  # [splits, C, J], contiguous, fp32
    n_rows,
    rows_per_split,  # a multiple of BLOCK_K
    WIDTH: tl.constexpr,  # C
    GRAD_WIDTH: tl.constexpr,  # J
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A BLOCK_M×BLOCK_N tile of one split's share of aᵀg, over rows_per_split rows of a and g.

    The shares are written apart and added by the caller in a fixed order: deterministic, no atomics.
    Grid: (⌈C/BLOCK_M⌉·⌈J/BLOCK_N⌉, splits). 2·M·C·J FLOPs in all.
    """
    col_blocks: tl.constexpr = (GRAD_WIDTH + BLOCK_N - 1) // BLOCK_N
    offs_m = (tl.program_id(0) // col_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, n_rows)
    tl.assume(end > start)  # no split is empty; see row_blocks.py's backward

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(start, end, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        a = load_tile(a_ptr, offs_k, offs_m, n_rows, WIDTH, BLOCK_M)
        grad = load_tile(grad_ptr, offs_k, offs_n, n_rows, GRAD_WIDTH, BLOCK_N)
        acc = tl.dot(tl.trans(a), grad, acc, input_precision=PRECISION)
    tl.store(
        partial_ptr + (split.to(tl.int64) * WIDTH + offs_m[:, None]) * GRAD_WIDTH + offs_n[None, :],
        acc,
        mask=(offs_m < WIDTH)[:, None] & (offs_n < GRAD_WIDTH)[None, :],
    )


def plan(a: Tensor, grad: Tensor, partial: Tensor, rows_per_split: int, tile: Tile) -> Launch:
    """The launch for the shares on these tensors; what `weight_gradient` runs and the compile report compiles."""
    (n_rows, width), grad_width = a.shape, grad.shape[1]
    return Launch(
        kernel=_weight_gradient_kernel,
        grid=(triton.cdiv(width, tile.block_m) * triton.cdiv(grad_width, tile.block_n), partial.shape[0]),
        arguments={
            "a_ptr": a,
            "grad_ptr": grad,
            "partial_ptr": partial,
            "n_rows": n_rows,
            "rows_per_split": rows_per_split,
        },
        constants={
            "WIDTH": width,
            "GRAD_WIDTH": grad_width,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "PRECISION": matmul_precision(a.dtype).dot,
        },
        tile=tile,
    )


def weight_gradient(a: Tensor, grad: Tensor, tile: Tile | None = None) -> Tensor:
    """aᵀg [C, J] in fp32.

    Args:
        a: [M, C].
        grad: g [M, J], a's dtype, which is the product's.
        tile: The blocks of C, of J and of rows, in place of the table's.
    """
    a, grad = a.contiguous(), grad.contiguous()
    (n_rows, width), grad_width = a.shape, grad.shape[1]
    if a.numel() == 0 or grad.numel() == 0:
        return torch.zeros(width, grad_width, dtype=torch.float32, device=a.device)
    tile = tile or fitted(lookup("weight_gradient", a.device, matmul_precision(a.dtype).row), grad_width)
    shares, rows_per_split = splits(n_rows, width, grad_width, a.device, tile)
    partial = torch.empty(shares, width, grad_width, dtype=torch.float32, device=a.device)
    plan(a, grad, partial, rows_per_split, tile).run()
    return partial.sum(0) if shares > 1 else partial[0]


def splits(n_rows: int, width: int, grad_width: int, device: torch.device, tile: Tile) -> tuple[int, int]:
    """How many shares, and rows in each, so that the tiles of aᵀg keep every multiprocessor busy; none is empty."""
    at_once = processors(device) * (1 if tile.block_m * tile.block_n > 128 * 128 else 2)
    tiles = triton.cdiv(width, tile.block_m) * triton.cdiv(grad_width, tile.block_n)
    wanted = max(1, min(at_once // tiles, triton.cdiv(n_rows, 4 * tile.block_k)))
    rows = triton.cdiv(triton.cdiv(n_rows, wanted), tile.block_k) * tile.block_k
    return triton.cdiv(n_rows, rows), rows
