"""The figures of a finished run: attention maps and curves."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from crate_fast.train.data import Normalize
from crate_fast.whitebox import trace

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["attention_figure", "curves_figure"]


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
            axis.imshow(picture.numpy(), cmap="gray" if gray else "viridis", interpolation="nearest")
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
