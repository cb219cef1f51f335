"""Which implementation runs: `triton` (fused GPU kernels) or `torch` (folded PyTorch), and why."""

import torch
from torch import Tensor

from crate_fast import kernels
from crate_fast.autocast import compute_dtype
from crate_fast.errors import UserError
from crate_fast.tracing import being_transformed, own_operators_fit

__all__ = ["BACKENDS", "explain_backend", "resolve_backend"]

BACKENDS = ("auto", "triton", "torch")
_PROVEN = "the device runs the fused kernels; none has run on a GPU here yet, so each first launch is checked"


def explain_backend(
    device: torch.device | str,
    backend: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> tuple[str, str]:
    """The backend that a call on `device` would use, and the reason.

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
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
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
    """`explain_backend` for a tensor, without the reason."""
    if backend == "auto" and tensor.device.type == "cpu":
        return "torch"  # always, and small models feel the cost of asking for each operator
    return explain_backend(tensor.device, backend, dtype=compute_dtype(tensor), head_dim=head_dim)[0]
