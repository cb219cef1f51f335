"""Where the Triton kernels of subspace attention and ISTA live (`crate_fast.kernels`).

This version ships none yet: `unavailable_reason` says so to the dispatch in `crate_fast.backends`, which is the
only place that asks.
"""

import torch

__all__ = ["unavailable_reason"]


def unavailable_reason(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, or None where they can. Touches no device."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA or ROCm device, and the tensor is on {device.type!r}"
    return "this version of crate_fast ships no Triton kernels yet"
