"""Coarse segmentation: do CLS attention maps cover the objects (paper, §3.2, B.3; Fig. 4)?

Each semantic class of an image is an object, scored on the patch grid with the head of the largest IoU. Scores are
averaged over the objects of an image, then over images. Void patches, the background, and objects that cover no patch
are not scored. "The top 60 %" is read as entries (`topk`, the paper's text) and as mass (`mass`, DINO's code). Both
depend on how far a map spreads; the average precision of patches ranked by attention does not. Random and constant
maps are scored for comparison.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from crate_fast.errors import UserError
from crate_fast.eval.common import segmentation
from crate_fast.eval.common.command import Evaluation, attention_layers, open_data, open_models
from crate_fast.eval.common.figures import Picture, image_rows, write_pages
from crate_fast.eval.common.images import batches, readable
from crate_fast.eval.common.models import LoadedModel
from crate_fast.options import main_of

NAMES = {"topk": "mIoU topk", "mass": "mIoU mass", "ap": "attention AP"}  # reading → name in tables


def evaluate(
    loaded: LoadedModel,
    images: Dataset,
    layers: Sequence[int] | None = None,
    fraction: float = 0.6,
    seed: int = 0,
    **reading,
) -> dict[str, dict]:
    """Score the CLS attention of layers, with both thresholds and by average precision.

    Args:
        fraction: Share of entries or mass kept. Other arguments: see `crate_fast.eval`.

    Returns:
        See `segmentation.score_attention`.

    Raises:
        UserError: No image can be scored.
    """
    layers = loaded.extract.resolve_layers(layers)

    def read() -> Iterator[tuple]:
        for batch in batches(images, **reading):
            features = loaded.features(batch.images, list(layers))
            maps = {layer: features.cls_attention(layer) for layer in features.layers}
            targets = [sample.target.on_grid(features.grid) for sample in batch.samples]
            yield maps, *zip(*targets, strict=True)

    return segmentation.score_attention(read(), fraction, seed)


def _figure(
    shown: Sequence[tuple[LoadedModel, Dataset, int]], threshold: str, options: argparse.Namespace, folder: Path
) -> list[Path]:
    """Draw the first readable images, their objects and each model's mask of the largest IoU (paper, Fig. 4a)."""
    first = list(itertools.islice(readable(shown[0][1]), options.figure_images))
    columns: dict[str, list[Picture]] = {}
    for loaded, images, layer in shown:
        pictures = columns[f"{loaded.label}, layer {layer}"] = []
        for sample in (images[number] for number, _ in first):
            features = loaded.features(sample.image[None], [layer])
            attention = features.cls_attention(layer)[0].cpu()
            masks = segmentation.attention_to_mask(attention, threshold, options.fraction)
            objects, valid = sample.target.on_grid(features.grid)
            head = segmentation.intersection_over_union(masks, objects.any(dim=0), valid).argmax()
            pictures.append(Picture(masks[head].view(features.grid).float().numpy(), "gray", (0, 1)))
    rows, titles = image_rows([sample for _, sample in first], columns)
    return write_pages(rows, folder, f"masks_{threshold}", None, titles)


def _command(options: argparse.Namespace) -> None:
    models = open_models(options)
    layers = [attention_layers(options, loaded) for loaded in models]
    data = [open_data(options, loaded) for loaded in models]
    if not data[0].labelled:
        raise UserError(f"--data {options.data} has no object masks: use voc:PATH, coco:PATH or shape_scenes")
    evaluation = Evaluation("coarse_segmentation", options, models)
    results, rows = {}, []
    for loaded, images, (wanted, _) in zip(models, data, layers, strict=True):
        reading = evaluation.reading(loaded.label)
        scores = evaluate(loaded, images, wanted, options.fraction, options.seed, **reading)
        print(f"{loaded.label}\n{segmentation.scores_table(scores, loaded.extract.default_layer)}")
        results[loaded.label] = scores
    for loaded, reading in itertools.product(models, segmentation.READINGS):
        scores, known = results[loaded.label][reading], {"model": loaded.label, "score": NAMES[reading]}
        equal = {name.replace("_", " "): n for name, n in scores.items() if name not in ("layers", "fraction")}
        for row in scores["layers"]:
            star = " *" * (row["layer"] == loaded.extract.default_layer)
            heads = {"best head": row["best_head"], "one head for all": row["fixed_head"]}
            rows.append(known | {"layer": f"{row['layer']}{star}"} | heads | equal)
    if len({(result["topk"]["images"], result["topk"]["objects"]) for result in results.values()}) > 1:
        print("The models have different patch grids, so their scores do not cover the same objects.")
    evaluation.write_table("table", rows, show=False)
    shown = [(loaded, images, layer) for loaded, images, (_, layer) in zip(models, data, layers, strict=True)]
    for threshold in segmentation.THRESHOLDS:
        evaluation.written += _figure(shown, threshold, options, evaluation.folder)
    evaluation.finish(results, notes=["* the default layer (the paper's for CRATE and ViT)"])


main = main_of("eval coarse_segmentation", _command)
