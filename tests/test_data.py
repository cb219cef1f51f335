"""Loaders, transforms, mixing of batches: they depend only on seed and step; corrupt images are counted."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from image_data import config_of, encoded, write_tree
from PIL import Image
from runs import ALONE

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.loader import build_splits, train_loader
from crate_fast.train.data.transforms import Normalize, drawing_from, policy_transform, train_transform
from crate_fast.train.objective import Classification

SCENES = TrainConfig(train_samples=40, val_samples=11, batch_size=8, epochs=2, image_size=32, workers=0, hflip=0.5)


NOISE = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE).resize((208, 160))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six training and three validation images of two classes."""
    names = [f"train/{name}/{i}.png" for name in ("ant", "bee") for i in range(6)]
    names += [f"validation/{name}/{i}.png" for name in ("ant", "bee") for i in range(3)]
    return write_tree(tmp_path_factory.mktemp("images"), dict.fromkeys(names, encoded(PICTURE)))


def _images(config, **shares) -> list[torch.Tensor]:
    data = build_splits(config)
    return [batch.images for batch in train_loader(config, data.train, **shares)]


def test_a_steps_images_do_not_depend_on_processes_accumulation_workers_and_resumes():
    whole = _images(SCENES)
    assert len(whole) == 10
    halves = [_images(SCENES, rank=rank, world_size=2) for rank in range(2)]
    parts = _images(dataclasses.replace(SCENES, accumulate=2))
    for step, batch in enumerate(whole):
        assert all(torch.equal(batch[rank::2], halves[rank][step]) for rank in range(2))
        assert torch.equal(batch, torch.cat(parts[2 * step : 2 * step + 2]))
    for first in (0, 1, 5):
        rest = _images(dataclasses.replace(SCENES, workers=2 if first == 0 else 0), first_step=first)
        assert len(rest) == 10 - first
        assert all(map(torch.equal, whole[first:], rest))


def test_epochs_and_seeds_differ():
    first = _images(SCENES)
    epochs = [{image.numpy().tobytes() for image in torch.cat(part)} for part in (first[:5], first[5:])]
    assert all(len(images) == 40 for images in epochs)  # each epoch shows every scene once
    assert not any(map(torch.equal, first[:5], first[5:]))
    assert not torch.equal(first[0], _images(dataclasses.replace(SCENES, seed=1))[0])


def test_flips_depend_on_the_samples_key(folder):
    keys = [(epoch, index, 0) for epoch in range(4) for index in range(12)]
    for config in (SCENES, config_of(folder, hflip=0.5, crop="random")):
        data, plain = build_splits(config).train, build_splits(dataclasses.replace(config, hflip=0.0)).train
        images, still = data.batch(keys).images, plain.batch(keys).images
        flipped = [torch.equal(image, other.flip(-1)) for image, other in zip(images, still, strict=True)]
        kept = [torch.equal(image, other) for image, other in zip(images, still, strict=True)]
        assert 12 < sum(flipped) < 36  # of 48
        assert sum(flipped) + sum(kept) == 48
        assert torch.equal(data.batch(keys[::-1]).images.flip(0), images)


def test_repeated_augmentation_shows_fewer_images_in_more_ways():
    config = dataclasses.replace(SCENES, train_samples=42, batch_size=8, repeats=2, epochs=4, accumulate=2)
    split = build_splits(config).train
    parts = list(train_loader(config, split).batch_sampler)
    assert len(parts) == 4 * 5 * 2  # an epoch is as long as without repeats
    steps = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    for keys in steps:
        assert [copy for _, _, copy in keys] == [0, 1] * 4
        assert [index for _, index, _ in keys[::2]] == [index for _, index, _ in keys[1::2]]
    shown = [{index for keys in steps[5 * e : 5 * e + 5] for _, index, _ in keys} for e in range(4)]
    assert [len(images) for images in shown] == [20] * 4
    assert not shown[0] & shown[1]
    assert not shown[2] & shown[3]
    assert 0 < len(shown[0] & shown[2]) < 20
    for rank in range(2):  # the copies of an image are never on one process
        for keys in train_loader(config, split, rank=rank, world_size=2).batch_sampler:
            assert len({index for _, index, _ in keys}) == len(keys) == 2
    assert list(train_loader(config, split, first_step=7).batch_sampler) == parts[14:]


@pytest.mark.gpu
def test_batches_are_in_pinned_memory(folder):
    batch = next(iter(train_loader(config_of(folder, workers=1), build_splits(config_of(folder)).train)))
    assert all(values.is_pinned() for values in batch[:2])


def test_every_crop_has_the_requested_size(folder):
    for crop in ("none", "pad", "random", "center"):
        images, labels, *_ = build_splits(config_of(folder, crop=crop)).train.batch([(0, 0)])
        assert (images.shape, images.dtype, labels.item()) == ((1, 3, 16, 16), torch.uint8, 0)


def test_torchvision_sets_are_opened_by_split_and_downloaded_on_request(monkeypatch):
    opened = []

    class Opened(list):
        classes = ("a", "b")

        def __init__(self, root, **options):
            opened.append((str(root), options))
            super().__init__((Image.new("L", (30, 20), index), index % 2) for index in range(8))

    for name, class_name, argument, *splits in (
        ("cifar10", "CIFAR10", "train", True, False),
        ("cifar100", "CIFAR100", "train", True, False),
        ("flowers102", "Flowers102", "split", "train", "test"),
        ("pets", "OxfordIIITPet", "split", "trainval", "test"),
    ):
        monkeypatch.setattr(torchvision.datasets, class_name, Opened)
        for download in (False, True):
            opened.clear()
            data = build_splits(config_of("root", name, download=download))
            assert opened == [("root", {argument: split, "download": download}) for split in splits]
            images, labels, *_ = data.val.batch([(0, 3)])
            assert (images.shape, labels.item(), data.classes) == ((1, 3, 16, 16), 1, ("a", "b"))


def test_missing_data_is_an_error(folder, tmp_path):
    write_tree(tmp_path / "oxford-iiit-pet", {"images/x": b"", "annotations/x": b""})  # without its lists
    absent = r"val does not exist \(data_dir holds: \['train', 'validation'\]\).*--val-split"
    for config, message in (
        (config_of(folder, val_split="val"), absent),
        (config_of(tmp_path / "nowhere"), "no such folder"),
        (config_of(tmp_path, "cifar10"), r"cifar10 is not in data_dir.*--download"),
        (config_of(tmp_path, "pets"), "pets is not in data_dir=.*trainval.txt.*--download"),
    ):
        with pytest.raises(UserError, match=message):
            build_splits(config)


def test_policies_are_timms_or_torchvisions_and_others_are_refused_with_two_examples():
    assert policy_transform("rand-m9-n3-mstd0.5-inc1").num_layers == 3
    theirs = policy_transform("randaugment-n2-m14")
    assert (theirs.num_ops, theirs.magnitude, theirs.num_magnitude_bins) == (2, 14, 31)
    for policy in ("randaugment-n0-m14", "randaugment-n2-m31", "randaugment-m14-n2", "rand-x9", "rand-m", "augmix"):
        message = rf"auto_augment='{policy}' is not a policy.*rand-m9-n2-mstd0.5.*randaugment-n2-m14"
        with pytest.raises(UserError, match=message):
            train_transform(TrainConfig(auto_augment=policy))


@pytest.mark.parametrize("policy", ["randaugment-n2-m14", "rand-m9-n2-mstd0.5"])
def test_augmentation_depends_only_on_the_samples_key(policy):
    transform = train_transform(TrainConfig(image_size=32, crop="random", auto_augment=policy))

    def augmented(*name: int) -> bytes:
        torch.rand(7), random.random()  # change the global generators
        with drawing_from(*name):
            return transform(PICTURE).tobytes()

    names = [(0, 0, 3, copy) for copy in range(8)] + [(0, 1, 3, 0), (1, 0, 3, 0), (0, 0, 4, 0)]
    first = [augmented(*name) for name in names]
    assert first == [augmented(*name) for name in names]
    assert len(set(first)) == len(names)


def test_normalisation_and_its_inverse():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    out = Normalize("imagenet")(images)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    torch.testing.assert_close(out[0, :, 0, 0], -mean / std)
    torch.testing.assert_close(out[1, :, 0, 0], (1 - mean) / std)
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    for name in ("imagenet", "cifar10", "half"):
        assert torch.equal(Normalize(name).undo(Normalize(name)(images)), images)


# --- random erasing, mixup and cutmix of batches ---

LABELS = torch.arange(8) % 4
IMAGES = LABELS.float().view(8, 1, 1, 1).expand(8, 3, 16, 16)


def _augmented(step: int = 0, part: int = 0, batch_size: int = 8, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    config = TrainConfig(**({"label_smoothing": 0.0, "batch_size": batch_size} | settings))
    objective = Classification(SimpleNamespace(num_classes=4), config, ALONE)
    return objective.inputs(IMAGES.clone(), LABELS, step, part)


def test_without_settings_a_batch_is_unchanged():
    images, targets = _augmented()
    assert torch.equal(images, IMAGES)
    assert targets is LABELS


def test_mixup_blends_and_cutmix_pastes_and_targets_are_smoothed():
    (blended, targets), (pasted, _) = _augmented(3, mixup=0.8, label_smoothing=0.2), _augmented(1, cutmix=1.0)
    assert not torch.isin(blended, IMAGES).all()
    assert torch.isin(pasted, IMAGES).all()
    assert not torch.equal(pasted, IMAGES)
    assert targets.min().item() == pytest.approx(0.2 / 4)


def test_accuracy_of_a_mixture_counts_its_larger_part():
    config = TrainConfig(mixup=0.8, batch_size=8)
    objective = Classification(SimpleNamespace(num_classes=4), config, ALONE)
    for step in range(4):
        images, targets = objective.inputs(IMAGES.clone(), LABELS, step, 0)
        assert objective.training(lambda _: targets, images, targets)[1] == 1  # noqa: B023


def test_erasing_changes_the_given_share_of_the_images():
    erased, targets = _augmented(2, random_erasing=0.5)
    assert 0 < (erased != IMAGES).flatten(1).any(dim=1).sum() < 8
    assert torch.equal(targets, LABELS)
    assert (_augmented(2, random_erasing=1.0)[0] != IMAGES).flatten(1).any(dim=1).all()


def test_draws_depend_on_step_and_part_and_leave_the_global_generator_alone():
    settings = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5}
    before = torch.get_rng_state()
    first, again = (_augmented(7, 0, **settings) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, again))
    for step, part in ((8, 0), (7, 1)):
        assert not torch.equal(first[0], _augmented(step, part, **settings)[0])


def test_mixup_of_an_odd_batch_is_an_error():
    with pytest.raises(ValueError, match="need an even number of images per process and micro-batch, not 5"):
        _augmented(batch_size=5, mixup=0.5)
