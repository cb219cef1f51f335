"""LayerNorm in front of a product: the normalised rows, without γ and β, and its gradient (kernels/README.md §6)."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, Tile

__all__ = ["Norm", "backward", "normalize", "plan_rows", "shares"]

ROW_ELEMENTS = 4096  # of a tile of whole rows
MAX_PROGRAMS = 1024  # of a kernel that sums over rows: each writes one row of shares


@dataclass(frozen=True)
class Norm:
    """LayerNorm of rows still to come: their mean and rstd [M] in fp32, weight γ and bias β [C]."""

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
    BLOCK_C: tl.constexpr,  # WIDTH to the next power of two
):  # fmt: skip
    """n = (x − mean)/√(variance + ε) of BLOCK_M rows in fp32, the variance from centred values; statistics beside it.

    Grid: (⌈M/BLOCK_M⌉)."""
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
    rows_ptr,  # n or, with mean_ptr, what LayerNorm took [M, C], contiguous
    mean_ptr,  # [M], fp32, or None
    rstd_ptr,  # [M], fp32
    gamma_ptr,  # [C], or None: the gradient is n's
    skip_ptr,  # gradient of x by another way [M, C], contiguous, or None
    dx_ptr,  # [M, C], contiguous, x's dtype
    normed_ptr,  # n for a product [M, C], contiguous, or None
    partial_ptr,  # shares of dγ and dβ [2, programs, C], without gamma of Σ skip [1, …], fp32; or None
    n_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd·(dn − mean_c(dn) − n·mean_c(dn·n)) with dn = gγ, plus what reaches x by the skip connection, and one
    program's share of dγ = Σ g·n and dβ = Σ g, or of Σ skip. With normed_ptr, n as well, in its dtype.

    A program takes every programs-th block of BLOCK_M rows, in order; the caller adds the shares: deterministic.
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
    if partial_ptr is not None:
        share = tl.program_id(0) * WIDTH + offs_c
        tl.store(partial_ptr + share, first, mask=mask_c)
        if gamma_ptr is not None:
            tl.store(partial_ptr + tl.num_programs(0) * WIDTH + share, second, mask=mask_c)


def _rows_tile(width: int) -> Tile:
    """Whole rows of `width` columns, padded to a power of two."""
    block_c = triton.next_power_of_2(width)
    return Tile(block_m=max(1, ROW_ELEMENTS // block_c), block_n=block_c, num_warps=4, num_stages=1)


def plan_rows(kernel, rows: Tensor, arguments: dict, partial: Tensor | None = None) -> Launch:
    """Return a launch over rows [M, C]: a block of them a program, or `partial` [_, P, C] gives P."""
    n_rows, width = rows.shape
    tile = _rows_tile(width)
    programs = triton.cdiv(n_rows, tile.block_m) if partial is None else partial.shape[1]
    constants = {"WIDTH": width, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n}
    return Launch(kernel, (programs,), arguments | {"n_rows": n_rows}, constants, tile)


def shares(count: int, rows: Tensor) -> Tensor:
    """Room for each program's share of `count` sums over rows [M, C]: [count, programs, C] in fp32."""
    n_rows, width = rows.shape
    programs = min(MAX_PROGRAMS, triton.cdiv(n_rows, _rows_tile(width).block_m))
    return torch.empty(count, programs, width, dtype=torch.float32, device=rows.device)


def normalize(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the rows of x [M, C]: n [M, C] in `dtype`, and their mean and 1/√(variance + eps) [M] in fp32."""
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
    """LayerNorm's gradient: dx [M, C] in `dtype`; sums over the rows in fp32; with `normed_dtype`, n.

    Args:
        grad: Of nγ + β [M, C]; without `gamma`, of n.
        rows: n [M, C] as `normalize` gives it, or with `mean` x itself: dγ shows the rounding of a rounded n.
        mean, rstd: From `normalize`.
        dtype: x's.
        gamma: γ [C].
        skip: What reaches x by a skip connection [M, C], added to dx.
        normed_dtype: Of n [M, C], where a product is to take it too.

    Returns:
        dx; the sums: dγ and dβ [2, C] with `gamma`, else Σ skip [1, C], else [0, C]; n or None.
    """
    grad, rows, skip = grad.contiguous(), rows.contiguous(), None if skip is None else skip.contiguous()
    dx = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    normed = None if normed_dtype is None else torch.empty(grad.shape, dtype=normed_dtype, device=grad.device)
    count = 2 if gamma is not None else int(skip is not None)
    partial = shares(count, grad) if count else None
    gamma = None if gamma is None else gamma.contiguous()
    tensors = {"grad_ptr": grad, "rows_ptr": rows, "mean_ptr": mean, "rstd_ptr": rstd, "gamma_ptr": gamma}
    tensors |= {"skip_ptr": skip, "dx_ptr": dx, "normed_ptr": normed, "partial_ptr": partial}
    plan_rows(_layer_norm_bwd_kernel, grad, tensors, partial).run()
    sums = partial.sum(1) if count else grad.new_empty(0, grad.shape[1], dtype=torch.float32)
    return dx, sums, normed
