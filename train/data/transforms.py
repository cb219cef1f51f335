"""What happens to an image: cropped and augmented as PIL in a loading process, mirrored and normalised on the device.

All randomness of a sample comes from a generator seeded with its name, (seed, epoch, index, copy): the same pixels
however images are dealt out.
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

__all__ = ["Normalize", "drawing_from", "eval_transform", "mirrored", "pixels", "policy_transform", "train_transform"]

_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_TIMM_POLICY = re.compile(r"rand(-((m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?|t(weights|3aw?)))*")
_TORCHVISION_POLICY = re.compile(r"randaugment-n(\d+)-m(\d+)")
_TORCHVISION_BINS = 31  # of magnitudes: 0 to 30


class Normalize(nn.Module):
    """uint8 images [B, 3, S, S] → (x/255 − mean)/std in fp32, on the images' device.

    Args:
        statistics: "imagenet", "cifar10" or "half", or (mean, deviation) of the three channels.
    """

    def __init__(self, statistics: str | tuple[Sequence[float], Sequence[float]]):
        super().__init__()
        values = _STATISTICS[statistics] if isinstance(statistics, str) else statistics
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in values)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)

    def undo(self, images: Tensor) -> Tensor:
        """Normalised images back to uint8; values beyond black and white are cut."""
        return ((images.float() - self.shift) / self.scale).round().clamp(0, 255).to(torch.uint8)


def mirrored(images: Tensor, flips: Tensor | None) -> Tensor:
    """Mirror the images that `flips` names, left to right, on their device and without waiting for a GPU.

    Args:
        images: [B, 3, S, S], of any dtype.
        flips: bool [B], on the same device; None: no image.

    Returns:
        Like `images`, which stay as they are.
    """
    if flips is None:
        return images
    return torch.where(flips[:, None, None, None], images.flip(-1), images)


@contextmanager
def drawing_from(seed: int, *name: int, on_devices: bool = False):
    """Python's, NumPy's and PyTorch's global generators seeded by a name; PyTorch's is put back after.

    Args:
        seed: Of the run.
        name: Integers from 0: (epoch, index), then the copy's number, … A zero at the end of three says nothing:
            (3, 7) and (3, 7, 0) draw alike.
        on_devices: Seed the generators of GPUs too, and leave them so. Before CUDA is used that takes 0.2 ms.
    """
    state = torch.get_rng_state()
    mixed = int(np.random.SeedSequence((seed, *name)).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)  # noqa: NPY002  (timm's augmentations draw from the global generator)
    (torch.manual_seed if on_devices else torch.default_generator.manual_seed)(mixed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def policy_transform(policy: str) -> Callable[[Image.Image], Image.Image]:
    """The augmentation that a policy string names.

    Args:
        policy: timm's, such as rand-m9-n2-mstd0.5, or randaugment-nN-mM: torchvision's RandAugment of N operations at
            magnitude M of 0 to 30.

    Raises:
        UserError: It is neither.
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
        f"auto_augment={policy!r} is no policy{reason}: pass timm's, such as rand-m9-n2-mstd0.5, or torchvision's, "
        f"as in randaugment-n2-m14 (n at least 1, m at most {_TORCHVISION_BINS - 1})"
    )


def train_transform(config: TrainConfig) -> transforms.Compose:
    """PIL image → PIL image of `image_size`, cropped and augmented at random; flips are left to `mirrored`.

    Mirroring last instead of between crop and augmentation changes no probability: crops, shears, shifts and
    rotations go either way alike, and the rest is blind to sides.
    """
    size = config.image_size
    crop = {
        "none": [transforms.Resize((size, size))],
        "center": [transforms.Resize(size), transforms.CenterCrop(size)],
        "pad": [transforms.Resize((size, size)), transforms.RandomCrop(size, padding=size // 8)],
        "random": [RandomResizedCropAndInterpolation(size, scale=(config.crop_scale, 1.0), interpolation="bicubic")],
    }
    augment = [policy_transform(config.auto_augment)] if config.auto_augment else []
    return transforms.Compose([*crop[config.crop], *augment])


def eval_transform(config: TrainConfig) -> transforms.Compose:
    """PIL image → the middle of it, `image_size` square, its shorter side resized to fit. Nothing is drawn."""
    size = config.image_size
    resize = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size)])


def pixels(picture: Image.Image) -> np.ndarray:
    """An RGB picture as uint8 [3, H, W], not contiguous: channels are innermost in memory."""
    return np.asarray(picture).transpose(2, 0, 1)
