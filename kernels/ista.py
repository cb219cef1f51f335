"""The ISTA step y = shrink(x + xG, ηλ) as one product, and its gradients as two (kernels/README.md §5).

The operands are prepared before the products: x or its normalised rows in the product's dtype, and the gradient g'
from `masked_gradient`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.folding import scale
from crate_fast.kernels.launch import Tile
from crate_fast.kernels.layer_norm import Norm, plan_rows, shares
from crate_fast.kernels.product import product, tile_for

__all__ = ["backward_input", "forward", "masked_gradient"]


@triton.jit
def _masked_gradient_kernel(
    grad_ptr,  # g [M, C], contiguous
    nonzero_ptr,  # [y ≠ 0] [M, C], contiguous, int8
    masked_ptr,  # g' [M, C], contiguous, in the product's dtype
    partial_ptr,  # shares of Σ g' [1, programs, C], fp32, or None
    n_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # WIDTH rounded up to a power of two
):  # fmt: skip
    """Compute g' = g·[y ≠ 0], the gradient of the shrinkage's input (ReLU or soft), and a share of Σ g' over rows.

    Each program loops over every programs-th block of BLOCK_M rows; the caller adds the shares. Deterministic.
    """
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < WIDTH
    total = tl.zeros([BLOCK_C], tl.float32)
    step = tl.num_programs(0) * BLOCK_M
    for start in range(tl.program_id(0) * BLOCK_M, n_rows, step):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m < n_rows)[:, None] & mask_c[None, :]
        offsets = offs_m.to(tl.int64)[:, None] * WIDTH + offs_c[None, :]
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
        nonzero = tl.load(nonzero_ptr + offsets, mask=mask, other=0)
        masked = tl.where(nonzero != 0, grad, 0.0).to(masked_ptr.dtype.element_ty)
        tl.store(masked_ptr + offsets, masked, mask=mask)
        if partial_ptr is not None:
            total += tl.sum(masked.to(tl.float32), 0)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0) * WIDTH + offs_c, total, mask=mask_c)


def masked_gradient(
    grad: Tensor, nonzero: Tensor, dtype: torch.dtype, summed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return g' = g·[y ≠ 0] [M, C] in G's `dtype`, with [y ≠ 0] from `forward`; and, if `summed`, Σ g' over the rows
    [C] in fp32, which dG needs after a LayerNorm."""
    grad, nonzero = grad.contiguous(), nonzero.contiguous()
    masked = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    partial = shares(1, grad) if summed else None
    tensors = {"grad_ptr": grad, "nonzero_ptr": nonzero, "masked_ptr": masked, "partial_ptr": partial}
    plan_rows(_masked_gradient_kernel, grad, tensors, partial).run()
    return masked, None if partial is None else partial[0].sum(0)


def forward(
    x: Tensor,
    operand: Tensor,
    folded: Tensor,
    shift: float,
    soft: bool = False,
    norm: Norm | None = None,
    keep: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return y = shrink(x + xG, ηλ), with LayerNorm(x) = nγ + β in place of x if `norm` is given.

    Args:
        x: [M, C].
        operand: The product's left operand, in G's dtype: x, or its normalised rows n from `layer_norm.normalize`.
        folded: G [C, C]; its dtype is the product's.
        shift: ηλ, at least 0.
        soft: Soft threshold instead of ReLU.
        norm: Statistics and weights of the LayerNorm before ISTA; γ and β are folded into G.
        keep: Return [y ≠ 0], which backward needs.
        tile: Use this tile instead of the table's.

    Returns:
        y [M, C], contiguous, in x's dtype; [y ≠ 0] [M, C] in int8 (1 for NaN), or None without `keep`.
    """
    tile = tile or tile_for("ista_forward", operand, x.shape[1])
    nonzero = torch.empty(x.shape, dtype=torch.int8, device=x.device) if keep else None
    weight = folded.t()
    if norm is not None:
        weight, offset = scale(weight, norm.gamma, norm.beta, folded.dtype, base=norm.beta)
        norm = norm._replace(beta=offset)
    finish = "soft" if soft else "relu"
    return product(operand, weight, x, tile, finish=finish, shift=shift, norm=norm, nonzero=nonzero), nonzero


def backward_input(grad: Tensor, masked: Tensor, folded: Tensor, tile: Tile | None = None) -> Tensor:
    """Return dx = g' + g'Gᵀ [M, C] in g's dtype; with a LayerNorm before ISTA, the gradient of its output.

    `masked` is g' in G's dtype. If that differs from g's dtype, the first term is g itself, masked where g' is zero.
    """
    tile = tile or tile_for("ista_backward_input", masked, grad.shape[1])
    if masked.dtype == grad.dtype:
        return product(masked, folded, masked, tile)
    return product(masked, folded, grad, tile, masked=True)
