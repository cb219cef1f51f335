"""Data: order and augmentation depend on seed and epoch alone; every validation image counts once."""

import dataclasses
import itertools
import tarfile
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import Batch, Normalize, build_splits, eval_loader, mirrored, train_loader

SCENES = TrainConfig(train_samples=40, val_samples=11, batch_size=8, epochs=2, image_size=32, workers=0, hflip=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (40, 52, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def _images(config, **shares) -> list[torch.Tensor]:
    data = build_splits(config)
    return [mirrored(batch.images, batch.flips) for batch in train_loader(config, data.train, **shares)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_sees_the_same_images_however_it_is_dealt_out(folder, workers):
    for config in (SCENES, _folder_config(folder, batch_size=8, crop="random", auto_augment="rand-m9-n2")):
        config = dataclasses.replace(config, workers=workers)
        whole = _images(config)
        assert len(whole) == config.epochs * (len(build_splits(config).train) // 8)
        halves = [_images(config, rank=rank, world_size=2) for rank in range(2)]
        for batch, first, second in zip(whole, *halves, strict=True):
            assert torch.equal(batch[0::2], first)
            assert torch.equal(batch[1::2], second)
        parts = _images(dataclasses.replace(config, accumulate=2))
        for i, batch in enumerate(whole):
            assert torch.equal(batch, torch.cat(parts[2 * i : 2 * i + 2]))


def test_a_resumed_loader_continues_where_it_stopped(folder):
    for config in (SCENES, _folder_config(folder, batch_size=4, crop="pad")):
        whole = _images(config)
        for step in (1, 5):
            rest = _images(config, first_step=step)
            assert len(rest) == len(whole) - step
            assert all(torch.equal(a, b) for a, b in zip(whole[step:], rest, strict=True))


def test_epochs_and_seeds_differ():
    first = _images(SCENES)
    epochs = [{image.numpy().tobytes() for image in torch.cat(part)} for part in (first[:5], first[5:])]
    assert all(len(images) == 40 for images in epochs)  # each epoch shows every scene once
    assert not any(torch.equal(a, b) for a, b in zip(first[:5], first[5:], strict=True))
    other = _images(dataclasses.replace(SCENES, seed=1))
    assert not torch.equal(first[0], other[0])


def test_flips_are_drawn_by_the_samples_name_and_left_to_the_device(folder):
    for config in (SCENES, _folder_config(folder, hflip=0.5, crop="random")):
        data = build_splits(config)
        plain = build_splits(dataclasses.replace(config, hflip=0.0))
        keys = [(epoch, index, 0) for epoch in range(8) for index in range(12)]
        batch, still = (splits.train.batch(keys, replace=True) for splits in (data, plain))
        assert torch.equal(batch.images, still.images)
        assert not still.flips.any()
        assert 30 < batch.flips.sum() < 66  # of 96
        backwards = data.train.batch(keys[::-1], replace=True)
        assert torch.equal(backwards.flips.flip(0), batch.flips)
        assert torch.equal(data.train[keys[5]][0], batch.images[5])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_repeated_augmentation_shows_fewer_images_in_more_ways(accumulate):
    config = dataclasses.replace(SCENES, train_samples=42, batch_size=8, repeats=2, epochs=4, accumulate=accumulate)
    split = build_splits(config).train
    parts = list(train_loader(config, split).batch_sampler)
    assert len(parts) == 4 * 5 * accumulate  # an epoch is as long as without
    steps = [list(itertools.chain(*parts[i : i + accumulate])) for i in range(0, len(parts), accumulate)]
    for keys in steps:
        assert [copy for _, _, copy in keys] == [0, 1] * 4
        assert [index for _, index, _ in keys[::2]] == [index for _, index, _ in keys[1::2]]
    shown = [{index for keys in steps[5 * e : 5 * e + 5] for _, index, _ in keys} for e in range(4)]
    assert [len(images) for images in shown] == [20] * 4
    assert not shown[0] & shown[1]
    assert not shown[2] & shown[3]
    assert shown[0] & shown[2]
    assert shown[0] != shown[2]
    if accumulate == 1:  # the copies of an image are never on one process
        for rank in range(2):
            for keys in train_loader(config, split, rank=rank, world_size=2).batch_sampler:
                assert len({index for _, index, _ in keys}) == 4
    rest = list(train_loader(config, split, first_step=7).batch_sampler)
    assert rest == parts[7 * accumulate :]


def test_copies_of_an_image_are_augmented_anew(folder):
    config = _folder_config(folder, crop="random", repeats=4, hflip=0.5, epochs=4)
    for batch in train_loader(config, build_splits(config).train):
        assert len({image.numpy().tobytes() for image in batch.images}) == 4
        assert len(set(batch.labels.tolist())) == 1


@pytest.mark.gpu
def test_batches_wait_in_pinned_memory(folder):
    batch = next(iter(train_loader(_folder_config(folder, workers=1), build_splits(_folder_config(folder)).train)))
    assert isinstance(batch, Batch)
    assert all(values.is_pinned() for values in batch[:3])
    assert batch.problems == []


def test_augmentation_leaves_the_global_generator_alone(folder):
    data = build_splits(_folder_config(folder, crop="random"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    data.train[0, 0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_validation_image_is_seen_once(world_size):
    data = build_splits(SCENES)
    seen = [
        image
        for rank in range(world_size)
        for batch in eval_loader(SCENES, data.val, rank=rank, world_size=world_size)
        for image in batch.images
    ]
    assert len(seen) == 11
    expected = {data.val[0, i][0].numpy().tobytes() for i in range(11)}
    assert {image.numpy().tobytes() for image in seen} == expected


def test_masks_come_with_their_images():
    data = build_splits(dataclasses.replace(SCENES, segmentation_samples=5))
    (batch,) = eval_loader(SCENES, data.masks)
    images, labels, masks = batch.images, batch.labels, batch.masks
    assert (images.shape, labels.shape, masks.shape) == ((5, 3, 32, 32), (5,), (5, 32, 32))
    assert torch.equal(images[3], data.val[0, 3][0])
    assert masks.dtype == torch.bool
    assert torch.equal(masks[3], data.masks[0, 3][2])


def _folder_config(root, **changes) -> TrainConfig:
    settings = {
        "dataset": "folder",
        "data_dir": str(root),
        "image_size": 24,
        "batch_size": 4,
        "epochs": 2,
        "workers": 0,
    }
    return TrainConfig(**(settings | changes))


@pytest.mark.parametrize("crop", ["none", "pad", "random", "center"])
def test_image_folders(folder, crop):
    data = build_splits(_folder_config(folder, crop=crop, hflip=0.5))
    assert data.classes == ("ant", "bee")
    assert (len(data.train), len(data.val), data.masks) == (12, 6, None)
    image, label = data.train[0, 0]
    assert (image.shape, image.dtype, label) == ((3, 24, 24), torch.uint8, 0)
    assert data.val[0, 5][1] == 1


def test_tar_archives_give_the_folders_images(folder, tmp_path):
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for name in ("ant", "bee"):
                archive.add(folder / split / name, arcname=name)
    from_tar = build_splits(_folder_config(tmp_path, dataset="tar"))
    from_folder = build_splits(_folder_config(folder))
    assert from_tar.classes == from_folder.classes
    key = lambda sample: sample[0].numpy().tobytes()  # noqa: E731
    pictures = [sorted(key(data.val[0, i]) for i in range(6)) for data in (from_tar, from_folder)]
    assert pictures[0] == pictures[1]


class _Torchvision(torch.utils.data.Dataset):
    """Stands for a torchvision data set: remembers how it was opened."""

    opened: ClassVar[list] = []
    classes = ("a", "b")

    def __init__(self, root, **options):
        self.opened.append((str(root), options))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Image.new("L", (30, 20), index), index % 2


@pytest.mark.parametrize(
    ("name", "class_name", "train", "val"),
    [
        ("cifar10", "CIFAR10", {"train": True}, {"train": False}),
        ("cifar100", "CIFAR100", {"train": True}, {"train": False}),
        ("flowers102", "Flowers102", {"split": "train"}, {"split": "test"}),
        ("pets", "OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    ],
)
@pytest.mark.parametrize("download", [False, True])
def test_torchvision_sets_are_opened_by_split_and_download_only_when_asked(
    name, class_name, train, val, download, monkeypatch
):
    monkeypatch.setattr(torchvision.datasets, class_name, _Torchvision)
    _Torchvision.opened.clear()
    data = build_splits(_folder_config("root", dataset=name, download=download))
    assert _Torchvision.opened == [("root", {**split, "download": download}) for split in (train, val)]
    image, label = data.val[0, 3]
    assert (image.shape, image.dtype, label) == ((3, 24, 24), torch.uint8, 1)
    assert data.classes == ("a", "b")


def test_missing_data_is_named(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"val is not there \(data_dir holds: \['train', 'validation'\]\).*--val-split"
    ):
        build_splits(_folder_config(folder, val_split="val"))
    with pytest.raises(UserError, match="no such folder"):
        build_splits(_folder_config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"cifar10 is not in data_dir.*--download"):
        build_splits(_folder_config(tmp_path, dataset="cifar10"))


def test_splits_with_different_classes_are_refused(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "ant").symlink_to(folder / "validation" / "ant")
    with pytest.raises(ValueError, match=r"different classes, such as \['bee'\]"):
        build_splits(_folder_config(tmp_path))


def test_batches_that_cannot_be_dealt_out_are_refused():
    data = build_splits(SCENES)
    with pytest.raises(ValueError, match="batch_size=8 cannot be dealt out to 3 processes"):
        train_loader(SCENES, data.train, world_size=3)
    with pytest.raises(ValueError, match="40 images, fewer than batch_size=64"):
        train_loader(dataclasses.replace(SCENES, batch_size=64), data.train)


def test_normalize():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    out = Normalize("imagenet")(images)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    torch.testing.assert_close(out[0, :, 0, 0], -mean / std)
    torch.testing.assert_close(out[1, :, 0, 0], (1 - mean) / std)
