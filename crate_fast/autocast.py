"""Whether autocast is on for a kind of device, and how to leave it; traceable by every supported `torch.compile`."""

from contextlib import nullcontext

import torch

__all__ = ["autocast_enabled", "without_autocast"]


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for tensors on this kind of device; False where there is none ("meta")."""
    return _available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str):
    """A context in which autocast is off for this kind of device."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else nullcontext()
