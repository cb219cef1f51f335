"""Images of a folder with annotated boxes: COCO-format JSON, without masks too, or XML files of ImageNet and VOC."""

import json
import math
from collections import Counter
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
import torch

from crate_fast.errors import UserError
from crate_fast.eval.common.images import ImageFiles, Target

__all__ = ["BoxedImages", "covered"]

_Entry = tuple[tuple[int, int] | None, list[list[float]]]  # height and width or None; boxes: left, top, right, bottom
_RATIO = 0.02  # sides that differ by more are not those of a resized copy


def covered(boxes: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return which cells of a grid have their centre in one of the boxes, boolean [rows, columns].

    `boxes` [M, 4] are left, top, right, bottom in shares of the image's sides.
    """
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    inside_x = (x >= boxes[:, :1]) & (x < boxes[:, 2:3])
    inside_y = (y >= boxes[:, 1:2]) & (y < boxes[:, 3:])
    return (inside_y[:, :, None] & inside_x[:, None, :]).any(axis=0)


class BoxedImages(ImageFiles):
    """Images of a folder with boxes; images that the annotations do not name have none.

    Args:
        boxes: A JSON file, whose file names are relative to `root` or unique; or a folder of XML files, which are
            searched for below it and named as their images.
        limit: Take the first images only; all when None. For `root` and `size` see `ImageFiles`.

    Raises:
        UserError: The annotations are missing, damaged, or name none of the images.
    """

    has_instances = True

    def __init__(self, root: Path, size: int, boxes: Path, limit: int | None = None):
        super().__init__(root, size)
        if not boxes.exists():
            raise UserError(f"--boxes {boxes}: no such file or folder")
        self._entries = _read_folder(boxes) if boxes.is_dir() else _read_json(boxes)
        self.items = self.items[:limit]
        if not any(self._entry(key) for key, _ in self.items):
            raise UserError(
                f"--boxes {boxes} names none of the {len(self.items)} images of {root}: it has "
                f"{next(iter(self._entries), 'no image')!r}, the folder {self.items[0][0]!r}"
            )

    def _entry(self, key: str | int) -> _Entry | None:
        path = PurePosixPath(str(key))
        return next((self._entries[n] for n in (str(path), path.name, path.stem) if n in self._entries), None)

    def annotated_size(self, key: str | int) -> tuple[int, int] | None:
        entry = self._entry(key)
        return entry[0] if entry else None

    def target(self, key: str | int, size: tuple[int, int]) -> Target:
        height, width = size
        annotated, boxes = self._entry(key) or (None, [])
        rows, columns = annotated or size
        if abs(height * columns / (width * rows) - 1) > _RATIO:
            raise UserError(f"the annotations say {annotated}, the image is {size}")
        corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) * torch.tensor(
            [width / columns, height / rows, width / columns, height / rows], dtype=torch.float64
        )
        corners = corners.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
        visible = (corners[:, 2:] > corners[:, :2]).all(dim=1)
        empty = torch.zeros(0, *size, dtype=torch.bool)
        return Target([], empty, torch.ones(size, dtype=torch.bool), corners[visible])


def _read_json(path: Path) -> dict[str, _Entry]:
    try:
        content = json.loads(path.read_bytes())
        names = {image["id"]: image["file_name"].replace("\\", "/") for image in content["images"]}
        entries = {image["id"]: (_known_size(image), []) for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = map(_finite, annotation["bbox"])
            if annotation.get("image_id") in entries and not annotation.get("iscrowd"):
                entries[annotation["image_id"]][1].append([x, y, x + width, y + height])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--boxes {path} is not JSON of COCO's format ({type(error).__name__}: {error}): it needs 'images' with "
            "'id' and 'file_name', and 'annotations' with 'image_id' and 'bbox', [x, y, width, height]"
        ) from error
    return _by_name([(names[number], entry) for number, entry in entries.items()])


def _known_size(image: dict) -> tuple[int, int] | None:
    sides = (image.get("height"), image.get("width"))
    return sides if all(isinstance(side, int) and side > 0 for side in sides) else None


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a bbox holds {value}")
    return value


def _read_folder(folder: Path) -> dict[str, _Entry]:
    """Read XML files, whose corners are pixels inside the box, counted from 0."""
    entries = []
    for path in sorted(folder.rglob("*.xml")):
        try:
            root = ElementTree.parse(path).getroot()
            width, height = (int(root.findtext(f"size/{side}")) for side in ("width", "height"))
            boxes = [
                [float(box.findtext(edge)) for edge in ("xmin", "ymin", "xmax", "ymax")]
                for box in root.iterfind("object/bndbox")
            ]
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise UserError(
                f"--boxes: {path} is not an annotation of ImageNet's or VOC's format ({error}); remove it"
            ) from error
        entries.append((path.stem, ((height, width), [[a, b, c + 1, d + 1] for a, b, c, d in boxes])))
    if not entries:
        raise UserError(f"--boxes {folder} holds no XML file: give the folder of ImageNet's annotations")
    return _by_name(entries)


def _by_name(entries: list[tuple[str, _Entry]]) -> dict[str, _Entry]:
    """Index entries by name, and by the name without folders where that is unique."""
    named = dict(entries)
    short = Counter(PurePosixPath(name).name for name, _ in entries)
    return {PurePosixPath(n).name: e for n, e in entries if short[PurePosixPath(n).name] == 1} | named
