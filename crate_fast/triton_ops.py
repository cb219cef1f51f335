"""The Triton kernels as PyTorch operators, registered with `torch.library`, with fake tensors and autograd.

Checks and the choice of the backend are in `functional.py`. Each backward pass is one operator, so that
`torch.compile` captures the whole step. Second derivatives raise an error.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_fast.backends import refuse_double_backward, without_autocast
from crate_fast.self_check import checked
from crate_fast.settings import fused_products_wanted

# Triton is imported only when a kernel runs: the operators import crate_fast.kernels in their bodies.


def nothing(like: Tensor, count: int) -> list[Tensor]:
    """Return empty tensors for unwanted results; the results of an operator must not share memory."""
    return [like.new_empty(0) for _ in range(count)]


def given(results: tuple[Tensor, ...], wanted: list[bool], count: int) -> tuple[Tensor | None, ...]:
    """Return `count` gradients for autograd: `results` where wanted, None for all other arguments."""
    grads = [result if asked else None for result, asked in zip(results, wanted, strict=True)]
    return *grads, *[None] * (count - len(grads))


# --- subspace attention ------------------------------------------------------------------------------------------


@torch.library.custom_op("crate_fast::subspace_attention_fwd", mutates_args=())
def subspace_attention_fwd(w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return O [B, N, H, D], which has a gradient, and log-sum-exp [B, H, N]; see `kernels.attention.forward`."""
    from crate_fast.kernels import attention

    return checked(attention.forward, w, scale)


@subspace_attention_fwd.register_fake
def _(w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, n_tokens, n_heads, _ = w.shape
    return w.new_empty(w.shape), w.new_empty(batch, n_heads, n_tokens, dtype=torch.float32)


@torch.library.custom_op("crate_fast::subspace_attention_bwd", mutates_args=())
def subspace_attention_bwd(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dW [B, N, H, D]; see `kernels.attention.backward`."""
    from crate_fast.kernels import attention

    return checked(attention.backward, grad, w, out, lse, scale)


@subspace_attention_bwd.register_fake
def _(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    return w.new_empty(w.shape)


def _attention_setup(ctx, inputs, output):
    w, ctx.scale = inputs
    out, lse = output
    ctx.set_materialize_grads(False)  # lse has no gradient
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(w, out, lse)


def _attention_backward(ctx, grad, _):
    return None if grad is None else subspace_attention_bwd(grad, *ctx.saved_tensors, ctx.scale), None


subspace_attention_fwd.register_autograd(_attention_backward, setup_context=_attention_setup)
refuse_double_backward(
    subspace_attention_bwd, "run backend='torch' under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)


# --- ISTA --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("crate_fast::fold", mutates_args=())
def fold(dictionary: Tensor, step_size: float, dtype: torch.dtype) -> Tensor:
    """Return G = η(D − DᵀD) [C, C] in `dtype`, without a gradient; see `kernels.folding.fold`."""
    from crate_fast.kernels import folding

    return checked(folding.fold, dictionary, step_size, dtype)


@fold.register_fake
def _(dictionary: Tensor, step_size: float, dtype: torch.dtype) -> Tensor:
    return dictionary.new_empty(dictionary.shape, dtype=dtype)


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
    """Compute y = shrink(x + xG, ηλ), of LayerNorm(x) instead of x if gamma and beta are given.

    Args:
        x: [M, C].
        gamma, beta: LayerNorm's weight and bias [C], both or neither.
        dictionary: D [C, C], which receives the gradient; forward reads only `folded`.
        folded: G = η(D − DᵀD) [C, C] in the dtype of the product; not checked against D.
        step_size, sparsity: η and λ.
        eps: LayerNorm's ε.
        soft: Use the soft threshold instead of ReLU.
        keep: Save [y ≠ 0] for backward.

    Returns:
        y [M, C] in x's dtype, and for backward: [y ≠ 0] in int8 [M, C], empty without `keep`; the normalised rows in
        G's dtype [M, C], their mean and rstd in fp32 [M], empty without a LayerNorm.
    """
    from crate_fast.kernels import ista, layer_norm

    if gamma is None:
        operand, norm = x.to(folded.dtype), None
        normed, mean, rstd = (x.new_empty(0, dtype=t) for t in (folded.dtype, torch.float32, torch.float32))
    else:
        normed, mean, rstd = checked(layer_norm.normalize, x, eps, folded.dtype)
        operand, norm = normed, layer_norm.Norm(mean, rstd, gamma.contiguous(), beta.contiguous())
    y, nonzero = checked(ista.forward, x, operand, folded, step_size * sparsity, soft, norm, keep)
    return y, x.new_empty(0, dtype=torch.int8) if nonzero is None else nonzero, normed, mean, rstd


@ista_fwd.register_fake
def _(x, gamma, beta, dictionary, folded, step_size, sparsity, eps, soft, keep):
    nonzero = x.new_empty(x.shape if keep else 0, dtype=torch.int8)
    normed = x.new_empty(0 if gamma is None else x.shape, dtype=folded.dtype)
    mean, rstd = (x.new_empty(0 if gamma is None else x.shape[0], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), nonzero, normed, mean, rstd


@torch.library.custom_op("crate_fast::ista_bwd", mutates_args=())
def ista_bwd(
    grad: Tensor,
    nonzero: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dictionary: Tensor,
    folded: Tensor,
    step_size: float,
    eps: float,
    x_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, γ, β and D; those not wanted are empty (kernels/README.md §5).

    Args:
        grad, nonzero: The gradient of y, and [y ≠ 0] [M, C].
        rows: x [M, C] without a LayerNorm or with `mean`; otherwise the normalised rows n in G's dtype.
        mean, rstd: Statistics of x's rows [M].
        gamma, beta, dictionary, folded, step_size, eps: See `ista_fwd`.
        x_dtype: Dtype of x.
        wanted: Which of the four gradients to compute.
    """
    from crate_fast.kernels import folding, ista, layer_norm, product

    results = nothing(grad, 4)
    needs_dictionary, with_norm = wanted[3], gamma is not None
    masked, total = checked(ista.masked_gradient, grad, nonzero, folded.dtype, with_norm and needs_dictionary)
    if any(wanted[:3]):
        results[0] = checked(ista.backward_input, grad, masked, folded)
        if with_norm:
            again = folded.dtype if mean is not None and needs_dictionary else None
            results[0], sums, normed = checked(
                layer_norm.backward, results[0], rows, mean, rstd, x_dtype, gamma, normed_dtype=again
            )
            results[1:3] = (total.to(gamma.dtype, copy=True) for total in sums)
            rows = rows if normed is None else normed
    if needs_dictionary:
        if with_norm and rows.dtype != masked.dtype:
            rows, *_ = checked(layer_norm.normalize, rows, eps, masked.dtype)
        grad_folded = checked(product.weight_gradient, rows.to(masked.dtype), masked)
        if with_norm:
            grad_folded = torch.addcmul(gamma.float()[:, None] * grad_folded, beta.float()[:, None], total)
        results[3] = checked(folding.fold_backward, grad_folded, dictionary, step_size)
    return tuple(results)


@ista_bwd.register_fake
def _(grad, nonzero, rows, mean, rstd, gamma, beta, dictionary, folded, step_size, eps, x_dtype, wanted):
    results = nothing(grad, 4)
    if any(wanted[:3]):
        results[0] = grad.new_empty(grad.shape, dtype=x_dtype if gamma is not None else grad.dtype)
        if gamma is not None:
            results[1:3] = (gamma.new_empty(gamma.shape) for _ in range(2))
    if wanted[3]:
        results[3] = dictionary.new_empty(dictionary.shape)
    return tuple(results)


def _ista_setup(ctx, inputs, output):
    x, gamma, beta, dictionary, folded, ctx.step_size, _, ctx.eps, _, ctx.keep = inputs
    _, nonzero, normed, mean, rstd = output
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(nonzero, normed, mean, rstd)
    # Both gradients (dictionary, LayerNorm) use n, or x if n is rounded to a lower precision than x.
    rows, mean = (normed, None) if gamma is not None and x.dtype == folded.dtype else (x, mean)
    ctx.save_for_backward(nonzero, rows, mean, rstd, gamma, beta, dictionary, folded)


def _ista_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    if not ctx.keep:
        raise RuntimeError("ista_fwd was called with keep=False and saved nothing for backward: pass keep=True")
    wanted = list(ctx.needs_input_grad[:4])
    results = ista_bwd(grad, *ctx.saved_tensors, ctx.step_size, ctx.eps, ctx.x_dtype, wanted)
    return given(results, wanted, 10)


ista_fwd.register_autograd(_ista_backward, setup_context=_ista_setup)
refuse_double_backward(ista_bwd, "run backend='torch'")


# --- the first half of a layer -----------------------------------------------------------------------------------


def _output_tile(x: Tensor, dtype: torch.dtype):
    """Return the tile of the fused output map; None if PyTorch computes the output map."""
    from crate_fast.kernels.launch import find, precision
    from crate_fast.kernels.product import fitted_product

    tile = find("output_map", x.device, precision(dtype))
    wanted = fused_products_wanted()
    if tile is None or not (tile.chosen if wanted is None else wanted):
        return None
    return fitted_product(tile, x.shape[-1])


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
    skip_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute h = x + MSSA(LayerNorm(x)), or LayerNorm(x) + MSSA(LayerNorm(x)) (kernels/README.md §6).

    LayerNorm(x) = nγ + β, and γ and β are folded into the projection: W = n(U∘γ)ᵀ + Uβ. By the tile table, the output
    map runs in one kernel with bias and skip connection, or separately in PyTorch.

    Args:
        x: [B, N, C].
        gamma, beta: LayerNorm's weight and bias [C].
        projection: U [H·D, C].
        output, bias: V [C, H·D] and b [C].
        heads: Number of heads H.
        scale: s.
        eps: LayerNorm's ε.
        dtype: Dtype of the products.
        skip_normed: The skip connection adds LayerNorm(x) instead of x.

    Returns:
        h [B, N, C] in x's dtype, and for backward: n [B·N, C], mean and rstd [B·N] of x's rows, W and O
        [B, N, H, D], the log-sum-exp [B, H, N]. Only h is differentiable.
    """
    from crate_fast.kernels import attention, folding, layer_norm, product

    batch, n_tokens, width = x.shape
    rows, inner = x.reshape(-1, width).contiguous(), len(projection)
    with without_autocast(x.device.type):
        normed, mean, rstd = checked(layer_norm.normalize, rows, eps, dtype)
        scaled, offset = checked(folding.scale, projection, gamma, beta, dtype)
        w = torch.addmm(offset.to(dtype), normed, scaled.t()).view(batch, n_tokens, heads, inner // heads)
        out, lse = checked(attention.forward, w, scale)
        tokens, output, tile = out.view(len(rows), inner), output.to(dtype), _output_tile(x, dtype)
        if tile is not None:
            norm = layer_norm.Norm(mean, rstd, gamma.contiguous(), beta.contiguous()) if skip_normed else None
            h = checked(product.product, tokens, output, rows, tile, bias=bias.contiguous(), norm=norm)
        else:
            channels = (t.to(x.dtype) for t in (gamma, beta))
            skipped = F.layer_norm(rows, (width,), *channels, eps) if skip_normed else rows
            h = (skipped + torch.addmm(bias.to(dtype), tokens, output.t())).to(x.dtype)
    return h.view(x.shape), normed, mean, rstd, w, out, lse


@compression_fwd.register_fake
def _(x, gamma, beta, projection, output, bias, heads, scale, eps, dtype, skip_normed):
    batch, n_tokens, width = x.shape
    inner = projection.shape[0]
    w, out = (x.new_empty(batch, n_tokens, heads, inner // heads, dtype=dtype) for _ in range(2))
    normed = x.new_empty(batch * n_tokens, width, dtype=dtype)
    mean, rstd = (x.new_empty(batch * n_tokens, dtype=torch.float32) for _ in range(2))
    lse = x.new_empty(batch, heads, n_tokens, dtype=torch.float32)
    return x.new_empty(x.shape), normed, mean, rstd, w, out, lse


@torch.library.custom_op("crate_fast::compression_bwd", mutates_args=())
def compression_bwd(
    grad: Tensor,
    gamma: Tensor,
    beta: Tensor,
    projection: Tensor,
    output: Tensor,
    normed: Tensor,
    rstd: Tensor,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    scale: float,
    skip_normed: bool,
    x_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, γ, β, U, V and b; those not wanted are empty.

    Args:
        grad: The gradient of h [B, N, C].
        gamma, beta, projection, output, scale, skip_normed: See `compression_fwd`.
        normed, rstd, w, out, lse: Results of `compression_fwd`.
        x, mean: x and the means of its rows, to compute LayerNorm's gradient from x instead of rounded rows; or None.
        x_dtype, bias_dtype: Dtypes of x and b.
        wanted: Which of the six gradients to compute.
    """
    from crate_fast.kernels import attention, folding, layer_norm

    results, sums = nothing(grad, 6), None
    grad_h = grad.reshape(-1, grad.shape[-1]).contiguous()
    tokens, low = out.flatten(2).flatten(0, 1), grad_h.to(w.dtype)
    with without_autocast(grad.device.type):
        if wanted[4]:
            results[4] = (low.t() @ tokens).to(output.dtype)
        if any(wanted[:4]):
            grad_out = (low @ output.to(w.dtype)).view(out.shape)
            grad_w = checked(attention.backward, grad_out, w, out, lse, scale).view(tokens.shape)
        if any(wanted[1:4]):
            scaled, offset = grad_w.t() @ normed, grad_w.sum(0, dtype=torch.float32)
            results[3], *sums = checked(folding.unscale, scaled, offset, projection, gamma, beta)
        if skip_normed and any(wanted[:3]):
            grad_normed = grad_h + grad_w @ projection.to(w.dtype)
            rows = normed if x is None else x.reshape(normed.shape)
            dx, sums, _ = checked(layer_norm.backward, grad_normed, rows, mean, rstd, x_dtype, gamma)
        if sums is not None:
            results[1:3] = (total.to(gamma.dtype, copy=True) for total in sums)
        skip_sum = None
        if wanted[0] and not skip_normed:
            grad_normed = grad_w @ checked(folding.scale, projection, gamma, beta, w.dtype)[0]
            dx, (skip_sum,), _ = checked(layer_norm.backward, grad_normed, normed, None, rstd, x_dtype, skip=grad_h)
        if wanted[5]:
            skip_sum = grad_h.sum(0, dtype=torch.float32) if skip_sum is None else skip_sum
            results[5] = skip_sum.to(bias_dtype, copy=True)
        if wanted[0]:
            results[0] = dx.view(grad.shape)
    return tuple(results)


@compression_bwd.register_fake
def _(
    grad, gamma, beta, projection, output, normed, rstd, w, out, lse, x, mean, scale, skip_normed, x_dtype,
    bias_dtype, wanted,
):  # fmt: skip
    results = nothing(grad, 6)
    channels = any(wanted[1:4]) or (skip_normed and wanted[0])
    if wanted[0]:
        results[0] = grad.new_empty(grad.shape, dtype=x_dtype)
    if channels:
        results[1:3] = (gamma.new_empty(gamma.shape) for _ in range(2))
    if any(wanted[1:4]):
        results[3] = projection.new_empty(projection.shape)
    if wanted[4]:
        results[4] = output.new_empty(output.shape)
    if wanted[5]:
        results[5] = grad.new_empty(grad.shape[-1], dtype=bias_dtype)
    return tuple(results)


def _compression_setup(ctx, inputs, output):
    x, gamma, beta, projection, output_map, bias, _, ctx.scale, _, dtype, ctx.skip_normed = inputs
    _, normed, mean, rstd, w, out, lse = output
    ctx.dtypes = x.dtype, bias.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    from_x = (x, mean) if ctx.skip_normed and x.dtype != dtype else (None, None)
    ctx.save_for_backward(gamma, beta, projection, output_map, normed, rstd, w, out, lse, *from_x)


def _compression_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    wanted = list(ctx.needs_input_grad[:6])
    results = compression_bwd(grad, *ctx.saved_tensors, ctx.scale, ctx.skip_normed, *ctx.dtypes, wanted)
    return given(results, wanted, 11)


compression_fwd.register_autograd(_compression_backward, setup_context=_compression_setup)
refuse_double_backward(compression_bwd, "run backend='torch'")
