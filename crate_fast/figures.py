"""Figures in one style: grids of images and maps, and curves over layers or epochs. Written as PNG and PDF."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["Curve", "Picture", "curve_figure", "image_grid", "save_figure"]

_STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
}
_CELL_INCHES = 1.3
# Okabe and Ito's colours, which most colour-blind people tell apart; yellow is too faint on white
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True)
class Picture:
    """One cell of a grid.

    Attributes:
        pixels: [H, W, 3] (uint8, or floats from 0 to 1) or a map [H, W].
        colours: matplotlib's name of a map's colours.
        limits: Values at both ends of the colours; the map's own when None.
        over: An image [H, W, 3] under the map, which is then half transparent.
    """

    pixels: np.ndarray
    colours: str = "viridis"
    limits: tuple[float, float] | None = None
    over: np.ndarray | None = None


def image_grid(
    rows: Sequence[Sequence[Picture | None]],
    paths: Sequence[Path],
    *,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Write a grid of pictures.

    Args:
        rows: Pictures row by row; None leaves a cell empty. Rows may have different lengths.
        paths: Files to write; the suffix (.png, .pdf) decides the format.
        row_titles: At the left of each row.
        column_titles: Above the first row.
        title: Above everything.

    Raises:
        ValueError: There is nothing to draw.
    """
    columns = max(map(len, rows), default=0)
    if not columns:
        raise ValueError("there is nothing to draw: pass at least one row with a picture")
    left = 0.9 if row_titles else 0.05
    size = (
        _CELL_INCHES * columns + left,
        (_CELL_INCHES + 0.02) * len(rows) + (0.3 if title or column_titles else 0.05),
    )
    with plt.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for row, pictures in enumerate(rows):
            for axis, picture in zip(axes[row], pictures, strict=False):
                if picture is not None:
                    _draw(axis, picture)
            if row_titles:
                axes[row, 0].set_ylabel(row_titles[row], rotation=0, ha="right", va="center", fontsize=7)
        for axis, name in zip(axes[0], column_titles or (), strict=False):
            axis.set_title(name, fontsize=7, pad=3)
        if title:
            figure.suptitle(title, fontsize=9)
        save_figure(figure, paths)


def _draw(axis, picture: Picture) -> None:
    low, high = picture.limits or (None, None)
    height, width = picture.pixels.shape[:2]
    if picture.over is not None:
        height, width = picture.over.shape[:2]
        axis.imshow(picture.over, interpolation="nearest")
    colours = {"cmap": picture.colours, "vmin": low, "vmax": high} if picture.pixels.ndim == 2 else {}
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    alpha = None if picture.over is None else 0.55
    axis.imshow(picture.pixels, interpolation="nearest", extent=extent, alpha=alpha, **colours)


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: In the legend.
        x, y: Its points.
        spread: Half the height of a band around it, or None.
        dashed: For what the others are compared with.
        like: The label whose colour it takes; its own when None.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    dashed: bool = False
    like: str | None = None


def curve_figure(
    panels: dict[str, Sequence[Curve]],
    xlabel: str,
    paths: Sequence[Path],
    title: str | None = None,
    from_zero: bool = False,
    columns: int | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write charts side by side; a label has one colour in all of them, and charts that share labels one legend.

    Args:
        panels: What the y-axis shows → its curves.
        xlabel: Of every panel.
        paths: Files to write; the suffix (.png, .pdf) decides the format.
        title: Above everything.
        from_zero: Start every y-axis at 0, for scores whose differences should not look larger than they are.
        columns: Charts in a row; all when None.
        labels: Those that have the same colours in other figures too, in the same order.
    """
    drawn = [curve for curves in panels.values() for curve in curves]
    distinct = dict.fromkeys([*labels, *(curve.like or curve.label for curve in drawn)])
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(distinct)}
    shared = len({curve.label for curve in drawn}) < len(drawn)
    with plt.rc_context(_STYLE):
        columns = min(columns or len(panels), len(panels))
        shape = (-(-len(panels) // columns), columns)
        size = (3.6 * columns, 2.9 * shape[0])
        figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (name, curves) in zip(axes.flat, panels.items(), strict=False):
            for curve in curves:
                x, y, colour = (
                    np.asarray(curve.x, float),
                    np.asarray(curve.y, float),
                    colours[curve.like or curve.label],
                )
                marker = {"ls": "--"} if curve.dashed else {"marker": "o" if len(x) <= 32 else "", "ms": 3}
                axis.plot(x, y, color=colour, lw=1.4, label=curve.label, **marker)
                if curve.spread is not None:
                    band = np.asarray(curve.spread, float)
                    axis.fill_between(x, y - band, y + band, color=colour, alpha=0.15, lw=0)
            axis.set(xlabel=xlabel, ylabel=name)
            if from_zero:
                axis.set_ylim(bottom=0)
            if all(float(x).is_integer() for curve in curves for x in curve.x):
                axis.xaxis.get_major_locator().set_params(integer=True)  # there is no layer 0.5
            if not shared and any(not curve.label.startswith("_") for curve in curves):
                axis.legend(fontsize=7)
        if shared:
            lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
            named = {label: line for label, line in lines.items() if not label.startswith("_")}
            figure.legend(
                named.values(), named.keys(), loc="outside lower center", ncols=min(5, len(named)), fontsize=7
            )
        if title:
            figure.suptitle(title, fontsize=9)
        save_figure(figure, paths)


def save_figure(figure, paths: Sequence[Path]) -> None:
    """Write a matplotlib figure to each path (folders are made) and close it. The files hold no dates."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
