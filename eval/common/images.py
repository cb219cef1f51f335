"""Data sets of images by name, with their object masks if known.

    folder:PATH          every image below PATH
    voc:PATH             PASCAL VOC in its own layout (VOCdevkit/VOC2012), segmentation val split
    coco:PATH[:SPLIT]    COCO: PATH/SPLIT/*.jpg, instances_SPLIT.json in PATH or PATH/annotations; SPLIT is val2017.
                         LVIS's annotations may take the file's place
    shape_scenes[:SEED]  scenes made on the fly (validation split), 500 of them if no limit is given; one object each
    photographs          freely licensed ones that scikit-image, scikit-learn and matplotlib bring along, with credit

An image that cannot be read becomes a `Sample` with a `problem`: the protocols count and name it.

Images are read as in training (`crate_fast.train.data.image_files`), upright as their EXIF orientation says.
Annotations are taken to be drawn on the upright picture: labelling tools show it, and detectron2 compares its size
with that in COCO's JSON. Where only the stored pixels have the size of the annotations, nothing is turned.
Sizes cannot tell for orientations 2 to 4 and for squares: those are upright.
"""

import functools
import importlib.util
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
from crate_fast.train.data import UNREADABLE
from crate_fast.train.data.image_files import EXTENSIONS, as_stored, describe, find_images, open_image, read_image
from crate_fast.train.data.shape_scenes import ShapeScenes

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255
_FREE_PHOTOGRAPHS = (  # photographs of installed packages: package, file, name, credit
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
    """Semantic classes of one image.

    Attributes:
        classes: Class numbers present, without the background.
        masks: Masks of the classes, boolean [M, H, W], at the image's own resolution.
        valid: Pixels that are not void, boolean [H, W].
        boxes: Objects' left, top, right, bottom in pixels of the image, the last two exclusive, [K, 4]; or None.
    """

    classes: list[int]
    masks: Tensor
    valid: Tensor
    boxes: Tensor | None = None

    def on_grid(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return masks [M, P] and valid patches [P] on a grid of patches, both boolean.

        A patch counts if at least half of it is not void, and belongs to an object if at least half of its valid
        pixels do. A small or thin object may have no patch.
        """
        parts = torch.cat([self.valid[None], self.masks & self.valid]).float()
        valid, masks = F.adaptive_avg_pool2d(parts, grid).flatten(1).split([1, len(self.masks)])
        keep = valid[0] >= 0.5
        return (masks >= 0.5 * valid) & keep, keep


@dataclass(frozen=True)
class Sample:
    """One image of a set.

    Attributes:
        key: Name or number in the set.
        image: uint8 [3, S, S], squashed to a square; zeros if unreadable.
        size: Height and width of the file, in pixels.
        target: Object masks, or None.
        problem: Reason why it is unreadable, or None.
        label: Class number, where a whole image has one.
    """

    key: str | int
    image: Tensor
    size: tuple[int, int]
    target: Target | None = None
    problem: str | None = None
    label: int = -1


@dataclass(frozen=True)
class Batch:
    """Readable samples, and their images, uint8 [B, 3, S, S]."""

    images: Tensor
    samples: list[Sample]


def squash(picture: Image.Image, size: int) -> Tensor:
    """Resize an RGB picture to a square (bicubic), uint8 [3, size, size]."""
    squashed = picture.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1).contiguous()


def box_corners(masks: Tensor) -> Tensor:
    """Return left, top, right, bottom [n, 4] of boolean masks [n, H, W], the last two exclusive; none is empty."""
    return (masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])).int()


class ImageFiles(Dataset):
    """Images of a folder, sorted by path; base class of the other sets.

    Images are squashed to `size` pixels a side.

    Raises:
        UserError: There is no folder, or no image in it.
    """

    labelled, has_instances = False, False

    def __init__(self, root: Path, size: int):
        self.root, self.size = root, size
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; pass --data folder:PATH with the folder of your images")
        tree = find_images(root)
        if tree.note:
            print(f"{root}: {tree.note}", file=sys.stderr)
        if not tree.names:
            raise UserError(f"{root} holds no images ({', '.join(EXTENSIONS)}): pass a folder that does")
        paths = sorted(map(Path, tree.names))
        names = [str(path).encode("utf-8", "backslashreplace").decode() for path in paths]  # results are UTF-8
        self.items = [(name, root / path) for name, path in zip(names, paths, strict=True)]

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
            blank = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return Sample(key, blank, (0, 0), problem=describe(str(path), error))
        return Sample(key, squash(picture, self.size), picture.size[::-1], target)

    def keys(self) -> list[str | int]:
        """Return the names or numbers of the images, in order."""
        return [key for key, _ in self.items]

    def annotated_size(self, key: str | int) -> tuple[int, int] | None:
        """Return the height and width that the annotations state for an image, or None."""
        return None

    def target(self, key: str | int, size: tuple[int, int]) -> Target | None:
        """Return the object masks of an image, or None."""
        return None

    def class_names(self) -> dict[int, str]:
        """Return class number → name."""
        return {}


class FreePhotographs(ImageFiles):
    """The photographs of `free_photographs`; matplotlib, which is always there, has one."""

    def __init__(self, size: int):
        self.size, self.items = size, list(free_photographs().items())


class VocImages(ImageFiles):
    """PASCAL VOC's segmentation images with semantic classes; 255 is void, 0 background."""

    labelled = True

    def __init__(self, root: Path, size: int):
        folders = [root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"]
        found = next((folder for folder in folders if (folder / "SegmentationClass").is_dir()), None)
        if found is None:
            raise UserError(
                f"{root} has no SegmentationClass folder: pass --data voc:PATH with the folder VOC2012 of VOCdevkit"
            )
        self.root, self.size = found, size
        names = found / "ImageSets" / "Segmentation" / "val.txt"
        if not names.is_file():
            raise UserError(f"{names} is not there: it lists the images of the split 'val'. Unpack VOC again")
        self.items = [(key, found / "JPEGImages" / f"{key}.jpg") for key in names.read_text().split()]
        if not self.items:
            raise UserError(f"{names} lists no images")

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
            raise UserError(f"annotation {key}.png is {tuple(labels.shape)}, its image {size}")
        classes = [c for c in labels.unique().tolist() if c not in (0, VOID)]
        return Target(classes, labels == torch.tensor(classes).view(-1, 1, 1), labels != VOID)

    def class_names(self) -> dict[int, str]:
        return dict(enumerate(VOC_CLASSES, start=1))


class CocoImages(ImageFiles):
    """COCO images, sorted by id, with the union of each category's instances; crowds are void.

    Attributes:
        coco: pycocotools' index of the annotations, from `coco.read_annotations`.

    Raises:
        UserError: The folder or the file is not there, or an annotation is incomplete.
    """

    labelled, has_instances = True, True

    def __init__(self, root: Path, size: int, split: str = "val2017"):
        self.root, self.size = root, size
        names = [root / f"instances_{split}.json", root / "annotations" / f"instances_{split}.json"]
        found = next((name for name in names if name.is_file()), None)
        if found is None:
            raise UserError(f"{names[0]} is not there, nor {names[1]}: pass --data coco:PATH[:SPLIT]")
        if not (root / split).is_dir():
            raise UserError(f"{root / split} is not there: the images belong there")
        self.coco = read_annotations(found)
        self.items = [(key, self._path(image, split)) for key, image in sorted(self.coco.imgs.items())]

    def _path(self, image: dict, split: str) -> Path:
        path = self.root / split / image["file_name"]
        name = image["file_name"].replace("\\", "/")  # of tools on Windows
        elsewhere = [self.root / split / name, self.root / name]
        if folder := str(image.get("coco_url", "")).split("/")[-2:-1]:
            elsewhere.append(self.root.joinpath(*folder, path.name))  # LVIS's validation images are in train2017, too
        return next((place for place in [path, *elsewhere] if place.exists()), path)

    def annotated_size(self, key: str | int) -> tuple[int, int] | None:
        image = self.coco.imgs[key]
        return (image["height"], image["width"]) if {"height", "width"} <= image.keys() else None

    def target(self, key: str | int, size: tuple[int, int]) -> Target:
        if self.coco.imgToAnns[key] and self.annotated_size(key) != size:
            raise UserError(f"the annotations say {self.annotated_size(key)}, the image is {size}")
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
        corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
        return Target(classes, stacked, torch.from_numpy(~void), corners)

    def class_names(self) -> dict[int, str]:
        return {number: category["name"] for number, category in self.coco.cats.items()}


class SceneImages(ImageFiles):
    """`count` validation scenes of `shape_scenes` of a seed, numbered, each with its object's mask."""

    labelled, has_instances = True, True

    def __init__(self, size: int, count: int = 500, seed: int = 0):
        self.scenes = ShapeScenes(count, image_size=size, seed=seed, split="val", with_mask=True)
        self.size, self.items = size, [(number, None) for number in range(count)]

    @functools.cached_property
    def coco(self):
        """Return pycocotools' index of the objects, one per image; drawn on first use.

        Distractors are not objects: detections of them lower AP.
        """
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


def open_images(specification: str, size: int, limit: int | None = None) -> Dataset:
    """Open the images that `--data` names (see the module's text), as a data set of `Sample`s.

    Args:
        specification: `KIND:PATH`, or shape_scenes.
        size: Side to which images are squashed, in pixels.
        limit: Take the first `limit` images; all when None.

    Raises:
        UserError: Images or annotations are missing, the specification is misspelt, or the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give a positive number, or leave it out for all images")
    kind, _, rest = specification.partition(":")
    if kind == "shape_scenes":
        if rest and not rest.isdigit():
            raise UserError(f"--data {specification}: write shape_scenes or shape_scenes:SEED")
        return SceneImages(size, limit or 500, int(rest or 0))
    kinds = {"folder": ImageFiles, "voc": VocImages, "coco": CocoImages}
    if specification == "photographs":
        images = FreePhotographs(size)
    elif kind not in kinds or not rest:
        known = "folder:PATH, voc:PATH, coco:PATH[:SPLIT], shape_scenes[:SEED] or photographs"
        raise UserError(f"--data {specification!r}: write {known}")
    else:
        path, _, split = rest.rpartition(":")
        if kind != "coco" or not path or Path(rest).exists():
            path, split = rest, ""
        images = kinds[kind](Path(path), size, **({"split": split} if split else {}))
    images.items = images.items[:limit]
    return images


def readable(images: Dataset) -> Iterator[tuple[int, Sample]]:
    """Yield the samples that can be read, with their numbers."""
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
    """Read samples in order, `batch_size` at a time, and yield the readable ones.

    Args:
        problems: Filled with one line for each unreadable image, which is also printed on stderr.
        workers: Processes that read.
        progress: Title of a progress bar; none when None.
        allow_none: Accept a set without a readable image, as one rank's part may be.

    Raises:
        UserError: Not one image could be read.
    """
    problems = [] if problems is None else problems
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers, collate_fn=list)
    readable, first_problem = 0, ""
    with tqdm(total=len(images), desc=progress, unit="img", disable=progress is None) as bar:
        for samples in loader:
            for sample in samples:
                if sample.problem is not None:
                    first_problem = first_problem or sample.problem
                    if sample.problem not in problems:  # several models read the same images
                        problems.append(sample.problem)
                    bar.write(f"unreadable: {sample.problem}", file=sys.stderr)
            good = [sample for sample in samples if sample.problem is None]
            readable += len(good)
            if good:
                yield Batch(torch.stack([sample.image for sample in good]), good)
            bar.update(len(samples))
    if not readable and not allow_none:
        raise UserError(f"none of the {len(images)} images could be read; the first: {first_problem}")


def free_photographs() -> dict[str, Path]:
    """Return the freely licensed photographs of installed packages: name with credit → file."""
    found = {}
    for package, file, name, credit in _FREE_PHOTOGRAPHS:
        specification = importlib.util.find_spec(package)
        path = Path(specification.origin).parent / file if specification and specification.origin else None
        if path is not None and path.is_file():
            found[f"{name} ({credit})"] = path
    return found
