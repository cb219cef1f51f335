"""What the commands that draw images share: reading them, their first columns, pages of rows, folders of models."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.nn.functional as F

from crate_fast.errors import UserError
from crate_fast.eval.images import Batch, Sample, batches, open_images
from crate_fast.eval.models import Subject
from crate_fast.eval.results import file_name
from crate_fast.figures import Picture, image_grid

__all__ = ["ROWS_A_PAGE", "first_columns", "model_folders", "read_images", "short_name", "write_pages"]

ROWS_A_PAGE = 8


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


def write_pages(
    rows: Sequence[Sequence[Picture | None]],
    folder: Path,
    name: str,
    row_titles: Sequence[str] | None,
    column_titles: Sequence[str],
    title: str | None = None,
) -> list[Path]:
    """Write rows of pictures as `name`_01.png, `name`_01.pdf, `name`_02.png, …, `ROWS_A_PAGE` rows a page."""
    written = []
    for page, start in enumerate(range(0, len(rows), ROWS_A_PAGE), start=1):
        part = slice(start, start + ROWS_A_PAGE)
        paths = [folder / f"{name}_{page:02d}.{suffix}" for suffix in ("png", "pdf")]
        image_grid(
            rows[part], paths, row_titles=row_titles and row_titles[part], column_titles=column_titles, title=title
        )
        written += paths
    return written


def model_folders(output: Path, subjects: Sequence[Subject]) -> list[Path]:
    """Where each model's own files go: the output folder for one model, folders named after them for several."""
    if len(subjects) == 1:
        return [output]
    return [output / file_name(subject.label) for subject in subjects]
