"""Masks and scores of attention maps for coarse segmentation (paper, §3.2 and B.3)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from crate_fast.errors import UserError

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
    if not 0 < fraction <= 1:
        raise UserError(f"fraction={fraction}: it must be in (0, 1]")
    values, order = attention.double().sort(dim=-1, descending=True, stable=True)
    if threshold == "topk":
        kept = torch.arange(values.shape[-1], device=values.device) < fraction * values.shape[-1] - 1e-9
        kept = kept.expand_as(values)
    else:
        before = values.cumsum(dim=-1) - values
        kept = before < fraction * values.sum(dim=-1, keepdim=True) - 1e-12
    return torch.zeros_like(kept).scatter(-1, order, kept)


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


def score_attention(
    batches: Iterable[tuple[dict[int, Tensor], Sequence[Tensor], Sequence[Tensor] | None]],
    fraction: float = 0.6,
    seed: int = 0,
) -> dict[str, dict]:
    """Score CLS attention and baselines against object masks on the patch grid: mean IoU and AP.

    The score of an object is the IoU of its mask with that of the best head (paper, Eq. 13). Scores are averaged over
    the objects of an image, then over images (Eq. 14). Average precision is averaged in the same way.

    Args:
        batches: For each batch: layer → CLS attention [B, H, P]; for each image the objects' masks, boolean [M, P],
            where M may be 0 (an object without a patch is counted and left out); for each image the patches that
            count, boolean [P], or None for all.
        fraction: See `attention_to_mask`.
        seed: Seed of the random maps.

    Returns:
        For each of `READINGS` (IoU with "topk" and "mass" masks, and "ap") a dictionary with
        "layers": for each, "layer"; "best_head", with the best head of each object (as in the paper); "per_head",
            with one head for all images; "fixed_head", the largest of these;
        baselines: "constant", a mask of all patches; "random", the best of as many random maps as heads; "mean_mask",
            the objects' mean mask as the map of every image; "true_mask", the true mask as map;
        "fraction" (None for "ap"); numbers of scored "images" and "objects", of images "without_objects", and of
            objects left out, "objects_without_patch".

    Raises:
        UserError: The fraction is out of range.
        NoObjectsError: No object covers a patch.
    """
    generator = torch.Generator().manual_seed(seed)
    scored: dict[str, dict[int | str, list[Tensor]]] = {reading: {} for reading in READINGS}  # of [T, H] or [T]
    objects: list[tuple[Tensor, ...]] = []  # masks, valid patches and weights of a batch's objects
    counts = {"images": 0, "objects": 0, "without_objects": 0, "objects_without_patch": 0}

    def read(reading: str, maps: Tensor) -> Tensor:
        return attention_to_mask(maps, reading, fraction) if reading in THRESHOLDS else maps

    for maps, targets, valid in batches:
        target = torch.cat(list(targets)).cpu()
        seen = target.any(dim=1)
        owner = torch.repeat_interleave(torch.arange(len(targets)), torch.tensor(list(map(len, targets))))[seen]
        target, of_image = target[seen], torch.bincount(owner, minlength=len(targets))
        heads, n_patches = next(iter(maps.values())).shape[1:]
        noise = torch.rand((len(targets), heads, n_patches), generator=generator)  # drawn for every image
        counts["images"] += int((of_image > 0).sum())
        counts["objects"] += len(target)
        counts["without_objects"] += int((of_image == 0).sum())
        counts["objects_without_patch"] += int((~seen).sum())
        if not len(target):
            continue
        valid = torch.ones(len(targets), n_patches, dtype=torch.bool) if valid is None else torch.stack(list(valid))
        valid = valid.cpu()[owner]
        objects.append((target, valid, 1 / of_image[owner].double()))
        for reading, parts in scored.items():
            for layer, attention in [*maps.items(), ("random", noise)]:
                chosen = read(reading, attention.float().cpu())[owner]
                scores = _SCORES[reading](chosen, target.unsqueeze(1), valid.unsqueeze(1))
                parts.setdefault(layer, []).append(scores)
            parts.setdefault("true_mask", []).append(_SCORES[reading](read(reading, target.float()), target, valid))
    if not objects:
        raise NoObjectsError(
            f"none of the {counts['without_objects']} images has an object that covers a patch: use images with "
            "objects, or a larger --image-size for a finer grid"
        )
    target, valid, weights = map(torch.cat, zip(*objects, strict=True))
    mean_mask = (target.double() * weights.unsqueeze(1)).sum(dim=0) / weights.sum()

    def mean(values: Tensor) -> float:
        return float((values.double() * weights).sum() / weights.sum())

    def row(layer: int, per_head: Tensor) -> dict:
        heads, best = [mean(head) for head in per_head.T], mean(per_head.amax(dim=1))
        return {"layer": layer, "best_head": best, "fixed_head": max(heads), "per_head": heads}

    found = {}
    for reading, parts in scored.items():
        layers = {name: torch.cat(scores) for name, scores in parts.items()}
        random, true = layers.pop("random").amax(dim=1), layers.pop("true_mask")
        found[reading] = {
            "layers": [row(layer, per_head) for layer, per_head in layers.items()],
            # for a constant map the IoU of all patches equals the average precision
            "constant": mean(intersection_over_union(torch.ones_like(target), target, valid)),
            "random": mean(random),
            "mean_mask": mean(_SCORES[reading](read(reading, mean_mask), target, valid)),
            "true_mask": mean(true),
            "fraction": fraction if reading in THRESHOLDS else None,
            **counts,
        }
    return found


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
