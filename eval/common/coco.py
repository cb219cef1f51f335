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
    """Open a file of COCO or LVIS instance annotations as pycocotools' index `COCO`.

    Some missing values are filled in: iscrowd (0), area and bbox (from the mask), file_name (the end of coco_url), a
    category's name (its number), and an image's size (from its RLE masks). Another missing or invalid field is a
    `UserError` that names it. Annotations of unlisted images are left out, as in pycocotools.
    """
    content = coco_content(path)
    if not content["images"]:
        raise UserError(f"{path} lists no images: 'images' is empty; name another file")
    images = checked_images(content["images"], path)
    index = index_of(content["images"], [], [])
    for number, category in enumerate(content["categories"]):
        _must_be((int,), category, "id", f"{path}: categories[{number}]")
        category["name"] = str(category.get("name") or category["id"])
    annotations = []
    for number, annotation in enumerate(content["annotations"]):
        where = f"{path}: annotations[{number}]"
        _must_be((type(content["images"][0]["id"]),), annotation, "image_id", where)  # 7 and "7" are different ids
        if annotation["image_id"] not in images:
            continue
        _must_be((int, str), annotation, "id", where)
        where = f"{path}: annotation {annotation['id']!r}"
        _must_be((int,), annotation, "category_id", where)
        _complete(annotation, index, where)
        annotations.append(annotation)
    return index_of(content["images"], annotations, content["categories"])


def coco_content(path: Path) -> dict[str, list[dict]]:
    """Read the lists "images", "annotations" and "categories" of a file in COCO format; the last may be missing."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _no_annotations(path, f"it is not JSON; {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise _no_annotations(path, f"it holds a {type(content).__name__}, as results files do")
    content.setdefault("categories", [])
    for name in ("images", "annotations", "categories"):
        entries = content.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _no_annotations(path, f"{name!r} is {'not a list of objects' if name in content else 'missing'}")
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


def _no_annotations(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} does not hold COCO's annotations ({reason}): use a file with images, annotations and categories, "
        "such as instances_val2017.json"
    )


def _must(holds: bool, entry: dict, field: str, rule: str, where: str) -> None:
    if not holds:
        found = repr(entry[field])[:60] if field in entry else "missing"
        raise UserError(f"{where}: {field!r} is {found}, and must be {rule}; correct the file")


def _must_be(types: tuple[type, ...], entry: dict, field: str, where: str) -> None:
    rule = " or ".join({int: "an integer", str: "a string"}[kind] for kind in types)
    _must(type(entry.get(field)) in types, entry, field, rule, where)


def checked_images(entries: list[dict], path: Path) -> dict[int | str, dict]:
    """Return the entries of COCO's 'images' by id; raise a `UserError` for a missing or invalid field."""
    images: dict[int | str, dict] = {}
    for number, image in enumerate(entries):
        _must_be((int, str), image, "id", f"{path}: images[{number}]")
        where = f"{path}: image {image['id']!r}"
        if image["id"] in images:
            raise UserError(f"{where} occurs twice in 'images'; remove one")
        if type(image["id"]) is not type(entries[0]["id"]):
            raise UserError(f"{where}: all image ids must be integers or all strings; correct the file")
        if "file_name" not in image and isinstance(image.get("coco_url"), str):  # LVIS
            image["file_name"] = image["coco_url"].rpartition("/")[2]
        _must_be((str,), image, "file_name", where)
        if not image["file_name"]:
            raise UserError(f"{where}: 'file_name' is empty; correct the file")
        for side in ("height", "width"):
            if isinstance(image.get(side), float) and image[side].is_integer():
                image[side] = int(image[side])
        images[image["id"]] = image
    return images


def _complete(annotation: dict, index, where: str) -> None:
    """Check an annotation and fill in its missing values; an image without a size gets that of an RLE mask."""
    from pycocotools import mask as rle

    annotation["iscrowd"] = annotation.get("iscrowd") or 0
    _must(annotation["iscrowd"] in (0, 1), annotation, "iscrowd", "0 or 1", where)
    area, box = annotation.get("area"), annotation.get("bbox")
    _must(area is None or (finite([area]) and area >= 0), annotation, "area", "a number of at least 0", where)
    is_box = not box or (isinstance(box, list) and len(box) == 4 and finite(box) and min(box[2:]) >= 0)
    _must(is_box, annotation, "bbox", "[x, y, width, height]", where)
    _check_segmentation(annotation, index.imgs[annotation["image_id"]], where)
    if area is not None and box and 0 not in box[2:]:  # COCO's train2017 has a box of height 0
        return
    segmentation = index.annToRLE(annotation)
    annotation["area"] = float(rle.area(segmentation)) if area is None else area
    if not box or (0 in box[2:] and rle.area(segmentation)):
        annotation["bbox"] = rle.toBbox(segmentation).tolist()


def finite(values: list) -> bool:
    """Return True if all values are finite numbers."""
    return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))


def is_size(size: object) -> bool:
    """Return True for two integers above 0."""
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def _check_segmentation(annotation: dict, image: dict, where: str) -> None:
    """Check a mask, and remove polygons of fewer than three points, which have no area."""
    found, size = annotation.get("segmentation"), [image.get("height"), image.get("width")]
    if isinstance(found, dict):
        counts = found.get("counts")
        runs = counts if isinstance(counts, list) else _decoded(counts)
        valid = is_size(found.get("size")) and all(type(run) is int and run >= 0 for run in runs)
        # pycocotools does not check the sum. If it is too small, masks end with uninitialised memory.
        filled = valid and sum(runs) == math.prod(found["size"])
        _must(filled, annotation, "segmentation", "RLE with runs that fill its size", where)
        if not is_size(size):
            image |= dict(zip(("height", "width"), found["size"], strict=True))
        else:
            _must(size == found["size"], annotation, "segmentation", f"RLE of the image's size {size}", where)
        return
    valid = isinstance(found, list) and all(
        isinstance(p, list) and len(p) % 2 == 0 and finite(p) and max(map(abs, p), default=0) <= _MAX_COORDINATE
        for p in found
    )
    polygons = [polygon for polygon in found if len(polygon) >= 6] if valid else []
    rule = f"RLE, or polygons x, y, x, y, x, y, … with coordinates up to {_MAX_COORDINATE:,}"
    _must(bool(polygons), annotation, "segmentation", rule, where)
    if not is_size(size):
        raise UserError(
            f"{where}: 'segmentation' has polygons, so image {image.get('id')!r} needs 'height' and 'width', "
            f"integers above 0, not {size[0]!r} and {size[1]!r}; correct the file"
        )
    annotation["segmentation"] = polygons


def _decoded(counts: object) -> list[int]:
    """Return the runs of compressed RLE; none if it is damaged."""
    # five bits per character; the fourth run and later ones are stored as the difference to the run two before
    runs, value, shift = [], 0, 0
    for byte in counts.encode() if isinstance(counts, str) else ():
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
