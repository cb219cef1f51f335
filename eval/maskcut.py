"""MaskCut: objects from patch features by repeated normalised cuts (paper, §3.2, B.4; Table 1 and Fig. 5).

    masks, residuals, solvers = maskcut(features)                       # the algorithm
    crate-fast eval maskcut MODEL --data coco:PATH                      # a data set, with AP and AR
    torchrun --nproc_per_node 4 -m crate_fast.eval.maskcut MODEL --data coco:PATH

A run over a data set keeps one line an image in its output folder: started again it goes on where it stopped, with as
many processes as it is given.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from crate_fast.errors import UserError, require, run_command
from crate_fast.eval.common.coco import (
    class_agnostic_scores,
    detections_of,
    enlarge,
    paint_detections,
    refine,
    require_crf,
    require_objects,
)
from crate_fast.eval.common.command import (
    evaluation_parser,
    open_models,
    output_folder,
    positive,
    settings_of,
)
from crate_fast.eval.common.figures import Picture, image_grid
from crate_fast.eval.common.images import CocoImages, batches, open_images
from crate_fast.eval.common.models import Subject
from crate_fast.eval.common.normalized_cut import SAME, exact_fp32, second_eigenvector
from crate_fast.eval.common.results import Records, say_written, write_results, write_table
from crate_fast.functional import linear
from crate_fast.train.checkpoint import write_text
from crate_fast.train.distributed import Processes, process_group

__all__ = ["MaskCut", "MaskCutSettings", "check", "detect", "evaluate", "main", "maskcut", "object_of"]

EPSILON = 1e-5
_LARGEST_OVERLAP, _SMALLEST_SHARE = 0.5, 0.01
_FORMAT = 1  # of the records; raise it when they change
_LINK_BYTES = 2 * 2**30  # of the affinities held at once


class MaskCut(NamedTuple):
    """What `maskcut` returns.

    Attributes:
        masks: Boolean [B, n, rows, columns]; disjoint; empty ones stand last.
        residuals: Of the eigenvectors behind them, [B, n] (`normalized_cut.Cut`); NaN where none was computed.
        solvers: Which solver each is from, [B, n] (`normalized_cut.Cut`); −1 where none was computed.
    """

    masks: Tensor
    residuals: Tensor
    solvers: Tensor


def object_of(vector: Tensor, grid: tuple[int, int]) -> Tensor:
    """The object that a second eigenvector shows.

    Patches above the mean are foreground, with the seed at the largest entry; where at least three of the four
    corners are, the sides change places and the seed is the smallest entry. Of entries within 1e-4 of each other the
    first counts, since patches with the same links have the same entry but for rounding. The object is the
    foreground's 4-connected component that holds the seed. (CutLER's code also changes sides if the patch of largest
    magnitude is not foreground. Its result depends on the sign the solver happened to return; here that patch is
    positive.)

    Args:
        vector: [P], of `normalized_cut.Cut`.
        grid: Rows and columns of patches.

    Returns:
        Boolean [rows, columns]; all False if the vector is constant.
    """
    from scipy.ndimage import label

    values = vector.double().cpu().numpy().reshape(grid)
    foreground, seed = values > values.mean(), np.argmax(values >= values.max() - SAME)
    if foreground[[0, 0, -1, -1], [0, -1, 0, -1]].sum() >= 3:
        foreground, seed = ~foreground, np.argmax(values <= values.min() + SAME)
    components, _ = label(foreground)  # its default neighbourhood is 4-connected
    chosen = components.flat[seed]
    return torch.from_numpy((components == chosen) & (chosen > 0))


def _check(num_objects: int, tau: float) -> None:
    if num_objects < 1:
        raise UserError(f"num_objects={num_objects}: ask for at least one")
    if not -1 <= tau <= 1:
        raise UserError(f"tau={tau}: a cosine lies from -1 to 1")


def _check_patches(n_patches: int) -> None:
    if n_patches < 2:
        raise UserError("one patch cannot be cut: use larger images (--image-size) for a finer grid")


def _square(n_patches: int) -> tuple[int, int]:
    side = round(n_patches**0.5)
    if side * side != n_patches:
        raise UserError(f"{n_patches} patches are no square grid: pass grid=(rows, columns)")
    return side, side


def _links(features: Tensor, tau: float) -> Tensor:
    """Which patches look alike: cosine > τ as 0 and 1, [b, P, P]."""
    unit = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
    cosine = (
        linear(unit[0], unit[0]).unsqueeze(0) if len(unit) == 1 else unit @ unit.mT
    )  # one goes to oneDNN on a CPU
    return cosine.gt_(tau).to(torch.float32)


@torch.no_grad()
@exact_fp32()
def maskcut(
    features: Tensor,
    num_objects: int = 3,
    tau: float = 0.15,
    *,
    grid: tuple[int, int] | None = None,
    epsilon: float = EPSILON,
) -> MaskCut:
    """Find objects as repeated normalised cuts of a graph of patches.

    Patches whose features have a cosine above τ are linked (affinity 1, else ε). The second eigenvector of the
    normalised cut gives an object (`object_of`); its patches are painted, that is, lose their links, and the next
    object is cut from the rest. A mask other than the first that covers at most 1 % of the grid, or overlaps the
    previous one by an IoU above ½, ends the search.

    Args:
        features: Of patches, row by row, [P, C] or [B, P, C]; any floating-point type, on a CPU or a GPU. Padding,
            CLS and registers must not be among them.
        num_objects: n, at most how many.
        tau: τ, from -1 to 1.
        grid: Rows and columns with rows·columns = P; a square when None.
        epsilon: Affinity of patches that are not linked, above 0.

    Returns:
        `MaskCut`, with a batch dimension even for one image.

    Raises:
        UserError: Shapes or settings do not fit, or the features are not finite.

    Differs from CutLER's code, on purpose: the eigenvector's sign is fixed (there it is the solver's, and changes
    masks); a dropped mask ends the search (there nothing is painted, so the same mask comes back in the next round
    and is then compared with an empty one, and kept); where every pair of the patches that are left is linked, the
    search ends (there the painted patches are then cut from the rest).

    Source: Wang et al., *Cut and Learn*, 2023 (CutLER); paper, Algorithm 4.

    >>> features = torch.zeros(8, 8, 2)
    >>> features[..., 0], features[2:5, 3:6] = 1.0, torch.tensor([0.0, 1.0])
    >>> maskcut(features.flatten(0, 1), num_objects=1).masks[0, 0].nonzero().amin(0).tolist()
    [2, 3]
    """
    features = features.unsqueeze(0) if features.dim() == 2 else features
    if features.dim() != 3 or not features.is_floating_point():
        raise UserError(f"features are {tuple(features.shape)} of {features.dtype}: pass floats [P, C] or [B, P, C]")
    n_patches = features.shape[1]
    grid = _square(n_patches) if grid is None else grid
    _check_patches(n_patches)
    if grid[0] * grid[1] != n_patches:
        raise UserError(f"grid={grid} does not hold the {n_patches} patches: rows·columns must be P")
    _check(num_objects, tau)
    if not 0 < epsilon < 1:
        raise UserError(f"epsilon={epsilon}: it must be between 0 and 1")
    if not features.isfinite().all():
        raise UserError("the features hold NaN or infinity: look at the model and its input's normalisation")
    on_cpu = features.device.type == "cpu"  # where a batch shares nothing but its slowest image's steps
    chunk = 1 if on_cpu else max(1, int(_LINK_BYTES // (8 * n_patches**2)))
    parts = [_cut_batch(part, num_objects, tau, grid, epsilon) for part in features.split(chunk)]
    return MaskCut(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _cut_batch(features: Tensor, num_objects: int, tau: float, grid: tuple[int, int], epsilon: float) -> MaskCut:
    links = _links(features, tau)
    n_images = len(features)
    painted = torch.zeros(n_images, *grid, dtype=torch.bool)
    previous = torch.zeros_like(painted)
    masks = torch.zeros(n_images, num_objects, *grid, dtype=torch.bool)
    residuals = torch.full((n_images, num_objects), float("nan"))
    solvers = torch.full((n_images, num_objects), -1)
    searching = list(range(n_images))
    for turn in range(num_objects):
        present = ~painted[searching].flatten(1)
        cut = second_eigenvector(links, present.to(links.device), epsilon)
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


@dataclass(frozen=True)
class MaskCutSettings:
    """How `detect` segments an image.

    Attributes:
        num_objects: At most how many objects; see `maskcut`.
        tau: See `maskcut`.
        crf: Refine masks with `crf.refine` at the size the model sees.
    """

    num_objects: int = 3
    tau: float = 0.15
    crf: bool = False

    def __post_init__(self):
        _check(self.num_objects, self.tau)
        if self.crf:
            require_crf()


PAPER = MaskCutSettings()


def check(subject: Subject, images: Dataset) -> None:
    """Refuse what could only fail, before anything is computed.

    Args:
        subject: The model, at its image size.
        images: The data set.

    Raises:
        UserError: The model has a single patch, or the data set has annotations, but none of an object.
        UserError: A package is missing.
    """
    require("pycocotools", "scipy")
    _check_patches(math.prod(subject.extract.grid))
    if isinstance(images, CocoImages):  # a scene always has an object
        require_objects(images.coco, images.keys())


def detect(
    subject: Subject,
    images: Dataset,
    layers: Sequence[int],
    settings: MaskCutSettings,
    problems: list[str],
    **reading,
) -> Iterator[dict]:
    """MaskCut on a data set, for several layers in one pass of the model.

    Args:
        subject: The model.
        images: Of `Sample`s, at the model's image size.
        layers: Whose features, counted from 0.
        settings: See `MaskCutSettings`.
        problems: Filled with what could not be read.
        **reading: `batch_size`, `workers`, `progress` of `images.batches`.

    Yields:
        One record an image: "image_id", and "layers": layer → "detections" (COCO results), "residuals" and "solvers".
    """
    for batch in batches(images, problems=problems, **reading):
        features = subject.extract(subject.normalize(batch.images.to(subject.device)), layers)
        cuts = {
            layer: maskcut(features.keys(layer), settings.num_objects, settings.tau, grid=features.grid)
            for layer in layers
        }
        for row, sample in enumerate(batch.samples):
            picture = sample.image.permute(1, 2, 0).numpy()
            record = {"image_id": sample.key, "layers": {}}
            for layer, cut in cuts.items():
                masks = cut.masks[row][cut.masks[row].flatten(1).any(dim=1)].numpy()
                masks = enlarge(masks, picture.shape[:2], Image.Resampling.NEAREST)
                if settings.crf:
                    refined = [refine(mask, picture) for mask in masks]
                    masks = np.array([mask for mask in refined if mask is not None]).reshape(-1, *picture.shape[:2])
                masks = enlarge(masks, sample.size, Image.Resampling.BICUBIC)
                residuals = cut.residuals[row]
                record["layers"][layer] = {
                    "detections": detections_of(masks, sample.key),
                    "residuals": residuals[~residuals.isnan()].tolist(),
                    "solvers": cut.solvers[row][~residuals.isnan()].tolist(),
                }
            yield record


def summarise(images: Dataset, records: Sequence[dict], layer: int, evaluated: Sequence) -> dict:
    """Numbers of one layer's records: counts, the largest residual and, with COCO annotations, AP and AR.

    Args:
        images: The data set.
        records: From `detect`.
        layer: Whose.
        evaluated: Keys of all images asked for; one without a record counts as missed.
    """
    parts = [record["layers"][layer] for record in records]
    detections = [entry for part in parts for entry in part["detections"]]
    solvers = [solver for part in parts for solver in part["solvers"]]
    numbers = {
        "images": len(records),
        "detections": len(detections),
        "images_without_detection": sum(not part["detections"] for part in parts),
        "largest_residual": max((r for part in parts for r in part["residuals"]), default=0.0),
        "solvers": {name: solvers.count(i) for i, name in enumerate(("Lanczos", "block Lanczos in fp64", "dense"))},
    }
    if images.has_instances:
        numbers |= class_agnostic_scores(images.coco, detections, evaluated)
    return numbers


def evaluate(
    subject: Subject,
    images: Dataset,
    layers: Sequence[int] | None = None,
    settings: MaskCutSettings = PAPER,
    problems: list[str] | None = None,
    **reading,
) -> dict[int, dict]:
    """MaskCut's numbers for each layer, without files; see `detect` and `summarise`.

    Args:
        subject: The model.
        images: Of `Sample`s; with COCO's there are AP and AR.
        layers: The model's default layer when None.
        settings, problems, **reading: See `detect`.

    Returns:
        Layer → numbers.

    Raises:
        UserError: See `check`.
    """
    layers = [subject.extract.default_layer] if layers is None else list(layers)
    problems = [] if problems is None else problems
    check(subject, images)
    records = list(detect(subject, images, layers, settings, problems, **({"batch_size": 8} | reading)))
    return {layer: summarise(images, records, layer, images.keys()) for layer in layers}


def _figure(images: Dataset, records: dict, layer: int, folder: Path, shown: int) -> list[Path]:
    """The first images that could be read, with their masks and boxes (paper, Fig. 5)."""
    pictures = []
    readable = [(index, key) for index, key in enumerate(images.keys()) if key in records]
    for index, key in readable[:shown]:
        sample = images[index]
        squashed = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
        picture = np.asarray(squashed.resize(sample.size[::-1], Image.Resampling.BICUBIC))
        pictures.append(Picture(paint_detections(picture, records[key]["layers"][layer]["detections"])))
    paths = [folder / "detections.png", folder / "detections.pdf"]
    image_grid([pictures[i : i + 6] for i in range(0, len(pictures), 6)], paths)
    return paths


def _parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("maskcut", "Objects by MaskCut, and their AP and AR.", many=False, image_size=480)
    parser.add_argument("--layer", type=int, help="whose features; the last but one of CRATE, the last of a ViT")
    parser.add_argument("--num-objects", type=positive, default=3, help="at most how many in an image; default 3")
    parser.add_argument("--tau", type=float, default=0.15, help="cosine above which patches are linked; default 0.15")
    parser.add_argument(
        "--crf", action="store_true", help="refine masks by a DenseCRF (pip install 'crate_fast[crf]')"
    )
    parser.add_argument("--figure-images", type=positive, default=12, help="images in the figure; default 12")
    return parser


def _command(options: argparse.Namespace) -> None:
    with process_group(options.device) as processes:
        options.device = str(processes.device)
        settings = MaskCutSettings(options.num_objects, options.tau, options.crf)
        (subject,) = open_models(options)
        layer = subject.extract.resolve_layer(options.layer)
        images = open_images(options.data, subject.extract.image_size[0], options.limit)
        check(subject, images)
        folder = output_folder(options, "maskcut")
        decides = {**subject.facts, "data": options.data, "layer": layer, **asdict(settings), "format": _FORMAT}
        records = _open_records(folder / "records", decides, processes)
        done = records.read()
        processes.wait()  # nobody writes before all have read what is to be done
        todo = [index for index, key in enumerate(images.keys()) if key not in done]
        mine = Subset(images, todo[processes.rank :: processes.world_size])
        if processes.first and len(todo) < len(images):
            print(f"{len(images) - len(todo)} of {len(images)} images were done before: {folder}")
        problems: list[str] = []
        progress = "maskcut" if processes.first else None
        reading = {"batch_size": options.batch_size, "workers": options.workers, "progress": progress}
        records.append(detect(subject, mine, [layer], settings, problems, allow_none=True, **reading))
        problems = [line for part in processes.gather(problems) for line in part]
        if processes.first:
            _finish(images, records.read(), layer, folder, decides | settings_of(options), problems, options)
        processes.wait()


def _open_records(folder: Path, decides: dict, processes: Processes) -> Records:
    """The records of this process; if the first process may not open them, all say so and none waits."""
    records, refusal = None, ""
    if processes.first:
        try:
            records = Records(folder, decides)
        except ValueError as error:
            refusal = str(error)
    refusal = processes.agree(refusal)
    if refusal:
        raise UserError(refusal)
    return Records(folder, decides, processes.rank) if records is None else records


def _finish(
    images: Dataset,
    records: dict,
    layer: int,
    folder: Path,
    config: dict,
    problems: list[str],
    options: argparse.Namespace,
) -> None:
    """Gather, score, draw and print."""
    keys = [key for key in images.keys() if key in records]  # noqa: SIM118
    if not keys:
        raise UserError(f"none of the {len(images)} images could be read; the first: {problems[0]}")
    for key in keys:
        records[key]["layers"] = {int(name): part for name, part in records[key]["layers"].items()}
    numbers = summarise(images, [records[key] for key in keys], layer, images.keys())
    detections = [entry for key in keys for entry in records[key]["layers"][layer]["detections"]]
    write_text(folder / "detections.json", json.dumps(detections) + "\n")
    paths = [write_results(folder, "maskcut", config, numbers, problems), folder / "detections.json"]
    row = {"model": config["label"], "layer": layer, "images": numbers["images"], "detections": numbers["detections"]}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        for measure in ("AP50", "AP75", "AP", "AR100"):
            if kind in numbers:
                row[f"{name} {measure}"] = 100 * numbers[kind][measure]
    print(write_table(folder, "table", [row], digits=2))
    if "bbox" in numbers:
        print("AP and AR in %, class-agnostic; every score is 1, ranked in the order of image ids.")
        print("Images that could not be read count as images without detections.")
    paths += [folder / "table.md", *_figure(images, records, layer, folder, options.figure_images)]
    say_written(paths, problems)


def main(argv: list[str] | None = None) -> int:
    """Run as the command line says; returns the exit status."""
    return run_command(lambda: _command(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
