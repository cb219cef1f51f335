"""The ISTA step y = shrink(x + xG, ηλ) as one product, and its gradients as two (kernels/README.md §5).

Its operands are prepared first: x or its normalised rows in the product's dtype, and `masked_gradient`, the output's
gradient where the shrinkage lets it through.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch
from crate_fast.kernels.layer_norm import Norm
from crate_fast.kernels.product import product, tile_for
from crate_fast.kernels.tiles import Tile

__all__ = ["backward_input", "forward", "masked_gradient", "plan_masked_gradient"]

MASK_BLOCK = 2048  # elements of a program


@triton.jit
def _masked_gradient_kernel(
    grad_ptr,  # g, contiguous
    nonzero_ptr,  # whether ISTA's output is not 0, contiguous, int8
    masked_ptr,  # contiguous, in the product's dtype
    n_elements,
    BLOCK: tl.constexpr,
):
    """g' = g·[y ≠ 0]: the shrinkage passes a gradient where its output is not zero, for relu and soft alike.

    Grid: (⌈elements/BLOCK⌉)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0)
    nonzero = tl.load(nonzero_ptr + offs, mask=mask, other=0)
    tl.store(masked_ptr + offs, tl.where(nonzero != 0, grad, 0.0).to(masked_ptr.dtype.element_ty), mask=mask)


def plan_masked_gradient(grad: Tensor, nonzero: Tensor, masked: Tensor) -> Launch:
    """The launch on these tensors; what `masked_gradient` runs and the compile report compiles."""
    return Launch(
        kernel=_masked_gradient_kernel,
        grid=(triton.cdiv(grad.numel(), MASK_BLOCK),),
        arguments={"grad_ptr": grad, "nonzero_ptr": nonzero, "masked_ptr": masked, "n_elements": grad.numel()},
        constants={"BLOCK": MASK_BLOCK},
        tile=Tile(block_m=MASK_BLOCK, block_n=0, num_warps=4, num_stages=1),
    )


def masked_gradient(grad: Tensor, nonzero: Tensor, dtype: torch.dtype) -> Tensor:
    """g' = g·[y ≠ 0] [M, C] in `dtype`, the product's, for g [M, C] and `forward`'s [y ≠ 0]."""
    grad, nonzero = grad.contiguous(), nonzero.contiguous()
    masked = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if grad.numel():
        plan_masked_gradient(grad, nonzero, masked).run()
    return masked


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
    """y = shrink(x + xG, ηλ), or of LayerNorm(x) = nγ + β: then γ and β ride on G, n(γ∘G) + βG.

    Args:
        x: [M, C].
        operand: What is multiplied, in G's dtype: x, or its normalised rows n as `layer_norm.normalize` gives them.
        folded: G [C, C]; its dtype is the product's.
        shift: ηλ, at least 0.
        soft: Soft threshold instead of ReLU.
        norm: Statistics and weights of the LayerNorm in front.
        keep: Whether backward will come, which needs [y ≠ 0].
        tile: In place of the table's.

    Returns:
        y [M, C], contiguous, in x's dtype; and [y ≠ 0] [M, C] in int8 (a NaN is not 0), None unless kept.
    """
    tile = tile or tile_for("ista_forward", operand, x, x.shape[1])
    nonzero = torch.empty(x.shape, dtype=torch.int8, device=x.device) if keep else None
    if norm is not None:
        wide, gamma, beta = folded.float(), norm.gamma.float(), norm.beta.float()
        folded = (gamma[:, None] * wide).to(folded.dtype)
        norm = replace(norm, beta=beta + (beta[:, None] * wide).sum(0))
    finish = "soft" if soft else "relu"
    return product(operand, folded.t(), x, tile, finish=finish, shift=shift, norm=norm, nonzero=nonzero), nonzero


def backward_input(grad: Tensor, masked: Tensor, folded: Tensor, tile: Tile | None = None) -> Tensor:
    """dx = g' + g'Gᵀ [M, C] in g's dtype; with a LayerNorm in front, the gradient of its output.

    Args:
        grad: g [M, C], the gradient of y.
        masked: g' in G's dtype, from `masked_gradient`. Where that is lower than g's, g itself is added, where g' is
            not zero.
        folded: G [C, C].
        tile: In place of the table's.
    """
    tile = tile or tile_for("ista_backward_input", masked, grad, grad.shape[1])
    if masked.dtype == grad.dtype:
        return product(masked, folded, masked, tile)
    return product(masked, folded, grad, tile, masked=True)
