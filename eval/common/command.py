"""The command line that the protocols share."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch.nn.functional as F

from crate_fast.errors import CommandParser, UserError
from crate_fast.eval.common import images as images_module
from crate_fast.eval.common import models as models_module
from crate_fast.eval.common.figures import Picture
from crate_fast.eval.common.images import Batch, Sample, batches, open_images
from crate_fast.eval.common.models import Subject, open_model, split_label
from crate_fast.eval.common.results import file_name, make_folder
from crate_fast.train.distributed import choose_device

__all__ = [
    "evaluation_parser",
    "first_columns",
    "model_folders",
    "open_models",
    "output_folder",
    "positive",
    "read_images",
    "seed",
    "settings_of",
    "short_name",
]


def positive(text: str) -> int:
    """argparse's type of a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give a positive integer")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}: give 0 or a positive integer")
    return value


def seed(text: str) -> int:
    """argparse's type of a seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value}: give an integer from 0 to {2**63 - 1}")
    return value


def evaluation_parser(
    protocol: str,
    description: str,
    *,
    data: str | Literal[False] | None = None,
    many: bool = True,
    image_size: int | None = None,
    limit: int | None = None,
) -> argparse.ArgumentParser:
    """A parser with what every protocol takes: models, data, size, limit, device, output.

    Args:
        protocol: Its name on the command line.
        description: What it does, in a sentence.
        data: Default of `--data`; None makes it required; False leaves out `--data` and `--limit`, for a protocol
            that opens its data some other way.
        many: Whether it takes several models.
        image_size: Default of `--image-size`; None is the model's own.
        limit: Default of `--limit`; None is all images.
    """
    parser = CommandParser(
        prog=f"crate-fast eval {protocol}",
        description=description,
        epilog="How to name models:\n\n"
        + models_module.__doc__.split("\n\n", 1)[1]
        + ("" if data is False else "\nand data:\n\n" + images_module.__doc__.split("\n\n", 1)[1]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plural = {"nargs": "+", "metavar": "MODEL"} if many else {"metavar": "MODEL"}
    parser.add_argument("models" if many else "model", **plural, help="see below")
    if data is not False:
        parser.add_argument("--data", default=data, required=data is None, help="see below")
        limit_help = f"take the first so many images; default {limit or 'all'}"
        parser.add_argument("--limit", type=positive, default=limit, help=limit_help)
    size_help = "side to which images are squashed, in pixels; default " + str(image_size or "the model's own")
    parser.add_argument("--image-size", type=positive, default=image_size, help=size_help)
    parser.add_argument("--batch-size", type=positive, default=8, help="images per forward pass; default %(default)s")
    parser.add_argument(
        "--workers", type=_not_negative, default=0, help="processes that read images; default 0: none"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default auto")
    parser.add_argument("--seed", type=seed, default=0, help="of everything drawn; default 0")
    parser.add_argument("--model-args", nargs="+", metavar="KEY=VALUE", help="for models that timm builds")
    parser.add_argument("--output", type=Path, help=f"folder of the results; default runs/eval/{protocol}/MODELS")
    return parser


def open_models(options: argparse.Namespace) -> list[Subject]:
    """Every model that the command names.

    Raises:
        UserError: Two have the same label, or one cannot be opened; see `models.open_model`.
    """
    names = options.models if hasattr(options, "models") else [options.model]
    device = choose_device(options.device)
    options.device = str(device)
    subjects = [open_model(name, device, options.image_size, options.model_args, options.seed) for name in names]
    if options.model_args and all(subject.config is not None for subject in subjects):
        raise UserError(f"--model-args {' '.join(options.model_args)}: a run knows its own model; leave them out")
    labels = [subject.label for subject in subjects]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise UserError(f"two models are called {sorted(twice)[0]!r}: give each a name, as in NAME=MODEL")
    return subjects


def output_folder(options: argparse.Namespace, protocol: str) -> Path:
    """`--output`, or a folder named after the protocol and the models; made at once, before anything is computed.

    Raises:
        UserError: It cannot be made.
    """
    names = options.models if hasattr(options, "models") else [options.model]
    words = [file_name(split_label(name)[0]) for name in names]
    return make_folder(options.output or Path("runs/eval") / protocol / "+".join(words)[:120])


def settings_of(options: argparse.Namespace) -> dict:
    """Every setting of a command line, for results.json."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def read_images(
    subject: Subject,
    options: argparse.Namespace,
    problems: list[str],
    kept: list[Sample],
    containing: str | None = None,
) -> Iterator[Batch]:
    """The images of `--data` at a model's size, batch by batch, with a progress bar.

    Args:
        subject: The model.
        options: Of a parser made by `options.evaluation_parser`.
        problems: Filled with what could not be read.
        kept: Filled with the samples, for the figures.
        containing: Take only images in which a class of this name occurs; `--limit` counts these.

    Raises:
        UserError: No class has that name, or none of the images contains it.
    """
    images = open_images(options.data, subject.extract.image_size[0], None if containing else options.limit)
    number = None if containing is None else _class_number(images.class_names(), containing)
    for batch in batches(
        images, options.batch_size, problems, workers=options.workers, progress=f"reading for {subject.label}"
    ):
        if number is not None:
            rows = [row for row, sample in enumerate(batch.samples) if number in sample.target.classes]
            rows = rows[: None if options.limit is None else options.limit - len(kept)]
            batch = Batch(batch.images[rows], [batch.samples[row] for row in rows])
        if batch.samples:
            kept.extend(batch.samples)
            yield batch
        if number is not None and len(kept) == options.limit:
            break
    if not kept:
        raise UserError(f"--class {containing}: none of the {len(images)} images contains it; choose another")


def _class_number(names: dict[int, str], wanted: str) -> int:
    found = [number for number, name in names.items() if name == wanted]
    if not found:
        known = f"it has {', '.join(names.values())}" if names else "it has no object masks"
        raise UserError(f"--class {wanted!r}: the data set has no such class; {known}")
    return found[0]


def short_name(sample: Sample, longest: int = 16) -> str:
    """A sample's key, its beginning cut off where it is long."""
    name = str(sample.key)
    return name if len(name) <= longest else "…" + name[1 - longest :]


def first_columns(samples: Sequence[Sample]) -> tuple[list[list[Picture]], list[str]]:
    """A row for each sample with its image and, where object masks are known, their union; and the titles."""
    rows, labelled = [], any(sample.target is not None for sample in samples)
    for sample in samples:
        row = [Picture(sample.image.permute(1, 2, 0).numpy())]
        if labelled:
            union = sample.target.masks.any(dim=0)[None, None].float()
            row.append(Picture(F.interpolate(union, sample.image.shape[1:])[0, 0].numpy(), "gray", (0, 1)))
        rows.append(row)
    return rows, ["image", "object"] if labelled else ["image"]


def model_folders(output: Path, subjects: Sequence[Subject]) -> list[Path]:
    """Where each model's own files go: the output folder for one model, folders named after them for several."""
    if len(subjects) == 1:
        return [output]
    return [output / file_name(subject.label) for subject in subjects]
