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
    layers: list[int],
    path: Path,
) -> None:
    """Write a PNG: one row an image, with the image, its mask if known, and CLS attention of every head.

    Args:
        model: A CRATE or an ablation.
        images: uint8 [B, 3, H, W].
        masks: Boolean [B, H, W] or None.
        titles: One a row.
        normalize: uint8 → fp32.
        layers: Whose attention.
        path: Of the PNG.
    """
    model.eval()
    traces = trace(model, normalize(images.to(next(model.parameters()).device)), layers)
    columns = {"image": (images.permute(0, 2, 3, 1), None)}
    if masks is not None:
        columns["object"] = (masks, "gray")
    for layer_trace in traces:
        maps = layer_trace.cls_attention().float().cpu().unflatten(-1, model.grid_size)
        for head in range(maps.shape[1]):
            columns[f"layer {layer_trace.index}, head {head}"] = (maps[:, head], "viridis")
    size = (1.3 * len(columns), 1.36 * len(images) + 0.3)
    figure, axes = plt.subplots(len(images), len(columns), figsize=size, squeeze=False, layout="constrained")
    for column, (name, (pictures, colours)) in enumerate(columns.items()):
        for row, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.imshow(picture.numpy(), cmap=colours, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(name, fontsize=8)
    for row, title in enumerate(titles):
        axes[row, 0].set_ylabel(title, fontsize=8)
    figure.savefig(path, dpi=110)
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
