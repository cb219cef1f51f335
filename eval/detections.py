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

from crate_fast.eval.coco import as_one_category, index_of, require_objects

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
        coco: pycocotools' `COCO` with the ground truth; ids and categories may be any.
        detections: COCO results; their categories do not count.
        image_ids: Images evaluated; those without detections count as missed.

    Returns:
        "bbox" and "segm", each with AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm and ARl from 0 to 1;
        −1, as pycocotools says, where there is no object of that size.

    Raises:
        UserError: None of the images has an annotated object, or an annotation lacks what it needs.
    """
    from pycocotools.cocoeval import COCOeval

    image_ids = sorted(set(image_ids))
    require_objects(coco, image_ids)
    truth = as_one_category(coco, image_ids)
    numbers = {image_id: number for number, image_id in enumerate(image_ids, start=1)}
    ordered = sorted((d for d in detections if d["image_id"] in numbers), key=lambda d: numbers[d["image_id"]])
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    scores = {}
    with redirect_stdout(io.StringIO()):  # pycocotools prints what is returned here
        for kind in ("bbox", "segm"):
            field = "bbox" if kind == "bbox" else "segmentation"
            entries = [
                {"image_id": numbers[d["image_id"]], "category_id": 1, "score": d["score"], field: d[field]}
                for d in ordered
            ]
            found = truth.loadRes(entries) if entries else index_of(truth.dataset["images"], [], [])
            evaluation = COCOeval(truth, found, kind)
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
