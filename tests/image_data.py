"""Images, archives and data sets that tests write."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from crate_fast.train.config import TrainConfig


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Return a picture as file content."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def grey(value: int) -> bytes:
    """Return a PNG of one grey value."""
    return encoded(Image.fromarray(np.full((20, 30, 3), value, np.uint8)))


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """Write files, given by their paths below `root`; return `root`."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, members, format: int = tarfile.PAX_FORMAT) -> Path:
    """Write (name, content) or (name, link type, target) members as a tar archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if len(rest) == 2:
                info.type, info.linkname = rest
            content = rest[0] if len(rest) == 1 else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def coco_box(identity: int, image: int, category: int, x: int, y: int, w: int, h: int, crowd: int = 0) -> dict:
    """Return a COCO annotation of an object that fills a box."""
    shape = {"bbox": [x, y, w, h], "area": w * h, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
    return {"id": identity, "image_id": image, "category_id": category, "iscrowd": crowd, **shape}


def write_voc(root: Path) -> Path:
    """Write VOC2012 with three images: class 1 on the left half and a void stripe; classes 3 and 20; no object."""
    base, labels = root / "VOC2012", np.zeros((3, 40, 60), np.uint8)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    labels[0, :, :30], labels[0, :, 28:32] = 1, 255
    labels[1, :20, :20], labels[1, 20:, 40:] = 3, 20
    for name, label in zip("abc", labels, strict=True):
        Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(base / "JPEGImages" / f"{name}.jpg")
        picture = Image.fromarray(label, mode="P")
        picture.putpalette([0, 0, 0, 128, 0, 0, *([64] * (254 * 3))])
        picture.save(base / "SegmentationClass" / f"{name}.png")
    (base / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\n")
    return root


def write_coco(root: Path) -> Path:
    """Write a COCO folder: coloured boxes of several categories, a crowd, and an image without objects."""
    draw, images, annotations, files = np.random.default_rng(0), [], [], {}
    for i in range(1, 7):
        picture = np.full((64, 64, 3), 90, np.uint8)
        for k in range(0 if i == 6 else 2):
            x, y, w, h = (int(v) for v in (*draw.integers(0, 34, 2), *draw.integers(16, 28, 2)))
            picture[y : y + h, x : x + w] = draw.integers(0, 255, 3)
            crowd = int(i == 2 and k == 1)
            annotations.append(coco_box(len(annotations) + 1, i, 1 + (i + k) % 3, x, y, w, h, crowd))
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": 64, "width": 64})
        files[f"val2017/{i:012d}.jpg"] = encoded(Image.fromarray(picture), "JPEG")
    categories = [{"id": c, "name": f"thing{c}"} for c in (1, 2, 3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write_tree(root, files | {"instances_val2017.json": json.dumps(content).encode()})


def config_of(root: Path, dataset: str = "folder", **changes) -> TrainConfig:
    """Return settings for a small run on the data in `root`."""
    settings = {"image_size": 16, "batch_size": 4, "epochs": 2, "workers": 0}
    return TrainConfig(dataset=dataset, data_dir=str(root), **(settings | changes))
