"""Supported devices, the tile table, and launches of kernels. Importing this module does not import Triton.

The tile table is static: without tuning at run time, all ranks use the same tiles and the first step does not stall.
`benchmarks/gpu_check.py` measures candidates on a GPU and writes them to a file. Rows of the file that
`settings.tiles_file` names take precedence.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.settings import tiles_file

_MAX_HEAD_DIM = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# True if Triton interprets kernels in Python on the CPU, slowly, to check them. Read once: Triton reads the variable
# when it is imported, and timm imports Triton.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_assuming_gpu = False


@contextmanager
def assuming_gpu():
    """Treat "cuda" tensors as on a supported GPU, whatever this machine has; for fake tensors only."""
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
    """Return the tile table's name for a CUDA device, or None if it is unsupported; and the reason."""
    return _find_family(index)


def architecture(device: torch.device) -> str:
    """Return the tile table's name for a supported device; Hopper's for the interpreter."""
    return "sm_90" if device.type != "cuda" else _family(device.index)[0]


@torch.compiler.assume_constant_result
def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def unavailable_reason(
    device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> str | None:
    """Return the reason why the kernels cannot run on `device`, or None if they can.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the products: autocast's if it is on, else the tensors'.
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
        return f"the kernels support float16, bfloat16 and float32, and the tensor is {dtype}"
    if dtype == torch.float32 and device.type == "cuda" and not _tf32_allowed():
        return "the kernels multiply float32 as TF32, and torch.set_float32_matmul_precision does not allow it"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "Triton's interpreter computes bfloat16 wrongly; check with float16 or float32"
    if head_dim is not None and head_dim > _MAX_HEAD_DIM:
        return f"the kernels support heads up to {_MAX_HEAD_DIM} wide, and this one is {head_dim}"
    return None


def cdiv(numerator: int, denominator: int) -> int:
    """Return numerator / denominator, rounded up. Triton's function takes 6 µs."""
    return -(-numerator // denominator)


def power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def processors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors; 4 on a CPU, so that persistent programs loop there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# --- tiles ---

SHARED_MEMORY = {  # bytes per program
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
}
ARCHITECTURES = tuple(SHARED_MEMORY)


@dataclass(frozen=True)
class Tile:
    """Block sizes in tokens (and channels, for products), warps per program, software pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_k: int = 0  # products only
    one_exp: bool = False  # attention's gradient: one exponential for two weights where possible
    persistent: bool = False  # products: one program per multiprocessor, which prefetches its next tile
    chosen: bool = True  # the output map: False to use PyTorch's product instead


# Keys: kernel and precision, optionally an architecture, optionally a head width rounded up to a power of two.
# Precisions: "half" (float16, bfloat16), "tf32" (float32). The most specific row applies.
TABLE: dict[tuple[str | int, ...], Tile] = {
    ("attention_forward", "half"): Tile(128, 64, 8, 3),
    ("attention_forward", "half", "sm_80", 128): Tile(32, 32, 4, 2),
    ("attention_forward", "half", "sm_86", 128): Tile(32, 32, 4, 2),
    ("attention_forward", "tf32"): Tile(64, 32, 4, 2),
    ("attention_forward", "tf32", 128): Tile(32, 32, 8, 2),
    ("attention_backward", "half"): Tile(128, 32, 8, 2),
    ("attention_backward", "half", "sm_90"): Tile(128, 64, 8, 2, one_exp=True),
    ("attention_backward", "half", "sm_90", 128): Tile(128, 32, 8, 2, one_exp=True),
    ("attention_backward", "half", 128): Tile(64, 32, 8, 2),
    ("attention_backward", "tf32"): Tile(32, 16, 8, 1),
    ("attention_backward", "tf32", 32): Tile(32, 32, 8, 1),
    ("attention_backward", "tf32", 128): Tile(32, 32, 8, 1),
    ("whole_head_forward", "half", "sm_90", 64): Tile(64, 32, 4, 2),
    ("whole_head_backward", "half", "sm_90", 64): Tile(64, 16, 4, 1),
    ("ista_forward", "half"): Tile(128, 128, 8, 3, 64),
    ("ista_forward", "half", "sm_86"): Tile(128, 128, 8, 3, 32),
    ("ista_forward", "half", "sm_90"): Tile(128, 256, 8, 4, 64, persistent=True),
    ("ista_forward", "half", "sm_100"): Tile(128, 256, 8, 3, 64, persistent=True),
    ("ista_forward", "tf32"): Tile(128, 64, 8, 3, 32),
    ("ista_backward_input", "half"): Tile(128, 128, 8, 3, 64),
    ("ista_backward_input", "half", "sm_86"): Tile(128, 128, 8, 3, 32),
    ("ista_backward_input", "half", "sm_90"): Tile(128, 256, 8, 4, 64, persistent=True),
    ("ista_backward_input", "half", "sm_100"): Tile(128, 256, 8, 3, 64, persistent=True),
    ("ista_backward_input", "tf32"): Tile(128, 64, 8, 3, 32),
    ("output_map", "half"): Tile(128, 128, 8, 3, 64),
    ("output_map", "half", "sm_86"): Tile(128, 128, 8, 3, 32),
    ("output_map", "half", "sm_90"): Tile(128, 256, 8, 4, 64, persistent=True),
    ("output_map", "half", "sm_100"): Tile(128, 256, 8, 3, 64, persistent=True),
    ("weight_gradient", "half"): Tile(128, 128, 8, 3, 64),
    ("weight_gradient", "half", "sm_86"): Tile(128, 128, 8, 3, 32),
    ("weight_gradient", "half", "sm_90"): Tile(128, 256, 8, 3, 64),
    ("weight_gradient", "half", "sm_100"): Tile(128, 256, 8, 3, 64),
    ("weight_gradient", "tf32"): Tile(128, 64, 8, 3, 32),
}


@functools.cache
def _measured() -> dict[tuple[str, str, str, int], Tile | None]:
    """Read `settings.tiles_file`: kernel, architecture, precision, block_d, tile (null: do not use the kernel)."""
    path = tiles_file()
    keys = ("kernel", "precision", "architecture", "block_d")
    try:
        rows = [] if path is None else json.loads(Path(path).read_text())
        return {tuple(row[key] for key in keys): Tile(**row["tile"]) if row["tile"] else None for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"CRATE_FAST_TILES={path} cannot be used ({error!r}): correct the path") from error


def table_row(kernel: str, precision: str, family: str, block_d: int = 0) -> Tile | None:
    """Return the most specific row of the tile table for one of `ARCHITECTURES`, or None."""
    keys = [(kernel, precision, family, block_d), (kernel, precision, family), (kernel, precision, block_d)]
    return next((TABLE[key] for key in [*keys, (kernel, precision)] if key in TABLE), None)


def find(kernel: str, device: torch.device, precision: str, block_d: int = 0) -> Tile | None:
    """Return the tile of a kernel as `lookup` does, or None if the table has no row."""
    name = architecture(device)
    return _measured().get((kernel, precision, name, block_d), table_row(kernel, precision, name, block_d))


def lookup(kernel: str, device: torch.device, precision: str, block_d: int = 0) -> Tile:
    """Return the tile of a kernel on a CUDA device; on a CPU (the interpreter) Hopper's.

    `precision` is "half" or "tf32"; `block_d` is the head width rounded up to a power of two, 0 for products.
    """
    tile = find(kernel, device, precision, block_d)
    if tile is None:
        raise KeyError(f"the tile table has no row for {kernel}, {precision}, on {architecture(device)}")
    return tile


def precision(dtype: torch.dtype) -> str:
    """Return the precision in the tile table for operands of `dtype`: "tf32" for float32, else "half"."""
    return "tf32" if dtype == torch.float32 else "half"


# --- launches ---

_record: "list[Launch] | None" = None


@contextmanager
def recorded():
    """Collect launches in a list instead of running them, for tests that compile them. Not thread-safe."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid, its run-time arguments and its compile-time constants."""

    kernel: Callable
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any]
    tile: Tile

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. `enable_fp_fusion` is explicit because Triton 3.10 turns it off by default."""
        return {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the device of the tensors."""
        if _record is not None:
            _record.append(self)
            return
        if 0 in self.grid:  # nothing to do
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
