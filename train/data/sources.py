"""Where images come from: folders, tar archives, WebDataset shards, Hugging Face datasets, torchvision.

Each is a `Source`: image and label by number. So the order of a run is the loader's business alone, and a run can be
resumed at any step.
"""

import importlib.util
import io
import sys
import tarfile
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets as torchvision_datasets

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.image_files import find_images, read_image, to_rgb
from crate_fast.train.data.shards import MOST_CLASSES, FolderArchive, ShardIndex, TarIndex, find_shards
from crate_fast.train.data.unreadable import Unreadable

__all__ = ["EncodedSource", "Source", "common_classes", "nothing_outside", "open_source"]

_TORCHVISION = {
    "cifar10": lambda root, train, download: torchvision_datasets.CIFAR10(root, train=train, download=download),
    "cifar100": lambda root, train, download: torchvision_datasets.CIFAR100(root, train=train, download=download),
    "flowers102": lambda root, train, download: torchvision_datasets.Flowers102(
        root, split="train" if train else "test", download=download
    ),
    "pets": lambda root, train, download: torchvision_datasets.OxfordIIITPet(
        root, split="trainval" if train else "test", download=download
    ),
}


class Source(Dataset, ABC):
    """(PIL image in RGB, label) by index; what cannot be read is `Unreadable` and says its name.

    Attributes:
        classes: Names in the order of the labels, or None where the data has numbers only.
        n_labels: Labels are below this.
    """

    classes: tuple[str, ...] | None
    n_labels: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the image is, for messages."""

    @abstractmethod
    def picture(self, index: int) -> tuple[Image.Image, int]:
        """What `__getitem__` returns, raising what it likes."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return self.picture(index)
        except Exception as error:  # of damaged files PIL and the readers raise a dozen kinds
            raise Unreadable(f"{self.name(index)}: {type(error).__name__}: {error}") from error


class EncodedSource(Source):
    """A source of image files."""

    @abstractmethod
    def open(self, index: int) -> tuple[BinaryIO, int]:
        """The image's file, not decoded, and its label."""

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """See `Source`."""
        file, label = self.open(index)
        with file:
            return read_image(file), label


class FolderSource(EncodedSource):
    """The images below a folder, of the classes that its folders name."""

    def __init__(self, root: Path):
        self.root, tree = root, find_images(root)
        self.classes, self.labels = tree.labelled(str(root))
        self.names, self.n_labels = tree.names, len(self.classes)
        for remark in tree.remarks():
            print(f"{root}: {remark}", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.root / self.names[index])

    def open(self, index: int) -> tuple[BinaryIO, int]:
        return (self.root / self.names[index]).open("rb"), int(self.labels[index])


class _HubSource(EncodedSource):
    """A data set of `datasets`, whose images may have no path, or one of long ago and elsewhere."""

    def __init__(self, images, where: str):
        self.images, self.where = images, where
        try:
            labels = images.unique("label")
        except NotImplementedError:  # of lists
            labels = images[:8]["label"]
        wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < MOST_CLASSES]
        if wrong or not labels:
            raise UserError(
                f"{where}: labels must be integers from 0, below {MOST_CLASSES:,}, not {wrong[:8]}: pass a labelled "
                "split, or make texts numbers with class_encode_column of datasets"
            )
        self.classes = tuple(getattr(images.features["label"], "names", ())) or None
        self.n_labels = max(len(self.classes or ()), max(labels) + 1)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        image = self.images[index]["image"]
        return f"{self.where}, image {index} ({image and image['path']})"

    def open(self, index: int) -> tuple[BinaryIO, int]:
        row = self.images[index]
        image = row["image"] or {}  # null in some rows of some data sets
        if image.get("bytes"):
            return io.BytesIO(image["bytes"]), int(row["label"])
        if not image.get("path"):
            raise UserError("it has neither bytes nor a path")
        return Path(image["path"]).open("rb"), int(row["label"])


class ArchiveSource(EncodedSource):
    """The images of tar archives, through an index of them."""

    def __init__(self, index: TarIndex):
        self.index, self.classes, self.n_labels = index, index.classes, index.n_labels

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return self.index.name(index)

    def open(self, index: int) -> tuple[BinaryIO, int]:
        return self.index.open(index)


class _Torchvision(Source):
    """A data set of torchvision's; image files are read here, for torchvision does not turn them upright."""

    def __init__(self, images: Dataset, where: str):
        self.images, self.where = images, where
        self.classes = tuple(images.classes)
        self.n_labels = len(self.classes)
        self.paths = getattr(images, "_images", getattr(images, "_image_files", None))  # of pets, of flowers102

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.where}, image {index}" if self.paths is None else str(self.paths[index])

    def picture(self, index: int) -> tuple[Image.Image, int]:
        if self.paths is not None:
            return read_image(self.paths[index]), self.images._labels[index]
        image, label = self.images[index]
        return to_rgb(image), label


@contextmanager
def nothing_outside():
    """While this lasts `tarfile` unpacks nothing outside the folder it was given: no .., absolute path, or link out.

    Archives of images are never unpacked here; torchvision unpacks what it downloads, older releases of it blindly.

    Raises:
        UserError: This Python's tarfile has no filters.
        tarfile.FilterError: While it lasts, when an archive tries.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            "this Python unpacks archives unchecked: download with Python 3.10.12, 3.11.4 or later, or unpack the "
            "data yourself and leave out --download"
        )
    before = vars(tarfile.TarFile)["extraction_filter"]
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def _split(config: TrainConfig, train: bool) -> tuple[str, str]:
    """The split's name, and the option that gives it."""
    return (config.train_split, "--train-split") if train else (config.val_split, "--val-split")


def _open_torchvision(config: TrainConfig, train: bool) -> Source:
    try:
        if config.download:
            with nothing_outside():
                images = _TORCHVISION[config.dataset](Path(config.data_dir), train, True)
        else:
            images = _TORCHVISION[config.dataset](Path(config.data_dir), train, False)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{config.dataset} is not in data_dir={config.data_dir!r} ({error}): pass the right folder, or "
            "--download to fetch it there"
        ) from error
    except OSError as error:  # no network (URLError), a full disk
        raise UserError(
            f"{config.dataset} cannot be read from or downloaded to data_dir={config.data_dir!r} ({error}): see to "
            "the network and the disk, or put it there yourself"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(f"{config.dataset} needs {error.name}: pip install {error.name}") from error
    return _Torchvision(images, config.dataset)


def _open_files(config: TrainConfig, train: bool) -> Source:
    split, option = _split(config, train)
    root = Path(config.data_dir)
    place = root / f"{split}.tar" if config.dataset == "tar" else root / split
    if not place.exists():
        present = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else "no such folder"
        raise UserError(f"{place} is not there (data_dir holds: {present}): pass --data-dir, or {option}")
    return ArchiveSource(FolderArchive(place)) if config.dataset == "tar" else FolderSource(place)


def _open_hf(config: TrainConfig, train: bool) -> Source:
    """Open a data set of `datasets`: a local folder of parquet, arrow or image files, or a name.

    `datasets` writes parquet anew as arrow into its cache (HF_DATASETS_CACHE) the first time.
    """
    split, option = _split(config, train)
    if importlib.util.find_spec("datasets") is None:
        raise UserError("dataset='hf' needs the package datasets: pip install crate_fast[hf]")
    import datasets

    if not Path(config.data_dir).is_dir() and not config.download:
        raise UserError(
            f"data_dir={config.data_dir!r} is no folder: pass --data-dir FOLDER, or --download to let datasets fetch "
            "what the Hugging Face Hub has by this name, or take it from its cache"
        )
    where = f"{config.data_dir}, split {split}"
    try:
        images = datasets.load_dataset(config.data_dir, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # of files that disagree: its own message does not say why
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise UserError(
            f"datasets cannot open {where} ({reason}): it must be of parquet, arrow or image "
            f"files; pass --data-dir, or {option}"
        ) from error
    if not {"image", "label"} <= set(images.column_names):
        raise UserError(f"{where} has the columns {sorted(images.column_names)}: rename two to image and label")
    try:
        images = images.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{where}: the column image holds no images ({error}): store them as datasets.Image"
        ) from error
    return _HubSource(images, where)


def open_source(config: TrainConfig, train: bool) -> Source:
    """The training or the validation split that the configuration names (all data sets but shape_scenes).

    Raises:
        UserError: It is not where the configuration says.
        UserError: It is there, and cannot be used.
        UserError: A package is missing.
    """
    if config.dataset in _TORCHVISION:
        return _open_torchvision(config, train)
    if config.dataset == "hf":
        return _open_hf(config, train)
    if config.dataset == "shards":
        root = Path(config.data_dir)
        shards = find_shards(root, *_split(config, train), other=_split(config, not train)[0])
        return ArchiveSource(ShardIndex(shards, root))
    return _open_files(config, train)


def common_classes(train: Source, val: Source) -> tuple[str, ...]:
    """Names of the classes of both splits; numbers where neither has names.

    Raises:
        UserError: The splits have different classes.
    """
    if train.classes is None and val.classes is None:
        return tuple(map(str, range(max(train.n_labels, val.n_labels))))
    if train.classes != val.classes:
        differing = sorted(set(train.classes or ()) ^ set(val.classes or ()))[:8]
        how = f"different classes, such as {differing}" if differing else "their classes in different orders"
        raise UserError(f"the training and validation splits have {how}: give both the same classes")
    return train.classes
