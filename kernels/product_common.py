"""What the kernels with a matrix product share: which tile a program computes, loads, and a launch's constants.

Matrices are contiguous [rows, WIDTH]; a tile of tokens is x as it is, or LayerNorm(x) made where it is loaded.
"""

from dataclasses import replace

import triton
import triton.language as tl

from crate_fast.kernels.layer_norm import Norm
from crate_fast.kernels.tiles import Tile

__all__ = [
    "GROUP_M",
    "blocks",
    "fitted",
    "load_channels",
    "load_masked_grad",
    "load_tile",
    "load_tokens",
    "norm_arguments",
    "tile_start",
]

GROUP_M = 8  # row blocks that share a column block of the weights while it is in the L2 cache


@triton.jit
def tile_start(pid, n_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Where in [n_rows, WIDTH] program `pid`'s tile starts: groups of row blocks, column blocks inside."""
    row_blocks = tl.cdiv(n_rows, BLOCK_M)
    col_blocks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    group = pid // (GROUP * col_blocks)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = pid % (GROUP * col_blocks)
    return (first + inside % size) * BLOCK_M, (inside // size) * BLOCK_N


@triton.jit
def load_tile(ptr, offs_m, offs_n, n_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows offs_m and columns offs_n of a [n_rows, WIDTH] matrix, zero outside; BLOCK = len(offs_n)."""
    pointers = ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :]
    mask = (offs_m < n_rows)[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (offs_n < WIDTH)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_channels(ptr, offs_n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Entries offs_n of a [WIDTH] vector in fp32, zero outside."""
    if WIDTH % BLOCK == 0:
        return tl.load(ptr + offs_n).to(tl.float32)
    else:
        return tl.load(ptr + offs_n, mask=offs_n < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def load_tokens(
    x_ptr, mean, rstd, gamma_ptr, beta_ptr, offs_m, offs_n, n_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """A tile of x, or of LayerNorm(x) in fp32; beyond the matrix it holds finite values."""
    x = load_tile(x_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK)
    if HAS_NORM:
        gamma = load_channels(gamma_ptr, offs_n, WIDTH, BLOCK)
        beta = load_channels(beta_ptr, offs_n, WIDTH, BLOCK)
        x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
    return x


@triton.jit
def load_masked_grad(grad_ptr, y_ptr, offs_m, offs_n, n_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """g' = g·[y ≠ 0]: the shrinkage passes a gradient where its output is not zero, for relu and soft alike.

    A NaN in y passes it on. y_ptr is None where nothing was shrunk: then g itself."""
    grad = load_tile(grad_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK)
    if y_ptr is None:
        return grad
    else:
        y = load_tile(y_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK)
        return tl.where(y != 0.0, grad, 0.0)


def fitted(tile: Tile, width: int) -> Tile:
    """The tile with column blocks halved until at most an eighth of them lies beyond `width`."""
    block_n = tile.block_n
    while block_n > 32 and triton.cdiv(width, block_n) * block_n * 8 > width * 9:
        block_n //= 2
    return replace(tile, block_n=block_n)


def norm_arguments(norm: Norm | None) -> dict:
    """The pointers of a LayerNorm, all None without one."""
    names = ("mean", "rstd", "gamma", "beta")
    return {f"{name}_ptr": None if norm is None else getattr(norm, name) for name in names}


def blocks(tile: Tile, precision: str) -> dict:
    """The constants every product has; `precision` is `tl.dot`'s."""
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return sizes | {"PRECISION": precision}
