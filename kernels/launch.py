"""A kernel launch as data, so that what runs and what the tests compile are the same thing."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crate_fast.kernels.tiles import Tile

__all__ = ["Launch", "precision", "recorded"]

_record: "list[Launch] | None" = None


@contextmanager
def recorded():
    """Inside, launches are collected in a list instead of run, for tests that compile them; in one thread."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def precision(dtype: torch.dtype) -> str:
    """The tile table's word for how operands of `dtype` are multiplied: "half", or "tf32" for float32."""
    return "tf32" if dtype == torch.float32 else "half"


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
        """Compiler options; multiply and add are fused by name: Triton 3.10 stops fusing them by default."""
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
