"""Random erasing, mixup and cutmix of batches: results, seeding by the step, and bad settings."""

from types import SimpleNamespace

import pytest
import torch
from runs import ALONE

from crate_fast.train.config import TrainConfig
from crate_fast.train.objective import Classification


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(8) % 4
    return labels.float().view(8, 1, 1, 1).expand(8, 3, 16, 16).clone(), labels


def _augment(batch_size: int = 8, **settings):
    config = TrainConfig(**({"label_smoothing": 0.0, "batch_size": batch_size} | settings))
    objective = Classification(SimpleNamespace(num_classes=4), config, ALONE)
    return lambda *arguments: objective.inputs(*arguments)[:2]


def test_without_settings_a_batch_is_unchanged():
    images, labels = _batch()
    same, targets = _augment()(images.clone(), labels, 0, 0)
    assert torch.equal(same, images)
    assert targets is labels


def test_mixup_blends_images_and_labels_by_the_same_share():
    images, labels = _batch()
    mixed, targets = _augment(mixup=0.8)(images.clone(), labels, 3, 0)
    share = targets[0, 0].item()  # label 0 with label 3 of the last image
    assert 0 < share < 1
    assert targets[0, 3].item() == pytest.approx(1 - share)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_cutmix_targets_are_the_shares_of_the_area():
    images, labels = _batch()
    mixed, targets = _augment(cutmix=1.0)(images.clone(), labels, 1, 0)
    own = (mixed == images).all(dim=1).float().mean(dim=(1, 2))
    assert 0 < own[0] < 1
    torch.testing.assert_close(targets[torch.arange(8), labels], own)


def test_mixed_targets_are_smoothed_once():
    images, labels = _batch()
    _, targets = _augment(mixup=0.8, label_smoothing=0.2)(images, labels, 3, 0)
    assert targets.min().item() == pytest.approx(0.2 / 4)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_erasing_changes_the_given_share_of_the_images():
    images, labels = _batch()
    erased, targets = _augment(random_erasing=0.5)(images.clone(), labels, 2, 0)
    changed = (erased != images).flatten(1).any(dim=1)
    assert 0 < changed.sum() < 8
    assert torch.equal(targets, labels)
    everywhere, _ = _augment(random_erasing=1.0)(images.clone(), labels, 2, 0)
    assert (everywhere != images).flatten(1).any(dim=1).all()


def test_draws_depend_on_step_and_part_and_leave_the_global_generator_alone():
    images, labels = _batch()
    augment = _augment(mixup=0.8, cutmix=1.0, random_erasing=0.5)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = augment(images.clone(), labels, 7, 0)
    assert torch.equal(torch.rand(3), expected)
    again = augment(images.clone(), labels, 7, 0)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for step, part in ((8, 0), (7, 1)):
        assert not torch.equal(first[0], augment(images.clone(), labels, step, part)[0])


def test_mixup_of_an_odd_batch_is_an_error():
    with pytest.raises(ValueError, match="need an even number of images per process and micro-batch, not 5"):
        _augment(batch_size=5, mixup=0.5)
