"""Data sets and loaders: uint8 images in an order that depends on seed and epoch alone, not on processes or workers.

Images stay uint8 until they are on the device; `Normalize` runs there. A sample is named by (epoch, index) and its
augmentation draws from a generator seeded with (seed, epoch, index): a resumed run, or one with more processes, sees
the same pixels.
"""

import dataclasses
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets as torchvision_datasets
from torchvision import transforms

from crate_fast.train.config import TrainConfig
from crate_fast.train.shape_scenes import ShapeScenes

__all__ = [
    "UNREADABLE",
    "DataSplits",
    "Normalize",
    "build_splits",
    "drawing_from",
    "eval_loader",
    "plain_splits",
    "train_loader",
]

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises on a damaged file

_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
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


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    flips: Tensor | None = None
    problems: list = []
    masks: Tensor | None = None


def mirrored(images, flips):
    return torch.where(flips[:, None, None, None], images.flip(-1), images)


def _collate(samples):
    parts = torch.utils.data.default_collate(samples)
    return Batch(parts[0], parts[1], None, [], parts[2] if len(parts) > 2 else None)


class Normalize(nn.Module):
    """uint8 images [B, 3, S, S] → (x/255 − mean)/std in fp32, on the images' device.

    Args:
        statistics: "imagenet", "cifar10" or "half", or (mean, deviation) of the three channels.
    """

    def __init__(self, statistics: str | tuple[Sequence[float], Sequence[float]]):
        super().__init__()
        values = _STATISTICS[statistics] if isinstance(statistics, str) else statistics
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in values)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


@contextmanager
def drawing_from(seed: int, epoch: int, index: int):
    """Python's, NumPy's and PyTorch's global generators seeded by one sample's name; PyTorch's is put back after."""
    state = torch.get_rng_state()
    mixed = int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)  # noqa: NPY002  (timm's augmentations draw from the global generator)
    torch.manual_seed(mixed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class _Augmented(Dataset):
    """(epoch, index) → (uint8 image, label): PIL images behind a transform with randomness of the sample's own."""

    def __init__(self, images: Dataset, transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.images[index]
        with drawing_from(self.seed, epoch, index):
            return self.transform(image.convert("RGB")), label


class _Files(Dataset):
    """(PIL image, label) by index, straight from timm's reader.

    timm's own data set puts the next image in the place of one that cannot be read; here that is an OSError with its
    name.
    """

    def __init__(self, reader):
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        try:
            with Image.open(file) as picture:
                return picture.convert("RGB"), label
        except UNREADABLE as error:
            raise OSError(f"{self.reader.filename(index)}: {type(error).__name__}: {error}") from error


class _Fixed(Dataset):
    """(epoch, index) → sample `index`, the same in every epoch, with the epoch deciding horizontal flips."""

    def __init__(self, images: Dataset, hflip: float, seed: int):
        self.images, self.hflip, self.seed = images, hflip, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple]:
        samples = self.images.__getitems__([index for _, index in keys])
        if not self.hflip:
            return samples
        return [self._flipped(key, sample) for key, sample in zip(keys, samples, strict=True)]

    def _flipped(self, key: tuple[int, int], sample: tuple) -> tuple:
        if np.random.default_rng((self.seed, *key)).random() >= self.hflip:
            return sample
        image, label, *mask = sample
        return image.flip(-1), label, *(m.flip(-1) for m in mask)


@dataclass(frozen=True)
class DataSplits:
    """The two splits and what the rest of the run must know of them.

    Attributes:
        train, val: Data sets of uint8 images, asked for by (epoch, index).
        classes: Class names, in the order of the labels.
        masks: Validation data with object masks, (image, label, mask), or None.
    """

    train: Dataset
    val: Dataset
    classes: tuple[str, ...]
    masks: Dataset | None


def _train_transform(config: TrainConfig) -> transforms.Compose:
    size = config.image_size
    crop = {
        "none": [transforms.Resize((size, size))],
        "center": [transforms.Resize(size), transforms.CenterCrop(size)],
        "pad": [transforms.Resize((size, size)), transforms.RandomCrop(size, padding=size // 8)],
        "random": [RandomResizedCropAndInterpolation(size, scale=(config.crop_scale, 1.0), interpolation="bicubic")],
    }
    augment = [rand_augment_transform(config.auto_augment, {})] if config.auto_augment else []
    flip = transforms.RandomHorizontalFlip(config.hflip)
    return transforms.Compose([*crop[config.crop], flip, *augment, transforms.PILToTensor()])


def _eval_transform(config: TrainConfig) -> transforms.Compose:
    size = config.image_size
    resize = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])


def _open_images(config: TrainConfig, train: bool) -> tuple[Dataset, tuple[str, ...]]:
    """A data set of (PIL image, label) and its class names."""
    root = Path(config.data_dir)
    split = config.train_split if train else config.val_split
    if config.dataset in _TORCHVISION:
        try:
            images = _TORCHVISION[config.dataset](root, train, config.download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{config.dataset} is not in data_dir={config.data_dir!r} ({error}): pass the right folder, or "
                "--download to fetch it there"
            ) from error
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{config.dataset} needs {error.name}: pip install {error.name}") from error
        return images, tuple(images.classes)
    source = root / f"{split}.tar" if config.dataset == "tar" else root / split
    if not source.exists():
        present = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else "no such folder"
        option = "--train-split" if train else "--val-split"
        raise FileNotFoundError(f"{source} is not there (data_dir holds: {present}): pass --data-dir, or {option}")
    # A kept archive handle would be shared by forked workers, position included: they would read each other's bytes.
    reader = {"cache_tarfiles": False} if config.dataset == "tar" else {}
    images = create_dataset("", root=str(source), split=split, search_split=False, **reader)
    names = images.reader.class_to_idx if hasattr(images.reader, "class_to_idx") else images.reader.class_name_to_idx
    return images, tuple(sorted(names, key=names.get))


def build_splits(config: TrainConfig) -> DataSplits:
    """Open the data set that the configuration names.

    Raises:
        FileNotFoundError: It is not where the configuration says.
        ValueError: The two splits have different classes.
    """
    if config.dataset == "shape_scenes":
        common = {"image_size": config.image_size, "seed": config.seed}
        train = ShapeScenes(config.train_samples, split="train", **common)
        val = ShapeScenes(config.val_samples, split="val", **common)
        masks = ShapeScenes(
            min(config.segmentation_samples, config.val_samples), split="val", with_mask=True, **common
        )
        fixed = partial(_Fixed, seed=config.seed)
        return DataSplits(fixed(train, config.hflip), fixed(val, 0.0), tuple(train.classes), fixed(masks, 0.0))
    train_images, classes = _open_images(config, train=True)
    val_images, val_classes = _open_images(config, train=False)
    if classes != val_classes:
        differing = sorted(set(classes) ^ set(val_classes))[:8]
        raise ValueError(f"the training and validation splits have different classes, such as {differing}")
    return DataSplits(
        _Augmented(train_images, _train_transform(config), config.seed),
        _Augmented(val_images, _eval_transform(config), config.seed),
        classes,
        None,
    )


def plain_splits(config: TrainConfig) -> DataSplits:
    """`build_splits` as a frozen model is probed: both splits under the validation transform, nothing augmented.

    An image that cannot be read raises one of `UNREADABLE`, and none takes its place.
    """
    data = build_splits(dataclasses.replace(config, hflip=0.0))
    if config.dataset == "shape_scenes":
        return data

    def plain(split: _Augmented) -> _Augmented:
        images = _Files(split.images.reader) if isinstance(split.images, ImageDataset) else split.images
        return _Augmented(images, _eval_transform(config), config.seed)

    return dataclasses.replace(data, train=plain(data.train), val=plain(data.val))


class _TrainBatches:
    """Batches of (epoch, index) for one process, epoch after epoch, from any optimiser step on.

    A step's global batch is cut into `accumulate` micro-batches, each dealt out to the processes: which images a step
    sees depends neither on the number of processes nor on accumulation.
    """

    def __init__(self, config: TrainConfig, n_images: int, rank: int, world_size: int, first_step: int):
        self.config, self.n_images = config, n_images
        self.rank, self.world_size, self.first_step = rank, world_size, first_step
        self.steps_per_epoch = n_images // config.batch_size

    def __len__(self) -> int:
        return (self.config.epochs * self.steps_per_epoch - self.first_step) * self.config.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        micro = self.config.batch_size // self.config.accumulate
        start_epoch, start = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(start_epoch, self.config.epochs):
            order = np.random.default_rng((self.config.seed, epoch)).permutation(self.n_images)
            for step in range(start, self.steps_per_epoch):
                batch = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
                for part in range(self.config.accumulate):
                    mine = batch[part * micro : (part + 1) * micro][self.rank :: self.world_size]
                    yield [(epoch, int(index)) for index in mine]
            start = 0


def train_loader(
    config: TrainConfig, data: Dataset, *, rank: int = 0, world_size: int = 1, first_step: int = 0
) -> DataLoader:
    """Micro-batches of this process for every step from `first_step` to the end of the run.

    Raises:
        ValueError: The data set is smaller than a batch, or the batch cannot be dealt out evenly.
    """
    share = config.accumulate * world_size
    if config.batch_size % share:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be dealt out to {world_size} processes × {config.accumulate} "
            f"accumulation steps: make it a multiple of {share}"
        )
    if len(data) < config.batch_size:
        raise ValueError(f"the training split has {len(data)} images, fewer than batch_size={config.batch_size}")
    batches = _TrainBatches(config, len(data), rank, world_size, first_step)
    return _loader(config, data, batches, persistent=False)


def eval_loader(config: TrainConfig, data: Dataset, *, rank: int = 0, world_size: int = 1) -> DataLoader:
    """This process's share of a split, every image once over all processes."""
    mine = range(rank, len(data), world_size)
    size = max(1, min(256, config.batch_size))
    batches = [[(0, index) for index in mine[start : start + size]] for start in range(0, len(mine), size)]
    return _loader(config, data, batches, persistent=True)


def _loader(config: TrainConfig, data: Dataset, batches, persistent: bool) -> DataLoader:
    workers = config.workers
    if workers is None:  # on a CPU a loading process takes a core from the training threads and slows them far more
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, share) if _on_gpu(config) else 0
    parallel = {"persistent_workers": persistent, "prefetch_factor": 4} if workers else {}
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=_on_gpu(config),
        worker_init_fn=_one_thread,
        collate_fn=_collate,
        **parallel,
    )


def _on_gpu(config: TrainConfig) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
