"""Data sets of images by name, with their object masks if known.

    folder:PATH          every image below PATH
    voc:PATH             PASCAL VOC in its own layout (VOCdevkit/VOC2012), segmentation val split
    coco:PATH[:SPLIT]    COCO: PATH/SPLIT/*.jpg, instances_SPLIT.json in PATH or PATH/annotations; SPLIT is val2017
                         by default
    shape_scenes[:SEED]  generated scenes (validation split) with one object each; 500 unless a limit is given
    photographs          freely licensed photographs from scikit-image, scikit-learn and matplotlib, with credit

An image that cannot be read becomes a `Sample` with a `problem`; the protocols count and list such images.

Images are read as in training (`crate_fast.train.data.image_files`), turned upright by their EXIF orientation.
Annotations are assumed to refer to the upright image: labelling tools show it, and detectron2 compares its size with
the size in COCO's JSON. If only the stored pixels have the annotated size, the image is not turned. For orientations
2 to 4 and for squares both sizes are equal; these images are turned upright.
"""

import contextlib
import functools
import importlib.util
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import masks_to_boxes
from tqdm import tqdm

from crate_fast.errors import UserError
from crate_fast.eval.common.coco import detections_of, index_of, read_annotations
from crate_fast.train.data.image_files import (
    EXTENSIONS,
    UNREADABLE,
    as_stored,
    as_text,
    describe,
    find_images,
    open_image,
    read_image,
)
from crate_fast.train.data.shape_scenes import ShapeScenes

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255
_FREE_PHOTOGRAPHS = (  # photographs in installed packages: package, file, name, credit
    ("skimage", "data/chelsea.png", "cat", "Stéfan van der Walt, CC0"),
    ("skimage", "data/coffee.png", "coffee", "Rachel Michetti, CC0"),
    ("skimage", "data/astronaut.png", "astronaut", "NASA, public domain"),
    ("skimage", "data/rocket.jpg", "rocket", "SpaceX, CC0"),
    ("skimage", "data/motorcycle_left.png", "motorcycle", "Daniel Scharstein, CC0"),
    ("sklearn", "datasets/images/flower.jpg", "flower", "vultilion, CC BY 2.0"),
    ("sklearn", "datasets/images/china.jpg", "temple", "danielbuechele, CC BY 2.0"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "portrait", "US Navy, public domain"),
)
_UNREADABLE = (*UNREADABLE, KeyError, TypeError, IndexError, AssertionError)  # the last four: damaged annotations


@dataclass(frozen=True)
class Target:
    """Annotations of one image."""

    classes: list[int]  # numbers of the M classes in the image, without the background
    masks: Tensor  # masks of these classes, boolean [M, H, W], at the image's original resolution
    valid: Tensor  # pixels that are not void, boolean [H, W]
    # boxes of objects [K, 4]: left, top, right, bottom in pixels, the last two exclusive
    boxes: Tensor | None = None

    def on_grid(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return masks [M, P] and valid patches [P] on a grid of patches, both boolean.

        A patch is valid if at least half of it is not void. It belongs to an object if at least half of its valid
        pixels do, so a small or thin object may have no patch.
        """
        parts = torch.cat([self.valid[None], self.masks & self.valid]).float()
        valid, masks = F.adaptive_avg_pool2d(parts, grid).flatten(1).split([1, len(self.masks)])
        keep = valid[0] >= 0.5
        return (masks >= 0.5 * valid) & keep, keep


@dataclass(frozen=True)
class Sample:
    """One image of a data set."""

    key: str | int  # name or number in the data set
    image: Tensor | None  # uint8 [3, S, S], squashed to a square; None if unreadable
    size: tuple[int, int] | None  # height and width of the original image, in pixels; None if unreadable
    target: Target | None = None
    problem: str | None = None  # reason why the image is unreadable
    label: int = -1  # number of the class; -1 if unknown


@dataclass(frozen=True)
class Batch:
    """Readable samples and their stacked images, uint8 [B, 3, S, S]."""

    images: Tensor
    samples: list[Sample]


def squash(picture: Image.Image, size: int) -> Tensor:
    """Resize an RGB picture to a square (bicubic), uint8 [3, size, size]."""
    squashed = picture.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1).contiguous()


def with_area(boxes: Tensor) -> Tensor:
    """Return those of the boxes (left, top, right, bottom) that have an area: [K, 4]."""
    boxes = boxes.reshape(-1, 4)
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]


def box_corners(masks: Tensor) -> Tensor:
    """Return boxes [n, 4] of non-empty boolean masks [n, H, W]: left, top, right, bottom, the last two exclusive."""
    return (masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])).int()


class ImageFiles(Dataset):
    """Images of a folder, sorted by path, squashed to squares of `size` pixels; base class of the other data sets."""

    labelled, has_instances = False, False

    def __init__(self, root: Path, size: int):
        self.root, self.size = root, size
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; pass --data folder:PATH with the folder of your images")
        tree = find_images(root)
        if tree.note:
            print(f"{root}: {tree.note}", file=sys.stderr)
        if not tree.names:
            raise UserError(f"{root} holds no images ({', '.join(EXTENSIONS)}): pass a folder with images")
        paths = sorted(map(Path, tree.names))
        self.items = [(as_text(str(path)), root / path) for path in paths]  # results are UTF-8

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        key, path = self.items[index]
        try:
            picture, wanted = read_image(path), self.annotated_size(key)
            if wanted not in (None, picture.size[::-1]) and (stored := as_stored(picture)).size[::-1] == wanted:
                picture = stored
            target = self.target(key, picture.size[::-1])
        except _UNREADABLE as error:
            return Sample(key, None, None, problem=describe(str(path), error))
        return Sample(key, squash(picture, self.size), picture.size[::-1], target)

    def keys(self) -> list[str | int]:
        """Return the names or numbers of the images, in order."""
        return [key for key, _ in self.items]

    def annotated_size(self, key: str | int) -> tuple[int, int] | None:
        """Return the annotated height and width of an image, or None."""
        return None

    def target(self, key: str | int, size: tuple[int, int]) -> Target | None:
        """Return the annotations of an image, or None."""
        return None

    def class_names(self) -> dict[int, str]:
        """Return class number → name."""
        return {}


class FreePhotographs(ImageFiles):
    """Photographs of `free_photographs`; at least one, since matplotlib is always installed."""

    def __init__(self, size: int):
        self.size, self.items = size, list(free_photographs().items())


class VocImages(ImageFiles):
    """PASCAL VOC segmentation images with semantic classes; 255 is void and 0 is background."""

    labelled = True

    def __init__(self, root: Path, size: int):
        folders = [root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"]
        found = next((folder for folder in folders if (folder / "SegmentationClass").is_dir()), None)
        if found is None:
            raise UserError(f"{root} has no SegmentationClass folder: pass voc:PATH with VOCdevkit's folder VOC2012")
        self.root, self.size = found, size
        names = found / "ImageSets" / "Segmentation" / "val.txt"
        keys = names.read_text().split() if names.is_file() else []
        if not keys:
            raise UserError(f"{names} is missing or lists no images: unpack VOC again")
        self.items = [(key, found / "JPEGImages" / f"{key}.jpg") for key in keys]

    def _annotation(self, key: str | int):
        return open_image(self.root / "SegmentationClass" / f"{key}.png")

    def annotated_size(self, key: str | int) -> tuple[int, int]:
        with self._annotation(key) as file:
            return file.height, file.width

    def target(self, key: str | int, size: tuple[int, int]) -> Target:
        with self._annotation(key) as file:
            if file.mode not in ("P", "L"):
                raise UserError(f"annotation {key}.png has mode {file.mode}, not a palette of class numbers")
            labels = torch.from_numpy(np.array(file))
        if tuple(labels.shape) != size:
            raise UserError(f"annotation {key}.png has size {tuple(labels.shape)}, its image {size}")
        classes = [c for c in labels.unique().tolist() if c not in (0, VOID)]
        return Target(classes, labels == torch.tensor(classes).view(-1, 1, 1), labels != VOID)

    def class_names(self) -> dict[int, str]:
        return dict(enumerate(VOC_CLASSES, start=1))


class CocoImages(ImageFiles):
    """COCO images, sorted by id. A category's mask is the union of its instances; crowds are void."""

    labelled, has_instances = True, True

    def __init__(self, root: Path, size: int, split: str = "val2017"):
        self.root, self.size = root, size
        names = [root / f"instances_{split}.json", root / "annotations" / f"instances_{split}.json"]
        found = next((name for name in names if name.is_file()), None)
        if found is None:
            raise UserError(
                f"neither {names[0]} nor {names[1]} exists: name the folder that holds one, as coco:PATH[:SPLIT]"
            )
        if not (root / split).is_dir():
            raise UserError(f"the image folder {root / split} does not exist: put the images there")
        self.coco = read_annotations(found)
        self.items = [(key, self._path(image, split)) for key, image in sorted(self.coco.imgs.items())]

    def _path(self, image: dict, split: str) -> Path:
        name = image["file_name"].replace("\\", "/")  # some tools on Windows write backslashes
        path, with_folder = self.root / split / name, self.root / name
        return with_folder if with_folder.exists() and not path.exists() else path

    def annotated_size(self, key: str | int) -> tuple[int, int] | None:
        image = self.coco.imgs[key]
        return (image["height"], image["width"]) if {"height", "width"} <= image.keys() else None

    def target(self, key: str | int, size: tuple[int, int]) -> Target:
        if self.coco.imgToAnns[key] and self.annotated_size(key) != size:
            raise UserError(f"the annotated size is {self.annotated_size(key)}, the image has {size}")
        masks: dict[int, np.ndarray] = {}
        void, boxes = np.zeros(size, bool), []
        for annotation in self.coco.imgToAnns[key]:
            pixels = self.coco.annToMask(annotation).astype(bool)
            if annotation.get("iscrowd"):
                void |= pixels
            else:
                x, y, width, height = annotation["bbox"]
                boxes.append([x, y, x + width, y + height])
                masks[annotation["category_id"]] = masks.get(annotation["category_id"], False) | pixels
        classes = sorted(masks)
        stacked = torch.from_numpy(np.array([masks[c] for c in classes], bool).reshape(-1, *size))
        return Target(classes, stacked, torch.from_numpy(~void), with_area(torch.tensor(boxes, dtype=torch.float64)))

    def class_names(self) -> dict[int, str]:
        return {number: category["name"] for number, category in self.coco.cats.items()}


class SceneImages(ImageFiles):
    """Validation scenes of `shape_scenes`, numbered from 0, each with the mask of its object."""

    labelled, has_instances = True, True

    def __init__(self, size: int, count: int = 500, seed: int = 0):
        self.scenes = ShapeScenes(count, image_size=size, seed=seed, split="val", with_mask=True)
        self.size, self.items = size, [(number, None) for number in range(count)]

    @functools.cached_property
    def coco(self):
        """Return pycocotools' index of the objects. Distractors are not annotated, so detecting them lowers AP."""
        from pycocotools import mask as rle

        annotations = []
        for number in self.keys():
            _, label, mask = self.scenes[number]
            (entry,) = detections_of(mask[None].numpy(), number)
            entry |= {"id": number + 1, "category_id": label, "iscrowd": 0}
            annotations.append(entry | {"area": float(rle.area(entry["segmentation"]))})
        images = [{"id": number, "height": self.size, "width": self.size} for number in self.keys()]
        categories = [{"id": number, "name": name} for number, name in self.class_names().items()]
        return index_of(images, annotations, categories)

    def __getitem__(self, index: int) -> Sample:
        image, label, mask = self.scenes[index]
        target = Target([label], mask[None], torch.ones_like(mask), box_corners(mask[None]))
        return Sample(index, image, tuple(mask.shape), target)

    def class_names(self) -> dict[int, str]:
        return dict(enumerate(self.scenes.classes))


class LabelledImages(Dataset):
    """Labelled images of a split of `train.data.loader.plain_splits`, with its name for messages.

    The at most `limit` images are evenly spaced, as the split may be sorted by class. An unreadable image becomes a
    sample with a `problem`.
    """

    def __init__(self, split: Dataset, name: str, limit: int | None = None):
        self.split, self.name, total = split, name, len(split)
        count = min(limit or total, total)
        self.indices = [i * total // count for i in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Sample:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[Sample]:
        batch = self.split.batch([(0, self.indices[number]) for number in numbers])  # draws scenes in one batch
        read = zip(batch.keys, batch.images, batch.labels.tolist(), strict=True)
        samples = [Sample(index, image, tuple(image.shape[1:]), label=label) for (_, index), image, label in read]
        return samples + [Sample("", None, None, problem=f"{self.name} image {text}") for text in batch.problems]


def open_images(specification: str, size: int, limit: int | None = None) -> Dataset:
    """Open the images named by `--data` (see the module's docstring) as a data set of `Sample`s.

    Args:
        specification: `KIND:PATH`, shape_scenes or photographs.
        size: Side of the squashed images, in pixels.
        limit: Number of images, taken from the start; all when None.

    Raises:
        UserError: Images or annotations are missing, or the specification is invalid.
    """
    kind, _, rest = specification.partition(":")
    if kind == "shape_scenes":
        if rest and not rest.isdigit():
            raise UserError(f"{specification}: write shape_scenes or shape_scenes:SEED")
        return SceneImages(size, limit or 500, int(rest or 0))
    if specification == "photographs":
        images = FreePhotographs(size)
    elif kind == "folder" and rest:
        images = ImageFiles(Path(rest), size)
    elif kind == "voc" and rest:
        images = VocImages(Path(rest), size)
    elif kind == "coco" and rest:
        path, _, split = rest.rpartition(":")
        if not path or Path(rest).exists():
            path, split = rest, ""
        images = CocoImages(Path(path), size, split or "val2017")
    else:
        known = "folder:PATH, voc:PATH, coco:PATH[:SPLIT], shape_scenes[:SEED] or photographs"
        raise UserError(f"{specification!r} is no data set: write {known}")
    images.items = images.items[:limit]
    return images


def readable(images: Dataset) -> Iterator[tuple[int, Sample]]:
    """Yield (number, sample) for each readable sample."""
    samples = ((number, images[number]) for number in range(len(images)))
    return (entry for entry in samples if entry[1].problem is None)


def batches(
    images: Dataset,
    batch_size: int = 8,
    problems: list[str] | None = None,
    *,
    workers: int = 0,
    progress: str | None = None,
    allow_none: bool = False,
) -> Iterator[Batch]:
    """Read samples in order by `workers` processes (0: by this one), and yield the readable ones in batches.

    `problems` receives one line for each unreadable image; the line is also printed to stderr. `progress` is the
    title of a progress bar. No readable image at all is a `UserError` unless `allow_none`, as when resuming.
    """
    problems = [] if problems is None else problems
    if workers:  # each tensor from a worker keeps a file descriptor open, and callers may keep all samples
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(ValueError, OSError):  # "unlimited" may be more than the system allows
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers, collate_fn=list)
    readable = 0
    with tqdm(total=len(images), desc=progress, unit="img", disable=progress is None) as bar:
        for samples in loader:
            for sample in samples:
                if sample.problem is not None:
                    if sample.problem not in problems:  # several models read the same images
                        problems.append(sample.problem)
                    bar.write(f"unreadable: {sample.problem}", file=sys.stderr)
            good = [sample for sample in samples if sample.problem is None]
            readable += len(good)
            if good:
                yield Batch(torch.stack([sample.image for sample in good]), good)
            bar.update(len(samples))
    if not readable and not allow_none:
        raise UserError(f"none of the {len(images)} images could be read; first problem: {''.join(problems[:1])}")


def free_photographs() -> dict[str, Path]:
    """Return the freely licensed photographs in installed packages: name with credit → file."""
    found = {}
    for package, file, name, credit in _FREE_PHOTOGRAPHS:
        specification = importlib.util.find_spec(package)
        path = Path(specification.origin).parent / file if specification and specification.origin else None
        if path is not None and path.is_file():
            found[f"{name} ({credit})"] = path
    return found
