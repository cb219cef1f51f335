"""Principal components of patch features: foreground, and parts as colours (paper, Fig. 3, 6, 9, 10 and B.2).

All images share one PCA. They should show one kind of object, so that a colour marks the same part in all of them.
Features are the subspace tokens of CRATE or the keys of a ViT, all heads concatenated. Writes pca_01.png and .pdf
(then 02, …: eight rows per page), results.json and a table. With layers as columns, each model has its own figure.
`--components 2-4` colours all patches, and shows component 1 in grey.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.eval.common.command import Evaluation, open_models, read_images
from crate_fast.eval.common.figures import Picture, image_rows, short_name, write_pages
from crate_fast.eval.common.images import Batch, Sample
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.segmentation import intersection_over_union
from crate_fast.options import main_of

_DRAWN = ("projections", "colours")  # arrays of `evaluate` that results.json leaves out
_TINY = torch.finfo(torch.float64).tiny


class TooFewPatchesError(UserError):
    """Too few foreground patches for principal components."""


def principal_components(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvectors of ZᵀZ for tokens Z [n, C], in float64. The mean is not subtracted.

    Args:
        tokens: [n, C].
        count: Number of eigenvectors.

    Returns:
        (components [C, count], each with a positive entry of largest magnitude; their shares of ‖Z‖² [count]).

    Raises:
        UserError: C is below `count`, or a token is not finite.
    """
    if tokens.shape[-1] < count:
        raise UserError(f"{count} components need {count} features, not {tokens.shape[-1]}: use a wider model")
    if not tokens.isfinite().all():
        raise UserError("the features hold NaN or infinity: check the model and the normalisation of its input")
    tokens = tokens.double()
    values, vectors = torch.linalg.eigh(tokens.T @ tokens)
    components = vectors.flip(-1)[:, :count]
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    shares = values.clamp(min=0).flip(0)[:count] / values.clamp(min=0).sum().clamp(min=1e-300)
    return components * largest.sign(), shares


class Foreground(NamedTuple):
    """Foreground patches, those with a large first component."""

    mask: Tensor  # boolean [J, P]
    projection: Tensor  # on the first component, float64 [J, P]
    explained: list[float]  # shares of ‖Z‖² explained by the first four components, or by all if there are fewer


def check_foreground(grid: tuple[int, int], threshold: float) -> None:
    """Raise a `UserError` for wrong settings of `foreground`."""
    if not threshold >= 0:
        raise UserError(f"threshold={threshold}: it must be at least 0")
    if min(grid) < 3:
        raise UserError(
            f"grid={grid} is too small, at least 3×3 patches are needed: use larger images (--image-size)"
        )


def foreground(features: Tensor, threshold: float = 0.5, grid: tuple[int, int] | None = None) -> Foreground:
    """Find the patches of J images whose projection on the common first component is at least λ (paper, B.2).

    This is σ_λ(⟨u₀, z⟩) > 0, with u₀ an eigenvector of the uncentred ZᵀZ. Its sign is chosen so that the mean
    projection of border patches does not exceed that of inner patches. A suitable λ depends on the features' norm;
    docs/results/evaluation.md has scores of λ = 1/2.

    Args:
        features: [J, P, C], patches in row-major order.
        threshold: λ, at least 0.
        grid: Rows and columns of patches, at least 3 each; a square when None.

    Raises:
        UserError: Shapes or settings do not fit.

    >>> features = torch.full((1, 16, 2), -1.0)
    >>> features[0, [5, 6, 9]] = 2.0
    >>> foreground(features).mask.nonzero()[:, 1].tolist()
    [5, 6, 9]
    """
    images, patches, width = features.shape
    grid = (round(patches**0.5),) * 2 if grid is None else grid
    check_foreground(grid, threshold)
    if grid[0] * grid[1] != patches:
        raise UserError(f"grid={grid} does not fit the {patches} patches: rows·columns must be {patches}")
    tokens = features.flatten(0, 1)
    components, explained = principal_components(tokens, min(4, width))
    projection = (tokens.double() @ components[:, 0]).view(images, *grid)
    inner = projection[:, 1:-1, 1:-1]
    border_mean = (projection.sum() - inner.sum()) / (projection.numel() - inner.numel())
    projection = (-projection if border_mean > inner.mean() else projection).flatten(1)  # objects are inside
    return Foreground((projection >= threshold) & (projection > 0), projection, explained.tolist())


def pca_rgb(features: Tensor, mask: Tensor | None = None, first: int = 1) -> Tensor:
    """Map three successive principal components of the chosen patches to colours (paper, Eq. 12).

    Args:
        features: [J, P, C].
        mask: The patches to analyse and colour, boolean [J, P]; all when None.
        first: The component shown in red, counted from 1.

    Returns:
        Colours, float32 [J, P, 3] in [0, 1]. In each channel, the 2nd and 98th percentiles over the chosen patches
        become 0 and 1. Other patches are 0.

    Raises:
        TooFewPatchesError: Fewer than first + 3 patches are chosen.
    """
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask
    tokens = features[mask].double()
    last = first + 2
    if len(tokens) < last + 1:
        raise TooFewPatchesError(
            f"{len(tokens)} of {mask.numel()} patches are above the threshold, too few for {last} components: lower "
            "--threshold, or show --components 2-4, which uses all patches"
        )
    components, _ = principal_components(tokens, last)
    values = tokens @ components[:, first - 1 :]
    low, high = torch.quantile(values, torch.tensor([0.02, 0.98]).to(values), dim=0)
    colours = torch.zeros(*mask.shape, 3, device=features.device)
    colours[mask] = ((values - low) / (high - low).clamp(min=_TINY)).clamp(0, 1).float()
    return colours


def component_colours(features: Tensor, grid: tuple[int, int], parts: bool = False) -> Tensor | None:
    """Return components 2 to 4 of all patches or, for `parts`, 1 to 3 of the foreground as colours [J, P, 3].

    Too few patches have no colours: None.
    """
    try:
        mask = foreground(features, grid=grid).mask if parts else None
        return pca_rgb(features, mask, first=1 if parts else 2)
    except TooFewPatchesError:
        return None


# --- the protocol


def evaluate(
    loaded: LoadedModel,
    batches: Iterable[Batch],
    layers: Sequence[int] | None = None,
    *,
    threshold: float = 0.5,
    first: int = 1,
) -> dict[str, list[dict]]:
    """Compute foreground and colours of every image at every chosen layer; the images share one PCA.

    Args:
        batches: All their features are kept in memory. Other arguments: see `crate_fast.eval`.
        threshold: See `foreground`.
        first: See `pca_rgb`; 1 colours the foreground only, a larger number colours all patches.

    Returns:
        "layers", a list of dictionaries, each with "layer";
        "explained" (see `Foreground`); "problem", None or the reason why there are no colours;
        "images", each with "name", "foreground_share" and, if an object covers a patch, "iou" of the foreground with
            the union of the objects and "constant_iou", that of a mask of all patches;
        "mean", these numbers averaged over images; None without values;
        "projections", an array [rows, columns] per image; "colours", an array [rows, columns, 3] or None per image.
    """
    layers = [loaded.extract.resolve_layer(layer) for layer in ([None] if layers is None else layers)]
    tokens: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    samples: list[Sample] = []
    for batch in batches:
        features = loaded.features(batch.images, layers)
        for layer, parts in tokens.items():
            parts.append(features.keys(layer).cpu())
        samples += batch.samples
    results, grid = [], loaded.extract.grid
    for layer, parts in tokens.items():
        features = torch.cat(parts)
        found = foreground(features, threshold, grid)
        result = {"layer": layer, "explained": found.explained, "problem": None}
        colours = [None] * len(samples)
        try:
            rgb = pca_rgb(features, found.mask if first == 1 else None, first)
            colours = list(rgb.unflatten(1, grid).numpy())
        except TooFewPatchesError as error:
            result["problem"] = str(error)
        images = [_image_scores(sample, mask, grid) for sample, mask in zip(samples, found.mask, strict=True)]
        result |= {"images": images, "mean": {}}
        for name in ("foreground_share", "iou", "constant_iou"):
            values = [image[name] for image in images if image[name] is not None]
            result["mean"][name] = sum(values) / len(values) if values else None
        result |= {"projections": list(found.projection.unflatten(1, grid).numpy()), "colours": colours}
        results.append(result)
    return {"layers": results}


def _image_scores(sample: Sample, mask: Tensor, grid: tuple[int, int]) -> dict:
    """Score the foreground of one image, a boolean mask [P]."""
    scores = {"name": str(sample.key), "foreground_share": mask.double().mean().item()}
    scores |= {"iou": None, "constant_iou": None}
    if sample.target is not None:
        masks, valid = sample.target.on_grid(grid)
        union = masks.any(dim=0)
        if union.any():
            scores["iou"] = intersection_over_union(mask, union, valid).item()
            scores["constant_iou"] = intersection_over_union(torch.ones_like(mask), union, valid).item()
    return scores


def _figure(
    columns: dict[str, dict], samples: Sequence[Sample], first: int, folder: Path, title: str | None
) -> list[Path]:
    """Draw one row per image, or two if component 1 is shown in grey, and one column per title."""
    colours = {name: [c if c is None else Picture(c) for c in result["colours"]] for name, result in columns.items()}
    rows, titles = image_rows(samples, colours)
    names = [short_name(sample) for sample in samples]
    if first == 1:
        return write_pages(rows, folder, "pca", names, titles, title)
    title = (f"{title}: " if title else "") + "component 1 in grey, 2 to 4 in colour"
    pairs = []
    projections = zip(*(result["projections"] for result in columns.values()), strict=True)
    for (image, *others), greys in zip(rows, projections, strict=True):
        others = others if titles[1] == "object" else [None, *others]
        pairs += [[image, *(Picture(grey, "gray") for grey in greys)], others]
    row_titles = [text for name in names for text in (name, "")]
    return write_pages(pairs, folder, "pca", row_titles, ["image", *columns], title)


def _command(options: argparse.Namespace) -> None:
    models = open_models(options)
    for loaded in models:
        check_foreground(loaded.extract.grid, options.threshold)
        for layer in () if options.layers in (None, "all") else options.layers:
            loaded.extract.resolve_layer(layer)
    evaluation = Evaluation("pca", options, models)
    first = int(options.components[0])
    settings = {"threshold": options.threshold, "first": first}
    results, rows, columns = {}, [], {}
    for loaded in models:
        samples: list[Sample] = []
        images = read_images(evaluation, loaded, samples, options.class_name)
        layers = range(loaded.extract.depth) if options.layers == "all" else options.layers
        outcome = evaluate(loaded, images, layers, **settings)["layers"]
        for result in outcome:
            shares = {f"component {i}": share for i, share in enumerate(result["explained"], start=1)}
            rows.append({"model": loaded.label, "layer": result["layer"]} | shares | result["mean"])
            if result["problem"]:
                where = f"{loaded.label}, layer {result['layer']}"
                print(f"no colours for {where}: {result['problem']}", file=sys.stderr)
        if len(outcome) > 1:
            by_layer = {f"layer {result['layer']}": result for result in outcome}
            evaluation.written += _figure(by_layer, samples, first, evaluation.model_folder(loaded), loaded.label)
        else:
            columns[f"{loaded.label}\nlayer {outcome[0]['layer']}"] = outcome[0]
        results[loaded.label] = {"layers": [{k: v for k, v in row.items() if k not in _DRAWN} for row in outcome]}
    if columns:
        evaluation.written += _figure(columns, samples, first, evaluation.folder, None)
    evaluation.write_table("pca", rows)
    evaluation.finish(results, settings)


main = main_of("eval pca", _command)
