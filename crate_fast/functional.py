"""The public operators: subspace attention and ISTA. Checks, dispatch, and the folded PyTorch path.

`reference.py` has the same functions as the paper writes them; these are algebraically equal and faster.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_fast import cpu
from crate_fast.backends import resolve_backend

__all__ = ["THRESHOLDS", "fold_dictionary", "ista", "linear", "subspace_attention"]

THRESHOLDS = ("relu", "soft")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_tensor(name: str, tensor: Tensor, rank: str, ok: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: pass a torch.Tensor {rank}")
    if not ok:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: pass {rank}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}: cast it to float16, bfloat16, float32 or float64")


def _autocast_enabled(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _no_autocast(device_type: str):
    return torch.autocast(device_type, enabled=False) if _autocast_enabled(device_type) else nullcontext()


def _torch_backend(tensor: Tensor, backend: str) -> None:
    """Raise unless the folded PyTorch path is the one to run; the fused kernels will branch off here."""
    if resolve_backend(tensor, backend) != "torch":
        raise RuntimeError("the fused kernels are reported available, but this version cannot call them")


def _check_fraction(name: str, value: float, low: float, high: float | None) -> None:
    if not value >= low or (high is not None and not value < high):
        limits = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{name}={value}: it must be {limits}")


def subspace_attention(
    w: Tensor, scale: float | None = None, *, dropout_p: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Attention with one tensor as query, key and value: O = softmax(s·W Wᵀ) W, per head (paper, Eq. 5).

    Args:
        w: Subspace tokens [B, N, H, D], any strides; float16, bfloat16, float32 or float64.
        scale: s; D^-1/2 when None. The paper's Eq. 5 has s = 1, its code D^-1/2.
        dropout_p: Probability of dropping an attention weight, in [0, 1); for training.
        backend: "auto", "triton" or "torch"; see `crate_fast.backends.explain_backend`.

    Returns:
        O [B, N, H, D] in w's dtype.

    Raises:
        ValueError, TypeError: A shape, dtype or option is wrong; the message names it.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> w = torch.eye(2).reshape(1, 2, 1, 2)          # two orthogonal tokens
    >>> subspace_attention(w, scale=0.0).flatten()    # no preference: both become the mean
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    _check_tensor(
        "w",
        w,
        "[B, N, H, D] with N and D at least 1",
        isinstance(w, Tensor) and w.dim() == 4 and w.shape[1] * w.shape[3] > 0,
    )
    _check_fraction("dropout_p", dropout_p, 0.0, 1.0)
    _torch_backend(w, backend)
    scale = w.shape[-1] ** -0.5 if scale is None else float(scale)
    if dropout_p == 0.0 and cpu.serves_attention(w):
        return cpu.cpu_subspace_attention(w, scale)
    tokens = w.transpose(1, 2)
    out = F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2)


class _FoldDictionary(torch.autograd.Function):
    """G = D − DᵀD. Its gradient needs one product, not the two that autograd would find: dG − D(dG + dGᵀ)."""

    @staticmethod
    def forward(dictionary):
        return dictionary - linear(dictionary.t(), dictionary.t())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (dictionary,) = ctx.saved_tensors
        return grad - linear(dictionary, grad + grad.t())


def fold_dictionary(dictionary: Tensor, step_size: float = 0.1) -> Tensor:
    """The matrix of the ISTA gradient step, G = η(D − DᵀD): x + xG = x + η(xD − xDᵀD).

    Args:
        dictionary: D [C, C].
        step_size: η.

    Returns:
        G [C, C] in the dictionary's dtype, computed without autocast.
    """
    with _no_autocast(dictionary.device.type):
        return step_size * _FoldDictionary.apply(dictionary)


def ista(
    x: Tensor,
    dictionary: Tensor,
    step_size: float = 0.1,
    sparsity: float = 0.1,
    *,
    threshold: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """One sparse-coding step (paper, Eq. 7): y = shrink(x + η(xD − xDᵀD), ηλ).

    One product with G = η(D − DᵀD) (`fold_dictionary`) takes the place of three.
    Under autocast the product runs in the autocast dtype; the residual and the threshold stay in x's dtype.

    Args:
        x: Normalised tokens [..., C].
        dictionary: D [C, C], same dtype and device as x (another floating dtype under autocast).
        step_size: η, at least 0.
        sparsity: λ, at least 0.
        threshold: "relu", max(u − ηλ, 0), as the paper and the released code; or "soft",
            sign(u)·max(|u| − ηλ, 0), the paper's CRATE with soft-thresholding.
        backend: "auto", "triton" or "torch"; see `crate_fast.backends.explain_backend`.

    Returns:
        The sparse tokens [..., C] in x's dtype.

    Raises:
        ValueError, TypeError: A shape, dtype, device or option is wrong; the message names it.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> ista(torch.tensor([[1.0, -1.0]]), torch.eye(2))
    tensor([[0.9900, 0.0000]])
    """
    _check_tensor("x", x, "[..., C]", isinstance(x, Tensor) and x.dim() >= 1)
    width = x.shape[-1]
    square = isinstance(dictionary, Tensor) and tuple(dictionary.shape) == (width, width)
    _check_tensor("dictionary", dictionary, f"[C, C] = [{width}, {width}] to match x's last dimension", square)
    if dictionary.device != x.device:
        raise ValueError(f"dictionary is on {dictionary.device} and x on {x.device}: move one to the other's device")
    autocast = _autocast_enabled(x.device.type)
    if dictionary.dtype != x.dtype and not autocast:
        raise TypeError(f"dictionary is {dictionary.dtype} and x {x.dtype}: cast one to the other's dtype")
    _check_fraction("step_size", step_size, 0.0, None)
    _check_fraction("sparsity", sparsity, 0.0, None)
    if threshold not in THRESHOLDS:
        raise ValueError(f"threshold={threshold!r}: choose one of {', '.join(map(repr, THRESHOLDS))}")
    _torch_backend(x, backend)

    shift = step_size * sparsity
    n_tokens = x.shape[:-1].numel()
    if n_tokens < width:  # too few tokens to pay for a C×C×C product: (x − xDᵀ)D is two products with x
        residual = x - linear(x, dictionary).to(x.dtype)
        u = x + step_size * linear(residual, dictionary.t()).to(x.dtype)
    elif cpu.serves(x, dictionary):
        eye = torch.eye(width, dtype=x.dtype, device=x.device)
        bias = x.new_full((width,), -shift) if threshold == "relu" else None
        folded = eye + fold_dictionary(dictionary, step_size)
        u = cpu.cpu_linear(x.reshape(n_tokens, width), folded.t(), bias, threshold == "relu").view(x.shape)
        return u if threshold == "relu" else F.softshrink(u, shift)
    else:
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        u = x + torch.matmul(x.to(dtype), fold_dictionary(dictionary, step_size).to(dtype)).to(x.dtype)
    return F.relu(u - shift) if threshold == "relu" else F.softshrink(u, shift)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, through oneDNN for fp32 on the CPU.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        x weightᵀ + bias [..., N].
    """
    if cpu.serves(x, weight, bias) and x.dim() >= 1:
        return cpu.cpu_linear(x.reshape(-1, x.shape[-1]), weight, bias, False).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)
