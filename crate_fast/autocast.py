"""Whether autocast is on for a kind of device, and how to leave it; traceable by every supported `torch.compile`."""

from contextlib import nullcontext

import torch
from torch import Tensor

__all__ = ["autocast_enabled", "compute_dtype", "without_autocast"]


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for tensors on this kind of device; False where there is none ("meta")."""
    return _available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str):
    """A context in which autocast is off for this kind of device."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else nullcontext()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What a product with `tensor` multiplies in: autocast's dtype where it is on, the tensor's elsewhere."""
    if autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype
