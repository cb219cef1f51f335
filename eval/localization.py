"""Weakly supervised object localization: do attention maps of a model trained on labels find the object's box?

A map is enlarged bilinearly, scaled to [0, 1] and thresholded at 100 levels. The predicted box at a level encloses
the largest connected component; its IoU is the largest IoU with an annotated box. Scores (Choe et al., *Evaluating
Weakly Supervised Object Localization Methods Right*, 2020):

    MaxBoxAcc d    share of images whose box has IoU ≥ d, at the best threshold for all images; d = 0.3, 0.5, 0.7
    MaxBoxAccV2    mean of the three. The authors' code takes the best box of all components (multi_contour_eval), so
                   its scores are at least as high
    GT-known       share of images with IoU ≥ 0.5, at the threshold that is best on the other half of the images
    pointing       share of images where the centre of the patch with the largest weight lies in a box
    AP             average precision of patches ranked by attention; a patch is positive if its centre lies in a box
                   (0 if none does)
    threshold      best threshold for IoU ≥ 0.5

"best head" is chosen for each image, score and threshold by the image's boxes; "one head" is the head that is best on
the other half of the images. The baselines ignore the image: its centre, the mean box of the other half of the
images, the whole picture, random maps. MODEL@untrained is the untrained twin.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_iou
from torchvision.utils import draw_bounding_boxes

from crate_fast.errors import UserError
from crate_fast.eval.common.boxes import BoxedImages, covered
from crate_fast.eval.common.command import Evaluation, attention_layers, open_data, open_models
from crate_fast.eval.common.figures import Picture, image_picture, write_pages
from crate_fast.eval.common.images import Sample, batches, readable
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.segmentation import average_precision
from crate_fast.options import main_of

THRESHOLDS = np.arange(100) / 100
RESOLUTION = 64  # least side of the enlarged maps, in pixels
OVERLAPS = (0.3, 0.5, 0.7)
_CONNECTIVITY = np.zeros((3, 3, 3), bool)  # the eight neighbours of a pixel, at the same threshold
_CONNECTIVITY[1] = True


def largest_boxes(maps: np.ndarray) -> np.ndarray:
    """Find the box of the largest connected component of each map above each threshold.

    Args:
        maps: Finite values [K, h, w]; each map is scaled to [0, 1]. Pixels above a threshold are connected to their
            eight neighbours.

    Returns:
        [K, T, 4]: left, top, right, bottom in pixels, the last two exclusive; zeros if no pixel is above.
    """
    from scipy.ndimage import find_objects, label

    boxes = np.zeros((len(maps), len(THRESHOLDS), 4))
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    scaled = (maps - low) / np.where(high > low, high - low, 1)
    for found, values in zip(boxes, scaled, strict=True):
        labels, _ = label(values > THRESHOLDS[:, None, None], _CONNECTIVITY)
        sizes = np.bincount(labels.ravel())
        largest = np.zeros(len(THRESHOLDS), int)
        for number, (cut, rows, columns) in enumerate(find_objects(labels), start=1):
            if sizes[number] > largest[cut.start]:
                largest[cut.start] = sizes[number]
                found[cut.start] = columns.start, rows.start, columns.stop, rows.stop
    return boxes


def _best_iou(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the largest IoU of each box [..., 4] with the annotated boxes [M, 4]: [...]."""
    iou = box_iou(torch.from_numpy(boxes.reshape(-1, 4)), torch.from_numpy(truth)).amax(dim=1)
    return iou.numpy().reshape(boxes.shape[:-1])


def _boxes_of(sample: Sample) -> np.ndarray:
    """Return the annotated boxes [M, 4] as fractions of the image's sides."""
    height, width = sample.size
    return sample.target.boxes.double().numpy() / [width, height, width, height]


def _enlarge(maps: Tensor) -> np.ndarray:
    """Enlarge maps [H, rows, columns] bilinearly by a whole number, so that every patch counts alike."""
    factor = math.ceil(RESOLUTION / min(maps.shape[1:]))
    return F.interpolate(maps[None].double(), scale_factor=factor, mode="bilinear")[0].numpy()


def _relative_boxes(enlarged: np.ndarray) -> np.ndarray:
    """Return `largest_boxes` of enlarged maps [K, h, w] as fractions of the sides."""
    height, width = enlarged.shape[1:]
    return largest_boxes(enlarged) / [width, height, width, height]


def _measure(maps: Tensor, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return IoU by threshold [H, T], pointing [H] and average precision [H] of one image's maps.

    `maps` are [H, rows, columns]; `truth` holds the image's boxes [M, 4] as fractions of its sides.
    """
    iou = _best_iou(_relative_boxes(_enlarge(maps)), truth).astype(np.float32)
    weights, patches = maps.flatten(1), torch.from_numpy(covered(truth, *maps.shape[1:]).ravel())
    # of the patches: enlarging lowers a maximum inside the map, and not one in a corner
    return iou, patches[weights.argmax(dim=1)].numpy(), average_precision(weights, patches).numpy()


def _summary(measured: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, dict]:
    """Summarise the images' `_measure`: scores of each image's best head, of each head, and of one head for all."""
    iou, pointing, ap = map(np.stack, zip(*measured, strict=True))
    images, heads = np.arange(len(iou)), range(iou.shape[1])

    def score(rows: np.ndarray, head: int | np.ndarray) -> dict[str, float]:
        return _scores(iou[rows, head], pointing[rows, head], ap[rows, head])

    chosen = np.zeros(len(iou), int)
    for half, others in ((0, 1), (1, 0)):  # choose on one half, score on the other
        known = images[others::2] if len(images) > 1 else images
        chosen[half::2] = np.argmax([score(known, head)["MaxBoxAccV2"] for head in heads])
    return {
        "best_head": _scores(iou.max(axis=1), pointing.max(axis=1), ap.max(axis=1)),
        "per_head": [score(images, head) for head in heads],
        "one_head": score(images, chosen),
    }


def _scores(iou: np.ndarray, pointing: np.ndarray, ap: np.ndarray) -> dict[str, float]:
    """Score one map per image, from its IoU [N, T], pointing [N] and AP [N]."""
    hits = {overlap: iou >= overlap for overlap in OVERLAPS}
    scores = {f"MaxBoxAcc {overlap}": float(hit.mean(axis=0).max()) for overlap, hit in hits.items()}
    known, right = hits[0.5], 0
    for half, others in ((0, 1), (1, 0)):
        best = (known[others::2] if len(known) > 1 else known).mean(axis=0).argmax()
        right += known[half::2, best].sum()
    return {
        **scores,
        "MaxBoxAccV2": float(np.mean(list(scores.values()))),
        "GT-known": float(right / len(iou)),
        "pointing": float(pointing.mean()),
        "AP": float(ap.mean()),
        "threshold": float(THRESHOLDS[known.mean(axis=0).argmax()]),
    }


def _baselines(truths: list[np.ndarray], grid: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Score the centre, the mean box of the other half of the images, and the whole picture."""

    def scores(maps: Sequence[Tensor]) -> dict[str, float]:  # one map [rows, columns] per image
        measured = [_measure(prior[None], truth) for prior, truth in zip(maps, truths, strict=True)]
        return _summary(measured)["best_head"]

    y, x = (torch.linspace(-1, 1, side) for side in grid)
    centre = -(y[:, None] ** 2 + x**2)
    boxes = torch.from_numpy(np.stack([covered(truth, *grid) for truth in truths])).double()
    means = [boxes[half::2].mean(dim=0) if len(boxes[half::2]) else boxes.mean(dim=0) for half in (1, 0)]
    whole = np.stack([np.repeat(_best_iou(np.float64([0, 0, 1, 1]), truth), len(THRESHOLDS)) for truth in truths])
    share = boxes.mean(dim=(1, 2)).numpy()  # expectation for a random point, and for patches in random order
    return {
        "centre": scores([centre] * len(truths)),
        "mean box": scores([means[i % 2] for i in range(len(truths))]),
        "whole picture": _scores(whole, share, share),
    }


def evaluate(
    loaded: LoadedModel,
    images: Dataset,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    **reading,
) -> dict:
    """Score how well the CLS attention of layers localizes the annotated boxes.

    Args: See `crate_fast.eval`.

    Returns:
        "layers": for each, "layer" and scores as "best_head", "one_head" and "per_head"; "baselines": name → scores
        ("random" has "best_head" and "one_head"); "images" and "without_boxes": numbers with and without boxes.

    Raises:
        UserError: No image has a box.
    """
    layers = loaded.extract.resolve_layers(layers)
    generator = torch.Generator().manual_seed(seed)
    measured, noise, truths, without = {layer: [] for layer in layers}, [], [], 0
    for batch in batches(images, **reading):
        features = loaded.features(batch.images, layers)
        maps = {layer: features.cls_attention(layer).float().cpu() for layer in layers}
        for row, sample in enumerate(batch.samples):
            if not len(sample.target.boxes):
                without += 1
                continue
            truth = _boxes_of(sample)
            truths.append(truth)
            for layer, weights in maps.items():
                measured[layer].append(_measure(weights[row].unflatten(-1, features.grid), truth))
            random = torch.rand((weights.shape[1], *features.grid), generator=generator)
            noise.append(_measure(random, truth))
    if not truths:
        raise UserError(f"none of the {without} images has a box: use images with objects, or other --boxes")
    random = _summary(noise)
    baselines = _baselines(truths, features.grid)
    return {
        "layers": [{"layer": layer} | _summary(measured[layer]) for layer in layers],
        "baselines": baselines | {"random": {name: random[name] for name in ("best_head", "one_head")}},
        "images": len(truths),
        "without_boxes": without,
    }


def _rows(label: str, scores: dict, marked: int) -> list[dict]:
    names = {"best_head": "best head of each image", "one_head": "one head"}
    rows = [
        {"model": label, "maps": f"layer {row['layer']}{' *' if row['layer'] == marked else ''}, {names[kind]}"}
        | row[kind]
        for row in scores["layers"]
        for kind in names
    ]
    baselines = dict(scores["baselines"])
    random = baselines.pop("random")
    baselines = {f"random, {names[kind]}": random[kind] for kind in names} | baselines
    return rows + [{"model": label, "maps": name} | row for name, row in baselines.items()]


def _draw_boxes(sample: Sample, found: Sequence[float] | None = None) -> Picture:
    """Draw the annotated boxes (white) and a predicted box (red, as fractions of the sides) over an image."""
    boxes = torch.from_numpy(_boxes_of(sample) if found is None else np.vstack([_boxes_of(sample), found]))
    side = sample.image.shape[-1]
    corners = (boxes * side).round()
    corners[:, 2:] = corners[:, :2].maximum(corners[:, 2:] - 1)
    colours = ["white"] * len(sample.target.boxes) + ["red"] * (found is not None)
    return image_picture(draw_bounding_boxes(sample.image, corners, colors=colours, width=max(1, side // 100)))


def _figure(
    shown: Sequence[tuple[LoadedModel, Dataset, int]], results: dict, options: argparse.Namespace, folder: Path
) -> list[Path]:
    """Draw the annotated boxes, and each model's map and box with the head and threshold best for all images."""
    boxed = (entry for entry in readable(shown[0][1]) if len(entry[1].target.boxes))
    rows = []
    for index, first in itertools.islice(boxed, options.figure_images):
        row = [_draw_boxes(first)]
        for loaded, images, layer in shown:
            sample = images[index]
            features = loaded.features(sample.image[None], [layer])
            per_head = next(r for r in results[loaded.label]["layers"] if r["layer"] == layer)["per_head"]
            head = int(np.argmax([scores["MaxBoxAccV2"] for scores in per_head]))
            weights = features.cls_attention(layer)[0, head].float().cpu().view(1, *features.grid)
            enlarged = _enlarge(weights)
            cut = round(per_head[head]["threshold"] * len(THRESHOLDS))
            row += [Picture(enlarged[0]), _draw_boxes(sample, _relative_boxes(enlarged)[0, cut])]
        rows.append(row)
    names = [(f"{loaded.label}, layer {layer}", "box") for loaded, _, layer in shown]
    return write_pages(rows, folder, "boxes", None, ["annotated", *itertools.chain(*names)])


def _command(options: argparse.Namespace) -> None:
    models = open_models(options)
    layers = [attention_layers(options, loaded) for loaded in models]
    kind, _, path = options.data.partition(":")
    if options.boxes and (kind != "folder" or not path):
        raise UserError(f"--data {options.data}: with --boxes it must be folder:PATH")
    data = []
    for loaded in models:
        if options.boxes:
            data.append(BoxedImages(Path(path), loaded.extract.image_size[0], options.boxes, options.limit))
        else:
            data.append(open_data(options, loaded))
        if not data[-1].has_instances:
            raise UserError(f"--data {options.data} has no boxes: use coco:PATH, or name them with --boxes")
    evaluation = Evaluation("localization", options, models)
    results, rows, shown = {}, [], []
    for loaded, images, (wanted, layer) in zip(models, data, layers, strict=True):
        reading = evaluation.reading(loaded.label) | {"seed": options.seed}
        results[loaded.label] = evaluate(loaded, images, wanted, **reading)
        rows += _rows(loaded.label, results[loaded.label], loaded.extract.default_layer)
        shown.append((loaded, images, layer))
    evaluation.write_table("table", rows)
    evaluation.written += _figure(shown, results, options, evaluation.folder)
    counts = next(iter(results.values()))
    notes = [
        "* the default layer (the paper's for CRATE and ViT)",
        f"images with a box: {counts['images']}, without: {counts['without_boxes']}",
    ]
    evaluation.finish(results, None, notes)


main = main_of("eval localization", _command)
