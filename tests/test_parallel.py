"""One process, DDP and FSDP2 have the same losses and read each other's checkpoints."""

import functools
import json
import math
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from image_data import write_tree
from runs import ALONE, TINY, back_to, entries, losses, run, same, weights

from crate_fast.train import distributed, pretrain
from crate_fast.train.data.loader import files_checksum
from crate_fast.train.data.sources import FolderSource
from crate_fast.train.distributed import process_group

pytestmark = pytest.mark.usefixtures("no_figures")
WORDS = ("--ema-decay", "0.9", "--hflip", "0.5", "--batch-size", "24", "--epochs", "1", "--warmup-epochs", "0")
WORDS += ("--clip-grad", "0.5", "--checkpoint-every", "2")
LAST = 4
ACCUMULATED = ("--accumulate", "3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert pretrain.main([*TINY, *WORDS, "--output", str(folder), "--keep-checkpoints", "9"]) == 0
    return folder


def _agrees(folder, alone) -> None:
    """Check that weights and all logged numbers but the speed agree to rounding."""
    ours, theirs = entries(folder), entries(alone)
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() - {"images_per_s"}:
            assert one[name] == pytest.approx(other[name], rel=2e-4), (one["step"], name)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (folder, alone)]
    assert summaries[0]["attention_miou"]["mass"]["images"] == summaries[1]["attention_miou"]["mass"]["images"]
    for name in ("model", "ema"):
        first, second = weights(folder, LAST, name), weights(alone, LAST, name)
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[key], second[key], rtol=1e-3, atol=2e-4) for key in first)


@pytest.fixture(scope="module")
def pair(alone, tmp_path_factory):
    """A function that returns the folder of a run of two processes by engine, which must agree with one process."""

    @functools.cache
    def finished(parallel: str):
        folder = tmp_path_factory.mktemp("pairs") / parallel
        words = (*WORDS, "--output", str(folder), "--parallel", parallel, "--keep-checkpoints", "9")
        assert f"on 2 × cpu ({parallel})" in run(*words, *ACCUMULATED, processes=2)
        _agrees(folder, alone)
        return folder

    return finished


@pytest.mark.parametrize(("saved_by", "count", "loaded_by"), [("ddp", 3, "fsdp"), ("fsdp", 1, "ddp")])
def test_a_checkpoint_of_two_processes_loads_into_any_number(alone, pair, tmp_path, saved_by, count, loaded_by):
    folder = back_to(pair(saved_by), 2, tmp_path / "run")
    words = (*WORDS, "--output", str(folder), "--resume", "--parallel", loaded_by)
    assert "from step 2 on" in run(*words, processes=count)
    _agrees(folder, alone)


def test_a_resumed_run_of_two_processes_is_bit_identical(pair, tmp_path):
    whole = pair("fsdp")
    folder = back_to(whole, 2, tmp_path / "run")
    run(*WORDS, "--output", str(folder), "--parallel", "fsdp", *ACCUMULATED, "--resume", processes=2)
    assert same(weights(whole, LAST), weights(folder, LAST))
    assert losses(whole) == losses(folder)


def test_sharded_processes_skip_the_same_step_in_fp16(tmp_path):
    """The values of only one process are not finite."""
    code = """
import math
from crate_fast.train.trainer import Trainer
prepare = Trainer.prepare_images
def poisoned(self, images):
    bad = self.step == 2 and self.processes.rank == 1 and self.model.training
    return prepare(self, images) * (math.inf if bad else 1)
Trainer.prepare_images = poisoned
"""
    words = (*WORDS, "--parallel", "fsdp", "--precision", "fp16", "--output", str(tmp_path))
    run(*words, before=code, processes=2)
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_steps"] == 1
    assert 3 not in losses(tmp_path)
    assert all(math.isfinite(loss) for loss in losses(tmp_path).values())


def test_processes_with_different_data_are_an_error(tmp_path):
    """With 95 images instead of 96, one would take fewer steps per epoch, and the other would wait for it."""
    code = """
import os
from dataclasses import replace
from crate_fast.train import trainer
build = trainer.build_splits
fewer = 95 if os.environ["RANK"] == "1" else 96
trainer.build_splits = lambda config: build(replace(config, train_samples=fewer))
"""
    text = run(*WORDS, "--output", str(tmp_path / "run"), before=code, processes=2, status=2)
    assert text.count("error: process 1 has train_images=95 and process 0 96: give all processes the same data") == 2


def test_files_with_other_names_or_labels_have_another_checksum(tmp_path):
    found = set()
    for names in (("a/1.png", "b/2.png"), ("a/1.png", "b/3.png"), ("a/1.png", "a/2.png", "b/3.png")):
        folder = write_tree(tmp_path / str(len(found)), dict.fromkeys(names, b""))
        found.add(files_checksum(SimpleNamespace(images=FolderSource(folder))))
    assert len(found) == 3
    assert files_checksum(SimpleNamespace(images=[])) is None


def test_only_the_control_group_waits_longer_than_half_an_hour(monkeypatch):
    """A rank that is lost must not keep the others in NCCL for hours."""
    groups = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "choose_device", lambda *_: torch.device("cuda", 0))
    for name in ("init_process_group", "new_group"):
        start = lambda *backend, **how: groups.append((*backend, how.get("backend"), how["timeout"])) or "control"  # noqa: E731
        monkeypatch.setattr(distributed.dist, name, start)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    with process_group("cuda") as processes:
        assert processes.control == "control"
    assert groups == [("nccl", None, timedelta(minutes=30)), ("gloo", timedelta(hours=2))]


def test_the_unsharded_model_is_in_evaluation_mode(monkeypatch):
    """Else the logged sparsity would be that of a model with dropout."""
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(distributed, "is_sharded", lambda _: True)
    monkeypatch.setattr(distributed, "get_state_dict", lambda *_, **__: (model.state_dict(), {}))
    whole = distributed.unsharded(model, lambda: torch.nn.Linear(2, 2), ALONE)
    assert not whole.training
    assert torch.equal(whole.weight, model.weight)


def test_after_an_error_a_process_does_not_wait_for_the_others(monkeypatch):
    """NCCL would wait for the other processes to destroy the group, and they may be in a collective."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = []
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: ended.append("destroyed"))
    with pytest.raises(torch.OutOfMemoryError), process_group("cpu"):
        raise torch.OutOfMemoryError
    assert ended == []
    with process_group("cpu"):
        assert ended == []
    assert ended == ["destroyed"]
