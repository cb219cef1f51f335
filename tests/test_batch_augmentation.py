"""Random erasing, mixup and cutmix of batches: results, seeding by the step, and bad settings."""

from types import SimpleNamespace

import pytest
import torch
from runs import ALONE

from crate_fast.train.config import TrainConfig
from crate_fast.train.objective import Classification

LABELS = torch.arange(8) % 4
IMAGES = LABELS.float().view(8, 1, 1, 1).expand(8, 3, 16, 16)


def _augmented(step: int = 0, part: int = 0, batch_size: int = 8, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    config = TrainConfig(**({"label_smoothing": 0.0, "batch_size": batch_size} | settings))
    objective = Classification(SimpleNamespace(num_classes=4), config, ALONE)
    return objective.inputs(IMAGES.clone(), LABELS, step, part)[:2]


def test_without_settings_a_batch_is_unchanged():
    images, targets = _augmented()
    assert torch.equal(images, IMAGES)
    assert targets is LABELS


def test_mixup_blends_images_and_labels_by_the_same_share():
    mixed, targets = _augmented(3, mixup=0.8)
    share = targets[0, 0].item()  # label 0 with label 3 of the last image
    assert 0 < share < 1
    assert targets[0, 3].item() == pytest.approx(1 - share)
    torch.testing.assert_close(mixed, share * IMAGES + (1 - share) * IMAGES.flip(0))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_cutmix_targets_are_the_shares_of_the_area():
    mixed, targets = _augmented(1, cutmix=1.0)
    own = (mixed == IMAGES).all(dim=1).float().mean(dim=(1, 2))
    assert 0 < own[0] < 1
    torch.testing.assert_close(targets[torch.arange(8), LABELS], own)


def test_mixed_targets_are_smoothed_once():
    _, targets = _augmented(3, mixup=0.8, label_smoothing=0.2)
    assert targets.min().item() == pytest.approx(0.2 / 4)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


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
