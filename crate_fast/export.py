"""Write a CRATE as a torch.export program (`.pt2`) and as ONNX; what is written is compared with the model first.

    from crate_fast.export import export_model
    export_model(model, "exported", outputs=["logits", "attention"])    # exported/model.onnx, .pt2 and .json

Both take any batch, and images of any size from two by two patches on that the patch size divides. Both run without
crate_fast: the `.pt2` holds PyTorch's operators alone (`portable.py`), the ONNX file standard ones.
"""

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from crate_fast.env import provenance
from crate_fast.errors import UserError, require
from crate_fast.exported import Difference, compare, open_exported
from crate_fast.model import CRATE
from crate_fast.portable import PortableCRATE

__all__ = ["FORMATS", "MismatchError", "capture", "export_model", "write_onnx", "write_torch"]

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
MIN_OPSET = 18  # the first that PyTorch's exporter writes without converting
FACTS_FILE = "crate_fast.json"  # inside a .pt2


class MismatchError(UserError):
    """What was written does not compute what the model computes."""


def capture(portable: PortableCRATE) -> ExportedProgram:
    """The graph of a portable model, for every batch and every image from two by two patches on."""
    height, width = portable.patch_size
    rows, columns = Dim("rows", min=2), Dim("columns", min=2)
    sizes = {0: Dim("batch", min=1), 2: height * rows, 3: width * columns}
    dtype = torch.uint8 if portable.raw else torch.float32
    images = torch.zeros(2, portable.channels, 3 * height, 4 * width, dtype=dtype)
    with torch.no_grad():
        return torch.export.export(portable, (images,), dynamic_shapes={"images": sizes})


def write_torch(program: ExportedProgram, path: str | Path, facts: dict | None = None) -> None:
    """Save a program for `torch.export.load`, which needs no crate_fast.

    Args:
        program: From `capture`.
        path: Ends in .pt2.
        facts: Plain values, kept inside as crate_fast.json (`torch.export.load(path, extra_files=…)`).
    """
    content = io.BytesIO()  # PyTorch's own writing to a full disk ends the process
    torch.export.save(program, content, extra_files={FACTS_FILE: json.dumps(facts or {}, ensure_ascii=False)})
    Path(path).write_bytes(content.getbuffer())


def write_onnx(
    program: ExportedProgram,
    outputs: Sequence[str],
    path: str | Path,
    facts: dict | None = None,
    opset: int = MIN_OPSET,
) -> None:
    """Save a program as ONNX, in one file.

    Args:
        program: From `capture`.
        outputs: Names of its outputs.
        path: Of the file.
        facts: Plain values, kept as the file's metadata; those that are no strings as JSON.
        opset: Version of ONNX's operators, 18 or newer.

    Raises:
        UserError: onnx or onnxscript is missing.
        UserError: The opset is too old, or newer than the installed onnx.
    """
    require("onnx", "onnxscript")
    _check_opset(opset)
    written = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=list(outputs),
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    for name, value in (facts or {}).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        written.model.metadata_props[name] = text
    written.save(path, external_data=False)


def _check_opset(opset: int) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise UserError(
            f"opset={opset}: give one from {MIN_OPSET} to {newest}, the newest that the installed onnx has"
        )


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
    """Write model.onnx and model.pt2 into a folder, with model.json beside them, once each equals the model.

    Each file is written under another name, run (by onnxruntime, or by PyTorch after loading it) on random images
    of three batch and image sizes that the export did not see, and compared with the model. Files come to their
    places together, after all comparisons; before, the folder is as it was.

    Args:
        model: The CRATE; it stays as it is.
        folder: Made if it is not there.
        formats: "onnx", "torch", or both.
        outputs, layers: See `portable.choose_outputs`.
        statistics: (mean, deviation) of each channel, which the images are to be normalised by.
        raw: Take uint8 images and normalise them inside, by `statistics`.
        opset: See `write_onnx`.
        tolerance: The largest difference allowed, over the largest absolute value of the output.
        facts: Plain values that are recorded with the files, such as the model's name.
        say: Told of every comparison, in a line.

    Returns:
        The files.

    Raises:
        TypeError: The model is no CRATE.
        UserError: An option is wrong; the message names it.
        MismatchError: An exported model differs from the model by more than the tolerance.
        UserError: A package that ONNX needs is missing.
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
                write_onnx(program, portable.outputs, unchecked / name, facts, opset)
            else:
                write_torch(program, unchecked / name, facts)
            found = compare(open_exported(unchecked / name), model, portable)
            differences[name] = _check(name, found, tolerance, say)
        text = json.dumps(facts | {"differences": differences}, indent=2, ensure_ascii=False)
        (unchecked / "model.json").write_text(text + "\n")
        for name in (*names, "model.json"):
            (unchecked / name).replace(folder / name)
    return [folder / name for name in (*names, "model.json")]


def _check_formats(formats: list[str], opset: int) -> None:
    """Refuse what cannot be written, before anything is computed."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"formats={formats!r}: choose from {', '.join(FORMATS)}")
    if "onnx" in formats:
        require("onnx", "onnxscript", "onnxruntime")
        _check_opset(opset)


def _facts(model: CRATE, portable: PortableCRATE, statistics: tuple | None) -> dict:
    """What somebody who has the files alone must know to use them."""
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
    origin = provenance()  # without command line and machine: these files are given away
    return facts | {name: origin[name] for name in ("crate_fast", "commit", "torch", "time")}


def _check(name: str, differences: list[Difference], tolerance: float, say: Callable[[str], None]) -> list[dict]:
    """Report comparisons, and return them as plain values; a MismatchError if one is beyond the tolerance, or NaN."""
    for d in differences:
        images = "×".join(map(str, d.images))
        values = f"{d.absolute:.1e}, of values up to {d.largest:.3g}"
        say(f"{name}  {d.output}, images {images}: largest difference {values}")
        if not d.relative <= tolerance:
            raise MismatchError(
                f"{name}: {d.output} of images {images} differs from the model's by {values}; {tolerance:g} of those "
                "is allowed (tolerance). Nothing was written"
            )
    return [asdict(d) for d in differences]
