"""Loading of training images: how many a core loads per second, with the options of a training command.

    python benchmarks/bench_data.py --recipe in1k_released --dataset shards --data-dir SHARDS

One process loads and augments whole batches in one thread, as each of `--workers` does. The first batch is not
counted, so run it twice if the files shall come from the page cache. `--crop none` or `--auto-augment` with another
policy shows what each step costs.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from itertools import islice

import harness  # noqa: F401

import torch

from crate_fast.errors import UserError, run_command
from crate_fast.train.config import build_config
from crate_fast.train.data.loader import build_splits, check_batch, train_loader

GOAL = 12_000  # images/s for one H200


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, default=20, help="timed batches (default 20)")


def measure(argv: list[str] | None) -> None:
    """Load batches and print the median time."""
    config, options = build_config(argv, __doc__.splitlines()[0], "in1k_released", add_options=_add_options)
    config = replace(config, workers=0, device="cpu")
    torch.set_num_threads(1)
    images = build_splits(config).train
    check_batch(config, len(images), 1)
    us, start = [], time.perf_counter()
    for batch in islice(train_loader(config, images), options.batches + 1):
        now = time.perf_counter()
        us.append(1e6 * (now - start) / len(batch.images))
        start = now
    if len(us) < 2:
        raise UserError("only the first batch, which is not counted: pass a smaller --batch-size or more --batches")
    median = statistics.median(us[1:])
    print(f"{median:,.0f} µs an image, {1e6 / median:,.0f} images/s a core")
    print(f"{GOAL * median / 1e6:,.3g} cores for {GOAL:,} images/s")


def main(argv: list[str] | None = None) -> int:
    """Measure the loading of the training split; return 0, or 2 after an error."""
    return run_command(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
