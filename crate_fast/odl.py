"""ODL, the sparse-coding block of CRATE-α: a step or two of ISTA in an overcomplete dictionary D, and a decoder D₁.

    z₁ = relu(ηxD − ηλ),    z₂ = relu(z₁ + ηvD − ηλ) with v = x − z₁Dᵀ,    y = z₂D₁ᵀ

(Yang et al., *Scaling White-Box Transformers for Vision*, 2024.) With D [C, rC] these are four products of r·C² a
token. Scales, thresholds, sums and masks are made in the products' epilogues: by the Triton kernels in registers, on
a CPU by oneDNN or in place. Backward has eight products and a ninth: of the two codes, which are r times as wide as a
token, only the last is kept, and z₁ is computed again.
"""

from collections.abc import Callable

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_fast import cpu_ops
from crate_fast.backends import (
    being_transformed,
    being_written,
    compute_dtype,
    refuse_double_backward,
    resolve_backend,
    without_autocast,
)
from crate_fast.cpu_ops import linear
from crate_fast.self_check import checked

__all__ = ["MAX_STEPS", "odl", "odl_code"]

MAX_STEPS = 2
Product = Callable[..., Tensor]


def odl_code(x: Tensor, dictionary: Tensor, step_size: float = 0.1, sparsity: float = 0.1, steps: int = 2) -> Tensor:
    """Return the sparse code z of x, in plain PyTorch: z₁ or z₂ [..., K], all entries at least 0.

    Arguments as `odl`'s.

    >>> odl_code(torch.tensor([[1.0, -1.0]]), torch.eye(2))
    tensor([[0.1710, 0.0000]])
    """
    return _code(x, dictionary, step_size, sparsity, steps)


def odl(
    x: Tensor,
    dictionary: Tensor,
    decoder: Tensor,
    step_size: float = 0.1,
    sparsity: float = 0.1,
    *,
    steps: int = 2,
    backend: str = "auto",
) -> Tensor:
    """Return y = zD₁ᵀ for the code z of x: CRATE-α's block without LayerNorm and residual.

    The last code is kept for backward, and where the kernels or `cpu_ops` run not the first one.

    Args:
        x: Normalised tokens [..., C].
        dictionary: D [C, K]; K = 4C in the released models.
        decoder: D₁ [C, K]; D itself for tied dictionaries.
        step_size: η, at least 0.
        sparsity: λ, at least 0.
        steps: 1 (y = z₁D₁ᵀ) or 2.
        backend: "auto", "triton" or "torch"; see `crate_fast.backends.explain_backend`.

    Returns:
        y [..., C], in x's dtype; in autocast's under autocast.

    Raises:
        UserError: backend="triton" cannot run here; the message says why.

    >>> odl(torch.tensor([[1.0, -1.0]]), torch.eye(2), torch.eye(2))
    tensor([[0.1710, 0.0000]])
    """
    kernels = resolve_backend(x, backend) == "triton"
    if not being_transformed() and (kernels or (cpu_ops.serves(x, dictionary) and not being_written())):
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        dtype = compute_dtype(x)
        y, *_ = odl_fwd(rows, dictionary, decoder, step_size, step_size * sparsity, steps, dtype, kernels)
        return y.view(*x.shape[:-1], decoder.shape[0])
    return linear(_code(x, dictionary, step_size, sparsity, steps), decoder)


def _code(x: Tensor, dictionary: Tensor, step_size: float, sparsity: float, steps: int) -> Tensor:
    shift = step_size * sparsity
    z = F.relu(step_size * linear(x, dictionary.t()) - shift)
    for _ in range(steps - 1):
        z = F.relu(z + step_size * linear(x - linear(z, dictionary), dictionary.t()) - shift)
    return z


# --- a product with its epilogue ----------------------------------------------------------------------------------


def _triton_product(
    a: Tensor,
    weight: Tensor,
    alpha: float = 1.0,
    add: Tensor | None = None,
    shift: float | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `add` + α·a·weightᵀ [M, N] in `dtype`, a's when None; behind it max(· − shift, 0), and 0 where mask is.

    Args:
        a: [M, K], in the products' dtype.
        weight: [N, K], likewise.
        add: [M, N] or None.
        shift: Threshold of the ReLU; no ReLU when None.
        mask: [M, N] or None.
        alpha, dtype: See above.
    """
    from crate_fast.kernels import product

    tile = product.tile_for("ista_forward", a, len(weight))
    finish = {"finish": "add", "shift": 0.0} if shift is None else {"finish": "relu", "shift": shift}
    more = {"alpha": alpha, "mask": mask, "dtype": dtype or a.dtype}
    return checked(product.product, a, weight, add, tile, **finish, **more)


def _cpu_product(
    a: Tensor,
    weight: Tensor,
    alpha: float = 1.0,
    add: Tensor | None = None,
    shift: float | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the same in fp32 on a CPU. α goes to the narrower side; ReLU and mask are in place."""
    scaled_after = alpha != 1.0 and a.shape[1] > len(weight)
    if alpha != 1.0 and not scaled_after:
        a = a * alpha
    if scaled_after:
        y = cpu_ops.product(a, weight)
        y = y.mul_(alpha) if add is None else torch.add(add, y, alpha=alpha, out=y)
    else:
        y = cpu_ops.product(a, weight, None if shift is None else a.new_full((len(weight),), -shift), add)
    if shift is not None:
        y.relu_()
    return y if mask is None else torch.ops.aten.threshold_backward.grad_input(y, mask, 0, grad_input=y)


def _product_of(kernels: bool) -> Product:
    return _triton_product if kernels else _cpu_product


def _weight_gradient(kernels: bool, a: Tensor, grad: Tensor) -> Tensor:
    """Return aᵀg [C, J] in fp32."""
    if not kernels:
        return cpu_ops.product(a.t(), grad.t())
    from crate_fast.kernels import product

    return checked(product.weight_gradient, a, grad)


# --- the operators ------------------------------------------------------------------------------------------------


@torch.library.custom_op("crate_fast::odl_fwd", mutates_args=())
def odl_fwd(
    x: Tensor,
    dictionary: Tensor,
    decoder: Tensor,
    step_size: float,
    shift: float,
    steps: int,
    dtype: torch.dtype,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, C] of rows x [M, C]; and what backward needs: v [M, C], empty with one step, and the last code [M, K].

    Args:
        x, dictionary, decoder, step_size, steps: As `odl`'s.
        shift: ηλ.
        dtype: Of products, codes and y.
        kernels: Whether the Triton kernels run, or the CPU's libraries.
    """
    product = _product_of(kernels)
    with without_autocast(x.device.type):
        rows, encode, decode = x.to(dtype), dictionary.to(dtype), decoder.to(dtype)
        z, v = product(rows, encode.t(), step_size, shift=shift), rows.new_empty(0)
        if steps == 2:
            v = product(z, encode, -1.0, add=x, dtype=dtype)
            z = product(v, encode.t(), step_size, add=z, shift=shift)
        return product(z, decode), v, z


@odl_fwd.register_fake
def _(x, dictionary, decoder, step_size, shift, steps, dtype, kernels):
    v = x.new_empty(x.shape if steps == 2 else 0, dtype=dtype)
    code = x.new_empty(x.shape[0], dictionary.shape[1], dtype=dtype)
    return x.new_empty(x.shape[0], decoder.shape[0], dtype=dtype), v, code


@torch.library.custom_op("crate_fast::odl_bwd", mutates_args=())
def odl_bwd(
    grad: Tensor,
    x: Tensor,
    v: Tensor,
    code: Tensor,
    dictionary: Tensor,
    decoder: Tensor,
    step_size: float,
    shift: float,
    kernels: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, D and D₁, empty where not wanted.

    With mᵢ = dL/d(argument of zᵢ's ReLU) and s = dL/dv = ηm₂Dᵀ:

        m₂ = [z₂ > 0]·gD₁,    m₁ = [z₁ > 0]·(m₂ − sD),    dx = s + ηm₁Dᵀ
        dD = η(vᵀm₂ + xᵀm₁) − sᵀz₁,    dD₁ = gᵀz₂
    """
    product, results = _product_of(kernels), [grad.new_empty(0) for _ in range(3)]
    needs_x, needs_dictionary, needs_decoder = wanted
    dtype = code.dtype
    with without_autocast(x.device.type):
        grad, rows = grad.to(dtype).contiguous(), x.to(dtype)
        encode, decode = dictionary.to(dtype), decoder.to(dtype)
        if needs_decoder:
            results[2] = _weight_gradient(kernels, grad, code).to(decoder.dtype)
        if not needs_x and not needs_dictionary:
            return tuple(results)
        masked, add, total = product(grad, decode.t(), mask=code), None, None
        if v.numel():  # the second step
            add = product(masked, encode, step_size)
            first = product(rows, encode.t(), step_size, shift=shift)
            if needs_dictionary:
                total = _weight_gradient(kernels, v, masked).mul_(step_size)
                total -= _weight_gradient(kernels, add, first)
            masked = product(add, encode.t(), -1.0, add=masked, mask=first)
        if needs_dictionary:
            last = _weight_gradient(kernels, rows, masked)
            total = last.mul_(step_size) if total is None else total.add_(last, alpha=step_size)
            results[1] = total.to(dictionary.dtype)
        if needs_x:
            results[0] = product(masked, encode, step_size, add=add, dtype=x.dtype)
    return tuple(results)


@odl_bwd.register_fake
def _(grad, x, v, code, dictionary, decoder, step_size, shift, kernels, wanted):
    given = zip(wanted, (x, dictionary, decoder), strict=True)
    return tuple(t.new_empty(t.shape) if asked else grad.new_empty(0) for asked, t in given)


def _setup(ctx, inputs, output):
    x, dictionary, decoder, ctx.step_size, ctx.shift, _, _, ctx.kernels = inputs
    _, v, code = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(v, code)
    ctx.save_for_backward(x, v, code, dictionary, decoder)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:3])
    results = odl_bwd(grad, *ctx.saved_tensors, ctx.step_size, ctx.shift, ctx.kernels, wanted)
    return *(result if asked else None for result, asked in zip(results, wanted, strict=True)), *[None] * 5


odl_fwd.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(odl_bwd, "take it by torch.func.grad or torch.func.hessian, which run PyTorch's operators")


@register_flop_formula(torch.ops.crate_fast.odl_fwd)
def _forward_flops(x: torch.Size, dictionary: torch.Size, decoder: torch.Size, eta, shift, steps, *_, **__) -> int:
    return 2 * steps * 2 * x[0] * dictionary[0] * dictionary[1]


@register_flop_formula(torch.ops.crate_fast.odl_bwd)
def _backward_flops(grad: torch.Size, x: torch.Size, v: torch.Size, code: torch.Size, dictionary, *_, **__) -> int:
    products = 8 if len(v) == 2 else 4  # the model's own; z₁ once more is not counted
    return products * 2 * x[0] * dictionary[0] * dictionary[1]
