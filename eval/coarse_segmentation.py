"""Coarse segmentation: do CLS attention maps cover the objects (paper, §3.2, B.3; Fig. 4)?

    crate-fast eval coarse_segmentation runs/NAME                              # shape_scenes
    crate-fast eval coarse_segmentation CRATE=runs/A ViT=runs/B --data voc:PATH

On the patch grid, for each semantic class of an image the head whose mask has the largest IoU; mean over the classes
of an image, then over images. Void patches do not count; the background is not a class; an object that has no patch
of the grid for itself is not scored. Both readings of "the top 60 %" are given: of the entries (`topk`, the paper's
words) and of the mass (`mass`, DINO's code). Both depend on how far a map spreads; the average precision of patches
ranked by attention does not. Beside every score stand those of maps that know nothing.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from crate_fast.errors import UserError, run_command
from crate_fast.eval.common.command import (
    evaluation_parser,
    first_columns,
    open_models,
    output_folder,
    positive,
    settings_of,
)
from crate_fast.eval.common.figures import Picture, write_pages
from crate_fast.eval.common.images import Sample, batches, open_images
from crate_fast.eval.common.models import Subject
from crate_fast.eval.common.results import raise_failures, say_written, write_results, write_table
from crate_fast.eval.common.segmentation import (
    READINGS,
    THRESHOLDS,
    AttentionScores,
    attention_to_mask,
    intersection_over_union,
    scores_table,
)

__all__ = ["evaluate", "main", "require_targets"]

BASELINES = ("constant", "random", "mean_mask", "true_mask")
NAMES = {"topk": "mIoU topk", "mass": "mIoU mass", "ap": "attention AP"}  # of readings, in tables


def require_targets(images: Dataset, specification: str) -> None:
    """Refuse a data set without masks.

    Raises:
        UserError: It has none.
    """
    if not images.labelled:
        raise UserError(f"--data {specification} has no object masks: use voc:PATH, coco:PATH or shape_scenes")


def evaluate(
    subject: Subject,
    images: Dataset,
    layers: Sequence[int] | None = None,
    fraction: float = 0.6,
    problems: list[str] | None = None,
    seed: int = 0,
    **reading,
) -> dict[str, dict]:
    """Score the attention of layers, under both thresholds and without one.

    Args:
        subject: The model.
        images: Of `Sample`s with targets, at the model's image size.
        layers: All when None.
        fraction: Of entries or mass kept.
        problems: Filled with what could not be read.
        seed: Of the random maps.
        **reading: `batch_size`, `workers`, `progress` of `images.batches`.

    Returns:
        See `segmentation.score_attention`; "by_class" has class numbers.

    Raises:
        UserError: No image could be scored.
    """
    layers = range(subject.extract.depth) if layers is None else layers
    scores = AttentionScores(fraction, seed)
    problems = [] if problems is None else problems
    for batch in batches(images, problems=problems, **({"batch_size": 8} | reading)):
        features = subject.extract(subject.normalize(batch.images.to(subject.device)), list(layers))
        maps = {layer: features.cls_attention(layer) for layer in features.layers}
        targets = [sample.target.on_grid(features.grid) for sample in batch.samples]
        masks, valid = zip(*targets, strict=True)
        scores.add(maps, masks, valid, [sample.target.classes for sample in batch.samples])
    return scores.result()


def _row(label: str, reading: str, scores: dict, row: dict, marked: int) -> dict:
    return {
        "model": label,
        "score": NAMES[reading],
        "layer": f"{row['layer']}{' *' if row['layer'] == marked else ''}",
        "best head": row["best_head"],
        "one head for all": row["fixed_head"],
        **{name.replace("_", " "): scores[name] for name in BASELINES},
        "images": scores["images"],
        "objects": scores["objects"],
        "objects without a patch": scores["objects_without_patch"],
    }


def _head_rows(label: str, scores: dict) -> list[dict]:
    """The breakdown by head: a row a layer and score, a column a head (for all images the same)."""
    return [
        {"model": label, "score": NAMES[reading], "layer": row["layer"]}
        | {f"head {head}": score for head, score in enumerate(row["per_head"])}
        for reading in READINGS
        for row in scores[reading]["layers"]
    ]


def _best_mask(subject: Subject, sample: Sample, layer: int, threshold: str, fraction: float) -> Picture:
    """The mask of the head that fits the union of the objects best."""
    features = subject.extract(subject.normalize(sample.image[None].to(subject.device)), [layer])
    masks = attention_to_mask(features.cls_attention(layer)[0].cpu(), threshold, fraction)
    objects, valid = sample.target.on_grid(features.grid)
    head = intersection_over_union(masks, objects.any(dim=0), valid.expand_as(masks)).argmax()
    return Picture(masks[head].view(features.grid).float().numpy(), "gray", (0, 1))


def _figure(
    subjects: Sequence[Subject], data: Sequence[Dataset], layers: Sequence[int], threshold: str, options, folder: Path
) -> list[Path]:
    """Image, objects, and each model's best mask (paper, Fig. 4a): one row for each of the first readable images."""
    readable = (i for i in range(len(data[0])) if data[0][i].problem is None)
    samples = [[images[i] for images in data] for i in itertools.islice(readable, options.figure_images)]
    rows, titles = first_columns([row[0] for row in samples])
    for row, views in zip(rows, samples, strict=True):
        row += [
            _best_mask(subject, view, layer, threshold, options.fraction)
            for subject, view, layer in zip(subjects, views, layers, strict=True)
        ]
    titles += [f"{subject.label}, layer {layer}" for subject, layer in zip(subjects, layers, strict=True)]
    return write_pages(rows, folder, f"masks_{threshold}", None, titles)


def _command(options: argparse.Namespace) -> None:
    subjects = open_models(options)
    wanted: list[list[int] | None] = []
    for subject in subjects:  # before anything is computed
        subject.require_cls()
        layers = options.layers
        wanted.append(None if layers is None else [subject.extract.resolve_layer(layer) for layer in layers])
    data = [open_images(options.data, subject.extract.image_size[0], options.limit) for subject in subjects]
    require_targets(data[0], options.data)
    folder = output_folder(options, "coarse_segmentation")
    problems: list[str] = []
    results, rows, marked, failures = {}, [], [], []
    for subject, images, layers in zip(subjects, data, wanted, strict=True):
        reading = {"batch_size": options.batch_size, "workers": options.workers, "progress": subject.label}
        found: list[str] = []
        try:
            scores = evaluate(subject, images, layers, options.fraction, found, options.seed, **reading)
        except UserError as error:  # such as a grid so coarse that no object has a patch
            failures.append(f"{subject.label}: {error}")
            continue
        problems = found  # the same images for every model
        default = subject.extract.default_layer
        marked.append(default if layers is None or default in layers else layers[0])
        results[subject.label] = scores
        print(f"{subject.label}\n{scores_table(scores, default)}")
        rows += [_row(subject.label, r, scores[r], row, default) for r in READINGS for row in scores[r]["layers"]]
    if not results:
        raise_failures(failures)
    scored = [(subject, images) for subject, images in zip(subjects, data, strict=True) if subject.label in results]
    if len({(result["topk"]["images"], result["topk"]["objects"]) for result in results.values()}) > 1:
        print("The models' grids differ, and so do the objects that have a patch: scores are not of the same ones.")
    config = settings_of(options) | {"class_names": data[0].class_names()}
    config["models"] = [subject.facts for subject in subjects]
    write_table(folder, "table", rows)
    write_table(folder, "heads", [row for label, scores in results.items() for row in _head_rows(label, scores)])
    paths = [
        write_results(folder, "coarse_segmentation", config, results, problems),
        folder / "table.md",
        folder / "heads.md",
    ]
    paths += [path for t in THRESHOLDS for path in _figure(*zip(*scored, strict=True), marked, t, options, folder)]
    print("* the layer that the paper looks at")
    say_written(paths, problems)
    raise_failures(failures, folder)


def main(argv: list[str] | None = None) -> int:
    """Run as the command line says; returns the exit status."""
    parser = evaluation_parser("coarse_segmentation", "mIoU of attention maps and objects.", data="shape_scenes")
    parser.add_argument("--layers", type=int, nargs="+", help="whose attention; all when absent")
    parser.add_argument("--fraction", type=float, default=0.6, help="of entries or mass kept; default 0.6")
    parser.add_argument("--figure-images", type=positive, default=6, help="images in the figures; default 6")
    return run_command(lambda: _command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
