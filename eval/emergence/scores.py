"""Scores and pictures of one checkpoint of the experiment."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from crate_fast.eval import coarse_segmentation, localization, maskcut, white_box
from crate_fast.eval.common.images import batches
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.emergence.data import PhotographData, spread
from crate_fast.eval.pca import component_colours

_BATCH = 50
_DIGITS = 6  # decimals of saved scores


def checkpoint_scores(loaded: LoadedModel, data: PhotographData) -> dict:
    """Score a model at every layer.

    Returns:
        "accuracy" on the readable test images, and "classified", their number; "selection" and "test", reading →
        "layers" ("best_head" and "per_head" of each) and baselines, as in `segmentation.score_attention`;
        "white_box", R^c and sparsity of each layer, empty for models without subspaces and ISTA.
    """
    few = spread(data.test, data.protocol.maskcut_images)
    scores = {
        **_accuracy(loaded, data.classified),
        "selection": _segmentation(loaded, data.selection),
        "test": _segmentation(loaded, data.test),
        "white_box": white_box.evaluate(loaded, batches(few, _BATCH))["layers"],
    }
    return _rounded(scores)


def mask_scores(loaded: LoadedModel, data: PhotographData) -> dict:
    """Score a model, opened at their size, on the photographs with masks: "masks" (like "test") and "maskcut"."""
    found = maskcut.evaluate(loaded, data.with_masks, list(range(loaded.extract.depth)))
    boxes = {n: maskcut.in_percent(scores) | {"detections": scores["detections"]} for n, scores in found.items()}
    return _rounded({"masks": _segmentation(loaded, data.with_masks), "maskcut": boxes})


def box_scores(loaded: LoadedModel, data: PhotographData) -> dict:
    """Score a model's boxes as `crate-fast eval localization` does: "boxes", its result without "per_head"."""
    found = localization.evaluate(loaded, spread(data.test, data.protocol.box_images), batch_size=_BATCH)
    for row in found["layers"]:
        del row["per_head"]
    return _rounded({"boxes": found})


@torch.inference_mode()
def _accuracy(loaded: LoadedModel, images: Dataset) -> dict:
    right: list[bool] = []
    for batch in batches(images, _BATCH):
        found = loaded.model(loaded.normalize(batch.images.to(loaded.device))).argmax(dim=1).tolist()
        right += [n == sample.target.classes[0] for n, sample in zip(found, batch.samples, strict=True)]
    return {"accuracy": sum(right) / len(right), "classified": len(right)}


def _segmentation(loaded: LoadedModel, images: Dataset) -> dict:
    scores = coarse_segmentation.evaluate(loaded, images, batch_size=_BATCH)
    for result in scores.values():
        for row in result["layers"]:
            del row["fixed_head"]  # chosen on the scored images; ours is chosen on the selection images
    return scores


def _rounded(scores: dict) -> dict:
    """Return scores as JSON values with rounded floats."""
    return json.loads(json.dumps(scores), parse_float=lambda text: round(float(text), _DIGITS))


def pictures(loaded: LoadedModel, shown: np.ndarray, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """Return a model's arrays for the figures of images uint8 [8, S, S, 3], which share one PCA.

    "attention" is float32 [layers, 8, heads, P]; "components" uint8 [layers, 8, P, 3], components 2 to 4 of all
    patches; "parts" uint8 [layers, 8, P, 3], the first three of the foreground, black elsewhere.
    """
    features = loaded.features(torch.from_numpy(shown).permute(0, 3, 1, 2), layers)
    attention, components, parts = [], [], []
    for layer in layers:
        attention.append(features.cls_attention(layer).float().cpu())
        tokens = features.keys(layer).cpu()
        components.append(component_colours(tokens, features.grid))
        found = component_colours(tokens, features.grid, parts=True)
        parts.append(torch.zeros_like(components[-1]) if found is None else found)  # no foreground: all black
    colours = {"components": torch.stack(components), "parts": torch.stack(parts)}
    return {"attention": torch.stack(attention).numpy()} | {
        name: (255 * values).round().byte().numpy() for name, values in colours.items()
    }
