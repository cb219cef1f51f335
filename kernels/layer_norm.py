"""LayerNorm around the products: its rows' statistics, its rows, and its gradient (kernels/README.md §6)."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch
from crate_fast.kernels.tiles import Tile

__all__ = [
    "Norm",
    "backward",
    "combine_statistics",
    "normalize",
    "plan_backward",
    "plan_combine_statistics",
    "plan_row_statistics",
    "row_statistics",
]

ROW_ELEMENTS = 4096  # of a tile of whole rows
MAX_PROGRAMS = 1024  # of backward: each writes one row of dγ's and dβ's shares
SHARES_ROWS = 256  # rows of a program that puts shares of statistics together


@dataclass(frozen=True)
class Norm:
    """What a fused kernel needs to normalise: mean and rstd of the rows [M] in fp32, weight γ and bias β [C]."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor


@triton.jit
def _row_statistics_kernel(
    x_ptr,  # [M, C], contiguous
    mean_ptr,  # [M], fp32
    rstd_ptr,  # [M], fp32
    normed_ptr,  # [M, C], contiguous, or None: only the statistics
    gamma_ptr,  # LayerNorm's weight [C], or None
    beta_ptr,  # LayerNorm's bias [C], or None
    n_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # WIDTH to the next power of two
):
    """Mean and 1/√(variance + ε) of BLOCK_M rows, in fp32, the variance from centred values; and, where there is
    room for them, the normalised rows. Grid: (⌈M/BLOCK_M⌉)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < WIDTH
    mask = (offs_m < n_rows)[:, None] & mask_c[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * WIDTH + offs_c[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / WIDTH
    centred = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / WIDTH
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(mean_ptr + offs_m, mean, mask=offs_m < n_rows)
    tl.store(rstd_ptr + offs_m, rstd, mask=offs_m < n_rows)
    if normed_ptr is not None:
        gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        normed = centred * rstd[:, None] * gamma[None, :] + beta[None, :]
        tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_statistics_kernel(
    partial_ptr,  # of each share of a row, mean and sum of squares about it [2, ⌈C/SHARE⌉, M], fp32
    mean_ptr,  # [M], fp32
    rstd_ptr,  # [M], fp32
    n_rows,
    eps,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,  # columns of a share; the last may have fewer
    BLOCK_M: tl.constexpr,
):
    """Mean and 1/√(variance + ε) of BLOCK_M rows from their shares' (Chan, Golub and LeVeque, 1979).

    Grid: (⌈M/BLOCK_M⌉). Deterministic."""
    shares: tl.constexpr = (WIDTH + SHARE - 1) // SHARE
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = offs_m < n_rows
    mean = tl.zeros([BLOCK_M], tl.float32)
    for share in range(shares):
        count = tl.minimum(SHARE, WIDTH - share * SHARE)
        mean += tl.load(partial_ptr + share * n_rows + offs_m, mask=mask, other=0.0) * count / WIDTH
    squares = tl.zeros([BLOCK_M], tl.float32)
    for share in range(shares):
        count = tl.minimum(SHARE, WIDTH - share * SHARE)
        offset = tl.load(partial_ptr + share * n_rows + offs_m, mask=mask, other=0.0) - mean
        squares += tl.load(partial_ptr + (shares + share) * n_rows + offs_m, mask=mask, other=0.0)
        squares += offset * offset * count
    tl.store(mean_ptr + offs_m, mean, mask=mask)
    tl.store(rstd_ptr + offs_m, 1.0 / tl.sqrt(squares / WIDTH + eps), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    grad_ptr,  # gradient of LayerNorm's output [M, C], contiguous
    x_ptr,  # its input [M, C], contiguous
    mean_ptr,  # [M], fp32
    rstd_ptr,  # [M], fp32
    gamma_ptr,  # [C]
    skip_ptr,  # gradient of x by another way [M, C], contiguous, or None
    dx_ptr,  # [M, C], contiguous, x's dtype
    partial_ptr,  # shares of dγ and dβ [2, programs, C], fp32
    n_rows,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = rstd·(gγ − mean_c(gγ) − x̂·mean_c(gγ·x̂)), plus what reaches x by the skip connection, and one program's
    share of dγ = Σ g·x̂ and dβ = Σ g.

    A program takes every programs-th block of BLOCK_M rows, in order; the caller adds the shares: deterministic.
    """
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < WIDTH
    gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dgamma = tl.zeros([BLOCK_C], tl.float32)
    dbeta = tl.zeros([BLOCK_C], tl.float32)
    step = tl.num_programs(0) * BLOCK_M
    for start in range(tl.program_id(0) * BLOCK_M, n_rows, step):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < n_rows
        mask = mask_m[:, None] & mask_c[None, :]
        offsets = offs_m.to(tl.int64)[:, None] * WIDTH + offs_c[None, :]
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normed = tl.where(mask_c[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
        scaled = grad * gamma[None, :]
        along = tl.sum(scaled * normed, 1) / WIDTH
        average = tl.sum(scaled, 1) / WIDTH
        dx = (scaled - average[:, None] - normed * along[:, None]) * rstd[:, None]
        if skip_ptr is not None:
            dx += tl.load(skip_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dgamma += tl.sum(grad * normed, 0)
        dbeta += tl.sum(grad, 0)
    share = tl.program_id(0) * WIDTH + offs_c
    tl.store(partial_ptr + share, dgamma, mask=mask_c)
    tl.store(partial_ptr + tl.num_programs(0) * WIDTH + share, dbeta, mask=mask_c)


def _rows_tile(width: int) -> Tile:
    block_c = triton.next_power_of_2(width)
    return Tile(block_m=max(1, ROW_ELEMENTS // block_c), block_n=block_c, num_warps=4, num_stages=1)


def _constants(width: int, tile: Tile) -> dict:
    return {"WIDTH": width, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n}


def plan_row_statistics(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    normed: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Launch:
    """The launch on these tensors; what `row_statistics` and `normalize` run and the compile report compiles."""
    tile = _rows_tile(x.shape[1])
    return Launch(
        kernel=_row_statistics_kernel,
        grid=(triton.cdiv(x.shape[0], tile.block_m),),
        arguments={
            "x_ptr": x,
            "mean_ptr": mean,
            "rstd_ptr": rstd,
            "normed_ptr": normed,
            "gamma_ptr": gamma,
            "beta_ptr": beta,
            "n_rows": x.shape[0],
            "eps": eps,
        },
        constants=_constants(x.shape[1], tile),
        tile=tile,
    )


def plan_combine_statistics(
    partial: Tensor, mean: Tensor, rstd: Tensor, eps: float, width: int, share: int
) -> Launch:
    """The launch on these tensors; what `combine_statistics` runs and the compile report compiles."""
    n_rows = mean.shape[0]
    return Launch(
        kernel=_combine_statistics_kernel,
        grid=(triton.cdiv(n_rows, SHARES_ROWS),),
        arguments={"partial_ptr": partial, "mean_ptr": mean, "rstd_ptr": rstd, "n_rows": n_rows, "eps": eps},
        constants={"WIDTH": width, "SHARE": share, "BLOCK_M": SHARES_ROWS},
        tile=Tile(block_m=SHARES_ROWS, block_n=0, num_warps=4, num_stages=1),
    )


def plan_backward(
    grad: Tensor, x: Tensor, norm: Norm, dx: Tensor, partial: Tensor, skip: Tensor | None = None
) -> Launch:
    """The launch on these tensors; what `backward` runs and the compile report compiles."""
    tile = _rows_tile(x.shape[1])
    return Launch(
        kernel=_layer_norm_bwd_kernel,
        grid=(partial.shape[1],),
        arguments={
            "grad_ptr": grad,
            "x_ptr": x,
            "mean_ptr": norm.mean,
            "rstd_ptr": norm.rstd,
            "gamma_ptr": norm.gamma,
            "skip_ptr": skip,
            "dx_ptr": dx,
            "partial_ptr": partial,
            "n_rows": x.shape[0],
        },
        constants=_constants(x.shape[1], tile),
        tile=tile,
    )


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(variance + eps) of each row of x [M, C]: two [M] tensors in fp32."""
    x = x.contiguous()
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        plan_row_statistics(x, mean, rstd, eps).run()
    return mean, rstd


def normalize(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(x) [M, C] in `dtype` for x [M, C], and its rows' mean and 1/√(variance + eps) [M] in fp32."""
    x = x.contiguous()
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        plan_row_statistics(x, mean, rstd, eps, normed, gamma.contiguous(), beta.contiguous()).run()
    return normed, mean, rstd


def combine_statistics(partial: Tensor, eps: float, width: int, share: int) -> tuple[Tensor, Tensor]:
    """`row_statistics` of rows whose columns were summed in shares.

    Args:
        partial: Of each share, its mean and its sum of squares about it [2, ⌈C/share⌉, M], fp32.
        eps: LayerNorm's.
        width: C.
        share: Columns of a share; the last has what is left.
    """
    n_rows = partial.shape[2]
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=partial.device) for _ in range(2))
    if n_rows:
        plan_combine_statistics(partial, mean, rstd, eps, width, share).run()
    return mean, rstd


def backward(grad: Tensor, x: Tensor, norm: Norm, skip: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm's gradient: dx [M, C] in x's dtype, dγ and dβ [C] in fp32.

    Args:
        grad: Of the normalised rows [M, C].
        x: What was normalised [M, C].
        norm: The statistics of x's rows and γ.
        skip: What reaches x by a skip connection [M, C], added to dx.
    """
    grad, x, skip = grad.contiguous(), x.contiguous(), None if skip is None else skip.contiguous()
    n_rows, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, *(torch.zeros(width, dtype=torch.float32, device=x.device) for _ in range(2))
    programs = min(MAX_PROGRAMS, triton.cdiv(n_rows, _rows_tile(width).block_m))
    partial = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
    plan_backward(grad, x, norm, dx, partial, skip).run()
    return dx, partial[0].sum(0), partial[1].sum(0)
