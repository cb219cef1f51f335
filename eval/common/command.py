"""Models, images and output files of the protocols' commands. The options are in crate_fast/options.py."""

import argparse
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from crate_fast.env import provenance
from crate_fast.errors import UserError
from crate_fast.eval.common import results as files
from crate_fast.eval.common.images import Batch, Sample, batches, open_images
from crate_fast.eval.common.models import LoadedModel, check_labels, check_model_args, open_model
from crate_fast.options import PARSERS
from crate_fast.train.checkpoint import write_text
from crate_fast.train.data.image_files import as_text
from crate_fast.train.distributed import choose_device

_NOT_NAMED = ("models", "output", "device", "batch_size", "workers")  # options that are no part of a folder's name


def open_models(options: argparse.Namespace) -> list[LoadedModel]:
    """Open every model that the command names."""
    check_labels(options.models)  # raises for equal labels before a model is opened
    device = choose_device(options.device)
    options.device = str(device)
    settings = (device, options.image_size, options.model_args, options.seed)
    models = [open_model(name, *settings) for name in options.models]
    check_model_args(options.model_args, models)
    return models


def open_data(options: argparse.Namespace, loaded: LoadedModel) -> Dataset:
    """Open the images of `--data` at a model's size."""
    return open_images(options.data, loaded.extract.image_size[0], options.limit)


def attention_layers(options: argparse.Namespace, loaded: LoadedModel) -> tuple[list[int], int]:
    """Return the layers of `--layers`, all by default, and the layer in figures; raise for a model without CLS."""
    loaded.require_cls()
    layers, default = loaded.extract.resolve_layers(options.layers or None), loaded.extract.default_layer
    return layers, default if default in layers else layers[0]


def default_folder(protocol: str, options: argparse.Namespace) -> Path:
    """Return runs/eval/PROTOCOL/MODELS/OPTIONS: other models or options do not overwrite the results.

    OPTIONS are those that differ from their defaults and change the results.
    """
    parser, given = PARSERS[f"eval {protocol}"](), []
    for name, value in vars(options).items():
        if name not in _NOT_NAMED and value != parser.get_default(name):
            words = map(str, value if isinstance(value, list) else [value])
            given.append(f"{name}={'+'.join(map(files.file_name, words))}")
    models = "+".join(map(files.file_name, options.models))  # with their folders: equal labels are other models
    return Path("runs/eval", protocol, _shortened(models), _shortened(",".join(given)))


def _shortened(name: str) -> str:
    """Return a name that file systems accept: the end of a long one is replaced by its checksum."""
    return name if len(name.encode()) < 200 else f"{name[:40]}-{zlib.crc32(name.encode()):08x}"


class Evaluation:
    """Output of one command. Construct it before anything is computed: an unusable folder is then found early."""

    def __init__(self, protocol: str, options: argparse.Namespace, models: Sequence[LoadedModel]):
        self.protocol, self.options, self.models = protocol, options, models
        self.folder = files.make_folder(options.output or default_folder(protocol, options))
        self.problems: list[str] = []  # one line for each unreadable image, from `images.batches`
        self.written: list[Path] = []  # without results.json

    def model_folder(self, loaded: LoadedModel) -> Path:
        """Return the folder of one model's files; for a single model, the output folder itself."""
        return self.folder if len(self.models) == 1 else self.folder / files.file_name(loaded.label)

    def reading(self, title: str | None) -> dict:
        """Return arguments of `images.batches` from the command's options; `title` is that of the progress bar."""
        batch_size, workers = self.options.batch_size, self.options.workers
        return {"batch_size": batch_size, "workers": workers, "progress": title, "problems": self.problems}

    def figure(self, name: str) -> list[Path]:
        """Return the PNG and PDF paths of a figure, and add them to `written`."""
        paths = [self.folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
        self.written += paths
        return paths

    def write_table(self, name: str, rows: Sequence[dict], digits: int = 3, show: bool = True) -> None:
        """Print a table and write it as Markdown and CSV."""
        texts = {"md": files.markdown_table(rows, digits), "csv": files.csv_table(rows)}
        try:
            for suffix, text in texts.items():
                self.written.append(self.folder / f"{name}.{suffix}")
                write_text(self.written[-1], text)
        finally:  # it may have taken hours to compute, and the disk may be full
            if show:
                print(texts["md"])

    def finish(self, results: dict, config: dict | None = None, notes: Sequence[str] = ()) -> None:
        """Write results.json, with the command line's settings and `config`; print `notes` and the written files."""
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.options).items()}
        settings |= {"models": [loaded.facts for loaded in self.models]} | (config or {})
        content = {
            "protocol": self.protocol,
            "config": settings,
            "results": results,
            "unreadable": {"count": len(self.problems), "images": self.problems},
            "provenance": provenance(self.options.device),
        }
        path = self.folder / "results.json"
        write_text(path, as_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)) + "\n")
        print(*notes, sep="\n", end="\n" if notes else "")
        print(f"unreadable images: {len(self.problems)}\nwritten:", path, *self.written, sep="\n  ")


def read_images(
    evaluation: Evaluation, loaded: LoadedModel, kept: list[Sample], containing: str | None = None
) -> Iterator[Batch]:
    """Read the images of `--data` at a model's size, batch by batch, and keep the samples in `kept` for figures.

    `containing` is the name of a class: only images with it are read, and `--limit` counts these.
    """
    options = evaluation.options
    images = open_images(options.data, loaded.extract.image_size[0], None if containing else options.limit)
    names = {name: number for number, name in images.class_names().items()}
    if containing is not None and containing not in names:
        known = f"it has {', '.join(names)}" if names else "it has no object masks"
        raise UserError(f"--class {containing!r}: the data set has no such class; {known}")
    for batch in batches(images, **evaluation.reading(f"reading for {loaded.label}")):
        samples = [s for s in batch.samples if containing is None or names[containing] in s.target.classes]
        samples = samples[: options.limit - len(kept)]
        kept += samples
        if samples:
            yield Batch(torch.stack([sample.image for sample in samples]), samples)
        if len(kept) == options.limit:
            return
    if not kept:
        raise UserError(f"--class {containing}: none of the {len(images)} images contains it; choose another")
