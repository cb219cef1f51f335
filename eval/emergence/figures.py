"""Figures of the report, drawn from saved results and pictures only, and numbered like similar figures of the paper.

Grids show eight or four free photographs.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from crate_fast.eval import white_box
from crate_fast.eval.common.figures import Curve, Picture, curve_figure, image_grid, wrap_credit
from crate_fast.eval.emergence.protocol import Protocol
from crate_fast.eval.emergence.results import COARSE, Results, at_checkpoint, head_chosen, held_out_accuracies

Arrays = dict[str, np.ndarray]
CAPTIONS = {  # name → caption, in the report's order
    "figure4_heads": "Attention of each model's head that is best on other photographs, at the paper's layer.",
    "figure6_by_layer": "Scores by layer, means and standard deviations over seeds (Fig. 6).",
    "figure6_components": "Principal components 2 to 4 of patch features by layer, as colours; four images (Fig. 6).",
    "figure7_heads": "CLS attention of every head of CRATE, at the paper's layer (Fig. 7).",
    "figure9_parts": "The first three components of the foreground by layer, as colours; four images.",
    "figure10_by_epoch": "Scores over training at the paper's layer (Fig. 10); 0: the untrained twins.",
    "figure10_components": "Components 2 to 4 over training, CRATE; four images (Fig. 10).",
    "by_accuracy": "Attention's scores at the paper's layer against accuracy on a run's held-out images, one point "
    "per checkpoint.",
    "white_box": "R^c and sparsity by layer; dashed: before training.",
}


def load_pictures(report: Path, protocol: Protocol) -> dict[str, Arrays]:
    """Return compared model → arrays of `scores.pictures` and of the shown images."""

    def load(path: Path) -> Arrays:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    folder = report / "pictures"
    saved = {model: folder / f"{model}.npz" for model in protocol.models}
    return {model: load(folder / "photographs.npz") | load(path) for model, path in saved.items() if path.is_file()}


def draw(results: Results, pictures: dict[str, Arrays], folder: Path) -> dict[str, Path]:
    """Draw every figure that has results as a PNG file; return name → path, in the order of `CAPTIONS`."""
    figures = _grids(results, pictures) | _charts(results)
    paths = {name: folder / f"{name}.png" for name in CAPTIONS if name in figures}
    for name, path in paths.items():
        figures[name](paths=[path])
    return paths


# --- grids of pictures ---


def _grids(results: Results, pictures: dict[str, Arrays]) -> dict[str, partial]:
    protocol = results.protocol
    runs = {model: results.run(model, protocol.seeds[0]) for model in pictures}
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
        titles = (f"{step * protocol.batch_size / 1000:.0f} k images" for step in protocol.scored_steps)
        columns = zip(titles, pictures["CRATE"]["components_by_checkpoint"], strict=True)
        grids["figure10_components"] = _colours(shown, columns)
    heads = {model: head_chosen(checkpoint, "ap", layers[model]) for model, checkpoint in last.items()}
    titles = {model: f"{model},\nlayer {layers[model]},\nhead {head}" for model, head in heads.items()}
    maps = {titles[model]: maps[:, heads[model]] for model, maps in attention.items()}
    grids["figure4_heads"] = _maps(shown, maps)
    for name, kind in (("figure9_parts", "parts"), ("figure6_components", "components")):
        columns = [
            (f"{model}\nlayer {layer}", colours)
            for model in ("CRATE", "ViT")
            if model in pictures
            for layer, colours in enumerate(pictures[model][kind])
        ]
        grids[name] = _colours(shown, columns)
    return grids


def _names(shown: Arrays) -> list[str]:
    """Return the names of the shown photographs, with the credit on separate lines."""
    return [wrap_credit(str(name)) for name in shown["names"]]


def _maps(shown: Arrays, maps: dict[str, np.ndarray]) -> partial:
    """Lay out maps (title → [8, P]) below the images; one column per image."""
    rows = {"image": [Picture(image) for image in shown["images"]]}
    for title, found in maps.items():
        side = math.isqrt(found.shape[-1])
        rows[title] = [Picture(square) for square in found.astype(np.float32).reshape(-1, side, side)]
    return partial(image_grid, list(rows.values()), row_titles=list(rows), column_titles=_names(shown))


def _colours(shown: Arrays, columns: Iterable[tuple[str, np.ndarray]]) -> partial:
    """Lay out columns (title, colours [8, P, 3]) next to the first four images; one row per image."""
    titles, found = zip(*columns, strict=True)
    side = math.isqrt(found[0].shape[1])
    rows = [
        [Picture(image), *(Picture(colours[number].reshape(side, side, 3)) for colours in found)]
        for number, image in enumerate(shown["images"][:4])
    ]
    return partial(image_grid, rows, row_titles=_names(shown)[:4], column_titles=["image", *titles])


# --- charts of means over seeds with bands of one standard deviation ---


def _charts(results: Results) -> dict[str, partial]:
    protocol, layers = results.protocol, range(results.protocol.depth)
    attention = [name for name, (reading, _) in COARSE.items() if reading != "topk"]
    shown = attention + ["box AP", "mask AP"] * results.have("masks")
    images = [step * protocol.batch_size / 1000 for step in protocol.scored_steps]
    validated = results.by_seed("CRATE", held_out_accuracies)[0]

    def over_accuracy(model: str) -> tuple[list[float], list[tuple[int]]]:
        runs = results.by_seed(model, held_out_accuracies)
        points = sorted((statistics.fmean(run[index] for run in runs), index) for index in validated)
        return [accuracy for accuracy, _ in points], [(index,) for _, index in points]

    by_layer = _panels(results, shown, lambda _: (layers, [(-1, layer) for layer in layers]))
    by_epoch = _panels(results, ["accuracy", *shown], lambda _: (images, [(index,) for index in range(len(images))]))
    by_accuracy = _panels(results, attention, over_accuracy)
    chart = partial(curve_figure, labels=protocol.models)
    scores = partial(chart, from_zero=True, columns=2)
    return {
        "figure6_by_layer": partial(scores, by_layer, "layer"),
        "figure10_by_epoch": partial(scores, by_epoch, "training images, thousands"),
        "by_accuracy": partial(scores, by_accuracy, "accuracy on held-out photographs, %"),
        "white_box": partial(chart, _white_box(results), "layer"),
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
            known, names = results.baselines(measure), {"mean_mask": "mean box"}
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
