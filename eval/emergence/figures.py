"""The figures of the report, drawn from saved results and pictures alone; numbered as the paper's that they resemble.

Every grid shows the first eight test scenes: nobody chose them.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from crate_fast.eval.emergence.analysis import MEASURES, at_checkpoint, baselines, by_model
from crate_fast.eval.emergence.protocol import MODELS, Protocol
from crate_fast.figures import Curve, Picture, curve_figure, image_grid
from crate_fast.segmentation import attention_to_mask, intersection_over_union, mask_to_grid
from crate_fast.train.shape_scenes import CLASSES

__all__ = ["draw", "load_pictures", "readme_picture"]

Pictures = dict[str, dict[str, np.ndarray]]
_SHOWN_SCORES = ("mIoU mass, best head", "mIoU mass, fixed head", "box AP", "mask AP")


def load_pictures(report: Path) -> Pictures:
    """Model → arrays, see `scores.pictures`; only the models that are there."""
    found: Pictures = {}
    for model in MODELS:
        path = report / "pictures" / f"{model}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as arrays:
                found[model] = {name: arrays[name] for name in arrays.files}
    return found


def draw(results: dict[str, dict], pictures: Pictures, protocol: Protocol, folder: Path) -> dict[str, Path]:
    """Every figure that there are results for.

    Args:
        results: See `analysis.load_results`.
        pictures: See `load_pictures`.
        protocol: The experiment.
        folder: Where PNGs go.

    Returns:
        Name → file.
    """
    layers = {model: _default_layer(results, protocol, model) for model in pictures}
    figures: dict[str, Callable[[Path], None]] = {
        "figure4_masks": lambda path: _masks(pictures, layers, protocol, path),
        "figure7_heads": lambda path: readme_picture(pictures["CRATE"], layers["CRATE"], protocol, path),
        "figure9_parts": lambda path: _components(pictures, "parts", protocol, path),
        "figure6_components": lambda path: _components(pictures, "components", protocol, path),
        "figure10_components": lambda path: _by_checkpoint(pictures["CRATE"], results, protocol, path),
        "figure6_by_layer": lambda path: curve_figure(_by_layer(results, protocol), "layer", [path], from_zero=True),
        "figure10_by_epoch": lambda path: curve_figure(
            _by_epoch(results, protocol), "training images, thousands", [path], from_zero=True
        ),
        "white_box": lambda path: curve_figure(_white_box(results, protocol), "layer", [path]),
    }
    curves = ("figure6_by_layer", "figure10_by_epoch", "white_box")
    if not pictures:
        figures = {name: figures[name] for name in curves}
    if not by_model(results, protocol, len):
        figures = {name: figure for name, figure in figures.items() if name not in curves}
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure(paths[name])
    return paths


def _default_layer(results: dict[str, dict], protocol: Protocol, model: str) -> int:
    return results[f"scenes-{model}-seed{protocol.seeds[0]}"]["checkpoints"][-1]["default_layer"]


def _side(protocol: Protocol) -> int:
    return protocol.image_size // protocol.patch_size


def _scene_columns(arrays: dict[str, np.ndarray]) -> tuple[list[list[Picture]], list[str]]:
    """Image and object of each shown scene; the scenes' classes."""
    rows = [
        [Picture(image), Picture(mask.astype(np.float32), "gray", (0, 1))]
        for image, mask in zip(arrays["images"], arrays["masks"], strict=True)
    ]
    return rows, [CLASSES[label] for label in arrays["labels"]]


def readme_picture(arrays: dict[str, np.ndarray], layer: int, protocol: Protocol, path: Path) -> None:
    """Attention maps of all heads of one layer on the shown scenes: a scene a row."""
    rows, titles = _scene_columns(arrays)
    side = _side(protocol)
    for row, heads in zip(rows, arrays["attention"][layer], strict=True):
        row += [Picture(head.astype(np.float32).reshape(side, side)) for head in heads]
    columns = ["image", "object"] + [f"layer {layer}, head {head}" for head in range(protocol.heads)]
    image_grid(rows, [path], row_titles=titles, column_titles=columns)


def _masks(pictures: Pictures, layers: dict[str, int], protocol: Protocol, path: Path) -> None:
    """Each model's best mask by mass, as scored (Fig. 4a)."""
    side = _side(protocol)
    rows, titles = _scene_columns(next(iter(pictures.values())))
    for model, arrays in pictures.items():
        objects = mask_to_grid(torch.from_numpy(arrays["masks"]), (side, side))
        masks = attention_to_mask(torch.from_numpy(arrays["attention"][layers[model]]).float(), "mass")
        for row, heads, target in zip(rows, masks, objects, strict=True):
            best = heads[intersection_over_union(heads, target).argmax()]
            row.append(Picture(best.view(side, side).float().numpy(), "gray", (0, 1)))
    columns = ["image", "object"] + [f"{model}\nlayer {layers[model]}" for model in pictures]
    image_grid(rows, [path], row_titles=titles, column_titles=columns)


def _components(pictures: Pictures, name: str, protocol: Protocol, path: Path) -> None:
    """Colours of every layer, CRATE's and ViT's; half of the scenes."""
    side, shown = _side(protocol), 4
    rows, titles = _scene_columns(next(iter(pictures.values())))
    rows, columns = [row[:1] for row in rows[:shown]], ["image"]
    for model in ("CRATE", "ViT"):
        if model in pictures:
            for layer, colours in enumerate(pictures[model][name]):
                columns.append(f"{model}\nlayer {layer}")
                for row, picture in zip(rows, colours, strict=False):
                    row.append(Picture(picture.reshape(side, side, 3)))
    image_grid(rows, [path], row_titles=titles[:shown], column_titles=columns)


def _by_checkpoint(arrays: dict[str, np.ndarray], results: dict[str, dict], protocol: Protocol, path: Path) -> None:
    """CRATE's components at its default layer over training (Fig. 10, right)."""
    side, shown = _side(protocol), 4
    rows, titles = _scene_columns(arrays)
    rows = [row[:1] for row in rows[:shown]]
    for colours in arrays["components_by_checkpoint"]:
        for row, picture in zip(rows, colours, strict=False):
            row.append(Picture(picture.reshape(side, side, 3)))
    checkpoints = results[f"scenes-CRATE-seed{protocol.seeds[0]}"]["checkpoints"]
    columns = ["image"] + [f"{checkpoint['images'] / 1000:.0f} k images" for checkpoint in checkpoints]
    image_grid(rows, [path], row_titles=titles[:shown], column_titles=columns)


def _curve(label: str, x: list[float], values: list[list[float]], dashed: bool = False) -> Curve:
    """Means and standard deviations over seeds; values are [x][seed]."""
    spread = [statistics.stdev(v) for v in values] if len(values[0]) > 1 else None
    return Curve(label, x, [statistics.fmean(v) for v in values], spread, dashed)


def _by_layer(results: dict[str, dict], protocol: Protocol) -> dict[str, list[Curve]]:
    panels: dict[str, list[Curve]] = {}
    layers = list(range(protocol.depth))
    for measure in _SHOWN_SCORES:
        for model in MODELS:
            values = [
                by_model(results, protocol, lambda r, m=measure, at=layer: MEASURES[m](r["checkpoints"][-1], at))[
                    model
                ]
                for layer in layers
            ]
            panels.setdefault(f"{measure}, %", []).append(_curve(model, layers, values))
        if measure.startswith("mIoU"):
            panels[f"{measure}, %"] += _baseline_curves(results, measure, layers)
    return panels


def _by_epoch(results: dict[str, dict], protocol: Protocol) -> dict[str, list[Curve]]:
    panels: dict[str, list[Curve]] = {}
    points = protocol.points
    images = [point.images / 1000 for point in points]
    for measure in ("accuracy", *_SHOWN_SCORES):
        for model in MODELS:
            values = [by_model(results, protocol, _at(measure, index))[model] for index in range(len(points))]
            panels.setdefault(f"{measure}, %", []).append(_curve(model, images, values))
        if measure.startswith("mIoU"):
            panels[f"{measure}, %"] += _baseline_curves(results, measure, images)
    return panels


def _at(measure: str, index: int) -> Callable[[dict], float]:
    if measure == "accuracy":
        return lambda result: 100 * result["checkpoints"][index]["accuracy"]
    return at_checkpoint(measure, index)


def _baseline_curves(results: dict[str, dict], measure: str, x: list[float]) -> list[Curve]:
    known = baselines(results, measure.split(",")[0].split()[1])
    names = {"mean_mask": "mean mask", "random": "random maps"}
    return [Curve(text, [x[0], x[-1]], [known[name]] * 2, dashed=True) for name, text in names.items()]


def _white_box(results: dict[str, dict], protocol: Protocol) -> dict[str, list[Curve]]:
    """R^c and sparsity by layer, trained and untrained, of the models that have them."""
    names = {"coding_rate": "R$^c$ of the subspace tokens (nats)", "sparsity": "share of non-zeros after ISTA"}
    panels: dict[str, list[Curve]] = {}
    layers = list(range(protocol.depth))
    for name, title in names.items():
        for model in MODELS:
            rows = results[f"scenes-{model}-seed{protocol.seeds[0]}"]["checkpoints"][-1]["white_box"]
            if not rows or name not in rows[0]:
                continue
            for index, label in ((-1, model), (0, f"{model}, untrained")):
                values = [
                    by_model(results, protocol, lambda r, i=index, at=layer, n=name: _white_box_value(r, i, at, n))[
                        model
                    ]
                    for layer in layers
                ]
                panels.setdefault(title, []).append(_curve(label, layers, values, dashed=index == 0))
    return panels


def _white_box_value(result: dict, index: int, layer: int, name: str) -> float:
    rows = result["checkpoints"][index]["white_box"]
    return rows[layer].get(name, float("nan")) if rows else float("nan")
