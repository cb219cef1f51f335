"""The report's figures, drawn from saved results and pictures alone; numbers are those of similar paper figures.

Grids show the first eight or four of the shown images: test scenes, or free photographs.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from crate_fast.eval.common.figures import Curve, Picture, curve_figure, image_grid
from crate_fast.eval.common.segmentation import (
    attention_to_mask,
    average_precision,
    intersection_over_union,
    mask_to_grid,
)
from crate_fast.eval.emergence.protocol import MODELS, Protocol
from crate_fast.eval.emergence.scores import (
    COARSE,
    MEASURES,
    at_checkpoint,
    baselines,
    by_seed,
    coarse_measures,
    complete_seeds,
    has_measure,
    head_chosen,
    held_out_accuracy,
    validated,
)
from crate_fast.train.data.shape_scenes import CLASSES

__all__ = ["CAPTIONS", "draw", "load_pictures"]

Pictures = dict[str, dict[str, np.ndarray]]
CAPTIONS = {  # name → caption, in the report's order
    "figure4_heads": "Attention of each model's head that is best on other photographs, at the paper's layer.",
    "figure4_masks": "Each model's best mask by mass at the paper's layer, as scored (Fig. 4).",
    "figure4_maps": "The attention map of each model's best head by AP; black is 0, white its largest weight.",
    "figure6_by_layer": "Scores by layer, means and standard deviations over seeds (Fig. 6).",
    "figure6_components": "Principal components 2 to 4 of patch features by layer, as colours; four images (Fig. 6).",
    "figure7_heads": "Attention of CLS, every head of CRATE's layer that the paper looks at (Fig. 7).",
    "figure9_parts": "The first three components of the foreground by layer, as colours; four images (Fig. 9).",
    "figure10_by_epoch": "Scores over training at the paper's layer (Fig. 10); at 0 stand the untrained twins.",
    "figure10_components": "Components 2 to 4 over training, CRATE; four images (Fig. 10).",
    "by_accuracy": "Attention's scores at the paper's layer against accuracy on a run's held-out images, a point a "
    "checkpoint of the first stage.",
    "white_box": "R^c and sparsity by layer; dashed: before training.",
}
_SHOWN_SCORES = (
    *("AP, best head", "AP, fixed head", "mIoU mass, best head", "mIoU mass, fixed head"),
    *("box AP", "mask AP"),
)


def load_pictures(report: Path) -> Pictures:
    """Load the arrays of `scores.pictures` and of the shown images, by model."""
    found: Pictures = {}
    folder = report / "pictures"
    shown = next((path for path in map(folder.joinpath, ("scenes.npz", "photographs.npz")) if path.is_file()), None)
    for model in MODELS:
        if (folder / f"{model}.npz").is_file():
            found[model] = _load(shown) | _load(folder / f"{model}.npz")
    return found


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def draw(results: dict[str, dict], pictures: Pictures, protocol: Protocol, folder: Path) -> dict[str, Path]:
    """Draw every figure that has results.

    Args:
        results: Result of `scores.load_results`.
        pictures: Result of `load_pictures`.
        protocol: The experiment.
        folder: Output folder for PNGs.

    Returns:
        Files by name, in the order of `CAPTIONS`.
    """
    first = protocol.seeds[0]  # the seed of the pictures
    runs = {model: results.get(f"{protocol.kind}-{model}-seed{first}") for model in pictures}
    pictures = {model: arrays for model, arrays in pictures.items() if runs[model]}
    last = {model: runs[model]["checkpoints"][-1] for model in pictures}
    layers = {model: checkpoint["default_layer"] for model, checkpoint in last.items()}
    figures: dict[str, Callable[[Path], None]] = {}
    if "CRATE" in pictures:
        figures["figure7_heads"] = lambda path: _all_heads(pictures["CRATE"], layers["CRATE"], protocol, path)
        figures["figure10_components"] = lambda path: _by_checkpoint(pictures["CRATE"], protocol, path)
    if pictures and protocol.photographs:
        heads = {model: head_chosen(checkpoint, "ap", layers[model]) for model, checkpoint in last.items()}
        figures["figure4_heads"] = lambda path: _one_head(pictures, layers, heads, protocol, path)
    elif pictures:
        figures["figure4_masks"] = lambda path: _best_heads(pictures, layers, protocol, "mass", path)
        figures["figure4_maps"] = lambda path: _best_heads(pictures, layers, protocol, "ap", path)
    if pictures:
        figures["figure9_parts"] = lambda path: _components(pictures, "parts", protocol, path)
        figures["figure6_components"] = lambda path: _components(pictures, "components", protocol, path)
    if complete_seeds(results, protocol):
        charts = _Charts(results, protocol)
        figures["figure6_by_layer"] = charts.by_layer
        figures["figure10_by_epoch"] = charts.by_epoch
        figures["by_accuracy"] = charts.by_accuracy
        figures["white_box"] = charts.white_box
    paths = {name: folder / f"{name}.png" for name in CAPTIONS if name in figures}
    for name, path in paths.items():
        figures[name](path)
    return paths


def _images(arrays: dict[str, np.ndarray]) -> tuple[list[list[Picture]], list[str], list[str]]:
    """Return the rows of images and, if known, object masks, their titles, and the names of the images."""
    rows, titles = [[Picture(image) for image in arrays["images"]]], ["image"]
    if "masks" in arrays:
        rows.append([Picture(mask.astype(np.float32), "gray", (0, 1)) for mask in arrays["masks"]])
        titles.append("object")
    names = [CLASSES[label] for label in arrays["labels"]] if "labels" in arrays else _short(arrays["names"])
    return rows, titles, names


def _short(names: np.ndarray) -> list[str]:
    """Return names of photographs, the credit on lines of its own."""
    return [str(name).replace(" (", "\n").replace(", ", "\n").rstrip(")") for name in names]


def _side(arrays: dict[str, np.ndarray], protocol: Protocol) -> int:
    return arrays["images"].shape[1] // protocol.patch_size


def _all_heads(arrays: dict[str, np.ndarray], layer: int, protocol: Protocol, path: Path) -> None:
    """Draw attention maps of all heads of one layer, an image a column."""
    rows, titles, names = _images(arrays)
    side = _side(arrays, protocol)
    for head, maps in enumerate(arrays["attention"][layer].swapaxes(0, 1)):
        rows.append([Picture(each.astype(np.float32).reshape(side, side)) for each in maps])
        titles.append(f"layer {layer},\nhead {head}")
    image_grid(rows, [path], row_titles=titles, column_titles=names)


def _one_head(
    pictures: Pictures, layers: dict[str, int], heads: dict[str, int], protocol: Protocol, path: Path
) -> None:
    """Draw the attention map of one head of each model, an image a column."""
    rows, titles, names = _images(next(iter(pictures.values())))
    for model, arrays in pictures.items():
        side, maps = _side(arrays, protocol), arrays["attention"][layers[model]][:, heads[model]]
        rows.append([Picture(each.astype(np.float32).reshape(side, side)) for each in maps])
        titles.append(f"{model},\nlayer {layers[model]},\nhead {heads[model]}")
    image_grid(rows, [path], row_titles=titles, column_titles=names)


def _best_heads(pictures: Pictures, layers: dict[str, int], protocol: Protocol, reading: str, path: Path) -> None:
    """Draw the mask ("mass") or the map ("ap") of each model's best head, as scored (Fig. 4a), a scene a column."""
    rows, titles, names = _images(next(iter(pictures.values())))
    side = _side(next(iter(pictures.values())), protocol)
    for model, arrays in pictures.items():
        objects = mask_to_grid(torch.from_numpy(arrays["masks"]), (side, side)).unsqueeze(1)
        maps = torch.from_numpy(arrays["attention"][layers[model]]).float()
        shown = attention_to_mask(maps, "mass") if reading == "mass" else maps
        score = intersection_over_union if reading == "mass" else average_precision
        best = score(shown, objects).argmax(dim=1)
        chosen = shown[torch.arange(len(best)), best].view(-1, side, side).float()
        rows.append([Picture(each.numpy(), "gray", (0, float(each.max()))) for each in chosen])
        titles.append(f"{model},\nlayer {layers[model]}")
    image_grid(rows, [path], row_titles=titles, column_titles=names)


def _components(pictures: Pictures, name: str, protocol: Protocol, path: Path) -> None:
    """Draw the components of every layer of CRATE and ViT."""
    columns = [
        (f"{model}\nlayer {layer}", colours)
        for model in ("CRATE", "ViT")
        if model in pictures
        for layer, colours in enumerate(pictures[model][name])
    ]
    _colour_grid(next(iter(pictures.values())), columns, protocol, path)


def _by_checkpoint(arrays: dict[str, np.ndarray], protocol: Protocol, path: Path) -> None:
    """Draw CRATE's components at its default layer over training (Fig. 10, right)."""
    titles = [f"{point.images / 1000:.0f} k images" for point in protocol.points]
    _colour_grid(arrays, list(zip(titles, arrays["components_by_checkpoint"], strict=True)), protocol, path)


def _colour_grid(
    scenes: dict[str, np.ndarray], columns: list[tuple[str, np.ndarray]], protocol: Protocol, path: Path
) -> None:
    """Draw (title, colours [8, P, 3]) of the first four images, an image a row."""
    shown = 4
    side = _side(scenes, protocol)
    (images, *_), _, classes = _images(scenes)
    rows = [[image] for image in images[:shown]]
    for _, found in columns:
        for row, picture in zip(rows, found, strict=False):
            row.append(Picture(picture.reshape(side, side, 3)))
    titles = ["image", *(title for title, _ in columns)]
    image_grid(rows, [path], row_titles=classes[:shown], column_titles=titles)


class _Charts:
    """Charts of means over seeds, with bands of one standard deviation."""

    def __init__(self, results: dict[str, dict], protocol: Protocol):
        self.results, self.protocol = results, protocol
        self.layers = range(protocol.depth)
        known = coarse_measures(results)
        detected = all("maskcut" in r["checkpoints"][-1] for r in results.values() if "checkpoints" in r)
        self.shown = [name for name in _SHOWN_SCORES if (name in known if name in COARSE else detected)]

    def by_layer(self, path: Path) -> None:
        """Draw scores of the last checkpoint at every layer."""

        def values(measure: str) -> list[Callable]:
            return [lambda r, at=layer: MEASURES[measure](r["checkpoints"][-1], at) for layer in self.layers]

        panels = {f"{m}, %": self._models(m, self.layers, values(m)) for m in self.shown}
        self._draw(panels, "layer", path)

    def by_epoch(self, path: Path) -> None:
        """Draw accuracy, and scores at the paper's layer, over training."""
        images = [point.images / 1000 for point in self.protocol.points]

        def values(measure: str) -> list[Callable]:
            if measure == "accuracy":
                return [lambda r, i=index: 100 * r["checkpoints"][i]["accuracy"] for index in range(len(images))]
            return [at_checkpoint(measure, index) for index in range(len(images))]

        panels = {f"{m}, %": self._models(m, images, values(m)) for m in ("accuracy", *self.shown)}
        curve_figure(
            panels, "training images, thousands", [path], from_zero=True, columns=2, labels=self.protocol.models
        )

    def by_accuracy(self, path: Path) -> None:
        """Draw attention's scores at the paper's layer against accuracy, a point a checkpoint of the first stage."""
        known = validated(by_seed(self.results, self.protocol, "CRATE", lambda result: result)[0])

        def accuracy(model: str, index: int) -> float:
            return statistics.fmean(by_seed(self.results, self.protocol, model, held_out_accuracy(index)))

        models = self.protocol.models
        along = {model: sorted((accuracy(model, index), index) for index in known) for model in models}

        def curve(model: str, measure: str) -> Curve:
            values = [at_checkpoint(measure, index) for _, index in along[model]]
            return self._curve(model, [x for x, _ in along[model]], values, model)

        panels = {f"{m}, %": [curve(model, m) for model in models] for m in self.shown if m in COARSE}
        self._draw(panels, f"accuracy on held-out {self.protocol.kind}, %", path)

    def white_box(self, path: Path) -> None:
        """Draw R^c and sparsity by layer, trained and untrained, for the models that have them."""
        titles = {"coding_rate": "R$^c$ of the subspace tokens (nats)", "sparsity": "share of non-zeros after ISTA"}
        panels: dict[str, list[Curve]] = {}
        for name, title in titles.items():
            for model in self.protocol.models:
                if not by_seed(self.results, self.protocol, model, lambda r, n=name: has_measure(r, n))[0]:
                    continue
                for index, style in ((-1, {}), (0, {"dashed": True, "like": model})):
                    values = [
                        lambda r, i=index, at=layer, n=name: r["checkpoints"][i]["white_box"][at][n]
                        for layer in self.layers
                    ]
                    label = model if index else f"{model}, untrained"
                    panels.setdefault(title, []).append(self._curve(model, self.layers, values, label, **style))
        curve_figure(panels, "layer", [path], labels=self.protocol.models)

    def _draw(self, panels: dict[str, list[Curve]], along: str, path: Path) -> None:
        curve_figure(panels, along, [path], from_zero=True, columns=2, labels=self.protocol.models)

    def _curve(self, model: str, x: Sequence[float], values: Sequence[Callable], label: str, **style) -> Curve:
        found = [by_seed(self.results, self.protocol, model, value) for value in values]
        spread = [statistics.stdev(seeds) for seeds in found] if len(found[0]) > 1 else None
        return Curve(label, x, [statistics.fmean(seeds) for seeds in found], spread, **style)

    def _models(self, measure: str, x: Sequence[float], values: Sequence[Callable]) -> list[Curve]:
        """Return a curve a model, and for attention the baselines."""
        curves = [self._curve(model, x, values, model) for model in self.protocol.models]
        if measure in COARSE:
            known = baselines(self.results, measure)
            fixed = "mean box" if self.protocol.photographs else "mean mask"
            names = {"mean_mask": fixed} | ({"random": "random maps"} if measure.endswith("best head") else {})
            for name, text in names.items():
                curves.append(Curve(text, [x[0], x[-1]], [known[name]] * 2, dashed=True))
        return curves
