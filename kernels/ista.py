"""The ISTA step y = shrink(x + xG, ηλ) as one product, and its gradients as two (kernels/README.md §4).

Each kernel takes x as it is, or as LayerNorm(h) made from h's rows and their statistics where a tile is loaded.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, matmul_precision
from crate_fast.kernels.layer_norm import Norm
from crate_fast.kernels.tiles import Tile, lookup

__all__ = [
    "backward_folded",
    "backward_input",
    "fitted",
    "forward",
    "plan_backward_folded",
    "plan_backward_input",
    "plan_forward",
    "splits",
]

GROUP_M = 8  # row blocks that share a column block's G while it is in the L2 cache


@triton.jit
def _tile_start(pid, n_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Where in [n_rows, WIDTH] program `pid`'s tile starts: groups of row blocks, column blocks inside."""
    row_blocks = tl.cdiv(n_rows, BLOCK_M)
    col_blocks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    group = pid // (GROUP * col_blocks)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = pid % (GROUP * col_blocks)
    return (first + inside % size) * BLOCK_M, (inside // size) * BLOCK_N


@triton.jit
def _load_tile(ptr, offs_m, offs_n, n_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows offs_m and columns offs_n of a contiguous [n_rows, WIDTH] matrix, zero outside; BLOCK = len(offs_n)."""
    pointers = ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :]
    mask = (offs_m < n_rows)[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (offs_n < WIDTH)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _load_channels(ptr, offs_n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Entries offs_n of a [WIDTH] vector in fp32, zero outside."""
    if WIDTH % BLOCK == 0:
        return tl.load(ptr + offs_n).to(tl.float32)
    else:
        return tl.load(ptr + offs_n, mask=offs_n < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _load_tokens(
    x_ptr, mean, rstd, gamma_ptr, beta_ptr, offs_m, offs_n, n_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """A tile of x, or of LayerNorm(x) in fp32; beyond the matrix it holds finite values."""
    x = _load_tile(x_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK)
    if HAS_NORM:
        gamma = _load_channels(gamma_ptr, offs_n, WIDTH, BLOCK)
        beta = _load_channels(beta_ptr, offs_n, WIDTH, BLOCK)
        x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
    return x


@triton.jit
def _load_masked_grad(grad_ptr, y_ptr, offs_m, offs_n, n_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """g' = g·[y ≠ 0]: the shrinkage passes a gradient where its output is not zero, for relu and soft alike.

    A NaN in y passes it on."""
    grad = _load_tile(grad_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK)
    y = _load_tile(y_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK)
    return tl.where(y != 0.0, grad, 0.0)


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
    start_m, start_n = _tile_start(tl.program_id(0), n_rows, WIDTH, BLOCK_M, BLOCK_N, GROUP)
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
        x = _load_tokens(x_ptr, mean, rstd, gamma_ptr, beta_ptr, offs_m, offs_k, n_rows, WIDTH, BLOCK_K, HAS_NORM)
        folded = _load_tile(folded_ptr, offs_k, offs_n, WIDTH, WIDTH, BLOCK_N)
        acc = tl.dot(x.to(folded.dtype), folded, acc, input_precision=PRECISION)

    tokens = _load_tokens(x_ptr, mean, rstd, gamma_ptr, beta_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK_N, HAS_NORM)
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
    start_m, start_n = _tile_start(tl.program_id(0), n_rows, WIDTH, BLOCK_M, BLOCK_N, GROUP)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, WIDTH, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        grad = _load_masked_grad(grad_ptr, y_ptr, offs_m, offs_k, n_rows, WIDTH, BLOCK_K)
        folded = _load_tile(folded_ptr, offs_n, offs_k, WIDTH, WIDTH, BLOCK_K)  # rows of G, columns of Gᵀ
        acc = tl.dot(grad.to(folded.dtype), tl.trans(folded), acc, input_precision=PRECISION)
    acc += _load_masked_grad(grad_ptr, y_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK_N).to(tl.float32)
    tl.store(
        dx_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=(offs_m < n_rows)[:, None] & (offs_n < WIDTH)[None, :],
    )


@triton.jit
def _ista_bwd_folded_kernel(
    x_ptr,  # x or, with HAS_NORM, h [M, C], contiguous
    grad_ptr,  # g [M, C], contiguous
    y_ptr,  # forward's output [M, C], contiguous
    partial_ptr,  # [splits, C, C], contiguous, fp32
    mean_ptr,  # as forward's
    rstd_ptr,
    gamma_ptr,
    beta_ptr,
    n_rows,
    rows_per_split,  # a multiple of BLOCK_K
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    DTYPE: tl.constexpr,  # the product's
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A BLOCK_M×BLOCK_N tile of one split's share of dG = xᵀg', over rows_per_split rows of x and g.

    The shares are written apart and added by the caller in a fixed order: deterministic, no atomics.
    Grid: (⌈C/BLOCK_M⌉·⌈C/BLOCK_N⌉, splits). 2·M·C² FLOPs in all.
    """
    col_blocks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    offs_m = (tl.program_id(0) // col_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, n_rows)
    tl.assume(end > start)  # no split is empty; see subspace_attention.py's backward

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(start, end, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mean, rstd = 0.0, 0.0
        if HAS_NORM:
            mean = tl.load(mean_ptr + offs_k, mask=offs_k < n_rows, other=0.0)
            rstd = tl.load(rstd_ptr + offs_k, mask=offs_k < n_rows, other=0.0)
        x = _load_tokens(x_ptr, mean, rstd, gamma_ptr, beta_ptr, offs_k, offs_m, n_rows, WIDTH, BLOCK_M, HAS_NORM)
        grad = _load_masked_grad(grad_ptr, y_ptr, offs_k, offs_n, n_rows, WIDTH, BLOCK_N)
        acc = tl.dot(tl.trans(x.to(DTYPE)), grad.to(DTYPE), acc, input_precision=PRECISION)
    tl.store(
        partial_ptr + (split.to(tl.int64) * WIDTH + offs_m[:, None]) * WIDTH + offs_n[None, :],
        acc,
        mask=(offs_m < WIDTH)[:, None] & (offs_n < WIDTH)[None, :],
    )


def fitted(tile: Tile, width: int) -> Tile:
    """The tile with column blocks halved until at most an eighth of them lies beyond `width`."""
    block_n = tile.block_n
    while block_n > 32 and triton.cdiv(width, block_n) * block_n * 8 > width * 9:
        block_n //= 2
    return replace(tile, block_n=block_n)


def _norm_arguments(norm: Norm | None) -> dict:
    names = ("mean", "rstd", "gamma", "beta")
    return {f"{name}_ptr": None if norm is None else getattr(norm, name) for name in names}


def _constants(width: int, tile: Tile, precision: str) -> dict:
    return {
        "WIDTH": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "PRECISION": precision,
    }


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
            **_norm_arguments(norm),
            "n_rows": n_rows,
            "shift": shift,
        },
        constants={
            **_constants(width, tile, precision.dot),
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
        constants={**_constants(width, tile, precision.dot), "GROUP": GROUP_M},
        tile=tile,
    )


_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def plan_backward_folded(
    x: Tensor,
    grad: Tensor,
    y: Tensor,
    partial: Tensor,
    rows_per_split: int,
    dtype: torch.dtype,
    norm: Norm | None,
    tile: Tile,
) -> Launch:
    """The launch for dG's shares on these tensors; what `backward_folded` runs and the compile report compiles."""
    n_rows, width = x.shape
    precision = matmul_precision(dtype, x.dtype)
    return Launch(
        kernel=_ista_bwd_folded_kernel,
        grid=(triton.cdiv(width, tile.block_m) * triton.cdiv(width, tile.block_n), partial.shape[0]),
        arguments={
            "x_ptr": x,
            "grad_ptr": grad,
            "y_ptr": y,
            "partial_ptr": partial,
            **_norm_arguments(norm),
            "n_rows": n_rows,
            "rows_per_split": rows_per_split,
        },
        constants={
            **_constants(width, tile, precision.dot),
            "HAS_NORM": norm is not None,
            "DTYPE": _TRITON_DTYPES[dtype],
        },
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
    x, grad, y = x.contiguous(), grad.contiguous(), y.contiguous()
    n_rows, width = x.shape
    if x.numel() == 0:
        return torch.zeros(width, width, dtype=torch.float32, device=x.device)
    name = "ista_backward_folded" if norm is None else "norm_ista_backward_folded"
    tile = tile or fitted(lookup(name, x.device, matmul_precision(dtype, x.dtype).row), width)
    shares, rows_per_split = splits(n_rows, width, x.device, tile)
    partial = torch.empty(shares, width, width, dtype=torch.float32, device=x.device)
    plan_backward_folded(x, grad, y, partial, rows_per_split, dtype, norm, tile).run()
    return partial.sum(0) if shares > 1 else partial[0]


def splits(n_rows: int, width: int, device: torch.device, tile: Tile) -> tuple[int, int]:
    """How many shares, and rows in each, so that the tiles of dG keep every multiprocessor busy; none is empty."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    tiles = triton.cdiv(width, tile.block_m) * triton.cdiv(width, tile.block_n)
    wanted = max(1, min(2 * processors // tiles, triton.cdiv(n_rows, 4 * tile.block_k)))
    rows = triton.cdiv(triton.cdiv(n_rows, wanted), tile.block_k) * tile.block_k
    return triton.cdiv(n_rows, rows), rows
