"""Answers to what the page asks, as plain JSON values; the page and the tests see the same."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import matplotlib
import numpy as np

from crate_fast.eval.explore.inspection import Inspection, inspect
from crate_fast.eval.explore.offers import OpenModel, Shelf
from crate_fast.eval.explore.pictures import LARGEST_UPLOAD, Pictures

__all__ = ["Desk"]

_KEPT_BYTES = 512 * 2**20
_COLOURS = "viridis"  # even in lightness, and for the colour-blind


class Desk:
    """Pictures and models, and what was computed of them lately. Safe to use from many threads; it knows no visitors.

    Args:
        shelf: The models.
        note: What the page says of them.
        pictures: The pictures.
    """

    def __init__(self, shelf: Shelf, note: str, pictures: Pictures):
        self.shelf, self.note, self.pictures = shelf, note, pictures
        self._kept: OrderedDict[tuple[int, str], _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def setup(self) -> dict:
        """What the page starts with: models, pictures, notes, the colours of maps, the most bytes of an upload."""
        offers = [
            {"label": offer.label, "group": offer.group, "untrained": offer.untrained} for offer in self.shelf.offers
        ]
        colours = (255 * matplotlib.colormaps[_COLOURS](range(256))[:, :3]).round().astype(int)
        return {
            "models": offers,
            "model_note": self.note,
            "pictures": self.pictures.listing(),
            "picture_note": self.pictures.note,
            "colours": colours.tolist(),
            "largest_upload": LARGEST_UPLOAD,
        }

    def summary(self, model: int, picture: str) -> dict:
        """What is known of a model and a picture as a whole.

        Args:
            model: Number of the offer.
            picture: Id of the picture.

        Returns:
            "grid", "depth", "heads", "layer" (that the paper looks at), "has_cls", "image_size", "parameters",
            "coding_rate" and "sparsity", of each layer or None; "patch_sparsity" [L][P] or None; "top",
            classes with "class", "name" and "probability", or None.
        """
        return self._about(model, picture).summary

    def attention(self, model: int, picture: str, layer: int, patch: int | None) -> dict:
        """Attention of a patch, or of CLS when it is None, in all heads of a layer: "heads" [H][P]."""
        found = self._about(model, picture).found
        return {"heads": _numbers(found.attention(layer, patch))}

    def components(self, model: int, picture: str, which: str) -> dict:
        """Principal components as colours: "layers" [L][3·P] of 0 to 255, None where there are none."""
        found = self._about(model, picture).found
        return {
            "layers": [None if colours is None else colours.ravel().tolist() for colours in found.components(which)]
        }

    def masks(self, model: int, picture: str, layer: int) -> dict:
        """MaskCut's objects: "masks" [n][P] of 0 and 1; "boxes" [n] as [left, top, right, bottom] in patches."""
        found = self._about(model, picture).found
        masks = found.masks(layer)
        return {"masks": [mask.ravel().astype(int).tolist() for mask in masks], "boxes": [_box(m) for m in masks]}

    def _about(self, model: int, picture: str) -> "_Kept":
        """What was computed, without waiting for a model that is at work, or opened, for somebody else."""
        key = (model, picture)
        kept = self._recall(key)
        if kept is not None:
            return kept
        opened = self.shelf.get(model)
        with opened.lock:
            kept = self._recall(key)
            if kept is not None:
                return kept
            size = opened.subject.extract.image_size[0]
            found = inspect(opened.subject, self.pictures.pixels(picture, size))
            kept = _Kept(found, _summary(opened, found))
            with self._lock:
                self._kept[key] = kept
                while sum(each.found.bytes for each in self._kept.values()) > _KEPT_BYTES and len(self._kept) > 1:
                    self._kept.popitem(last=False)
        return kept

    def _recall(self, key: tuple[int, str]) -> "_Kept | None":
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)


@dataclass(frozen=True)
class _Kept:
    """Of one model and one picture."""

    found: Inspection
    summary: dict


def _summary(opened: OpenModel, found: Inspection) -> dict:
    extract = opened.subject.extract
    return {
        "grid": list(found.features.grid),
        "depth": extract.depth,
        "heads": extract.heads,
        "layer": extract.default_layer,
        "has_cls": extract.has_cls,
        "image_size": extract.image_size[0],
        "parameters": opened.subject.facts["parameters"],
        "coding_rate": found.coding_rate,
        "sparsity": found.mean_sparsity,
        "patch_sparsity": None if found.sparsity is None else _numbers(found.sparsity),
        "top": _named(found.top, opened.classes),
    }


def _numbers(array: np.ndarray) -> list:
    return array.astype(np.float64).round(9).tolist()


def _box(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _named(top: list[tuple[int, float]] | None, classes: list[str] | None) -> list[dict] | None:
    if top is None:
        return None
    known = classes or []
    return [
        {"class": number, "name": known[number] if number < len(known) else f"class {number}", "probability": share}
        for number, share in top
    ]
