"""MaskCut: objects from patch features by repeated normalised cuts (paper, §3.2, B.4; Table 1 and Fig. 5).

The command writes one record per image to its output folder, and resumes from these.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms.functional import InterpolationMode, resize
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from crate_fast.errors import UserError, require
from crate_fast.eval.common import coco
from crate_fast.eval.common.command import Evaluation, open_data, open_models
from crate_fast.eval.common.figures import image_grid, image_picture
from crate_fast.eval.common.images import CocoImages, batches
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.normalized_cut import SAME, exact_fp32, second_eigenvector
from crate_fast.eval.common.results import Records
from crate_fast.functional import linear
from crate_fast.options import main_of
from crate_fast.train.checkpoint import write_text

EPSILON = 1e-5  # affinity of patches that are not linked
_LARGEST_OVERLAP, _SMALLEST_SHARE = 0.5, 0.01  # IoU with the previous mask; share of the grid
_FORMAT = 2  # version of the records; raise it when their content changes
_LINK_BYTES = 2 * 2**30  # memory for the affinities of one batch
SCORES = {  # name in tables → kind and name in `coco.class_agnostic_scores`
    f"{name} {score}": (kind, score)
    for kind, name in (("bbox", "box"), ("segm", "mask"))
    for score in ("AP50", "AP75", "AP", "AR100")
}
_COLOURS = ((230, 60, 50), (60, 130, 230), (60, 180, 80), (240, 180, 40), (160, 90, 210), (40, 190, 200))


class MaskCut(NamedTuple):
    """Masks found by `maskcut`."""

    masks: Tensor  # boolean [B, n, rows, columns]; disjoint, empty masks last
    # of the `normalized_cut.Cut` of each mask, [B, n]; NaN and −1 where none was computed
    residuals: Tensor
    solvers: Tensor


def object_of(vector: Tensor, grid: tuple[int, int]) -> Tensor:
    """Extract the object, boolean [rows, columns], from the entries [P] of a second eigenvector; none if constant.

    Patches above the mean are foreground, and the seed is the largest entry. If at least three of the four corners
    are foreground, the sides are swapped and the seed is the smallest entry. Entries within 1e-4 of this extreme are
    equal to it, because patches with the same links differ by rounding; the first one is the seed. The object is the
    4-connected component of the foreground that contains the seed. CutLER's code also swaps the sides if the patch of
    largest magnitude is not foreground. That depends on the solver's sign; here this patch is always positive.
    """
    from scipy.ndimage import label

    values = vector.double().cpu().numpy().reshape(grid)
    foreground, seed = values > values.mean(), np.argmax(values >= values.max() - SAME)
    if foreground[[0, 0, -1, -1], [0, -1, 0, -1]].sum() >= 3:
        foreground, seed = ~foreground, np.argmax(values <= values.min() + SAME)
    components, _ = label(foreground)  # its default neighbourhood is 4-connected
    chosen = components.flat[seed]
    return torch.from_numpy((components == chosen) & (chosen > 0))


def _check(n_patches: int, tau: float) -> None:
    if n_patches < 2:
        raise UserError("one patch cannot be cut: use larger images (--image-size) for a finer grid")
    if not -1 <= tau <= 1:
        raise UserError(f"tau={tau}: give a cosine from -1 to 1")


def _links(features: Tensor, tau: float) -> Tensor:
    """Return 1 for pairs of patches with a cosine above τ and 0 for others, [b, P, P]."""
    unit = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
    # `linear` uses oneDNN on a CPU
    cosine = linear(unit[0], unit[0]).unsqueeze(0) if len(unit) == 1 else unit @ unit.mT
    return cosine.gt_(tau).to(torch.float32)


@torch.no_grad()
@exact_fp32()
def maskcut(
    features: Tensor, num_objects: int = 3, tau: float = 0.15, *, grid: tuple[int, int] | None = None
) -> MaskCut:
    """Find objects by repeated normalised cuts of a graph of patches.

    Patches whose features have a cosine above τ are linked (affinity 1, else ε = 1e-5). The second eigenvector of the
    normalised cut gives an object (`object_of`). Its patches are painted, that is, they lose their links, and the
    next object is cut from the rest. The search ends at a mask, other than the first, that covers at most 1 % of the
    grid or has an IoU above ½ with the previous mask.

    Args:
        features: Patch features [P, C] or [B, P, C] in row-major order, without padding, CLS and registers; any
            floating-point dtype, on a CPU or a GPU.
        num_objects: n, the maximum number of objects.
        tau: τ, from -1 to 1.
        grid: Rows and columns with rows·columns = P; a square when None.

    Returns:
        `MaskCut`, with a batch dimension even for one image.

    Raises:
        UserError: Shapes or settings do not fit, or the features are not finite.

    The paper's text weighs a link by the patches' inner product; weights 1 and ε are those of CutLER's code.

    Differs from CutLER's code on purpose. The eigenvector's sign is fixed; CutLER keeps the solver's, which changes
    masks. A dropped mask ends the search; CutLER does not paint it, so the next round finds it again, compares it
    with an empty mask and keeps it. The search also ends when all remaining patches are linked to each other; CutLER
    then cuts the painted patches from the rest.

    Source: Wang et al., *Cut and Learn*, 2023 (CutLER); paper, Algorithm 4.

    >>> features = torch.zeros(8, 8, 2)
    >>> features[..., 0], features[2:5, 3:6] = 1.0, torch.tensor([0.0, 1.0])
    >>> maskcut(features.flatten(0, 1), num_objects=1).masks[0, 0].nonzero().amin(0).tolist()
    [2, 3]
    """
    features = features.unsqueeze(0) if features.dim() == 2 else features
    if features.dim() != 3 or not features.is_floating_point():
        raise UserError(f"features are {features.dtype} {tuple(features.shape)}: pass floats [P, C] or [B, P, C]")
    n_patches = features.shape[1]
    if grid is None:
        grid = (math.isqrt(n_patches),) * 2
        if grid[0] ** 2 != n_patches:
            raise UserError(f"{n_patches} patches do not form a square grid: pass grid=(rows, columns)")
    if grid[0] * grid[1] != n_patches:
        raise UserError(f"grid={grid} does not fit the {n_patches} patches: rows·columns must be {n_patches}")
    _check(n_patches, tau)
    if num_objects < 1:
        raise UserError(f"num_objects={num_objects}: ask for at least one")
    if not features.isfinite().all():
        raise UserError("the features hold NaN or infinity: check the model and the normalisation of its input")
    on_cpu = features.device.type == "cpu"  # a batch gains nothing there and runs as long as its slowest image
    chunk = 1 if on_cpu else max(1, int(_LINK_BYTES // (8 * n_patches**2)))
    parts = [_cut_batch(part, num_objects, tau, grid) for part in features.split(chunk)]
    return MaskCut(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _cut_batch(features: Tensor, num_objects: int, tau: float, grid: tuple[int, int]) -> MaskCut:
    links, n_images = _links(features, tau), len(features)
    painted = torch.zeros(n_images, *grid, dtype=torch.bool)
    previous = torch.zeros_like(painted)
    masks = torch.zeros(n_images, num_objects, *grid, dtype=torch.bool)
    residuals = torch.full((n_images, num_objects), float("nan"))
    solvers = torch.full((n_images, num_objects), -1)
    searching = list(range(n_images))
    for turn in range(num_objects):
        present = ~painted[searching].flatten(1)
        cut = second_eigenvector(links, present.to(links.device), EPSILON)
        residuals[searching, turn] = cut.residual.cpu().float()
        solvers[searching, turn] = cut.solver.cpu()
        found = []
        for row, (i, vector) in enumerate(zip(searching, cut.vector, strict=True)):
            mask = object_of(vector, grid)
            fresh = mask & ~painted[i]
            if fresh.any() and (turn == 0 or _worth_keeping(mask, previous[i])):
                masks[i, turn], previous[i] = fresh, mask
                painted[i] |= mask
                found.append(row)
        if not found:
            break
        if len(found) < len(searching):
            links, searching = links[found], [searching[row] for row in found]
    return MaskCut(masks, residuals, solvers)


def _worth_keeping(mask: Tensor, previous: Tensor) -> bool:
    overlap = (mask & previous).sum() / (mask | previous).sum()
    return bool(overlap <= _LARGEST_OVERLAP) and float(mask.float().mean()) > _SMALLEST_SHARE


def check(loaded: LoadedModel, images: Dataset, tau: float = 0.15) -> None:
    """Raise a `UserError` for a wrong τ, a single patch, or annotations without an object."""
    require("pycocotools", "scipy")
    _check(math.prod(loaded.extract.grid), tau)
    if isinstance(images, CocoImages):  # a scene always has an object
        coco.require_objects(images.coco, images.keys())


def detect(
    loaded: LoadedModel,
    images: Dataset,
    layers: Sequence[int],
    num_objects: int = 3,
    tau: float = 0.15,
    **reading,
) -> Iterator[dict]:
    """Run MaskCut on a data set, for several layers in one pass of the model.

    Args:
        num_objects, tau: See `maskcut`. Other arguments: see `crate_fast.eval`.

    Yields:
        For each image: "image_id"; "layers", layer as a string, as in JSON → COCO results.
    """
    for batch in batches(images, **reading):
        features = loaded.features(batch.images, layers)
        cuts = {layer: maskcut(features.keys(layer), num_objects, tau, grid=features.grid) for layer in layers}
        for row, sample in enumerate(batch.samples):
            record = {"image_id": sample.key, "layers": {}}
            for layer, cut in cuts.items():
                masks = cut.masks[row][cut.masks[row].flatten(1).any(dim=1)].numpy()
                masks = coco.enlarge(masks, tuple(sample.image.shape[1:]), Image.Resampling.NEAREST)
                masks = coco.enlarge(masks, sample.size, Image.Resampling.BICUBIC)
                record["layers"][str(layer)] = coco.detections_of(masks, sample.key)
            yield record


def summarise(images: Dataset, records: Sequence[dict], layer: int) -> dict:
    """Summarise one layer's records: counts and, with COCO annotations, AP and AR.

    The objects of an image without a record count as missed.
    """
    found = [record["layers"][str(layer)] for record in records]
    detections = list(itertools.chain(*found))
    numbers = {"images": len(records), "detections": len(detections), "images_without_detection": found.count([])}
    if images.has_instances:
        numbers |= coco.class_agnostic_scores(images.coco, detections, images.keys())
    return numbers


def in_percent(numbers: dict) -> dict[str, float]:
    """Return the scores for tables in percent, "box AP50" to "mask AR100"; {} if `numbers` has no AP."""
    return {name: 100 * numbers[kind][score] for name, (kind, score) in SCORES.items() if kind in numbers}


def evaluate(loaded: LoadedModel, images: Dataset, layers: Sequence[int] | None = None, **options) -> dict[int, dict]:
    """Score MaskCut with `options` of `detect`; return layer → numbers of `summarise`."""
    layers = loaded.extract.resolve_layers([None] if layers is None else layers)
    check(loaded, images)
    records = list(detect(loaded, images, layers, **options))
    return {layer: summarise(images, records, layer) for layer in layers}


def _figure(images: Dataset, records: dict, layer: int, paths: list[Path], shown: int) -> None:
    """Draw the first readable images with their masks and boxes (paper, Fig. 5)."""
    from pycocotools import mask as rle

    pictures = []
    readable = [index for index, key in enumerate(images.keys()) if key in records]
    for sample in map(images.__getitem__, readable[:shown]):
        picture = resize(sample.image, list(sample.size), InterpolationMode.BICUBIC)
        line = max(1, min(sample.size) // 150)
        detections = records[sample.key]["layers"][str(layer)]
        for entry, colour in zip(detections, itertools.cycle(_COLOURS), strict=False):
            mask = torch.from_numpy(rle.decode(entry["segmentation"])).bool()
            x, y, width, height = entry["bbox"]
            corners = torch.tensor([[x, y, x + width - 1, y + height - 1]])
            picture = draw_segmentation_masks(picture, mask, alpha=0.55, colors=colour)
            picture = draw_bounding_boxes(picture, corners, colors=colour, width=line)
        pictures.append(image_picture(picture))
    image_grid([pictures[i : i + 6] for i in range(0, len(pictures), 6)], paths)


def _command(options: argparse.Namespace) -> None:
    settings = {"num_objects": options.num_objects, "tau": options.tau}
    (loaded,) = open_models(options)
    layer = loaded.extract.resolve_layer(options.layer)
    images = open_data(options, loaded)
    check(loaded, images, options.tau)
    evaluation = Evaluation("maskcut", options, [loaded])
    decisive = {**loaded.facts, "data": options.data, "layer": layer, **settings, "format": _FORMAT}
    records = Records(evaluation.folder / "records", decisive)
    done = records.read()
    todo = [index for index, key in enumerate(images.keys()) if key not in done]
    if len(todo) < len(images):
        print(f"{len(images) - len(todo)} of {len(images)} images were done before: {evaluation.folder}")
    reading = evaluation.reading("maskcut") | settings
    records.append(detect(loaded, Subset(images, todo), [layer], allow_none=True, **reading))
    done = records.read()
    found = [done[key] for key in images.keys() if key in done]  # noqa: SIM118
    if not found:
        raise UserError(f"none of the {len(images)} images could be read; first problem: {evaluation.problems[0]}")
    numbers = summarise(images, found, layer)
    detections = [entry for record in found for entry in record["layers"][str(layer)]]
    write_text(evaluation.folder / "detections.json", json.dumps(detections) + "\n")
    evaluation.written.append(evaluation.folder / "detections.json")
    counts = {name: numbers[name] for name in ("images", "detections")}
    row = {"model": loaded.label, "layer": layer, **counts, **in_percent(numbers)}
    evaluation.write_table("table", [row], digits=2)
    notes = [
        "AP and AR in %, class-agnostic; all detections have score 1 and are ranked by image id.",
        "Images that could not be read count as images without detections.",
    ]
    _figure(images, done, layer, evaluation.figure("detections"), options.figure_images)
    evaluation.finish(numbers, {"layer": layer, "format": _FORMAT}, notes if "bbox" in numbers else ())


main = main_of("eval maskcut", _command)
