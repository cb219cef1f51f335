"""Images, archives and data sets that the tests of training data write."""

import io
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


def config_of(root: Path, dataset: str = "folder", **changes) -> TrainConfig:
    """Return settings for a small run on the data in `root`."""
    settings = {"image_size": 16, "batch_size": 4, "epochs": 2, "workers": 0}
    return TrainConfig(dataset=dataset, data_dir=str(root), **(settings | changes))
