"""Splits and loaders: uint8 batches in an order that depends on seed and epoch alone, not on processes or workers.

A training sample is named by (epoch, index, copy) and draws from a generator seeded with (seed, epoch, index, copy):
a resumed run, or one with more processes, sees the same pixels. Images stay uint8 until they are on the device, where
they are mirrored and normalised:

    images = normalize(mirrored(batch.images.to(device), batch.flips.to(device)))

An image that cannot be read is named in its batch's `problems`. In training another takes its place, drawn by the
sample's name too; in evaluation it is left out.
"""

import dataclasses
import os
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.image_files import UNREADABLE
from crate_fast.train.data.shape_scenes import ShapeScenes
from crate_fast.train.data.sources import Source, common_classes, open_source
from crate_fast.train.data.transforms import (
    Normalize,
    drawing_from,
    eval_transform,
    mirrored,
    pixels,
    train_transform,
)
from crate_fast.train.data.unreadable import Unreadable

__all__ = [
    "UNREADABLE",
    "Batch",
    "DataSplits",
    "Normalize",
    "build_splits",
    "drawing_from",
    "eval_loader",
    "mirrored",
    "plain_splits",
    "readable",
    "train_loader",
]

Key = tuple[int, int] | tuple[int, int, int]
_ATTEMPTS = 30  # at finding a readable image for a sample


class Batch(NamedTuple):
    """Images as a loader gives them.

    Attributes:
        images: uint8 [B, 3, S, S], not mirrored yet. B may be 0 in evaluation, if none of a batch could be read.
        labels: int64 [B].
        flips: bool [B]; the images that `mirrored` is to mirror on the device. Loaders always give it; None: none.
        problems: "path: error: what it says" for each image that could not be read while this batch was made.
        keys: Names of the samples, (epoch, index) or (epoch, index, copy).
        masks: Of `DataSplits.masks`, bool [B, S, S]; else None.
    """

    images: Tensor
    labels: Tensor
    flips: Tensor | None = None
    problems: Sequence[str] = ()
    keys: Sequence[Key] = ()
    masks: Tensor | None = None


class _Split(Dataset, ABC):
    """What the splits of every data set share.

    `split[epoch, index]` and `split[epoch, index, copy]` are (image uint8 [3, S, S], label, …), not mirrored.
    """

    def __init__(self, images: Dataset, config: TrainConfig, hflip: float = 0.0):
        self.images, self.seed, self.size, self.hflip = images, config.seed, config.image_size, hflip

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def batch(self, keys: Sequence[Key], replace: bool) -> Batch:
        """The samples of these names; unreadable ones replaced or left out."""

    def flips(self, keys: Sequence[Key]) -> Tensor:
        """Which of the samples are to be mirrored, bool [B]."""
        if not self.hflip:
            return torch.zeros(len(keys), dtype=torch.bool)
        return torch.tensor([np.random.default_rng((self.seed, *key)).random() < self.hflip for key in keys])


class _Pictures(_Split):
    """Images of a source behind a transform, PIL to PIL. With `augmented` it draws from the sample's generator."""

    def __init__(
        self,
        images: Source,
        config: TrainConfig,
        transform: Callable[[Image.Image], Image.Image],
        hflip: float = 0.0,
        augmented: bool = False,
    ):
        super().__init__(images, config, hflip)
        self.transform, self.augmented = transform, augmented

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        picture, label = self._sample(key)
        return torch.from_numpy(pixels(picture).copy()), label

    def _sample(self, key: Key, attempt: int = 0) -> tuple[Image.Image, int]:
        """The sample of this name; from the first attempt on of an image drawn by its name.

        Raises:
            Unreadable: It cannot be read.
        """
        epoch, index, *copy = key
        if not self.augmented and not attempt:
            picture, label = self.images[index]
            return self.transform(picture), label
        name = (*copy, attempt) if attempt else copy
        with drawing_from(self.seed, epoch, index, *name):
            picture, label = self.images[random.randrange(len(self)) if attempt else index]
            return self.transform(picture), label

    def _readable_sample(self, key: Key, attempts: int, problems: list[str]) -> tuple[Image.Image, int] | None:
        for attempt in range(attempts):
            try:
                return self._sample(key, attempt)
            except Unreadable as error:
                problems.append(str(error))
        return None

    def batch(self, keys: Sequence[Key], replace: bool) -> Batch:
        """See `_Split`.

        Raises:
            UserError: In place of an unreadable image 29 others were tried, all unreadable.
        """
        images = np.empty((len(keys), 3, self.size, self.size), np.uint8)
        labels, kept, problems = [], [], []
        for key in keys:
            sample = self._readable_sample(key, _ATTEMPTS if replace else 1, problems)
            if sample is not None:
                images[len(kept)] = pixels(sample[0])
                labels.append(sample[1])
                kept.append(key)
            elif replace:
                raise UserError(
                    f"{_ATTEMPTS} images in a row could not be read, the last: {problems[-1]}. "
                    "Is the disk still there?"
                )
        flips = self.flips(kept)
        labels = torch.tensor(labels, dtype=torch.int64)
        return Batch(torch.from_numpy(images[: len(kept)]), labels, flips, problems, kept)


class _Scenes(_Split):
    """Scenes of `ShapeScenes`, the same in every epoch, drawn a batch at a time."""

    def __getitem__(self, key: Key) -> tuple:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple]:
        return self.images.__getitems__([key[1] for key in keys])

    def batch(self, keys: Sequence[Key], replace: bool) -> Batch:
        """See `_Split`; scenes are always readable."""
        images, labels, *masks = zip(*self.__getitems__(keys), strict=True)
        masks = torch.stack(masks[0]) if masks else None
        return Batch(torch.stack(images), torch.tensor(labels), self.flips(keys), [], keys, masks)


class _Loading(Dataset):
    """A split as a loader asks for it: names in, a `Batch` out."""

    def __init__(self, split: _Split, replace: bool):
        self.split, self.replace = split, replace

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        return self.split.batch(keys, self.replace)


@dataclass(frozen=True)
class DataSplits:
    """The two splits and what the rest of the run must know of them.

    Attributes:
        train, val: (uint8 image, label) by (epoch, index) or (epoch, index, copy), not mirrored; an image that cannot
            be read raises one of `UNREADABLE`. The loaders make batches of them.
        classes: Class names, in the order of the labels.
        masks: Validation data with object masks, (image, label, mask) by (epoch, index), or None.
    """

    train: Dataset
    val: Dataset
    classes: tuple[str, ...]
    masks: Dataset | None


def build_splits(config: TrainConfig) -> DataSplits:
    """Open the data set that the configuration names.

    Raises:
        UserError: It is not where the configuration says.
        UserError: It cannot be used, the two splits have different classes, or `auto_augment` is no policy.
        UserError: A package is missing.
    """
    if config.dataset == "shape_scenes":
        common = {"image_size": config.image_size, "seed": config.seed}
        train = ShapeScenes(config.train_samples, split="train", **common)
        val = ShapeScenes(config.val_samples, split="val", **common)
        masks = ShapeScenes(
            min(config.segmentation_samples, config.val_samples), split="val", with_mask=True, **common
        )
        return DataSplits(
            _Scenes(train, config, config.hflip), _Scenes(val, config), tuple(train.classes), _Scenes(masks, config)
        )
    transform = train_transform(config)
    train, val = open_source(config, train=True), open_source(config, train=False)
    return DataSplits(
        _Pictures(train, config, transform, config.hflip, augmented=True),
        _Pictures(val, config, eval_transform(config)),
        common_classes(train, val),
        None,
    )


def plain_splits(config: TrainConfig) -> DataSplits:
    """`build_splits` as a frozen model is probed: both splits under the validation transform, nothing augmented."""
    data = build_splits(dataclasses.replace(config, hflip=0.0))
    if config.dataset == "shape_scenes":
        return data
    return dataclasses.replace(data, train=_Pictures(data.train.images, config, eval_transform(config)))


def readable(split: Dataset, indices: Sequence[int]) -> list[tuple]:
    """The samples of a split at `indices`, in evaluation, without those that cannot be read."""
    found = []
    for index in indices:
        try:
            found.append(split[0, index])
        except Unreadable:
            continue
    return found


class _TrainBatches:
    """Batches of (epoch, index, copy) for one process, epoch after epoch, from any optimiser step on.

    A step's global batch is cut into `accumulate` micro-batches, each dealt out to the processes: which images a step
    sees depends neither on the number of processes nor on accumulation.

    With r = `repeats` an epoch shows an r-th of the images, and r epochs share a permutation: together they show all,
    but for a remainder smaller than a batch each. The copies of an image are neighbours in the global batch, and so
    go to different processes.
    """

    def __init__(self, config: TrainConfig, n_images: int, rank: int, world_size: int, first_step: int):
        self.config, self.n_images = config, n_images
        self.rank, self.world_size, self.first_step = rank, world_size, first_step
        self.steps_per_epoch = n_images // config.batch_size

    def __len__(self) -> int:
        return (self.config.epochs * self.steps_per_epoch - self.first_step) * self.config.accumulate

    def _order(self, epoch: int) -> np.ndarray:
        """Indices of an epoch's images, each once, at least as many as it shows."""
        turn, share = divmod(epoch, self.config.repeats)
        order = np.random.default_rng((self.config.seed, turn)).permutation(self.n_images)
        length = self.n_images // self.config.repeats
        return order[share * length : (share + 1) * length]

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        copies, accumulate = self.config.repeats, self.config.accumulate
        different, micro = self.config.batch_size // copies, self.config.batch_size // accumulate
        start_epoch, start = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(start_epoch, self.config.epochs):
            order = self._order(epoch)
            for step in range(start, self.steps_per_epoch):
                shown = order[step * different : (step + 1) * different].tolist()
                batch = [(epoch, index, copy) for index in shown for copy in range(copies)]
                for part in range(accumulate):
                    yield batch[part * micro : (part + 1) * micro][self.rank :: self.world_size]
            start = 0


def train_loader(
    config: TrainConfig, data: Dataset, *, rank: int = 0, world_size: int = 1, first_step: int = 0
) -> DataLoader:
    """Micro-batches (`Batch`) of this process for every step from `first_step` to the end of the run, always full.

    Raises:
        UserError: The data set is smaller than a batch, or the batch cannot be dealt out evenly.
        UserError: While loading, nothing can be read any more.
    """
    share = config.accumulate * world_size
    if config.batch_size % share:
        raise UserError(
            f"batch_size={config.batch_size} cannot be dealt out to {world_size} processes × {config.accumulate} "
            f"accumulation steps: make it a multiple of {share}"
        )
    if len(data) < config.batch_size:
        raise UserError(f"the training split has {len(data)} images, fewer than batch_size={config.batch_size}")
    batches = _TrainBatches(config, len(data), rank, world_size, first_step)
    return _loader(config, _Loading(data, replace=True), batches)


def eval_loader(config: TrainConfig, data: Dataset, *, rank: int = 0, world_size: int = 1) -> DataLoader:
    """This process's share of a split as `Batch`es, every readable image once over all processes."""
    mine = range(rank, len(data), world_size)
    size = max(1, min(256, config.batch_size))
    batches = [[(0, index) for index in mine[start : start + size]] for start in range(0, len(mine), size)]
    return _loader(config, _Loading(data, replace=False), batches, persistent=True)


def _loader(config: TrainConfig, data: _Loading, batches, persistent: bool = False) -> DataLoader:
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
        collate_fn=_as_it_is,
        **parallel,
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _on_gpu(config: TrainConfig) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
    # torchrun sends a signal to its processes' whole groups: the loop needs its workers to save and leave
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
