"""Photographs of the experiment, for training, choosing heads, scoring and figures.

They are prepared once in OUTPUT/data for all runs:

    train/       the training images, one folder per class
    selection/   every other validation image, for validation and for choosing learning rate, heads and layers
    test/        the other validation images
    source.json  the folders and files that the user named
"""

import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from crate_fast.errors import UserError
from crate_fast.eval.common.boxes import BoxedImages, covered
from crate_fast.eval.common.images import Target, free_photographs, open_images
from crate_fast.eval.common.results import reserve_folder
from crate_fast.eval.emergence.protocol import Protocol
from crate_fast.train.data.image_files import find_images, read_image


class _Photographs(BoxedImages):
    """Photographs of a split; the object is the union of the boxes, with the class of the photograph."""

    def __init__(self, root: Path, size: int, boxes: Path, classes: list[str]):
        super().__init__(root, size, boxes)
        self.classes = {name: number for number, name in enumerate(classes)}

    def target(self, key: str | int, size: tuple[int, int]) -> Target:
        boxes, (height, width) = super().target(key, size).boxes, size
        mask = torch.from_numpy(covered(boxes.numpy() / [width, height, width, height], height, width))
        return Target([self.classes[str(key).split("/")[0]]], mask[None], torch.ones_like(mask), boxes)


class PhotographData:
    """Photographs prepared by `prepare_photographs`.

    `selection` is for the choice of heads and layers, `test` for attention; both hold only photographs of the
    protocol's `coverage`. `classified`, the whole test half, is for accuracy, and `with_masks` for MaskCut (or None).
    """

    def __init__(self, protocol: Protocol, folder: Path):
        self.protocol = protocol
        source = json.loads((folder / "source.json").read_text())
        classes, boxes = sorted(path.name for path in (folder / "test").iterdir()), Path(source["boxes"])
        halves = (_Photographs(folder / name, protocol.image_size, boxes, classes) for name in ("selection", "test"))
        selection, self.classified = halves
        self.selection = _with_coverage(selection, protocol.selection_images, protocol.coverage)
        self.test = _with_coverage(self.classified, protocol.test_images, protocol.coverage)
        masks = source["masks"]
        self.with_masks = open_images(masks, protocol.mask_size, protocol.maskcut_images) if masks else None

    def shown(self) -> dict[str, np.ndarray]:
        """Return the free photographs, in no training set: "images" uint8 [8, S, S, 3], "names" [8] with credit."""
        size, free, images = self.protocol.mask_size, free_photographs(), []
        for path in free.values():  # the central square
            picture = read_image(path)
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            box = (left, top, left + side, top + side)
            images.append(np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box=box)))
        return {"images": np.stack(images), "names": np.array(list(free))}


def _with_coverage(images: _Photographs, count: int, coverage: tuple[float, float]) -> Dataset:
    """Return at most `count` images, spread over the classes, whose boxes cover a share in the given range."""
    low, high = coverage
    sizes = [(key, images.annotated_size(key)) for key, _ in images.items]
    shares = [float(images.target(key, size).masks.float().mean()) if size else 0.0 for key, size in sizes]
    fitting = [number for number, share in enumerate(shares) if share > 0 and low <= share <= high]
    if not fitting:
        raise UserError(
            f"no photograph of {images.root} has boxes that cover {low:.0%} to {high:.0%} of it: pass the boxes "
            "of these photographs with --boxes; the file must also give each photograph's height and width"
        )
    return spread(Subset(images, fitting), count)


def spread(images: Dataset, count: int) -> Subset:
    """Return at most `count` images, evenly spaced."""
    return Subset(images, np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int).tolist())


def prepare_photographs(source: Path, boxes: Path | None, masks: str | None, folder: Path) -> int:
    """Prepare photographs in a folder, if this is not done yet; return the number of training images.

    Args:
        source: Folder with train/ and val/, each with one folder of images per class, which are linked, or with
            train.tar and val.tar, which are unpacked.
        boxes: Boxes of the validation images, as in `boxes.BoxedImages`; SOURCE/val_boxes.json when None.
        masks: Photographs with masks, as in `images.open_images`, or None.
    """
    boxes = boxes or source / "val_boxes.json"
    masks_kind, _, masks_path = (masks or "").partition(":")
    named = {"source": str(source.resolve()), "boxes": str(boxes.resolve())}
    named["masks"] = masks and f"{masks_kind}:{Path(masks_path).resolve()}"
    record = folder / "source.json"
    if record.is_file():
        count = json.loads(record.read_text())["training_images"]
    else:
        if not boxes.exists():
            raise UserError(f"{boxes} does not exist: name the boxes of the validation images with --boxes")
        if masks and masks_kind != "coco":
            raise UserError(f"--masks {masks}: write coco:PATH[:SPLIT]")
        folder.mkdir(parents=True, exist_ok=True)
        train, val = (_unpacked(source, split, folder) for split in ("train", "val"))
        images = find_images(train)
        _split_validation(val, images.labelled(str(train))[0], folder)
        if masks:
            open_images(masks, 64)  # raises if they cannot be used
        count = len(images.names)
    reserve_folder(folder, record.name, named | {"training_images": count})
    return count


def _unpacked(source: Path, split: str, folder: Path) -> Path:
    """Return FOLDER/<split>, a link to SOURCE/<split> or the unpacked SOURCE/<split>.tar.

    The archive holds the class folders, or the folder <split> that holds them.
    """
    goal, partial, archive = folder / split, folder / f".{split}", source / f"{split}.tar"
    if goal.exists():
        return goal
    if (source / split).is_dir():
        goal.symlink_to((source / split).resolve(), target_is_directory=True)
    elif archive.is_file():
        try:
            with tarfile.open(archive) as file:
                file.extractall(partial, filter="data")
        except (tarfile.TarError, OSError, TypeError) as error:  # TypeError: Python before 3.10.12 or 3.11.4
            raise UserError(f"{archive} cannot be unpacked to {folder} ({error})") from error
        inner = partial / split
        (inner if [*partial.iterdir()] == [inner] else partial).rename(goal)
        shutil.rmtree(partial, ignore_errors=True)
    else:
        raise UserError(f"{source} holds neither {split}/ nor {split}.tar: give a folder with train and val")
    return goal


def _split_validation(val: Path, classes: tuple[str, ...], folder: Path) -> None:
    """Link the validation images of each class alternately into selection/ and test/."""
    tree = find_images(val)
    of_val, _ = tree.labelled(str(val))
    counts = Counter(name.split("/")[0] for name in tree.names)
    if of_val != classes or min(counts.values()) < 2:
        differing = sorted(set(of_val) ^ set(classes)) or [name for name, count in counts.items() if count < 2]
        raise UserError(
            f"{val} must have the classes of train, each with at least two images: correct {', '.join(differing[:4])}"
        )
    seen: Counter = Counter()
    for name in tree.names:
        label = name.split("/")[0]
        link = folder / ("selection" if seen[label] % 2 == 0 else "test") / name
        seen[label] += 1
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            os.symlink((val / name).resolve(), link)
