"""A kernel launch as data, so that what runs and what the compile report compiles are the same thing."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crate_fast.kernels.tiles import Tile

__all__ = ["Launch", "Precision", "matmul_precision"]


@dataclass(frozen=True)
class Precision:
    """How a kernel multiplies: `row` names the tile table's rows, `dot` is `tl.dot`'s `input_precision`."""

    row: str
    dot: str


def matmul_precision(dtype: torch.dtype, storage: torch.dtype | None = None) -> Precision:
    """How operands of `dtype` are multiplied; `storage` is what they are converted from.

    float16 and bfloat16 multiply as they are ("half", or "mixed" when read from fp32). float32 follows PyTorch's
    setting: "tf32" where `torch.backends.cuda.matmul.fp32_precision` says so, which
    `torch.set_float32_matmul_precision("high")` and `allow_tf32` also set; "ieee" elsewhere.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return Precision("half" if storage in (None, dtype) else "mixed", "ieee")
    name = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return Precision(name, name)


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
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
