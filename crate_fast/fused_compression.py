"""The first half of a layer on the Triton kernels, as one PyTorch operator: h = x + MSSA(LayerNorm(x)).

Kept for backward: x, W, O, the log-sum-exp, and two numbers a row. LayerNorm(x) is made again, and the skip
connection's gradient is added where LayerNorm's is written. The output map runs in one kernel with bias and residual,
or by itself in PyTorch: `kernels/tiles.py` says which, `CRATE_FAST_FUSED_PRODUCTS` overrides it (kernels/README.md
§6).
"""

import torch
from torch import Tensor

from crate_fast.double_backward import refuse_double_backward
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h = x + MSSA(LayerNorm(x)) (paper, Eq. 5, with the skip connection).

    Args:
        x: [B, N, C].
        gamma, beta: LayerNorm's weight and bias [C].
        projection: U [H·D, C] in the products' dtype.
        output, bias: V [C, H·D] in the products' dtype, and b [C].
        heads: H.
        scale: s.
        eps: LayerNorm's.

    Returns:
        h [B, N, C] in x's dtype; and what backward needs: mean and rstd of x's rows [B·N] in fp32, W and O
        [B, N, H, D], the log-sum-exp [B, H, N]. Only h can be differentiated.
    """
    from crate_fast.kernels import layer_norm, subspace_attention

    batch, n_tokens, width = x.shape
    rows = x.reshape(-1, width).contiguous()
    normed, norm = layer_norm.normalize(rows, gamma, beta, eps, projection.dtype)
    w = (normed @ projection.t()).view(batch, n_tokens, heads, -1)
    del normed
    out, lse = subspace_attention.forward(w, scale, 0.0, None)
    h = _output_map(out.view(len(rows), -1), output, bias, rows)
    return h.view(x.shape), norm.mean, norm.rstd, w, out, lse


@compression_fwd.register_fake
def _(x, gamma, beta, projection, output, bias, heads, scale, eps):
    batch, n_tokens, _ = x.shape
    w, out = (projection.new_empty(batch, n_tokens, heads, projection.shape[0] // heads) for _ in range(2))
    mean, rstd = (x.new_empty(batch * n_tokens, dtype=torch.float32) for _ in range(2))
    lse = x.new_empty(batch, heads, n_tokens, dtype=torch.float32)
    return x.new_empty(x.shape), mean, rstd, w, out, lse


@torch.library.custom_op("crate_fast::projection_bwd", mutates_args=())
def projection_bwd(grad: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """dU = gᵀ LayerNorm(x) [J, C] in g's dtype; g [M, J], x [M, C]."""
    from crate_fast.kernels import layer_norm

    return grad.t() @ layer_norm.normalize(x, gamma, beta, eps, grad.dtype)[0]


@projection_bwd.register_fake
def _(grad, x, gamma, beta, eps):
    return grad.new_empty(grad.shape[1], x.shape[1])


def _setup(ctx, inputs, output):
    x, gamma, beta, projection, output_map, bias, _, ctx.scale, ctx.eps = inputs
    _, *others = output
    ctx.bias_dtype = bias.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(x, gamma, beta, projection, output_map, *others)


def _backward(ctx, grad, *_):
    x, gamma, beta, projection, output, mean, rstd, w, out, lse = ctx.saved_tensors
    needs_x, needs_gamma, needs_beta, needs_projection, needs_output, needs_bias, *_ = ctx.needs_input_grad
    grads = [None] * 9
    if grad is None:
        return tuple(grads)
    rows, grad_h = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    tokens, low = out.flatten(2).flatten(0, 1), grad_h.to(w.dtype)
    if needs_output:
        grads[4] = low.t() @ tokens
    if needs_bias:
        grads[5] = grad_h.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    if needs_x or needs_gamma or needs_beta or needs_projection:
        grad_out = (low @ output).view(out.shape)
        grad_w = subspace_attention_bwd(grad_out, w, out, lse, ctx.scale, 0.0, None).flatten(2).flatten(0, 1)
        if needs_projection:
            grads[3] = projection_bwd(grad_w, rows, gamma, beta, ctx.eps)
        if needs_x or needs_gamma or needs_beta:
            grad_x, grads[1], grads[2] = layer_norm_bwd(grad_w @ projection, rows, mean, rstd, gamma, beta, grad_h)
            grads[0] = grad_x.view(x.shape)
    return tuple(grads)


compression_fwd.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(projection_bwd, "run backend='torch' under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")
