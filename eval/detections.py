"""Masks as COCO detections, and their class-agnostic AP and AR.

All detections have category 1 and score 1. With equal scores pycocotools ranks them in the order of image ids and,
within an image, of the list; both are fixed here, so AP is reproducible, but another order would give another AP (AR
would stay). Report AR@100 beside it.
"""

import io
import itertools
from collections.abc import Sequence
from contextlib import redirect_stdout

import numpy as np
from PIL import Image

from crate_fast.errors import UserError

__all__ = ["class_agnostic_scores", "detections_of", "enlarge", "paint_detections"]

_COLOURS = ((230, 60, 50), (60, 130, 230), (60, 180, 80), (240, 180, 40), (160, 90, 210), (40, 190, 200))


def enlarge(masks: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Masks at another resolution: boolean [n, rows, columns] → [n, height, width], at least one half where blended.

    Args:
        masks: Of patches or pixels.
        size: Height and width.
        resample: NEAREST from patches to the squashed image, BICUBIC from there to the image's own size.
    """
    height, width = size
    full = np.zeros((len(masks), height, width), bool)
    for out, mask in zip(full, masks, strict=True):
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        out[:] = np.asarray(picture.resize((width, height), resample)) >= 128
    return full


def detections_of(masks: np.ndarray, image_id: int | str) -> list[dict]:
    """COCO results of one image: boolean masks [n, H, W] → an entry for each that is not empty.

    An entry has "image_id", "category_id" 1, "segmentation" (compressed RLE), "bbox" [x, y, width, height] in pixels,
    tight around the mask, and "score" 1.
    """
    from pycocotools import mask as rle

    entries = []
    for mask in masks:
        if mask.any():
            code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": 1,
                    "segmentation": {"size": list(map(int, code["size"])), "counts": code["counts"].decode()},
                    "bbox": [float(side) for side in rle.toBbox(code)],
                    "score": 1.0,
                }
            )
    return entries


def class_agnostic_scores(coco, detections: Sequence[dict], image_ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """AP and AR of boxes and of masks, with all categories of the ground truth taken as one.

    Args:
        coco: pycocotools' `COCO` with the ground truth.
        detections: COCO results.
        image_ids: Images evaluated; those without detections count as missed.

    Returns:
        "bbox" and "segm", each with AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm and ARl from 0 to 1;
        −1, as pycocotools says, where there is no object of that size.

    Raises:
        UserError: None of the images has an annotated object.
    """
    from pycocotools.cocoeval import COCOeval

    image_ids = sorted(image_ids)
    if not any(not annotation.get("iscrowd") for i in image_ids for annotation in coco.imgToAnns[i]):
        raise UserError(f"none of the {len(image_ids)} images has an annotated object: AP would have no meaning")
    known = set(image_ids)
    ordered = sorted((d for d in detections if d["image_id"] in known), key=lambda d: d["image_id"])
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    scores = {}
    with redirect_stdout(io.StringIO()):  # pycocotools prints what is returned here
        for kind in ("bbox", "segm"):
            if not ordered:  # pycocotools takes no empty list of results
                scores[kind] = dict.fromkeys(names, 0.0)
                continue
            field = "bbox" if kind == "bbox" else "segmentation"
            entries = [{k: d[k] for k in ("image_id", "category_id", "score", field)} for d in ordered]
            evaluation = COCOeval(coco, coco.loadRes(entries), kind)
            evaluation.params.useCats = 0
            evaluation.params.imgIds = list(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores[kind] = dict(zip(names, map(float, evaluation.stats), strict=True))
    return scores


def paint_detections(picture: np.ndarray, detections: Sequence[dict]) -> np.ndarray:
    """An image with its detections over it, a colour each: uint8 [H, W, 3] → a new one."""
    from pycocotools import mask as rle

    painted = picture.astype(np.float32)
    line = max(1, min(picture.shape[:2]) // 150)
    for entry, colour in zip(detections, itertools.cycle(_COLOURS), strict=False):
        mask = rle.decode(entry["segmentation"]).astype(bool)
        painted[mask] = 0.45 * painted[mask] + 0.55 * np.float32(colour)
        x, y, width, height = map(int, entry["bbox"])
        for rows, columns in (
            (slice(y, y + line), slice(x, x + width)),
            (slice(y + height - line, y + height), slice(x, x + width)),
            (slice(y, y + height), slice(x, x + line)),
            (slice(y, y + height), slice(x + width - line, x + width)),
        ):
            painted[rows, columns] = colour
    return painted.round().astype(np.uint8)
