"""Coarse segmentation: do thresholded CLS attention maps cover the objects (paper, §3.2, B.3; Fig. 4)?

    crate-fast eval coarse_segmentation runs/NAME                              # shape_scenes
    crate-fast eval coarse_segmentation CRATE=runs/A ViT=runs/B --data voc:PATH

On the patch grid, for each semantic class of an image the head whose mask has the largest IoU; mean over the classes
of an image, then over images. Void patches do not count; the background is not a class; an object that has no patch
of the grid for itself is not scored. Both readings of "the top 60 %" are given: of the entries (`topk`, the paper's
words) and of the mass (`mass`, DINO's code). Beside every score stand those of maps that know nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from crate_fast.eval.gallery import first_columns, write_pages
from crate_fast.eval.images import Sample, batches, open_images
from crate_fast.eval.models import Subject
from crate_fast.eval.options import evaluation_parser, open_models, output_folder, run_command
from crate_fast.eval.results import write_results, write_table
from crate_fast.figures import Picture
from crate_fast.segmentation import THRESHOLDS, AttentionScores, attention_to_mask, best_head_iou, scores_table

__all__ = ["evaluate", "main", "require_targets"]

BASELINES = ("constant", "random", "mean_mask", "true_mask")


def require_targets(images: Dataset, specification: str) -> None:
    """Refuse a data set without masks.

    Raises:
        ValueError: It has none.
    """
    if not images.labelled:
        raise ValueError(f"--data {specification} has no object masks: use voc:PATH, coco:PATH or shape_scenes")


def evaluate(
    subject: Subject,
    images: Dataset,
    layers: Sequence[int] | None = None,
    fraction: float = 0.6,
    problems: list[str] | None = None,
    seed: int = 0,
    **reading,
) -> dict[str, dict]:
    """Score the attention of layers under both thresholds.

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
        ValueError: No image could be scored.
    """
    layers = range(subject.extract.depth) if layers is None else layers
    scores = AttentionScores(fraction, seed)
    problems = [] if problems is None else problems
    for batch in batches(images, problems=problems, **({"batch_size": 8} | reading)):
        features = subject.extract(subject.normalize(batch.images.to(subject.device)), list(layers))
        maps = {layer: features.cls_attention(layer) for layer in features.layers}
        targets = [sample.target.on_grid(features.grid) for sample in batch.samples]
        kept = [masks.any(dim=1) for masks, _ in targets]  # an object may have no patch of its own
        scores.add(
            maps,
            [masks[keep] for (masks, _), keep in zip(targets, kept, strict=True)],
            [valid for _, valid in targets],
            [
                [label for label, k in zip(sample.target.classes, keep.tolist(), strict=True) if k]
                for sample, keep in zip(batch.samples, kept, strict=True)
            ],
        )
    return scores.result()


def _row(label: str, threshold: str, scores: dict, row: dict, marked: int) -> dict:
    return {
        "model": label,
        "threshold": threshold,
        "layer": f"{row['layer']}{' *' if row['layer'] == marked else ''}",
        "mIoU": row["best_head"],
        "one head for all": row["fixed_head"],
        **{name.replace("_", " "): scores[name] for name in BASELINES},
        "images": scores["images"],
    }


def _best_mask(subject: Subject, sample: Sample, threshold: str) -> Picture:
    """The mask of the head that fits the union of the objects best, at the layer the paper looks at."""
    layer = subject.extract.default_layer
    features = subject.extract(subject.normalize(sample.image[None].to(subject.device)), [layer])
    attention = features.cls_attention(layer).cpu()
    masks, valid = sample.target.on_grid(features.grid)
    target = masks.any(dim=0) & valid
    head = int(best_head_iou(attention, target[None], threshold)[0][0].argmax())
    mask = attention_to_mask(attention[0, head], threshold).view(features.grid)
    return Picture(mask.float().numpy(), "gray", (0, 1))


def _figure(
    subjects: Sequence[Subject], data: Sequence[Dataset], threshold: str, folder: Path, shown: int
) -> list[Path]:
    """Image, objects, and each model's best mask (paper, Fig. 4a): one row an image."""
    samples = [[images[i] for images in data] for i in range(min(shown, len(data[0])))]
    samples = [row for row in samples if row[0].problem is None]
    rows, titles = first_columns([row[0] for row in samples])
    for row, views in zip(rows, samples, strict=True):
        row += [_best_mask(subject, view, threshold) for subject, view in zip(subjects, views, strict=True)]
    return write_pages(rows, folder, f"masks_{threshold}", None, titles + [subject.label for subject in subjects])


def _command(options: argparse.Namespace) -> None:
    subjects = open_models(options)
    folder = output_folder(options, "coarse_segmentation", subjects)
    data = [open_images(options.data, subject.extract.image_size[0], options.limit) for subject in subjects]
    require_targets(data[0], options.data)
    problems: list[str] = []
    results, rows = {}, []
    for subject, images in zip(subjects, data, strict=True):
        found: list[str] = []
        scores = evaluate(
            subject,
            images,
            None if options.layers is None else [subject.extract.resolve_layer(layer) for layer in options.layers],
            options.fraction,
            found,
            options.seed,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=subject.label,
        )
        problems = problems or found  # the same images for every model
        marked = subject.extract.default_layer
        results[subject.label] = scores
        print(f"{subject.label}\n{scores_table(scores, marked)}")
        rows += [_row(subject.label, t, scores[t], row, marked) for t in THRESHOLDS for row in scores[t]["layers"]]
    config = {
        "data": options.data,
        "fraction": options.fraction,
        "seed": options.seed,
        "limit": options.limit,
        "class_names": data[0].class_names(),
        "models": [subject.facts for subject in subjects],
    }
    write_table(folder, "table", rows)
    paths = [write_results(folder, "coarse_segmentation", config, results, problems), folder / "table.md"]
    paths += [path for t in THRESHOLDS for path in _figure(subjects, data, t, folder, options.figure_images)]
    print("* the layer that the paper looks at\nwritten:", *map(str, paths), sep="\n  ")


def main(argv: list[str] | None = None) -> int:
    """Run as the command line says; returns the exit status."""
    parser = evaluation_parser("coarse_segmentation", "mIoU of attention maps and objects.", data="shape_scenes")
    parser.add_argument("--layers", type=int, nargs="+", help="whose attention; all when absent")
    parser.add_argument("--fraction", type=float, default=0.6, help="of entries or mass kept; default 0.6")
    parser.add_argument("--figure-images", type=int, default=6, help="images in the figures; default 6")
    return run_command(_command, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
