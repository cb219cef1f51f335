"""xᵀg, summed over all rows: the gradient of ISTA's G and of the projections (kernels/README.md §4, §5).

x is taken as it is or as LayerNorm(x), g as it is or where ISTA's output is not zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, matmul_precision
from crate_fast.kernels.layer_norm import Norm
from crate_fast.kernels.product_common import blocks, load_masked_grad, load_tokens, norm_arguments
from crate_fast.kernels.tiles import Tile

__all__ = ["plan", "splits", "weight_gradient"]

_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _weight_gradient_kernel(
    x_ptr,  # x or, with HAS_NORM, what LayerNorm takes [M, C], contiguous
    grad_ptr,  # g [M, J], contiguous
    y_ptr,  # ISTA's output [M, J], contiguous: g counts where it is not 0; or None
    partial_ptr,  # [splits, C, J], contiguous, fp32
    mean_ptr,  # of x's rows [M], fp32, or None
    rstd_ptr,  # 1 / standard deviation of x's rows [M], fp32, or None
    gamma_ptr,  # LayerNorm's weight [C], or None
    beta_ptr,  # LayerNorm's bias [C], or None
    n_rows,
    rows_per_split,  # a multiple of BLOCK_K
    WIDTH: tl.constexpr,  # C
    GRAD_WIDTH: tl.constexpr,  # J
    HAS_NORM: tl.constexpr,
    DTYPE: tl.constexpr,  # the product's
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A BLOCK_M×BLOCK_N tile of one split's share of xᵀg, over rows_per_split rows of x and g.

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
        mean, rstd = 0.0, 0.0
        if HAS_NORM:
            mean = tl.load(mean_ptr + offs_k, mask=offs_k < n_rows, other=0.0)
            rstd = tl.load(rstd_ptr + offs_k, mask=offs_k < n_rows, other=0.0)
        x = load_tokens(x_ptr, mean, rstd, gamma_ptr, beta_ptr, offs_k, offs_m, n_rows, WIDTH, BLOCK_M, HAS_NORM)
        grad = load_masked_grad(grad_ptr, y_ptr, offs_k, offs_n, n_rows, GRAD_WIDTH, BLOCK_N)
        acc = tl.dot(tl.trans(x.to(DTYPE)), grad.to(DTYPE), acc, input_precision=PRECISION)
    tl.store(
        partial_ptr + (split.to(tl.int64) * WIDTH + offs_m[:, None]) * GRAD_WIDTH + offs_n[None, :],
        acc,
        mask=(offs_m < WIDTH)[:, None] & (offs_n < GRAD_WIDTH)[None, :],
    )


def plan(
    x: Tensor,
    grad: Tensor,
    y: Tensor | None,
    partial: Tensor,
    rows_per_split: int,
    dtype: torch.dtype,
    norm: Norm | None,
    tile: Tile,
) -> Launch:
    """The launch for the shares on these tensors; what `weight_gradient` runs and the compile report compiles."""
    (n_rows, width), grad_width = x.shape, grad.shape[1]
    precision = matmul_precision(dtype, x.dtype)
    return Launch(
        kernel=_weight_gradient_kernel,
        grid=(triton.cdiv(width, tile.block_m) * triton.cdiv(grad_width, tile.block_n), partial.shape[0]),
        arguments={
            "x_ptr": x,
            "grad_ptr": grad,
            "y_ptr": y,
            "partial_ptr": partial,
            **norm_arguments(norm),
            "n_rows": n_rows,
            "rows_per_split": rows_per_split,
        },
        constants={
            **blocks(tile, precision.dot),
            "WIDTH": width,
            "GRAD_WIDTH": grad_width,
            "HAS_NORM": norm is not None,
            "DTYPE": _TRITON_DTYPES[dtype],
        },
        tile=tile,
    )


def weight_gradient(
    x: Tensor, grad: Tensor, y: Tensor | None, dtype: torch.dtype, norm: Norm | None, tile: Tile
) -> Tensor:
    """xᵀg' [C, J] in fp32, multiplied in `dtype`.

    Args:
        x: [M, C], standing for LayerNorm(x) with a norm.
        grad: g [M, J].
        y: ISTA's output [M, J], g' = g·[y ≠ 0]; without it g' = g.
        dtype: What is multiplied.
        norm: Statistics and weights of a LayerNorm in front.
        tile: The blocks of C, of J and of rows.
    """
    x, grad, y = x.contiguous(), grad.contiguous(), None if y is None else y.contiguous()
    (n_rows, width), grad_width = x.shape, grad.shape[1]
    if x.numel() == 0 or grad.numel() == 0:
        return torch.zeros(width, grad_width, dtype=torch.float32, device=x.device)
    shares, rows_per_split = splits(n_rows, width, grad_width, x.device, tile)
    partial = torch.empty(shares, width, grad_width, dtype=torch.float32, device=x.device)
    plan(x, grad, y, partial, rows_per_split, dtype, norm, tile).run()
    return partial.sum(0) if shares > 1 else partial[0]


def splits(n_rows: int, width: int, grad_width: int, device: torch.device, tile: Tile) -> tuple[int, int]:
    """How many shares, and rows in each, so that the tiles of xᵀg keep every multiprocessor busy; none is empty."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    tiles = triton.cdiv(width, tile.block_m) * triton.cdiv(grad_width, tile.block_n)
    wanted = max(1, min(2 * processors // tiles, triton.cdiv(n_rows, 4 * tile.block_k)))
    rows = triton.cdiv(triton.cdiv(n_rows, wanted), tile.block_k) * tile.block_k
    return triton.cdiv(n_rows, rows), rows
