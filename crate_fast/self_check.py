"""Check the first launch of each kernel variant in a process against PyTorch, on a small input.

An untested compiler, older or for another GPU, can miscompile a correct kernel. So `checked` first runs a kernel's
function on random tensors, whenever a device or the arguments need another compiled kernel: other dtypes, widths,
strides, alignment, options, or divisibility by 16 (Triton specialises on it). The results must meet the rule of
`crate_fast.accuracy` with the eps of the products. Attention is also checked on tokens of very different norms, for
which the kernels take other branches. A check takes milliseconds and waits for the device.
`CRATE_FAST_SELF_CHECK` turns it off on a GPU (0), or on in Triton's interpreter (1).
"""

import math
import re
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_fast.accuracy import Judgement, error_numbers, product_eps, token_scale
from crate_fast.backends import without_autocast
from crate_fast.errors import UserError
from crate_fast.settings import SELF_CHECK, self_check_wanted

LONGEST = 320  # tokens of one image: three blocks of rows
FP32_EPS = 2.0**-10  # of TF32, in which the kernels multiply fp32
ELEMENTS = 5 * 2**20  # of [M, C]: 160 tiles of 128×256, so that some persistent programs have a second tile

_OUT_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED")  # of CUDA, Triton and cuBLAS, outside PyTorch's allocator
# arguments whose number of rows is a constant of the kernel
_WEIGHTS = {"product.product": 1, "folding.scale": 0, "folding.unscale": 2}

_right: set[tuple] = set()  # variants that passed their check
_seen: set[tuple] = set()  # exact arguments of such variants, which are found faster
_lock = threading.RLock()


# --- small arguments: each function takes a `_Draw` and a kernel's arguments --------------------------------------


def alike(size: int, most: int) -> int:
    """Return a size up to `most` (a multiple of 16) that Triton specialises as `size`: 1, a multiple of 16, or other.

    >>> alike(785, 320), alike(800, 320), alike(17, 320), alike(1, 320)
    (305, 304, 17, 1)
    """
    return size if size <= most else most - 16 + size % 16


class _Draw:
    """Source of random tensors that need the same compiled kernel as given ones; global generators are unchanged."""

    def __init__(self, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(0)

    def like(
        self, given: Tensor | None, spread: float = 1.0, mean: float = 0.0, shape: tuple[int, ...] | None = None
    ):
        """Return normal random numbers with the dtype and alignment of `given`, and its strides if they can matter.

        Strides matter for weights, which keep their shape, and for subspace tokens [B, N, H, D]. Other tensors that
        are not contiguous are copied before a launch.
        """
        if given is None:
            return None
        shape = given.shape if shape is None else shape
        strided = tuple(shape) == tuple(given.shape) or (given.dim() == 4 and given.stride(-1) == 1)
        strides = given.stride() if strided else torch.empty(shape, device="meta").stride()
        room = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        offset = given.data_ptr() % 16 // given.itemsize if strided or given.is_contiguous() else 0
        values = torch.randn(offset + room, generator=self.generator, device=given.device) * spread + mean
        # Half precision fits in TF32's 11 bits. The kernel would round longer values in S; L is float64's here.
        return values.half().to(given.dtype).as_strided(shape, strides, offset)

    def rows(self, given: Tensor | None, spread: float = 1.0, mean: float = 0.0, width: int | None = None):
        """Return a tensor like `given` [M, C] with fewer rows; their number depends on `width`, C if None."""
        if given is None:
            return None
        most = max(512, ELEMENTS // (width or given.shape[1]) // 16 * 16)
        return self.like(given, spread, mean, (alike(len(given), most), given.shape[1]))

    def matrix(self, given: Tensor):
        """Return a weight [N, K] whose products have the scale of their input."""
        return self.like(given, given.shape[1] ** -0.5)

    def norm(self, given, x: Tensor):
        """Return a `layer_norm.Norm` like `given` for x, or None."""
        if given is None:
            return None
        _, mean, rstd = _normalize(x.double(), 1e-5, x.dtype)
        channels = {"gamma": self.like(given.gamma, 0.3, 1.0), "beta": self.like(given.beta, 0.3)}
        return given._replace(mean=mean.float(), rstd=rstd.float(), **channels)


def _draw_attention_forward(draw, w, scale, spread=None):
    n_images, n_tokens, heads, dim = w.shape
    n_tokens = alike(n_tokens, LONGEST)
    tokens = draw.like(w, token_scale(n_tokens, dim), shape=(min(n_images, 2), n_tokens, heads, dim))
    if spread is not None:  # the largest factor over the smallest, in random order
        factors = torch.logspace(-0.5, 0.5, n_tokens, spread, device=w.device)
        order = torch.randperm(n_tokens, generator=draw.generator, device=w.device)
        tokens.copy_((tokens * factors[order, None, None]).half())
    return tokens, dim**-0.5


def _draw_attention_backward(draw, grad, w, out, lse, scale, spread=None):
    tokens, scale = _draw_attention_forward(draw, w, scale, spread)
    small_out, small_lse = _attention_forward(tokens.double(), scale)
    small_out = small_out.to(out.dtype).contiguous()
    return draw.like(grad, shape=tokens.shape), tokens, small_out, small_lse.float(), scale


def _draw_layer_norm_backward(draw, grad, rows, mean, rstd, dtype, gamma=None, skip=None, normed_dtype=None):
    small = draw.rows(rows)
    _, small_mean, small_rstd = (tensor.float() for tensor in _normalize(small.double(), 1e-5, dtype))
    small_mean = None if mean is None else small_mean
    more = draw.like(gamma, 0.3, 1.0), draw.rows(skip), normed_dtype
    return draw.rows(grad), small, small_mean, small_rstd, dtype, *more


def _draw_scale(draw, weight, gamma, beta, dtype):
    return draw.matrix(weight), draw.like(gamma, 0.3, 1.0), draw.like(beta), dtype


def _draw_ista_forward(draw, x, operand, folded, shift, soft=False, norm=None, keep=True):
    small, norm_small = draw.rows(x, 2.0, 1.0), None
    low = small
    if norm is not None:
        norm_small = draw.norm(norm, small)
        low = _normalize(small.double(), 1e-5, small.dtype)[0]
    return small, low.to(operand.dtype), draw.like(folded, 0.3 * len(folded) ** -0.5), 0.01, soft, norm_small, keep


def _draw_backward_input(draw, grad, masked, folded):
    small = draw.rows(grad)
    passed = draw.rows(grad) > 0
    masked = torch.where(passed, small, 0.0).to(masked.dtype)
    return small, masked, draw.like(folded, 0.3 * len(folded) ** -0.5)


def _draw_product(draw, a, weight, x, tile, bias=None, norm=None, mask=None, **plain):
    width = max(a.shape[1], len(weight))
    small, mask = draw.rows(x, 2.0, 1.0, width), draw.rows(mask, width=width)
    more = {"bias": draw.like(bias, 0.3), "norm": draw.norm(norm, small)}
    more["mask"] = None if mask is None else mask.relu()
    return draw.rows(a, width=width), draw.matrix(weight), small, tile, more | plain


def _draw_weight_gradient(draw, a, grad):
    width = max(a.shape[1], grad.shape[1])
    return draw.rows(a, width=width), draw.rows(grad, width=width)


# --- the same in PyTorch: in float64 if the tensors and dtypes among the arguments are ------------------------------


def _wide(value: Any):
    """Return an argument with its tensors and dtypes in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):  # a `layer_norm.Norm`
        return type(value)(*map(_wide, value))
    return torch.float64 if isinstance(value, torch.dtype) else value


def _float(tensor: Tensor | None):
    """Return the tensor in fp32, or in float64 if it is."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype) @ b.to(dtype)


def _attention_forward(w, scale):
    heads = w.transpose(1, 2)
    logits = scale * (heads @ heads.mT)
    lse = _float(logits).logsumexp(-1) / math.log(2)
    return (logits.softmax(-1) @ heads).transpose(1, 2), lse


def _attention_backward(grad, w, out, lse, scale):
    heads, grad_heads = w.transpose(1, 2), grad.transpose(1, 2)
    weights = (scale * (heads @ heads.mT)).softmax(-1)
    grad_weights = grad_heads @ heads.mT
    grad_logits = scale * weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    return ((weights.mT @ grad_heads + (grad_logits + grad_logits.mT) @ heads).transpose(1, 2),)


def _normalize(x, eps, dtype):
    rows = _float(x)
    centred = rows - rows.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rows.mean(-1), rstd.squeeze(-1)


def _normed(rows, mean, rstd):
    rows, mean, rstd = map(_float, (rows, mean, rstd))
    return rows if mean is None else (rows - mean[:, None]) * rstd[:, None]


def _layer_norm_backward(grad, rows, mean, rstd, dtype, gamma=None, skip=None, normed_dtype=None):
    normed = _normed(rows, mean, rstd)
    grad, rstd, gamma, skip = map(_float, (grad, rstd, gamma, skip))
    scaled = grad if gamma is None else grad * gamma
    along, average = (part.mean(-1, keepdim=True) for part in (scaled * normed, scaled))
    dx = (scaled - average - normed * along) * rstd[:, None]
    sums = skip.sum(0)[None] if gamma is None else torch.stack([(grad * normed).sum(0), grad.sum(0)])
    return dx if skip is None else dx + skip, sums, None if normed_dtype is None else normed


def _fold(dictionary, step_size, dtype):
    return (step_size * (dictionary - dictionary.t() @ dictionary),)


def _fold_backward(grad, dictionary, step_size):
    grad, dictionary = _float(grad), _float(dictionary)
    return (step_size * (grad - dictionary @ (grad + grad.t())),)


def _scale(weight, gamma, beta, dtype):
    weight, gamma, beta = map(_float, (weight, gamma, beta))
    return weight * gamma, weight @ beta


def _unscale(grad, offset_grad, weight, gamma, beta):
    grad, r, weight, gamma, beta = map(_float, (grad, offset_grad, weight, gamma, beta))
    return grad * gamma + r[:, None] * beta, (grad * weight).sum(0), weight.t() @ r


def _added(x, norm):
    """Return x, or the LayerNorm of x."""
    return x if norm is None else _normed(x, norm.mean, norm.rstd) * _float(norm.gamma) + _float(norm.beta)


def _ista_forward(x, operand, folded, shift, soft=False, norm=None, keep=True):
    base = _added(x, norm)
    u = base + _multiply(base, folded, folded.dtype).to(base.dtype)
    return F.softshrink(u, shift) if soft else F.relu(u - shift), None


def _masked_gradient(grad, nonzero, dtype, summed=False):
    masked = torch.where(nonzero != 0, grad, 0.0)
    return masked, _float(masked).sum(0) if summed else None


def _backward_input(grad, masked, folded):
    base = torch.where(masked != 0, grad, 0.0)
    return (base + _multiply(masked, folded.t(), folded.dtype).to(base.dtype),)


def _product(a, weight, x, tile, bias=None, norm=None, mask=None, alpha=1.0, finish="add", shift=0.0, dtype=None):
    h = alpha * _multiply(a, weight.t(), weight.dtype)
    h = h if x is None else _added(x, norm) + h
    h = h if bias is None else h + bias
    h = F.relu(h - shift) if finish == "relu" else h
    return (h if mask is None else torch.where(mask != 0, h, 0.0),)


def _weight_gradient(a, grad):
    return (_multiply(a.t(), grad, a.dtype),)


_CHECKS: dict[str, tuple[Callable, Callable, str]] = {  # function: (small arguments, PyTorch, names of results)
    "attention.forward": (_draw_attention_forward, _attention_forward, "O L"),
    "attention.backward": (_draw_attention_backward, _attention_backward, "dW"),
    "layer_norm.normalize": (
        lambda draw, x, eps, dtype: (draw.rows(x, 2.0, 1.0), 1e-5, dtype),
        _normalize,
        "n mean rstd",
    ),
    "layer_norm.backward": (_draw_layer_norm_backward, _layer_norm_backward, "dx sums n"),
    "folding.fold": (lambda draw, d, step_size, dtype: (draw.matrix(d), 0.1, dtype), _fold, "G"),
    "folding.fold_backward": (
        lambda draw, grad, d, step_size: (draw.like(grad), draw.matrix(d), 0.1),
        _fold_backward,
        "dD",
    ),
    "folding.scale": (_draw_scale, _scale, "A∘γ Aβ"),
    "folding.unscale": (lambda draw, *tensors: tuple(map(draw.like, tensors)), _unscale, "dA dγ dβ"),
    "ista.forward": (_draw_ista_forward, _ista_forward, "y nonzero"),
    "ista.masked_gradient": (
        lambda draw, grad, nonzero, *rest: (draw.rows(grad), draw.rows(nonzero, 2.0), *rest),
        _masked_gradient,
        "g' Σg'",
    ),
    "ista.backward_input": (_draw_backward_input, _backward_input, "dx"),
    "product.product": (_draw_product, _product, "h"),
    "product.weight_gradient": (_draw_weight_gradient, _weight_gradient, "aᵀg"),
}


# --- the check ----------------------------------------------------------------------------------------------------


def checked(function: Callable, *arguments, **options):
    """Return function(*arguments, **options), after a check if this is a variant's first launch on the device.

    `function` is a kernel's function, one of `_CHECKS`.

    Raises:
        UserError: The kernel is wrong or does not run. The message names it, the versions of PyTorch, Triton and
            ptxas, and the remedy.
    """
    device, wanted = arguments[0].device, self_check_wanted()
    if (device.type == "cuda" if wanted is None else wanted) and arguments[0].numel() > 0:
        exact = function, *map(_exact, arguments), *options, *map(_exact, options.values()), device
        if exact not in _seen and _check(function, arguments, options, device):
            _seen.add(exact)
    return function(*arguments, **options)


def _exact(argument: Any):
    """Return an argument's properties as a key that is quicker to make than `_kind`'s."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape, argument.stride(), argument.data_ptr() % 16
    return tuple(map(_exact, argument)) if isinstance(argument, tuple) else argument


def _check(function: Callable, arguments: tuple, options: dict, device: torch.device) -> bool:
    """Check the variant if it is new; return True if it is right, False if it could not be checked now."""
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    height = len(arguments[_WEIGHTS[name]]) if name in _WEIGHTS else None
    kinds = *map(_kind, arguments), *((word, _kind(value)) for word, value in options.items())
    key = name, device, height, *kinds
    if key not in _right and not _capturing(device):
        with _lock:
            if key not in _right and _is_right(name, function, arguments, options, device):
                _right.add(key)
    return key in _right


def _kind(argument: Any):
    """Return all properties of an argument that can select the compiled kernel."""
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if not isinstance(argument, Tensor):
        return argument == 1.0 if isinstance(argument, float) else argument  # a factor of 1 is left out of a kernel
    count = argument.numel()
    if count == 0 or argument.dim() == 0:
        return argument.dtype
    shape, large = argument.shape, count >= ELEMENTS  # a program of a large launch may do several tiles
    sizes = _divisibility(shape[0]), _divisibility(count // shape[-1]), shape[1:], large
    return argument.dtype, sizes, argument.stride(), argument.data_ptr() % 16


def _divisibility(size: int) -> int:
    return size if size < 2 else 2 + (size % 16 == 0)


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _is_right(name: str, function: Callable, arguments: tuple, options: dict, device: torch.device) -> bool:
    """Return True after a passed check, False if memory is too short for it: the launch itself may need less."""
    try:
        with without_autocast(device.type), torch.no_grad():
            kinds = [{}]
            if name.startswith("attention"):  # the spread fits in the dtype's range
                kinds.append({"spread": 1e4 if arguments[0].dtype == torch.bfloat16 else 100.0})
            for more in kinds:
                small, small_options = _small(name, device, arguments, options | more)
                shares = _shares(name, function, small, small_options)
                worst = max(shares, key=shares.get)
                if not shares[worst] <= 1.0:
                    off = f"is wrong: the error of {worst} is {shares[worst]:.3g} times the allowed error"
                    raise UserError(_complaint(name, device, off))
    except UserError:
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(cause):
            return False
        raise UserError(_complaint(name, device, f"does not run: {cause}")) from error
    return True


def _small(name: str, device: torch.device, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """Return the small arguments and options; `options` may hold "spread" for attention."""
    small = _CHECKS[name][0](_Draw(device), *arguments, **options)
    return (small[:-1], small[-1]) if isinstance(small[-1], dict) else (small, {})


def _shares(name: str, function: Callable, small: tuple, options: dict) -> dict[str, float]:
    """Return the error of each result relative to the allowed error; waits for the device once."""
    _, compute, names = _CHECKS[name]
    results = function(*small, **options)
    results = results if isinstance(results, tuple) else (results,)
    eager = compute(*small, **options)
    truth = compute(*map(_wide, small), **{name: _wide(value) for name, value in options.items()})
    dtypes = (argument.dtype if isinstance(argument, Tensor) else argument for argument in small)
    floating = [dtype for dtype in dtypes if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    eps = max(FP32_EPS, *map(product_eps, floating))
    numbers = {}
    for result_name, result, lower, exact in zip(names.split(), results, eager, truth, strict=True):
        if result is not None and result.dtype == torch.int8:  # a mask: must equal y ≠ 0
            wrong = ((result != 0) != (results[0] != 0)).sum().double()
            numbers[result_name] = torch.stack([wrong, wrong, 0 * wrong, 0 * wrong])
        elif exact is not None:
            numbers[result_name] = error_numbers(result, lower.to(result.dtype), exact, eps)
    rows = torch.stack(list(numbers.values())).tolist()
    return {result_name: Judgement(*row).share for result_name, row in zip(numbers, rows, strict=True)}


def _complaint(name: str, device: torch.device, what: str) -> str:
    from crate_fast.env import compiler_versions

    return (
        f"the kernel crate_fast::{name} {what} ({compiler_versions(device)}): install a newer Triton, point "
        "TRITON_PTXAS_PATH and TRITON_PTXAS_BLACKWELL_PATH to a newer ptxas, or use backend='torch' (in training "
        f"--precision fp32); {SELF_CHECK}=0 runs it unchecked"
    )
