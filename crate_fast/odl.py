"""ODL, the sparse-coding block of CRATE-α: one or two ISTA steps in an overcomplete dictionary D, and a decoder D₁.

    z₁ = relu(ηxD − ηλ),    z₂ = relu(z₁ + ηvD − ηλ) with v = x − z₁Dᵀ,    y = z₂D₁ᵀ

(Yang et al., *Scaling White-Box Transformers for Vision*, 2024.) With D [C, rC] these are four products of r·C² per
token, and eight in backward. Scales, thresholds, sums and masks are epilogues of the products: in registers in the
Triton kernels, and by oneDNN or in place on a CPU. Saved for backward are the codes (r times as wide as a token), v,
and the input (before the LayerNorm, if there is one).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_fast import cpu_ops
from crate_fast.arguments import check_not_negative
from crate_fast.backends import (
    autocast_enabled,
    compute_dtype,
    refuse_double_backward,
    resolve_backend,
    without_autocast,
    without_tracer_warnings,
)
from crate_fast.cpu_ops import linear
from crate_fast.errors import UserError
from crate_fast.functional import check_beside, check_norm, check_tensor
from crate_fast.self_check import checked
from crate_fast.triton_ops import given, nothing


def odl_code(x: Tensor, dictionary: Tensor, step_size: float = 0.1, sparsity: float = 0.1, steps: int = 2) -> Tensor:
    """Return the sparse code z of x, in plain PyTorch: z₁ or z₂ [..., K], all entries at least 0.

    The arguments are those of `odl`.

    >>> odl_code(torch.tensor([[1.0, -1.0]]), torch.eye(2))
    tensor([[0.1710, 0.0000]])
    """
    shift = step_size * sparsity
    z = F.relu(step_size * linear(x, dictionary.t()) - shift)
    for _ in range(steps - 1):
        z = F.relu(z + step_size * linear(x - linear(z, dictionary), dictionary.t()) - shift)
    return z


def odl(
    x: Tensor,
    dictionary: Tensor,
    decoder: Tensor,
    step_size: float = 0.1,
    sparsity: float = 0.1,
    *,
    steps: int = 2,
    norm: tuple[Tensor, Tensor, float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return y = zD₁ᵀ for the code z of x: CRATE-α's block without its residual.

    Args:
        x: Tokens [..., C], normalised unless `norm` is given.
        dictionary: D [C, K]; K = 4C in the released models.
        decoder: D₁ [C, K]; D itself for tied dictionaries.
        step_size: η, at least 0.
        sparsity: λ, at least 0.
        steps: 1 (y = z₁D₁ᵀ) or 2.
        norm: γ [C], β [C] and ε of a preceding LayerNorm.
        backend: "auto", "triton" or "torch"; see `crate_fast.backends.explain_backend`.

    Returns:
        y [..., C] in x's dtype, or in the autocast dtype under autocast.

    Raises:
        ValueError, TypeError: A shape, dtype, device or option is wrong; the message names it.
        UserError: backend="triton" cannot run here; the message says why.

    >>> odl(torch.tensor([[1.0, -1.0]]), torch.eye(2), torch.eye(2))
    tensor([[0.1710, 0.0000]])
    """
    check_tensor("x", x, "[..., C]", isinstance(x, Tensor) and x.dim() >= 1)
    with without_tracer_warnings():
        fits = isinstance(dictionary, Tensor) and dictionary.dim() == 2 and len(dictionary) == x.shape[-1]
        check_tensor("dictionary", dictionary, f"[C, K] = [{x.shape[-1]}, K] to match x's last dimension", fits)
        fits = isinstance(decoder, Tensor) and decoder.shape == dictionary.shape
        check_tensor("decoder", decoder, f"{list(dictionary.shape)}, as the dictionary", fits)
    check_beside(x, dictionary=dictionary, decoder=decoder)
    check_not_negative(step_size=step_size, sparsity=sparsity)
    if steps not in (1, 2):
        raise UserError(f"steps={steps!r}: give 1 or 2")
    gamma, beta, eps = norm or (None, None, 0.0)
    if norm is not None:
        check_norm(x, gamma, beta)
    kernels = resolve_backend(x, backend) == "triton"
    if kernels or cpu_ops.serves(x, dictionary, gamma):
        rows, shift = x.reshape(x.shape[:-1].numel(), x.shape[-1]), step_size * sparsity
        if kernels and norm is not None and autocast_enabled(x.device.type):
            rows = rows.float()  # as PyTorch's LayerNorm does
            gamma, beta = gamma.float(), beta.float()  # PyTorch's kernel takes one dtype
        y, *_ = odl_fwd(
            rows, gamma, beta, dictionary, decoder, step_size, shift, eps, steps, compute_dtype(x), kernels
        )
        return y.view(*x.shape[:-1], decoder.shape[0])
    x = x if norm is None else F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    return linear(odl_code(x, dictionary, step_size, sparsity, steps), decoder)


# --- a product with its epilogue ----------------------------------------------------------------------------------


def _product(
    kernels: bool,
    a: Tensor,
    weight: Tensor,
    alpha: float = 1.0,
    add: Tensor | None = None,
    shift: float | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return y = `add` + α·a·weightᵀ [M, N]; with `shift` max(y − shift, 0), and 0 where the mask [M, N] is 0.

    a [M, K] and weight [N, K] have the dtype of the products; `dtype` is that of the result, a's if None. `kernels`
    chooses the Triton kernel, else fp32 on a CPU, with α on the narrower side, ReLU and mask in place.
    """
    if kernels:
        from crate_fast.kernels import product

        tile = product.tile_for("ista_forward", a, len(weight))
        finish = {"finish": "add", "shift": 0.0} if shift is None else {"finish": "relu", "shift": shift}
        more = {"alpha": alpha, "mask": mask, "dtype": dtype or a.dtype}
        return checked(product.product, a, weight, add, tile, **finish, **more)
    if alpha != 1.0 and shift is None and a.shape[1] > len(weight):
        y = cpu_ops.product(a, weight)
        y = y.mul_(alpha) if add is None else torch.add(add, y, alpha=alpha, out=y)
    else:
        bias = None if shift is None else a.new_full((len(weight),), -shift)
        y = cpu_ops.product(a if alpha == 1.0 else a * alpha, weight, bias, add)
    if shift is not None:
        y.relu_()
    return y if mask is None else torch.ops.aten.threshold_backward.grad_input(y, mask, 0, grad_input=y)


def _add_weight_gradient(
    kernels: bool, a: Tensor, grad: Tensor, alpha: float = 1.0, total: Tensor | None = None
) -> Tensor:
    """Return `total` + α·aᵀg [C, J] in fp32; `total` is changed in place."""
    if kernels:
        from crate_fast.kernels import product

        found = checked(product.weight_gradient, a, grad)
    else:  # for these shapes oneDNN is faster wherever it runs forward
        multiply = cpu_ops.onednn_product if cpu_ops.uses_onednn() and len(a) else cpu_ops.product
        found = multiply(a.t(), grad.t())
    if total is None:
        return found if alpha == 1.0 else found.mul_(alpha)
    return total.add_(found, alpha=alpha)


# --- the operators ------------------------------------------------------------------------------------------------


@torch.library.custom_op("crate_fast::odl_fwd", mutates_args=())
def odl_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dictionary: Tensor,
    decoder: Tensor,
    step_size: float,
    shift: float,
    eps: float,
    steps: int,
    dtype: torch.dtype,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute y [M, C] of x [M, C], or of LayerNorm(x) if gamma and beta [C] are given.

    Args:
        x, dictionary, decoder, step_size, steps: See `odl`.
        gamma, beta, eps: Weight, bias and ε of the LayerNorm.
        shift: ηλ.
        dtype: Dtype of products, codes and y.
        kernels: Run the Triton kernels; else the CPU's libraries.

    Returns:
        y, and for backward: mean and 1 / standard deviation of x's rows [M, 1], empty without a LayerNorm; v [M, C]
        and z₁ [M, K], empty with one step; the last code [M, K].
    """
    product = partial(_product, kernels)
    with without_autocast(x.device.type):
        mean, rstd = x.new_empty(0), x.new_empty(0)
        if gamma is not None:
            x, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gamma, beta, eps)
        rows, encode, decode = x.to(dtype), dictionary.to(dtype), decoder.to(dtype)
        transposed = encode.t().contiguous() if kernels else encode.t()  # else copied twice
        z = product(rows, transposed, step_size, shift=shift)
        v, first = rows.new_empty(0), rows.new_empty(0)
        if steps == 2:
            first = z
            v = product(first, encode, -1.0, add=x, dtype=dtype)
            z = product(v, transposed, step_size, add=first, shift=shift)
        return product(z, decode), mean, rstd, v, first, z


@odl_fwd.register_fake
def _(x, gamma, beta, dictionary, decoder, step_size, shift, eps, steps, dtype, kernels):
    mean, rstd = x.new_empty(0), x.new_empty(0)
    if gamma is not None:  # the dtype of `native_layer_norm`
        exact = torch.promote_types(x.dtype, torch.float32) if x.is_cuda else gamma.dtype
        mean, rstd = (x.new_empty(x.shape[0], 1, dtype=exact) for _ in range(2))
    v = x.new_empty(x.shape if steps == 2 else 0, dtype=dtype)
    first, code = (
        x.new_empty((x.shape[0], dictionary.shape[1]) if there else 0, dtype=dtype) for there in (steps == 2, True)
    )
    return x.new_empty(x.shape[0], decoder.shape[0], dtype=dtype), mean, rstd, v, first, code


@torch.library.custom_op("crate_fast::odl_bwd", mutates_args=())
def odl_bwd(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    v: Tensor,
    first: Tensor,
    code: Tensor,
    dictionary: Tensor,
    decoder: Tensor,
    step_size: float,
    eps: float,
    kernels: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, γ, β, D and D₁; those not wanted are empty.

    With mᵢ = dL/d(argument of zᵢ's ReLU) and s = dL/dv = ηm₂Dᵀ, for x after the LayerNorm:

        m₂ = [z₂ > 0]·gD₁,    m₁ = [z₁ > 0]·(m₂ − sD),    dx = s + ηm₁Dᵀ
        dD = η(vᵀm₂ + xᵀm₁) − sᵀz₁,    dD₁ = gᵀz₂
    """
    product, results = partial(_product, kernels), nothing(grad, 5)
    needs_tokens, (needs_dictionary, needs_decoder) = any(wanted[:3]), wanted[3:]
    dtype, width = code.dtype, x.shape[-1:]
    with without_autocast(x.device.type):
        grad = grad.to(dtype).contiguous()
        encode, decode = dictionary.to(dtype), decoder.to(dtype)
        if needs_decoder:
            results[4] = _add_weight_gradient(kernels, grad, code).to(decoder.dtype)
        if not needs_tokens and not needs_dictionary:
            return tuple(results)
        masked, add, total = product(grad, decode.t(), mask=code), None, None
        if v.numel():  # the second step
            add = product(masked, encode, step_size)
            if needs_dictionary:
                total = _add_weight_gradient(kernels, v, masked, step_size)
                total = _add_weight_gradient(kernels, add, first, -1.0, total)
            masked = product(add, encode.t(), -1.0, add=masked, mask=first)
        if needs_dictionary:
            normed = x if gamma is None else F.layer_norm(x, width, gamma, beta, eps)
            total = _add_weight_gradient(kernels, normed.to(dtype), masked, step_size, total)
            results[3] = total.to(dictionary.dtype)
        if needs_tokens:
            results[0] = product(masked, encode, step_size, add=add, dtype=x.dtype)
            if gamma is not None:
                results[:3] = torch.ops.aten.native_layer_norm_backward(
                    results[0], x, width, mean, rstd, gamma, beta, [True, True, True]
                )
    return tuple(results)


@odl_bwd.register_fake
def _(grad, x, gamma, beta, mean, rstd, v, first, code, dictionary, decoder, step_size, eps, kernels, wanted):
    tokens = any(wanted[:3])
    asked = (tokens, *[tokens and gamma is not None] * 2, *wanted[3:])
    given = zip(asked, (x, gamma, beta, dictionary, decoder), strict=True)
    return tuple(t.new_empty(t.shape) if asked else grad.new_empty(0) for asked, t in given)


def _setup(ctx, inputs, output):
    x, gamma, beta, dictionary, decoder, ctx.step_size, _, ctx.eps, _, _, ctx.kernels = inputs
    _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, gamma, beta, *kept, dictionary, decoder)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    wanted = list(ctx.needs_input_grad[:5])
    results = odl_bwd(grad, *ctx.saved_tensors, ctx.step_size, ctx.eps, ctx.kernels, wanted)
    return given(results, wanted, 11)


odl_fwd.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(odl_bwd, "use torch.func.grad or torch.func.hessian, which run PyTorch's operators")


@register_flop_formula(torch.ops.crate_fast.odl_fwd)
def _forward_flops(x, gamma, beta, dictionary, decoder, step_size, shift, eps, steps, *_, **__) -> int:
    return 2 * steps * 2 * x[0] * dictionary[0] * dictionary[1]


@register_flop_formula(torch.ops.crate_fast.odl_bwd)
def _backward_flops(grad, x, gamma, beta, mean, rstd, v, first, code, dictionary, *_, **__) -> int:
    return (8 if len(v) == 2 else 4) * 2 * x[0] * dictionary[0] * dictionary[1]
