"""Convert a data set to WebDataset shards of smaller images, which decode in a fraction of the time.

    python -m crate_fast.train.write_shards --dataset folder --data-dir IMAGENET --val-split val --output SHARDS
    torchrun train/pretrain.py --dataset shards --data-dir SHARDS --val-split val …

Images with a shorter side above `--shorter-side` are downscaled and written as JPEG; smaller JPEG, PNG and WebP
images keep their bytes. Corrupt images are left out and listed at the end. The output appears when it is complete.
"""

import argparse
import io
import multiprocessing
import os
import shutil
import sys
import tarfile
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from crate_fast.errors import CommandParser, UserError, run_command
from crate_fast.options import positive
from crate_fast.settings import usable_cores
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.image_files import describe, open_image, to_rgb
from crate_fast.train.data.loader import open_source
from crate_fast.train.data.sources import Source, common_classes

_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that keep their bytes


def encoded(content: bytes, shorter_side: int, quality: int) -> tuple[str, bytes]:
    """Return the (suffix, bytes) under which a shard stores an image."""
    with open_image(io.BytesIO(content)) as image:
        kind, picture = image.format, to_rgb(image)  # always decode, to leave out damaged images
    size = picture.size
    if min(size) <= shorter_side and kind in _SUFFIX:
        return _SUFFIX[kind], content
    if min(size) > shorter_side:
        scale = shorter_side / min(size)
        picture = picture.resize([max(1, round(side * scale)) for side in size], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return "jpg", file.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


_job: tuple = ()  # source, path without number, options: sent to each worker once, because the index may be large


def _init_worker(*job) -> None:
    global _job
    _job = job
    if parent := multiprocessing.parent_process():  # the pool's processes would outlive a parent that is killed
        threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def _write_shard(number: int) -> list[str]:
    source, path, options = _job
    problems = []
    with tarfile.open(f"{path}-{number:05d}.tar", "w") as archive:
        for index in range(number * options.per_shard, min((number + 1) * options.per_shard, len(source))):
            try:
                file, label = source.open(index)
                with file:
                    suffix, content = encoded(file.read(), options.shorter_side, options.quality)
            except Exception as error:  # as in `Source`
                problems.append(describe(source.name(index), error))
                continue
            _add(archive, f"{index:09d}.{suffix}", content)
            _add(archive, f"{index:09d}.cls", str(label).encode())
    return problems


def _write_split(source: Source, path: Path, options: argparse.Namespace) -> list[str]:
    numbers = range(-(-len(source) // options.per_shard))
    processes, job = min(options.workers, len(numbers)), (source, path, options)
    chunk = -(-len(numbers) // (64 * processes))  # shards per task: few tasks wait, however many shards there are
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _init_worker, job) as pool:
            shards = pool.map(_write_shard, numbers, chunksize=chunk)
            done = tqdm(shards, total=len(numbers), unit="shard", desc=path.name)
            problems = [line for problems in done for line in problems]
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that writes the shards of {path.name} was killed, perhaps for memory: pass fewer --workers "
            f"than {processes}"
        ) from error
    if len(problems) > options.max_unreadable * len(source):
        raise UserError(
            f"{len(problems)} of {len(source)} images of {path.name} cannot be read, more than "
            f"{options.max_unreadable:.0%}; the first error: {problems[0]}. Repair or remove them, or raise "
            "--max-unreadable"
        )
    return problems


def _write(options: argparse.Namespace) -> None:
    if options.output.exists():
        raise UserError(f"--output {options.output} exists already: pass a new folder")
    for split in (options.train_split, options.val_split):
        if "/" in split:
            raise UserError(f"split {split!r}: names of shards cannot contain /; move that part to --data-dir")
    names = ("dataset", "data_dir", "train_split", "val_split")
    config = TrainConfig(**{name: getattr(options, name) for name in names})
    train, val = open_source(config, train=True), open_source(config, train=False)
    class_lines = "".join(f"{name}\n" for name in common_classes(train, val))
    problems = []
    partial = options.output.with_name(f".{options.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed command
    partial.mkdir(parents=True)
    try:
        for split, source in {config.train_split: train, config.val_split: val}.items():
            problems += _write_split(source, partial / split, options)
        (partial / "classes.txt").write_bytes(class_lines.encode())
        partial.rename(options.output)
    finally:  # after an error, such as a full disk, nothing stays
        shutil.rmtree(partial, ignore_errors=True)
    print(f"written: {options.output}; unreadable images left out: {len(problems)}")
    print("".join(f"  {line}\n" for line in problems), end="")


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` and write both splits; return the exit status."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("folder", "tar", "shards", "hf"), default="folder", help="its format")
    parser.add_argument("--data-dir", required=True, help="folder of the data set")
    parser.add_argument("--train-split", default="train", help="name of the training split")
    parser.add_argument("--val-split", default="validation", help="name of the validation split")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the shards")
    parser.add_argument("--shorter-side", type=positive, default=256, help="largest shorter side in pixels")
    parser.add_argument("--quality", type=positive, default=95, help="JPEG quality of downscaled images")
    parser.add_argument("--per-shard", type=positive, default=5_000, help="images per shard")
    parser.add_argument("--workers", type=positive, default=usable_cores(), help="number of processes")
    share = "largest fraction of corrupt images in a split; default %(default)s"
    parser.add_argument("--max-unreadable", type=float, default=TrainConfig.max_unreadable, help=share)
    return run_command(lambda: _write(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
