"""Images of a folder with annotated boxes, from COCO-format JSON (masks are optional) or ImageNet and VOC XML."""

import itertools
from collections import Counter
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
import torch

from crate_fast.errors import UserError
from crate_fast.eval.common.coco import coco_content, finite
from crate_fast.eval.common.images import ImageFiles, Target, with_area

_Entry = tuple[tuple[int, int] | None, list[list[float]]]  # height and width or None; boxes: left, top, right, bottom
_RATIO = 0.02  # tolerated relative difference of aspect ratios; above it, the image is no resized copy


def covered(boxes: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the mask of the grid cells whose centre lies in a box, boolean [rows, columns].

    `boxes` [M, 4] are left, top, right, bottom as fractions of the image's sides.
    """
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    inside_x = (x >= boxes[:, :1]) & (x < boxes[:, 2:3])
    inside_y = (y >= boxes[:, 1:2]) & (y < boxes[:, 3:])
    return (inside_y[:, :, None] & inside_x[:, None, :]).any(axis=0)


class BoxedImages(ImageFiles):
    """Images of a folder with boxes; an image without an annotation has no boxes.

    `boxes` is a JSON file with file names relative to `root`, or a folder that is searched for XML files with the
    names of the images. The folders may be left out of a name that is unique among images and annotations.
    """

    has_instances = True

    def __init__(self, root: Path, size: int, boxes: Path, limit: int | None = None):
        super().__init__(root, size)
        if not boxes.exists():
            raise UserError(f"--boxes {boxes}: no such file or folder")
        entries = _read_folder(boxes) if boxes.is_dir() else _read_json(boxes)
        short = Counter(name for key, _ in self.items for name in {PurePosixPath(key).name, PurePosixPath(key).stem})
        self.items, self._entries = self.items[:limit], {}
        for key, _ in self.items:
            path = PurePosixPath(key)
            names = [str(path), str(path.with_suffix("")), *(n for n in (path.name, path.stem) if short[n] == 1)]
            found = [entries[name] for name in names if name in entries]
            if found:
                self._entries[key] = found[0]
        if not self._entries:
            raise UserError(
                f"--boxes {boxes} names none of the {len(self.items)} images of {root}: it has "
                f"{next(iter(entries), 'no image')!r}, the folder has {self.items[0][0]!r}; "
                "use names relative to the folder"
            )

    def annotated_size(self, key: str | int) -> tuple[int, int] | None:
        return self._entries.get(key, (None, []))[0]

    def target(self, key: str | int, size: tuple[int, int]) -> Target:
        height, width = size
        annotated, boxes = self._entries.get(key, (None, []))
        rows, columns = annotated or size
        if abs(height * columns / (width * rows) - 1) > _RATIO:
            raise UserError(f"the annotated size is {annotated}, the image has {size}")
        corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) * torch.tensor(
            [width / columns, height / rows, width / columns, height / rows], dtype=torch.float64
        )
        corners = corners.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
        empty = torch.zeros(0, *size, dtype=torch.bool)
        return Target([], empty, torch.ones(size, dtype=torch.bool), with_area(corners))


def _read_json(path: Path) -> dict[str, _Entry]:
    """Return image name → (height and width or None, boxes: left, top, right, bottom)."""
    content = coco_content(path)
    boxes: dict[int | str, list] = {}
    entries = []
    for image in content["images"]:
        name, found = image["file_name"].replace("\\", "/"), boxes.setdefault(image["id"], [])
        entries.append((str(PurePosixPath(name)), (_size(image.get("height"), image.get("width")), found)))
    for number, annotation in enumerate(content["annotations"]):
        where = f"--boxes {path}: annotations[{number}]"
        box, image_id = annotation.get("bbox"), annotation.get("image_id")
        if not isinstance(box, list) or len(box) != 4 or not finite(box) or min(box[2:]) < 0:
            raise UserError(f"{where} has the bbox {box!r}, not [x, y, width, height]; correct the file")
        if image_id in boxes and not annotation.get("iscrowd"):
            x, y, width, height = box
            boxes[image_id].append([x, y, x + width, y + height])
    return _by_name(entries, path)


def _size(height: object, width: object) -> tuple[int, int] | None:
    return (int(height), int(width)) if finite([height, width]) and min(height, width) > 0 else None


def _read_folder(folder: Path) -> dict[str, _Entry]:
    """Return the same as `_read_json` from XML files, with a box's first and last pixels counted from 0.

    VOC counts from 1, so its boxes lie one pixel too far right and down.
    """
    entries = []
    for path in sorted(folder.rglob("*.xml")):
        try:
            root = ElementTree.parse(path).getroot()
            width, height = (int(root.findtext(f"size/{side}")) for side in ("width", "height"))
            boxes = [
                [float(box.findtext(edge)) for edge in ("xmin", "ymin", "xmax", "ymax")]
                for box in root.iterfind("object/bndbox")
            ]
            if not finite([*itertools.chain(*boxes)]):
                raise ValueError("a corner is not finite")
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise UserError(
                f"--boxes: {path} is not an annotation in ImageNet's or VOC's format ({error}); remove it"
            ) from error
        name = path.relative_to(folder).with_suffix("").as_posix()
        entries.append((name, (_size(height, width), [[a, b, c + 1, d + 1] for a, b, c, d in boxes])))
    return _by_name(entries, folder)


def _by_name(entries: list[tuple[str, _Entry]], path: Path) -> dict[str, _Entry]:
    """Index entries by name, and by the name without folders where that is unique."""
    named = dict(entries)
    if len(named) < len(entries):
        twice = next(name for name, count in Counter(name for name, _ in entries).items() if count > 1)
        raise UserError(f"--boxes {path} has two entries for the image {twice!r}: join them")
    short = Counter(PurePosixPath(name).name for name, _ in entries)
    unique = {PurePosixPath(n).name: e for n, e in entries if short[PurePosixPath(n).name] == 1}
    return named | {name: entry for name, entry in unique.items() if name not in named}
