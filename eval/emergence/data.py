"""The images of the experiment: to train on, to choose heads on, to score, and to show.

Photographs are prepared once in OUTPUT/data, where every run finds them:

    train/       the training images, a folder a class
    selection/   every other validation image: accuracy while training, choice of learning rate, heads and layers
    test/        the other validation images
    source.json  the folders and files that the user named
"""

import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from crate_fast.errors import UserError
from crate_fast.eval.common.boxes import BoxedImages
from crate_fast.eval.common.images import SceneImages, Target, open_images
from crate_fast.eval.common.photographs import free_photographs
from crate_fast.eval.emergence.protocol import Protocol
from crate_fast.train.checkpoint import write_text
from crate_fast.train.data.image_files import find_images
from crate_fast.train.data.shape_scenes import CLASSES
from crate_fast.train.data.sources import nothing_outside

__all__ = ["PhotographData", "SceneData", "open_experiment_data", "prepare_photographs"]

_SHOWN = 8


class SceneData:
    """Scenes of `shape_scenes`."""

    num_classes = len(CLASSES)

    def __init__(self, protocol: Protocol):
        self.protocol = protocol

    def selection(self) -> Dataset:
        """Return the images for choosing heads and layers."""
        return SceneImages(self.protocol.image_size, self.protocol.selection_images, self.protocol.selection_seed)

    def test(self) -> Dataset:
        """Return the images that attention is scored on."""
        return SceneImages(self.protocol.image_size, self.protocol.test_images, self.protocol.test_seed)

    def classified(self) -> Dataset:
        """Return the images that accuracy is measured on."""
        return self.test()

    def with_masks(self) -> Dataset:
        """Return the images for MaskCut."""
        return SceneImages(self.protocol.image_size, self.protocol.maskcut_images, self.protocol.test_seed)

    def shown(self) -> dict[str, np.ndarray]:
        """Return the first test scenes: "images" uint8 [8, S, S, 3], "masks" bool [8, S, S], "labels" [8]."""
        images = SceneImages(self.protocol.image_size, _SHOWN, self.protocol.test_seed)
        samples = [images[number] for number in range(_SHOWN)]
        return {
            "images": torch.stack([sample.image.permute(1, 2, 0) for sample in samples]).numpy(),
            "masks": torch.cat([sample.target.masks for sample in samples]).numpy(),
            "labels": np.array([sample.target.classes[0] for sample in samples]),
        }


class _Photographs(BoxedImages):
    """Photographs of a split with their class, and the union of their boxes as the object."""

    labelled = True

    def __init__(self, root: Path, size: int, boxes: Path, classes: list[str]):
        super().__init__(root, size, boxes)
        self.classes = {name: number for number, name in enumerate(classes)}

    def target(self, key: str | int, size: tuple[int, int]) -> Target:
        boxes = super().target(key, size).boxes
        return Target([self.classes[str(key).split("/")[0]]], _filled(boxes, size)[None], torch.ones(size) > 0, boxes)

    def coverage(self, key: str | int) -> float:
        """Return the share of a photograph that its boxes cover; 0 without a box."""
        annotated = self.annotated_size(key)
        if annotated is None:
            return 0.0
        rows, columns = annotated
        corners = torch.tensor(self._entry(key)[1], dtype=torch.float64).reshape(-1, 4)
        return float(_filled(corners, (rows, columns)).float().mean())


def _filled(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the union of boxes [K, 4] as a mask, boolean [H, W]."""
    mask = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in boxes.round().int().tolist():
        mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    return mask


class PhotographData:
    """Photographs as `prepare_photographs` left them.

    Args:
        protocol: The experiment.
        folder: The prepared folder.
    """

    def __init__(self, protocol: Protocol, folder: Path):
        self.protocol, self.folder = protocol, folder
        self.source = json.loads((folder / "source.json").read_text())
        self.classes = sorted(path.name for path in (folder / "test").iterdir())
        self.num_classes = len(self.classes)

    def _split(self, name: str) -> _Photographs:
        boxes = Path(self.source["boxes"])
        return _Photographs(self.folder / name, self.protocol.image_size, boxes, self.classes)

    def _boxed(self, name: str, count: int) -> Dataset:
        """Return `count` images, spread over the classes, whose boxes cover what the protocol wants."""
        images, (low, high) = self._split(name), self.protocol.coverage
        fitting = [
            i
            for i, key in enumerate(images.keys())
            if images.coverage(key) > 0 and low <= images.coverage(key) <= high
        ]
        if not fitting:
            raise UserError(
                f"no photograph of {self.folder / name} has boxes that cover {low:.0%} to {high:.0%} of it: give "
                "photographs with boxes, as --boxes"
            )
        chosen = np.linspace(0, len(fitting) - 1, min(count, len(fitting))).round().astype(int)
        return Subset(images, [fitting[number] for number in chosen])

    def selection(self) -> Dataset:
        """Return the images for choosing heads and layers."""
        return self._boxed("selection", self.protocol.selection_images)

    def test(self) -> Dataset:
        """Return the images that attention is scored on."""
        return self._boxed("test", self.protocol.test_images)

    def classified(self) -> Dataset:
        """Return the images that accuracy is measured on."""
        return self._split("test")

    def with_masks(self) -> Dataset | None:
        """Return the photographs with masks, or None."""
        if not self.source["masks"]:
            return None
        return open_images(self.source["masks"], self.protocol.mask_size, self.protocol.maskcut_images)

    def shown(self) -> dict[str, np.ndarray]:
        """Return free photographs, in no class of the training data: "images" uint8 [8, S, S, 3], "names" [8]."""
        found = free_photographs()[:_SHOWN]
        if not found:
            raise UserError("the figures need the photographs of scikit-image: pip install crate_fast[eval]")
        images = np.stack([np.asarray(photograph.square(self.protocol.mask_size)) for photograph in found])
        return {"images": images, "names": np.array([f"{p.name} ({p.credit})" for p in found])}


def open_experiment_data(protocol: Protocol, folder: Path) -> SceneData | PhotographData:
    """Return the images of an experiment; `folder` is where photographs were prepared."""
    return PhotographData(protocol, folder) if protocol.photographs else SceneData(protocol)


def prepare_photographs(source: Path, boxes: Path | None, masks: str | None, folder: Path) -> int:
    """Prepare photographs in a folder, unless that is done; return the number of training images.

    Folders are linked to, archives are unpacked.

    Args:
        source: Folder with train/ and val/, in each a folder of images a class, or with train.tar and val.tar.
        boxes: Boxes of the validation images, as in `boxes.BoxedImages`; SOURCE/val_boxes.json when None.
        masks: Photographs with masks, as in `images.open_images`, or None.
        folder: To be filled.

    Raises:
        UserError: A split or the boxes are missing or cannot be used, or other photographs were prepared there.
    """
    boxes = boxes or source / "val_boxes.json"
    named = {"source": str(source.resolve()), "boxes": str(boxes.resolve()), "masks": masks and _absolute(masks)}
    record = folder / "source.json"
    if record.is_file():
        before = json.loads(record.read_text())
        if {name: before[name] for name in named} != named:
            raise UserError(f"{folder} holds other photographs ({before['source']}): give another --output")
        return before["training_images"]
    if not boxes.exists():
        raise UserError(f"{boxes} is not there: name the boxes of the validation images with --boxes")
    if masks and not masks.startswith("coco:"):
        raise UserError(f"--masks {masks}: write coco:PATH[:SPLIT]")
    folder.mkdir(parents=True, exist_ok=True)
    train, val = (_unpacked(source, split, folder) for split in ("train", "val"))
    classes, _ = find_images(train).labelled(str(train))
    _split_validation(val, classes, folder)
    if masks:
        open_images(masks, 64)
    named["training_images"] = len(find_images(train).names)
    write_text(record, json.dumps(named, indent=2) + "\n")
    return named["training_images"]


def _absolute(masks: str) -> str:
    kind, _, path = masks.partition(":")
    return f"{kind}:{Path(path).resolve()}"


def _unpacked(source: Path, split: str, folder: Path) -> Path:
    """Return FOLDER/<split>, a link to SOURCE/<split> or the content of SOURCE/<split>.tar."""
    goal, partial, archive = folder / split, folder / f".{split}", source / f"{split}.tar"
    if goal.exists():
        return goal
    if (source / split).is_dir():
        goal.symlink_to((source / split).resolve(), target_is_directory=True)
    elif archive.is_file():
        try:
            with nothing_outside(), tarfile.open(archive) as file:
                file.extractall(partial)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{archive} cannot be unpacked to {folder} ({error})") from error
        partial.rename(goal)
    else:
        raise UserError(f"{source} holds neither {split}/ nor {split}.tar: give a folder with train and val")
    return goal


def _split_validation(val: Path, classes: tuple[str, ...], folder: Path) -> None:
    """Link every other validation image of each class below selection/ and test/."""
    tree = find_images(val)
    of_val, _ = tree.labelled(str(val))
    counts = Counter(name.split("/")[0] for name in tree.names)
    if of_val != classes or min(counts.values()) < 2:
        differing = sorted(set(of_val) ^ set(classes)) or [name for name, count in counts.items() if count < 2]
        raise UserError(
            f"{val}: the training classes are needed, each with two images; see {', '.join(differing[:4])}"
        )
    for split in ("selection", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
    seen: Counter = Counter()
    for name in tree.names:
        label = name.split("/")[0]
        link = folder / ("selection" if seen[label] % 2 == 0 else "test") / label / Path(name).name
        seen[label] += 1
        if not link.exists():
            os.symlink((val / name).resolve(), link)
