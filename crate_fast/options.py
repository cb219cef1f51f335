"""Options of the commands, except the training settings (train/config.py).

The modules of the commands import PyTorch, which takes seconds. This module does not: `crate-fast` parses a command
line here before it imports the command, so `--help` and errors in the command line are immediate.
"""

import argparse
import ast
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from crate_fast.errors import CommandParser, run_command

PLAIN = argparse.RawDescriptionHelpFormatter
PORT = 7470  # of the explorer
_LAYER = "layer, from 0; default the last but one with MSSA, else the last"


# --- types of values, for argparse


def _integer(text: str, low: int, high: float, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not low <= value < high:
        raise argparse.ArgumentTypeError(f"{text}: give {expected}")
    return value


def positive(text: str) -> int:
    """Parse a positive integer."""
    return _integer(text, 1, float("inf"), "a positive integer")


def rate(text: str) -> float:
    """Parse a positive number, which may have commas between thousands."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a positive number")
    return value


def seed(text: str) -> int:
    """Parse a seed."""
    return _integer(text, 0, 2**63, f"an integer from 0 to {2**63 - 1}")


def _not_negative(text: str) -> int:
    return _integer(text, 0, float("inf"), "0 or a positive integer")


def comma_list(parse: Callable[[str], Any], *words: str) -> Callable[[str], list | str]:
    """Return a parser of comma-separated values, which also accepts one of `words`."""

    def comma_separated(text: str) -> list | str:
        try:
            return text if text in words else [parse(word) for word in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: give numbers with commas, such as 1,2") from error

    return comma_separated


def _head(word: str) -> int | str:
    if word not in ("all", "mean", "best") and not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word}: write numbers, all, mean or best, with commas, such as 0,3,mean")
    return int(word) if word.isdigit() else word


def _ratio(word: str) -> float:
    if not 0 < float(word) < 1:
        raise argparse.ArgumentTypeError(f"{float(word)}: a mask ratio is above 0 and below 1")
    return float(word)


def _text_of(module: str) -> str:
    """Return the docstring of a module without importing it."""
    return ast.get_docstring(ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")))


def _parser(command: str, description: str, epilog: str | None = None) -> CommandParser:
    """Return a parser without options; the line breaks of both texts are kept."""
    return CommandParser(prog=f"crate-fast {command}", description=description, epilog=epilog, formatter_class=PLAIN)


def _how_to_name_models() -> str:
    return "How to name models:\n\n" + _text_of("crate_fast.eval.common.models").split("\n\n", 1)[1]


# --- evaluation protocols


def _evaluation(
    protocol: str,
    *,
    data: str | Literal[False] | None = None,
    many: bool = True,
    image_size: int | None = None,
    limit: int | None = None,
) -> argparse.ArgumentParser:
    """Return a parser with the options of every protocol: models, data, size, limit, device, output.

    `data`, `image_size` and `limit` are defaults of the options. Without a default, `--data` is required; data=False
    omits `--data` and `--limit`, for a protocol with its own data options. `many` accepts several models.
    """
    epilog = _how_to_name_models()
    if data is not False:
        epilog += "\nand data:\n\n" + _text_of("crate_fast.eval.common.images").split("\n\n", 1)[1]
    parser = _parser(f"eval {protocol}", _text_of(f"crate_fast.eval.{protocol}").splitlines()[0], epilog)
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+" if many else 1, help="see below")
    if data is not False:
        add("--data", default=data, required=data is None, help="see below")
        add(
            "--limit",
            type=positive,
            default=limit,
            help=f"only the first images by path; default {limit or 'all; of shape_scenes 500'}",
        )
    side = "height and width of the images in pixels; default " + str(image_size or "the model's own")
    add("--image-size", type=positive, default=image_size, help=side)
    add("--batch-size", type=positive, default=8, help="images per forward pass; default %(default)s")
    add("--workers", type=_not_negative, default=0, help="worker processes that read images; default 0: none")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; default auto")
    add("--seed", type=seed, default=0, help="seed of every random draw; default 0")
    add("--model-args", nargs="+", metavar="KEY=VALUE", help="arguments of models that timm builds")
    add("--output", type=Path, help=f"folder of the results; default runs/eval/{protocol}/MODELS/OPTIONS")
    return parser


def _attention_maps() -> argparse.ArgumentParser:
    parser = _evaluation("attention_maps", limit=8)
    add = parser.add_argument
    figures = ("heads", "semantic", "noise_sigma", "noise_share", "models")
    add("--figure", choices=figures, default="heads", help="rows and columns of the figure; default heads")
    add("--layer", type=int, help=_LAYER)
    add("--heads", type=comma_list(_head), help="such as 0,3,mean; also all, and best (by the objects' masks)")
    add("--style", choices=("map", "overlay"), default="map", help="overlay draws it over the image; default map")
    return parser


def _pca() -> argparse.ArgumentParser:
    parser = _evaluation("pca", limit=8)
    add = parser.add_argument
    layers = "all, or numbers such as 0,3,6; default each model's own layer"
    add("--layers", type=comma_list(int, "all"), help=layers)
    add("--components", choices=("1-3", "2-4"), default="1-3", help="shown in red, green and blue; default 1-3")
    add("--threshold", type=float, default=0.5, help="threshold λ of the first component; default 0.5")
    add("--class", dest="class_name", metavar="NAME", help="only images that contain this class")
    return parser


def _coarse_segmentation() -> argparse.ArgumentParser:
    parser = _evaluation("coarse_segmentation", data="shape_scenes")
    add = parser.add_argument
    add("--layers", type=int, nargs="+", help="layers whose attention is scored; default all")
    add("--fraction", type=float, default=0.6, help="share of entries or mass in a mask; default 0.6")
    add("--figure-images", type=positive, default=6, help="images in the figures; default 6")
    return parser


def _localization() -> argparse.ArgumentParser:
    parser = _evaluation("localization", data="shape_scenes")
    add = parser.add_argument
    add("--boxes", type=Path, help="COCO JSON with a bbox per annotation, or a folder of ImageNet's XML files")
    add("--layers", type=int, nargs="+", help="layers whose attention is scored; default all")
    add("--figure-images", type=positive, default=6, help="images in the figure; default 6")
    return parser


def _maskcut() -> argparse.ArgumentParser:
    parser = _evaluation("maskcut", many=False, image_size=480)
    add = parser.add_argument
    add("--layer", type=int, help=_LAYER)
    add("--num-objects", type=positive, default=3, help="maximum number of objects per image; default 3")
    add("--tau", type=float, default=0.15, help="patches are linked above this cosine; default 0.15")
    add("--figure-images", type=positive, default=12, help="images in the figure; default 12")
    return parser


def _add_measures(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    measures = "default all that the data has masks for"
    parser.add_argument("--measures", nargs="+", choices=("maskcut", "coarse"), help=measures)
    return parser


def _by_layer() -> argparse.ArgumentParser:
    return _add_measures(_evaluation("by_layer", image_size=480))


def _by_epoch() -> argparse.ArgumentParser:
    parser = _add_measures(_evaluation("by_epoch", many=False, image_size=480))
    parser.add_argument("--layer", type=int, help=_LAYER)
    parser.add_argument("--steps", type=int, nargs="+", help="steps of the checkpoints; default all")
    return parser


def _comparison() -> argparse.ArgumentParser:
    parser = _evaluation("comparison", data=False)
    add = parser.add_argument
    add("--limit", type=positive, help="number of images of each data set; default all")
    add("--table", choices=("figure4", "table1", "table2"), required=True, help="figure or table of the paper")
    add("--coco", help="images for MaskCut, at --image-size, such as coco:PATH")
    add("--voc", help="images for coarse segmentation, such as voc:PATH")
    add("--voc-size", type=positive, help="size of the images of --voc in pixels; default the model's own")
    add("--layer", type=int, help="layer of every model; default each model's own")
    return parser


def _white_box() -> argparse.ArgumentParser:
    parser = _evaluation("white_box", data="shape_scenes")
    parser.add_argument("--epsilon", type=float, default=0.01, help="quantisation precision ε of R^c; default 0.01")
    return parser


def _reconstruction() -> argparse.ArgumentParser:
    parser = _evaluation("reconstruction", limit=64)
    add = parser.add_argument
    add("--ratios", type=comma_list(_ratio), default=[0.5, 0.75, 0.9], help="mask ratios; default 0.5,0.75,0.9")
    add("--show", type=positive, default=8, help="images in the figure; default %(default)s")
    return parser


def _classify() -> argparse.ArgumentParser:
    parser = _evaluation("classify", data=False)
    parser.set_defaults(batch_size=64)
    add = parser.add_argument
    add("--protocol", help="some of head,knn,linear; default head, or knn without a head")
    add("--dataset", help="as in training: shape_scenes, folder, tar, shards, …; default the run's own")
    add("--data-dir", help="folder of the data set")
    add("--download", action="store_true", help="allow downloads, and names of data sets on the Hugging Face Hub")
    add("--train-split", help="name of the training split of folder, tar, shards, hf")
    add("--val-split", help="name of the validation split of these")
    add("--train-samples", type=positive, help="number of training images of shape_scenes")
    add("--val-samples", type=positive, help="number of validation images of shape_scenes")
    add("--limit", type=positive, help="validation images, evenly spaced; default all")
    add("--train-limit", type=positive, help="training images, evenly spaced; default all")
    add("--k", type=comma_list(positive), help="neighbours; default 10,20,100,200, up to the number of images")
    pool = "features: CLS, or the mean of the patches; default the model's own"
    add("--pool", choices=("cls", "mean"), help=pool)
    add("--raw-pixels", action="store_true", help="also score images of 16×16 pixels as a baseline")
    return parser


# --- the other commands


def _env() -> argparse.ArgumentParser:
    return _parser("env", "Versions, devices and backends of this machine.")


def _check() -> argparse.ArgumentParser:
    parser = _parser("check", _text_of("crate_fast.check"))
    add = parser.add_argument
    add("--json", type=Path, default=Path("crate_fast_check.json"), metavar="FILE", help="report to write")
    add("--interpreter", action="store_true", help="run tiny probes in Triton's interpreter, without a GPU")
    add("--all", action="store_true", help="run all probes instead of the most important ones")
    add("--probes", nargs="+", metavar="NAME", help="run only these (python -m crate_fast.probes --list)")
    return parser


def _explore() -> argparse.ArgumentParser:
    text = _text_of("crate_fast.eval.explore.command").split("\n\n")[0]
    parser = _parser("explore", text, _how_to_name_models())
    add = parser.add_argument
    add("--checkpoint", nargs="+", metavar="MODEL", help="see below; default the newest run in runs/")
    add("--images", type=Path, metavar="DIR", help="a folder of images; default photographs and shape_scenes")
    add("--image-size", type=positive, help="square size of the images in pixels; default the model's own")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; default auto")
    add("--seed", type=seed, default=0, help="seed of untrained models; default 0")
    add("--model-args", nargs="+", metavar="KEY=VALUE", help="arguments of models that timm builds")
    add("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this computer")
    add("--port", type=positive, help=f"port; default {PORT}, or the next free one")
    add("--no-browser", action="store_true", help="only print the address")
    return parser


def _export() -> argparse.ArgumentParser:
    text = _text_of("crate_fast.export").partition("\n\n    from")[0]
    parser = _parser("export", text, _how_to_name_models())
    add, layers = parser.add_argument, "all, or numbers such as 9,10; default the layer of the paper's figures"
    outputs = "some of logits,features,attention; default logits (features without a classifier)"
    add("model", metavar="MODEL", help="see below")
    add("--output", type=Path, help="folder of the files; default runs/export/MODEL")
    add("--format", type=comma_list(str), default=["onnx", "torch"], help="onnx, torch, or onnx,torch (default)")
    add("--outputs", type=comma_list(str), help=outputs)
    add("--layers", type=comma_list(int, "all"), help=layers)
    add("--input", choices=("float", "uint8"), default="float", help="normalised (default), or bytes from 0 to 255")
    add("--image-size", type=positive, help="square size of the images in pixels; default the model's own")
    add("--tolerance", type=float, default=1e-4, help="allowed difference / largest value; default %(default)s")
    add("--seed", type=seed, default=0, help="seed of untrained weights; default 0")
    add("--model-args", nargs="+", metavar="KEY=VALUE", help="arguments of models that timm builds")
    return parser


def _share() -> argparse.ArgumentParser:
    parser = _parser("share", "Write a run's best model for timm and the Hub.")
    add = parser.add_argument
    add("run", type=Path, help="folder of the run")
    add("folder", type=Path, help="folder to write")
    add("--description", help="short description of the model, for the card and the explorer")
    add("--image-size", type=positive, help="interpolate the positions to this image size; default no")
    add("--license", default="other", help="license of the weights, by its name on the Hub; default other")
    add("--half", action="store_true", help="write the weights in half precision")
    add("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face Hub, for everyone to read")
    add("--private", action="store_true", help="with --push: for you only")
    return parser


def _emergence() -> argparse.ArgumentParser:
    text = (
        "Does segmentation appear in CRATE and not in a ViT, trained on photographs? The protocol is\n"
        "docs/emergence/photographs/protocol.md. The same command resumes a stopped or killed experiment."
    )
    parser = _parser("reproduce emergence", text)
    add = parser.add_argument
    sizes = "smoke: 16 epochs of DIR by tiny models; small: more than a day on two CPU cores; full: a GPU"
    add("--size", choices=("smoke", "small", "full"), required=True, help=sizes)
    add("--data", metavar="DIR", help="folder of photographs with train and val; not needed with --report-only")
    add("--boxes", type=Path, help="boxes of DIR/val: COCO's JSON or a folder of XML; default DIR/val_boxes.json")
    add("--masks", metavar="coco:DIR[:SPLIT]", help="photographs with masks, for MaskCut and coarse segmentation")
    add("--output", type=Path, help="folder of the runs; default runs/emergence/photographs-SIZE")
    add("--report", type=Path, help="folder of results, pictures and report; default OUTPUT/report")
    add("--report-only", action="store_true", help="only write the report again, from its folder")
    models = ("CRATE", "CRATE-MLP", "CRATE-MHSA", "ViT", "CRATE-alpha")
    add("--models", nargs="+", choices=models, metavar="MODEL", help=f"train only these, of {', '.join(models)}")
    add("--seeds", type=seed, nargs="+", help="train only with these seeds; default the protocol's")
    add("--jobs", type=positive, help="parallel runs; default one per CPU core, or four per GPU")
    add("--minutes", type=float, help="save and stop after this time")
    add("--device", default="auto", help="auto, cpu, cuda (all GPUs) or cuda:N; default auto")
    return parser


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {  # command: its parser
    "env": _env,
    "check": _check,
    "explore": _explore,
    "export": _export,
    "share": _share,
    "reproduce emergence": _emergence,
    "eval attention_maps": _attention_maps,
    "eval pca": _pca,
    "eval coarse_segmentation": _coarse_segmentation,
    "eval localization": _localization,
    "eval maskcut": _maskcut,
    "eval by_layer": _by_layer,
    "eval by_epoch": _by_epoch,
    "eval comparison": _comparison,
    "eval white_box": _white_box,
    "eval reconstruction": _reconstruction,
    "eval classify": _classify,
}


def parse(command: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options of a command, a key of `PARSERS`, from `argv` or the process's command line."""
    return PARSERS[command]().parse_args(argv)


def main_of(command: str, run: Callable[[argparse.Namespace], int | None]) -> Callable[..., int]:
    """Return the `main` of a command, a key of `PARSERS`: it calls `run` with the parsed options."""

    def main(argv: list[str] | None = None) -> int:
        """Run with the options in `argv` or the command line; return the exit status, 2 after an error."""
        return run_command(lambda: run(parse(command, argv)))

    return main
