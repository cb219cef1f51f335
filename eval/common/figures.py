"""Figures in one style: grids of images and maps, and curves over layers or epochs. Written as PNG and PDF."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crate_fast.eval.common.images import Sample

ROWS_A_PAGE = 8

_STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # keep text as text
}
_CELL_INCHES, _EDGE_INCHES = 1.3, 0.02
_MARGIN = 0.015  # as a fraction of a cell
# Okabe and Ito's colour-blind-safe palette without yellow, which is too faint on white
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True)
class Picture:
    """One cell of a grid."""

    pixels: np.ndarray  # [H, W, 3] (uint8, or floats from 0 to 1) or a map [H, W]
    colours: str = "viridis"  # name of matplotlib's colour map
    limits: tuple[float, float] | None = None  # values at the ends of the colour scale; None: the map's range
    over: np.ndarray | None = None  # an image [H, W, 3] under the map, which is then half transparent


def image_grid(
    rows: Sequence[Sequence[Picture | None]],
    paths: Sequence[Path],
    *,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Write a grid of pictures to `paths`, in the formats of their suffixes (.png, .pdf).

    `rows` is not empty; rows may have different lengths, and None leaves a cell empty.
    """
    columns = max(map(len, rows))
    with matplotlib.rc_context(_STYLE | {"axes.grid": False, "text.parse_math": False}):  # file names may contain $_^
        size = np.array([columns, len(rows)]) * _CELL_INCHES
        figure = Figure(figsize=size)
        axis = figure.add_axes((0, 0, 1, 1))  # one for all cells: many axes take seconds to draw
        for row, pictures in enumerate(rows):
            for column, picture in enumerate(pictures):
                if picture is None:
                    continue
                # in the middle of a cell of side 1, with a margin
                height, width = (picture.pixels if picture.over is None else picture.over).shape[:2]
                half = [(0.5 - _MARGIN) * side / max(height, width) for side in (width, height)]
                extent = (column + 0.5 - half[0], column + 0.5 + half[0], row + 0.5 + half[1], row + 0.5 - half[1])
                how = {"interpolation": "nearest", "extent": extent}
                if picture.over is not None:
                    axis.imshow(picture.over, **how)
                    how["alpha"] = 0.55
                low, high = picture.limits or (None, None)
                axis.imshow(picture.pixels, cmap=picture.colours, vmin=low, vmax=high, **how)
        axis.set(xlim=(0, columns), ylim=(len(rows), 0))
        axis.spines[:].set_visible(False)
        axis.set_xticks([column + 0.5 for column in range(columns)], column_titles or [""] * columns)
        axis.set_yticks([row + 0.5 for row in range(len(rows))], row_titles or [""] * len(rows))
        axis.tick_params(length=0, pad=2, labelsize=7, labeltop=True, labelbottom=False)
        if title:
            axis.set_title(title, fontsize=9, pad=4)
        # enlarge the figure for the text around the axis
        box = axis.get_tightbbox(FigureCanvasAgg(figure).get_renderer()).get_points() / figure.dpi
        before, after = _EDGE_INCHES - box[0], box[1] - size + _EDGE_INCHES
        whole = before + size + after
        figure.set_size_inches(whole)
        axis.set_position((*(before / whole), *(size / whole)))
        save_figure(figure, paths)


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str  # text in the legend
    x: Sequence[float]  # coordinates of the points
    y: Sequence[float]
    spread: Sequence[float] | None = None  # half the height of a band around the line
    dashed: bool = False  # for baselines
    like: str | None = None  # label of the curve with the same colour; None for a colour of its own


def curve_figure(
    panels: dict[str, Sequence[Curve]],
    xlabel: str,
    paths: Sequence[Path],
    from_zero: bool = False,
    columns: int | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write charts, label of the y-axis → curves, to `paths`, in the formats of their suffixes (.png, .pdf).

    There are `columns` charts per row; all in one row by default. A label has the same colour in all charts, and in
    several figures with the same `labels`. Charts with common labels share a legend. `from_zero` starts the y-axis
    at 0, so that differences do not look larger than they are.
    """
    drawn = [curve for curves in panels.values() for curve in curves]
    distinct = dict.fromkeys([*labels, *(curve.like or curve.label for curve in drawn)])
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(distinct)}
    shared = len({curve.label for curve in drawn}) < len(drawn)
    columns = min(columns or len(panels), len(panels))
    shape = (-(-len(panels) // columns), columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.9 * shape[0]), layout="constrained")
        axes = figure.subplots(*shape, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (name, curves) in zip(axes.flat, panels.items(), strict=False):
            for curve in curves:
                x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
                colour = colours[curve.like or curve.label]
                marker = {"ls": "--"} if curve.dashed else {"marker": "o" if len(x) <= 32 else "", "ms": 3}
                label = curve.label.replace("$", r"\$")
                label = f" {label}" if label.startswith("_") else label  # matplotlib would hide it
                axis.plot(x, y, color=colour, lw=1.4, label=label, **marker)
                if curve.spread is not None:
                    band = np.asarray(curve.spread, float)
                    axis.fill_between(x, y - band, y + band, color=colour, alpha=0.15, lw=0)
            axis.set(xlabel=xlabel, ylabel=name)
            if from_zero:
                axis.set_ylim(bottom=0)
            if all(float(x).is_integer() for curve in curves for x in curve.x):
                axis.xaxis.get_major_locator().set_params(integer=True)  # there is no layer 0.5
            if not shared:
                axis.legend(fontsize=7)
        if shared:
            lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
            place = {"loc": "outside lower center", "ncols": min(5, len(lines)), "fontsize": 7}
            figure.legend(lines.values(), lines.keys(), **place)
        save_figure(figure, paths)


def save_figure(figure, paths: Sequence[Path]) -> None:
    """Write a matplotlib figure to each path, without dates; missing folders are created."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)


def write_pages(
    rows: Sequence[Sequence[Picture | None]],
    folder: Path,
    name: str,
    row_titles: Sequence[str] | None,
    column_titles: Sequence[str],
    title: str | None = None,
) -> list[Path]:
    """Write rows of pictures as `name`_01.png, `name`_01.pdf, `name`_02.png, …, `ROWS_A_PAGE` rows per page."""
    written = []
    titles = {"column_titles": column_titles, "title": title}
    for page, start in enumerate(range(0, len(rows), ROWS_A_PAGE), start=1):
        part = slice(start, start + ROWS_A_PAGE)
        paths = [folder / f"{name}_{page:02d}.{suffix}" for suffix in ("png", "pdf")]
        image_grid(rows[part], paths, row_titles=row_titles and row_titles[part], **titles)
        written += paths
    return written


def short_name(sample: Sample, longest: int = 16) -> str:
    """Return a sample's key for a title. A long key is wrapped before its credit, or shortened at the beginning."""
    name = str(sample.key)
    wrapped = wrap_credit(name)
    return name if len(name) <= longest else wrapped if wrapped != name else "…" + name[1 - longest :]


def wrap_credit(name: str) -> str:
    """Put the credit of a free photograph on separate lines.

    >>> wrap_credit("cat (Stéfan van der Walt, CC0)")
    'cat\\nStéfan van der Walt\\nCC0'
    """
    return re.sub(r"^(.+) \((.+), (.+)\)$", r"\1\n\2\n\3", name)


def image_picture(image) -> Picture:
    """Return an image [3, H, W] as a cell of a figure."""
    return Picture(image.permute(1, 2, 0).numpy())


def image_rows(
    samples: Sequence[Sample], columns: dict[str, Iterable[Picture | None]]
) -> tuple[list[list[Picture | None]], list[str]]:
    """Lay out samples as rows of a grid; return the rows and the column titles.

    A row holds the image, the union of its object masks if known, and one picture from each of `columns`.
    """
    rows = []
    for sample, *pictures in zip(samples, *columns.values(), strict=True):
        rows.append([image_picture(sample.image), *pictures])
        if sample.target is not None:
            union = sample.target.masks.any(dim=0)[None, None].float()
            known = F.interpolate(union, sample.image.shape[1:])[0, 0].numpy()
            rows[-1].insert(1, Picture(known, "gray", (0, 1)))
    return rows, ["image", *["object"] * (samples[0].target is not None), *columns]
