"""Figures of the report, drawn from saved results and pictures only, and numbered like similar figures of the paper.

Grids show the first eight or four of the saved images: test scenes, or free photographs.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from crate_fast.eval import white_box
from crate_fast.eval.common import segmentation
from crate_fast.eval.common.figures import Curve, Picture, curve_figure, image_grid, wrap_credit
from crate_fast.eval.emergence.protocol import MODELS
from crate_fast.eval.emergence.results import COARSE, Results, at_checkpoint, head_chosen, held_out_accuracies
from crate_fast.train.data.shape_scenes import CLASSES

Arrays = dict[str, np.ndarray]
CAPTIONS = {  # name → caption, in the report's order
    "figure4_heads": "Attention of each model's head that is best on other photographs, at the paper's layer.",
    "figure4_masks": "Each model's best mask by mass at the paper's layer, as scored (Fig. 4).",
    "figure4_maps": "The attention map of each model's best head by AP; black is 0, white its largest weight.",
    "figure6_by_layer": "Scores by layer, means and standard deviations over seeds (Fig. 6).",
    "figure6_components": "Principal components 2 to 4 of patch features by layer, as colours; four images (Fig. 6).",
    "figure7_heads": "CLS attention of every head of CRATE, at the paper's layer (Fig. 7).",
    "figure9_parts": "The first three components of the foreground by layer, as colours; four images (Fig. 9).",
    "figure10_by_epoch": "Scores over training at the paper's layer (Fig. 10); 0: the untrained twins.",
    "figure10_components": "Components 2 to 4 over training, CRATE; four images (Fig. 10).",
    "by_accuracy": "Attention's scores at the paper's layer against accuracy on a run's held-out images, one point "
    "per checkpoint before the image size changes.",
    "white_box": "R^c and sparsity by layer; dashed: before training.",
}


def load_pictures(report: Path, kind: str) -> dict[str, Arrays]:
    """Return model → arrays of `scores.pictures` and of the shown images; `kind` is that of the protocol."""

    def load(path: Path) -> Arrays:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    folder = report / "pictures"
    saved = {model: folder / f"{model}.npz" for model in MODELS}
    return {model: load(folder / f"{kind}.npz") | load(path) for model, path in saved.items() if path.is_file()}


def draw(results: Results, pictures: dict[str, Arrays], folder: Path) -> dict[str, Path]:
    """Draw every figure that has results as a PNG file; return name → path, in the order of `CAPTIONS`."""
    grids = _grids(results, pictures)
    charts = _charts(results)
    paths = {name: folder / f"{name}.png" for name in CAPTIONS if name in grids or name in charts}
    for name, path in paths.items():
        if name in grids:
            image_grid(paths=[path], **grids[name])
        else:
            curve_figure(paths=[path], labels=results.protocol.models, **charts[name])
    return paths


# --- grids of pictures, as arguments of `image_grid` ---


def _grids(results: Results, pictures: dict[str, Arrays]) -> dict[str, dict]:
    protocol = results.protocol
    runs = {model: results.run("", model, protocol.seeds[0]) for model in pictures}
    last = {model: run["checkpoints"][-1] for model, run in runs.items() if run}
    pictures = {model: pictures[model] for model in last}
    if not pictures:
        return {}
    layers = {model: checkpoint["default_layer"] for model, checkpoint in last.items()}
    attention = {model: arrays["attention"][layers[model]] for model, arrays in pictures.items()}  # [8, heads, P]
    shown, grids = next(iter(pictures.values())), {}
    if "CRATE" in pictures:
        maps = {f"layer {layers['CRATE']},\nhead {i}": m for i, m in enumerate(attention["CRATE"].swapaxes(0, 1))}
        grids["figure7_heads"] = _maps(shown, maps)
        titles = (f"{point.images / 1000:.0f} k images" for point in protocol.points)
        columns = zip(titles, pictures["CRATE"]["components_by_checkpoint"], strict=True)
        grids["figure10_components"] = _colours(shown, columns)
    titles = {model: f"{model},\nlayer {layer}" for model, layer in layers.items()}
    if protocol.photographs:
        heads = {model: head_chosen(checkpoint, "ap", layers[model]) for model, checkpoint in last.items()}
        maps = {f"{titles[model]},\nhead {heads[model]}": maps[:, heads[model]] for model, maps in attention.items()}
        grids["figure4_heads"] = _maps(shown, maps)
    else:
        for name, reading in (("figure4_masks", "mass"), ("figure4_maps", "ap")):
            maps = {titles[model]: _best_head(maps, shown["masks"], reading) for model, maps in attention.items()}
            grids[name] = _maps(shown, maps, grey=True)
    for name, kind in (("figure9_parts", "parts"), ("figure6_components", "components")):
        columns = [
            (f"{model}\nlayer {layer}", colours)
            for model in ("CRATE", "ViT")
            if model in pictures
            for layer, colours in enumerate(pictures[model][kind])
        ]
        grids[name] = _colours(shown, columns)
    return grids


def _best_head(maps: np.ndarray, masks: np.ndarray, reading: str) -> np.ndarray:
    """Return the mask ("mass") or the map ("ap") of each image's best head, as scored (Fig. 4a): [8, P]."""
    side = math.isqrt(maps.shape[-1])
    objects = segmentation.mask_to_grid(torch.from_numpy(masks), (side, side)).unsqueeze(1)
    shown = torch.from_numpy(maps).float()
    shown = segmentation.attention_to_mask(shown, "mass") if reading == "mass" else shown
    score = segmentation.intersection_over_union if reading == "mass" else segmentation.average_precision
    best = score(shown, objects).argmax(dim=1)
    return shown[torch.arange(len(best)), best].float().numpy()


def _names(arrays: Arrays) -> list[str]:
    """Return the names of the shown images: classes, or photographs' names with the credit on separate lines."""
    if "labels" in arrays:
        return [CLASSES[label] for label in arrays["labels"]]
    return [wrap_credit(str(name)) for name in arrays["names"]]


def _maps(shown: Arrays, maps: dict[str, np.ndarray], grey: bool = False) -> dict:
    """Lay out maps (title → [8, P]) below the images and, if known, the objects; one column per image."""
    rows = {"image": [Picture(image) for image in shown["images"]]}
    if "masks" in shown:
        rows["object"] = [Picture(mask.astype(np.float32), "gray", (0, 1)) for mask in shown["masks"]]
    for title, found in maps.items():
        side = math.isqrt(found.shape[-1])
        squares = found.astype(np.float32).reshape(-1, side, side)
        rows[title] = [Picture(m, "gray", (0, float(m.max()))) if grey else Picture(m) for m in squares]
    return {"rows": list(rows.values()), "row_titles": list(rows), "column_titles": _names(shown)}


def _colours(shown: Arrays, columns: Iterable[tuple[str, np.ndarray]]) -> dict:
    """Lay out columns (title, colours [8, P, 3]) next to the first four images; one row per image."""
    titles, found = zip(*columns, strict=True)
    side = math.isqrt(found[0].shape[1])
    rows = [
        [Picture(image), *(Picture(colours[number].reshape(side, side, 3)) for colours in found)]
        for number, image in enumerate(shown["images"][:4])
    ]
    return {"rows": rows, "row_titles": _names(shown)[:4], "column_titles": ["image", *titles]}


# --- charts of means over seeds with bands of one standard deviation, as arguments of `curve_figure` ---


def _charts(results: Results) -> dict[str, dict]:
    protocol, layers = results.protocol, range(results.protocol.depth)
    attention = [name for name in results.coarse_measures() if COARSE[name][0] != "topk"]
    shown = attention + ["box AP", "mask AP"] * results.have("maskcut")
    images = [point.images / 1000 for point in protocol.points]
    validated = held_out_accuracies(results.by_seed("CRATE", lambda result: result)[0])

    def over_accuracy(model: str) -> tuple[list[float], list[tuple[int]]]:
        runs = results.by_seed(model, held_out_accuracies)
        points = sorted((statistics.fmean(run[index] for run in runs), index) for index in validated)
        return [accuracy for accuracy, _ in points], [(index,) for _, index in points]

    by_layer = _panels(results, shown, lambda _: (layers, [(-1, layer) for layer in layers]))
    by_epoch = _panels(results, ["accuracy", *shown], lambda _: (images, [(index,) for index in range(len(images))]))
    by_accuracy = _panels(results, attention, over_accuracy)
    style = {"from_zero": True, "columns": 2}
    return {
        "figure6_by_layer": {"panels": by_layer, "xlabel": "layer", **style},
        "figure10_by_epoch": {"panels": by_epoch, "xlabel": "training images, thousands", **style},
        "by_accuracy": {"panels": by_accuracy, "xlabel": f"accuracy on held-out {protocol.kind}, %", **style},
        "white_box": {"panels": _white_box(results), "xlabel": "layer"},
    }


def _panels(results: Results, measures: list[str], points: Callable[[str], tuple]) -> dict[str, list[Curve]]:
    """Return for each measure a curve of every model and, for measures of attention, the baselines.

    `points` returns for a model the x of its points, and what follows the measure in `at_checkpoint`'s arguments.
    """
    panels = {}
    for measure in measures:
        curves = []
        for model in results.models:
            x, places = points(model)
            curves.append(_curve(results, model, x, [at_checkpoint(measure, *place) for place in places]))
        if measure in COARSE:
            known, names = results.baselines(measure), {"mean_mask": results.protocol.fixed_map}
            names |= {"random": "random maps"} if measure.endswith("best head") else {}
            every = [x for curve in curves for x in curve.x]
            ends = [min(every), max(every)]
            curves += [Curve(text, ends, [known[name]] * 2, dashed=True) for name, text in names.items()]
        panels[f"{measure}, %"] = curves
    return panels


def _curve(results: Results, model: str, x: Sequence[float], values: Iterable[Callable], label: str = "", **style):
    found = [results.by_seed(model, value) for value in values]
    spread = [statistics.stdev(seeds) for seeds in found] if len(found[0]) > 1 else None
    return Curve(label or model, x, [statistics.fmean(seeds) for seeds in found], spread, **style)


def _white_box(results: Results) -> dict[str, list[Curve]]:
    """Return R^c and sparsity by layer, trained and untrained, for the models that have them."""
    layers, panels = range(results.protocol.depth), {}
    for name in ("coding_rate", "sparsity"):
        for model in results.with_measure(name):
            for i, style in ((-1, {}), (0, {"label": f"{model}, untrained", "dashed": True, "like": model})):
                curve = _curve(results, model, layers, [at_checkpoint(name, i, at) for at in layers], **style)
                panels.setdefault(white_box.MEASURES[name][1], []).append(curve)
    return panels
