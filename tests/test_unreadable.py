"""Unreadable images: each counted once an epoch, too many of them an error, and a resume counts on."""

import json

import pytest

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.unreadable import UnreadableTally


def _lines(*numbers: int) -> list[str]:
    return [f"{i}.jpg: OSError: broken" for i in numbers]


def test_too_many_are_an_error_that_says_how_many_and_which():
    tally = UnreadableTally(TrainConfig(max_unreadable=0.02), 100)
    assert tally.add(_lines(1, 2), 0) == _lines(1, 2)
    assert tally.add([], 0) == []
    tally.check(0)
    tally.add(_lines(7), 0)
    with pytest.raises(UserError, match=r"3 of 100 images \(3\.00%\).*epoch 0.*--max-unreadable.*1\.jpg.*7\.jpg"):
        tally.check(0)


def test_an_image_counts_once_an_epoch_and_is_new_once_a_run():
    tally = UnreadableTally(TrainConfig(max_unreadable=0.02), 100)
    assert tally.add(_lines(1, 1, 2), 0) == _lines(1, 2)
    assert tally.add(_lines(2, 1), 0) == []
    assert tally.add(_lines(2, 3), 1) == _lines(3)
    assert tally.total == 3


def test_none_is_allowed_when_so_set():
    tally = UnreadableTally(TrainConfig(max_unreadable=0.0), 10**6)
    assert tally.add([], 0) == []
    tally.add(_lines(4), 0)
    with pytest.raises(UserError, match="1 of 1000000"):
        tally.check(0)


def test_a_restored_tally_counts_on():
    tally = UnreadableTally(TrainConfig(max_unreadable=0.02), 100)
    tally.add(_lines(1, 2), 3)
    again = UnreadableTally(TrainConfig(max_unreadable=0.02), 100)
    again.restore(json.loads(json.dumps(tally.state())))
    assert again.add(_lines(1), 3) == []
    again.add(_lines(5), 3)
    with pytest.raises(UserError, match="3 of 100"):
        again.check(3)
