"""COCO annotation files: checked and completed when they are opened, before anything is computed from them."""

import io
import json
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from crate_fast.errors import UserError

__all__ = ["as_one_category", "index_of", "read_annotations", "require_objects"]

_FARTHEST = 1_000_000  # pixels; pycocotools takes memory and time for each, and at 10⁸ it crashes


def read_annotations(path: Path):
    """Open a file of COCO's or LVIS's instance annotations.

    What the format has a default for, or the mask determines, is filled in: iscrowd (0), area and bbox (of the mask),
    file_name (the end of coco_url), a category's name (its number), and the size of an image (of its RLE masks).
    Annotations of images that the file does not list are left out, as pycocotools leaves them out.

    Args:
        path: The file.

    Returns:
        pycocotools' index `COCO`.

    Raises:
        UserError: Something else is missing or wrong; the message names the file, the annotation or image, and the
            field.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _no_annotations(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise _no_annotations(path, f"it is a {type(content).__name__}, as a file of results is")
    for name in ("images", "annotations", "categories"):
        entries = content.get(name, [] if name == "categories" else None)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _no_annotations(path, f"{name!r} is {'no list of objects' if name in content else 'missing'}")
    if not content["images"]:
        raise UserError(f"{path} lists no images: 'images' is empty; name another file")
    images = _images(content["images"], path)
    categories = [_category(*numbered, path) for numbered in enumerate(content.get("categories", []))]
    annotations = []
    for number, annotation in enumerate(content["annotations"]):
        where = f"{path}: annotations[{number}]"
        _require(annotation, "image_id", (type(content["images"][0]["id"]),), where)  # 7 and "7" are different images
        if annotation["image_id"] not in images:
            continue
        _require(annotation, "id", (int, str), where)
        where = f"{path}: annotation {annotation['id']!r}"
        _require(annotation, "category_id", (int,), where)
        _complete(annotation, images[annotation["image_id"]], where)
        annotations.append(annotation)
    return index_of(content["images"], annotations, categories)


def index_of(images: list[dict], annotations: list[dict], categories: list[dict]):
    """Return pycocotools' index `COCO` of entries in memory."""
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with redirect_stdout(io.StringIO()):  # it prints how it gets on
        index.createIndex()
    return index


def require_objects(coco, image_ids: Sequence) -> None:
    """Refuse images without an object: AP of them would have no meaning.

    Raises:
        UserError: None has one.
    """
    if not any(not annotation.get("iscrowd") for i in image_ids for annotation in coco.imgToAnns.get(i, ())):
        raise UserError(
            f"none of the {len(image_ids)} images has an annotated object, so AP has no meaning: take more images "
            "(--limit), or folder:PATH for detections alone"
        )


def as_one_category(coco, image_ids: Sequence):
    """Copy the ground truth of some images, with category 1 alone and with ids 1, 2, … of images and annotations.

    pycocotools takes annotation id 0 for "no match", and reads annotations of a repeated id twice.

    Args:
        coco: pycocotools' index of the annotations.
        image_ids: Of the images; image n of the copy is image_ids[n − 1].

    Returns:
        The copy's index; `coco` stays as it is.
    """
    images, annotations = [], []
    for number, image_id in enumerate(image_ids, start=1):
        image = dict(coco.imgs.get(image_id, {}))
        for annotation in coco.imgToAnns.get(image_id, ()):
            entry = dict(annotation)
            _complete(entry, image, f"annotation {annotation.get('id')!r}")
            annotations.append(entry | {"id": len(annotations) + 1, "image_id": number, "category_id": 1})
        images.append(image | {"id": number})
    return index_of(images, annotations, [{"id": 1, "name": "object"}])


def _no_annotations(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} does not hold COCO's annotations ({reason}): it needs images, annotations and categories, as "
        "instances_val2017.json has"
    )


def _require(entry: dict, field: str, types: tuple[type, ...], where: str) -> None:
    if type(entry.get(field)) not in types:
        expected = " or ".join({int: "a whole number", str: "a text"}[kind] for kind in types)
        found = repr(entry[field])[:60] if field in entry else "missing"
        raise UserError(f"{where}: {field!r} is {found}, and must be {expected}; correct the file")


def _images(entries: list[dict], path: Path) -> dict[int | str, dict]:
    images: dict[int | str, dict] = {}
    for number, image in enumerate(entries):
        _require(image, "id", (int, str), f"{path}: images[{number}]")
        where = f"{path}: image {image['id']!r}"
        if image["id"] in images:
            raise UserError(f"{where} stands twice in 'images'; remove one")
        if type(image["id"]) is not type(entries[0]["id"]):
            raise UserError(f"{where}: the ids of images are numbers and texts; correct the file")
        if "file_name" not in image and isinstance(image.get("coco_url"), str):  # LVIS
            image["file_name"] = image["coco_url"].rpartition("/")[2]
        _require(image, "file_name", (str,), where)
        if not image["file_name"]:
            raise UserError(f"{where}: 'file_name' is empty; correct the file")
        for side in ("height", "width"):
            if isinstance(image.get(side), float) and image[side].is_integer():
                image[side] = int(image[side])
        images[image["id"]] = image
    return images


def _category(number: int, category: dict, path: Path) -> dict:
    _require(category, "id", (int,), f"{path}: categories[{number}]")
    return category | {"name": str(category.get("name") or category["id"])}


def _complete(annotation: dict, image: dict, where: str) -> None:
    """Check an annotation's values and fill in those that follow; an image without a size takes that of an RLE."""
    from pycocotools import mask as rle

    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
    if annotation["iscrowd"] not in (0, 1):
        raise UserError(f"{where}: 'iscrowd' is {annotation['iscrowd']!r}, and must be 0 or 1; correct the file")
    segmentation = annotation["segmentation"] = _segmentation(annotation, image, where)
    mask = None
    if annotation.get("area") is None:
        mask = _encoded(segmentation, image)
        annotation["area"] = float(rle.area(mask))
    elif not _numbers([annotation["area"]]) or annotation["area"] < 0:
        raise UserError(f"{where}: 'area' is {annotation['area']!r}, and must be a number from 0; correct the file")
    box = annotation.get("bbox")
    if box and (not isinstance(box, list) or len(box) != 4 or not _numbers(box) or min(box[2:]) < 0):
        raise UserError(f"{where}: 'bbox' is {box!r}, and must be [x, y, width, height]; correct or remove it")
    if not box or 0 in box[2:]:  # COCO's train2017 has a box of no height
        mask = _encoded(segmentation, image) if mask is None else mask
        annotation["bbox"] = rle.toBbox(mask).tolist() if not box or rle.area(mask) else box


def _numbers(values: list) -> bool:
    return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))


def _size(image: dict) -> list[int] | None:
    size = [image.get("height"), image.get("width")]
    return size if all(type(side) is int and side > 0 for side in size) else None


def _segmentation(annotation: dict, image: dict, where: str) -> list | dict:
    """Return the segmentation, without polygons of fewer than three points, which cover nothing."""
    found = annotation.get("segmentation")
    if not found:
        state = "missing" if "segmentation" not in annotation else "empty"
        raise UserError(f"{where}: 'segmentation' is {state}, so there is no mask to score; remove the annotation")
    if isinstance(found, dict):
        return _run_lengths(found, image, where)
    if not isinstance(found, list) or not all(isinstance(polygon, list) for polygon in found):
        raise UserError(f"{where}: 'segmentation' is neither a list of polygons nor RLE; correct the file")
    for polygon in found:
        if len(polygon) % 2 or not _numbers(polygon):
            raise UserError(f"{where}: 'segmentation' has a polygon that is no list x, y, x, y, …; correct the file")
        if max(map(abs, polygon), default=0) > _FARTHEST:
            raise UserError(f"{where}: 'segmentation' has a point over {_FARTHEST:,} pixels away; correct the file")
    polygons = [polygon for polygon in found if len(polygon) >= 6]
    if not polygons:
        raise UserError(f"{where}: 'segmentation' has no polygon of three points; remove the annotation")
    if _size(image) is None:
        raise UserError(
            f"{where}: 'segmentation' has polygons, so image {image.get('id')!r} needs 'height' and 'width', whole "
            f"numbers above 0, not {image.get('height')!r} and {image.get('width')!r}; correct the file"
        )
    return polygons


def _run_lengths(found: dict, image: dict, where: str) -> dict:
    size, counts = found.get("size"), found.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2 or _size({"height": size[0], "width": size[1]}) is None:
        raise UserError(f"{where}: 'segmentation' has the size {size!r}, not [height, width]; correct the file")
    if _size(image) is None:
        image |= {"height": size[0], "width": size[1]}
    elif _size(image) != list(size):
        raise UserError(
            f"{where}: 'segmentation' is of {size[0]}×{size[1]} pixels, its image {image.get('id')!r} of "
            f"{image['height']}×{image['width']}; correct the file"
        )
    runs = counts if isinstance(counts, list) else _decoded(counts)
    if runs is None or any(type(run) is not int or run < 0 for run in runs) or sum(runs) != math.prod(size):
        raise UserError(
            f"{where}: 'segmentation' has counts that do not add up to {math.prod(size)} pixels; correct the file"
        )
    return found


def _decoded(counts) -> list[int] | None:
    """Return the runs of compressed RLE, None where it is damaged.

    pycocotools' own decoder does not check them: of a mask that is too short it returns memory that nobody wrote.
    """
    runs, value, shift = [], 0, 0
    for byte in counts.encode() if isinstance(counts, str) else counts if isinstance(counts, bytes) else ():
        if not 48 <= byte < 48 + 64:
            return None
        value |= (byte - 48 & 31) << shift
        shift += 5
        if byte - 48 & 32:  # more of this run follows
            continue
        if byte - 48 & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs


def _encoded(segmentation: list | dict, image: dict):
    from pycocotools import mask as rle

    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return segmentation
    codes = rle.frPyObjects(segmentation, image["height"], image["width"])
    return rle.merge(codes) if isinstance(codes, list) else codes
