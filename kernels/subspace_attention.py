"""Tied attention O = softmax(s·W Wᵀ) W and its gradient over [B, N, H, D]: by whole heads where the tile table has a
row for them and the sequence fits, else by blocks of rows."""

from torch import Tensor

from crate_fast.kernels import row_blocks, whole_head
from crate_fast.kernels.launch import matmul_precision

__all__ = ["backward", "forward"]


def forward(w: Tensor, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """O and the row log-sum-exp of tied attention.

    Args:
        w: [B, N, H, D], D at most 128; strides as they come (copied only where D is not contiguous).
        scale: s, at least 0.
        dropout_p: Probability of dropping an attention weight, in [0, 1).
        seed: int64 scalar tensor on w's device that decides the dropped weights; None without dropout.

    Returns:
        O [B, N, H, D], contiguous, in w's dtype; L [B, H, N] in fp32, base 2: log2 Σ_j exp(S_ij).
    """
    tile = _whole_head_tile("whole_head_forward", w, dropout_p)
    if tile is not None:
        return whole_head.forward(w, scale, tile)
    return row_blocks.forward(w, scale, dropout_p, seed)


def backward(
    grad: Tensor,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dW [B, N, H, D] from dO (any strides; copied where not contiguous) and what `forward` took and returned."""
    tile = _whole_head_tile("whole_head_backward", w, dropout_p)
    if tile is not None:
        return whole_head.backward(grad, w, out, lse, scale, tile)
    return row_blocks.backward(grad, w, out, lse, scale, dropout_p, seed)


def _whole_head_tile(name: str, w: Tensor, dropout_p: float):
    return None if dropout_p > 0.0 else whole_head.tile_for(name, w, matmul_precision(w.dtype).row)
