"""The first half of a layer on the Triton kernels, as one PyTorch operator: h = x + MSSA(LayerNorm(x)).

Kept for backward: x, W, O, the log-sum-exp, and two numbers a row. LayerNorm(x) is made again, the skip connection's
gradient is added where LayerNorm's is written. Each product around attention runs in a kernel with its neighbours or
by itself in PyTorch: `kernels/tiles.py` says which, `CRATE_FAST_FUSED_PRODUCTS` overrides it.
"""

import torch
from torch import Tensor

from crate_fast.double_backward import refuse_double_backward
from crate_fast.fused import layer_norm_bwd, subspace_attention_bwd
from crate_fast.settings import fused_products_wanted

__all__ = ["compression_fwd"]


def _tile(kernel: str, x: Tensor, dtype: torch.dtype, width: int):
    """The tile of a product that runs with its neighbours; None where it runs by itself."""
    from crate_fast.kernels.launch import matmul_precision
    from crate_fast.kernels.product_common import fitted
    from crate_fast.kernels.tiles import find

    tile, wanted = find(kernel, x.device, matmul_precision(dtype, x.dtype).row), fused_products_wanted()
    if tile is None or not (tile.chosen if wanted is None else wanted):
        return None
    return fitted(tile, width)


def _project(rows: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, eps: float) -> tuple[Tensor, ...]:
    """W = LayerNorm(x) Uᵀ [M, J]; mean and rstd of x's rows."""
    from crate_fast.kernels import layer_norm, projections

    tile = _tile("norm_product", rows, projection.dtype, projection.shape[0])
    if tile is None:
        normed, mean, rstd = layer_norm.normalize(rows, gamma, beta, eps, projection.dtype)
        return normed @ projection.t(), mean, rstd
    norm = layer_norm.Norm(*layer_norm.row_statistics(rows, eps), gamma.contiguous(), beta.contiguous())
    return projections.norm_product(rows, norm, projection, tile), norm.mean, norm.rstd


def _map_back(tokens: Tensor, output: Tensor, bias: Tensor, rows: Tensor, eps: float | None) -> tuple[Tensor, ...]:
    """h = x + O Vᵀ + b [M, C]; mean and rstd of its rows, empty without `eps`."""
    from crate_fast.kernels import layer_norm, projections

    tile = _tile("product_residual", rows, output.dtype, output.shape[0])
    if tile is not None:
        return projections.product_residual(tokens, output, bias, rows, eps, tile)
    h = (rows + torch.addmm(bias.to(output.dtype), tokens, output.t())).to(rows.dtype)
    if eps is None:
        return h, *(torch.empty(0, dtype=torch.float32, device=rows.device) for _ in range(2))
    return h, *layer_norm.row_statistics(h, eps)


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
    next_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h = x + MSSA(LayerNorm(x)) (paper, Eq. 5, with the skip connection).

    Args:
        x: [B, N, C].
        gamma, beta: LayerNorm's weight and bias [C].
        projection: U [H·D, C] in the products' dtype.
        output, bias: V [C, H·D] in the products' dtype, and b [C].
        heads: H.
        scale: s.
        eps: LayerNorm's.
        next_eps: Of the LayerNorm that takes h; None where none does.

    Returns:
        h [B, N, C] in x's dtype; mean and rstd of its rows [B·N] in fp32, empty without `next_eps`; and what backward
        needs: mean and rstd of x's rows, W and O [B, N, H, D], the log-sum-exp [B, H, N]. Only h can be
        differentiated.
    """
    from crate_fast.kernels import subspace_attention

    batch, n_tokens, width = x.shape
    rows = x.reshape(-1, width).contiguous()
    w, mean, rstd = _project(rows, gamma, beta, projection, eps)
    w = w.view(batch, n_tokens, heads, -1)
    out, lse = subspace_attention.forward(w, scale, 0.0, None)
    h, next_mean, next_rstd = _map_back(out.view(len(rows), -1), output, bias, rows, next_eps)
    return h.view(x.shape), next_mean, next_rstd, mean, rstd, w, out, lse


@compression_fwd.register_fake
def _(x, gamma, beta, projection, output, bias, heads, scale, eps, next_eps):
    batch, n_tokens, _ = x.shape
    w, out = (projection.new_empty(batch, n_tokens, heads, projection.shape[0] // heads) for _ in range(2))
    mean, rstd = (x.new_empty(batch * n_tokens, dtype=torch.float32) for _ in range(2))
    next_rows = 0 if next_eps is None else batch * n_tokens
    next_mean, next_rstd = (x.new_empty(next_rows, dtype=torch.float32) for _ in range(2))
    lse = x.new_empty(batch, heads, n_tokens, dtype=torch.float32)
    return x.new_empty(x.shape), next_mean, next_rstd, mean, rstd, w, out, lse


@torch.library.custom_op("crate_fast::projection_bwd", mutates_args=())
def projection_bwd(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    """dU = gᵀ LayerNorm(x) [J, C] in g's dtype; g [M, J], x [M, C]."""
    from crate_fast.kernels import layer_norm
    from crate_fast.kernels.weight_gradient import weight_gradient

    tile = _tile("norm_product_gradient", x, grad.dtype, grad.shape[1])
    if tile is None:
        normed, _, _ = layer_norm.normalize(x, gamma, beta, eps, grad.dtype)
        return grad.t() @ normed
    norm = layer_norm.Norm(mean, rstd, gamma.contiguous(), beta.contiguous())
    return weight_gradient(x, grad, None, grad.dtype, norm, tile).t().to(grad.dtype).contiguous()


@projection_bwd.register_fake
def _(grad, x, mean, rstd, gamma, beta, eps):
    return grad.new_empty(grad.shape[1], x.shape[1])


def _setup(ctx, inputs, output):
    x, gamma, beta, projection, output_map, bias, _, ctx.scale, ctx.eps, _ = inputs
    _, *others = output
    ctx.bias_dtype = bias.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(x, gamma, beta, projection, output_map, *others[2:])


def _backward(ctx, grad, *_):
    x, gamma, beta, projection, output, mean, rstd, w, out, lse = ctx.saved_tensors
    needs_x, needs_gamma, needs_beta, needs_projection, needs_output, needs_bias, *_ = ctx.needs_input_grad
    grads = [None] * 10
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
            grads[3] = projection_bwd(grad_w, rows, mean, rstd, gamma, beta, ctx.eps)
        if needs_x or needs_gamma or needs_beta:
            grad_x, grads[1], grads[2] = layer_norm_bwd(grad_w @ projection, rows, mean, rstd, gamma, beta, grad_h)
            grads[0] = grad_x.view(x.shape)
    return tuple(grads)


compression_fwd.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(projection_bwd, "run backend='torch' under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")
