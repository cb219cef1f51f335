"""What is measured of one checkpoint, at every layer: accuracy, coarse mIoU, MaskCut, R^c and sparsity."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crate_fast.eval import coarse_segmentation, maskcut, white_box
from crate_fast.eval.common.images import SceneImages, batches
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.principal_components import TooFewPatchesError, foreground, pca_rgb
from crate_fast.eval.emergence.protocol import Protocol

__all__ = ["SHOWN", "checkpoint_scores", "pictures", "shown_scenes"]

SHOWN = 8  # the first of the test scenes: in every figure
_BATCH = 50
_DIGITS = 6


def checkpoint_scores(subject: LoadedModel, protocol: Protocol) -> dict:
    """Every score of a model.

    Args:
        subject: The model at a checkpoint.
        protocol: Says how many scenes.

    Returns:
        "accuracy" on the test scenes; "selection" and "test", reading → "layers" (of each "best_head" and
        "per_head") and baselines, as in `segmentation.score_attention`; "maskcut", layer → box and mask AP50, AP75,
        AP, AR100 and "detections"; "white_box", of each layer R^c and sparsity where they mean something.
    """
    size = protocol.image_size
    test = SceneImages(size, protocol.test_images, protocol.test_seed)
    selection = SceneImages(size, protocol.selection_images, protocol.selection_seed)
    few = SceneImages(size, protocol.maskcut_images, protocol.test_seed)
    layers = list(range(subject.extract.depth))
    scores = {
        "accuracy": _accuracy(subject, test),
        "selection": _coarse(subject, selection),
        "test": _coarse(subject, test),
        "maskcut": {layer: _detection(n) for layer, n in maskcut.evaluate(subject, few, layers).items()},
        "white_box": _white_box(subject, few),
    }
    return _rounded(scores)


@torch.inference_mode()
def _accuracy(subject: LoadedModel, images: SceneImages) -> float:
    right = 0
    for batch in batches(images, _BATCH, []):
        found = subject.model(subject.normalize(batch.images.to(subject.device))).argmax(dim=1).cpu()
        right += int((found == torch.tensor([sample.target.classes[0] for sample in batch.samples])).sum())
    return right / len(images)


def _coarse(subject: LoadedModel, images: SceneImages) -> dict:
    scores = coarse_segmentation.evaluate(subject, images, batch_size=_BATCH)
    left_out = ("by_class", "fixed_head")  # the best head of these very images: the head is chosen elsewhere
    for result in scores.values():
        result["layers"] = [{k: v for k, v in row.items() if k not in left_out} for row in result["layers"]]
    return scores


def _detection(numbers: dict) -> dict:
    kinds = {"box": numbers["bbox"], "mask": numbers["segm"]}
    names = ("AP50", "AP75", "AP", "AR100")
    found = {f"{kind} {name}": 100 * scores[name] for kind, scores in kinds.items() for name in names}
    return found | {"detections": numbers["detections"]}


def _white_box(subject: LoadedModel, images: SceneImages) -> list[dict]:
    if len(white_box.left_out(subject.model)) == len(white_box.MEASURES):
        return []
    return white_box.evaluate(subject, batches(images, _BATCH, []))["layers"]


def _rounded(value):
    """Numbers at six digits behind the point, keys as text: what is written is what is in memory."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, _DIGITS) if isinstance(value, float) else value


def shown_scenes(protocol: Protocol) -> dict[str, np.ndarray]:
    """The first test scenes: "images" uint8 [8, S, S, 3], "masks" bool [8, S, S], "labels" [8]."""
    images = SceneImages(protocol.image_size, SHOWN, protocol.test_seed)
    samples = [images[number] for number in range(SHOWN)]
    return {
        "images": torch.stack([sample.image.permute(1, 2, 0) for sample in samples]).numpy(),
        "masks": torch.cat([sample.target.masks for sample in samples]).numpy(),
        "labels": np.array([sample.target.classes[0] for sample in samples]),
    }


@torch.inference_mode()
def pictures(subject: LoadedModel, protocol: Protocol, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """What the figures show of a model on the first test scenes, which share one analysis of components.

    Args:
        subject: The model at a checkpoint.
        protocol: The experiment.
        layers: Whose.

    Returns:
        "attention" float32 [layers, 8, heads, P]; "components" uint8 [layers, 8, P, 3], components 2 to 4 of all
        patches; "parts" uint8 [layers, 8, P, 3], the first three of the foreground, black elsewhere.
    """
    images = torch.from_numpy(shown_scenes(protocol)["images"]).permute(0, 3, 1, 2).to(subject.device)
    features = subject.extract(subject.normalize(images), list(layers))
    tokens = [features.keys(layer).cpu() for layer in layers]
    return {
        "attention": torch.stack([features.cls_attention(layer) for layer in layers]).float().cpu().numpy(),
        "components": np.stack([_bytes(pca_rgb(t, first=2)[0]) for t in tokens]),
        "parts": np.stack([_bytes(_parts(t, features.grid)) for t in tokens]),
    }


def _parts(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    try:
        return pca_rgb(tokens, foreground(tokens, grid=grid).mask)[0]
    except TooFewPatchesError:  # nothing is in the foreground, and nothing is shown
        return torch.zeros(*tokens.shape[:2], 3)


def _bytes(colours: Tensor) -> np.ndarray:
    return (255 * colours).round().byte().numpy()
