"""The Triton kernels as PyTorch operators: registered with `torch.library`, with fake tensors and autograd.

Each operator only launches; checks, casts and dispatch are in `functional.py`. Backward passes are operators of
their own, so `torch.compile` sees the whole step. Second derivatives are refused with an error.
"""

import torch
from torch import Tensor

from crate_fast.autocast import without_autocast
from crate_fast.double_backward import refuse_double_backward

__all__ = ["ista_fwd", "layer_norm_bwd", "row_statistics", "subspace_attention_bwd", "subspace_attention_fwd"]

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


def _norm(mean: Tensor | None, rstd: Tensor | None, gamma: Tensor | None, beta: Tensor | None):
    from crate_fast.kernels.layer_norm import Norm

    return None if gamma is None else Norm(mean, rstd, gamma.contiguous(), beta.contiguous())


@torch.library.custom_op("crate_fast::row_statistics", mutates_args=())
def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(variance + eps) [M] of x's rows [M, C], in fp32: no gradient flows through them here."""
    from crate_fast.kernels import layer_norm

    return layer_norm.row_statistics(x, eps)


@row_statistics.register_fake
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    return mean, rstd


@torch.library.custom_op("crate_fast::ista_fwd", mutates_args=())
def ista_fwd(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    dictionary: Tensor,
    folded: Tensor,
    step_size: float,
    sparsity: float,
    soft: bool,
) -> Tensor:
    """y = shrink(x + xG, ηλ), with LayerNorm(x) in place of x where its statistics and weights are given.

    Args:
        x: [M, C].
        mean, rstd: Of x's rows [M] in fp32 (`row_statistics`); backward takes them for functions of x.
        gamma, beta: LayerNorm's weight and bias [C]; all four or none.
        dictionary: D [C, C]: what the gradient is for; forward reads `folded` alone.
        folded: G = η(D − DᵀD) [C, C] in the product's dtype; the caller vouches for it.
        step_size, sparsity: η and λ.
        soft: Soft threshold instead of ReLU.

    Returns:
        y [M, C] in x's dtype.
    """
    from crate_fast.kernels import ista

    return ista.forward(x, folded, step_size * sparsity, soft, _norm(mean, rstd, gamma, beta))


@ista_fwd.register_fake
def _(x, mean, rstd, gamma, beta, dictionary, folded, step_size, sparsity, soft):
    return x.new_empty(x.shape)


@torch.library.custom_op("crate_fast::ista_bwd_input", mutates_args=())
def ista_bwd_input(grad: Tensor, y: Tensor, folded: Tensor) -> Tensor:
    """dx = g' + g'Gᵀ [M, C] with g' = g·[y ≠ 0]; see `kernels.ista.backward_input`."""
    from crate_fast.kernels import ista

    return ista.backward_input(grad, y, folded)


@ista_bwd_input.register_fake
def _(grad: Tensor, y: Tensor, folded: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.custom_op("crate_fast::ista_bwd_dictionary", mutates_args=())
def ista_bwd_dictionary(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    dictionary: Tensor,
    folded: Tensor,
    step_size: float,
) -> Tensor:
    """dD = η(dG − D(dG + dGᵀ)) [C, C] with dG = xᵀg', in D's dtype; multiplied in G's dtype, then in fp32."""
    from crate_fast.kernels import ista

    grad_folded = ista.backward_folded(x, grad, y, folded.dtype, _norm(mean, rstd, gamma, beta))
    with without_autocast(x.device.type):
        symmetric = grad_folded + grad_folded.t()
        return (step_size * (grad_folded - dictionary.float() @ symmetric)).to(dictionary.dtype)


@ista_bwd_dictionary.register_fake
def _(grad, x, y, mean, rstd, gamma, beta, dictionary, folded, step_size):
    return dictionary.new_empty(dictionary.shape)


@torch.library.custom_op("crate_fast::layer_norm_bwd", mutates_args=())
def layer_norm_bwd(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm's dx [M, C] (and `skip` added to it), dγ and dβ [C], in the dtypes of x, γ and β; see
    `kernels.layer_norm.backward`."""
    from crate_fast.kernels import layer_norm

    dx, dgamma, dbeta = layer_norm.backward(grad, x, _norm(mean, rstd, gamma, beta), skip)
    return dx, dgamma.to(gamma.dtype), dbeta.to(beta.dtype)


@layer_norm_bwd.register_fake
def _(grad, x, mean, rstd, gamma, beta, skip):
    return x.new_empty(x.shape), gamma.new_empty(gamma.shape), beta.new_empty(beta.shape)


def _ista_setup(ctx, inputs, output):
    x, mean, rstd, gamma, beta, dictionary, folded, ctx.step_size, *_ = inputs
    ctx.save_for_backward(x, mean, rstd, gamma, beta, dictionary, folded, output)


def _ista_backward(ctx, grad):
    x, mean, rstd, gamma, beta, dictionary, folded, y = ctx.saved_tensors
    needs_x, _, _, needs_gamma, needs_beta, needs_dictionary, *_ = ctx.needs_input_grad
    grad_x = grad_gamma = grad_beta = grad_dictionary = None
    if needs_x or needs_gamma or needs_beta:
        grad_x = ista_bwd_input(grad, y, folded)
        if gamma is not None:
            grad_x, grad_gamma, grad_beta = layer_norm_bwd(grad_x, x, mean, rstd, gamma, beta, None)
    if needs_dictionary:
        grad_dictionary = ista_bwd_dictionary(grad, x, y, mean, rstd, gamma, beta, dictionary, folded, ctx.step_size)
    return grad_x, None, None, grad_gamma, grad_beta, grad_dictionary, None, None, None, None


ista_fwd.register_autograd(_ista_backward, setup_context=_ista_setup)
for _op in (row_statistics, ista_bwd_input, ista_bwd_dictionary, layer_norm_bwd):
    refuse_double_backward(_op, _ISTA_REMEDY)
