"""The first half of a layer on the Triton kernels, as one PyTorch operator: h = x + MSSA(LayerNorm(x)).

LayerNorm(x) = nγ + β, and γ and β ride on the projection: W = n(U∘γ)ᵀ + Uβ. So the normalised rows n, in the dtype of
the products, are what is multiplied and, with W, O and a few numbers a row, all that is kept for backward. The output
map runs in one kernel with bias and residual, or by itself in PyTorch: `kernels/tiles.py` says which,
`CRATE_FAST_FUSED_PRODUCTS` overrides it (kernels/README.md §6).
"""

import torch
from torch import Tensor

from crate_fast.autocast import without_autocast
from crate_fast.fused import layer_norm_bwd, subspace_attention_bwd
from crate_fast.settings import fused_products_wanted

__all__ = ["compression_fwd"]


def _tile(x: Tensor, weight: Tensor):
    """The output map's tile where it runs with its neighbours; None where it runs by itself."""
    from crate_fast.kernels.launch import matmul_precision
    from crate_fast.kernels.product import fitted_product
    from crate_fast.kernels.tiles import find

    tile = find("output_map", x.device, matmul_precision(weight.dtype, x.dtype).row)
    wanted = fused_products_wanted()
    if tile is None or not (tile.chosen if wanted is None else wanted):
        return None
    return fitted_product(tile, weight.shape[0])


def _output_map(tokens: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """h = x + O Vᵀ + b [M, C]."""
    from crate_fast.kernels.product import product

    tile = _tile(x, weight)
    if tile is None:
        return (x + torch.addmm(bias.to(weight.dtype), tokens, weight.t())).to(x.dtype)
    return product(tokens, weight, x, tile, bias=bias.contiguous())


def _scaled(projection: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """U∘γ, rounded once."""
    return (projection.float() * gamma.float()).to(dtype)


@torch.library.custom_op("crate_fast::compression_fwd", mutates_args=())
def compression_fwd(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    projection: Tensor,
    output: Tensor,
    bias: Tensor,
    heads: int,
    scale: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h = x + MSSA(LayerNorm(x)) (paper, Eq. 5, with the skip connection).

    Args:
        x: [B, N, C].
        gamma, beta: LayerNorm's weight and bias [C].
        projection: U [H·D, C].
        output, bias: V [C, H·D] and b [C].
        heads: H.
        scale: s.
        eps: LayerNorm's.
        dtype: Of the products.

    Returns:
        h [B, N, C] in x's dtype; and what backward needs: n [B·N, C] and rstd [B·N] of x's rows, W and O
        [B, N, H, D], the log-sum-exp [B, H, N]. Only h can be differentiated.
    """
    from crate_fast.kernels import layer_norm, subspace_attention

    batch, n_tokens, width = x.shape
    rows = x.reshape(-1, width).contiguous()
    normed, _, rstd = layer_norm.normalize(rows, eps, dtype)
    offset = (projection.float() * beta.float()).sum(1).to(dtype)
    w = torch.addmm(offset, normed, _scaled(projection, gamma, dtype).t()).view(batch, n_tokens, heads, -1)
    out, lse = subspace_attention.forward(w, scale, 0.0, None)
    h = _output_map(out.view(len(rows), -1), output.to(dtype), bias, rows)
    return h.view(x.shape), normed, rstd, w, out, lse


@compression_fwd.register_fake
def _(x, gamma, beta, projection, output, bias, heads, scale, eps, dtype):
    batch, n_tokens, width = x.shape
    inner = projection.shape[0]
    w, out = (x.new_empty(batch, n_tokens, heads, inner // heads, dtype=dtype) for _ in range(2))
    normed = x.new_empty(batch * n_tokens, width, dtype=dtype)
    rstd = x.new_empty(batch * n_tokens, dtype=torch.float32)
    lse = x.new_empty(batch, heads, n_tokens, dtype=torch.float32)
    return x.new_empty(x.shape), normed, rstd, w, out, lse


def _setup(ctx, inputs, output):
    x, gamma, beta, projection, output_map, bias, _, ctx.scale, _, _ = inputs
    _, *others = output
    ctx.x_dtype, ctx.bias_dtype = x.dtype, bias.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(gamma, beta, projection, output_map, *others)


def _backward(ctx, grad, *_):
    grads = [None] * 10
    if grad is None:
        return tuple(grads)
    with without_autocast(grad.device.type):
        gamma, beta, projection, output, normed, rstd, w, out, lse = ctx.saved_tensors
        needs_x, needs_gamma, needs_beta, needs_projection, needs_output, needs_bias, *_ = ctx.needs_input_grad
        grad_h = grad.reshape(-1, grad.shape[-1])
        tokens, low = out.flatten(2).flatten(0, 1), grad_h.to(w.dtype)
        if needs_output:
            grads[4] = (low.t() @ tokens).to(output.dtype)
        if needs_bias:
            grads[5] = grad_h.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        needs_projection = needs_projection or needs_gamma or needs_beta
        if needs_x or needs_projection:
            grad_out = (low @ output.to(w.dtype)).view(out.shape)
            grad_w = subspace_attention_bwd(grad_out, w, out, lse, ctx.scale, 0.0, None).flatten(2).flatten(0, 1)
        if needs_projection:
            scaled, offset = (grad_w.t() @ normed).float(), grad_w.sum(0, dtype=torch.float32)[:, None]
            grads[1] = (scaled * projection).sum(0).to(gamma.dtype)
            grads[2] = (offset * projection).sum(0).to(beta.dtype)
            grads[3] = (scaled * gamma + offset * beta).to(projection.dtype)
        if needs_x:
            grad_normed = grad_w @ _scaled(projection, gamma, w.dtype)
            grad_x, *_ = layer_norm_bwd(grad_normed, normed, None, rstd, None, grad_h, ctx.x_dtype)
            grads[0] = grad_x.view(grad.shape)
    return tuple(grads)


compression_fwd.register_autograd(_backward, setup_context=_setup)
