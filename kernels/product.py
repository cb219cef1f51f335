"""Products with tokens: out = finish(a · weightᵀ), and aᵀg, the gradient of a weight (kernels/README.md §4).

Each operand is read once per block of the other operand. So work on operands (LayerNorm, the mask of a gradient) is
done once, beforehand, and work on the result in the epilogue: finish scales, adds, normalises, shrinks and masks.
"""

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, Tile, cdiv, lookup, precision, processors
from crate_fast.kernels.layer_norm import Norm

__all__ = [
    "fitted",
    "fitted_product",
    "plan",
    "plan_weight_gradient",
    "product",
    "splits",
    "tile_for",
    "weight_gradient",
]

GROUP_M = 8  # row blocks that use a column block of the weights while it is in the L2 cache
CHUNK_ELEMENTS = 4096  # of a tile, finished at a time: the epilogue's operands need registers too


@triton.jit
def _tile_start(tile, n_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return where in [n_rows, WIDTH] a tile starts; order: group of row blocks, column block, row block."""
    row_blocks = tl.cdiv(n_rows, BLOCK_M)
    col_blocks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    group = tile // (GROUP * col_blocks)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = tile % (GROUP * col_blocks)
    return (first + inside % size) * BLOCK_M, (inside // size) * BLOCK_N


@triton.jit
def _load_tile(ptr, offs_m, offs_n, n_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows offs_m and columns offs_n of a contiguous [n_rows, WIDTH] matrix, zero outside.

    BLOCK: column block of the tile, of which offs_n may be a part."""
    pointers = ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :]
    mask = (offs_m < n_rows)[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (offs_n < WIDTH)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _load_channels(ptr, offs_n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load entries offs_n of a [WIDTH] vector in fp32, zero outside; BLOCK as in `_load_tile`."""
    if WIDTH % BLOCK == 0:
        return tl.load(ptr + offs_n).to(tl.float32)
    else:
        return tl.load(ptr + offs_n, mask=offs_n < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _finish(
    acc, start_n, offs_m, a_ptr, x_ptr, out_ptr, nonzero_ptr, mean, rstd, gamma_ptr, beta_ptr, bias_ptr, mask_ptr,
    n_rows, shift, alpha,
    WIDTH: tl.constexpr, FINISH: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Apply the epilogue to BLOCK_N columns of the accumulator, halved down to CHUNK; BLOCK is the whole tile's."""
    if BLOCK_N > CHUNK:
        half: tl.constexpr = BLOCK_N // 2
        pair = tl.permute(tl.reshape(acc, (acc.shape[0], 2, half)), (0, 2, 1))
        left, right = tl.split(pair)
        _finish(
            left, start_n, offs_m, a_ptr, x_ptr, out_ptr, nonzero_ptr, mean, rstd, gamma_ptr, beta_ptr, bias_ptr,
            mask_ptr, n_rows, shift, alpha, WIDTH, FINISH, MASKED, BLOCK, half, CHUNK,
        )  # fmt: skip
        _finish(
            right, start_n + half, offs_m, a_ptr, x_ptr, out_ptr, nonzero_ptr, mean, rstd, gamma_ptr, beta_ptr,
            bias_ptr, mask_ptr, n_rows, shift, alpha, WIDTH, FINISH, MASKED, BLOCK, half, CHUNK,
        )  # fmt: skip
    else:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if alpha is not None:
            acc = acc * alpha
        if x_ptr is None:
            y = acc
        else:
            x = _load_tile(x_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK).to(tl.float32)
            if gamma_ptr is not None:
                gamma = _load_channels(gamma_ptr, offs_n, WIDTH, BLOCK)
                beta = _load_channels(beta_ptr, offs_n, WIDTH, BLOCK)
                x = (x - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
            if MASKED:
                x = tl.where(_load_tile(a_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK) != 0.0, x, 0.0)
            y = x + acc
        if bias_ptr is not None:
            y += _load_channels(bias_ptr, offs_n, WIDTH, BLOCK)[None, :]
        if FINISH == "relu":
            y = tl.where(y <= shift, 0.0, y - shift)  # NaN stays NaN
        if FINISH == "soft":
            y = tl.where(y > shift, y - shift, tl.where(y < -shift, y + shift, y * 0.0))
        if mask_ptr is not None:
            y = tl.where(_load_tile(mask_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK) != 0.0, y, 0.0)
        offsets = offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :]
        inside = (offs_m < n_rows)[:, None] & (offs_n < WIDTH)[None, :]
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, y, mask=inside)
        if nonzero_ptr is not None:
            # Keep out's layout: another one, for stores of 16 bytes, would move the tile through shared memory.
            ALONG: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
            tl.store(nonzero_ptr + tl.max_contiguous(offsets, [1, ALONG]), (y != 0.0).to(tl.int8), mask=inside)


@triton.jit
def _product_kernel(
    a_ptr,  # [M, K], contiguous, in the product's dtype
    weight_ptr,  # [N, K], contiguous, in the product's dtype
    x_ptr,  # the residual [M, N], contiguous; or None
    out_ptr,  # [M, N], contiguous
    nonzero_ptr,  # 1 where out is not 0, NaN included [M, N], contiguous, int8; or None
    mean_ptr,  # of x's rows [M], fp32, if LayerNorm(x) is the residual; else this and the next three are None
    rstd_ptr,  # 1 / standard deviation of x's rows [M], fp32
    gamma_ptr,  # LayerNorm's weight [N]
    beta_ptr,  # LayerNorm's bias [N]
    bias_ptr,  # [N], or None
    mask_ptr,  # out is 0 where this is 0 [M, N], contiguous; or None
    n_rows,
    shift,  # ηλ of "relu" and "soft"
    alpha,  # factor of the product; None for 1
    INNER: tl.constexpr,  # K
    WIDTH: tl.constexpr,  # N
    FINISH: tl.constexpr,  # "add"; "relu" or "soft" also shrink the sum
    MASKED: tl.constexpr,  # add x only where a is not 0 (K = N)
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Compute finish(a weightᵀ) in tiles of BLOCK_M×BLOCK_N; sum, LayerNorm, bias and shrinkage are fp32.

    Grid: any number of programs; each loops over every programs-th tile. PERSISTENT merges that loop with the one
    over K: it prefetches the next tile's operands during the epilogue. Deterministic. 2·M·N·K FLOPs.
    """
    tiles = tl.cdiv(n_rows, BLOCK_M) * ((WIDTH + BLOCK_N - 1) // BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        start_m, start_n = _tile_start(tile, n_rows, WIDTH, BLOCK_M, BLOCK_N, GROUP)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start_k in range(0, INNER, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            a = _load_tile(a_ptr, offs_m, offs_k, n_rows, INNER, BLOCK_K)
            weight = _load_tile(weight_ptr, offs_n, offs_k, WIDTH, INNER, BLOCK_K)
            acc = tl.dot(a, tl.trans(weight), acc, input_precision="tf32")
        mean, rstd = 0.0, 0.0
        if gamma_ptr is not None:
            mean = tl.load(mean_ptr + offs_m, mask=offs_m < n_rows, other=0.0)
            rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < n_rows, other=0.0)
        _finish(
            acc, start_n, offs_m, a_ptr, x_ptr, out_ptr, nonzero_ptr, mean, rstd, gamma_ptr, beta_ptr, bias_ptr,
            mask_ptr, n_rows, shift, alpha, WIDTH, FINISH, MASKED, BLOCK_N, BLOCK_N, CHUNK,
        )  # fmt: skip


def fitted(tile: Tile, width: int) -> Tile:
    """Return the tile with block_n halved until the column blocks exceed `width` by at most an eighth."""
    block_n = tile.block_n
    while block_n > 32 and cdiv(width, block_n) * block_n * 8 > width * 9:
        block_n //= 2
    return replace(tile, block_n=block_n)


def fitted_product(tile: Tile, width: int) -> Tile:
    """Return `fitted`, but turn 128×256 into 256×128, which reads as little per multiplication."""
    narrow = fitted(tile, width)
    return replace(narrow, block_m=256) if (tile.block_n, narrow.block_n) == (256, 128) else narrow


def tile_for(kernel: str, a: Tensor, width: int) -> Tile:
    """Return the table's tile for a product of `a` that is `width` columns wide."""
    return fitted_product(lookup(kernel, a.device, precision(a.dtype)), width)


def plan(
    a: Tensor,
    weight: Tensor,
    x: Tensor | None,
    out: Tensor,
    tile: Tile,
    *,
    finish: str = "add",
    shift: float = 0.0,
    alpha: float = 1.0,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    masked: bool = False,
    mask: Tensor | None = None,
    nonzero: Tensor | None = None,
) -> Launch:
    """Return the launch of `product` on these tensors."""
    (n_rows, inner), width = a.shape, weight.shape[0]
    tiles = cdiv(n_rows, tile.block_m) * cdiv(width, tile.block_n)
    tensors = {"a_ptr": a, "weight_ptr": weight, "x_ptr": x, "out_ptr": out, "nonzero_ptr": nonzero, "bias_ptr": bias}
    tensors |= {f"{name}_ptr": norm and getattr(norm, name) for name in Norm._fields} | {"mask_ptr": mask}
    scalars = {"n_rows": n_rows, "shift": shift, "alpha": None if alpha == 1.0 else alpha}
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": GROUP_M}
    blocks |= {"CHUNK": CHUNK_ELEMENTS // tile.block_m, "PERSISTENT": tile.persistent}
    constants = {"INNER": inner, "WIDTH": width, "FINISH": finish, "MASKED": masked} | blocks
    grid = (min(tiles, processors(a.device)) if tile.persistent else tiles,)
    return Launch(_product_kernel, grid, tensors | scalars, constants, tile)


def product(
    a: Tensor, weight: Tensor, x: Tensor | None, tile: Tile, *, dtype: torch.dtype | None = None, **options
) -> Tensor:
    """Return finish(x + α·a weightᵀ) [M, N] for a [M, K], weight [N, K] in the product's dtype, and x [M, N] or None.

    The result is in `dtype`, by default x's. `options` are those of `plan`. `finish` is "add" (the sum), "relu"
    (max(· − shift, 0)) or "soft" (the soft threshold). `alpha` is α. `norm`: add LayerNorm(x) instead of x. `bias`
    [N] is added. `masked`: add x only where a is not 0. `mask` [M, N]: the result is 0 where the mask is 0.
    `nonzero` [M, N], int8: receives [result ≠ 0].
    """
    a, weight, x = a.contiguous(), weight.contiguous(), None if x is None else x.contiguous()
    out = torch.empty(len(a), len(weight), dtype=dtype or x.dtype, device=a.device)
    plan(a, weight, x, out, tile, **options).run()
    return out


@triton.jit
def _weight_gradient_kernel(
    a_ptr,  # [M, C], contiguous
    grad_ptr,  # g [M, J], contiguous, a's dtype
    partial_ptr,  # [splits, C, J], contiguous, fp32
    n_rows,
    rows_per_split,  # a multiple of BLOCK_K
    WIDTH: tl.constexpr,  # C
    GRAD_WIDTH: tl.constexpr,  # J
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a BLOCK_M×BLOCK_N tile of one split's share of aᵀg, over rows_per_split rows of a and g.

    The caller adds the shares in a fixed order: deterministic, no atomics.
    Grid: (⌈C/BLOCK_M⌉·⌈J/BLOCK_N⌉, splits). 2·M·C·J FLOPs in total.
    """
    col_blocks: tl.constexpr = (GRAD_WIDTH + BLOCK_N - 1) // BLOCK_N
    offs_m = (tl.program_id(0) // col_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, n_rows)
    tl.assume(end > start)  # no split is empty; see attention.py's backward_rows

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(start, end, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        a = _load_tile(a_ptr, offs_k, offs_m, n_rows, WIDTH, BLOCK_M)
        grad = _load_tile(grad_ptr, offs_k, offs_n, n_rows, GRAD_WIDTH, BLOCK_N)
        acc = tl.dot(tl.trans(a), grad, acc, input_precision="tf32")
    tl.store(
        partial_ptr + (split.to(tl.int64) * WIDTH + offs_m[:, None]) * GRAD_WIDTH + offs_n[None, :],
        acc,
        mask=(offs_m < WIDTH)[:, None] & (offs_n < GRAD_WIDTH)[None, :],
    )


def plan_weight_gradient(a: Tensor, grad: Tensor, partial: Tensor, rows_per_split: int, tile: Tile) -> Launch:
    """Return the launch that computes the shares of `weight_gradient` on these tensors."""
    (n_rows, width), grad_width = a.shape, grad.shape[1]
    tensors = {"a_ptr": a, "grad_ptr": grad, "partial_ptr": partial}
    scalars, sizes = {"n_rows": n_rows, "rows_per_split": rows_per_split}, {"WIDTH": width, "GRAD_WIDTH": grad_width}
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k} | sizes
    grid = (cdiv(width, tile.block_m) * cdiv(grad_width, tile.block_n), partial.shape[0])
    return Launch(_weight_gradient_kernel, grid, tensors | scalars, constants, tile)


def weight_gradient(a: Tensor, grad: Tensor, tile: Tile | None = None) -> Tensor:
    """Return aᵀg [C, J] in fp32, for a [M, C] and g [M, J] in the product's dtype; `tile` replaces the table's."""
    a, grad = a.contiguous(), grad.contiguous()
    (n_rows, width), grad_width = a.shape, grad.shape[1]
    if a.numel() == 0 or grad.numel() == 0:
        return torch.zeros(width, grad_width, dtype=torch.float32, device=a.device)
    tile = tile or fitted(lookup("weight_gradient", a.device, precision(a.dtype)), grad_width)
    shares, rows_per_split = splits(n_rows, width, grad_width, a.device, tile)
    partial = torch.empty(shares, width, grad_width, dtype=torch.float32, device=a.device)
    plan_weight_gradient(a, grad, partial, rows_per_split, tile).run()
    return partial.sum(0) if shares > 1 else partial[0]


def splits(n_rows: int, width: int, grad_width: int, device: torch.device, tile: Tile) -> tuple[int, int]:
    """Return the number of shares of aᵀg that keeps every multiprocessor busy, and the rows per share (not 0)."""
    at_once = processors(device) * (1 if tile.block_m * tile.block_n > 128 * 128 else 2)
    tiles = cdiv(width, tile.block_m) * cdiv(grad_width, tile.block_n)
    wanted = _best_shares(tiles, at_once, cdiv(n_rows, 4 * tile.block_k))
    rows = cdiv(cdiv(n_rows, wanted), tile.block_k) * tile.block_k
    return cdiv(n_rows, rows), rows


@functools.cache
def _best_shares(tiles: int, at_once: int, most: int) -> int:
    """Return the number of shares up to `most` for the shortest time; the fewest that cost at most 6 % more."""
    shares = range(1, min(most, max(at_once // tiles, 8)) + 1)
    times = [cdiv(tiles * count, at_once) / count for count in shares]  # rounds of programs, each of 1 / count
    return next(count for count, time in zip(shares, times, strict=True) if time <= 1.06 * min(times))
