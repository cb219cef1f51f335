"""The figures of a finished run: attention maps and curves."""

from pathlib import Path

import torch
from torch import Tensor, nn

from crate_fast.figures import Curve, Picture, curve_figure, image_grid
from crate_fast.train.data import Normalize
from crate_fast.whitebox import trace

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
    rows = [[Picture(image.permute(1, 2, 0).numpy())] for image in images]
    columns = ["image"]
    if masks is not None:
        columns.append("object")
        for row, mask in zip(rows, masks, strict=True):
            row.append(Picture(mask.float().numpy(), "gray", (0, 1)))
    for layer_trace in traces:
        maps = layer_trace.cls_attention().float().cpu().unflatten(-1, model.grid_size)
        columns += [f"layer {layer_trace.index}, head {head}" for head in range(maps.shape[1])]
        for row, heads in zip(rows, maps, strict=True):
            row.extend(Picture(head.numpy()) for head in heads)
    image_grid(rows, [path], row_titles=titles, column_titles=columns)


def curves_figure(history: list[dict], path: Path) -> None:
    """Write a PNG of loss and accuracy against optimiser steps.

    Args:
        history: Entries of metrics.jsonl: "step" with "loss" and "accuracy" (training) or "val_loss", "val_accuracy".
        path: Of the PNG.
    """

    def curve(name: str, label: str) -> list[Curve]:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        return [Curve(label, *zip(*points, strict=True))] if points else []

    panels = {name: curve(name, "training") + curve(f"val_{name}", "validation") for name in ("loss", "accuracy")}
    curve_figure(panels, "optimiser step", [path])
