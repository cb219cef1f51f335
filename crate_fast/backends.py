"""Choice of the backend for a call, with its reason; autocast's dtype; detection of tracing and transforms.

The backend is `triton` (fused GPU kernels) or `torch` (folded PyTorch). Every supported `torch.compile` traces these
functions.
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
_PROVEN = "the device runs the fused kernels; none has run on a GPU here yet, so each first launch is checked"


def explain_backend(
    device: torch.device | str,
    backend: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> tuple[str, str]:
    """Return the backend that a call on `device` would use, and the reason.

    Args:
        device: Where the tensors are.
        backend: What the caller asked for: "auto", "triton" or "torch".
        dtype: What products multiply in, autocast's or the tensors'; any that the kernels take when None.
        head_dim: D of subspace attention; any that the kernels take when None.

    Returns:
        ("triton" | "torch", reason in a sentence).

    Raises:
        UserError: `backend` is none of the three.
        UserError: "triton" was asked for where it cannot run; the message says why.

    >>> explain_backend("cpu")[0]
    'torch'
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return "torch", "asked for"
    if backend == "auto" and not own_operators_fit():
        return "torch", "torch.func, tracing and export take PyTorch's own operators"
    device = torch.device(device)
    why_not = kernels.unavailable_reason(device, dtype, head_dim)
    if backend == "triton":
        if why_not is None and being_transformed():
            why_not = "the kernels have no rules for torch.func and forward-mode differentiation"
        if why_not is not None:
            raise UserError(f"backend='triton' cannot run: {why_not}. Use backend='auto' or backend='torch'.")
        return "triton", "asked for"
    if why_not is None and device.type == "cpu":
        why_not = "Triton's interpreter runs only where backend='triton' asks for it"
    return ("triton", _PROVEN) if why_not is None else ("torch", why_not)


def resolve_backend(tensor: Tensor, backend: str, head_dim: int | None = None) -> str:
    """Return the backend that `explain_backend` names for a tensor."""
    if backend == "auto" and tensor.device.type == "cpu":
        return "torch"  # always, and small models feel the cost of asking for each operator
    return explain_backend(tensor.device, backend, dtype=compute_dtype(tensor), head_dim=head_dim)[0]


# --- autocast ---


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_enabled(device_type: str) -> bool:
    """Return True if autocast is on for tensors on this kind of device; False where there is none ("meta")."""
    return _available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str):
    """Return a context in which autocast is off for this kind of device."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else nullcontext()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a product with `tensor`: autocast's where it is on, the tensor's elsewhere."""
    if autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


# --- tracing and transforms ---


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 takes `is_exporting()` for True in any compilation
def being_written() -> bool:
    """Return whether PyTorch is recording a graph that must run without this package, possibly at other sizes.

    That is inside `torch.jit.trace` and `torch.export`, and so inside both exporters of ONNX.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return torch.jit.is_tracing() or torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # Dynamo would write the questions into its graph
def being_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation is active.

    A registered operator has no rule for them: `torch.func.grad` refuses it, `vmap` runs it once per sample, and
    `jvp` takes its derivative for zero without a word. PyTorch has no public way to ask.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def own_operators_fit() -> bool:
    """Return whether this package's operators may run: outside tracing, export and `torch.func`."""
    return not (being_written() or being_transformed())


def without_tracer_warnings():
    """Return a context for checks of shapes that silences `torch.jit.trace`'s warnings about them."""
    return _ignoring_tracer_warnings() if torch.jit.is_tracing() else nullcontext()


@contextmanager
def _ignoring_tracer_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


def refuse_double_backward(op: CustomOpDef, remedy: str) -> None:
    """Make differentiating a backward operator an error that says what to do instead."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{op._qualname} cannot be differentiated again (a second derivative was asked for): {remedy}, "
            "or use crate_fast.reference"
        )

    op.register_autograd(refuse)
