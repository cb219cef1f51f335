"""Transforms: crop and augment PIL images in a worker, normalise batches on the device.

The random numbers of a sample depend on (seed, epoch, index, copy) alone, not on processes or workers.
"""

import random
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torchvision import transforms

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_TIMM_POLICY = re.compile(r"rand(-((m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?|t(weights|3aw?)))*")
_TORCHVISION_POLICY = re.compile(r"randaugment-n(\d+)-m(\d+)")
_TORCHVISION_BINS = 31  # magnitudes 0 to 30


class Normalize(nn.Module):
    """Normalisation of uint8 images [B, 3, S, S] on their device: (x/255 − mean)/std in fp32.

    `statistics` is "imagenet", "cifar10" or "half", or (mean, deviation) of the three channels; the attribute is
    always the latter.
    """

    def __init__(self, statistics: str | tuple[Sequence[float], Sequence[float]]):
        super().__init__()
        self.statistics = STATISTICS[statistics] if isinstance(statistics, str) else statistics
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in self.statistics)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)

    def undo(self, images: Tensor) -> Tensor:
        """Return normalised images as uint8; values outside 0 to 255 are clamped."""
        return ((images.float() - self.shift) / self.scale).round().clamp(0, 255).to(torch.uint8)


def mixed_seed(*name: int) -> int:
    """Mix non-negative integers into a 64-bit seed; a trailing 0 does not change it."""
    return int(np.random.SeedSequence(name).generate_state(1, np.uint64)[0])


@contextmanager
def drawing_from(seed: int, *name: int, on_devices: bool = False):
    """Seed the global generators of Python, NumPy and PyTorch; restore PyTorch's state at the end.

    `seed` and `name`, such as (epoch, index, copy), are the integers of `mixed_seed`. `on_devices` also seeds the
    generators of GPUs, which are not restored; before CUDA is initialised that takes 0.2 ms.
    """
    mixed = mixed_seed(seed, *name)
    with torch.random.fork_rng(devices=[]):
        random.seed(mixed)
        np.random.seed(mixed & 0xFFFFFFFF)  # noqa: NPY002  (timm's augmentations draw from the global generator)
        (torch.manual_seed if on_devices else torch.default_generator.manual_seed)(mixed)
        yield


def policy_transform(policy: str) -> Callable[[Image.Image], Image.Image]:
    """Return the augmentation of a policy string.

    It is timm's, such as rand-m9-n2-mstd0.5, or torchvision's randaugment-nN-mM, with magnitudes M from 0 to 30.
    """
    found = _TORCHVISION_POLICY.fullmatch(policy)
    if found and int(found[1]) >= 1 and int(found[2]) < _TORCHVISION_BINS:
        return transforms.RandAugment(int(found[1]), int(found[2]), _TORCHVISION_BINS)
    reason = ""
    if _TIMM_POLICY.fullmatch(policy):
        try:
            return rand_augment_transform(policy, {})
        except (AssertionError, KeyError, ValueError) as error:
            reason = f" ({error})" if str(error) else ""
    raise UserError(
        f"auto_augment={policy!r} is not a policy{reason}: pass one of timm, such as rand-m9-n2-mstd0.5, or of "
        f"torchvision, such as randaugment-n2-m14 (n at least 1, m at most {_TORCHVISION_BINS - 1})"
    )


def train_transform(config: TrainConfig) -> transforms.Compose:
    """Return the random crop and augmentation, PIL image → PIL image of `image_size`; the loader flips afterwards.

    To flip after the augmentation instead of before it gives the same distribution: crops, shears, shifts and
    rotations are symmetric, and the other operations do not depend on left and right.
    """
    size = config.image_size
    squash = transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC)
    crop = {
        "none": [squash],
        "center": [eval_transform(size)],
        "pad": [squash, transforms.RandomCrop(size, padding=size // 8)],
        "random": [RandomResizedCropAndInterpolation(size, scale=(config.crop_scale, 1.0), interpolation="bicubic")],
    }
    augment = [policy_transform(config.auto_augment)] if config.auto_augment else []
    return transforms.Compose([*crop[config.crop], *augment])


def eval_transform(size: int, crop_pct: float = 1.0, interpolation: str = "bicubic") -> transforms.Compose:
    """Return the evaluation transform: resize the shorter side to `size` / `crop_pct`, crop the central square."""
    resize = transforms.Resize(int(size / crop_pct), transforms.InterpolationMode(interpolation))
    return transforms.Compose([resize, transforms.CenterCrop(size)])
