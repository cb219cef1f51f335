"""What our kernels execute beside what a formula asks for, counted from the tile table: tiles cover whole blocks."""

from dataclasses import dataclass

import torch

from crate_fast.kernels import whole_head
from crate_fast.kernels.launch import matmul_precision
from crate_fast.kernels.product import fitted, fitted_product
from crate_fast.kernels.row_blocks import needs_delta
from crate_fast.kernels.tiles import Tile, lookup

__all__ = ["Executed", "attention_executed", "flash_executed", "ista_executed", "padded", "row_blocks_executed"]


def padded(size: int, block: int) -> int:
    """`size` up to the next multiple of `block`."""
    return -(-size // block) * block


@dataclass(frozen=True)
class Executed:
    """Floating-point operations of products, and exponentials."""

    flops: float
    exps: float = 0.0


def row_blocks_executed(
    n_heads: int, n_tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Executed]:
    """Subspace attention by blocks of rows, without dropout: two products forward, five backward, of padded tiles.

    Backward with two loops takes one exponential a logit and, since every thread has a quarter of a tile's
    columns, 8·warps·BLOCK_N a tile for the columns' factors; elsewhere two a logit. In fp32 without tf32 a pass of
    its own, two products more, finds backward's δ. Arguments as `attention_executed`.
    """
    block_d = max(32, 1 << (head_dim - 1).bit_length())  # the kernels' BLOCK_D
    precision, own_pass = matmul_precision(dtype).row, int(needs_delta(dtype))
    found = {}
    for name, products, exps, more in (("forward", 2, 1, 0), ("backward", 5, 2, own_pass)):
        tile = lookup(f"attention_{name}", device, precision, block_d)
        logits = n_heads * padded(n_tokens, tile.block_m) * padded(n_tokens, tile.block_n)
        if name == "backward" and tile.two_loops:
            exps = 1 + 8 * tile.num_warps / tile.block_m
        found[name] = Executed(2.0 * (products + 2 * more) * logits * block_d, float((exps + more) * logits))
    return found


def _whole_head_executed(name: str, n_heads: int, n_tokens: int, head_dim: int, tile: Tile) -> Executed:
    """Each unordered pair of blocks once, the rest as keys, and the rest's own rows by the second launch."""
    block, (blocks, rest, keys) = whole_head.BLOCK, whole_head.split(n_tokens, tile)
    once = blocks * block * (block + padded(n_tokens - blocks * block, keys))  # the diagonal, and the rest as keys
    pairs = blocks * (blocks - 1) // 2 * block**2
    rows = rest * padded(n_tokens, block)
    alone, shared, exps = (2, 3, 1) if name == "whole_head_forward" else (5, 7, 2)
    block_d = max(32, 1 << (head_dim - 1).bit_length())
    products = alone * (once + rows) + shared * pairs
    return Executed(2.0 * n_heads * products * block_d, float(n_heads * (once + pairs + exps * rows)))


def attention_executed(
    n_heads: int, n_tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Executed]:
    """Subspace attention without dropout, by pass, by the kernels that run: whole heads or blocks of rows.

    Args:
        n_heads: Of all images, B·H.
        n_tokens, head_dim: N and D; channels are padded to a power of two, 32 at least.
        device: Whose rows of the table count.
        dtype: Of W.
    """
    found = row_blocks_executed(n_heads, n_tokens, head_dim, device, dtype)
    w = torch.empty(1, n_tokens, 1, head_dim, dtype=dtype, device=device)
    for name in found:
        kernel = f"whole_head_{name}"
        tile = whole_head.tile_for(kernel, w, matmul_precision(dtype).row)
        if tile is not None:
            found[name] = _whole_head_executed(kernel, n_heads, n_tokens, head_dim, tile)
    return found


def flash_executed(n_heads: int, n_tokens: int, head_dim: int) -> dict[str, Executed]:
    """A FlashAttention-style schedule of 128×128 tiles: two products forward, five backward, an exp a logit."""
    logits = n_heads * padded(n_tokens, 128) ** 2
    block_d = max(32, 1 << (head_dim - 1).bit_length())
    return {
        name: Executed(2.0 * products * logits * block_d, float(logits))
        for name, products in (("forward", 2), ("backward", 5))
    }


def ista_executed(
    rows: int, width: int, device: torch.device, dtype: torch.dtype, storage: torch.dtype
) -> dict[str, Executed]:
    """ISTA's products with x by pass, without folding G: one forward, two backward, of padded tiles.

    Args:
        rows, width: M and C.
        device: Whose rows of the table count.
        dtype: That it multiplies in.
        storage: Of x.
    """

    def product(kernel: str, m: int, n: int, k: int, stored: torch.dtype) -> float:
        fit = fitted if kernel == "weight_gradient" else fitted_product
        tile = fit(lookup(kernel, device, matmul_precision(dtype, stored).row), width)
        return 2.0 * padded(m, tile.block_m) * padded(n, tile.block_n) * padded(k, tile.block_k)

    backward = product("ista_backward_input", rows, width, width, storage)
    backward += product("weight_gradient", width, width, rows, dtype)
    return {"forward": Executed(product("ista_forward", rows, width, width, storage)), "backward": Executed(backward)}
