"""`shape_scenes`: a synthetic data set of scenes with labels and object masks, computed without files.

An image is a stack of layers, each read from small tables through a random affine map and blended in order:

    image += a * (texture - image),   a = opacity * clip(1/2 - d, 0, 1),   d = pixels to the silhouette

Only the silhouette depends on the label. It has unit area and its centroid at the origin before it is placed, so
colour, area and position carry no information about the label. Every random number is a hash of (seed, split, index,
slot). All arithmetic is integer, or elementwise and correctly rounded, so the bytes of an image do not depend on
batch, threads, CPU or NumPy.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from crate_fast.errors import UserError

SPLITS: tuple[str, ...] = ("train", "val")
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 16, 512

# Composition of a scene. Lengths and areas are fractions of the image's side and area.
_AREA = (0.05, 0.15)  # object area before occlusion
_TURNS = 0.08  # largest rotation of the object either way, in full turns (29°); other layers have any angle
_REACH = 0.945  # upper bound of the distance from centroid to tip of a unit-area class silhouette
_ASPECT, _SHEAR = 1.08, 0.10  # largest area-preserving stretch, and largest shear, of a layer
_STRETCH = 1.10  # upper bound of the factor by which the two together lengthen a layer
_N_BEHIND, _BEHIND_SHARE = 6, 0.8  # maximum number of distractors behind the object, and probability of each
_BEHIND_RADIUS = (0.07, 0.23)
_N_FRONT, _FRONT_SHARE = 2, 0.4  # the same for distractors in front of the object
_FRONT_AREA = (0.03, 0.075)  # area of each, as a fraction of the object's area
_FRONT_RADIUS = 0.16  # upper bound
_N_TEXTURES, _TEXTURE_REPEATS = 12, (0.6, 1.6)  # tiles across one image
_TABLE_MARGIN = 1.25  # half the side of a stamp's table, relative to the reach of its silhouette
_CHUNK_PIXELS = 65536  # pixels rendered at once: keeps temporaries in the cache
_SLOTS = 340  # maximum number of random numbers per image

Array = np.ndarray
Sdf = Callable[[Array, Array], Array]  # signed distance of points (x, y), negative inside


def _mix(z: Array) -> Array:
    """Apply the finaliser of splitmix64, a bijection of uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _uniforms(seed: int, stream: int, indices: Array, slots: int) -> Array:
    """Return float64 uniforms in [0, 1), [n, slots]: entry (i, s) is a hash of (seed, stream, indices[i], s)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = _mix(_mix(np.array([seed], np.uint64) + golden) + np.array([stream], np.uint64) * golden)
    state = _mix(key + (indices.astype(np.uint64) + np.uint64(1)) * golden)
    counter = np.arange(1, slots + 1, dtype=np.uint64) * golden
    return (_mix(state[:, None] + counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Draws:
    """Stream of uniform numbers for a batch: each call returns `count` per image, as [n_images * count]."""

    def __init__(self, seed: int, stream: int, indices: Array):
        self._block = _uniforms(seed, stream, indices, _SLOTS)
        self.n_images, self._next = len(indices), 0

    def __call__(self, low: float, high: float, count: int = 1) -> Array:
        block = self._block[:, self._next : self._next + count]
        if block.shape[1] != count:
            raise AssertionError(f"an image needs more than {_SLOTS} random numbers: increase _SLOTS")
        self._next += count
        return (low + (high - low) * block).ravel()

    def choice(self, n: int, count: int = 1) -> Array:
        return np.floor(self(0.0, float(n), count)).astype(np.int64)


def _cos_sin(turns: Array) -> tuple[Array, Array]:
    """Return cos and sin of 2 pi turns to about 1e-8, without libm, which differs between machines."""
    x = (turns - np.floor(turns + 0.5)) * 1.5707963267948966  # a quarter of the angle, in [-pi/4, pi/4]
    xx = x * x
    sin = x * (1.0 - xx / 6.0 * (1.0 - xx / 20.0 * (1.0 - xx / 42.0 * (1.0 - xx / 72.0))))
    cos = 1.0 - xx / 2.0 * (1.0 - xx / 12.0 * (1.0 - xx / 30.0 * (1.0 - xx / 56.0 * (1.0 - xx / 90.0))))
    for _ in range(2):
        cos, sin = cos * cos - sin * sin, 2.0 * sin * cos
    return cos, sin


def _disc(radius: float, cx: float = 0.0, cy: float = 0.0) -> Sdf:
    return lambda x, y: np.sqrt((x - cx) * (x - cx) + (y - cy) * (y - cy)) - radius


def _union(*parts: Sdf) -> Sdf:
    return lambda x, y: functools.reduce(np.minimum, (part(x, y) for part in parts))


def _box(half_x: float, half_y: float) -> Sdf:
    return _path([(-half_x, -half_y), (half_x, -half_y), (half_x, half_y), (-half_x, half_y)])


def _path(points: Sequence[tuple[float, float]], half_width: float | None = None) -> Sdf:
    """Return a stroke of `half_width`, or the closed polygon if None (sign by parity of crossings)."""
    ends = points[1:] if half_width else [*points[1:], points[0]]

    def sdf(x: Array, y: Array) -> Array:
        squared, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(points, ends, strict=False):
            ex, ey = x1 - x0, y1 - y0
            t = np.clip(((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
            dx, dy = x - x0 - t * ex, y - y0 - t * ey
            squared = np.minimum(squared, dx * dx + dy * dy)
            if half_width is None and ey != 0:
                inside ^= (y >= min(y0, y1)) & (y < max(y0, y1)) & (x < x0 + (y - y0) * (ex / ey))
        return np.sqrt(squared) - half_width if half_width else np.where(inside, -1.0, 1.0) * np.sqrt(squared)

    return sdf


def _around(turns: Array, radii: Array, flatten: float = 1.0) -> list[tuple[float, float]]:
    cos, sin = _cos_sin(turns)
    return list(zip((radii * cos).tolist(), (flatten * radii * sin).tolist(), strict=True))


_HEART = [(-0.9, 0.06), (0.0, -1.0), (0.9, 0.06), (0.0, 0.5)]  # without its lobes
# One silhouette per class, within [-1.2, 1.2]^2; the tables normalise size and position.
_SILHOUETTES: dict[str, Sdf] = {
    "disc": _disc(0.9),
    "ring": lambda x, y: np.maximum(_disc(1.0)(x, y), -_disc(0.56)(x, y)),
    "triangle": _path(_around(np.arange(3) / 3.0, np.full(3, 1.1))),
    "square": _box(0.8, 0.8),
    "star": _path(_around(np.arange(10) / 10.0, np.array([1.1, 0.47] * 5))),
    "plus": _union(_box(1.0, 0.3), _box(0.3, 1.0)),
    "heart": _union(_disc(0.51, -0.44, 0.3), _disc(0.51, 0.44, 0.3), _path(_HEART)),
    "crescent": lambda x, y: np.maximum(_disc(1.0)(x, y), -_disc(0.66, 0.42)(x, y)),
    "arrow": _union(_box(0.75, 0.34), _path([(1.25, 0.0), (0.25, 0.85), (0.25, -0.85)])),
    "ell": _path([(-0.8, -0.8), (0.8, -0.8), (0.8, -0.16), (-0.16, -0.16), (-0.16, 0.8), (-0.8, 0.8)]),
    "zed": _path([(-1, 0.7), (-1, 0), (-0.35, 0), (-0.35, -0.7), (1, -0.7), (1, 0), (0.35, 0), (0.35, 0.7)]),
    "hourglass": _path([(-0.78, -0.9), (0.78, -0.9), (0.16, 0), (0.78, 0.9), (-0.78, 0.9), (-0.16, 0)]),
}
CLASSES: tuple[str, ...] = tuple(_SILHOUETTES)


def _blob(draw: Array) -> Sdf:
    phase_cos, phase_sin = _cos_sin(draw[:4])
    amplitudes = np.array([0.26, 0.04, 0.10, 0.08]) + np.array([0.14, 0.10, 0.08, 0.08]) * draw[4:8]

    def sdf(x: Array, y: Array) -> Array:
        r = np.sqrt(x * x + y * y) + 1e-9
        cos, sin, radius = x / r, y / r, 1.0
        cos_k, sin_k = cos, sin
        for k in range(4):  # harmonics 2 to 5
            cos_k, sin_k = cos_k * cos - sin_k * sin, sin_k * cos + cos_k * sin
            radius = radius + amplitudes[k] * (cos_k * phase_cos[k] - sin_k * phase_sin[k])
        return r - 0.7 * radius

    return sdf


def _rock(draw: Array) -> Sdf:
    radii, flatten = 0.75 + 0.35 * draw[9:18], 0.38 + 0.16 * draw[18]
    return _path(_around((np.arange(9) + 0.7 * draw[:9]) / 9.0, radii, flatten))


def _stroke(draw: Array) -> Sdf:
    if draw[20] < 0.5:
        x = np.arange(-12, 13) / 12.0
        y = (0.15 + 0.25 * draw[2]) * _cos_sin((0.5 + 0.6 * draw[0]) * x + draw[1])[1]
    else:
        x = -0.95 + 1.9 * (np.arange(7) + 0.5 * draw[:7]) / 6.5
        y = (0.18 + 0.22 * draw[7:14]) * np.where(np.arange(7) % 2 == 0, 1.0, -1.0)
    return _path(list(zip(x.tolist(), y.tolist(), strict=True)), 0.07 + 0.06 * float(draw[14]))


def _dashes(draw: Array) -> Sdf:
    rows = 3 + int(draw[0] * 3)
    step = 1.1 / (rows - 1)
    ends = [(-0.9 + 0.5 * draw[2 + i], 0.9 - 0.5 * draw[8 + i], -0.55 + i * step) for i in range(rows)]
    return _union(*(_path([(a, y), (b, y)], 0.26 * step) for a, b, y in ends))


# Shapes of the 30 distractors; none resembles a class silhouette.
_CLUTTER = (_blob, _rock, _stroke, _blob, _stroke, _dashes) * 5


@dataclass(frozen=True)
class _Bank:
    """Square lookup tables: stamps (silhouettes) hold distances in units of sqrt(area), textures hold tones."""

    values: Array  # float32 [n_tables * cells * cells]
    cells: int  # side of a table
    reach: Array | None = None  # stamps: float64 [n_tables], distance from centroid to tip


def _grid(cells: int, half: float) -> tuple[Array, Array]:
    """Return x and y of the cells of a [-half, half]^2 table, float64 [cells, cells]."""
    centres = (np.arange(cells) + 0.5) * (2.0 * half / cells) - half
    return np.broadcast_to(centres, (cells, cells)), np.broadcast_to(centres[:, None], (cells, cells))


def _stamp_bank(silhouettes: Sequence[Sdf], cells: int) -> _Bank:
    """Return distance tables of silhouettes moved to their centroid and scaled to unit area."""
    half, cell, tables, reach = 1.25, 2.5 / 256, [], []  # a coarse grid finds area and centroid
    x, y = _grid(256, half)

    def tilted(sdf: Sdf, x: Array, y: Array) -> Array:  # an edge parallel to the grid would snap to its cells
        return sdf(0.96 * x - 0.28 * y, 0.28 * x + 0.96 * y)

    for sdf in silhouettes:
        weights = np.rint(256.0 * np.clip(0.5 - tilted(sdf, x, y) / cell, 0.0, 1.0)).astype(np.int64)
        rows, columns = np.nonzero(weights)  # coverage in 1/256: sums of integers are exact in any order
        share, total = weights[rows, columns], int(weights.sum())
        cx, cy = ((int((k * share).sum()) / total + 0.5) * cell - half for k in (columns, rows))
        unit = float(np.sqrt(total * cell * cell / 256.0))
        dx, dy = x[rows, columns] - cx, y[rows, columns] - cy
        reach.append((float(np.sqrt((dx * dx + dy * dy).max())) + cell) / unit)
        u, v = _grid(cells, _TABLE_MARGIN * reach[-1])
        table = tilted(sdf, cx + unit * u, cy + unit * v) / unit
        table[[0, -1], :] = table[:, [0, -1]] = 1e3  # clamped lookups stay outside
        tables.append(table.astype(np.float32))
    return _Bank(np.stack(tables).ravel(), cells, np.array(reach))


def _lattice_noise(cells: int, frequency: int, stream: int) -> Array:
    knots = 2.0 * _uniforms(0, stream, np.arange(frequency), frequency) - 1.0
    low = np.arange(cells) * frequency // cells
    t = np.arange(cells) * (frequency / cells) - low
    t = t * t * (3.0 - 2.0 * t)
    high = (low + 1) % frequency
    rows = knots[low] + t[:, None] * (knots[high] - knots[low])
    return rows[:, low] + t * (rows[:, high] - rows[:, low])


def _mosaic(cells: int, n_points: int, stream: int) -> tuple[Array, Array]:
    points = _uniforms(0, stream, np.arange(n_points), 3)
    dx, dy = (np.abs(z + 0.5 - points[:, k, None, None]) for k, z in enumerate(_grid(cells, 0.5)))
    dx, dy = np.minimum(dx, 1.0 - dx), np.minimum(dy, 1.0 - dy)
    distance = np.sqrt(dx * dx + dy * dy)
    first, second = np.partition(distance, 1, axis=0)[:2]
    return second - first, 2.0 * points[distance.argmin(axis=0), 2] - 1.0


def _texture_bank(cells: int) -> _Bank:
    x, y = _grid(cells, 0.5)
    noise = functools.partial(_lattice_noise, cells)
    cloud = noise(4, 201) + 0.5 * noise(8, 202) + 0.3 * noise(20, 203)
    cracks, tiles = _mosaic(cells, 28, 208)
    row = np.floor(6.0 * y)
    brick_x, brick_y = 3.0 * x + 0.5 * (row - 2.0 * np.floor(0.5 * row)), 6.0 * y - row
    gap_x, gap_y = 0.5 - np.abs(brick_x - np.floor(brick_x) - 0.5), 0.25 - 0.5 * np.abs(brick_y - 0.5)
    bricks, zigzag = 24.0 * np.minimum(gap_x, gap_y) - 1.5, 1.4 * np.abs(3.0 * x - np.floor(3.0 * x) - 0.5)

    def wave(turns: Array, hardness: float) -> Array:
        return np.clip(hardness * _cos_sin(turns)[1], -1.0, 1.0)

    tones = [noise(3, 204) + 0.4 * noise(6, 205), cloud, 0.8 * noise(32, 206) + 0.5 * noise(64, 207)]
    tones += [3.0 * noise(9, 209), tiles, 60.0 * cracks - 2.0, bricks, wave(8.0 * y, 1.3), wave(5.0 * y, 4.0)]
    tones += [4.0 * wave(4.0 * x, 1.0) * wave(4.0 * y, 1.0), wave(6.0 * y + zigzag, 2.0)]
    tones += [wave(3.0 * y + 0.7 * cloud, 1.4)]
    return _Bank(np.clip(np.stack(tones), -1.0, 1.0).astype(np.float32).ravel(), cells)


@dataclass(frozen=True)
class _Tables:
    objects: _Bank
    clutter: _Bank
    textures: _Bank
    grain: Array  # float32 [2 S, 2 S], white noise in [-1, 1); each image adds one S x S window


@functools.cache
def _tables(size: int) -> _Tables:
    objects = _stamp_bank(list(_SILHOUETTES.values()), min(max(3 * size, 96), 384))
    draws = _uniforms(0, 110, np.arange(len(_CLUTTER)), 32)
    clutter = [make(draw) for make, draw in zip(_CLUTTER, draws, strict=True)]
    grain = 2.0 * _uniforms(0, 301, np.arange(2 * size), 2 * size) - 1.0
    textures = _texture_bank(128 if size <= 64 else 256)
    return _Tables(objects, _stamp_bank(clutter, min(max(size, 64), 128)), textures, grain.astype(np.float32))


@dataclass(frozen=True)
class _Layers:
    """Batch of layers, one per row: silhouettes filled with a texture of two colours.

    A frame (cx, cy, a, b, c, d) maps image points to table cells, counted from the table's centre:
    u = a (x - cx) + b (y - cy), v = c (x - cx) + d (y - cy).
    """

    stamp: Array  # int64 [n]: index of the silhouette
    stamp_frame: Array  # [n, 6]
    unit: Array  # [n]: sqrt(silhouette area), fraction of the image's side
    edge: Array  # [n]: inverse width of a soft edge; the minimum width is one pixel
    opacity: Array  # [n]: 0 = absent
    texture: Array  # int64 [n]: index of the texture
    texture_frame: Array  # [n, 6]
    colour: Array  # [n, 3], 0..255
    tone: Array  # [n, 3]: colour added by a texture value of 1

    def __getitem__(self, rows: slice | Array) -> "_Layers":
        return _Layers(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class _Scene:
    ground: _Layers  # 2 rows per image; the stamps of the second are textures
    behind: _Layers  # _N_BEHIND rows per image
    item: _Layers  # the object, one row per image; `stamp` is the label
    front: _Layers  # _N_FRONT rows per image
    light: Array  # [n, 5]: brightness slopes along x and y, strength of the grain and corner of its window


def _rgb(luma: Array, chroma: Array, hue: Array) -> Array:
    cos, sin = _cos_sin(hue)
    red, cross = 0.8165 * chroma * cos, 0.7071 * chroma * sin
    return 255.0 * np.stack([luma + red, luma - 0.5 * red + cross, luma - 0.5 * red - cross], axis=-1)


def _frames(draw: _Draws, count: int, scale: Array, cx: Array, cy: Array, turns: float = 0.5) -> Array:
    """Draw frames: rotation R by up to `turns`, stretch and shear K, reflection F; cells = scale (RKF)^-1 offset."""
    cos, sin = _cos_sin(draw(-turns, turns, count))
    stretch, shear = draw(1.0 / _ASPECT, _ASPECT, count), draw(-_SHEAR, _SHEAR, count)
    flip = np.where(draw(-1.0, 1.0, count) < 0.0, -scale, scale)
    a, b = flip * (cos / stretch + sin * shear), flip * (sin / stretch - cos * shear)
    return np.stack([cx, cy, a, b, -scale * stretch * sin, scale * stretch * cos], axis=-1)


def _texture_frames(draw: _Draws, count: int, bank: _Bank) -> Array:
    scale = bank.cells * draw(*_TEXTURE_REPEATS, count)
    return _frames(draw, count, scale, draw(-1.0, 1.0, count), draw(-1.0, 1.0, count))


def _layers(draw, tables, stamp, frame, unit, colour, tone, edge=MAX_IMAGE_SIZE, opacity=1.0) -> _Layers:
    """Return layers with the given properties and random textures."""
    count, like = len(stamp) // max(1, draw.n_images), np.ones_like(unit)
    texture, texture_frame = draw.choice(_N_TEXTURES, count), _texture_frames(draw, count, tables.textures)
    return _Layers(stamp, frame, unit, like * edge, like * opacity, texture, texture_frame, colour, tone)


def _draw_ground(draw: _Draws, tables: _Tables, luma: Array, hue: Array) -> _Layers:
    luma, hue = np.repeat(luma, 2), np.repeat(hue, 2)
    stamp, frame, slope = draw.choice(2, 2), _texture_frames(draw, 2, tables.textures), draw(1.0, 12.0, 2)
    colour = _rgb(luma + draw(-0.1, 0.1, 2), draw(0.0, 0.12, 2), hue + draw(-0.12, 0.12, 2))
    tone = _rgb(draw(-0.17, 0.17, 2), draw(0.0, 0.08, 2), draw(0.0, 1.0, 2))
    return _layers(draw, tables, stamp, frame, slope, colour, tone, edge=1.0)


def _draw_item(draw: _Draws, tables: _Tables, label: Array, luma: Array, hue: Array) -> _Layers:
    """Draw the object inside the image, with brightness and hue unlike the background; `stamp` is the label."""
    bank = tables.objects
    unit = np.sqrt(draw(*_AREA))
    margin = _REACH * _STRETCH * unit
    cx, cy = margin + (1.0 - 2.0 * margin) * draw(0.0, 1.0), margin + (1.0 - 2.0 * margin) * draw(0.0, 1.0)
    contrast = np.where(draw(0.2, 0.8) < luma, -1.0, 1.0) * draw(0.17, 0.42)
    colour = _rgb(luma + contrast, draw(0.24, 0.46), hue + draw(0.2, 0.8))
    tone = _rgb(draw(-0.12, 0.12), draw(0.0, 0.12), draw(0.0, 1.0))
    frame = _frames(draw, 1, bank.cells / (2.0 * _TABLE_MARGIN * bank.reach[label] * unit), cx, cy, _TURNS)
    return _layers(draw, tables, label, frame, unit, colour, tone)


def _draw_clutter(draw: _Draws, tables: _Tables, item: _Layers, count: int, in_front: bool) -> _Layers:
    """Draw `count` distractors per image, behind the object or in front of it.

    Distractors in front hide at most _N_FRONT * _FRONT_AREA[1] of the object. Their offsets fill a disc that contains
    every class silhouette, so the expected hidden area is the same for every class.
    """
    bank = tables.clutter
    stamp = draw.choice(len(_CLUTTER), count)
    reach = _STRETCH * bank.reach[stamp]
    if in_front:
        of = np.repeat(item.unit, count)
        unit = np.minimum(of * np.sqrt(draw(*_FRONT_AREA, count)), _FRONT_RADIUS / reach)
        cos, sin = _cos_sin(draw(0.0, 1.0, count))
        offset = 1.1 * of * np.sqrt(draw(0.0, 1.0, count))
        cx = np.repeat(item.stamp_frame[:, 0], count) + offset * cos
        cy = np.repeat(item.stamp_frame[:, 1], count) + offset * sin
    else:
        unit = draw(*_BEHIND_RADIUS, count) / reach
        cx, cy = draw(0.0, 1.0, count), draw(0.0, 1.0, count)
    present = draw(0.0, 1.0, count) < (_FRONT_SHARE if in_front else _BEHIND_SHARE)
    opacity = np.where(present, draw(0.7, 1.0, count), 0.0)
    edge = np.where(draw(0.0, 1.0, count) < 0.25, draw(14.0, 40.0, count), MAX_IMAGE_SIZE)
    colour = _rgb(draw(0.1, 0.9, count), draw(0.0, 0.2, count), draw(0.0, 1.0, count))
    tone = _rgb(draw(-0.2, 0.2, count), draw(0.0, 0.1, count), draw(0.0, 1.0, count))
    frame = _frames(draw, count, bank.cells / (2.0 * _TABLE_MARGIN * bank.reach[stamp] * unit), cx, cy)
    return _layers(draw, tables, stamp, frame, unit, colour, tone, edge, opacity)


def _draw_scene(seed: int, split: str, indices: Array, tables: _Tables) -> _Scene:
    draw = _Draws(seed, SPLITS.index(split), indices)
    label, luma, hue = draw.choice(len(CLASSES)), draw(0.2, 0.8), draw(0.0, 1.0)
    ground, item = _draw_ground(draw, tables, luma, hue), _draw_item(draw, tables, label, luma, hue)
    behind = _draw_clutter(draw, tables, item, _N_BEHIND, in_front=False)
    front = _draw_clutter(draw, tables, item, _N_FRONT, in_front=True)
    light = [draw(low, high) for low, high in ((-50, 50), (-50, 50), (0, 14), (0, 1), (0, 1))]
    return _Scene(ground, behind, item, front, np.stack(light, axis=1))


def _look_up(bank: _Bank, which: Array, frames: Array, size: int, side: int, corner: Array | int) -> Array:
    """Read the table of each row, through its frame, at the pixels of a window: float32 [n, side, side].

    The window is side x side pixels of a size x size image, from `corner` ([n, 2], left and top). Addresses are exact
    16.16 fixed point. Textures (no reach) repeat; stamps are clamped at their border.
    """
    x, y = ((corner + 0.5) / size - frames[:, :2]).T
    a, b, c, d = frames[:, 2:].T
    steps = np.arange(side, dtype=np.int32)

    def address(along_x: Array, along_y: Array) -> Array:
        start = np.rint((along_x * x + along_y * y + 0.5 * bank.cells) * 65536.0).astype(np.int32)
        step_x, step_y = (np.rint(k * (65536.0 / size)).astype(np.int32) for k in (along_x, along_y))
        place = (start[:, None] + step_x[:, None] * steps)[:, None, :] + (step_y[:, None] * steps)[:, :, None]
        place >>= 16
        if bank.reach is None:
            place &= bank.cells - 1
        else:
            np.clip(place, 0, bank.cells - 1, out=place)
        return place

    index = address(c, d)
    index *= bank.cells
    index += address(a, b)
    index += (which * bank.cells**2).astype(np.int32)[:, None, None]
    return bank.values.take(index)


def _per_layer(values: Array) -> Array:
    return values.astype(np.float32)[..., None, None]


def _coverage(bank: _Bank, layers: _Layers, size: int, side: int, corner: Array | int = 0) -> Array:
    """Return opacity * clip(1/2 - distance in pixels, 0, 1), float32 [n, side, side]."""
    alpha = _look_up(bank, layers.stamp, layers.stamp_frame, size, side, corner)
    alpha *= _per_layer(-layers.unit * np.minimum(layers.edge, size))
    alpha += np.float32(0.5)
    np.clip(alpha, 0.0, 1.0, out=alpha)
    alpha *= _per_layer(layers.opacity)
    return alpha


def _filling(bank: _Bank, layers: _Layers, size: int, side: int, corner: Array | int = 0) -> Array:
    """Return colour + tone * texture, float32 [n, 3, side, side]."""
    texture = _look_up(bank, layers.texture, layers.texture_frame, size, side, corner)
    filling = texture[:, None] * _per_layer(layers.tone)
    filling += _per_layer(layers.colour)
    return filling


def _blend(image: Array, alpha: Array, over: Array) -> None:
    """Compute image += alpha (over - image) in place, [..., 3, side, side]; overwrites `over`."""
    over -= image
    over *= alpha
    image += over


def _render_clutter(image: Array, visible: Array, layers: _Layers, radius: float, tables: _Tables) -> None:
    """Render distractors, each in a window that contains `radius`, and clear `visible` under them."""
    size = image.shape[-1]
    side = min(size, int(2.0 * radius * size) + 3)
    present = layers.opacity > 0.0
    owner = np.repeat(np.arange(len(image)), len(present) // len(image))[present]
    layers = layers[present]
    corner = np.floor(layers.stamp_frame[:, :2] * size - 0.5 * side + 0.5)
    corner = corner.clip(0.0, size - side).astype(np.int64)
    alpha = _coverage(tables.clutter, layers, size, side, corner)
    over = _filling(tables.textures, layers, size, side, corner)
    for k, (i, (x, y)) in enumerate(zip(owner.tolist(), corner.tolist(), strict=True)):
        _blend(image[i, :, y : y + side, x : x + side], alpha[k], over[k])
        visible[i, y : y + side, x : x + side] &= alpha[k] < 0.5


def _render(scene: _Scene, rows: range, size: int, tables: _Tables) -> tuple[Array, Array]:
    """Render rows of a scene: images uint8 [n, 3, S, S], masks of the visible object bool [n, S, S]."""

    def part(layers: _Layers) -> _Layers:
        count = len(layers.stamp) // len(scene.item.stamp)
        return layers[rows.start * count : rows.stop * count]

    ground, item = part(scene.ground), part(scene.item)
    first, second, textures = ground[::2], ground[1::2], tables.textures
    image = _filling(textures, first, size, size)
    alpha = _coverage(textures, second, size, size)
    _blend(image, alpha[:, None], _filling(textures, second, size, size))
    _render_clutter(image, np.ones(alpha.shape, bool), part(scene.behind), _BEHIND_RADIUS[1], tables)
    alpha = _coverage(tables.objects, item, size, size)
    _blend(image, alpha[:, None], _filling(textures, item, size, size))
    visible = alpha >= 0.5
    _render_clutter(image, visible, part(scene.front), _FRONT_RADIUS, tables)
    ramp = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    light = scene.light[rows.start : rows.stop]
    slopes = _per_layer(light[:, :2])
    brightness = slopes[:, 0] * ramp + slopes[:, 1] * ramp[:, None] + np.float32(0.5)
    for k, (strength, x, y) in enumerate(light[:, 2:].tolist()):
        left, top = int(x * size), int(y * size)
        brightness[k] += np.float32(strength) * tables.grain[top : top + size, left : left + size]
    image += brightness[:, None]
    np.clip(image, 0.0, 255.0, out=image)
    return image.astype(np.uint8), visible


class ShapeScenes(torch.utils.data.Dataset):
    """Cluttered scenes with one object; the class is the object's silhouette, `CLASSES[label]`.

    An index gives the same image in every instance, batch, process and machine. Labels are uniform over the classes.
    At two image sizes, an index gives the same scene in two resolutions.

    Args:
        num_samples: Length of the dataset, at least 1.
        image_size: Side of the images in pixels, 16 to 512; silhouettes can be distinguished from 32 on.
        seed: 0 to 2**64 - 1; each seed gives another data set.
        split: "train" or "val", disjoint random streams of one seed.
        with_mask: Also return the mask of the visible object.

    Example:
        >>> image, label, mask = ShapeScenes(100, image_size=32, with_mask=True)[7]
        >>> image.shape, mask.shape, CLASSES[label]
        (torch.Size([3, 32, 32]), torch.Size([32, 32]), 'plus')
    """

    classes: tuple[str, ...] = CLASSES

    def __init__(
        self, num_samples: int, *, image_size: int = 64, seed: int = 0, split: str = "train", with_mask: bool = False
    ):
        self.num_samples = _checked("num_samples", num_samples, 1, 2**62)
        self.image_size = _checked("image_size", image_size, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE)
        self.seed = _checked("seed", seed, 0, 2**64 - 1)
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; pass one of {', '.join(map(repr, SPLITS))}")
        self.split, self.with_mask = split, bool(with_mask)
        _tables(self.image_size)  # built (and cached) here so that forked DataLoader workers share them

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple:
        """Return (image uint8 [3, S, S], label), and the object's mask, bool [S, S], if `with_mask`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple]:
        """Return `[self[i] for i in indices]`, rendered together, which is faster."""
        checked = [operator.index(index) for index in indices]
        for index in checked:
            if not 0 <= index < self.num_samples:
                raise IndexError(f"index {index} is out of range: pass 0 to {self.num_samples - 1}")
        tables = _tables(self.image_size)
        scene = _draw_scene(self.seed, self.split, np.array(checked, np.int64), tables)
        labels = scene.item.stamp.tolist()
        step = max(1, _CHUNK_PIXELS // self.image_size**2)
        items = []
        for start in range(0, len(checked), step):
            rows = range(start, min(start + step, len(checked)))
            images, masks = map(torch.from_numpy, _render(scene, rows, self.image_size, tables))
            parts = (images, labels[start : rows.stop], masks)
            items += zip(*(parts if self.with_mask else parts[:2]), strict=True)
        return items


def _checked(name: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, int | np.integer) or not low <= value <= high:
        raise UserError(f"{name} is {value!r}; pass an integer from {low} to {high}")
    return int(value)
