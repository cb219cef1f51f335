"""Write a model as ONNX and as a torch.export program, after a comparison with PyTorch.

    crate-fast export runs/NAME                                             runs/export/NAME/model.onnx, .pt2, .json
    crate-fast export runs/NAME --outputs logits,attention --layers 9,10    also attention of CLS in two layers
    crate-fast export runs/NAME --input uint8                               images 0 to 255, normalised in the graph

Outputs: logits [B, classes]; features [B, C], what the classifier reads; attention [B, L, H, P], of CLS on patches,
of the chosen layers; subspace_tokens [B, L, 1 + P, H, D]. Batch and image size are free: from two by two patches on,
sides that are multiples of the patch size.

The exporter is `crate_fast.export`; the command lies here because it names models as the protocols do.
"""

import argparse
import sys
from pathlib import Path

from crate_fast import CRATE
from crate_fast.errors import CommandParser, UserError, run_command
from crate_fast.eval.common import models as models_module
from crate_fast.eval.common.command import positive, seed
from crate_fast.eval.common.models import class_names, open_model
from crate_fast.eval.common.results import file_name, make_folder
from crate_fast.export import FORMATS, MIN_OPSET, export_model
from crate_fast.portable import OUTPUTS
from crate_fast.train.transforms import Normalize

__all__ = ["main"]


def _words(text: str) -> list[str]:
    return text.split(",")


def _layers(text: str) -> list[int] | str:
    return text if text == "all" else [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="crate-fast export",
        description=__doc__.rpartition("\n\n")[0],
        epilog="How to name models:\n\n" + models_module.__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="see below")
    add("--output", type=Path, help="folder of the files; default runs/export/MODEL")
    add("--format", type=_words, default=list(FORMATS), help="onnx, torch, or onnx,torch (default)")
    add("--outputs", type=_words, help=f"of {', '.join(OUTPUTS)}; default logits (features without a classifier)")
    add("--layers", type=_layers, help="all, or numbers such as 9,10; default the one that the paper looks at")
    add("--input", choices=("float", "uint8"), default="float", help="normalised (default), or 0 to 255")
    add("--image-size", type=positive, help="size that is recorded and compared first; default the model's own")
    add("--opset", type=int, default=MIN_OPSET, help="version of ONNX's operators; default %(default)s")
    add("--tolerance", type=float, default=1e-4, help="largest difference, of the largest value; default %(default)s")
    add("--seed", type=seed, default=0, help="of untrained weights; default 0")
    add("--model-args", nargs="+", metavar="KEY=VALUE", help="for models that timm builds")
    return parser


def _statistics(normalize: Normalize) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the three channels."""
    deviation = 1 / (255 * normalize.scale.double().flatten())
    mean = -normalize.shift.double().flatten() * deviation
    return [round(value, 6) for value in mean.tolist()], [round(value, 6) for value in deviation.tolist()]


def _export(options: argparse.Namespace) -> None:
    loaded = open_model(options.model, "cpu", options.image_size, options.model_args, options.seed)
    if options.model_args and loaded.config is not None:
        raise UserError(f"--model-args {' '.join(options.model_args)}: a run knows its own model; leave them out")
    if not isinstance(loaded.model, CRATE):
        raise UserError(
            f"{loaded.facts['model']} is a {type(loaded.model).__name__} of timm: crate-fast exports CRATE, its "
            "ablations and the encoders of CRATE-MAE; name one of those"
        )
    facts = {name: loaded.facts[name] for name in ("model", "weights_sha256", "parameters")}
    classes = class_names(options.model) if loaded.model.num_classes else None
    written = export_model(
        loaded.model,
        make_folder(options.output or Path("runs/export") / file_name(loaded.label)),
        formats=options.format,
        outputs=options.outputs,
        layers=range(loaded.extract.depth) if options.layers == "all" else options.layers,
        statistics=_statistics(loaded.normalize),
        raw=options.input == "uint8",
        opset=options.opset,
        tolerance=options.tolerance,
        facts=facts if classes is None else facts | {"classes": classes},
        say=print,
    )
    print("written:", *map(str, written), sep="\n  ")


def main(argv: list[str] | None = None) -> int:
    """Export a model; the exit status is 2 if it cannot be exported or differs."""
    return run_command(lambda: _export(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
