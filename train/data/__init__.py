"""Training data, from image files to batches.

`sources` opens a folder, archive or data set, and gives image n and its label; `shards` indexes tar archives for it.
`image_files` finds image files and decodes them to upright 8-bit RGB; `shape_scenes` draws images instead.
`transforms` crops and augments a decoded image in a worker, with a generator seeded by the sample's name.
`loader` makes uint8 batches, in an order of seed and epoch alone; the device mirrors and normalises them.
A corrupt image is `Unreadable`: training replaces it, evaluation skips it, the batch names it, a tally counts it.
"""

from crate_fast.train.data.image_files import UNREADABLE
from crate_fast.train.data.loader import (
    Batch,
    DataSplits,
    build_splits,
    eval_loader,
    open_source,
    plain_splits,
    readable,
    train_loader,
)
from crate_fast.train.data.transforms import Normalize, drawing_from, mirrored, mixed_seed

__all__ = [
    "UNREADABLE",
    "Batch",
    "DataSplits",
    "Normalize",
    "build_splits",
    "drawing_from",
    "eval_loader",
    "mirrored",
    "mixed_seed",
    "open_source",
    "plain_splits",
    "readable",
    "train_loader",
]
