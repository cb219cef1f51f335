"""The Triton kernels as PyTorch operators: registered with `torch.library`, with fake tensors and autograd.

Each operator only launches; checks, casts and dispatch are in `functional.py`. A backward pass is one operator, so
`torch.compile` sees the whole step. Second derivatives are refused with an error.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_fast.backends import refuse_double_backward, without_autocast
from crate_fast.self_check import checked
from crate_fast.settings import fused_products_wanted

__all__ = ["compression_fwd", "fold", "given", "ista_fwd", "nothing", "subspace_attention_fwd"]

# Triton is imported when a kernel runs, not before: so the operators import crate_fast.kernels themselves.


def nothing(like: Tensor, count: int) -> list[Tensor]:
    """Return empty tensors in place of unwanted results; an operator's results may not share memory."""
    return [like.new_empty(0) for _ in range(count)]


def given(results: tuple[Tensor, ...], wanted: list[bool], count: int) -> tuple[Tensor | None, ...]:
    """Return an operator's gradients for its first arguments as autograd takes them, for `count` arguments."""
    grads = [result if asked else None for result, asked in zip(results, wanted, strict=True)]
    return *grads, *[None] * (count - len(grads))


# --- subspace attention ------------------------------------------------------------------------------------------


@torch.library.custom_op("crate_fast::subspace_attention_fwd", mutates_args=())
def subspace_attention_fwd(w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O [B, N, H, D] and the rows' log-sum-exp [B, H, N]; see `kernels.attention.forward`. O alone has a gradient."""
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
    ctx.set_materialize_grads(False)  # none for lse, which has none
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
    """Return the gradients of x, γ, β and D, empty where not wanted (kernels/README.md §5).

    Args:
        grad, nonzero: The gradient of y, and [y ≠ 0] [M, C].
        rows: Without a LayerNorm x; behind one, n in G's dtype or, with `mean`, x itself [M, C].
        mean, rstd: Of x's rows [M].
        gamma, beta, dictionary, folded, step_size, eps: As `ista_fwd`'s.
        x_dtype: x's.
        wanted: Which of the four gradients.
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
    # n serves the dictionary's gradient and LayerNorm's unless it is rounded further than x is; then x makes both.
    rows, mean = (normed, None) if gamma is not None and x.dtype == folded.dtype else (x, mean)
    ctx.save_for_backward(nonzero, rows, mean, rstd, gamma, beta, dictionary, folded)


def _ista_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    if not ctx.keep:
        raise RuntimeError("ista_fwd was called with keep=False: it has kept nothing for a backward pass")
    wanted = list(ctx.needs_input_grad[:4])
    results = ista_bwd(grad, *ctx.saved_tensors, ctx.step_size, ctx.eps, ctx.x_dtype, wanted)
    return given(results, wanted, 10)


ista_fwd.register_autograd(_ista_backward, setup_context=_ista_setup)
refuse_double_backward(ista_bwd, "run backend='torch'")


# --- the first half of a layer -----------------------------------------------------------------------------------


def _output_tile(x: Tensor, weight: Tensor):
    """Return the output map's tile where it runs with its neighbours; None where it runs by itself."""
    from crate_fast.kernels.launch import find, precision
    from crate_fast.kernels.product import fitted_product

    tile = find("output_map", x.device, precision(weight.dtype))
    wanted = fused_products_wanted()
    if tile is None or not (tile.chosen if wanted is None else wanted):
        return None
    return fitted_product(tile, weight.shape[0])


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
    """h = x + MSSA(LayerNorm(x)), or LayerNorm(x) + MSSA(LayerNorm(x)) (kernels/README.md §6).

    LayerNorm(x) = nγ + β, and γ and β are folded into the projection: W = n(U∘γ)ᵀ + Uβ. The output map runs in one
    kernel with bias and skip connection, or by itself in PyTorch: the tile table says which.

    Args:
        x: [B, N, C].
        gamma, beta: LayerNorm's weight and bias [C].
        projection: U [H·D, C].
        output, bias: V [C, H·D] and b [C].
        heads: H.
        scale: s.
        eps: LayerNorm's.
        dtype: Of the products.
        skip_normed: Whether LayerNorm(x) is what is skipped to.

    Returns:
        h [B, N, C] in x's dtype; and what backward needs: n [B·N, C], mean and rstd [B·N] of x's rows, W and O
        [B, N, H, D], the log-sum-exp [B, H, N]. Only h can be differentiated.
    """
    from crate_fast.kernels import attention, folding, layer_norm, product

    batch, n_tokens, width = x.shape
    rows, inner = x.reshape(-1, width).contiguous(), len(projection)
    with without_autocast(x.device.type):
        normed, mean, rstd = checked(layer_norm.normalize, rows, eps, dtype)
        scaled, offset = checked(folding.scale, projection, gamma, beta, dtype)
        w = torch.addmm(offset.to(dtype), normed, scaled.t()).view(batch, n_tokens, heads, inner // heads)
        out, lse = checked(attention.forward, w, scale)
        tokens, output, tile = out.view(len(rows), inner), output.to(dtype), _output_tile(x, output.to(dtype))
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
    """Return the gradients of x, γ, β, U, V and b, empty where not wanted.

    Args:
        grad: The gradient of h [B, N, C].
        gamma, beta, projection, output, scale, skip_normed: As `compression_fwd`'s.
        normed, rstd, w, out, lse: From it.
        x, mean: x and its rows' means, where LayerNorm's gradient is to be made from x, not from rounded rows.
        x_dtype, bias_dtype: x's and b's.
        wanted: Which of the six gradients.
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
