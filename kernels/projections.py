"""The two products around attention, with what stands beside them (kernels/README.md §5).

In front: W = LayerNorm(x) Uᵀ, the LayerNorm made where a tile of x is loaded. Behind: h = x + O Vᵀ + b, with the
statistics of h's rows for the LayerNorm that follows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, matmul_precision
from crate_fast.kernels.layer_norm import Norm, combine_statistics
from crate_fast.kernels.product_common import (
    GROUP_M,
    blocks,
    load_channels,
    load_tile,
    load_tokens,
    norm_arguments,
    tile_start,
)
from crate_fast.kernels.tiles import Tile

__all__ = ["norm_product", "plan_norm_product", "plan_product_residual", "product_residual"]


@triton.jit
def _norm_product_kernel(
    x_ptr,  # [M, C], contiguous
    weight_ptr,  # U [J, C], contiguous, in the product's dtype
    out_ptr,  # [M, J], contiguous, in the product's dtype
    mean_ptr,  # of x's rows [M], fp32
    rstd_ptr,  # 1 / standard deviation of x's rows [M], fp32
    gamma_ptr,  # LayerNorm's weight [C]
    beta_ptr,  # LayerNorm's bias [C]
    n_rows,
    WIDTH: tl.constexpr,  # C
    OUT_WIDTH: tl.constexpr,  # J
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """LayerNorm(x) Uᵀ, a BLOCK_M×BLOCK_N tile a program; the normalised rows are rounded to U's dtype.

    Grid: (⌈M/BLOCK_M⌉·⌈J/BLOCK_N⌉). Deterministic. 2·M·C·J FLOPs.
    """
    start_m, start_n = tile_start(tl.program_id(0), n_rows, OUT_WIDTH, BLOCK_M, BLOCK_N, GROUP)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mean = tl.load(mean_ptr + offs_m, mask=offs_m < n_rows, other=0.0)
    rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < n_rows, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, WIDTH, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x = load_tokens(x_ptr, mean, rstd, gamma_ptr, beta_ptr, offs_m, offs_k, n_rows, WIDTH, BLOCK_K, True)
        weight = load_tile(weight_ptr, offs_n, offs_k, OUT_WIDTH, WIDTH, BLOCK_K)
        acc = tl.dot(x.to(weight.dtype), tl.trans(weight), acc, input_precision=PRECISION)
    tl.store(
        out_ptr + offs_m.to(tl.int64)[:, None] * OUT_WIDTH + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_m < n_rows)[:, None] & (offs_n < OUT_WIDTH)[None, :],
    )


@triton.jit
def _product_residual_kernel(
    tokens_ptr,  # O [M, J], contiguous
    weight_ptr,  # V [C, J], contiguous, O's dtype
    bias_ptr,  # b [C]
    x_ptr,  # [M, C], contiguous
    h_ptr,  # [M, C], contiguous, x's dtype
    partial_ptr,  # mean and sum of squares of each block of columns [2, ⌈C/BLOCK_N⌉, M], fp32, or None
    n_rows,
    INNER: tl.constexpr,  # J
    WIDTH: tl.constexpr,  # C
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = x + O Vᵀ + b, a BLOCK_M×BLOCK_N tile a program; product, bias and residual are added in fp32.

    The statistics are of h as it is written. Grid: (⌈M/BLOCK_M⌉·⌈C/BLOCK_N⌉). Deterministic. 2·M·C·J FLOPs.
    """
    start_m, start_n = tile_start(tl.program_id(0), n_rows, WIDTH, BLOCK_M, BLOCK_N, GROUP)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, INNER, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        tokens = load_tile(tokens_ptr, offs_m, offs_k, n_rows, INNER, BLOCK_K)
        weight = load_tile(weight_ptr, offs_n, offs_k, WIDTH, INNER, BLOCK_K)
        acc = tl.dot(tokens, tl.trans(weight), acc, input_precision=PRECISION)
    acc += load_channels(bias_ptr, offs_n, WIDTH, BLOCK_N)[None, :]
    acc += load_tile(x_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK_N).to(tl.float32)
    h = acc.to(h_ptr.dtype.element_ty)
    mask_m, mask_n = offs_m < n_rows, offs_n < WIDTH
    tl.store(
        h_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :], h, mask=mask_m[:, None] & mask_n[None, :]
    )
    if partial_ptr is not None:
        count = tl.minimum(BLOCK_N, WIDTH - start_n)
        values = tl.where(mask_n[None, :], h.to(tl.float32), 0.0)
        mean = tl.sum(values, 1) / count
        centred = tl.where(mask_n[None, :], values - mean[:, None], 0.0)
        shares: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
        share = partial_ptr + (start_n // BLOCK_N) * n_rows + offs_m
        tl.store(share, mean, mask=mask_m)
        tl.store(share + shares * n_rows, tl.sum(centred * centred, 1), mask=mask_m)


def plan_norm_product(x: Tensor, norm: Norm, weight: Tensor, out: Tensor, tile: Tile) -> Launch:
    """The launch on these tensors; what `norm_product` runs and the compile report compiles."""
    (n_rows, width), out_width = x.shape, weight.shape[0]
    return Launch(
        kernel=_norm_product_kernel,
        grid=(triton.cdiv(n_rows, tile.block_m) * triton.cdiv(out_width, tile.block_n),),
        arguments={
            "x_ptr": x,
            "weight_ptr": weight,
            "out_ptr": out,
            **norm_arguments(norm),
            "n_rows": n_rows,
        },
        constants={
            **blocks(tile, matmul_precision(weight.dtype, x.dtype).dot),
            "WIDTH": width,
            "OUT_WIDTH": out_width,
            "GROUP": GROUP_M,
        },
        tile=tile,
    )


def plan_product_residual(
    tokens: Tensor, weight: Tensor, bias: Tensor, x: Tensor, h: Tensor, partial: Tensor | None, tile: Tile
) -> Launch:
    """The launch on these tensors; what `product_residual` runs and the compile report compiles."""
    (n_rows, width), inner = x.shape, tokens.shape[1]
    return Launch(
        kernel=_product_residual_kernel,
        grid=(triton.cdiv(n_rows, tile.block_m) * triton.cdiv(width, tile.block_n),),
        arguments={
            "tokens_ptr": tokens,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "x_ptr": x,
            "h_ptr": h,
            "partial_ptr": partial,
            "n_rows": n_rows,
        },
        constants={
            **blocks(tile, matmul_precision(tokens.dtype).dot),
            "INNER": inner,
            "WIDTH": width,
            "GROUP": GROUP_M,
        },
        tile=tile,
    )


def norm_product(x: Tensor, norm: Norm, weight: Tensor, tile: Tile) -> Tensor:
    """LayerNorm(x) Uᵀ [M, J] in U's dtype.

    Args:
        x: [M, C].
        norm: Statistics of x's rows, γ and β.
        weight: U [J, C]; its dtype is the product's.
        tile: The blocks of rows, of J and of C.
    """
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(x.shape[0], weight.shape[0], dtype=weight.dtype, device=x.device)
    if x.numel() and out.numel():
        plan_norm_product(x, norm, weight, out, tile).run()
    return out


def product_residual(
    tokens: Tensor, weight: Tensor, bias: Tensor, x: Tensor, eps: float | None, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """h = x + O Vᵀ + b [M, C] in x's dtype, and the statistics of its rows.

    Args:
        tokens: O [M, J].
        weight: V [C, J], O's dtype.
        bias: b [C].
        x: [M, C].
        eps: Of the LayerNorm that follows; None where none does.
        tile: The blocks of rows, of C and of J.

    Returns:
        h; mean and 1/√(variance + eps) of its rows [M] in fp32, empty where `eps` is None.
    """
    tokens, weight, bias, x = (tensor.contiguous() for tensor in (tokens, weight, bias, x))
    n_rows, width = x.shape
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shares = 0 if eps is None else triton.cdiv(width, tile.block_n)
    partial = torch.empty(2, shares, n_rows, dtype=torch.float32, device=x.device) if shares else None
    if x.numel():
        plan_product_residual(tokens, weight, bias, x, h, partial, tile).run()
    if partial is None:
        return h, *(torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    return h, *combine_statistics(partial, eps, width, tile.block_n)
