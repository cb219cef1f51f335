"""Where images come from: folders, tar archives, WebDataset shards, Hugging Face datasets, torchvision.

Each is a `Source`: image and label by number. So the order of a run is the loader's business alone, and a run can be
resumed at any step.
"""

import importlib.util
import io
import tarfile
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision import datasets as torchvision_datasets

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.shards import Archives, ShardIndex, find_shards
from crate_fast.train.unreadable import Unreadable

__all__ = ["UNREADABLE", "EncodedSource", "Source", "common_classes", "decoded", "nothing_outside", "open_source"]

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises on a damaged file

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


def decoded(file: BinaryIO) -> Image.Image:
    """The picture in a file, whole, in RGB."""
    try:
        opened = Image.open(file)
    except UnidentifiedImageError:  # whose message has the file's address in memory
        raise UnidentifiedImageError("no kind of image that PIL knows") from None
    with opened as picture:
        if picture.mode != "RGB":
            return picture.convert("RGB")
        picture.load()  # `convert` would copy it
        return picture


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
            return decoded(file), int(label)


class FileSource(EncodedSource):
    """Through timm's readers of folders and tar archives.

    timm's own data set puts the next image in the place of one that cannot be read; only its reader is used here.
    """

    def __init__(self, reader, where: str):
        self.reader, self.where = reader, where
        numbers = reader.class_name_to_idx if hasattr(reader, "class_name_to_idx") else reader.class_to_idx
        self.classes = tuple(sorted(numbers, key=numbers.get)) or None
        self.n_labels = len(numbers)

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        return str(Path(self.where, self.reader.filename(index, absolute=True)))

    def open(self, index: int) -> tuple[BinaryIO, int]:
        return self.reader[index]


class _TarSource(FileSource):
    """A tar archive. timm's reader makes the index; it would open the archive anew for each image, in 0.4 ms."""

    def __init__(self, reader, where: str):
        super().__init__(reader, where)
        self.archives = Archives([Path(where)])

    def open(self, index: int) -> tuple[BinaryIO, int]:
        member, _, inner = self.reader.samples[index]
        if inner is not None:  # an archive in the archive
            return self.reader[index]
        return io.BytesIO(self.archives.read(0, member.offset_data, member.size)), self.reader.targets[index]


class _HubSource(FileSource):
    """A data set of `datasets`, whose images may have no path, or one of long ago and elsewhere."""

    def name(self, index: int) -> str:
        return f"{self.where}, image {index} ({self.reader.filename(index)})"

    def open(self, index: int) -> tuple[BinaryIO, int]:
        try:
            return self.reader[index]
        except AssertionError as error:
            raise UserError("it has neither bytes nor a path") from error


class ShardSource(EncodedSource):
    """Through an index of WebDataset shards."""

    def __init__(self, index: ShardIndex):
        self.index, self.classes, self.n_labels = index, index.classes, index.n_labels

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return self.index.name(index)

    def open(self, index: int) -> tuple[BinaryIO, int]:
        return self.index.open(index)


class _Torchvision(Source):
    """A data set of torchvision's, which decodes by itself."""

    def __init__(self, images: Dataset, where: str):
        self.images, self.where = images, where
        self.classes = tuple(images.classes)
        self.n_labels = len(self.classes)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.where}, image {index}"

    def picture(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.images[index]
        return image if image.mode == "RGB" else image.convert("RGB"), label


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
    except RuntimeError as error:
        raise UserError(
            f"{config.dataset} is not in data_dir={config.data_dir!r} ({error}): pass the right folder, or "
            "--download to fetch it there"
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
    # A kept archive handle would be shared by forked workers, position included: they would read each other's bytes.
    kind, settings = (_TarSource, {"cache_tarfiles": False}) if config.dataset == "tar" else (FileSource, {})
    try:
        images = create_dataset("", root=str(place), split=split, search_split=False, **settings)
    except (RuntimeError, ValueError, tarfile.TarError) as error:
        raise UserError(
            f"{place} cannot be used ({error}): it must hold images, each in a folder named after its class"
        ) from error
    return kind(images.reader, str(place))


def _open_hf(config: TrainConfig, train: bool) -> Source:
    """A data set of `datasets`, by timm's reader: a local folder of parquet, arrow or image files, or a name.

    `datasets` writes parquet anew as arrow into its cache (HF_DATASETS_CACHE) the first time.
    """
    split, option = _split(config, train)
    if importlib.util.find_spec("datasets") is None:
        raise UserError("dataset='hf' needs the package datasets: pip install crate_fast[hf]")
    if not Path(config.data_dir).is_dir() and not config.download:
        raise UserError(
            f"data_dir={config.data_dir!r} is no folder: pass --data-dir FOLDER, or --download to let datasets fetch "
            "what the Hugging Face Hub has by this name, or take it from its cache"
        )
    where = f"{config.data_dir}, split {split}"
    try:
        reader = create_dataset(f"hfds/{config.data_dir}", split=split).reader
    except (OSError, ValueError) as error:
        raise UserError(
            f"datasets cannot open {where} ({type(error).__name__}: {error}): it must be of parquet, arrow or image "
            f"files; pass --data-dir, or {option}"
        ) from error
    columns = set(reader.dataset.column_names)
    if reader.dataset.data.column("image").null_count == len(reader):  # timm's cast has made one of nothing
        columns.remove("image")
    if not {"image", "label"} <= columns:
        raise UserError(f"{where} has the columns {sorted(columns)}: rename two to image and label")
    labels = reader.dataset.unique("label")
    if not labels or not all(isinstance(label, int) and label >= 0 for label in labels):
        raise UserError(f"{where}: labels must be integers from 0, and are {labels[:8]}: pass a labelled split")
    source = _HubSource(reader, where)
    source.n_labels = max(source.n_labels, max(labels) + 1)
    return source


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
        return ShardSource(ShardIndex(find_shards(root, *_split(config, train)), root))
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
        raise UserError(f"the training and validation splits have different classes, such as {differing}")
    return train.classes
