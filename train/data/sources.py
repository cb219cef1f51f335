"""Data sources: folders of images, Hugging Face datasets and torchvision's data sets; `shards` adds tar archives.

A `Source` returns image and label by index. The loader alone decides the order, so a run can resume at any step.
"""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sized
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets as torchvision_datasets

from crate_fast.errors import UserError, require
from crate_fast.train.data.image_files import Unreadable, describe, find_images, print_once, read_image, to_rgb

MOST_CLASSES = 10_000_000  # larger labels are errors in the data: their classifier would not fit in memory
TORCHVISION = {  # name → (class, argument that names the split, its value for training, for validation)
    "cifar10": ("CIFAR10", "train", True, False),
    "cifar100": ("CIFAR100", "train", True, False),
    "flowers102": ("Flowers102", "split", "train", "test"),
    "pets": ("OxfordIIITPet", "split", "trainval", "test"),
}


class Source(Dataset, ABC):
    """Data set of (RGB image, label) by index; a corrupt image raises `Unreadable` with its name.

    `classes` are the class names in the order of the labels, or None if the data have numbers only. Labels are below
    `n_labels`. `items` has an entry for each image.
    """

    classes: tuple[str, ...] | None
    n_labels: int
    items: Sized

    def __len__(self) -> int:
        return len(self.items)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the image's location, for messages."""

    def open(self, index: int) -> tuple[BinaryIO, int]:
        """Return the image's file, not decoded, and its label."""
        raise NotImplementedError

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """Return image and label. Any exception means that the image is corrupt."""
        file, label = self.open(index)
        with file:
            return read_image(file), label

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return self.picture(index)
        except Exception as error:  # PIL and the readers raise many kinds on damaged files
            raise Unreadable(describe(self.name(index), error)) from error


class FolderSource(Source):
    """Images below a folder; its top-level folders are the classes."""

    def __init__(self, root: Path):
        self.root, tree = root, find_images(root)
        self.classes, self.labels = tree.labelled(str(root))
        # one array: of separate strings, reference counts would copy all into every worker, 1 GB for ImageNet-21k
        self.items, self.n_labels = np.array([os.fsencode(name) for name in tree.names]), len(self.classes)
        print_once(f"{root}: {remark}" for remark in tree.remarks())

    def name(self, index: int) -> str:
        return str(self._path(index))

    def open(self, index: int) -> tuple[BinaryIO, int]:
        return self._path(index).open("rb"), int(self.labels[index])

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.items[index]))


class HubSource(Source):
    """Data set of the package `datasets`: a local folder of parquet, arrow or image files, or a name on the Hub.

    `option` is the option of the split, for messages. Parquet is first converted in the cache (HF_DATASETS_CACHE).
    """

    def __init__(self, data_dir: str, split: str, option: str, download: bool):
        require("datasets")
        import datasets

        if not Path(data_dir).is_dir() and not download:
            raise UserError(
                f"data_dir={data_dir!r} is not a folder: pass --data-dir FOLDER, or --download to load the data set "
                "of this name from the Hugging Face Hub or its cache"
            )
        self.where = f"{data_dir}, split {split}"
        try:
            images = datasets.load_dataset(data_dir, split=split)
            if not {"image", "label"} <= set(images.column_names):
                raise ValueError(f"it has the columns {sorted(images.column_names)}: rename two to image and label")
            images = images.select_columns(["image", "label"])  # others, such as masks, would be decoded too
            self.items = images.cast_column("image", datasets.Image(decode=False))
            labels = images.unique("label")
        except (OSError, ValueError, TypeError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error  # if files disagree, only the cause has the reason
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())
            raise UserError(
                f"datasets cannot open {self.where} ({reason}): use parquet, arrow or image files, with images in "
                f"the column image and integers in the column label; pass --data-dir, or {option}"
            ) from error
        wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < MOST_CLASSES]
        if wrong or not labels:
            raise UserError(
                f"{self.where}: labels must be integers from 0 to {MOST_CLASSES - 1:,}, not {wrong[:8]}: pass a "
                "labelled split, or convert texts to numbers with class_encode_column of datasets"
            )
        self.classes = tuple(getattr(images.features["label"], "names", ())) or None
        self.n_labels = max(len(self.classes or ()), max(labels) + 1)

    def name(self, index: int) -> str:
        image = self.items[index]["image"]
        return f"{self.where}, image {index} ({image and image['path']})"

    def open(self, index: int) -> tuple[BinaryIO, int]:
        row = self.items[index]
        image = row["image"] or {}  # some data sets have rows with null
        if image.get("bytes"):  # a path may be from another machine
            return io.BytesIO(image["bytes"]), int(row["label"])
        if not image.get("path"):
            raise UserError("the row has neither bytes nor a path")
        return Path(image["path"]).open("rb"), int(row["label"])


class TorchvisionSource(Source):
    """Data set of torchvision; `where` names it in messages."""

    def __init__(self, images: Dataset, where: str):
        self.items, self.where = images, where
        self.classes = tuple(images.classes)
        self.n_labels = len(self.classes)

    def name(self, index: int) -> str:
        return f"{self.where}, image {index}"

    def picture(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.items[index]
        return to_rgb(image), label


def open_torchvision(dataset: str, data_dir: str, train: bool, download: bool) -> Source:
    """Open one of torchvision's data sets; download it only on request.

    torchvision unpacks without checking the paths in an archive, but only archives with the MD5 that it knows.
    """
    name, argument, *splits = TORCHVISION[dataset]
    try:
        split = {argument: splits[0 if train else 1]}
        images = getattr(torchvision_datasets, name)(Path(data_dir), **split, download=download)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{dataset} is not in data_dir={data_dir!r} ({error}): pass the right folder, or --download, with a "
            "network and free space"
        ) from error
    return TorchvisionSource(images, dataset)


def common_classes(train: Source, val: Source) -> tuple[str, ...]:
    """Return the class names of both splits, which must be the same; numbers if neither has names."""
    if train.classes is None and val.classes is None:
        return tuple(map(str, range(max(train.n_labels, val.n_labels))))
    if train.classes != val.classes:
        differing = sorted(set(train.classes or ()) ^ set(val.classes or ()))[:8]
        how = f"different classes, such as {differing}" if differing else "the same classes in different orders"
        raise UserError(f"the training and validation splits have {how}: give both the same classes")
    return train.classes
