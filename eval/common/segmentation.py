"""Masks and scores of attention maps for coarse segmentation (paper, §3.2 and B.3)."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_fast.errors import UserError
from crate_fast.whitebox import trace

THRESHOLDS = ("topk", "mass")
READINGS = (*THRESHOLDS, "ap")  # IoU of two kinds of masks; average precision, without a threshold


class NoObjectsError(UserError):
    """No image has an object for scoring attention maps."""


def attention_to_mask(attention: Tensor, threshold: str = "topk", fraction: float = 0.6) -> Tensor:
    """Keep the strongest patches of each map.

    Args:
        attention: [..., P], non-negative weights over P patches.
        threshold: "topk" keeps ⌈fraction·P⌉ entries (the paper's text). "mass" keeps the largest entries until they
            hold at least `fraction` of the sum (DINO's code, within one entry).
        fraction: In (0, 1].

    Returns:
        Boolean masks [..., P].

    Raises:
        UserError: The threshold is unknown or the fraction is out of range.

    >>> attention_to_mask(torch.tensor([0.7, 0.1, 0.2]), "mass", 0.8)
    tensor([ True, False,  True])
    """
    if threshold not in THRESHOLDS:
        raise UserError(f"threshold={threshold!r}: choose one of {', '.join(map(repr, THRESHOLDS))}")
    _check_fraction(fraction)
    values, order = attention.double().sort(dim=-1, descending=True, stable=True)
    if threshold == "topk":
        kept = torch.arange(values.shape[-1], device=values.device) < fraction * values.shape[-1] - 1e-9
        kept = kept.expand_as(values)
    else:
        before = values.cumsum(dim=-1) - values
        kept = before < fraction * values.sum(dim=-1, keepdim=True) - 1e-12
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise UserError(f"fraction={fraction}: it must be in (0, 1]")


def mask_to_grid(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reduce pixel masks [B, H, W] to patch masks [B, rows·columns]; a patch is True if at least half of it is."""
    return (F.adaptive_avg_pool2d(masks.float(), grid) >= 0.5).flatten(1)


def intersection_over_union(predicted: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return |predicted ∩ target| / |predicted ∪ target| over the last dimension, float32; 0 where both are empty.

    Args:
        predicted, target: Boolean [..., P], broadcast against each other.
        valid: Boolean [..., P]; entries to count, all when None.
    """
    valid = torch.ones_like(target) if valid is None else valid
    intersection = (predicted & target & valid).sum(dim=-1)
    union = ((predicted | target) & valid).sum(dim=-1)
    return intersection / union.clamp(min=1)


def average_precision(weights: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the average precision of patches ranked by weight.

    The precision at an object patch is the object's share of the patches with at least its weight; it is averaged
    over the object's patches. Only the order of the weights matters, so maps of a whole object and of its parts are
    comparable (Choe et al., *Evaluating Weakly Supervised Object Localization Methods Right*, 2020).

    Args:
        weights: [..., P].
        target: Boolean [..., P], broadcast against the weights.
        valid: Boolean [..., P]; entries to count, all when None.

    Returns:
        float64 [...] in [0, 1]; 0 without an object.

    >>> average_precision(torch.tensor([0.5, 0.3, 0.1, 0.1]), torch.tensor([True, False, True, False]))
    tensor(0.7500, dtype=torch.float64)
    """
    weights, target = torch.broadcast_tensors(weights.double(), target)
    if valid is not None:
        weights, target = weights.where(valid, -torch.inf), target & valid
    values, order = weights.sort(dim=-1, descending=True)
    hits = target.gather(-1, order)
    ranks = torch.arange(1, values.shape[-1] + 1, device=values.device)
    ends = torch.cat([values[..., 1:] != values[..., :-1], torch.ones_like(target[..., :1])], dim=-1)
    end = ranks.where(ends, len(ranks)).flip(-1).cummin(-1).values.flip(-1)  # last rank of equal weights
    precision = hits.cumsum(-1).gather(-1, end - 1) / end
    return (precision * hits).sum(-1).double() / hits.sum(-1).clamp(min=1)


_SCORES = {"topk": intersection_over_union, "mass": intersection_over_union, "ap": average_precision}


class AttentionScores:
    """Accumulator of attention-map scores on objects, with baselines.

    The score of an object is the IoU of its mask with that of the best head (paper, Eq. 13). Scores are averaged over
    the objects of an image, then over images (Eq. 14). Average precision is averaged in the same way.

    Args:
        fraction: See `attention_to_mask`.
        seed: Seed of the random maps.

    Raises:
        UserError: The fraction is out of range.
    """

    def __init__(self, fraction: float = 0.6, seed: int = 0):
        _check_fraction(fraction)
        self.fraction = fraction
        self._generator = torch.Generator().manual_seed(seed)
        self._scores: dict[tuple[str, int | str], list[Tensor]] = {}  # (reading, layer or baseline) → [T, H] or [T]
        self._objects: list[tuple[Tensor, ...]] = []  # masks, valid patches and weights of a batch's objects
        self.images = self.without_objects = self.objects_without_patch = 0

    def add(self, maps: dict[int, Tensor], targets: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> None:
        """Score a batch.

        Args:
            maps: Layer → CLS attention [B, H, P].
            targets: For each image the objects' masks on the patch grid, boolean [M, P]; M may be 0. An object
                without a patch is counted and left out.
            valid: For each image the patches that count, boolean [P]; all when None.
        """
        target = torch.cat(list(targets)).cpu()
        seen = target.any(dim=1)
        owner = torch.repeat_interleave(torch.arange(len(targets)), torch.tensor(list(map(len, targets))))[seen]
        target, counts = target[seen], torch.bincount(owner, minlength=len(targets))
        heads, n_patches = next(iter(maps.values())).shape[1:]
        noise = torch.rand((len(counts), heads, n_patches), generator=self._generator)  # drawn for every image
        self.objects_without_patch += int((~seen).sum())
        self.images += int((counts > 0).sum())
        self.without_objects += int((counts == 0).sum())
        if not len(target):
            return
        valid = torch.ones(len(counts), n_patches, dtype=torch.bool) if valid is None else torch.stack(list(valid))
        valid = valid.cpu()[owner]
        self._objects.append((target, valid, 1 / counts[owner].double()))
        for reading in READINGS:
            for layer, attention in [*maps.items(), ("random", noise)]:
                scored = self._read(reading, attention.float().cpu())[owner]
                scores = _SCORES[reading](scored, target.unsqueeze(1), valid.unsqueeze(1))
                self._scores.setdefault((reading, layer), []).append(scores)
            true = _SCORES[reading](self._read(reading, target.float()), target, valid)
            self._scores.setdefault((reading, "true_mask"), []).append(true)

    def _read(self, reading: str, maps: Tensor) -> Tensor:
        return attention_to_mask(maps, reading, self.fraction) if reading in THRESHOLDS else maps

    def result(self) -> dict[str, dict]:
        """Return the scores of `score_attention`."""
        if not self.images:
            raise NoObjectsError(
                f"none of the {self.without_objects} images has an object that covers a patch: use images with "
                "objects, or a larger --image-size for a finer grid"
            )
        target, valid, weights = map(torch.cat, zip(*self._objects, strict=True))
        mean_mask = (target.double() * weights.unsqueeze(1)).sum(dim=0) / weights.sum()

        def mean(values: Tensor) -> float:
            return float((values.double() * weights).sum() / weights.sum())

        def row(layer: int, per_head: Tensor) -> dict:
            heads, best = [mean(head) for head in per_head.T], mean(per_head.amax(dim=1))
            return {"layer": layer, "best_head": best, "fixed_head": max(heads), "per_head": heads}

        found = {}
        for reading in READINGS:
            scores = {name: torch.cat(parts) for (read, name), parts in self._scores.items() if read == reading}
            random, true = scores.pop("random").amax(dim=1), scores.pop("true_mask")
            found[reading] = {
                "layers": [row(layer, per_head) for layer, per_head in scores.items()],
                # for a constant map the IoU of all patches equals the average precision
                "constant": mean(intersection_over_union(torch.ones_like(target), target, valid)),
                "random": mean(random),
                "mean_mask": mean(_SCORES[reading](self._read(reading, mean_mask), target, valid)),
                "true_mask": mean(true),
                "fraction": self.fraction if reading in THRESHOLDS else None,
                "images": self.images,
                "objects": len(target),
                "without_objects": self.without_objects,
                "objects_without_patch": self.objects_without_patch,
            }
        return found


@torch.inference_mode()
def score_attention(
    model: nn.Module, batches: Iterable[Sequence[Tensor]], normalize: Callable[[Tensor], Tensor]
) -> dict[str, dict]:
    """Score CLS attention of a CRATE and baselines against object masks on the patch grid: mean IoU and AP.

    `batches` hold images, labels (unused), and pixel masks [B, H, W]. The model is left in evaluation mode.

    Returns:
        For each of `READINGS` (IoU with "topk" and "mass" masks, and "ap") a dictionary with
        "layers": for each, "layer"; "best_head", with the best head of each image (as in the paper); "per_head", with
            one head for all images; "fixed_head", the largest of these;
        baselines: "constant", a mask of all patches; "random", the best of as many random maps as heads; "mean_mask",
            the objects' mean mask as the map of every image; "true_mask", the true mask as map;
        "fraction" (None for "ap"); numbers of scored "images" and "objects", of images "without_objects", and of
            objects left out, "objects_without_patch".
    """
    model.eval()
    device = next(model.parameters()).device
    scores = AttentionScores()
    for images, _, masks in batches:
        maps = {layer.index: layer.cls_attention() for layer in trace(model, normalize(images.to(device)))}
        scores.add(maps, [mask[None] for mask in mask_to_grid(masks, model.grid_size)])
    return scores.result()


def scores_table(scores: dict[str, dict], marked: int | None = None) -> str:
    """Format the scores of `score_attention` as text; the layer `marked` gets a star."""
    lines = []
    for reading, result in scores.items():
        name = "AP, patches by weight" if reading == "ap" else f"mIoU, {reading} {result['fraction']:.0%}"
        lines.append(
            f"attention {name}, {result['images']} images | "
            f"constant mask {result['constant']:.3f} · random maps {result['random']:.3f} · "
            f"mean mask {result['mean_mask']:.3f} · true mask {result['true_mask']:.3f}"
        )
        for row in result["layers"]:
            star = "*" if row["layer"] == marked else " "
            lines.append(
                f"  layer {row['layer']:2d}{star}  best head {row['best_head']:.3f}   "
                f"one head for all images {row['fixed_head']:.3f}"
            )
    return "\n".join(lines)
