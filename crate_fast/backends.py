"""Which implementation runs: `triton` (fused GPU kernels) or `torch` (folded PyTorch), and why."""

import torch
from torch import Tensor

from crate_fast import kernels

__all__ = ["BACKENDS", "explain_backend", "resolve_backend"]

BACKENDS = ("auto", "triton", "torch")


def explain_backend(device: torch.device | str, backend: str = "auto") -> tuple[str, str]:
    """The backend that a call on `device` would use, and the reason.

    Args:
        device: Where the tensors are.
        backend: What the caller asked for: "auto", "triton" or "torch".

    Returns:
        ("triton" | "torch", reason in a sentence).

    Raises:
        ValueError: `backend` is none of the three.
        RuntimeError: "triton" was asked for where it cannot run; the message says why.

    >>> explain_backend("cpu")[0]
    'torch'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch":
        return "torch", "asked for"
    why_not = kernels.unavailable_reason(torch.device(device))
    if why_not is None:
        return "triton", "asked for" if backend == "triton" else "the device runs the fused kernels"
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {why_not}. Use backend='auto' or backend='torch'.")
    return "torch", why_not


def resolve_backend(tensor: Tensor, backend: str) -> str:
    """`explain_backend` for a tensor, without the reason."""
    return explain_backend(tensor.device, backend)[0]
