"""Data loading: images/s of one core, stage by stage and source by source, at 224 px.

    python benchmarks/bench_data.py                  # results/data.{json,md}; about three minutes
    python benchmarks/bench_data.py --images DIR     # JPEGs of your own instead of drawn ones
    python benchmarks/bench_data.py --smoke          # small, anywhere, nothing written

Rates are per second of this process's CPU time, which other load on the machine disturbs less than wall-clock time.
PyTorch has one thread, and there are no loading processes. Files are in the page cache. Images are JPEGs of
`shape_scenes`, 500×375. First, all sources must give the same batches.
"""

import argparse
import io
import itertools
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from harness import write_results

import numpy as np
import torch
from gpu_report import markdown_table
from PIL import Image
from torch.utils.data import Dataset

from crate_fast.train.config import TrainConfig
from crate_fast.train.data import Batch, Normalize, build_splits, eval_loader, mirrored, open_source, train_loader
from crate_fast.train.data.image_files import read_image
from crate_fast.train.data.shape_scenes import ShapeScenes
from crate_fast.train.data.transforms import drawing_from, eval_transform, pixels, train_transform
from crate_fast.train.write_shards import encoded

GOAL = 12_000  # images/s for one H200
POLICIES = ("rand-m9-n2-mstd0.5", "randaugment-n2-m14")
SIZE, SMALL_SIDE, CLASSES = 224, 256, 4
QUALITY = 95  # of the drawn and resized JPEGs


def drawn_jpegs(count: int) -> list[bytes]:
    """Draw scenes as JPEG files, 500×375."""
    scenes = ShapeScenes(count, image_size=512)
    found = []
    for start in range(0, count, 8):
        for image, _ in scenes.__getitems__(range(start, min(start + 8, count))):
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).crop((6, 68, 506, 443))
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=QUALITY)
            found.append(file.getvalue())
    return found


def write_sources(root: Path, jpegs: list[bytes], small: list[bytes], batch: int) -> dict[str, TrainConfig]:
    """Write the images in every form, and smaller ones as shards; return the settings of each."""
    common = {"image_size": SIZE, "batch_size": batch, "crop": "random", "hflip": 0.5, "workers": 0, "device": "cpu"}
    common |= {"epochs": 1, "val_split": "train"}
    names = [f"{i * CLASSES // len(jpegs)}/{i:05d}.jpg" for i in range(len(jpegs))]
    for name, content in zip(names, jpegs, strict=True):
        file = root / "folder" / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    for kind, files in (("tar", jpegs), ("shards", jpegs), ("small", small)):
        (root / kind).mkdir()
        with tarfile.open(root / kind / "train.tar", "w") as archive:
            for name, content in zip(names, files, strict=True):
                _add(archive, name, content)
                if kind != "tar":
                    _add(archive, name.replace(".jpg", ".cls"), name.split("/")[0].encode())
    configs = {kind: TrainConfig(dataset=kind, data_dir=str(root / kind), **common) for kind in ("folder", "tar")}
    configs["shards"] = TrainConfig(dataset="shards", data_dir=str(root / "shards"), **common)
    if _write_parquet(root, names, jpegs):
        configs["hf"] = TrainConfig(dataset="hf", data_dir=str(root / "hf"), **common)
    configs["small"] = replace(configs["shards"], data_dir=str(root / "small"))
    return configs


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _write_parquet(root: Path, names: list[str], jpegs: list[bytes]) -> bool:
    """Write the images for the package `datasets`; return False if it is not installed."""
    try:
        import datasets
    except ModuleNotFoundError:
        return False
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [{"bytes": content, "path": None} for content in jpegs]
    columns = {"image": images, "label": [int(name.split("/")[0]) for name in names]}
    (root / "hf").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(root / "hf" / "train.parquet"))
    return True


def check_equal(configs: dict[str, TrainConfig]) -> None:
    """Stop unless all sources of the same images give the same batches."""
    kinds = [kind for kind in configs if kind != "small"]
    batches = [next(iter(train_loader(configs[kind], build_splits(configs[kind]).train))) for kind in kinds]
    for kind, batch in zip(kinds, batches, strict=True):
        if batch.problems or not all(map(torch.equal, batch[:3], batches[0][:3])):
            raise SystemExit(f"{kind} and {kinds[0]} give different batches: no numbers")


def cpu_rates(candidates: dict[str, tuple[Callable[[], object], int]], rounds: int, seconds: float) -> list[dict]:
    """Measure the CPU time per image of each candidate (a call, the number of its images) in turn.

    Returns:
        A row per candidate: "what"; "us", "us_low", "us_high": median, 20 % and 80 % quantiles of `rounds`
        measurements of at least `seconds`; "images_per_s" of the median.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):  # the first round is a warm-up
        for name, (call, images) in candidates.items():
            began, calls = time.process_time(), 0
            while not calls or time.process_time() - began < seconds:
                call()
                calls += 1
            if number:
                samples[name].append((time.process_time() - began) / (calls * images) * 1e6)
    rows = []
    for name, values in samples.items():
        us, low, high = np.quantile(values, (0.5, 0.2, 0.8)).tolist()
        rows.append({"what": name, "us": us, "us_low": low, "us_high": high, "images_per_s": 1e6 / us})
    return rows


def stages(configs: dict[str, TrainConfig], count: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Return the stages of loading; each call handles the next image or batch."""
    config = configs["folder"]
    sources = {kind: open_source(configs[kind], train=True) for kind in configs if kind != "small"}
    folder = sources["folder"]
    files = [folder.open(i)[0].read() for i in range(min(count, 64))]
    pictures = [read_image(io.BytesIO(content)) for content in files]
    crop, middle = train_transform(config), eval_transform(config)
    cropped = [crop(picture) for picture in pictures]
    batch = config.batch_size
    memory = np.empty((batch, 3, SIZE, SIZE), np.uint8)
    images, flips = torch.from_numpy(memory), torch.arange(batch) % 2 == 0
    normalize = Normalize("imagenet")

    def each(call: Callable, values: list) -> tuple[Callable[[], object], int]:
        turn = itertools.cycle(values)
        return (lambda: call(next(turn))), 1

    def read(source) -> Callable[[int], object]:
        def read_one(index: int) -> object:
            with source.open(index)[0] as file:
                return file.read()

        return read_one

    def name_and_draw(index: int) -> None:
        with drawing_from(0, 0, index):
            pass

    def fill() -> None:
        for row, picture in zip(memory, itertools.islice(itertools.cycle(cropped), batch), strict=True):
            row[...] = pixels(picture)

    order = np.random.default_rng(0).permutation(count).tolist()
    found = {f"read the file: {kind}": each(read(source), order) for kind, source in sources.items()}
    found["decode"] = each(lambda content: read_image(io.BytesIO(content)), files)
    found["random crop and resize"] = each(crop, pictures)
    found["resize and middle crop (evaluation)"] = each(middle, pictures)
    for policy in POLICIES:
        augment = train_transform(replace(config, crop="none", auto_augment=policy)).transforms[-1]
        found[f"augment: {policy}"] = each(augment, cropped)
    found["seed the sample's generator"] = each(name_and_draw, order)
    found["into the batch, uint8"] = (fill, batch)
    found["mirror and normalise, where the model runs: here, on the CPU"] = (
        lambda: normalize(mirrored(images, flips)),
        batch,
    )
    return found


def _batches(make_loader: Callable, config: TrainConfig, split: Dataset) -> tuple[Callable[[], Batch], int]:
    """Return a call that gives the next batch of endless epochs."""
    endless = itertools.chain.from_iterable(iter(partial(make_loader, config, split), None))
    return (lambda: next(endless)), config.batch_size


def whole(configs: dict[str, TrainConfig]) -> dict[str, tuple[Callable[[], object], int]]:
    """Return calls that load whole batches, by source."""
    found = {}
    for kind, config in configs.items():
        name = f"shards, shorter side {SMALL_SIDE} px" if kind == "small" else kind
        data = build_splits(config)
        found[name] = _batches(train_loader, config, data.train)
        if kind == "shards":
            found["shards, evaluation"] = _batches(eval_loader, config, data.val)
        for policy in POLICIES if kind in ("shards", "small") else ():
            augmented = replace(config, auto_augment=policy)
            found[f"{name}, {policy}"] = _batches(train_loader, augmented, build_splits(augmented).train)
    return found


def _table(rows: list[dict], what: str) -> str:
    shown = [
        {
            what: row["what"],
            "µs an image": row["us"],
            "20–80 %": f"{row['us_low']:,.0f}–{row['us_high']:,.0f}",
            "images/s a core": row["images_per_s"],
            f"cores for {GOAL:,} images/s": GOAL / row["images_per_s"],
        }
        for row in rows
    ]
    return markdown_table(shown)


def main(argv: list[str] | None = None) -> int:
    """Compare the sources, measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of JPEGs to use instead of drawn ones")
    parser.add_argument("--smoke", action="store_true", help="small and short; writes nothing")
    options = parser.parse_args(argv)
    count, rounds, batch, seconds = (8, 1, 8, 0.01) if options.smoke else (256, 15, 32, 0.2)
    torch.set_num_threads(1)
    if options.images:
        paths = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        jpegs = [path.read_bytes() for path in paths[:: max(1, len(paths) // count)][:count]]
    else:
        jpegs = drawn_jpegs(count)
    if len(jpegs) < batch:
        raise SystemExit(f"{len(jpegs)} JPEGs in {options.images}, fewer than a batch of {batch}: add more")
    small = [encoded(content, SMALL_SIDE, QUALITY)[1] for content in jpegs]
    facts = {"images": f"{len(jpegs)} JPEGs" + ("" if options.images else f" of 500×375 (quality {QUALITY})")}
    facts |= {"goal_images_per_s": GOAL, "image_size": SIZE}
    facts |= {"mean_kb": round(sum(map(len, jpegs)) / len(jpegs) / 1000, 1)}
    facts |= {"small_mean_kb": round(sum(map(len, small)) / len(small) / 1000, 1)}
    facts |= {"pil": Image.__version__, "load_average": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as folder:
        configs = write_sources(Path(folder), jpegs, small, batch)
        check_equal(configs)
        one_by_one = stages(configs, len(jpegs))
        rows = cpu_rates(one_by_one | whole(configs), rounds, seconds)
    kinds = {
        kind: [row for row in rows if (row["what"] in one_by_one) == (kind == "stage")]
        for kind in ("stage", "source")
    }
    table = _table(kinds["stage"], f"stage, {SIZE} px") + "\n" + _table(kinds["source"], "whole batches from")
    table += f"\n{facts['images']}, {facts['mean_kb']} KB on average; those of {SMALL_SIDE} px "
    table += f"{facts['small_mean_kb']} KB. CPU time of one process with one thread, files in the page cache.\n"
    print(table)
    if not options.smoke:
        write_results("data", [{"kind": kind} | row for kind in kinds for row in kinds[kind]], table, more=facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
