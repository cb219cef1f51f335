"""Transforms: policies and what they are seeded by, mirroring on the device, pixels."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision import transforms

from crate_fast.train.config import TrainConfig
from crate_fast.train.data.transforms import (
    drawing_from,
    eval_transform,
    mirrored,
    pixels,
    policy_transform,
    train_transform,
)


@pytest.fixture
def picture() -> Image.Image:
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (40, 52, 3), dtype=np.uint8)).resize((208, 160))


def test_policies_are_timms_or_torchvisions():
    theirs = policy_transform("randaugment-n2-m14")
    assert isinstance(theirs, transforms.RandAugment)
    assert (theirs.num_ops, theirs.magnitude, theirs.num_magnitude_bins) == (2, 14, 31)
    timms = policy_transform("rand-m9-n3-mstd0.5-inc1")
    assert isinstance(timms, auto_augment.RandAugment)
    assert timms.num_layers == 3


@pytest.mark.parametrize(
    "policy",
    [
        *("randaugment", "randaugment-n0-m14", "randaugment-n2-m31", "randaugment-m14-n2", "rand-x9", "rand-m"),
        *("rand-tnothing", "random", "augmix", "rand-m9-"),
    ],
)
def test_what_is_no_policy_is_refused_with_two_that_are(policy):
    with pytest.raises(
        ValueError, match=rf"auto_augment='{policy}' is no policy.*rand-m9-n2-mstd0.5.*randaugment-n2-m14"
    ):
        train_transform(TrainConfig(auto_augment=policy))


@pytest.mark.parametrize("policy", ["randaugment-n2-m14", "rand-m9-n2-mstd0.5"])
def test_a_samples_name_decides_what_is_drawn(picture, policy):
    transform = train_transform(TrainConfig(image_size=32, crop="random", auto_augment=policy))

    def drawn(*name: int) -> bytes:
        torch.rand(7), random.random()  # the global generators stand anywhere
        with drawing_from(*name):
            return transform(picture).tobytes()

    names = [(0, 0, 3, copy) for copy in range(8)] + [(0, 1, 3, 0), (1, 0, 3, 0), (0, 0, 4, 0)]
    first = [drawn(*name) for name in names]
    assert first == [drawn(*name) for name in names]
    assert len(set(first)) == len(names)


def test_drawing_puts_pytorchs_generator_back_and_seeds_it_alike_everywhere():
    expected = torch.get_rng_state()
    with drawing_from(0, 1, 2):
        here = torch.rand(3)
    with drawing_from(0, 1, 2, on_devices=True):
        assert torch.equal(torch.rand(3), here)
    assert torch.equal(torch.get_rng_state(), expected)


def test_images_are_mirrored_where_the_flips_say():
    images = torch.arange(2 * 3 * 2 * 3, dtype=torch.uint8).view(2, 3, 2, 3)
    out = mirrored(images, torch.tensor([True, False]))
    assert out.dtype == torch.uint8
    assert torch.equal(out[0], images[0].flip(-1))
    assert torch.equal(out[1], images[1])
    assert torch.equal(mirrored(images, None), images)
    assert mirrored(images[:0], torch.zeros(0, dtype=torch.bool)).shape == (0, 3, 2, 3)


def test_pixels_are_torchvisions(picture):
    assert np.array_equal(pixels(picture), transforms.PILToTensor()(picture).numpy())


def test_evaluation_looks_at_the_middle(picture):
    image = eval_transform(TrainConfig(image_size=32))(picture)
    assert image.size == (32, 32)
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    assert np.unique(
        np.asarray(eval_transform(TrainConfig(image_size=50))(wide))[:, 2:-2].reshape(-1, 3), axis=0
    ).tolist() == [[0, 0, 255]]
