"""The ISTA step y = shrink(x + xG, ηλ) as one product, and its gradients as two (kernels/README.md §4).

Each kernel takes x as it is, or as LayerNorm(h) made from h's rows and their statistics where a tile is loaded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, matmul_precision
from crate_fast.kernels.layer_norm import Norm
from crate_fast.kernels.product_common import (
    GROUP_M,
    blocks,
    fitted,
    load_masked_grad,
    load_tile,
    load_tokens,
    norm_arguments,
    tile_start,
)
from crate_fast.kernels.tiles import Tile, lookup
from crate_fast.kernels.weight_gradient import weight_gradient

__all__ = ["backward_folded", "backward_input", "forward", "plan_backward_input", "plan_forward"]


@triton.jit
def _ista_fwd_kernel(
    x_ptr,  # x or, with HAS_NORM, h [M, C], contiguous
    folded_ptr,  # G [C, C], contiguous, in the product's dtype
    y_ptr,  # [M, C], contiguous, x's dtype
    mean_ptr,  # of h's rows [M], fp32, or None
    rstd_ptr,  # 1 / standard deviation of h's rows [M], fp32, or None
    gamma_ptr,  # LayerNorm's weight [C], or None
    beta_ptr,  # LayerNorm's bias [C], or None
    n_rows,
    shift,  # ηλ
    WIDTH: tl.constexpr,
    SOFT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = shrink(x + xG, ηλ), a BLOCK_M×BLOCK_N tile a program (paper, Eq. 7, with G = η(D − DᵀD)).

    x (or LayerNorm(h)) is rounded to G's dtype for the product only: the residual, the sum and the shrinkage are
    fp32. Grid: (⌈M/BLOCK_M⌉·⌈C/BLOCK_N⌉). Deterministic. 2·M·C² FLOPs.
    """
    start_m, start_n = tile_start(tl.program_id(0), n_rows, WIDTH, BLOCK_M, BLOCK_N, GROUP)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < n_rows
    mean, rstd = 0.0, 0.0
    if HAS_NORM:
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, WIDTH, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x = load_tokens(x_ptr, mean, rstd, gamma_ptr, beta_ptr, offs_m, offs_k, n_rows, WIDTH, BLOCK_K, HAS_NORM)
        folded = load_tile(folded_ptr, offs_k, offs_n, WIDTH, WIDTH, BLOCK_N)
        acc = tl.dot(x.to(folded.dtype), folded, acc, input_precision=PRECISION)

    tokens = load_tokens(x_ptr, mean, rstd, gamma_ptr, beta_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK_N, HAS_NORM)
    u = tokens.to(tl.float32) + acc
    if SOFT:
        y = tl.where(u > shift, u - shift, tl.where(u < -shift, u + shift, u * 0.0))
    else:
        y = tl.where(u <= shift, 0.0, u - shift)  # NaN stays NaN
    tl.store(
        y_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_n < WIDTH)[None, :],
    )


@triton.jit
def _ista_bwd_input_kernel(
    grad_ptr,  # g [M, C], contiguous
    y_ptr,  # forward's output [M, C], contiguous
    folded_ptr,  # G [C, C], contiguous, in the product's dtype
    dx_ptr,  # [M, C], contiguous
    n_rows,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = g' + g'Gᵀ with g' = g·[y ≠ 0], a BLOCK_M×BLOCK_N tile a program; g' is never written.

    With a LayerNorm in front this is the gradient of its output. Grid as forward; deterministic; 2·M·C² FLOPs.
    """
    start_m, start_n = tile_start(tl.program_id(0), n_rows, WIDTH, BLOCK_M, BLOCK_N, GROUP)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, WIDTH, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        grad = load_masked_grad(grad_ptr, y_ptr, offs_m, offs_k, n_rows, WIDTH, BLOCK_K)
        folded = load_tile(folded_ptr, offs_n, offs_k, WIDTH, WIDTH, BLOCK_K)  # rows of G, columns of Gᵀ
        acc = tl.dot(grad.to(folded.dtype), tl.trans(folded), acc, input_precision=PRECISION)
    acc += load_masked_grad(grad_ptr, y_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK_N).to(tl.float32)
    tl.store(
        dx_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=(offs_m < n_rows)[:, None] & (offs_n < WIDTH)[None, :],
    )


def plan_forward(
    x: Tensor, folded: Tensor, y: Tensor, shift: float, soft: bool, norm: Norm | None, tile: Tile | None = None
) -> Launch:
    """The forward launch on these tensors; what `forward` runs and the compile report compiles."""
    n_rows, width = x.shape
    precision = matmul_precision(folded.dtype, x.dtype)
    name = "ista_forward" if norm is None else "norm_ista_forward"
    tile = tile or fitted(lookup(name, x.device, precision.row), width)
    return Launch(
        kernel=_ista_fwd_kernel,
        grid=(triton.cdiv(n_rows, tile.block_m) * triton.cdiv(width, tile.block_n),),
        arguments={
            "x_ptr": x,
            "folded_ptr": folded,
            "y_ptr": y,
            **norm_arguments(norm),
            "n_rows": n_rows,
            "shift": shift,
        },
        constants={
            **blocks(tile, precision.dot),
            "WIDTH": width,
            "GROUP": GROUP_M,
            "SOFT": soft,
            "HAS_NORM": norm is not None,
        },
        tile=tile,
    )


def plan_backward_input(grad: Tensor, y: Tensor, folded: Tensor, dx: Tensor, tile: Tile | None = None) -> Launch:
    """The launch for dx on these tensors; what `backward_input` runs and the compile report compiles."""
    n_rows, width = grad.shape
    precision = matmul_precision(folded.dtype, grad.dtype)
    tile = tile or fitted(lookup("ista_backward_input", grad.device, precision.row), width)
    return Launch(
        kernel=_ista_bwd_input_kernel,
        grid=(triton.cdiv(n_rows, tile.block_m) * triton.cdiv(width, tile.block_n),),
        arguments={"grad_ptr": grad, "y_ptr": y, "folded_ptr": folded, "dx_ptr": dx, "n_rows": n_rows},
        constants={**blocks(tile, precision.dot), "WIDTH": width, "GROUP": GROUP_M},
        tile=tile,
    )


def forward(
    x: Tensor, folded: Tensor, shift: float, soft: bool = False, norm: Norm | None = None, tile: Tile | None = None
) -> Tensor:
    """y = shrink(x + xG, ηλ), or of LayerNorm(x).

    Args:
        x: [M, C].
        folded: G [C, C]; its dtype is the product's.
        shift: ηλ, at least 0.
        soft: Soft threshold instead of ReLU.
        norm: Statistics and weights of a LayerNorm in front; see `layer_norm.row_statistics`.
        tile: In place of the table's.

    Returns:
        y [M, C], contiguous, in x's dtype.
    """
    x, folded = x.contiguous(), folded.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        plan_forward(x, folded, y, shift, soft, norm, tile).run()
    return y


def backward_input(grad: Tensor, y: Tensor, folded: Tensor, tile: Tile | None = None) -> Tensor:
    """dx = g' + g'Gᵀ [M, C] in g's dtype, with g' = g·[y ≠ 0]; g and y [M, C], G [C, C]."""
    grad, y, folded = grad.contiguous(), y.contiguous(), folded.contiguous()
    dx = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if grad.numel():
        plan_backward_input(grad, y, folded, dx, tile).run()
    return dx


def backward_folded(
    x: Tensor, grad: Tensor, y: Tensor, dtype: torch.dtype, norm: Norm | None = None, tile: Tile | None = None
) -> Tensor:
    """dG = xᵀg' [C, C] in fp32, multiplied in `dtype`; x, g and y [M, C], x standing for LayerNorm(x) with a norm."""
    name = "ista_backward_folded" if norm is None else "norm_ista_backward_folded"
    tile = tile or fitted(lookup(name, x.device, matmul_precision(dtype, x.dtype).row), x.shape[1])
    return weight_gradient(x, grad, y, dtype, norm, tile)
