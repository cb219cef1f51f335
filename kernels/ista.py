"""The ISTA step y = shrink(x + xG, ηλ) as one product, and its gradients as two (kernels/README.md §5).

Its operands are prepared first: x or its normalised rows in the product's dtype, and `masked_gradient`, the output's
gradient where the shrinkage lets it through.
"""

from dataclasses import replace

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
    nonzero_ptr,  # whether ISTA's output is not 0 [M, C], contiguous, int8
    masked_ptr,  # [M, C], contiguous, in the product's dtype
    partial_ptr,  # shares of Σ g' [1, programs, C], fp32, or None
    n_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # WIDTH to the next power of two
):  # fmt: skip
    """g' = g·[y ≠ 0]: the shrinkage passes a gradient where its output is not zero, for relu and soft alike; and one
    program's share of Σ g' over the rows.

    A program takes every programs-th block of BLOCK_M rows, in order; the caller adds the shares: deterministic.
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
    """g' = g·[y ≠ 0] [M, C] in `dtype`, G's, for g [M, C] and [y ≠ 0] from `forward`; and, if `summed`, as behind a
    LayerNorm, Σ g' over the rows [C] in fp32."""
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
    """y = shrink(x + xG, ηλ), or of LayerNorm(x) = nγ + β: γ and β are folded into G, n(γ∘G) + βG.

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
    tile = tile or tile_for("ista_forward", operand, x.shape[1])
    nonzero = torch.empty(x.shape, dtype=torch.int8, device=x.device) if keep else None
    weight = folded.t()
    if norm is not None:
        weight, offset = scale(weight, norm.gamma, norm.beta, folded.dtype, base=norm.beta)
        norm = replace(norm, beta=offset)
    finish = "soft" if soft else "relu"
    return product(operand, weight, x, tile, finish=finish, shift=shift, norm=norm, nonzero=nonzero), nonzero


def backward_input(grad: Tensor, masked: Tensor, folded: Tensor, tile: Tile | None = None) -> Tensor:
    """dx = g' + g'Gᵀ [M, C] in g's dtype; with a LayerNorm in front, the gradient of its output.

    `masked` is g' in G's dtype. Where that is lower than g's, g itself is added where g' is not zero.
    """
    tile = tile or tile_for("ista_backward_input", masked, grad.shape[1])
    if masked.dtype == grad.dtype:
        return product(masked, folded, masked, tile)
    return product(masked, folded, grad, tile, masked=True)
