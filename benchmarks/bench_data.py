"""Data loading: images/s of one core, by stage and by source, at 224 px.

    python benchmarks/bench_data.py                  # results/data.{json,md}; about a minute
    python benchmarks/bench_data.py --images DIR     # JPEGs of your own instead of drawn ones
    python benchmarks/bench_data.py --smoke          # small, anywhere, nothing written

PyTorch has one thread, and there are no loading processes. Files are in the page cache. Images are JPEGs of
`shape_scenes`, 500×375. First, the folder and its shards must give the same batches.
"""

import argparse
import io
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from harness import RESULTS, interleaved, write_results

import torch
from gpu_report import markdown_table
from PIL import Image

from crate_fast.train import write_shards
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.image_files import read_image
from crate_fast.train.data.loader import build_splits, open_source, train_loader
from crate_fast.train.data.shape_scenes import ShapeScenes
from crate_fast.train.data.transforms import Normalize, train_transform

GOAL = 12_000  # images/s for one H200
POLICIES = ("rand-m9-n2-mstd0.5", "randaugment-n2-m14")
SIZE, CLASSES = 224, 4
SHARDS = {"shards": 10**6, "shards of 256 px": 256}  # name → --shorter-side; the first keep the files' bytes


def drawn_jpegs(count: int) -> list[bytes]:
    """Draw scenes as JPEG files, 500×375."""
    scenes = ShapeScenes(count, image_size=512)
    found = []
    for start in range(0, count, 8):
        for image, _ in scenes.__getitems__(range(start, min(start + 8, count))):
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).crop((6, 68, 506, 443))
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=95)
            found.append(file.getvalue())
    return found


def write_sources(root: Path, jpegs: list[bytes], batch: int) -> dict[str, TrainConfig]:
    """Write the images as a folder and as shards; return the settings of each source."""
    for number, content in enumerate(jpegs):
        file = root / "folder" / "train" / str(number * CLASSES // len(jpegs)) / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    common = {"image_size": SIZE, "batch_size": batch, "crop": "random", "hflip": 0.5, "workers": 0, "device": "cpu"}
    common |= {"epochs": 1, "val_split": "train"}
    configs = {"folder": TrainConfig(dataset="folder", data_dir=str(root / "folder"), **common)}
    for name, side in SHARDS.items():
        words = ["--data-dir", str(root / "folder"), "--val-split", "train", "--output", str(root / name)]
        if write_shards.main([*words, "--shorter-side", str(side)]):
            raise SystemExit("no shards: no numbers")
        configs[name] = replace(configs["folder"], dataset="shards", data_dir=str(root / name))
    return configs


def check_equal(configs: dict[str, TrainConfig]) -> None:
    """Stop unless the folder and the shards of its files give the same batches."""
    loaders = (train_loader(config, build_splits(config).train) for config in map(configs.get, ("folder", "shards")))
    first, second = (next(iter(loader)) for loader in loaders)
    if first.problems or second.problems or not all(map(torch.equal, first[:2], second[:2])):
        raise SystemExit("folder and shards give different batches: no numbers")


def stages(config: TrainConfig) -> dict[str, tuple[Callable[[], object], int]]:
    """Return the stages of loading: a call that handles the next images, and their number."""
    source, batch = open_source(config, train=True), config.batch_size

    def read(index: int) -> bytes:
        with source.open(index)[0] as file:
            return file.read()

    def each(stage: Callable, values: list) -> tuple[Callable[[], object], int]:
        turn = itertools.cycle(values)
        return (lambda: stage(next(turn))), 1

    files = [read(index) for index in range(min(len(source), 64))]
    pictures = [read_image(io.BytesIO(content)) for content in files]
    crop, normalize = train_transform(config), Normalize("imagenet")
    cropped = [crop(picture) for picture in pictures]
    images = torch.zeros(batch, 3, SIZE, SIZE, dtype=torch.uint8)
    found = {
        "read": each(read, list(range(len(source)))),
        "decode": each(lambda content: read_image(io.BytesIO(content)), files),
        "random crop and resize": each(crop, pictures),
    }
    for policy in POLICIES:
        augment = train_transform(replace(config, crop="none", auto_augment=policy)).transforms[-1]
        found[f"augment: {policy}"] = each(augment, cropped)
    found["normalise (on the model's device)"] = (lambda: normalize(images), batch)
    return found


def whole(configs: dict[str, TrainConfig]) -> dict[str, tuple[Callable[[], object], int]]:
    """Return calls that load whole batches of endless epochs, by source."""
    for name, policy in itertools.product(SHARDS, POLICIES):
        configs = configs | {f"{name}, {policy}": replace(configs[name], auto_augment=policy)}
    found = {}
    for name, config in configs.items():
        epochs = iter(partial(train_loader, config, build_splits(config).train), None)
        found[f"batches: {name}"] = (partial(next, itertools.chain.from_iterable(epochs)), config.batch_size)
    return found


def measure(calls: dict[str, tuple[Callable[[], object], int]], rounds: int) -> list[dict]:
    """Time the calls in turn; return a row for each, with times per image."""
    rows = []
    for name, timing in interleaved({name: call for name, (call, _) in calls.items()}, rounds).items():
        us, low, high = (1e6 * seconds / calls[name][1] for seconds in timing)
        row = {"what": name, "µs an image": us, "20–80 %": f"{low:,.0f}–{high:,.0f}", "images/s a core": 1e6 / us}
        rows.append(row | {f"cores for {GOAL:,} images/s": GOAL * us / 1e6})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Compare the sources, measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of JPEGs to use instead of drawn ones")
    parser.add_argument("--smoke", action="store_true", help="small and short; writes nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of data.{json,md}; default %(default)s")
    options = parser.parse_args(argv)
    count, rounds, batch = (8, 1, 8) if options.smoke else (256, 10, 32)
    torch.set_num_threads(1)
    if options.images:
        paths = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        jpegs = [path.read_bytes() for path in paths[:: max(1, len(paths) // count)][:count]]
    else:
        jpegs = drawn_jpegs(count)
    if len(jpegs) < batch:
        raise SystemExit(f"{len(jpegs)} JPEGs in {options.images}, fewer than a batch of {batch}: add more")
    with tempfile.TemporaryDirectory() as folder:
        configs = write_sources(Path(folder), jpegs, batch)
        check_equal(configs)
        rows = measure(stages(configs["folder"]) | whole(configs), rounds)
    table = markdown_table(rows)
    table += f"\n{len(jpegs)} JPEGs of {sum(map(len, jpegs)) / len(jpegs) / 1000:.0f} KB; one thread, page cache.\n"
    print(table)
    if not options.smoke:
        write_results("data", rows, table, options.output, {"pil": Image.__version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
