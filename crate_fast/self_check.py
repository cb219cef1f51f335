"""The first launch of each kernel variant in a process is checked once, against PyTorch on a small input of its kind.

Compilers older than ours, or of other GPUs than ours, can make wrong programs of right kernels. So an operator's body
that is `self_checked` runs once more, on random tensors, before it first runs on a device with arguments that need
another compiled kernel: other dtypes, widths, strides, alignment, options, or divisibility by 16, on which Triton
specialises. The results must be as close to float64 as `crate_fast.accuracy` has it, with the eps of the products.
This costs milliseconds and one wait for the device. `CRATE_FAST_SELF_CHECK` turns it off on a GPU (0), or on in
Triton's interpreter (1).
"""

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_fast.accuracy import Judgement, error_numbers, product_eps, token_scale
from crate_fast.backends import without_autocast
from crate_fast.errors import UserError
from crate_fast.settings import SELF_CHECK, fused_products_wanted, self_check_wanted

__all__ = ["self_checked"]

LONGEST = 320  # tokens of one image: three blocks of rows
ELEMENTS = 5 * 2**20  # of [M, C]: 160 tiles of 128×256, a second one for some of the persistent programs
ROWS = 256  # compared at either end, where not every row has to be

_right: set[tuple] = set()
_lock = threading.RLock()


# --- small inputs -------------------------------------------------------------------------------------------------


def alike(size: int, most: int) -> int:
    """A size of at most `most` (a multiple of 16), in Triton's eyes like this one: 1, a multiple of 16, or neither.

    >>> alike(785, 320), alike(800, 320), alike(17, 320), alike(1, 320)
    (305, 304, 17, 1)
    """
    return size if size <= most else most - 16 + size % 16


def _rows(size: int, width: int) -> int:
    return alike(size, max(512, ELEMENTS // width // 16 * 16))


class _Draw:
    """Random tensors that need the same compiled kernel as given ones; the global generators stay untouched."""

    def __init__(self, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, like: Tensor | None, shape: tuple[int, ...], spread: float = 1.0, mean: float = 0.0):
        """Normal numbers of this shape, with dtype and alignment of `like`, and its strides where they can matter.

        They do for weights, which have the shape of `like`, and for subspace tokens [B, N, H, D]. Whatever else is
        not contiguous is copied before a launch.
        """
        if like is None:
            return None
        strided = tuple(shape) == tuple(like.shape) or (like.dim() == 4 and like.stride(-1) == 1)
        strides = like.stride() if strided else torch.empty(shape, device="meta").stride()
        room = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        offset = like.data_ptr() % 16 // like.itemsize if strided or like.is_contiguous() else 0
        values = torch.randn(offset + room, generator=self.generator, device=like.device) * spread + mean
        return values.to(like.dtype).as_strided(shape, strides, offset)

    def channels(self, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """γ and β of a LayerNorm."""
        shape = () if gamma is None else gamma.shape
        return self.normal(gamma, shape, 0.3, 1.0), self.normal(beta, shape, 0.3)


def _tokens(draw: _Draw, w: Tensor) -> Tensor:
    _, n_tokens, heads, dim = w.shape
    n_tokens = alike(n_tokens, LONGEST)
    return draw.normal(w, (1, n_tokens, heads, dim), token_scale(n_tokens, dim))


def _draw_attention_fwd(draw, w, scale):
    return _tokens(draw, w), w.shape[3] ** -0.5


def _draw_attention_bwd(draw, grad, w, out, lse, scale):
    tokens, scale = _draw_attention_fwd(draw, w, scale)
    out_small, lse_small = _attention_fwd(True, tokens, scale)
    out_small = out_small.to(out.dtype).contiguous()
    return draw.normal(grad, tokens.shape), tokens, out_small, lse_small.float(), scale


def _draw_fold(draw, dictionary, step_size, dtype):
    return draw.normal(dictionary, dictionary.shape, len(dictionary) ** -0.5), 0.1, dtype


def _draw_ista_fwd(draw, x, gamma, beta, dictionary, folded, step_size, sparsity, eps, soft, keep):
    width = x.shape[1]
    small = draw.normal(x, (_rows(len(x), width), width))
    folded = draw.normal(folded, folded.shape, 0.3 * width**-0.5)
    return small, *draw.channels(gamma, beta), dictionary, folded, 0.1, 0.1, 1e-5, soft, keep


def _draw_ista_bwd(
    draw, grad, nonzero, rows, mean, rstd, gamma, beta, dictionary, folded, step_size, eps, x_dtype, wanted
):
    width = grad.shape[1]
    shape = (_rows(len(grad), width), width)
    small = draw.normal(rows, shape)
    mean_small, rstd_small = (None, rstd) if gamma is None else _normalized(False, small, 1e-5)[1:]
    return (
        draw.normal(grad, shape),
        draw.normal(nonzero, shape, 2.0),
        small,
        None if mean is None else mean if gamma is None else mean_small,
        rstd_small,
        *draw.channels(gamma, beta),
        draw.normal(dictionary, dictionary.shape, width**-0.5),
        draw.normal(folded, folded.shape, 0.3 * width**-0.5),
        *(0.1, 1e-5, x_dtype, wanted),
    )


def _images(batch: int, n_tokens: int, elements: int) -> tuple[int, int]:
    """Images and tokens of a small batch whose product is a multiple of 16, or not, as in the large one."""
    small = alike(n_tokens, LONGEST)
    step = 1 if batch * n_tokens % 16 else 16 // math.gcd(small, 16)
    images = min(batch, max(1, elements // small // step) * step)
    spoils = batch * n_tokens % 16 != 0 and images * small % 16 == 0
    return images - spoils, small


def _draw_compression_fwd(
    draw, x, gamma, beta, projection, output, bias, heads, scale, eps, dtype, skip_normed, most: int | None = None
):
    width, inner = x.shape[2], len(projection)
    images, n_tokens = _images(*x.shape[:2], ELEMENTS // width if most is None else most)
    return (
        draw.normal(x, (images, n_tokens, width), 2.0, 1.0),
        *draw.channels(gamma, beta),
        draw.normal(projection, projection.shape, token_scale(n_tokens, inner // heads) * width**-0.5),
        draw.normal(output, output.shape, inner**-0.5),
        draw.normal(bias, (width,), 0.3),
        *(heads, (inner // heads) ** -0.5, 1e-5, dtype, skip_normed),
    )


def _draw_compression_bwd(
    draw, grad, gamma, beta, projection, output, normed, rstd, w, out, lse, x, mean, scale, skip_normed, x_dtype,
    bias_dtype, wanted,
):  # fmt: skip
    like = grad if x is None else x
    given = like, gamma, beta, projection, output, gamma, w.shape[2], scale, 1e-5, w.dtype, skip_normed
    small, *weights = _draw_compression_fwd(draw, *given, most=1)  # the fewest images: their sums are all compared
    gamma, beta, projection, output = weights[:4]
    _, normed, mean_small, rstd, w_small, out, lse = _compression_fwd(True, small, *weights)
    w_small = w_small.to(w.dtype)
    out, lse = _attention_fwd(True, w_small, weights[6])
    return (
        draw.normal(grad, small.shape),
        *(gamma, beta, projection, output, normed.to(w.dtype), rstd.float()),
        *(w_small, out.to(w.dtype).contiguous(), lse.float()),
        *((None, None) if x is None else (small, mean_small.float())),
        *(weights[6], skip_normed, x_dtype, bias_dtype, wanted),
    )


# --- what PyTorch makes of them -----------------------------------------------------------------------------------
# Each takes `wide` (in float64, or in the dtypes as they are) before the operator's arguments, and returns the
# operator's results, None for those that are not compared: it may leave anything where nobody asked. Autograd is off
# inside an operator.


def _up(wide: bool, *tensors: Tensor | None):
    raised = [tensor.double() if wide and tensor is not None else tensor for tensor in tensors]
    return raised[0] if len(raised) == 1 else raised


def _product(wide: bool, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b with operands in `dtype`, or in float64."""
    return a.double() @ b.double() if wide else a.to(dtype) @ b.to(dtype)


def _asked(wanted: list[bool], *results: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(result if asked else None for result, asked in zip(results, wanted, strict=True))


def _attention_fwd(wide, w, scale):
    heads = _up(wide, w).transpose(1, 2)
    logits = scale * (heads @ heads.mT)
    lse = (logits if wide else logits.float()).logsumexp(-1) / math.log(2)
    return (logits.softmax(-1) @ heads).transpose(1, 2), lse


def _attention_bwd(wide, grad, w, out, lse, scale):
    heads, grad_heads = (tensor.transpose(1, 2) for tensor in _up(wide, w, grad))
    weights = (scale * (heads @ heads.mT)).softmax(-1)
    grad_weights = grad_heads @ heads.mT
    grad_logits = scale * weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    return ((weights.mT @ grad_heads + (grad_logits + grad_logits.mT) @ heads).transpose(1, 2),)


def _normalized(wide, x, eps):
    rows = x.double() if wide else x.float()
    centred = rows - rows.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rows.mean(-1), rstd.squeeze(-1)


def _ista_fwd(wide, x, gamma, beta, dictionary, folded, step_size, sparsity, eps, soft, keep):
    statistics = [None] * 3
    base = _up(wide, x)
    if gamma is not None:
        statistics = _normalized(wide, x, eps)
        base = statistics[0] * _up(wide, gamma) + _up(wide, beta)
    u = base + _product(wide, base, folded, folded.dtype).to(base.dtype)
    shift = step_size * sparsity
    return F.softshrink(u, shift) if soft else F.relu(u - shift), None, *statistics


def _fold(wide, dictionary, step_size, dtype):
    dictionary = _up(wide, dictionary)
    return (step_size * (dictionary - dictionary.t() @ dictionary),)


def _layer_norm_bwd(wide, grad, normed, rstd, gamma):
    """dx, dγ and dβ; γ is 1 where None."""
    kind = torch.float64 if wide else torch.float32
    grad, normed, rstd = grad.to(kind), normed.to(kind), rstd.to(kind)[:, None]
    scaled = grad if gamma is None else grad * gamma.to(kind)
    along, average = (part.mean(-1, keepdim=True) for part in (scaled * normed, scaled))
    return (scaled - average - normed * along) * rstd, (grad * normed).sum(0), grad.sum(0)


def _again(wide, rows, mean, rstd):
    """n from x, or n itself where there is no mean."""
    if mean is None:
        return _up(wide, rows)
    kind = torch.float64 if wide else torch.float32
    return (rows.to(kind) - mean.to(kind)[:, None]) * rstd.to(kind)[:, None]


def _ista_bwd(
    wide, grad, nonzero, rows, mean, rstd, gamma, beta, dictionary, folded, step_size, eps, x_dtype, wanted
):
    normed = _up(wide, rows) if gamma is None else _again(wide, rows, mean, rstd)
    masked = torch.where(nonzero != 0, _up(wide, grad), 0.0)
    grads = [masked + _product(wide, masked, folded.t(), folded.dtype).to(masked.dtype), None, None]
    if gamma is not None:
        grads = _layer_norm_bwd(wide, grads[0], normed, rstd, gamma)
    grad_folded = _product(wide, normed.t(), masked, folded.dtype)
    grad_folded = grad_folded if wide else grad_folded.float()
    if gamma is not None:
        gamma, beta, total = (tensor.to(grad_folded.dtype) for tensor in (gamma, beta, masked.sum(0)))
        grad_folded = gamma[:, None] * grad_folded + beta[:, None] * total
    symmetric = grad_folded + grad_folded.t()
    return _asked(wanted, *grads, step_size * (grad_folded - dictionary.to(symmetric.dtype) @ symmetric))


def _compression_fwd(wide, x, gamma, beta, projection, output, bias, heads, scale, eps, dtype, skip_normed):
    normed, mean, rstd = _normalized(wide, x, eps)
    tokens = normed * _up(wide, gamma) + _up(wide, beta)
    w = _product(wide, tokens, projection.t(), dtype).unflatten(-1, (heads, -1))
    out, lse = _attention_fwd(wide, w, scale)
    skipped = tokens if skip_normed else _up(wide, x)
    h = skipped + _product(wide, out.flatten(2), output.t(), dtype) + _up(wide, bias)
    return h, normed.flatten(0, 1), mean.flatten(), rstd.flatten(), w, out, lse


def _compression_bwd(
    wide, grad, gamma, beta, projection, output, normed, rstd, w, out, lse, x, mean, scale, skip_normed, x_dtype,
    bias_dtype, wanted,
):  # fmt: skip
    rows = grad.flatten(0, 1)
    grad_out = _product(wide, rows, output, w.dtype).view(w.shape)
    (grad_w,) = _attention_bwd(wide, grad_out, w, out, lse, scale)
    grad_w = grad_w.flatten(2).flatten(0, 1)
    grad_normed = _product(wide, grad_w, projection, w.dtype)
    if skip_normed:
        grad_normed = grad_normed + _up(wide, rows)
    exact = normed if x is None else x.flatten(0, 1)
    exact = _again(wide, exact, mean, rstd)
    dx, dgamma, dbeta = _layer_norm_bwd(wide, grad_normed, exact, rstd, gamma)
    if not skip_normed:
        dx = dx + _up(wide, rows)
    kind = grad_w.dtype if wide else torch.float32
    scaled = _product(wide, grad_w.t(), normed, w.dtype).to(kind) * gamma.to(kind)
    dprojection = scaled + grad_w.to(kind).sum(0)[:, None] * beta.to(kind)
    doutput = _product(wide, rows.t(), out.flatten(2).flatten(0, 1), w.dtype)
    return _asked(wanted, dx.view(grad.shape), dgamma, dbeta, dprojection, doutput, _up(wide, rows).sum(0))


@dataclass(frozen=True)
class _Reference:
    """How an operator is checked."""

    draw: Callable  # (_Draw, its arguments) → small arguments of the same kind
    compute: Callable  # (wide, small arguments) → results
    names: str  # of the results
    rows: tuple[int, ...] = ()  # arguments whose rows decide those of the results alone: the first and last compared
    ends: int = ROWS  # how many of them


_REFERENCES = {
    "subspace_attention_fwd": _Reference(_draw_attention_fwd, _attention_fwd, "O L"),
    "subspace_attention_bwd": _Reference(_draw_attention_bwd, _attention_bwd, "dW"),
    "fold": _Reference(_draw_fold, _fold, "G"),
    "ista_fwd": _Reference(_draw_ista_fwd, _ista_fwd, "y nonzero n mean rstd", (0,)),
    "ista_bwd": _Reference(_draw_ista_bwd, _ista_bwd, "dx dγ dβ dD"),
    "compression_fwd": _Reference(_draw_compression_fwd, _compression_fwd, "h n mean rstd W O L", (0,), ends=1),
    "compression_bwd": _Reference(_draw_compression_bwd, _compression_bwd, "dx dγ dβ dU dV db"),
}


# --- the check ----------------------------------------------------------------------------------------------------


def self_checked(body: Callable) -> Callable:
    """Decorate an operator's body, so that its first launch of each variant on a device is checked.

    Raises:
        UserError: From the operator, in one line: which kernel is wrong or does not run, with which versions of
            PyTorch, Triton and ptxas, and what to do.
    """
    reference = _REFERENCES[body.__name__]

    @functools.wraps(body)
    def checked(*arguments):
        _ensure_right(body, reference, arguments)
        return body(*arguments)

    return checked


def _ensure_right(body: Callable, reference: _Reference, arguments: tuple) -> None:
    device = arguments[0].device
    wanted = self_check_wanted()
    if not (device.type == "cuda" if wanted is None else wanted) or arguments[0].numel() == 0:
        return
    key = body.__name__, device, fused_products_wanted(), *map(_kind, arguments)
    if key in _right or (device.type == "cuda" and _capturing(device)):
        return
    with _lock:
        if key not in _right and _is_right(body, reference, arguments, device):
            _right.add(key)


def _kind(argument):
    """What of an argument decides the compiled kernel, and perhaps more."""
    if not isinstance(argument, Tensor):
        if isinstance(argument, list):
            return tuple(argument)
        return None if isinstance(argument, float) else argument
    count = argument.numel()
    if count == 0 or argument.dim() == 0:
        return argument.dtype
    shape = argument.shape
    sizes = _divisibility(shape[0]), _divisibility(count // shape[-1]), shape[1:]
    return argument.dtype, sizes, argument.stride(), argument.data_ptr() % 16


def _divisibility(size: int) -> int:
    return size if size < 2 else 2 + (size % 16 == 0)


def _capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _is_right(body: Callable, reference: _Reference, arguments: tuple, device: torch.device) -> bool:
    """Whether it was checked: not where memory is too short for it, which the launch itself may not need."""
    try:
        with without_autocast(device.type), torch.no_grad():
            small = reference.draw(_Draw(device), *arguments)
            try:
                worst = _worst(body, reference, small)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise UserError(_complaint(body, device, f"does not run: {cause}")) from error
    except torch.OutOfMemoryError:
        return False
    name, share = max(worst.items(), key=lambda item: item[1])
    if share > 1.0:
        off = f"is wrong: {name} is {share:.3g} times as far from float64 as it may be"
        raise UserError(_complaint(body, device, off))
    return True


def _worst(body: Callable, reference: _Reference, small: tuple) -> dict[str, float]:
    """The share of the allowance that each result of the body uses; waits for the device once."""
    results = body(*small)
    results = results if isinstance(results, tuple) else (results,)
    compared, pick = list(small), lambda tensor: tensor
    if reference.rows:
        count = len(small[reference.rows[0]])
        if count > 2 * reference.ends:
            index = torch.arange(-reference.ends, reference.ends, device=results[0].device) % count

            def pick(tensor):
                return tensor.unflatten(0, (count, -1))[index].flatten(0, 1)

            for position in reference.rows:
                compared[position] = small[position][index]
    eager, truth = (reference.compute(wide, *compared) for wide in (False, True))
    dtypes = (argument.dtype if isinstance(argument, Tensor) else argument for argument in small)
    floating = [dtype for dtype in dtypes if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    eps = max(map(product_eps, floating))
    numbers = {}
    for name, result, lower, exact in zip(reference.names.split(), results, eager, truth, strict=True):
        if result.numel() and result.dtype == torch.int8:
            numbers[name] = _flag_numbers(result, results[0])
        elif exact is not None:
            actual = pick(result)
            numbers[name] = error_numbers(actual, lower.to(actual.dtype), exact, eps)
    rows = torch.stack(list(numbers.values())).tolist()
    return {name: Judgement(*row).share for name, row in zip(numbers, rows, strict=True)}


def _flag_numbers(nonzero: Tensor, y: Tensor) -> Tensor:
    """Judged exactly: where y is not zero."""
    wrong = ((nonzero != 0) != (y != 0)).sum().double()
    return torch.stack([wrong, wrong, 0 * wrong, 0 * wrong])


def _complaint(body: Callable, device: torch.device, what: str) -> str:
    from crate_fast.env import compiler_versions

    return (
        f"the kernel crate_fast::{body.__name__} {what} ({compiler_versions(device)}): install a newer Triton, point "
        f"TRITON_PTXAS_PATH to a newer ptxas, or use backend='torch'; {SELF_CHECK}=0 runs it unchecked"
    )
