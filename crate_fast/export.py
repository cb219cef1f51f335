"""Export a CRATE as ONNX and as a torch.export program, each compared with PyTorch before its file is written.

    crate-fast export runs/NAME                                             runs/export/NAME/model.onnx, .pt2, .json
    crate-fast export runs/NAME --outputs logits,attention --layers 9,10    with CLS attention of two layers
    crate-fast export runs/NAME --input uint8                               images 0 to 255, normalised in the graph

Outputs: logits [B, classes]; features [B, C], the classifier's input; attention [B, L, H, P] of CLS to patches and
subspace_tokens [B, L, 1 + P, H, D] of the chosen layers. Batch and image size are dynamic: image sides are multiples
of the patch size, at least two patches.

    from crate_fast.export import export_model
    export_model(model, "exported", outputs=["logits", "attention"])    # exported/model.onnx, .pt2 and .json

The files run without crate_fast: they contain only standard operators of PyTorch or ONNX.
"""

import argparse
import copy
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from crate_fast.env import provenance
from crate_fast.errors import UserError, require
from crate_fast.exported import Difference, compare, open_exported
from crate_fast.functional import fold_dictionary
from crate_fast.layers import ISTA, MHSA, MSSA, ODL
from crate_fast.model import CRATE, pool_tokens
from crate_fast.options import main_of
from crate_fast.whitebox import attention_layer, layer_numbers, trace

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
OUTPUTS = ("logits", "features", "attention", "subspace_tokens")
MIN_OPSET = 18  # the first that PyTorch's exporter writes without conversion
FACTS_FILE = "crate_fast.json"  # inside a .pt2
_CUBIC = -0.5  # parameter a of the cubic, as in Pillow and PyTorch's antialiased bicubic


def resampling_matrix(new: int, old: int, like: Tensor) -> Tensor:
    """Return the matrix [new, old] that resamples `old` points to `new` as antialiased bicubic `F.interpolate`.

    Row i holds k((j + ½ − s(i + ½)) / max(s, 1)) for every j, divided by its sum, with s = old / new and k the cubic
    convolution kernel for a = −½. `new` may be symbolic; the dtype and device are those of `like`.

    >>> resampling_matrix(2, 2, torch.zeros(()))
    tensor([[1., 0.],
            [0., 1.]])
    """
    index = torch.arange(new, dtype=like.dtype, device=like.device)
    count = torch.ones_like(index).sum()
    scale = torch.full_like(count, old) / count  # a plain number over a tensor would be rounded twice
    centers = (index + 0.5) * scale
    points = torch.arange(old, dtype=like.dtype, device=like.device) + 0.5
    distance = ((points - centers[:, None]) / scale.clamp(min=1.0)).abs()
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * _CUBIC - 4 * _CUBIC
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    return weights / weights.sum(dim=1, keepdim=True)


class _PortableISTA(nn.Module):
    """`ISTA` with a folded dictionary: y = shrink(x + xG − ηλ) with G = η(D − DᵀD)."""

    def __init__(self, ista: ISTA):
        super().__init__()
        with torch.no_grad():
            self.register_buffer("folded", fold_dictionary(ista.weight, ista.step_size))
        self.shift, self.threshold = ista.step_size * ista.lambd, ista.threshold

    def forward(self, x: Tensor) -> Tensor:
        u = x + x @ self.folded
        return F.relu(u - self.shift) if self.threshold == "relu" else F.softshrink(u, self.shift)


def _portable(module: nn.Module) -> nn.Module:
    """Replace every ISTA and disable the kernels of attention and ODL, in place."""
    for name, child in list(module.named_children()):
        _portable(child)
        if isinstance(child, MSSA | ODL):
            child.backend = "torch"
        elif isinstance(child, ISTA):
            setattr(module, name, _PortableISTA(child))
    return module


def choose_outputs(
    model: CRATE, outputs: Sequence[str] | None = None, layers: Iterable[int] | None = None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the outputs of an exported model in the order of `OUTPUTS`, and layers in ascending order.

    Args:
        model: The CRATE.
        outputs: Names from `OUTPUTS`; None means "logits", or "features" without a classifier.
        layers: Layers of "attention" and "subspace_tokens", negative ones from the end; None means the layer of
            the paper's figures (`whitebox.attention_layer`).

    Raises:
        TypeError: The model is not a CRATE.
        UserError: The model has no such output or layer.
    """
    if not isinstance(model, CRATE):
        raise TypeError(
            f"a {type(model).__name__} cannot be exported: pass a crate_fast.CRATE, or the encoder() of a CRATE-MAE"
        )
    if outputs is None:
        outputs = ["logits" if model.num_classes else "features"]
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        raise UserError(f"outputs={list(outputs)!r}: choose from {', '.join(OUTPUTS)}")
    if "logits" in outputs and not model.num_classes:
        raise UserError("outputs: this model has no classifier and no logits; request features [B, C] instead")
    layers = layer_numbers(model, [attention_layer(model)] if layers is None else layers)
    if not layers:
        raise UserError("layers=[]: pass at least one layer, or leave it out")
    if "subspace_tokens" in outputs and isinstance(model.transformer.layers[0][0].fn, MHSA):
        raise UserError(
            "outputs: this model's layers have separate query, key and value, so no subspace_tokens; leave them out"
        )
    return tuple(name for name in OUTPUTS if name in outputs), tuple(layers)


class PortableCRATE(nn.Module):
    """Copy of a CRATE in fp32 on the CPU, in evaluation mode, with one graph for all image sizes.

    `forward` takes images [B, channels, height, width] and returns the chosen outputs by name, with the shapes in the
    module docstring. Two matrices that depend on the image size resample the positions, R P Cᵀ. The result equals
    `resample_positions`.

    Args:
        model: The CRATE; it is not changed.
        outputs, layers: See `choose_outputs`.
        statistics: (mean, deviation) of each channel. If given, `forward` takes uint8 images and normalises them;
            otherwise it takes normalised fp32 images.

    Raises:
        TypeError, UserError: See `choose_outputs`; also for statistics of another number of channels.

    >>> model = CRATE(image_size=16, patch_size=4, num_classes=5, dim=8, depth=2, heads=2, dim_head=4)
    >>> portable = PortableCRATE(model, ["logits", "attention"])
    >>> {name: tuple(values.shape) for name, values in portable(torch.zeros(3, 3, 8, 24)).items()}
    {'logits': (3, 5), 'attention': (3, 1, 2, 12)}
    """

    def __init__(
        self,
        model: CRATE,
        outputs: Sequence[str] | None = None,
        layers: Iterable[int] | None = None,
        statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    ):
        super().__init__()
        self.outputs, self.layers = choose_outputs(model, outputs, layers)
        self.patch_size, self.native_grid, self.pool = model.patch_size, model.native_grid, model.pool
        self.channels = model.channels
        self.raw = statistics is not None
        if self.raw:
            mean, deviation = (torch.tensor(values, dtype=torch.float32).flatten() for values in statistics)
            if not len(mean) == len(deviation) == model.channels or not (deviation > 0).all():
                raise UserError(
                    f"statistics={statistics}: give the mean and positive deviation of {model.channels} channels"
                )
            self.register_buffer("shift", (-mean / deviation).view(1, -1, 1, 1))
            self.register_buffer("scale", (1 / (255 * deviation)).view(1, -1, 1, 1))
        copied = _portable(copy.deepcopy(model).cpu().float().eval()).requires_grad_(False)
        self.pos_embedding, self.cls_token = copied.pos_embedding, copied.cls_token
        self.patch_embedding = copied.to_patch_embedding
        self.transformer, self.head = copied.transformer, copied.mlp_head

    def normalize(self, images: Tensor) -> Tensor:
        """Return (x/255 − mean)/deviation of uint8 images; return other images unchanged."""
        return torch.addcmul(self.shift, images.float(), self.scale) if self.raw else images

    def embed(self, images: Tensor) -> Tensor:
        """Return the first layer's tokens [B, 1 + P, C], CLS first."""
        images = self.normalize(images)
        patches = self.patch_embedding(images)
        rows, columns = (side // patch for side, patch in zip(images.shape[2:], self.patch_size, strict=True))
        positions = self.pos_embedding[0, 1:].unflatten(0, self.native_grid)
        positions = torch.tensordot(resampling_matrix(rows, self.native_grid[0], patches), positions, 1)
        positions = resampling_matrix(columns, self.native_grid[1], patches) @ positions
        cls = self.cls_token + self.pos_embedding[:, :1]
        return torch.cat([cls.expand(images.shape[0], -1, -1), patches + positions.flatten(0, 1)], dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last layer's tokens [B, 1 + P, C]."""
        return self.transformer(self.embed(images))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the chosen outputs by name."""
        last = self.transformer.depth - 1
        traces = {layer.index: layer for layer in trace(self, images, {*self.layers, last})}
        chosen = [traces[layer] for layer in self.layers]
        tokens = traces[last].after_ista
        features = self.head[:-1](pool_tokens(tokens, self.pool))
        read = {
            "logits": lambda: self.head[-1](features),
            "features": lambda: features,
            "attention": lambda: torch.stack([layer.cls_attention() for layer in chosen], dim=1),
            "subspace_tokens": lambda: torch.stack([layer.subspace_tokens for layer in chosen], dim=1),
        }
        return {name: read[name]() for name in self.outputs}


def capture(portable: PortableCRATE) -> ExportedProgram:
    """Export a portable model as one graph for all batch and image sizes."""
    height, width = portable.patch_size
    rows, columns = Dim("rows", min=2), Dim("columns", min=2)
    sizes = {0: Dim("batch", min=1), 2: height * rows, 3: width * columns}
    dtype = torch.uint8 if portable.raw else torch.float32
    images = torch.zeros(2, portable.channels, 3 * height, 4 * width, dtype=dtype)
    with torch.no_grad():
        return torch.export.export(portable, (images,), dynamic_shapes={"images": sizes})


def _write_torch(program: ExportedProgram, path: Path, facts: dict) -> None:
    """Save a program for `torch.export.load`, which needs no crate_fast, with the facts as crate_fast.json inside."""
    content = io.BytesIO()  # on a full disk, PyTorch's own writer ends the process
    torch.export.save(program, content, extra_files={FACTS_FILE: json.dumps(facts, ensure_ascii=False)})
    path.write_bytes(content.getbuffer())


def _write_onnx(program: ExportedProgram, outputs: Sequence[str], path: Path, facts: dict, opset: int) -> None:
    """Save a program as one ONNX file with the facts as its metadata; values other than strings are JSON."""
    names = {"input_names": ["images"], "output_names": list(outputs)}
    written = torch.onnx.export(program, **names, opset_version=opset, dynamo=True, verbose=False)
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        written.model.metadata_props[name] = text
    written.save(path, external_data=False)


def export_model(
    model: CRATE,
    folder: str | Path,
    *,
    formats: Iterable[str] = tuple(FORMATS),
    outputs: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    raw: bool = False,
    opset: int = MIN_OPSET,
    tolerance: float = 1e-4,
    facts: dict | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write model.onnx, model.pt2 and model.json into a folder.

    Each file is first written to a hidden folder, run on random images of three batch and image sizes that were not
    used in the export, and compared with the model. The files are moved to the folder after all comparisons.

    Args:
        model: The CRATE; it is not changed.
        folder: Output folder; created if missing.
        formats: "onnx", "torch", or both.
        outputs, layers: See `choose_outputs`.
        statistics: (mean, deviation) of each channel for normalised images.
        raw: True for a graph that takes uint8 images and normalises them by `statistics`.
        opset: Version of ONNX's operators, 18 or newer.
        tolerance: Largest difference allowed, relative to the largest absolute value of the output.
        facts: Plain values to store with the files, such as the model's name.
        say: Called with a line for each comparison.

    Returns:
        The files.

    Raises:
        TypeError: The model is not a CRATE.
        UserError: An option is wrong, a package that ONNX needs is missing, or an exported model differs from the
            model by more than the tolerance.
    """
    folder, formats = Path(folder), list(formats)
    _check_formats(formats, opset)
    if not tolerance > 0:
        raise UserError(f"tolerance={tolerance}: give a positive number, such as 1e-4")
    if raw and statistics is None:
        raise UserError("raw=True: give the statistics, (mean, deviation) of each channel")
    portable = PortableCRATE(model, outputs, layers, statistics if raw else None)
    facts = {**(facts or {}), **_facts(model, portable, statistics)}
    program = capture(portable)
    folder.mkdir(parents=True, exist_ok=True)
    names, differences = [FORMATS[name] for name in FORMATS if name in formats], {}
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as hidden:
        unchecked = Path(hidden)
        for name in names:
            if name == FORMATS["onnx"]:
                _write_onnx(program, portable.outputs, unchecked / name, facts, opset)
            else:
                _write_torch(program, unchecked / name, facts)
            found = compare(open_exported(unchecked / name), model, portable)
            differences[name] = _check(name, found, tolerance, say)
        text = json.dumps(facts | {"differences": differences}, indent=2, ensure_ascii=False)
        (unchecked / "model.json").write_text(text + "\n")
        for name in (*names, "model.json"):
            (unchecked / name).replace(folder / name)
    return [folder / name for name in (*names, "model.json")]


def _check_formats(formats: list[str], opset: int) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"formats={formats!r}: choose from {', '.join(FORMATS)}")
    if "onnx" in formats:
        require("onnx", "onnxscript", "onnxruntime")
        import onnx

        newest = onnx.defs.onnx_opset_version()
        if not MIN_OPSET <= opset <= newest:
            raise UserError(f"opset={opset}: give one from {MIN_OPSET} to {newest}, the newest of the installed onnx")


def _facts(model: CRATE, portable: PortableCRATE, statistics: tuple | None) -> dict:
    """Return the facts about the model that the users of the files need."""
    facts = {
        "input": "images, uint8 0 to 255" if portable.raw else "images, float32, normalised",
        "outputs": list(portable.outputs),
        "image_size": list(model.image_size),
        "patch_size": list(model.patch_size),
        "channels": model.channels,
    }
    if {"attention", "subspace_tokens"} & set(portable.outputs):
        facts["layers"] = list(portable.layers)
    if statistics is not None:
        facts["mean"], facts["std"] = ([float(value) for value in values] for values in statistics)
    origin = provenance()  # the files are shared: omit command line and machine
    return facts | {name: origin[name] for name in ("crate_fast", "commit", "torch", "time")}


def _check(name: str, differences: list[Difference], tolerance: float, say: Callable[[str], None]) -> list[dict]:
    """Print comparisons and return them as plain values; raise a UserError above the tolerance or for NaN."""
    for d in differences:
        images = "×".join(map(str, d.images))
        values = f"{d.absolute:.1e}, of values up to {d.largest:.3g}"
        say(f"{name}  {d.output}, images {images}: largest difference {values}")
        if not d.relative <= tolerance:
            raise UserError(
                f"{name}: {d.output} of images {images} differs from the model's by {values}; the tolerance is "
                f"{tolerance:g} of the largest. Nothing was written; to accept this, pass a larger tolerance"
            )
    return [d._asdict() for d in differences]


def _statistics(normalize: nn.Module) -> tuple[list[float], list[float]]:
    """Return mean and deviation of a `transforms.Normalize`."""
    deviation = 1 / (255 * normalize.scale.double().flatten())
    mean = -normalize.shift.double().flatten() * deviation
    return [round(value, 6) for value in mean.tolist()], [round(value, 6) for value in deviation.tolist()]


def _export(options: argparse.Namespace) -> None:
    from crate_fast.eval.common.models import check_model_args, class_names, open_model
    from crate_fast.eval.common.results import file_name, make_folder

    loaded = open_model(options.model, "cpu", options.image_size, options.model_args, options.seed)
    check_model_args(options.model_args, [loaded])
    if not isinstance(loaded.model, CRATE):
        raise UserError(
            f"{loaded.facts['model']} is a {type(loaded.model).__name__} of timm: crate-fast exports CRATE, its "
            "ablations and the encoders of CRATE-MAE; choose one of those"
        )
    depth = loaded.extract.depth
    names = ("model", "weights_sha256", "parameters")
    facts = {name: loaded.facts[name] for name in names}
    classes = class_names(options.model) if loaded.model.num_classes else None
    written = export_model(
        loaded.model,
        make_folder(options.output or Path("runs/export") / file_name(loaded.label)),
        formats=options.format,
        outputs=options.outputs,
        layers=range(depth) if options.layers == "all" else options.layers,
        statistics=_statistics(loaded.normalize),
        raw=options.input == "uint8",
        opset=options.opset,
        tolerance=options.tolerance,
        facts=facts if classes is None else facts | {"classes": classes},
        say=print,
    )
    print("written:", *map(str, written), sep="\n  ")


main = main_of("export", _export)

if __name__ == "__main__":
    sys.exit(main())
