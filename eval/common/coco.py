"""COCO annotations and detections: checked annotation files, masks as detections, class-agnostic AP and AR.

All detections have category 1 and score 1. pycocotools ranks equal scores by image id, then in list order. Both are
fixed here, so AP is reproducible. Another order would change AP but not AR, so report AR@100 too.
"""

import io
import json
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image

from crate_fast.errors import UserError

_MAX_COORDINATE = 1_000_000  # pixels; memory and time of pycocotools grow with it, and at 10⁸ it crashes


def read_annotations(path: Path):
    """Open a file of COCO instance annotations as pycocotools' index `COCO`.

    Missing values are filled in: iscrowd (0), area and bbox (from the mask), and a category's name (its number). A
    value that pycocotools would misread without an error is a `UserError`. Annotations of unlisted images are left
    out, as in pycocotools.
    """
    content = coco_content(path)
    images, where = index_of(content["images"], [], []), "categories"
    annotations = []
    try:
        for category in content["categories"]:
            category["name"] = str(category.get("name", category["id"]))
        for number, annotation in enumerate(content["annotations"]):
            where = f"annotations[{number}]"
            if annotation["image_id"] in images.imgs:
                where = f"annotation {annotation['id']!r}"
                _complete(annotation, images)
                annotations.append(annotation)
        return index_of(content["images"], annotations, content["categories"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: {where} cannot be used, {reason}; correct the file") from error


def coco_content(path: Path) -> dict[str, list[dict]]:
    """Read the lists "images", "annotations" and "categories" of a file in COCO format; the last may be missing."""
    try:
        content = json.loads(path.read_bytes())
        content.setdefault("categories", [])
        names = {image["id"]: image["file_name"] for image in content["images"]}
        if not names or len(names) < len(content["images"]):
            raise ValueError("it lists no images, or two with the same id")
        if not all(names.values()) or set(map(type, names.values())) != {str}:
            raise ValueError("a file_name is empty or not a string")
        kinds = set(map(type, names))
        if kinds not in ({int}, {str}):
            raise ValueError("the ids of images must be integers or all strings")
        # 7 and "7" are different ids, and pycocotools leaves out annotations of unlisted images
        for number, annotation in enumerate(content["annotations"]):
            if not isinstance(annotation, dict) or {type(annotation.get("image_id"))} != kinds:
                found = f"{annotation!r} has no image_id of the type of the images' ids"
                raise ValueError(f"annotations[{number}] cannot be used, {found[:200]}")
    except (OSError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not hold COCO's annotations ({type(error).__name__}: {error}): use a file with images, "
            "annotations and categories, such as instances_val2017.json"
        ) from error
    return content


def index_of(images: list[dict], annotations: list[dict], categories: list[dict]):
    """Return pycocotools' index `COCO` of entries in memory."""
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with redirect_stdout(io.StringIO()):  # it prints its progress
        index.createIndex()
    return index


def require_objects(coco, image_ids: Sequence) -> None:
    """Raise a `UserError` if the images have no object, since AP is then undefined."""
    if not any(not annotation.get("iscrowd") for i in image_ids for annotation in coco.imgToAnns.get(i, ())):
        raise UserError(
            f"none of the {len(image_ids)} images has an annotated object, so AP is undefined: use more images "
            "(--limit), or folder:PATH for detections without AP"
        )


def _complete(annotation: dict, images) -> None:
    """Check an annotation and fill in its missing values; `images` is the index of the file's images."""
    from pycocotools import mask as rle

    size = [images.imgs[annotation["image_id"]][side] for side in ("height", "width")]
    if set(map(type, size)) != {int} or min(size) < 1:
        raise ValueError(f"its image has the height and width {size}, not two numbers of pixels")
    annotation["segmentation"] = _checked_mask(annotation["segmentation"], size)
    annotation["iscrowd"] = annotation.get("iscrowd") or 0
    if annotation["iscrowd"] not in (0, 1):
        raise ValueError(f"iscrowd is {annotation['iscrowd']!r}, not 0 or 1")
    if not annotation.get("bbox") or 0 in annotation["bbox"][2:]:  # COCO's train2017 has a box of height 0
        annotation["bbox"] = rle.toBbox(images.annToRLE(annotation)).tolist()
    if annotation.get("area") is None:
        annotation["area"] = float(rle.area(images.annToRLE(annotation)))
    x, y, width, height = annotation["bbox"]
    if not finite([x, y, width, height, annotation["area"]]) or min(width, height, annotation["area"]) < 0:
        raise ValueError(f"bbox {annotation['bbox']} or area {annotation['area']} is negative or no number")


def finite(values: list) -> bool:
    """Return True if all values are finite numbers."""
    return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))


def _checked_mask(found: dict | list, size: list[int]) -> dict | list:
    """Return a valid segmentation, without polygons of fewer than three points, which have no area."""
    if isinstance(found, dict):
        runs = found["counts"] if isinstance(found["counts"], list) else _decoded(found["counts"])
        # pycocotools does not check the sum. If it is too small, masks end with uninitialised memory.
        valid = found["size"] == size and sum(runs) == math.prod(size) and set(map(type, runs)) == {int}
        valid = valid and min(runs) >= 0
    else:
        found = [polygon for polygon in found if len(polygon) >= 6]  # pycocotools takes four numbers for a box
        largest = max((abs(value) for polygon in found for value in polygon), default=math.inf)
        valid = largest <= _MAX_COORDINATE and all(finite(p) and len(p) % 2 == 0 for p in found)
    if not valid:
        raise ValueError(
            f"its segmentation must be RLE with runs that fill the image's size {size}, or polygons of at least "
            f"three points with coordinates up to {_MAX_COORDINATE:,}"
        )
    return found


def _decoded(counts: str) -> list[int]:
    """Return the runs of compressed RLE; none if it is damaged."""
    # five bits per character; the fourth run and later ones are stored as the difference to the run two before
    runs, value, shift = [], 0, 0
    for byte in counts.encode():
        if not 48 <= byte < 48 + 64:
            return []
        value |= (byte - 48 & 31) << shift
        shift += 5
        if byte - 48 & 32:  # more of this run follows
            continue
        if byte - 48 & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return [] if shift else runs


def enlarge(masks: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Resize boolean masks [n, rows, columns] to [n, height, width], with a threshold of one half.

    Use NEAREST from patches to the squashed image, and BICUBIC from there to the original size.
    """
    full = np.zeros((len(masks), *size), bool)
    for out, mask in zip(full, masks, strict=True):
        out[:] = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], resample)) >= 128
    return full


def detections_of(masks: np.ndarray, image_id: int | str) -> list[dict]:
    """Return COCO results of one image, with a tight box and score 1, for the non-empty masks of [n, H, W]."""
    from pycocotools import mask as rle

    entries = []
    for mask in masks:
        if mask.any():
            code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            segmentation = {"size": list(map(int, code["size"])), "counts": code["counts"].decode()}
            entry = {"image_id": image_id, "category_id": 1, "segmentation": segmentation}
            entries.append(entry | {"bbox": [float(side) for side in rle.toBbox(code)], "score": 1.0})
    return entries


def class_agnostic_scores(coco, detections: Sequence[dict], image_ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """Score boxes and masks by class-agnostic AP and AR.

    Args:
        coco: Ground truth, pycocotools' `COCO` as completed by `read_annotations`; any ids and categories.
        detections: COCO results; their categories are ignored.
        image_ids: Ids of the evaluated images; the objects of images without detections count as missed.

    Returns:
        "bbox" and "segm", each with AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm and ARl from 0 to 1, or
        −1 if there is no object of that size, as in pycocotools.

    Raises:
        UserError: None of the images has an annotated object.
    """
    from pycocotools.cocoeval import COCOeval

    image_ids = sorted(set(image_ids))
    require_objects(coco, image_ids)
    # Images and annotations are numbered from 1. To pycocotools, annotation id 0 means "no match", and annotations of
    # a repeated id are read twice.
    numbers = {image_id: number for number, image_id in enumerate(image_ids, start=1)}
    images, annotations = [], []
    for image_id, number in numbers.items():
        images.append(coco.imgs.get(image_id, {}) | {"id": number})
        for annotation in coco.imgToAnns.get(image_id, ()):
            annotations.append(annotation | {"id": len(annotations) + 1, "image_id": number, "category_id": 1})
    truth = index_of(images, annotations, [{"id": 1, "name": "object"}])
    ordered = sorted((d for d in detections if d["image_id"] in numbers), key=lambda d: numbers[d["image_id"]])
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    scores = {}
    with redirect_stdout(io.StringIO()):  # pycocotools prints the scores
        for kind, field in (("bbox", "bbox"), ("segm", "segmentation")):
            entries = [
                {"image_id": numbers[d["image_id"]], "category_id": 1, "score": d["score"], field: d[field]}
                for d in ordered
            ]
            found = truth.loadRes(entries) if entries else index_of(images, [], [])
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores[kind] = dict(zip(names, map(float, evaluation.stats), strict=True))
    return scores
