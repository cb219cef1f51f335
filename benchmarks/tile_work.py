"""What our kernels execute beside what a formula asks for, counted from the tile table: tiles cover whole blocks."""

from dataclasses import dataclass

import torch

from crate_fast.kernels.ista import fitted
from crate_fast.kernels.launch import matmul_precision
from crate_fast.kernels.subspace_attention import needs_delta
from crate_fast.kernels.tiles import lookup

__all__ = ["Executed", "attention_executed", "ista_executed", "padded"]


def padded(size: int, block: int) -> int:
    """`size` up to the next multiple of `block`."""
    return -(-size // block) * block


@dataclass(frozen=True)
class Executed:
    """Floating-point operations of products, and exponentials."""

    flops: float
    exps: float = 0.0


def attention_executed(
    n_heads: int, n_tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Executed]:
    """Subspace attention without dropout, by pass: two products forward, five backward, of padded tiles.

    In fp32 without tf32 a pass of its own, two products more, finds backward's δ.

    Args:
        n_heads: Of all images, B·H.
        n_tokens, head_dim: N and D; channels are padded to a power of two, 32 at least.
        device: Whose rows of the table count.
        dtype: Of W.
    """
    block_d = max(32, 1 << (head_dim - 1).bit_length())  # the kernels' BLOCK_D
    precision, own_pass = matmul_precision(dtype).row, int(needs_delta(dtype))
    found = {}
    for name, products, exps, more in (("forward", 2, 1, 0), ("backward", 5, 2, own_pass)):
        tile = lookup(f"attention_{name}", device, precision, block_d)
        logits = n_heads * padded(n_tokens, tile.block_m) * padded(n_tokens, tile.block_n)
        found[name] = Executed(2.0 * (products + 2 * more) * logits * block_d, float((exps + more) * logits))
    return found


def ista_executed(
    rows: int, width: int, device: torch.device, dtype: torch.dtype, storage: torch.dtype, norm: bool
) -> dict[str, Executed]:
    """ISTA's products with x by pass, without folding G: one forward, two backward, of padded tiles.

    Args:
        rows, width: M and C.
        device: Whose rows of the table count.
        dtype: That it multiplies in.
        storage: Of x.
        norm: Whether the LayerNorm in front is in the kernels.
    """
    precision, prefix = matmul_precision(dtype, storage).row, "norm_" * norm

    def product(kernel: str, m: int, n: int, k: int) -> float:
        tile = fitted(lookup(kernel, device, precision), width)
        return 2.0 * padded(m, tile.block_m) * padded(n, tile.block_n) * padded(k, tile.block_k)

    backward = product("ista_backward_input", rows, width, width)
    backward += product(f"{prefix}ista_backward_folded", width, width, rows)
    return {"forward": Executed(product(f"{prefix}ista_forward", rows, width, width)), "backward": Executed(backward)}
