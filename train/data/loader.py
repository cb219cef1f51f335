"""Splits and loaders of uint8 batches, in an order that depends on seed and epoch alone, not on processes or workers.

The key of a training sample is (epoch, index, copy). Key and seed determine its random numbers, so a resumed run, or
one with more processes, sees the same pixels. Images stay uint8 until the device normalises them.
"""

import ctypes
import dataclasses
import os
import random
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crate_fast.errors import UserError
from crate_fast.settings import usable_cores
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.image_files import Unreadable
from crate_fast.train.data.shape_scenes import ShapeScenes
from crate_fast.train.data.shards import ShardSource, TarSource, find_shards
from crate_fast.train.data.sources import (
    TORCHVISION,
    FolderSource,
    HubSource,
    Source,
    common_classes,
    open_torchvision,
)
from crate_fast.train.data.transforms import drawing_from, eval_transform, train_transform

Key = tuple[int, int] | tuple[int, int, int]
Transform = Callable[[Image.Image], Image.Image]
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_ATTEMPTS = 30  # to find a readable image for a sample


class Batch(NamedTuple):
    """Batch of images from a loader."""

    images: Tensor  # uint8 [B, 3, S, S]. In evaluation B is 0 if the whole batch is corrupt.
    labels: Tensor  # int64 [B]
    problems: Sequence[str] = ()  # "path: error: reason" of each corrupt image found while loading this batch
    keys: Sequence[Key] = ()  # in evaluation, (epoch, index) of each sample


class _Split(Dataset):
    """Batches of a source's samples by key, which seeds the transform."""

    def __init__(self, images: Dataset, config: TrainConfig, transform: Transform | None = None, hflip: float = 0.0):
        self.images, self.seed, self.size = images, config.seed, config.image_size
        self.transform, self.hflip = transform, hflip

    def __len__(self) -> int:
        return len(self.images)

    def _sample(self, key: Key, attempt: int = 0) -> tuple[Image.Image, int]:
        """Load a sample; from attempt 1 on, load another image, chosen by key and attempt."""
        epoch, index, *copy = key
        seeds = (epoch, index, *copy, attempt) if attempt else key
        with drawing_from(self.seed, *seeds):
            picture, label = self.images[random.randrange(len(self)) if attempt else index]
            return self.transform(picture), label

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        return self.batch(keys)

    def flipped(self, key: Key) -> bool:
        return self.hflip > 0 and np.random.default_rng((self.seed, *key)).random() < self.hflip

    def batch(self, keys: Sequence[Key]) -> Batch:
        """Load the samples of `keys`; corrupt ones are replaced in training and skipped in evaluation."""
        images = np.empty((len(keys), 3, self.size, self.size), np.uint8)
        labels, loaded, problems = [], [], []
        for key in keys:
            training = len(key) == 3
            for attempt in range(_ATTEMPTS if training else 1):
                try:
                    picture, label = self._sample(key, attempt)
                except Unreadable as error:
                    problems.append(str(error))
                    continue
                images[len(loaded)] = np.asarray(picture).transpose(2, 0, 1)[..., :: -1 if self.flipped(key) else 1]
                labels.append(label)
                loaded.append(key)
                break
            else:
                if training:
                    raise UserError(
                        f"{_ATTEMPTS} images in a row could not be read, the last: {problems[-1]}. "
                        "Check that the disk is still available"
                    )
        labels = torch.tensor(labels, dtype=torch.int64)
        return Batch(torch.from_numpy(images[: len(loaded)]), labels, problems, _of_evaluation(loaded))


class _SceneSplit(_Split):
    """Scenes of `ShapeScenes`, the same in every epoch, drawn a batch at a time."""

    def batch(self, keys: Sequence[Key]) -> Batch:
        images, labels = zip(*self.images.__getitems__([key[1] for key in keys]), strict=True)
        images = [image.flip(-1) if self.flipped(key) else image for image, key in zip(images, keys, strict=True)]
        return Batch(torch.stack(images), torch.tensor(labels), [], _of_evaluation(keys))


def _of_evaluation(keys: Sequence[Key]) -> Sequence[Key]:
    """Return the keys of evaluation; those of training, which nothing reads, would fill a worker's pipe."""
    return () if keys and len(keys[0]) == 3 else keys


@dataclass(frozen=True)
class DataSplits:
    """Training and validation split of a data set; `batch` loads samples by key."""

    train: Dataset | None  # None if not opened
    val: Dataset
    classes: tuple[str, ...]  # names, in the order of the labels


def files_checksum(split: Dataset) -> int | None:
    """Return a checksum of a folder's file names, or of the labels in archives, in order; None for other data."""
    items = getattr(getattr(split, "images", None), "items", None)
    if not isinstance(items, np.ndarray):
        return None
    return zlib.crc32((items if items.ndim == 1 else items[:, 3]).tobytes())


def open_source(config: TrainConfig, train: bool) -> Source:
    """Open the training or the validation split of the configured data set, except shape_scenes."""
    if config.dataset in TORCHVISION:
        return open_torchvision(config.dataset, config.data_dir, train, config.download)
    split, other = (config.train_split, config.val_split)[:: 1 if train else -1]
    option = "--train-split" if train else "--val-split"
    root = Path(config.data_dir)
    if config.dataset == "hf":
        return HubSource(config.data_dir, split, option, config.download)
    if config.dataset == "shards":
        return ShardSource(find_shards(root, split, option, other), root)
    place = root / f"{split}.tar" if config.dataset == "tar" else root / split
    if not place.exists():
        present = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else "no such folder"
        raise UserError(f"{place} does not exist (data_dir holds: {present}): pass --data-dir, or {option}")
    return TarSource(place) if config.dataset == "tar" else FolderSource(place)


def build_splits(config: TrainConfig) -> DataSplits:
    """Open both splits of the configured data set.

    Raises:
        UserError: A split cannot be opened, their classes differ, or `auto_augment` is not a policy.
    """
    if config.dataset == "shape_scenes":
        scenes = partial(ShapeScenes, image_size=config.image_size, seed=config.seed)
        train = _SceneSplit(scenes(config.train_samples, split="train"), config, hflip=config.hflip)
        val = _SceneSplit(scenes(config.val_samples, split="val"), config)
        return DataSplits(train, val, ShapeScenes.classes)
    transform = train_transform(config)  # first, because listing the data may take minutes
    sources = open_source(config, train=True), open_source(config, train=False)
    train = _Split(sources[0], config, transform, config.hflip)
    return DataSplits(train, _Split(sources[1], config, eval_transform(config.image_size)), common_classes(*sources))


def plain_splits(config: TrainConfig, train: bool = True, **how) -> DataSplits:
    """Open both splits, or without `train` only the validation split, to evaluate a model.

    `how` are arguments of `eval_transform`, with which both are read.
    """
    if config.dataset == "shape_scenes":
        return build_splits(dataclasses.replace(config, hflip=0.0))
    sources = [open_source(config, train=which) for which in ((True, False) if train else (False,))]
    splits = [_Split(source, config, eval_transform(config.image_size, **how)) for source in sources]
    return DataSplits(splits[0] if train else None, splits[-1], common_classes(sources[0], sources[-1]))


def _train_keys(
    config: TrainConfig, n_images: int, rank: int, world_size: int, first_step: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield the keys (epoch, index, copy) of each micro-batch of one process, from any optimiser step on.

    The global batch of a step is split into `accumulate` micro-batches, and each of these into equal parts for the
    processes, so a step always sees the same images. With r = `repeats`, an epoch shows 1/r of the images, and r
    epochs share a permutation. Copies of an image are adjacent in the global batch, so they are spread over the
    processes.
    """
    copies, micro = config.repeats, config.batch_size // config.accumulate
    length, different = n_images // copies, config.batch_size // copies
    steps_per_epoch = n_images // config.batch_size
    start_epoch, start = divmod(first_step, steps_per_epoch)
    for epoch in range(start_epoch, config.epochs):
        turn, share = divmod(epoch, copies)
        order = np.random.default_rng((config.seed, turn)).permutation(n_images)[share * length :]
        for step in range(start, steps_per_epoch):
            shown = order[step * different : (step + 1) * different].tolist()
            batch = [(epoch, index, copy) for index in shown for copy in range(copies)]
            for first in range(0, config.batch_size, micro):
                yield batch[first : first + micro][rank::world_size]
        start = 0


def check_batch(config: TrainConfig, n_images: int, world_size: int) -> None:
    """Raise a `UserError` if the training split is smaller than a batch, or the batch cannot be split."""
    share = config.accumulate * world_size
    if config.batch_size % share:
        raise UserError(
            f"batch_size={config.batch_size} cannot be divided among {world_size} processes × {config.accumulate} "
            f"accumulation steps: make it a multiple of {share}"
        )
    if config.frozen and config.batch_size == share:
        raise UserError(
            f"batch_size={config.batch_size}: a linear probe's BatchNorm needs at least 2 images per process and "
            f"accumulation step; make it at least {2 * share}"
        )
    if n_images < config.batch_size:
        raise UserError(
            f"the training split has {n_images} images, fewer than batch_size={config.batch_size}: lower --batch-size"
        )


def train_loader(
    config: TrainConfig, data: Dataset, *, rank: int = 0, world_size: int = 1, first_step: int = 0
) -> DataLoader:
    """Return a loader of this process's micro-batches, all of equal size, from `first_step` to the end of the run.

    `check_batch` must have passed.
    """
    size = config.batch_size // (config.accumulate * world_size)
    return _loader(config, data, _train_keys(config, len(data), rank, world_size, first_step), size)


def eval_loader(config: TrainConfig, data: Dataset, *, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Return a loader of this process's part of a split; over all processes each readable image occurs once."""
    mine = range(rank, len(data), world_size)
    size = min(256, config.batch_size)
    batches = [[(0, index) for index in mine[start : start + size]] for start in range(0, len(mine), size)]
    return _loader(config, data, batches, size, persistent=True)


def _loader(config: TrainConfig, data: Dataset, batches, size: int, persistent: bool = False) -> DataLoader:
    workers, on_gpu = config.workers, config.device != "cpu" and torch.cuda.is_available()
    if workers is None:  # on a CPU, workers compete with the training threads and slow them down
        workers = min(8, usable_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) if on_gpu else 0
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=on_gpu,
        worker_init_fn=_init_worker,
        collate_fn=_unchanged,
        persistent_workers=persistent and workers > 0,
        multiprocessing_context="fork" if workers else None,  # else each worker gets a copy of the file list
        prefetch_factor=max(1, min(4, 8192 // (workers * size))) if workers else None,  # 1.2 GB at 224 px
    )


def _unchanged(batch: Batch) -> Batch:
    return batch


def _init_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # ends with a killed parent, instead of waiting for it forever with its GPU memory
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # torchrun and Ctrl-C signal the whole process group, but the loop needs its workers until it has saved
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
