"""From an attention map to a mask and a score: the arithmetic of coarse segmentation (paper, §3.2 and B.3)."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_fast.whitebox import trace

__all__ = [
    "AttentionScores",
    "NoObjectsError",
    "attention_to_mask",
    "intersection_over_union",
    "mask_to_grid",
    "score_attention",
    "scores_table",
]

THRESHOLDS = ("topk", "mass")


class NoObjectsError(ValueError):
    """There is nothing to score attention maps by."""


def attention_to_mask(attention: Tensor, threshold: str = "topk", fraction: float = 0.6) -> Tensor:
    """Keep the strongest patches of each map.

    Args:
        attention: [..., P], non-negative weights over P patches.
        threshold: "topk" keeps ⌈fraction·P⌉ entries (the paper's words); "mass" keeps the fewest largest entries that
            hold at least `fraction` of the sum (DINO's code, within one entry).
        fraction: In (0, 1].

    Returns:
        Boolean masks [..., P].

    Raises:
        ValueError: The threshold is misspelt or the fraction out of range.

    >>> attention_to_mask(torch.tensor([0.7, 0.1, 0.2]), "mass", 0.8)
    tensor([ True, False,  True])
    """
    if threshold not in THRESHOLDS:
        raise ValueError(f"threshold={threshold!r}: choose one of {', '.join(map(repr, THRESHOLDS))}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: it must be in (0, 1]")
    values, order = attention.double().sort(dim=-1, descending=True, stable=True)
    if threshold == "topk":
        kept = torch.arange(values.shape[-1], device=values.device) < fraction * values.shape[-1] - 1e-9
        kept = kept.expand_as(values)
    else:
        before = values.cumsum(dim=-1) - values
        kept = before < fraction * values.sum(dim=-1, keepdim=True) - 1e-12
    return torch.zeros_like(kept).scatter(-1, order, kept)


def mask_to_grid(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixel masks [B, H, W] → patch masks [B, rows·columns]: a patch is object where at least half of it is."""
    covered = F.adaptive_avg_pool2d(masks.float().unsqueeze(1), grid)
    return (covered >= 0.5).flatten(1)


def intersection_over_union(predicted: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """|predicted ∩ target| / |predicted ∪ target| over the last dimension; 0 where both are empty.

    Args:
        predicted, target: Boolean [..., P], broadcast against each other.
        valid: Boolean [..., P]; entries to count, all when None.

    Returns:
        IoU [...], float32.
    """
    valid = torch.ones_like(target) if valid is None else valid
    intersection = (predicted & target & valid).sum(dim=-1)
    union = ((predicted | target) & valid).sum(dim=-1)
    return intersection / union.clamp(min=1)


class AttentionScores:
    """Adds up how well attention maps cover objects, batch by batch, beside what they must beat.

    A score is the IoU of a map's mask with an object's, of the best head for each object (paper, Eq. 13), averaged
    over the objects of an image and then over images (Eq. 14).

    Args:
        fraction: See `attention_to_mask`.
        seed: Of the random maps.
    """

    def __init__(self, fraction: float = 0.6, seed: int = 0):
        self.fraction = fraction
        self._generator = torch.Generator().manual_seed(seed)
        self._per_head: dict[tuple[str, int], list[Tensor]] = {}  # (threshold, layer) → IoU [T, H] a batch
        self._baselines: dict[tuple[str, str], list[Tensor]] = {}
        self._targets: list[Tensor] = []
        self._valid: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._labels: list[int] = []
        self.images = self.without_objects = self.objects_without_patch = 0

    def add(
        self,
        maps: dict[int, Tensor],
        targets: Sequence[Tensor],
        valid: Sequence[Tensor] | None = None,
        labels: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Score a batch.

        Args:
            maps: Layer → CLS attention [B, H, P].
            targets: Of each image its objects' masks on the patch grid, boolean [M, P]; M may be 0. An object without
                a patch cannot be scored: it is counted and left out.
            valid: Of each image the patches that count, boolean [P]; all when None.
            labels: Of each image its objects' class numbers, for scores by class.
        """
        kept = [target.any(dim=1) for target in targets]
        self.objects_without_patch += sum(int((~keep).sum()) for keep in kept)
        targets = [target[keep] for target, keep in zip(targets, kept, strict=True)]
        counts = torch.tensor([len(target) for target in targets])
        heads, n_patches = next(iter(maps.values())).shape[1:]
        noise = torch.rand((len(counts), heads, n_patches), generator=self._generator)  # drawn for every image
        self.images += int((counts > 0).sum())
        self.without_objects += int((counts == 0).sum())
        if not counts.sum():
            return
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        target = torch.cat(list(targets)).cpu()
        valid = [torch.ones(target.shape[-1], dtype=torch.bool)] * len(counts) if valid is None else valid
        usable = torch.stack([v.cpu() for v in valid])[owner]
        self._targets.append(target)
        self._valid.append(usable)
        self._weights.append(1 / counts[owner].double())
        labels = [[0] * len(keep) for keep in kept] if labels is None else labels
        for image, keep in zip(labels, kept, strict=True):
            self._labels += [label for label, k in zip(image, keep.tolist(), strict=True) if k]
        for threshold in THRESHOLDS:
            for layer, attention in maps.items():
                iou = self._iou(attention.float().cpu(), owner, target, usable, threshold)
                self._per_head.setdefault((threshold, layer), []).append(iou)
            best_random = self._iou(noise, owner, target, usable, threshold).amax(dim=1)
            self._baselines.setdefault((threshold, "random"), []).append(best_random)
            mask = attention_to_mask(target.float(), threshold, self.fraction)
            true = intersection_over_union(mask, target, usable)
            self._baselines.setdefault((threshold, "true_mask"), []).append(true)

    def _iou(self, attention: Tensor, owner: Tensor, target: Tensor, valid: Tensor, threshold: str) -> Tensor:
        masks = attention_to_mask(attention, threshold, self.fraction)[owner]
        return intersection_over_union(masks, target.unsqueeze(1), valid.unsqueeze(1))

    def result(self) -> dict[str, dict]:
        """The scores; see `score_attention`, and "by_class", class → the best-head score at each layer.

        Raises:
            NoObjectsError: No image had an object that covers a patch.
        """
        if not self.images:
            raise NoObjectsError(
                f"none of the {self.without_objects} images has an object that covers a patch: use images with "
                "objects, or a larger --image-size for a finer grid"
            )
        target, valid, weights = torch.cat(self._targets), torch.cat(self._valid), torch.cat(self._weights)
        labels = torch.tensor(self._labels)
        mean_mask = (target.double() * weights.unsqueeze(1)).sum(dim=0) / weights.sum()

        def mean(values: Tensor) -> float:
            return float((values.double() * weights).sum() / weights.sum())

        def row(threshold: str, layer: int) -> dict:
            per_head = torch.cat(self._per_head[threshold, layer])
            heads = [mean(head) for head in per_head.T]
            best = per_head.amax(dim=1)
            by_class = {int(c): float(best[labels == c].mean()) for c in labels.unique()}
            scores = {"best_head": mean(best), "fixed_head": max(heads), "per_head": heads}
            return {"layer": layer, **scores, "by_class": by_class}

        def of_mean_mask(threshold: str) -> float:
            mask = attention_to_mask(mean_mask, threshold, self.fraction)
            return mean(intersection_over_union(mask.expand_as(target), target, valid))

        return {
            threshold: {
                "layers": [row(threshold, layer) for name, layer in self._per_head if name == threshold],
                "constant": mean(intersection_over_union(torch.ones_like(target), target, valid)),
                "random": mean(torch.cat(self._baselines[threshold, "random"])),
                "mean_mask": of_mean_mask(threshold),
                "true_mask": mean(torch.cat(self._baselines[threshold, "true_mask"])),
                "fraction": self.fraction,
                "images": self.images,
                "objects": len(target),
                "without_objects": self.without_objects,
                "objects_without_patch": self.objects_without_patch,
            }
            for threshold in THRESHOLDS
        }


@torch.inference_mode()
def score_attention(
    model: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    normalize: Callable[[Tensor], Tensor],
    layers: Sequence[int] | None = None,
    fraction: float = 0.6,
) -> dict[str, dict]:
    """Mean IoU of CLS attention with known object masks, on the patch grid, beside what it must beat.

    Args:
        model: A CRATE or an ablation; left in evaluation mode.
        batches: (images, labels, pixel masks [B, H, W]).
        normalize: Turns a batch's images into the model's input.
        layers: Whose attention; all when None.
        fraction: See `attention_to_mask`.

    Returns:
        For each threshold ("topk" and "mass") a dictionary with
        "layers": of each layer "layer"; "best_head", the best head of each image (the paper's reading); "per_head",
            each head for all images; "fixed_head", the best of those;
        "constant": the mask that holds every patch; "random": the best of as many maps of noise; "mean_mask": the
            objects' mean mask as every image's attention map; "true_mask": the true mask as attention map,
            evenly spread over the object; "fraction"; "images" and "objects": how many were scored;
            "without_objects": images that could not be; "objects_without_patch": objects left out.
    """
    model.eval()
    device = next(model.parameters()).device
    scores = AttentionScores(fraction)
    for images, labels, masks in batches:
        traces = trace(model, normalize(images.to(device)), layers)
        maps = {layer_trace.index: layer_trace.cls_attention() for layer_trace in traces}
        targets = [mask[None] for mask in mask_to_grid(masks, model.grid_size)]
        scores.add(maps, targets, labels=[[label] for label in labels.tolist()])
    return scores.result()


def scores_table(scores: dict[str, dict], marked: int | None = None) -> str:
    """What `score_attention` returned, as text; the layer `marked` gets a star.

    Args:
        scores: See `score_attention`.
        marked: A layer's index.
    """
    lines = []
    for threshold, result in scores.items():
        lines.append(
            f"attention mIoU, {threshold} {result['fraction']:.0%}, {result['images']} images | "
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
