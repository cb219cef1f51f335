"""Run an exported CRATE, and compare it with the model that it was written from.

run = open_exported("crate.onnx")              # or crate.pt2
run(images)["logits"]
compare(run, model, portable)                  # the largest differences, at sizes the export never saw
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crate_fast.errors import UserError, require
from crate_fast.model import CRATE
from crate_fast.portable import PortableCRATE
from crate_fast.whitebox import trace

__all__ = ["Difference", "compare", "eager_outputs", "open_exported"]

Exported = Callable[[Tensor], dict[str, Tensor]]


def open_exported(path: str | Path) -> Exported:
    """A file that `export` wrote, as a function of images [B, channels, height, width] on the CPU.

    Args:
        path: Of a `.onnx` file, run by onnxruntime, or of a `.pt2` file, run by PyTorch.

    Returns:
        Images → outputs by name; the names are the file's.

    Raises:
        UserError: The file is of another kind.
        UserError: onnxruntime is missing.
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
    """What a `PortableCRATE` with these outputs must return, from the model itself and `whitebox.trace`.

    Args:
        model: The CRATE, which expects images of this size.
        images: Normalised, [B, channels, height, width].
        outputs, layers: As `portable.choose_outputs` gives them.
    """
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


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from its source, in one output on one batch.

    Attributes:
        output: Its name.
        images: Shape of the images.
        absolute: The largest absolute difference; NaN where either has one.
        largest: The largest absolute value of the source.
    """

    output: str
    images: tuple[int, ...]
    absolute: float
    largest: float

    @property
    def relative(self) -> float:
        """`absolute` over `largest`; 0 where there is no difference."""
        return self.absolute / self.largest if self.largest else (math.inf if self.absolute else 0.0)


def _shapes(model: CRATE) -> list[tuple[int, int, int]]:
    """Batches that the export did not see, (B, rows, columns): the model's own size, larger, and smaller."""
    rows, columns = model.grid_size
    return [(1, rows, columns), (2, rows + 3, columns + 1), (3, max(2, rows // 2), max(2, 2 * columns // 3))]


def _random_images(portable: PortableCRATE, shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if portable.raw:
        return torch.randint(256, tuple(shape), generator=generator, dtype=torch.uint8)
    return torch.randn(*shape, generator=generator)


def compare(run: Exported, model: CRATE, portable: PortableCRATE) -> list[Difference]:
    """Run an exported model beside its source, on random images of three batch and image sizes.

    Args:
        run: The exported model, as `open_exported` opens it.
        model: The CRATE it was written from.
        portable: What was written.

    Returns:
        A `Difference` for each output and size.

    Raises:
        UserError: The exported model gives other outputs, or outputs of another shape.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    height, width = model.patch_size
    differences = []
    for seed, (batch, rows, columns) in enumerate(_shapes(model)):
        shape = (batch, model.channels, rows * height, columns * width)
        images = _random_images(portable, shape, seed)
        model.set_input_size(shape[2:])
        wanted = eager_outputs(model, portable.normalize(images), portable.outputs, portable.layers)
        found = run(images)
        sizes, expected = ({name: tuple(v.shape) for name, v in values.items()} for values in (found, wanted))
        if sizes != expected:
            raise UserError(f"for images {list(shape)} the exported model gives {sizes}, and the model {expected}")
        for name, values in wanted.items():
            absolute = (found[name] - values).abs().max().item()
            differences.append(Difference(name, shape, absolute, values.abs().max().item()))
    return differences
