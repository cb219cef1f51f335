"""The Triton kernels as PyTorch operators: registered with `torch.library`, with fake tensors and autograd.

Each operator only launches; checks, casts and dispatch are in `functional.py`. Backward passes are operators of
their own, so `torch.compile` sees the whole step. Second derivatives are refused with an error.
"""

import torch
from torch import Tensor

from crate_fast.autocast import without_autocast
from crate_fast.double_backward import refuse_double_backward

__all__ = ["ista_fwd", "layer_norm_bwd", "subspace_attention_bwd", "subspace_attention_fwd"]

_ATTENTION_REMEDY = "run backend='torch' under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
_ISTA_REMEDY = "run backend='torch'"


@torch.library.custom_op("crate_fast::subspace_attention_fwd", mutates_args=())
def subspace_attention_fwd(w: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """O [B, N, H, D] and the rows' log-sum-exp [B, H, N]; see `kernels.subspace_attention.forward`.

    Only O can be differentiated.
    """
    from crate_fast.kernels import subspace_attention  # Triton is imported when a kernel runs, not before

    return subspace_attention.forward(w, scale, dropout_p, seed)


@subspace_attention_fwd.register_fake
def _(w: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, n_tokens, n_heads, _ = w.shape
    return w.new_empty(w.shape), w.new_empty(batch, n_heads, n_tokens, dtype=torch.float32)


@torch.library.custom_op("crate_fast::subspace_attention_bwd", mutates_args=())
def subspace_attention_bwd(
    grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """dW [B, N, H, D]; see `kernels.subspace_attention.backward`."""
    from crate_fast.kernels import subspace_attention

    return subspace_attention.backward(grad, w, out, lse, scale, dropout_p, seed)


@subspace_attention_bwd.register_fake
def _(
    grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return w.new_empty(w.shape)


def _attention_setup(ctx, inputs, output):
    w, ctx.scale, ctx.dropout_p, seed = inputs
    out, lse = output
    ctx.set_materialize_grads(False)  # none for lse, which has none
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(w, out, lse, seed)


def _attention_backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    w, out, lse, seed = ctx.saved_tensors
    return subspace_attention_bwd(grad, w, out, lse, ctx.scale, ctx.dropout_p, seed), None, None, None


subspace_attention_fwd.register_autograd(_attention_backward, setup_context=_attention_setup)
refuse_double_backward(subspace_attention_bwd, _ATTENTION_REMEDY)


@torch.library.custom_op("crate_fast::ista_fwd", mutates_args=())
def ista_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dictionary: Tensor,
    folded: Tensor,
    step_size: float,
    sparsity: float,
    eps: float,
    soft: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = shrink(x + xG, ηλ), with LayerNorm(x) in place of x where gamma and beta are given.

    Args:
        x: [M, C].
        gamma, beta: LayerNorm's weight and bias [C], both or neither.
        dictionary: D [C, C]: what the gradient is for; forward reads `folded` alone.
        folded: G = η(D − DᵀD) [C, C] in the product's dtype; the caller vouches for it.
        step_size, sparsity: η and λ.
        eps: LayerNorm's.
        soft: Soft threshold instead of ReLU.
        keep: Whether backward will come.

    Returns:
        y [M, C] in x's dtype; and what backward needs: [y ≠ 0] in int8 [M, C], empty unless kept; the normalised rows
        in G's dtype [M, C], their mean and rstd in fp32 [M], empty without a LayerNorm.
    """
    from crate_fast.kernels import ista, layer_norm

    if gamma is None:
        operand, norm = x.to(folded.dtype), None
        normed, mean, rstd = (torch.empty(0, dtype=t, device=x.device) for t in (folded.dtype, *[torch.float32] * 2))
    else:
        normed, mean, rstd = layer_norm.normalize(x, eps, folded.dtype)
        operand, norm = normed, layer_norm.Norm(mean, rstd, gamma.contiguous(), beta.contiguous())
    y, nonzero = ista.forward(x, operand, folded, step_size * sparsity, soft, norm, keep)
    if nonzero is None:
        nonzero = torch.empty(0, dtype=torch.int8, device=x.device)
    return y, nonzero, normed, mean, rstd


@ista_fwd.register_fake
def _(x, gamma, beta, dictionary, folded, step_size, sparsity, eps, soft, keep):
    nonzero = x.new_empty(x.shape if keep else 0, dtype=torch.int8)
    normed = x.new_empty(0 if gamma is None else x.shape, dtype=folded.dtype)
    mean, rstd = (x.new_empty(0 if gamma is None else x.shape[0], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), nonzero, normed, mean, rstd


@torch.library.custom_op("crate_fast::ista_masked_gradient", mutates_args=())
def ista_masked_gradient(grad: Tensor, nonzero: Tensor, dtype: torch.dtype, summed: bool) -> tuple[Tensor, Tensor]:
    """g' = g·[y ≠ 0] [M, C] in `dtype`; Σ g' [C] in fp32, empty unless summed. See `kernels.ista.masked_gradient`."""
    from crate_fast.kernels import ista

    masked, total = ista.masked_gradient(grad, nonzero, dtype, summed)
    return masked, grad.new_empty(0, dtype=torch.float32) if total is None else total


@ista_masked_gradient.register_fake
def _(grad: Tensor, nonzero: Tensor, dtype: torch.dtype, summed: bool) -> tuple[Tensor, Tensor]:
    total = grad.new_empty(grad.shape[1] if summed else 0, dtype=torch.float32)
    return grad.new_empty(grad.shape, dtype=dtype), total


@torch.library.custom_op("crate_fast::ista_bwd_input", mutates_args=())
def ista_bwd_input(grad: Tensor, masked: Tensor, folded: Tensor) -> Tensor:
    """dx = g' + g'Gᵀ [M, C] in g's dtype; see `kernels.ista.backward_input`."""
    from crate_fast.kernels import ista

    return ista.backward_input(grad, masked, folded)


@ista_bwd_input.register_fake
def _(grad: Tensor, masked: Tensor, folded: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.custom_op("crate_fast::ista_bwd_dictionary", mutates_args=())
def ista_bwd_dictionary(
    masked: Tensor,
    total: Tensor,
    rows: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dictionary: Tensor,
    step_size: float,
    eps: float,
) -> Tensor:
    """dD = η(dG − D(dG + dGᵀ)) [C, C] in D's dtype, with dG = xᵀg', or (nγ + β)ᵀg'.

    Multiplied in g''s dtype, then in fp32.

    Args:
        masked, total: g' [M, C]; with γ and β, Σ g' [C].
        rows: n [M, C] in g''s dtype, or x in another; without γ and β always x.
        gamma, beta: LayerNorm's.
        dictionary, step_size: D and η.
        eps: LayerNorm's.
    """
    from crate_fast.kernels import layer_norm
    from crate_fast.kernels.weight_gradient import weight_gradient

    if gamma is None or rows.dtype == masked.dtype:
        operand = rows.to(masked.dtype)
    else:
        operand, _, _ = layer_norm.normalize(rows, eps, masked.dtype)
    grad_folded = weight_gradient(operand, masked)
    with without_autocast(masked.device.type):
        if gamma is not None:
            grad_folded = gamma.float()[:, None] * grad_folded + beta.float()[:, None] * total
        symmetric = grad_folded + grad_folded.t()
        return (step_size * (grad_folded - dictionary.float() @ symmetric)).to(dictionary.dtype)


@ista_bwd_dictionary.register_fake
def _(masked, total, rows, gamma, beta, dictionary, step_size, eps):
    return dictionary.new_empty(dictionary.shape)


@torch.library.custom_op("crate_fast::layer_norm_bwd", mutates_args=())
def layer_norm_bwd(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
    skip: Tensor | None,
    dtype: torch.dtype,
    normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [M, C] in `dtype`; dγ and dβ [C] in γ's dtype, empty without γ; n [M, C] in `normed_dtype`, empty without.

    See `kernels.layer_norm.backward`.
    """
    from crate_fast.kernels import layer_norm

    dx, dgamma, dbeta, normed = layer_norm.backward(grad, rows, mean, rstd, dtype, gamma, skip, normed_dtype)
    normed = grad.new_empty(0) if normed is None else normed
    if gamma is None:
        return dx, grad.new_empty(0), grad.new_empty(0), normed
    return dx, dgamma.to(gamma.dtype), dbeta.to(gamma.dtype), normed


@layer_norm_bwd.register_fake
def _(grad, rows, mean, rstd, gamma, skip, dtype, normed_dtype=None):
    like = grad.new_empty(0) if gamma is None else gamma
    normed = grad.new_empty(0) if normed_dtype is None else grad.new_empty(grad.shape, dtype=normed_dtype)
    return grad.new_empty(grad.shape, dtype=dtype), like.new_empty(like.shape), like.new_empty(like.shape), normed


def _ista_setup(ctx, inputs, output):
    x, gamma, beta, dictionary, folded, ctx.step_size, _, ctx.eps, _, ctx.keep = inputs
    _, nonzero, normed, mean, rstd = output
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(nonzero, normed, mean, rstd)
    # n serves the dictionary's gradient and LayerNorm's unless it is rounded further than x is; then x makes both.
    rows, mean = (normed, None) if gamma is not None and x.dtype == folded.dtype else (x, mean)
    ctx.save_for_backward(rows, mean, rstd, gamma, beta, dictionary, folded, nonzero)


def _ista_backward(ctx, grad, *_):
    rows, mean, rstd, gamma, beta, dictionary, folded, nonzero = ctx.saved_tensors
    needs_x, needs_gamma, needs_beta, needs_dictionary, *_ = ctx.needs_input_grad
    grads = [None] * 10
    if grad is None:
        return tuple(grads)
    if not ctx.keep:
        raise RuntimeError("ista_fwd was called with keep=False: it has kept nothing for a backward pass")
    masked, total = ista_masked_gradient(grad, nonzero, folded.dtype, gamma is not None and needs_dictionary)
    if needs_x or needs_gamma or needs_beta:
        grads[0] = ista_bwd_input(grad, masked, folded)
        if gamma is not None:
            wanted = folded.dtype if mean is not None and needs_dictionary else None
            *grads[:3], normed = layer_norm_bwd(grads[0], rows, mean, rstd, gamma, None, ctx.x_dtype, wanted)
            rows = rows if wanted is None else normed
    if needs_dictionary:
        grads[3] = ista_bwd_dictionary(masked, total, rows, gamma, beta, dictionary, ctx.step_size, ctx.eps)
    return tuple(grads)


ista_fwd.register_autograd(_ista_backward, setup_context=_ista_setup)
for _op in (ista_masked_gradient, ista_bwd_input, ista_bwd_dictionary, layer_norm_bwd):
    refuse_double_backward(_op, _ISTA_REMEDY)
