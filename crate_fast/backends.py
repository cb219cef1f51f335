"""Choice of the backend of a call, and detection of autocast, tracing and function transforms.

The backend is `triton` (fused GPU kernels) or `torch` (folded PyTorch). `torch.compile` traces these functions in
every supported version of PyTorch.
"""

import warnings
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef

from crate_fast import kernels
from crate_fast.arguments import check_choice
from crate_fast.errors import UserError

BACKENDS = ("auto", "triton", "torch")
_SUPPORTED = "the device supports the kernels; none has been run on a GPU yet, so each first launch is checked"


def explain_backend(
    device: torch.device | str,
    backend: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> tuple[str, str]:
    """Return the backend of a call on `device`, and the reason.

    Args:
        device: Device of the tensors.
        backend: Requested backend: "auto", "triton" or "torch".
        dtype: Dtype of the products, autocast's or the tensors'; None for any that the kernels support.
        head_dim: Head width D of subspace attention; None for any that the kernels support.

    Returns:
        ("triton" or "torch", reason in one sentence).

    Raises:
        UserError: `backend` is none of the three.
        UserError: "triton" is requested and cannot run; the message gives the reason.

    >>> explain_backend("cpu")[0]
    'torch'
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return "torch", "requested"
    if backend == "auto" and not own_operators_fit():
        return "torch", "torch.func, tracing and export need PyTorch's own operators"
    device = torch.device(device)
    why_not = kernels.unavailable_reason(device, dtype, head_dim)
    if backend == "triton":
        if why_not is None and being_transformed():
            why_not = "the kernels have no rules for torch.func or forward-mode differentiation"
        if why_not is not None:
            raise UserError(f"backend='triton' cannot run: {why_not}. Use backend='auto' or backend='torch'.")
        return "triton", "requested"
    if why_not is None and device.type == "cpu":
        why_not = "Triton's interpreter runs only with backend='triton'"
    return ("triton", _SUPPORTED) if why_not is None else ("torch", why_not)


def resolve_backend(tensor: Tensor, backend: str, head_dim: int | None = None) -> str:
    """Return the backend for a tensor; see `explain_backend`."""
    if backend == "auto" and tensor.device.type == "cpu":
        return "torch"  # as `explain_backend`, whose overhead is noticeable in small models
    return explain_backend(tensor.device, backend, dtype=compute_dtype(tensor), head_dim=head_dim)[0]


# --- autocast ---


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace this call
def _available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_enabled(device_type: str) -> bool:
    """Return True if autocast is enabled for this device type; False for types without autocast ("meta")."""
    return _available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str):
    """Return a context that disables autocast for this device type."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else nullcontext()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a product with `tensor`: autocast's if it is enabled, else the tensor's."""
    if autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


# --- tracing and transforms ---


@torch.compiler.assume_constant_result  # in any compilation, Dynamo of torch 2.11 treats `is_exporting()` as True
def being_exported() -> bool:
    """Return True while PyTorch records a graph that must run without this package, possibly at other sizes.

    This is the case in `torch.jit.trace` and `torch.export`, and therefore in both ONNX exporters.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return torch.jit.is_tracing() or torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # Dynamo would record these calls in its graph
def being_transformed() -> bool:
    """Return True if a transform of `torch.func` or forward-mode differentiation is active.

    Custom operators have no rule for them: `torch.func.grad` raises an error, `vmap` runs the operator once per
    sample, and `jvp` silently returns a zero derivative. PyTorch has no public API for this query.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def own_operators_fit() -> bool:
    """Return True if this package's operators may run: outside tracing, export and `torch.func`."""
    return not (being_exported() or being_transformed())


def without_tracer_warnings():
    """Return a context for shape checks that silences the warnings of `torch.jit.trace` about them."""
    return _ignoring_tracer_warnings() if torch.jit.is_tracing() else nullcontext()


@contextmanager
def _ignoring_tracer_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


def refuse_double_backward(op: CustomOpDef, remedy: str) -> None:
    """Make the differentiation of a backward operator an error with a remedy."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{op._qualname} cannot be differentiated again (a second derivative was requested): {remedy}, "
            "or use crate_fast.reference"
        )

    op.register_autograd(refuse)
