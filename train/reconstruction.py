"""Figures of CRATE-MAE reconstructions: each image, masked and reconstructed at several mask ratios."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crate_fast import CRATEMAE
from crate_fast.eval.common.figures import Picture, image_grid
from crate_fast.train.data.transforms import Normalize

RATIOS = (0.5, 0.75, 0.9)
_GREY = 128


def image_noise(model: CRATEMAE, seeds: Iterable[tuple[int, ...]]) -> Tensor:
    """Return the noise [B, N] that selects hidden patches, with one seed per image."""
    n_patches = model.grid_size[0] * model.grid_size[1]
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(n_patches, np.float32) for seed in seeds]))


@torch.inference_mode()
def reconstructions(
    model: CRATEMAE, images: Tensor, normalize: Normalize, ratios: Sequence[float], seed: int
) -> Tensor:
    """Return rows of pictures, uint8 [B, 1 + 2R, S, S, 3]: the image, then masked and reconstructed for each ratio.

    Hidden patches are grey in masked pictures and predicted in reconstructed ones. A larger ratio hides more patches.
    `images` are uint8 [B, 3, S, S]; `seed` and an image's index determine its patches. The model stays in eval mode.
    """
    model.eval()
    device = next(model.parameters()).device
    pixels = normalize(images.to(device))
    noise = image_noise(model, [(seed, number) for number in range(len(images))]).to(device)
    columns = [images]
    for ratio in ratios:
        _, pred, mask = model(pixels, ratio, noise=noise)
        hidden = model.mask_image(mask).bool().cpu()
        filled = normalize.undo(model.reconstruction(pixels, pred)).cpu()
        columns += [images.masked_fill(hidden, _GREY), torch.where(hidden, filled, images)]
    return torch.stack(columns, dim=1).permute(0, 1, 3, 4, 2)


def reconstruction_figure(
    model: CRATEMAE,
    images: Tensor,
    normalize: Normalize,
    paths: Sequence[Path],
    ratios: Sequence[float],
    seed: int,
    titles: Sequence[str],
) -> None:
    """Save `reconstructions` as a figure to `paths`, with a title for each image."""
    rows = reconstructions(model, images, normalize, ratios, seed)
    names = ["image"]
    for ratio in ratios:
        names += [f"{ratio:.0%} hidden", "filled in"]
    pictures = [[Picture(cell.numpy()) for cell in row] for row in rows]
    image_grid(pictures, paths, row_titles=titles, column_titles=names)
