"""Where the kernels run, told without importing Triton."""

import functools
import importlib.util
import os
from contextlib import contextmanager

import torch

__all__ = [
    "INTERPRETED",
    "MAX_HEAD_DIM",
    "architecture",
    "assuming_gpu",
    "processors",
    "unavailable_reason",
]

MAX_HEAD_DIM = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Whether Triton interprets kernels in Python: on the CPU, slowly, to check them. It reads the variable when it is
# imported, which timm does; so it is read here once.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_assuming_gpu = False


@contextmanager
def assuming_gpu():
    """Inside, "cuda" tensors are served as on a supported GPU, whatever this machine has: for fake tensors alone."""
    global _assuming_gpu
    before, _assuming_gpu = _assuming_gpu, True
    try:
        yield
    finally:
        _assuming_gpu = before


@functools.cache
def _find_family(index: int | None) -> tuple[str | None, str]:
    if not torch.cuda.is_available():
        return None, "PyTorch finds no CUDA device on this machine"
    name = torch.cuda.get_device_name(index)
    why_not = f"the kernels are written for NVIDIA GPUs from compute capability 8.0; this is {name}"
    return None if torch.version.hip else _family_of(*torch.cuda.get_device_capability(index)), why_not


def _family_of(major: int, minor: int) -> str | None:
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_86"}.get(major)  # consumer Blackwell: 99 KB, no WGMMA


@torch.compiler.assume_constant_result  # nothing for torch.compile to trace
def _family(index: int | None) -> tuple[str | None, str]:
    """The tile table's name for a CUDA device; None, and why, where the kernels do not run."""
    return _find_family(index)


def architecture(device: torch.device) -> str:
    """The tile table's name for a device that `unavailable_reason` admits; the interpreter uses Hopper's rows."""
    return "sm_90" if device.type != "cuda" else _family(device.index)[0]


@torch.compiler.assume_constant_result
def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def unavailable_reason(
    device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> str | None:
    """Why the kernels cannot run on `device`, or None where they can.

    Args:
        device: Where the tensors are.
        dtype: What products multiply in: autocast's where it is on, else the tensors'.
        head_dim: D of subspace attention.
    """
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        return f"Triton kernels need a CUDA device, and the tensor is on {device.type!r}"
    if not _TRITON_INSTALLED and not _assuming_gpu:
        return "Triton is not installed"
    if device.type == "cuda" and not _assuming_gpu:
        family, why_not = _family(device.index)
        if family is None:
            return why_not
    if dtype is not None and dtype not in _DTYPES:
        return f"the kernels take float16, bfloat16 and float32, and the tensor is {dtype}"
    if dtype == torch.float32 and device.type == "cuda" and not _tf32_allowed():
        return "the kernels multiply float32 as TF32, and torch.set_float32_matmul_precision does not allow it"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "Triton's interpreter computes bfloat16 wrongly; check with float16 or float32"
    if head_dim is not None and head_dim > MAX_HEAD_DIM:
        return f"the kernels take heads up to {MAX_HEAD_DIM} wide, and this one is {head_dim}"
    return None


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 elsewhere, so that the interpreter too has more work than programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
