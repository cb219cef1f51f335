"""LayerNorm in front of a product: the normalised rows, without γ and β, and its gradient (kernels/README.md §6)."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch
from crate_fast.kernels.rows import row_constants, row_programs, rows_tile, shares

__all__ = ["Norm", "backward", "normalize", "plan_backward", "plan_normalize"]


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
    n_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # WIDTH to the next power of two
):
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
    partial_ptr,  # shares of dγ and dβ [2, programs, C], fp32, or None
    n_rows,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = rstd·(dn − mean_c(dn) − n·mean_c(dn·n)) with dn = gγ, plus what reaches x by the skip connection, and one
    program's share of dγ = Σ g·n and dβ = Σ g. With normed_ptr, n as well, in its dtype.

    A program takes every programs-th block of BLOCK_M rows, in order; the caller adds the shares: deterministic.
    """
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < WIDTH
    gamma = 1.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    dgamma = tl.zeros([BLOCK_C], tl.float32)
    dbeta = tl.zeros([BLOCK_C], tl.float32)
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
            dx += tl.load(skip_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            dgamma += tl.sum(grad * normed, 0)
            dbeta += tl.sum(grad, 0)
    if partial_ptr is not None:
        share = tl.program_id(0) * WIDTH + offs_c
        tl.store(partial_ptr + share, dgamma, mask=mask_c)
        tl.store(partial_ptr + tl.num_programs(0) * WIDTH + share, dbeta, mask=mask_c)


def plan_normalize(x: Tensor, normed: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Launch:
    """The launch on these tensors; what `normalize` runs and the compile report compiles."""
    return Launch(
        kernel=_normalize_kernel,
        grid=(row_programs(*x.shape, None),),
        arguments={
            "x_ptr": x,
            "normed_ptr": normed,
            "mean_ptr": mean,
            "rstd_ptr": rstd,
            "n_rows": x.shape[0],
            "eps": eps,
        },
        constants=row_constants(x.shape[1]),
        tile=rows_tile(x.shape[1]),
    )


def plan_backward(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
    skip: Tensor | None,
    dx: Tensor,
    normed: Tensor | None,
    partial: Tensor | None,
) -> Launch:
    """The launch on these tensors; what `backward` runs and the compile report compiles."""
    return Launch(
        kernel=_layer_norm_bwd_kernel,
        grid=(row_programs(*grad.shape, partial),),
        arguments={
            "grad_ptr": grad,
            "rows_ptr": rows,
            "mean_ptr": mean,
            "rstd_ptr": rstd,
            "gamma_ptr": gamma,
            "skip_ptr": skip,
            "dx_ptr": dx,
            "normed_ptr": normed,
            "partial_ptr": partial,
            "n_rows": grad.shape[0],
        },
        constants=row_constants(grad.shape[1]),
        tile=rows_tile(grad.shape[1]),
    )


def normalize(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of x [M, C], normalised: n [M, C] in `dtype`, and their mean and 1/√(variance + eps) [M] in fp32."""
    x = x.contiguous()
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        plan_normalize(x, normed, mean, rstd, eps).run()
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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """LayerNorm's gradient: dx [M, C] in `dtype`; with `gamma`, dγ and dβ [C] in fp32; with `normed_dtype`, n.

    Args:
        grad: Of nγ + β [M, C]; without `gamma`, of n.
        rows: n [M, C] as `normalize` gives it, or with `mean` x itself: dγ shows the rounding of a rounded n.
        mean, rstd: From `normalize`.
        dtype: x's.
        gamma: γ [C].
        skip: What reaches x by a skip connection [M, C], added to dx.
        normed_dtype: Of n [M, C], where a product is to take it too.
    """
    grad, rows, skip = grad.contiguous(), rows.contiguous(), None if skip is None else skip.contiguous()
    dx = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    normed = None if normed_dtype is None else torch.empty(grad.shape, dtype=normed_dtype, device=grad.device)
    partial = None if gamma is None else shares(2, grad)
    gamma = None if gamma is None else gamma.contiguous()
    if grad.numel():
        plan_backward(grad, rows, mean, rstd, gamma, skip, dx, normed, partial).run()
    return dx, *((None, None) if partial is None else (partial[0].sum(0), partial[1].sum(0))), normed
