"""Principal components of patch features: foreground, and parts as colours (paper, Fig. 3, 6, 9, 10 and B.2).

    crate-fast eval pca runs/NAME runs/VIT --data coco:PATH --class horse     a column per model (Fig. 3)
    crate-fast eval pca runs/NAME --data folder:PATH --layers all             a column per layer (Fig. 9)
    crate-fast eval pca runs/NAME --data folder:PATH --layers 0,3,6 --components 2-4   component 1 in grey, 2 to 4 in
                                                                              colour, nothing left out (Fig. 6)
    crate-fast eval pca A=runs/NAME@1000 B=runs/NAME@9000 --data folder:PATH  a column per checkpoint (Fig. 10)

The images share one analysis (`--group N`: N at a time) and should show one kind of object: one colour is then one
part of all of them. Features are the subspace tokens of CRATE and the keys of a ViT, all heads concatenated. Writes
pca_01.png and .pdf (and 02, …: eight rows a page; one figure per model where layers are columns), results.json and a
table.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.eval.common.command import Evaluation, open_models, read_images
from crate_fast.eval.common.figures import Picture, image_rows, short_name, write_pages
from crate_fast.eval.common.images import Batch, Sample
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.principal_components import (
    TooFewPatchesError,
    check_foreground,
    foreground,
    pca_rgb,
)
from crate_fast.eval.common.segmentation import intersection_over_union
from crate_fast.options import main_of

__all__ = ["TooFewPatchesError", "evaluate", "foreground", "main", "pca_rgb"]


@torch.no_grad()
def evaluate(
    loaded: LoadedModel,
    batches: Iterable[Batch],
    layers: Sequence[int] | None = None,
    *,
    threshold: float = 0.5,
    scaling: str = "raw",
    first: int = 1,
    group: int | None = None,
) -> dict[str, list[dict]]:
    """Compute foreground and colours of every image at every chosen layer.

    Args:
        batches: Their features are held in memory. Other arguments: see `crate_fast.eval`.
        threshold, scaling: See `foreground`; "minmax" also centres the features for the colours.
        first: See `pca_rgb`; 1 colours the foreground, from 2 on all patches are coloured.
        group: Images that are analysed together; all when None.

    Returns:
        "layers", a list of dictionaries, each with "layer";
        "groups", each with "images" (names), "explained" (`Foreground`), "explained_colours" (`pca_rgb`) and
            "problem": None, or why there are no colours (too few patches; the other values hold nevertheless);
        "images", each with "name", "foreground_share" and, where it has objects of a patch's size, "iou" of the
            foreground with their union and "constant_iou", that of a mask with every patch;
        "mean", these numbers averaged over images (and "explained" over groups), None where there are none;
        "projections", for each image an array [rows, columns]; "colours", for each an array [rows, columns, 3] or
            None.
    """
    layers = [loaded.extract.resolve_layer(layer) for layer in ([None] if layers is None else layers)]
    tokens: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    samples: list[Sample] = []
    for batch in batches:
        features = loaded.features(batch.images, layers)
        for layer in tokens:
            tokens[layer].append(features.keys(layer).cpu())
            if tokens[layer][-1].shape[-1] < first + 2:
                width = tokens[layer][-1].shape[-1]
                raise UserError(f"features of {width} entries have no {first + 2} components: use a wider model")
        samples += batch.samples
    results = []
    size = group or len(samples)
    for layer, parts in tokens.items():
        result = {"layer": layer, "groups": [], "images": [], "projections": [], "colours": []}
        for number, features in enumerate(torch.cat(parts).split(size)):
            settings = (threshold, scaling, first, loaded.extract.grid)
            _add_group(result, features, samples[number * size :][:size], *settings)
        result["mean"] = {}
        for name in ("foreground_share", "iou", "constant_iou"):
            values = [image[name] for image in result["images"] if image[name] is not None]
            result["mean"][name] = sum(values) / len(values) if values else None
        explained = zip(*(group["explained"] for group in result["groups"]), strict=True)
        result["mean"]["explained"] = [sum(shares) / len(shares) for shares in explained]
        results.append(result)
    return {"layers": results}


def _add_group(result: dict, features: Tensor, samples: Sequence[Sample], threshold, scaling, first, grid) -> None:
    found = foreground(features, threshold, scaling, grid)
    group = {"images": [str(sample.key) for sample in samples], "explained": found.explained}
    try:
        colours, shares = pca_rgb(features, found.mask if first == 1 else None, first, scaling == "minmax")
        group |= {"explained_colours": shares, "problem": None}
        result["colours"] += list(colours.unflatten(1, grid).numpy())
    except TooFewPatchesError as error:
        group |= {"explained_colours": None, "problem": str(error)}
        result["colours"] += [None] * len(samples)
    result["groups"].append(group)
    result["projections"] += list(found.projection.unflatten(1, grid).numpy())
    result["images"] += [_describe(sample, mask, grid) for sample, mask in zip(samples, found.mask, strict=True)]


def _describe(sample: Sample, mask: Tensor, grid: tuple[int, int]) -> dict:
    scores = {"iou": None, "constant_iou": None}
    if sample.target is not None:
        masks, valid = sample.target.on_grid(grid)
        union = masks.any(dim=0)
        if union.any():
            predicted = {"iou": mask, "constant_iou": torch.ones_like(mask)}
            scores = {name: intersection_over_union(p, union, valid).item() for name, p in predicted.items()}
    return {"name": str(sample.key), "foreground_share": mask.double().mean().item()} | scores


def _figure(
    columns: dict[str, dict], samples: Sequence[Sample], first: int, folder: Path, title: str | None
) -> list[Path]:
    """Draw a row per image and a column per title; two rows where component 1 is shown in grey."""
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


def _row(label: str, result: dict) -> dict:
    mean = dict(result["mean"])
    shares = {f"component {i}": share for i, share in enumerate(mean.pop("explained"), start=1)}
    columns = {"foreground": mean["foreground_share"], "IoU": mean["iou"], "constant IoU": mean["constant_iou"]}
    return {"model": label, "layer": result["layer"]} | shares | columns


def _command(options) -> None:
    models = open_models(options)
    for loaded in models:
        check_foreground(loaded.extract.grid, options.threshold, options.scaling)
        for layer in () if options.layers in (None, "all") else options.layers:
            loaded.extract.resolve_layer(layer)
    evaluation = Evaluation("pca", options, models)
    first = int(options.components[0])
    settings = {"threshold": options.threshold, "scaling": options.scaling, "first": first, "group": options.group}
    results, rows, columns = {}, [], {}
    for loaded in models:
        samples: list[Sample] = []
        images = read_images(evaluation, loaded, samples, options.class_name)
        layers = range(loaded.extract.depth) if options.layers == "all" else options.layers
        outcome = evaluate(loaded, images, layers, **settings)["layers"]
        _warn(loaded.label, outcome)
        if len(outcome) > 1:
            by_layer = {f"layer {result['layer']}": result for result in outcome}
            evaluation.written += _figure(by_layer, samples, first, evaluation.model_folder(loaded), loaded.label)
        else:
            columns[f"{loaded.label}\nlayer {outcome[0]['layer']}"] = outcome[0]
        rows += [_row(loaded.label, result) for result in outcome]
        results[loaded.label] = {"layers": outcome}
    if columns:
        evaluation.written += _figure(columns, samples, first, evaluation.folder, None)
    for result in (layer for outcome in results.values() for layer in outcome["layers"]):
        del result["projections"], result["colours"]
    evaluation.write_table("pca", rows)
    evaluation.finish(results, settings)


def _warn(label: str, outcome: Sequence[dict]) -> None:
    for result in outcome:
        for group in result["groups"]:
            if group["problem"]:
                where = f"layer {result['layer']}, images {group['images'][0]} to {group['images'][-1]}"
                print(f"no colours for {label}, {where}: {group['problem']}", file=sys.stderr)


main = main_of("eval pca", _command)
