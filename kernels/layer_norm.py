"""LayerNorm before a product: normalised rows without γ and β, and the gradient (kernels/README.md §6)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, Tile, cdiv, power_of_2

__all__ = ["Norm", "backward", "normalize", "plan_rows", "shares"]

ROW_ELEMENTS = 4096  # elements of a tile of whole rows
MAX_PROGRAMS = 1024  # of a kernel that sums over rows; each program writes one row of shares


class Norm(NamedTuple):
    """Parameters of a LayerNorm to apply to rows later: mean and rstd [M] in fp32, weight γ and bias β [C]."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor


@triton.jit
def _normalize_kernel(
    x_ptr,  # [M, C], contiguous
    normed_ptr,  # [M, C], contiguous
    mean_ptr,  # [M], fp32
    rstd_ptr,  # [M], fp32
    n_rows, eps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # WIDTH rounded up to a power of two
):  # fmt: skip
    """Compute n = (x − mean)/√(variance + ε) and the statistics of BLOCK_M rows in fp32, the variance from centred
    values. Grid: (⌈M/BLOCK_M⌉)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < WIDTH
    mask = (offs_m < n_rows)[:, None] & mask_c[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * WIDTH + offs_c[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / WIDTH
    centred = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    tl.store(normed_ptr + offsets, (centred * rstd[:, None]).to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=offs_m < n_rows)
    tl.store(rstd_ptr + offs_m, rstd, mask=offs_m < n_rows)


@triton.jit
def _layer_norm_bwd_kernel(
    grad_ptr,  # gradient of LayerNorm's output, or of n [M, C], contiguous
    rows_ptr,  # n or, with mean_ptr, LayerNorm's input x [M, C], contiguous
    mean_ptr,  # [M], fp32, or None
    rstd_ptr,  # [M], fp32
    gamma_ptr,  # [C], or None: grad is the gradient of n
    skip_ptr,  # gradient of x from the skip connection [M, C], contiguous, or None
    dx_ptr,  # [M, C], contiguous, x's dtype
    normed_ptr,  # n, written for a product [M, C], contiguous, or None
    partial_ptr,  # shares of dγ and dβ [2, programs, C], or without gamma of Σ skip [1, …], fp32
    n_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute dx = rstd·(dn − mean_c(dn) − n·mean_c(dn·n)) with dn = gγ, plus the skip connection's gradient; and one
    program's share of dγ = Σ g·n and dβ = Σ g, or of Σ skip. With normed_ptr, also store n in its dtype.

    Each program loops over every programs-th block of BLOCK_M rows; the caller adds the shares. Deterministic.
    """
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < WIDTH
    gamma = 1.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    first = tl.zeros([BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_C], tl.float32)
    step = tl.num_programs(0) * BLOCK_M
    for start in range(tl.program_id(0) * BLOCK_M, n_rows, step):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < n_rows
        mask = mask_m[:, None] & mask_c[None, :]
        offsets = offs_m.to(tl.int64)[:, None] * WIDTH + offs_c[None, :]
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        normed = tl.load(rows_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
            normed = tl.where(mask_c[None, :], (normed - mean[:, None]) * rstd[:, None], 0.0)
        if normed_ptr is not None:
            tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=mask)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        scaled = grad * gamma
        along = tl.sum(scaled * normed, 1) / WIDTH
        average = tl.sum(scaled, 1) / WIDTH
        dx = (scaled - average[:, None] - normed * along[:, None]) * rstd[:, None]
        if skip_ptr is not None:
            skip = tl.load(skip_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dx += skip
            if gamma_ptr is None:
                first += tl.sum(skip, 0)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if gamma_ptr is not None:
            first += tl.sum(grad * normed, 0)
            second += tl.sum(grad, 0)
    share = tl.program_id(0) * WIDTH + offs_c
    tl.store(partial_ptr + share, first, mask=mask_c)
    if gamma_ptr is not None:
        tl.store(partial_ptr + tl.num_programs(0) * WIDTH + share, second, mask=mask_c)


def _rows_tile(width: int) -> Tile:
    """Return a tile of whole rows of `width` columns, padded to a power of two."""
    block_c = power_of_2(width)
    return Tile(block_m=max(1, ROW_ELEMENTS // block_c), block_n=block_c, num_warps=4, num_stages=1)


def plan_rows(kernel, rows: Tensor, arguments: dict, partial: Tensor | None = None) -> Launch:
    """Return a launch over rows [M, C] with a block of rows per program, or P programs for `partial` [_, P, C]."""
    n_rows, width = rows.shape
    tile = _rows_tile(width)
    programs = cdiv(n_rows, tile.block_m) if partial is None else partial.shape[1]
    constants = {"WIDTH": width, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n}
    return Launch(kernel, (programs,), arguments | {"n_rows": n_rows}, constants, tile)


def shares(count: int, rows: Tensor) -> Tensor:
    """Allocate each program's share of `count` sums over rows [M, C]: [count, programs, C] in fp32."""
    n_rows, width = rows.shape
    programs = min(MAX_PROGRAMS, cdiv(n_rows, _rows_tile(width).block_m))
    return torch.empty(count, programs, width, dtype=torch.float32, device=rows.device)


def normalize(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised rows n of x [M, C] in `dtype`, their mean and 1/√(variance + eps) [M] in fp32."""
    x = x.contiguous()
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    tensors = {"x_ptr": x, "normed_ptr": normed, "mean_ptr": mean, "rstd_ptr": rstd}
    plan_rows(_normalize_kernel, x, tensors | {"eps": eps}).run()
    return normed, mean, rstd


def backward(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dtype: torch.dtype,
    gamma: Tensor | None = None,
    skip: Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return LayerNorm's gradient dx [M, C], sums over the rows, and optionally n.

    Args:
        grad: Gradient of nγ + β [M, C], or of n without `gamma`.
        rows: n [M, C] from `normalize`; or x itself, with `mean`, if the rounding of n would show in dγ.
        mean, rstd: From `normalize`.
        dtype: x's dtype, which dx gets.
        gamma: γ [C]; without it, `skip` is needed.
        skip: Gradient of x from a skip connection [M, C], added to dx.
        normed_dtype: Also return n [M, C] in this dtype, for a product.

    Returns:
        dx; sums in fp32: dγ and dβ [2, C] with `gamma`, else Σ skip [1, C]; n or None.
    """
    grad, rows, skip = grad.contiguous(), rows.contiguous(), None if skip is None else skip.contiguous()
    dx = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    normed = None if normed_dtype is None else torch.empty(grad.shape, dtype=normed_dtype, device=grad.device)
    partial = shares(1 if gamma is None else 2, grad)
    gamma = None if gamma is None else gamma.contiguous()
    tensors = {"grad_ptr": grad, "rows_ptr": rows, "mean_ptr": mean, "rstd_ptr": rstd, "gamma_ptr": gamma}
    tensors |= {"skip_ptr": skip, "dx_ptr": dx, "normed_ptr": normed, "partial_ptr": partial}
    plan_rows(_layer_norm_bwd_kernel, grad, tensors, partial).run()
    return dx, partial.sum(1), normed
