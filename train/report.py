"""What a finished run shows: the segmentation score of its attention maps, and a figure to look at."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from crate_fast.layers import MSSA
from crate_fast.segmentation import best_head_iou, constant_mask_iou, mask_to_grid
from crate_fast.train.data import Normalize
from crate_fast.whitebox import trace

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["attention_figure", "attention_layer", "curves_figure", "score_attention"]


def attention_layer(model: nn.Module) -> int:
    """The layer whose attention is looked at: the last but one for CRATE, the last for a ViT (paper, §3)."""
    layers = model.transformer.layers
    return max(0, len(layers) - 2) if isinstance(layers[0][0].fn, MSSA) else len(layers) - 1


@torch.inference_mode()
def score_attention(
    model: nn.Module,
    loader: DataLoader,
    normalize: Normalize,
    layer: int,
    threshold: str = "topk",
    fraction: float = 0.6,
) -> dict[str, float | list[float]]:
    """Mean IoU of CLS attention with known object masks, on the patch grid, beside what it must beat.

    Args:
        model: A CRATE or an ablation.
        loader: (uint8 images, labels, pixel masks [B, H, W]).
        normalize: uint8 → fp32.
        layer: Whose attention.
        threshold, fraction: See `segmentation.attention_to_mask`.

    Returns:
        "best_head": the best head of each image, the paper's reading; "per_head": each head for all images, and
        "fixed_head" the best of those; "random": as best_head with uniform noise for maps; "constant": the mask that
        holds everything; "ceiling": what the true mask itself reaches after the threshold; "images": how many.
    """
    model.eval()
    device = next(model.parameters()).device
    noise = torch.Generator().manual_seed(0)
    per_head, best, random_best, constant, ceiling = [], [], [], [], []
    for images, _, masks in loader:
        (layer_trace,) = trace(model, normalize(images.to(device)), [layer])
        attention = layer_trace.cls_attention().float().cpu()
        target = mask_to_grid(masks, model.grid_size)
        heads, top = best_head_iou(attention, target, threshold, fraction)
        per_head.append(heads)
        best.append(top)
        random_best.append(
            best_head_iou(torch.rand(attention.shape, generator=noise), target, threshold, fraction)[1]
        )
        constant.append(constant_mask_iou(target))
        ceiling.append(best_head_iou(target[:, None].float(), target, threshold, fraction)[1])
    heads = torch.cat(per_head).mean(dim=0)
    return {
        "best_head": torch.cat(best).mean().item(),
        "fixed_head": heads.max().item(),
        "per_head": heads.tolist(),
        "random": torch.cat(random_best).mean().item(),
        "constant": torch.cat(constant).mean().item(),
        "ceiling": torch.cat(ceiling).mean().item(),
        "images": sum(map(len, best)),
    }


@torch.inference_mode()
def attention_figure(
    model: nn.Module,
    images: Tensor,
    masks: Tensor | None,
    titles: list[str],
    normalize: Normalize,
    layer: int,
    path: Path,
) -> None:
    """Write a PNG: one row an image, with the image, its mask if known, and CLS attention of every head.

    Args:
        model: A CRATE or an ablation.
        images: uint8 [B, 3, H, W].
        masks: Boolean [B, H, W] or None.
        titles: One a row.
        normalize: uint8 → fp32.
        layer: Whose attention.
        path: Of the PNG.
    """
    model.eval()
    device = next(model.parameters()).device
    (layer_trace,) = trace(model, normalize(images.to(device)), [layer])
    maps = layer_trace.cls_attention().float().cpu().unflatten(-1, model.grid_size)
    first = ["image"] if masks is None else ["image", "object"]
    names = [*first, *(f"head {head}" for head in range(maps.shape[1]))]
    size = (1.35 * len(names), 1.42 * len(images) + 0.45)
    figure, axes = plt.subplots(len(images), len(names), figsize=size, squeeze=False, layout="constrained")
    for row, image in enumerate(images):
        pictures = [image.permute(1, 2, 0)] + ([] if masks is None else [masks[row]]) + list(maps[row])
        for column, picture in enumerate(pictures):
            axis = axes[row, column]
            gray = column == 1 and masks is not None
            axis.imshow(picture, cmap="gray" if gray else "viridis", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(names[column], fontsize=9)
        axes[row, 0].set_ylabel(titles[row], fontsize=8)
    figure.suptitle(f"CLS attention, layer {layer} (from 0)", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves_figure(history: list[dict], path: Path) -> None:
    """Write a PNG of loss and accuracy against optimiser steps.

    Args:
        history: Entries of metrics.jsonl: "step" with "loss" and "accuracy" (training) or "val_loss", "val_accuracy".
        path: Of the PNG.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "validation")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, lw=1 if label == "training" else 2)
        axis.set(xlabel="optimiser step", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
