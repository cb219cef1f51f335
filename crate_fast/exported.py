"""Run an exported CRATE and compare it with its source.

run = open_exported("crate.onnx")              # or crate.pt2
run(images)["logits"]
compare(run, model, portable)                  # the largest differences, at sizes not used in the export
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from crate_fast.errors import UserError, require
from crate_fast.model import CRATE
from crate_fast.whitebox import trace

if TYPE_CHECKING:
    from crate_fast.export import PortableCRATE

Exported = Callable[[Tensor], dict[str, Tensor]]


def open_exported(path: str | Path) -> Exported:
    """Return a function that runs an exported file on the CPU: images [B, channels, height, width] → outputs by name.

    Args:
        path: A `.onnx` file, run by onnxruntime, or a `.pt2` file, run by PyTorch.

    Raises:
        UserError: The file has another suffix, or onnxruntime is missing.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return torch.no_grad()(module)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: give a file that ends in .onnx or .pt2")
    require("onnxruntime")
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {session.get_inputs()[0].name: images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


@torch.no_grad()
def eager_outputs(
    model: CRATE, images: Tensor, outputs: Sequence[str], layers: Iterable[int] | None = None
) -> dict[str, Tensor]:
    """Compute the outputs of a `PortableCRATE` from the model itself, for normalised images of its current size."""
    traces = trace(model, images, layers) if {"attention", "subspace_tokens"} & set(outputs) else []
    values = {}
    if "logits" in outputs:
        values["logits"] = model(images)
    if "features" in outputs:
        values["features"] = model.forward_head(model.forward_features(images), pre_logits=True)
    if "attention" in outputs:
        values["attention"] = torch.stack([layer.cls_attention() for layer in traces], dim=1)
    if "subspace_tokens" in outputs:
        values["subspace_tokens"] = torch.stack([layer.subspace_tokens for layer in traces], dim=1)
    return values


class Difference(NamedTuple):
    """Difference between an exported model and its source, in one output on one batch."""

    output: str
    images: tuple[int, ...]  # their shape
    absolute: float  # largest absolute difference; NaN if either output contains NaN
    largest: float  # largest absolute value of the source

    @property
    def relative(self) -> float:
        """Return `absolute` / `largest`; 0 if there is no difference."""
        return self.absolute / self.largest if self.largest else (math.inf if self.absolute else 0.0)


def compare(run: Exported, model: CRATE, portable: "PortableCRATE") -> list[Difference]:
    """Compare an exported model with its source on random images of three batch and image sizes.

    `run` is the result of `open_exported` for the file to which `portable` was written. Returns a `Difference` for
    each output and size; other names or shapes of outputs are a UserError.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    (height, width), (h, w) = model.patch_size, model.grid_size
    batches = [(1, h, w), (2, h + 3, w + 1), (3, max(2, h // 2), max(2, 2 * w // 3))]
    generator = torch.Generator().manual_seed(0)
    differences = []
    for batch, rows, columns in batches:
        shape = (batch, model.channels, rows * height, columns * width)
        if portable.raw:
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            images = torch.randn(shape, generator=generator)
        model.set_input_size(shape[2:])
        wanted = eager_outputs(model, portable.normalize(images), portable.outputs, portable.layers)
        found = run(images)
        sizes, expected = ({name: tuple(v.shape) for name, v in values.items()} for values in (found, wanted))
        if sizes != expected:
            raise UserError(f"images {list(shape)}: the exported model returns {sizes} and the model {expected}")
        for name, values in wanted.items():
            absolute = (found[name] - values).abs().max().item()
            differences.append(Difference(name, shape, absolute, values.abs().max().item()))
    return differences
