"""Gaussian noise on some of an image's pixels, and how much of a map it leaves (paper, Fig. 11 and 12)."""

import math

import numpy as np
import torch
from torch import Tensor

from crate_fast.errors import UserError

__all__ = ["add_noise", "check_noise", "map_correlation"]


def check_noise(sigma: float, share: float, seed: int) -> None:
    """Refuse noise that `add_noise` cannot add.

    Raises:
        UserError: Sigma, share or seed is out of range.
    """
    if not 0 <= sigma < math.inf or not 0 <= share <= 1:
        raise UserError(
            f"noise of sigma={sigma} on a share={share} of the pixels: give sigma ≥ 0 and a share in 0..1"
        )
    if seed < 0:
        raise UserError(f"seed={seed}: noise needs a seed of at least 0")


def add_noise(images: Tensor, sigma: float, share: float, seed: int, first: int = 0) -> Tensor:
    """Add Gaussian noise to all channels of randomly chosen pixels; round, and clip to 0..255.

    Pixels and noise depend on the seed and the image's number alone: a stronger sigma scales the same noise, a larger
    share adds pixels to those of a smaller one.

    Args:
        images: uint8 [B, C, H, W].
        sigma: Standard deviation, on the scale of 0..255.
        share: Of the pixels, 0 to 1.
        seed: Not negative.
        first: Number of the first image in its set.

    Returns:
        Noisy copies, uint8 [B, C, H, W].

    Raises:
        UserError: The images are not uint8, or sigma, share or seed is out of range.

    >>> add_noise(torch.full((1, 3, 4, 4), 100, dtype=torch.uint8), 20, 0.5, seed=0).ne(100).any(dim=1).sum().item()
    8
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise UserError(f"images are {images.dtype} {tuple(images.shape)}: pass uint8 [B, C, H, W]")
    check_noise(sigma, share, seed)
    flat = images.flatten(2).cpu().numpy()
    noisy = flat.copy()
    for number in range(len(flat)):
        generator = np.random.default_rng((seed, first + number))
        chosen = generator.permutation(flat.shape[2])[: round(share * flat.shape[2])]
        noise = generator.standard_normal(flat.shape[1:])
        noisy[number][:, chosen] = np.rint(flat[number][:, chosen] + sigma * noise[:, chosen]).clip(0, 255)
    return torch.from_numpy(noisy).view_as(images).to(images.device)


def map_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of maps over their patches; NaN where one of the two is constant.

    Unlike the IoU of thresholded maps it is 0 by chance whatever area a head covers, and it needs no threshold.

    Args:
        a, b: [..., P].

    Returns:
        float64 [...], from −1 to 1.
    """

    def deviation(x: Tensor) -> Tensor:
        centred = x.double() - x.double().mean(dim=-1, keepdim=True)
        size = centred.norm(dim=-1, keepdim=True)
        constant = size <= torch.finfo(torch.float32).eps * x.double().norm(dim=-1, keepdim=True)  # but for rounding
        return (centred / size).masked_fill(constant, math.nan)

    return (deviation(a) * deviation(b)).sum(dim=-1)
