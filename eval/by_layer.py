"""Segmentation at every layer: MaskCut's AP, attention's mIoU and AP over depth (paper, Fig. 6).

Each measure reads all layers in one pass of the model. MaskCut needs instances (COCO or scenes), attention any masks.
"""

import argparse
from collections.abc import Sequence

from torch.utils.data import Dataset

from crate_fast.errors import UserError
from crate_fast.eval import coarse_segmentation, maskcut
from crate_fast.eval.common.command import Evaluation, open_data, open_models
from crate_fast.eval.common.figures import Curve, curve_figure
from crate_fast.eval.common.models import LoadedModel
from crate_fast.options import main_of

MEASURES = ("maskcut", "coarse")


def check_measures(
    measures: Sequence[str] | None, loaded: LoadedModel, images: Dataset, specification: str
) -> list[str]:
    """Return the measures, by default all that the data set has annotations for; check them for the model."""
    annotated = {"maskcut": images.has_instances, "coarse": images.labelled}
    possible = [name for name in MEASURES if annotated[name]]
    wanted = possible if measures is None else list(measures)
    missing = [name for name in wanted if name not in possible]
    if missing or not wanted:
        raise UserError(
            f"{specification} has no annotations for {', '.join(missing or MEASURES)}: maskcut needs "
            "coco:PATH or shape_scenes, coarse needs one of these or voc:PATH"
        )
    if "maskcut" in wanted:
        maskcut.check(loaded, images)
    if "coarse" in wanted:
        loaded.require_cls()
    return wanted


def evaluate(
    loaded: LoadedModel,
    images: Dataset,
    layers: Sequence[int] | None = None,
    measures: Sequence[str] = MEASURES,
    seed: int = 0,
    **reading,
) -> dict[int, dict[str, float]]:
    """Score each layer; all scores are in percent.

    Args:
        images: Data set with instances for "maskcut" and masks for "coarse". For others see `crate_fast.eval`.
        measures: Any of `MEASURES`.

    Returns:
        Layer → "box AP50", "box AP75", "box AP", "box AR100", the same with "mask", "mIoU topk", "mIoU mass" and
        "attention AP". Equal for all layers: scores of the objects' mean mask ("mean mask mIoU topk", …), of random
        maps ("random mIoU topk", …) and of a constant map ("constant"); numbers of "images" and scored "objects".
    """
    layers = loaded.extract.resolve_layers(layers)
    rows: dict[int, dict[str, float]] = {layer: {} for layer in layers}
    coarse = {}
    if "coarse" in measures:  # first, because it fails earlier without objects
        coarse = coarse_segmentation.evaluate(loaded, images, layers, seed=seed, **reading)
    if "maskcut" in measures:
        found = maskcut.evaluate(loaded, images, layers, **reading)
        rows = {
            layer: {"images": numbers["images"], **maskcut.in_percent(numbers)} for layer, numbers in found.items()
        }
    for name, result in coarse.items():
        title = coarse_segmentation.NAMES[name]
        for row in result["layers"]:
            rows[row["layer"]][title] = 100 * row["best_head"]
            rows[row["layer"]][f"mean mask {title}"] = 100 * result["mean_mask"]
            rows[row["layer"]][f"random {title}"] = 100 * result["random"]
            counts = {"images": result["images"] + result["without_objects"], "objects": result["objects"]}
            rows[row["layer"]] |= {"constant": 100 * result["constant"]} | counts
    return rows


def curves(labelled: dict[str, dict[float, dict[str, float]]]) -> dict[str, list[Curve]]:
    """Turn label → {x → scores} into panels of curves, for attention with baselines (mean mask, random, constant)."""
    panels: dict[str, list[Curve]] = {}
    attention = list(coarse_segmentation.NAMES.values())
    for name in ["box AP", "mask AP", *attention]:
        baselines = {f"mean mask {name}": "mean mask", f"random {name}": "random maps", "constant": "constant mask"}
        baselines = baselines if name in attention else {}
        for column, baseline in ({name: ""} | baselines).items():
            drawn: list[list] = []
            for label, rows in labelled.items():
                points = [(x, row[column]) for x, row in rows.items() if column in row]
                if not points or (baseline and points in drawn):  # models may have equal baselines
                    continue
                title = label if not baseline else f"{baseline}, {label}" if drawn else baseline
                drawn.append(points)
                panels.setdefault(f"{name}, %", []).append(
                    Curve(title, *zip(*points, strict=True), dashed=bool(baseline))
                )
    return panels


def _command(options: argparse.Namespace) -> None:
    models = open_models(options)
    data = {loaded.label: open_data(options, loaded) for loaded in models}
    for loaded in models:
        measures = check_measures(options.measures, loaded, data[loaded.label], options.data)
    evaluation = Evaluation("by_layer", options, models)
    results, rows = {}, []
    for loaded in models:
        reading = evaluation.reading(loaded.label)
        found = evaluate(loaded, data[loaded.label], None, measures, options.seed, **reading)
        results[loaded.label] = found
        for layer, numbers in found.items():
            star = " *" * (layer == loaded.extract.default_layer)
            rows.append({"model": loaded.label, "layer": f"{layer}{star}", **numbers})
    evaluation.write_table("table", rows, digits=2)
    curve_figure(curves(results), "layer", evaluation.figure("by_layer"), from_zero=True, columns=3)
    evaluation.finish(results, notes=["* the default layer (the paper's for CRATE and ViT); all but counts in %"])


main = main_of("eval by_layer", _command)
