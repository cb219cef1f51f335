"""Export a CRATE as ONNX and as a torch.export program, each compared with PyTorch before its file is written.

    crate-fast export runs/NAME                                          runs/export/runs_NAME/model.onnx, .pt2, .json
    crate-fast export runs/NAME --outputs logits,attention --layers 9,10    with CLS attention of two layers
    crate-fast export runs/NAME --input uint8                               images 0 to 255, normalised in the graph

Outputs: logits [B, classes]; features [B, C], the classifier's input; attention [B, L, H, P] of CLS to patches in the
chosen layers. The batch size is dynamic. The image size is the model's, or that of `--image-size`.

    from crate_fast.export import export_model, open_exported
    export_model(model, "exported", outputs=["logits", "attention"])    # exported/model.onnx, .pt2 and .json
    open_exported("exported/model.onnx")(images)["logits"]

The files run without crate_fast: they contain only standard operators of PyTorch or ONNX.
"""

import argparse
import copy
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from crate_fast.env import provenance
from crate_fast.errors import UserError, require
from crate_fast.functional import fold_dictionary
from crate_fast.layers import ISTA, MSSA, ODL
from crate_fast.model import CRATE, resample_positions
from crate_fast.options import main_of
from crate_fast.whitebox import attention_layer, layer_numbers, visit_layers

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
OUTPUTS = ("logits", "features", "attention")
OPSET = 18  # of ONNX, the first that PyTorch's exporter writes without conversion

Exported = Callable[[Tensor], dict[str, Tensor]]


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


def _plain_copy(model: CRATE) -> CRATE:
    plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    for module in plain.modules():
        if isinstance(module, MSSA | ODL | ISTA):
            module.backend = "torch"
    return plain


def _read(model: CRATE, images: Tensor, outputs: Sequence[str], layers: Iterable[int]) -> dict[str, Tensor]:
    """Return the outputs of a model by name, for normalised images."""
    maps: list[Tensor] = []
    layers = layers if "attention" in outputs else ()
    tokens = visit_layers(model, images, lambda layer: maps.append(layer.cls_attention()), layers)
    read = {
        "logits": lambda: model.forward_head(tokens),
        "features": lambda: model.forward_head(tokens, pre_logits=True),
        "attention": lambda: torch.stack(maps, dim=1),
    }
    return {name: read[name]() for name in outputs}


class PortableCRATE(nn.Module):
    """Copy of a CRATE in fp32 on the CPU, in evaluation mode, for images of its current size.

    `forward` takes images [B, channels, height, width] and returns the chosen outputs by name, with the shapes in the
    module docstring.

    Args:
        model: The CRATE; it is not changed.
        outputs: Names from `OUTPUTS`; None means "logits", or "features" without a classifier.
        layers: Layers of "attention", negative ones from the end; None means the layer of the paper's figures
            (`whitebox.attention_layer`).
        statistics: (mean, deviation) of each channel. If given, `forward` takes uint8 images and normalises them;
            otherwise it takes normalised fp32 images.

    Raises:
        TypeError: The model is not a CRATE.
        UserError: The model has no such output or layer, or the statistics are of another number of channels.

    >>> model = CRATE(image_size=(8, 24), patch_size=4, num_classes=5, dim=8, depth=2, heads=2, dim_head=4)
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
        if not isinstance(model, CRATE):
            name = type(model).__name__
            raise TypeError(f"a {name} cannot be exported: pass a crate_fast.CRATE, or the encoder() of a CRATE-MAE")
        outputs = ["logits" if model.num_classes else "features"] if outputs is None else outputs
        if not outputs or set(outputs) - set(OUTPUTS):
            raise UserError(f"outputs={list(outputs)!r}: choose from {', '.join(OUTPUTS)}")
        if "logits" in outputs and not model.num_classes:
            raise UserError("outputs: this model has no classifier and no logits; request features [B, C] instead")
        self.outputs = tuple(name for name in OUTPUTS if name in outputs)
        self.layers = layer_numbers(model, [attention_layer(model)] if layers is None else layers)
        if not self.layers:
            raise UserError("layers=[]: pass at least one layer, or leave it out")
        self.raw = statistics is not None
        if self.raw:
            mean, deviation = (torch.tensor(values, dtype=torch.float32).flatten() for values in statistics)
            if not len(mean) == len(deviation) == model.channels or not (deviation > 0).all():
                raise UserError(
                    f"statistics={statistics}: give the mean and positive deviation of {model.channels} channels"
                )
            self.register_buffer("shift", (-mean / deviation).view(1, -1, 1, 1))
            self.register_buffer("scale", (1 / (255 * deviation)).view(1, -1, 1, 1))
        self.model = _plain_copy(model)
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if type(module) is ISTA:  # not one with a forward of its own
                self.model.set_submodule(name, _PortableISTA(module))
        if model.grid_size != model.native_grid:  # the graph holds positions of its image size
            positions = resample_positions(self.model.pos_embedding, model.native_grid, model.grid_size)
            self.model.pos_embedding, self.model.native_grid = nn.Parameter(positions, False), model.grid_size
        self.model.dynamic_img_size = False

    def normalize(self, images: Tensor) -> Tensor:
        """Return (x/255 − mean)/deviation of uint8 images; return other images unchanged."""
        return torch.addcmul(self.shift, images.float(), self.scale) if self.raw else images

    def examples(self, batch: int, seed: int = 0) -> Tensor:
        """Return random images that `forward` accepts."""
        shape, generator = (batch, self.model.channels, *self.model.image_size), torch.Generator().manual_seed(seed)
        if self.raw:
            return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return torch.randn(shape, generator=generator)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the chosen outputs by name."""
        return _read(self.model, self.normalize(images), self.outputs, self.layers)


# --- files ----------------------------------------------------------------------------------------------------------


def _write(program: ExportedProgram, outputs: Sequence[str], path: Path) -> None:
    if path.suffix == ".onnx":
        names = {"input_names": ["images"], "output_names": list(outputs)}
        written = torch.onnx.export(program, **names, opset_version=OPSET, dynamo=True, verbose=False)
        written.save(path, external_data=False)
        return
    content = io.BytesIO()  # on a full disk, PyTorch's own writer ends the process
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def open_exported(path: str | Path) -> Exported:
    """Return a function that runs an exported file on the CPU: images [B, channels, height, width] → outputs by name.

    Args:
        path: A `.onnx` file, run by onnxruntime, or a `.pt2` file, run by PyTorch.

    Raises:
        UserError: The file has another suffix, or onnxruntime is missing.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        return torch.no_grad()(torch.export.load(path).module())
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
def compare(run: Exported, model: CRATE, portable: PortableCRATE) -> dict[str, float]:
    """Compare an exported model with its source on random images, at two batch sizes other than the traced one.

    `run` is the result of `open_exported` for the file to which `portable` was written. Returns for each output the
    largest absolute difference, relative to the source's largest value; NaN if either contains NaN. Other names or
    shapes of outputs are a UserError.
    """
    model, found = _plain_copy(model), {name: [] for name in portable.outputs}
    for batch in (1, 3):
        images = portable.examples(batch, seed=batch)
        wanted, actual = _read(model, portable.normalize(images), portable.outputs, portable.layers), run(images)
        sizes, expected = ({name: tuple(v.shape) for name, v in values.items()} for values in (actual, wanted))
        if sizes != expected:
            raise UserError(f"{batch} images: the exported model returns {sizes} and the model {expected}")
        for name, values in wanted.items():
            difference = (actual[name] - values).abs().max()
            found[name].append(difference / values.abs().max() if difference != 0 else difference)
    return {name: torch.stack(differences).max().item() for name, differences in found.items()}


def export_model(
    model: CRATE,
    folder: str | Path,
    *,
    formats: Iterable[str] = tuple(FORMATS),
    outputs: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    raw: bool = False,
    tolerance: float = 1e-4,
    facts: dict | None = None,
) -> list[Path]:
    """Write model.onnx, model.pt2 and model.json into a folder.

    Each file is first written to a hidden folder and compared with the model (`compare`). The files are moved to the
    folder after all comparisons.

    Args:
        model: The CRATE; it is not changed. The files accept images of its current size.
        folder: Output folder; created if missing.
        formats: "onnx", "torch", or both.
        outputs, layers: See `PortableCRATE`.
        statistics: (mean, deviation) of each channel for normalised images.
        raw: True for a graph that takes uint8 images and normalises them by `statistics`.
        tolerance: Largest difference allowed, relative to the largest absolute value of the output.
        facts: Plain values to store in model.json, such as the model's name.

    Returns:
        The files.

    Raises:
        TypeError: The model is not a CRATE.
        UserError: An option is wrong, a package that ONNX needs is missing, or an exported model differs from the
            model by more than the tolerance.
    """
    folder, formats = Path(folder), list(formats)
    if not formats or set(formats) - set(FORMATS):
        raise UserError(f"formats={formats!r}: choose from {', '.join(FORMATS)}")
    if "onnx" in formats:
        require("onnx", "onnxscript", "onnxruntime")
    if not tolerance > 0:
        raise UserError(f"tolerance={tolerance}: give a positive number, such as 1e-4")
    if raw and statistics is None:
        raise UserError("raw=True: give the statistics, (mean, deviation) of each channel")
    portable = PortableCRATE(model, outputs, layers, statistics if raw else None)
    batch = {"images": {0: Dim("batch", min=1)}}
    with torch.no_grad():
        program = torch.export.export(portable, (portable.examples(2),), dynamic_shapes=batch)
    folder.mkdir(parents=True, exist_ok=True)
    names, differences = [FORMATS[name] for name in FORMATS if name in formats], {}
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as hidden:
        unchecked = Path(hidden)
        for name in names:
            _write(program, portable.outputs, unchecked / name)
            differences[name] = compare(open_exported(unchecked / name), model, portable)
            for output, difference in differences[name].items():
                if not difference <= tolerance:
                    raise UserError(
                        f"{name}: {output} differs from the model's by {difference:.1e} of its largest value; the "
                        f"tolerance is {tolerance:g}. Nothing was written; to accept this, pass a larger tolerance"
                    )
        facts = (facts or {}) | _facts(portable, statistics) | {"differences": differences}
        (unchecked / "model.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        for name in (*names, "model.json"):
            (unchecked / name).replace(folder / name)
    return [folder / name for name in (*names, "model.json")]


def _facts(portable: PortableCRATE, statistics: tuple | None) -> dict:
    """Return the facts about the model that the users of the files need."""
    facts = {
        "input": "images, uint8 0 to 255" if portable.raw else "images, float32, normalised",
        "outputs": list(portable.outputs),
        "image_size": list(portable.model.image_size),
        "patch_size": list(portable.model.patch_size),
        "channels": portable.model.channels,
    }
    if "attention" in portable.outputs:
        facts["layers"] = list(portable.layers)
    if statistics is not None:
        facts["mean"], facts["std"] = ([float(value) for value in values] for values in statistics)
    origin = provenance()  # the files are shared: omit command line and machine
    return facts | {name: origin[name] for name in ("crate_fast", "commit", "torch", "time")}


# --- the command ----------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> None:
    from crate_fast.eval.common.models import check_model_args, open_model
    from crate_fast.eval.common.results import file_name, make_folder

    loaded = open_model(options.model, "cpu", options.image_size, options.model_args, options.seed)
    check_model_args(options.model_args, [loaded])
    if not isinstance(loaded.model, CRATE):
        raise UserError(
            f"{loaded.facts['model']} is a {type(loaded.model).__name__} of timm: crate-fast exports CRATE, its "
            "ablations and the encoders of CRATE-MAE; choose one of those"
        )
    if options.layers is not None and "attention" not in (options.outputs or ()):
        raise UserError("--layers chooses layers of attention: add attention to --outputs")
    depth = loaded.extract.depth
    facts = {name: loaded.facts[name] for name in ("model", "weights_sha256", "parameters")}
    classes = loaded.classes if loaded.model.num_classes else None
    written = export_model(
        loaded.model,
        make_folder(options.output or Path("runs/export") / file_name(options.model)),
        formats=options.format,
        outputs=options.outputs,
        layers=range(depth) if options.layers == "all" else options.layers,
        statistics=loaded.normalize.statistics,
        raw=options.input == "uint8",
        tolerance=options.tolerance,
        facts=facts if classes is None else facts | {"classes": classes},
    )
    print("written:", *map(str, written), sep="\n  ")


main = main_of("export", _export)
