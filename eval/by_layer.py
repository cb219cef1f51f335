"""Segmentation at every layer: MaskCut's AP, attention's mIoU and AP over depth (paper, Fig. 6).

    crate-fast eval by_layer CRATE=runs/A ViT=runs/B --data coco:PATH

One pass of the model serves all layers. MaskCut needs instances (COCO's or the scenes'), attention any masks.
"""

import argparse
import sys
from collections.abc import Sequence

from torch.utils.data import Dataset

from crate_fast.errors import UserError, run_command
from crate_fast.eval import coarse_segmentation, maskcut
from crate_fast.eval.common.command import evaluation_parser, open_models, output_folder, settings_of
from crate_fast.eval.common.figures import Curve, curve_figure
from crate_fast.eval.common.images import open_images
from crate_fast.eval.common.models import Subject
from crate_fast.eval.common.results import raise_failures, say_written, write_results, write_table
from crate_fast.eval.maskcut import PAPER, MaskCutSettings

__all__ = ["MEASURES", "check_measures", "evaluate", "main", "measure_options"]

MEASURES = ("maskcut", "coarse")
PLOTTED = ("box AP", "mask AP", *coarse_segmentation.NAMES.values())


def check_measures(
    measures: Sequence[str] | None, subject: Subject, images: Dataset, specification: str
) -> list[str]:
    """Return the measures asked for, or all that the data set has annotations for.

    Raises:
        UserError: It has none for them, or the model or the images do not fit a measure.
    """
    annotated = {"maskcut": images.has_instances, "coarse": images.labelled}
    possible = [name for name in MEASURES if annotated[name]]
    wanted = possible if measures is None else list(measures)
    missing = [name for name in wanted if name not in possible]
    if missing or not wanted:
        raise UserError(
            f"--data {specification} has no annotations for {', '.join(missing or MEASURES)}: MaskCut's AP needs "
            "coco:PATH or shape_scenes, coarse segmentation voc:PATH too"
        )
    if "maskcut" in wanted:
        maskcut.check(subject, images)
    if "coarse" in wanted:
        subject.require_cls()
    return wanted


def evaluate(
    subject: Subject,
    images: Dataset,
    layers: Sequence[int] | None = None,
    measures: Sequence[str] = MEASURES,
    settings: MaskCutSettings = PAPER,
    problems: list[str] | None = None,
    seed: int = 0,
    **reading,
) -> dict[int, dict[str, float]]:
    """Numbers of every layer, in percent.

    Args:
        subject: The model.
        images: Of `Sample`s at its image size; with COCO's annotations for "maskcut", with masks for "coarse".
        layers: All when None.
        measures: From `MEASURES`.
        settings: Of MaskCut.
        problems: Filled with what could not be read.
        seed: Of the random maps.
        **reading: `batch_size`, `workers`, `progress` of `images.batches`.

    Returns:
        Layer → "box AP50", "box AP75", "box AP", "box AR100", the same of "mask", "mIoU topk", "mIoU mass",
        "attention AP" and, the same for all layers, "random mIoU topk", "random mIoU mass", "random attention AP" and
        "constant" (what random maps score, and the map that is the same for every patch), "images" read and "objects"
        scored.
    """
    layers = list(range(subject.extract.depth)) if layers is None else list(layers)
    rows: dict[int, dict[str, float]] = {layer: {} for layer in layers}
    found: list[str] = []
    coarse = {}
    if "coarse" in measures:  # first, since it is the quicker one to find that there is nothing to score
        coarse = coarse_segmentation.evaluate(subject, images, layers, problems=found, seed=seed, **reading)
    if "maskcut" in measures:
        found.clear()  # the same images again
        for layer, numbers in maskcut.evaluate(subject, images, layers, settings, found, **reading).items():
            rows[layer]["images"] = numbers["images"]
            for kind, name in (("bbox", "box"), ("segm", "mask")):
                for score in ("AP50", "AP75", "AP", "AR100"):
                    rows[layer][f"{name} {score}"] = 100 * numbers[kind][score]
    for name, result in coarse.items():
        title = coarse_segmentation.NAMES[name]
        for row in result["layers"]:
            rows[row["layer"]][title] = 100 * row["best_head"]
            rows[row["layer"]][f"random {title}"] = 100 * result["random"]
            counts = {"images": result["images"] + result["without_objects"], "objects": result["objects"]}
            rows[row["layer"]] |= {"constant": 100 * result["constant"]} | counts
    if problems is not None:
        problems.extend(found)
    return rows


def measure_options(parser: argparse.ArgumentParser) -> None:
    """Add what `evaluate` can be told."""
    parser.add_argument("--measures", nargs="+", choices=MEASURES, help="default: all that the data has masks for")
    parser.add_argument("--num-objects", type=int, default=3, help="of MaskCut; default 3")
    parser.add_argument("--tau", type=float, default=0.15, help="of MaskCut; default 0.15")


def curves(labelled: dict[str, dict[float, dict[str, float]]]) -> dict[str, list[Curve]]:
    """Label → {x → numbers} as panels of curves; beside attention's what random and constant maps score.

    A baseline is drawn once for all models that have the same (it depends on heads and grid).
    """
    panels: dict[str, list[Curve]] = {}
    for name in PLOTTED:
        shown = {name: ""}
        if name in coarse_segmentation.NAMES.values():
            shown |= {f"random {name}": "random maps", "constant": "constant mask"}
        for column, baseline in shown.items():
            drawn: list[list] = []
            for label, rows in labelled.items():
                points = [(x, row[column]) for x, row in rows.items() if column in row]
                if not points or (baseline and points in drawn):
                    continue
                title = label if not baseline else f"{baseline}, {label}" if drawn else baseline
                drawn.append(points)
                panels.setdefault(f"{name}, %", []).append(
                    Curve(title, *zip(*points, strict=True), dashed=bool(baseline))
                )
    return panels


def _command(options: argparse.Namespace) -> None:
    settings = MaskCutSettings(options.num_objects, options.tau)
    subjects = open_models(options)
    data = [open_images(options.data, subject.extract.image_size[0], options.limit) for subject in subjects]
    for subject, images in zip(subjects, data, strict=True):
        measures = check_measures(options.measures, subject, images, options.data)
    folder = output_folder(options, "by_layer")
    results: dict[str, dict] = {}
    problems: list[str] = []
    failures: list[str] = []
    for subject, images in zip(subjects, data, strict=True):
        reading = {"batch_size": options.batch_size, "workers": options.workers, "progress": subject.label}
        found: list[str] = []
        try:
            scores = evaluate(subject, images, None, measures, settings, found, options.seed, **reading)
        except UserError as error:
            failures.append(f"{subject.label}: {error}")
            continue
        results[subject.label] = scores
        problems = found  # the same images for every model
    if not results:
        raise_failures(failures)
    rows = [
        {
            "model": subject.label,
            "layer": f"{layer}{' *' if layer == subject.extract.default_layer else ''}",
            **numbers,
        }
        for subject in subjects
        for layer, numbers in results.get(subject.label, {}).items()
    ]
    print(write_table(folder, "table", rows, digits=2))
    config = settings_of(options) | {"models": [subject.facts for subject in subjects]}
    paths = [write_results(folder, "by_layer", config, results, problems), folder / "table.md"]
    figures = [folder / "by_layer.png", folder / "by_layer.pdf"]
    curve_figure(curves(results), "layer", figures, from_zero=True, columns=3)
    print("* the layer that the paper looks at; all numbers but counts in %")
    say_written(paths + figures, problems)
    raise_failures(failures, folder)


def main(argv: list[str] | None = None) -> int:
    """Run as the command line says; returns the exit status."""
    parser = evaluation_parser("by_layer", "AP of MaskCut, mIoU and AP of attention, layer by layer.", image_size=480)
    measure_options(parser)
    return run_command(lambda: _command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
