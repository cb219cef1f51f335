"""From an attention map to a mask and a score: the arithmetic of coarse segmentation (paper, §3.2 and B.3)."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_fast.whitebox import trace

__all__ = [
    "attention_to_mask",
    "best_head_iou",
    "constant_mask_iou",
    "intersection_over_union",
    "mask_to_grid",
    "score_attention",
    "scores_table",
]

THRESHOLDS = ("topk", "mass")


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


def best_head_iou(
    attention: Tensor, target: Tensor, threshold: str = "topk", fraction: float = 0.6
) -> tuple[Tensor, Tensor]:
    """IoU of each head's mask and of the best head, per image.

    Args:
        attention: CLS attention [B, H, P].
        target: Boolean object masks on the patch grid [B, P].
        threshold, fraction: See `attention_to_mask`.

    Returns:
        (per head [B, H], best over heads [B]).
    """
    per_head = intersection_over_union(attention_to_mask(attention, threshold, fraction), target.unsqueeze(1))
    return per_head, per_head.amax(dim=1)


def constant_mask_iou(target: Tensor) -> Tensor:
    """IoU of the mask that holds every patch, per image [B]: the score of looking at nothing. target [B, P]."""
    return intersection_over_union(torch.ones_like(target), target)


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
            evenly spread over the object; "images": how many were scored.
    """
    model.eval()
    device = next(model.parameters()).device
    attentions: dict[int, list[Tensor]] = {}
    targets = []
    for images, _, masks in batches:
        for layer_trace in trace(model, normalize(images.to(device)), layers):
            attentions.setdefault(layer_trace.index, []).append(layer_trace.cls_attention().float().cpu())
        targets.append(mask_to_grid(masks, model.grid_size))
    maps = {layer: torch.cat(parts) for layer, parts in attentions.items()}
    target = torch.cat(targets)
    noise = torch.rand(next(iter(maps.values())).shape, generator=torch.Generator().manual_seed(0))
    mean_mask = target.float().mean(dim=0).expand(len(target), 1, -1)

    def best(attention: Tensor, threshold: str) -> float:
        return best_head_iou(attention, target, threshold, fraction)[1].mean().item()

    def by_layer(threshold: str) -> list[dict]:
        rows = []
        for layer, attention in maps.items():
            heads = best_head_iou(attention, target, threshold, fraction)[0].mean(dim=0)
            scores = {"best_head": best(attention, threshold), "fixed_head": heads.max().item()}
            rows.append({"layer": layer, **scores, "per_head": heads.tolist()})
        return rows

    return {
        threshold: {
            "layers": by_layer(threshold),
            "constant": constant_mask_iou(target).mean().item(),
            "random": best(noise, threshold),
            "mean_mask": best(mean_mask, threshold),
            "true_mask": best(target[:, None].float(), threshold),
            "images": len(target),
        }
        for threshold in THRESHOLDS
    }


def scores_table(scores: dict[str, dict], marked: int | None = None) -> str:
    """What `score_attention` returned, as text; the layer `marked` gets a star.

    Args:
        scores: See `score_attention`.
        marked: A layer's index.
    """
    lines = []
    for threshold, result in scores.items():
        lines.append(
            f"attention mIoU, {threshold} 60 %, {result['images']} images | constant mask {result['constant']:.3f} · "
            f"random maps {result['random']:.3f} · mean mask {result['mean_mask']:.3f} · "
            f"true mask {result['true_mask']:.3f}"
        )
        for row in result["layers"]:
            star = "*" if row["layer"] == marked else " "
            lines.append(
                f"  layer {row['layer']:2d}{star}  best head {row['best_head']:.3f}   "
                f"one head for all images {row['fixed_head']:.3f}"
            )
    return "\n".join(lines)
