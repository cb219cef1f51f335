"""The public operators subspace attention and ISTA: argument checks, dispatch and the folded PyTorch path.

`reference.py` has the same functions in the form of the paper; these are algebraically equal and faster.
"""

import functools
import threading
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from crate_fast import cpu_ops, triton_ops
from crate_fast.arguments import check_choice, check_not_negative, check_positive, check_rates
from crate_fast.backends import (
    autocast_enabled,
    being_exported,
    being_transformed,
    compute_dtype,
    own_operators_fit,
    resolve_backend,
    without_autocast,
    without_tracer_warnings,
)
from crate_fast.cpu_ops import linear
from crate_fast.errors import UserError

RESIDUALS = ("released", "paper")
THRESHOLDS = ("relu", "soft")
torch.fx.wrap("linear")  # imported: `torch.fx` wraps the names of one module
_AUTO = "Use backend='auto' or backend='torch'."
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: Tensor, shape: str, ok: bool) -> None:
    """Raise unless `tensor` is a floating-point tensor and `ok`; `shape` is the expected one, for the message."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: pass a torch.Tensor {shape}")
    if not ok:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}: pass {shape}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}: cast it to float16, bfloat16, float32 or float64")


def check_beside(x: Tensor, *, any_dtype: bool = False, **tensors: Tensor) -> None:
    """Raise unless all tensors have x's device and dtype; dtypes may differ under autocast or with `any_dtype`."""
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise UserError(f"{name} is on {tensor.device} and x on {x.device}: move one to the other's device")
        if tensor.dtype != x.dtype and not any_dtype and not autocast_enabled(x.device.type):
            raise TypeError(f"{name} is {tensor.dtype} and x {x.dtype}: cast one to the other's dtype")


def check_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise unless a LayerNorm's weight and bias are [C] on x's device; they may stay in fp32."""
    for name, channel in (("weight", weight), ("bias", bias)):
        fits = isinstance(channel, Tensor) and channel.shape == x.shape[-1:]
        check_tensor(name, channel, f"[C] = [{x.shape[-1]}]", fits)
    check_beside(x, any_dtype=True, weight=weight, bias=bias)


def subspace_attention(
    w: Tensor, scale: float | None = None, *, dropout_p: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Compute attention with one tensor as query, key and value: O = softmax(s·W Wᵀ) W, per head (paper, Eq. 5).

    Args:
        w: Subspace tokens [B, N, H, D], any strides; float16, bfloat16, float32 or float64.
        scale: Scale s of the logits, at least 0; D^-1/2 if None. The paper's Eq. 5 has s = 1, its code D^-1/2.
        dropout_p: Probability of dropping an attention weight, in [0, 1). The kernels have no dropout: above 0,
            PyTorch's attention runs.
        backend: "auto", "triton" or "torch"; see `crate_fast.backends.explain_backend`.

    Returns:
        O [B, N, H, D] in w's dtype; in the autocast dtype if the kernels run under autocast, as in PyTorch.

    Raises:
        ValueError, TypeError: A shape, dtype or option is wrong; the message names it.
        UserError: backend="triton" cannot run here; the message says why.

    >>> w = torch.eye(2).reshape(1, 2, 1, 2)          # two orthogonal tokens
    >>> subspace_attention(w, scale=0.0).flatten()    # uniform weights: both become the mean
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    with without_tracer_warnings():
        fits = isinstance(w, Tensor) and w.dim() == 4 and w.shape[1] * w.shape[3] > 0
        check_tensor("w", w, "[B, N, H, D] with N and D at least 1", fits)
    check_rates(dropout_p=dropout_p)
    scale = w.shape[-1] ** -0.5 if scale is None else float(scale)
    check_not_negative(scale=scale)
    if dropout_p > 0.0 and backend == "triton":
        raise UserError(f"backend='triton' with dropout_p={dropout_p}: the kernels have no dropout. {_AUTO}")
    if resolve_backend(w, backend, head_dim=w.shape[-1]) == "triton" and dropout_p == 0.0:
        return triton_ops.subspace_attention_fwd(w.to(compute_dtype(w)), scale)[0]
    if dropout_p == 0.0 and cpu_ops.serves_attention(w):
        return cpu_ops.attention(w, scale)
    tokens = w.transpose(1, 2)
    return pytorch_attention(tokens, tokens, tokens, dropout_p, scale).transpose(1, 2)


@torch.fx.wrap
def pytorch_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float) -> Tensor:
    """Compute attention on [B, H, N, D] with PyTorch: fused, or as single operators where needed or faster.

    The fused operator has no forward-mode or second derivative. In bf16 on a CPU its backward pass takes up to eight
    times as long.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  (skipped by TorchScript)
        if being_transformed() or cpu_ops.products_suit(query):
            with without_autocast(query.device.type):  # on a CPU it would run softmax in fp32
                attention = (scale * query @ key.transpose(-2, -1)).softmax(-1)
                return F.dropout(attention, dropout_p) @ value
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)


def compress(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor,
    output: Tensor,
    output_bias: Tensor,
    heads: int,
    scale: float | None = None,
    *,
    eps: float = 1e-5,
    residual: str = "released",
    backend: str = "auto",
) -> Tensor:
    """Return the first half of a layer, h = x + MSSA(LayerNorm(x)) (paper, Eq. 5, with the released skip connection).

    The kernels save for backward the normalised rows, the subspace tokens W and the attention output in the dtype of
    the products, and a few numbers per row; in the paper's form under autocast, also x.

    Args:
        x: Tokens [B, N, C].
        weight, bias: LayerNorm's γ and β [C].
        projection: U [H·D, C], the subspaces of all heads: W = LayerNorm(x) Uᵀ.
        output, output_bias: Output projection [C, H·D] and its bias [C].
        heads: Number of heads H.
        scale: See `subspace_attention`.
        eps: LayerNorm's ε.
        residual: "released" (see above), or "paper": LayerNorm(x) + MSSA(LayerNorm(x)) (Algorithms 1 and 3).
        backend: See `subspace_attention`.

    Returns:
        h [B, N, C] in x's dtype; under autocast without the kernels, in the dtype of PyTorch's sum.

    Raises:
        As `subspace_attention`; also ValueError or TypeError for a wrong shape, device or dtype of a weight.

    >>> one, zero, eye = torch.ones(2), torch.zeros(2), torch.eye(2)
    >>> compress(torch.tensor([[[1.0, -1.0]]]), one, zero, eye, eye, zero, heads=1)    # one token sees itself
    tensor([[[ 2.0000, -2.0000]]])
    """
    check_positive(heads=heads)
    fits = isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] > 0
    check_tensor("x", x, "[B, N, C] with N at least 1", fits)
    width = x.shape[-1]
    inner = projection.shape[0] if isinstance(projection, Tensor) and projection.dim() == 2 else 0
    fits = inner > 0 and projection.shape[1] == width and inner % heads == 0
    check_tensor("projection", projection, f"[H·D, C] = [{heads}·D, {width}]", fits)
    for name, tensor, shape in (("output", output, (width, inner)), ("output_bias", output_bias, (width,))):
        fits = isinstance(tensor, Tensor) and tuple(tensor.shape) == shape
        check_tensor(name, tensor, str(list(shape)), fits)
    check_beside(x, projection=projection, output=output, output_bias=output_bias)
    check_norm(x, weight, bias)
    check_choice("residual", residual, RESIDUALS)
    head_dim = inner // heads
    if resolve_backend(x, backend, head_dim=head_dim) == "triton":
        scale = head_dim**-0.5 if scale is None else float(scale)
        check_not_negative(scale=scale)
        dtype = compute_dtype(x)
        h, *_ = triton_ops.compression_fwd(
            x, weight, bias, projection, output, output_bias, heads, scale, float(eps), dtype, residual == "paper"
        )
        return h
    normed = F.layer_norm(x, (width,), weight, bias, eps)
    w = linear(normed, projection).unflatten(-1, (heads, head_dim))
    out = subspace_attention(w, scale, backend=backend)
    return (x if residual == "released" else normed) + linear(out.flatten(-2), output, output_bias)


def ista(
    x: Tensor,
    dictionary: Tensor,
    step_size: float = 0.1,
    sparsity: float = 0.1,
    *,
    threshold: str = "relu",
    norm: tuple[Tensor, Tensor, float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute one sparse-coding step (paper, Eq. 7): y = shrink(x + η(xD − xDᵀD), ηλ), of LayerNorm(x) with `norm`.

    One product with G = η(D − DᵀD) (`fold_dictionary`) replaces three.
    Under autocast the product runs in the autocast dtype; the residual and the threshold stay in x's dtype.
    The kernels save for backward the tokens (with `norm` normalised, unless autocast is on) and one byte per element.

    Args:
        x: Tokens [..., C], normalised unless `norm` is given.
        dictionary: D [C, C], same device and dtype as x (any floating-point dtype under autocast).
        step_size: η, at least 0.
        sparsity: λ, at least 0.
        threshold: "relu", max(u − ηλ, 0), as in the paper and the released code; or "soft",
            sign(u)·max(|u| − ηλ, 0), the paper's variant with soft thresholding.
        norm: γ [C], β [C] and ε of a preceding LayerNorm.
        backend: "auto", "triton" or "torch"; see `crate_fast.backends.explain_backend`.

    Returns:
        The sparse tokens [..., C] in x's dtype; with `norm` under autocast in fp32, as PyTorch's LayerNorm.

    Raises:
        ValueError, TypeError: A shape, dtype, device or option is wrong; the message names it.
        UserError: backend="triton" cannot run here; the message says why.

    >>> ista(torch.tensor([[1.0, -1.0]]), torch.eye(2))
    tensor([[0.9900, 0.0000]])
    """
    check_tensor("x", x, "[..., C]", isinstance(x, Tensor) and x.dim() >= 1)
    with without_tracer_warnings():
        width = x.shape[-1]
        square = isinstance(dictionary, Tensor) and tuple(dictionary.shape) == (width, width)
        check_tensor("dictionary", dictionary, f"[C, C] = [{width}, {width}] to match x's last dimension", square)
    check_beside(x, dictionary=dictionary)
    check_not_negative(step_size=step_size, sparsity=sparsity)
    check_choice("threshold", threshold, THRESHOLDS)
    gamma, beta, eps = norm or (None, None, 0.0)
    if norm is not None:
        check_norm(x, gamma, beta)
    if resolve_backend(x, backend) != "triton":
        x = x if norm is None else F.layer_norm(x, (width,), gamma, beta, eps)
        return _folded_ista(x, dictionary, step_size, sparsity, threshold)
    if norm is not None and autocast_enabled(x.device.type):
        x = x.float()
    folded = fold_dictionary_once(dictionary, step_size, compute_dtype(x), triton_ops.fold)
    rows = x.reshape(x.shape[:-1].numel(), width)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gamma, beta, dictionary))
    y, *_ = triton_ops.ista_fwd(
        rows, gamma, beta, dictionary, folded, float(step_size), float(sparsity), eps, threshold == "soft", keep
    )
    return y.view(x.shape)


def _folded(dictionary: Tensor, step_size: float, dtype: torch.dtype) -> Tensor:
    # a tensor that a transform differentiates need not have requires_grad
    if being_transformed() or (torch.is_grad_enabled() and dictionary.requires_grad):
        return _fold(dictionary, step_size, dtype)
    return fold_dictionary_once(dictionary, step_size, dtype)


def _is_kept(dictionary: Tensor) -> bool:
    """Return True if G is kept between calls: D is a CPU parameter that needs no gradient, outside dispatch modes."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    eager = type(dictionary) is nn.Parameter and not being_transformed()
    return eager and dictionary.is_cpu and not (torch.is_grad_enabled() and dictionary.requires_grad)


def _folded_ista(x: Tensor, dictionary: Tensor, step_size: float, sparsity: float, threshold: str) -> Tensor:
    """Compute ISTA in PyTorch, on any device."""
    shift = step_size * sparsity
    width = x.shape[-1]
    # With few tokens, two products with x, for (x − xDᵀ)D, are cheaper than the C×C×C product that folds D. Traced
    # and exported graphs use this form for any number of tokens.
    if being_exported() or ((n_tokens := x.shape[:-1].numel()) < width and not _is_kept(dictionary)):
        residual = x - linear(x, dictionary).to(x.dtype)
        u = x + step_size * linear(residual, dictionary.t()).to(x.dtype)
    elif cpu_ops.serves(x, dictionary):
        relu = threshold == "relu"
        rows, bias = x.reshape(n_tokens, width), x.new_full((width,), -shift) if relu else None
        folded = _folded(dictionary, step_size, x.dtype)
        u = cpu_ops.affine(rows, folded.t(), bias, relu, residual=True).view(x.shape)
        return u if relu else F.softshrink(u, shift)
    else:
        dtype = compute_dtype(x)
        u = x + torch.matmul(x.to(dtype), _folded(dictionary, step_size, dtype)).to(x.dtype)
    return F.relu(u - shift) if threshold == "relu" else F.softshrink(u, shift)


# --- G = η(D − DᵀD), the matrix of an ISTA step, kept for a call, a scope or a version of the weights ---


class _FoldDictionary(torch.autograd.Function):
    """D − DᵀD, with the gradient dG − D(dG + dGᵀ): one product, where autograd would compute two."""

    @staticmethod
    def forward(dictionary, dtype):
        turned = dictionary.t().to(dtype)
        return dictionary - linear(turned, turned)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dictionary, ctx.dtype = inputs
        ctx.save_for_backward(dictionary)

    @staticmethod
    def backward(ctx, grad):
        (dictionary,) = ctx.saved_tensors
        return grad - linear(dictionary.to(ctx.dtype), (grad + grad.t()).to(ctx.dtype)), None


def fold_dictionary(dictionary: Tensor, step_size: float = 0.1, dtype: torch.dtype | None = None) -> Tensor:
    """Return the matrix of the ISTA gradient step, G = η(D − DᵀD) [C, C]: x + xG = x + η(xD − xDᵀD).

    `dtype` is that of the product DᵀD and of its gradient, also under autocast; the dictionary's if None. The result
    has the dictionary's dtype.
    """
    dtype = dictionary.dtype if dtype is None else dtype
    with without_autocast(dictionary.device.type):
        if own_operators_fit():
            return step_size * _FoldDictionary.apply(dictionary, dtype)
        return step_size * (dictionary - dictionary.t().to(dtype) @ dictionary.to(dtype))


# `folds` maps D to {(dtype, fold function, stream): (fingerprint of D and η, G, D's storage)}. The storage is kept
# so that no other tensor gets its address. All threads share it: autograd recomputes checkpointed layers in its own.
_cache = SimpleNamespace(lock=threading.RLock(), scopes=0, hook=None, folds=WeakIdKeyDictionary())


def _forget(*_) -> None:
    with _cache.lock:
        _cache.folds.clear()


@contextmanager
def cached_dictionaries():
    """Open a scope in which every dictionary is folded once, for the passes between two weight updates.

    Use it for gradient accumulation (forward and backward of all micro-batches), activation checkpointing, evaluation
    loops and serving. Dictionaries are folded again after an optimizer step and after a change that PyTorch tracks
    (`load_state_dict`, `parameter.data = …`); on a GPU `parameter.data.add_(…)` is not detected. Only `nn.Parameter`s
    are cached. Every call folds again outside, in compiled code, during the capture of a CUDA graph, and without the
    kernels in a pass that computes the dictionary's gradient. Inference on a CPU needs no scope: it keeps G until the
    dictionary changes.

    >>> with cached_dictionaries():
    ...     pass  # for batch in batches: model(batch)
    """
    with _cache.lock:
        if _cache.scopes == 0:  # FSDP2 writes a new shard without changing the version of the whole parameter
            _cache.hook = register_optimizer_step_post_hook(_forget)
        _cache.scopes += 1
    try:
        yield
    finally:
        with _cache.lock:
            _cache.scopes -= 1
            if _cache.scopes == 0:
                _cache.hook.remove()
                _forget()


def _fold(dictionary: Tensor, step_size: float, dtype: torch.dtype) -> Tensor:
    return fold_dictionary(dictionary, step_size, dtype).to(dtype)


def _in_scope(dictionary: Tensor) -> bool:
    if torch.compiler.is_compiling() or _cache.scopes == 0 or not isinstance(dictionary, nn.Parameter):
        return False
    if dictionary.device.type != "cuda":
        return True
    with torch.cuda.device(dictionary.device):
        return not torch.cuda.is_current_stream_capturing()


@functools.cache
def _random_vector(n_elements: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n_elements, dtype=dtype, device="cpu", generator=torch.Generator().manual_seed(0))


def _fingerprint(dictionary: Tensor) -> tuple:
    """Return values that differ after a change of the dictionary.

    PyTorch's version counter shows most changes. On a CPU the product with a fixed random vector shows the others,
    such as `parameter.data.add_`, down to its rounding. It takes 1/50 of the layer's time for one image.
    """
    version = None if dictionary.is_inference() else dictionary._version
    if not dictionary.is_cpu:
        return version, dictionary.device, dictionary.data_ptr()  # `parameter.data = other` keeps the version
    values = dictionary.detach().reshape(-1)
    values = values if values.dtype == torch.float64 else values.float()
    return version, torch.dot(values, _random_vector(values.numel(), values.dtype)).item()


def fold_dictionary_once(
    dictionary: Tensor,
    step_size: float,
    dtype: torch.dtype,
    fold: Callable[[Tensor, float, torch.dtype], Tensor] = _fold,
) -> Tensor:
    """Return G in `dtype` without a gradient, computed by `fold` or kept from an earlier call."""
    if not (_in_scope(dictionary) or (fold is _fold and _is_kept(dictionary))):
        with torch.no_grad():
            return fold(dictionary, step_size, dtype)
    stream = torch.cuda.current_stream(dictionary.device).cuda_stream if dictionary.is_cuda else None
    key, fingerprint = (dtype, fold, stream), (step_size, _fingerprint(dictionary))
    with _cache.lock:
        folds = _cache.folds.setdefault(dictionary, {})
        known, folded, _ = folds.get(key, (None, None, None))
        if known != fingerprint:
            with torch.inference_mode(False), torch.no_grad():  # usable in a training step too
                folded = fold(dictionary, step_size, dtype)
                if fold is _fold and dictionary.is_cpu:
                    folded = folded.t().contiguous().t()  # oneDNN's layout of weights
            folds[key] = fingerprint, folded, dictionary.untyped_storage()
    return folded
