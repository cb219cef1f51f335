"""Training: a whole run, optimisers, schedules, checkpoints. See also test_faults.py and test_parallel.py."""

import errno
import itertools
import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from runs import batches, run, steps, tiny_config, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crate_fast import CRATE
from crate_fast.checkpoints import load_weights
from crate_fast.eval import coarse_segmentation
from crate_fast.train import checkpoint
from crate_fast.train.config import TrainConfig
from crate_fast.train.optimizer import clip_gradients, gradient_norm, learning_rate
from crate_fast.train.runs import build_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and printed text of a run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run("--attn-drop-rate", "0.1", "--output", str(folder))


def test_a_run_writes_its_files_and_prints_their_paths(finished):
    folder, text = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["chance"], summary["steps"]) == (pytest.approx(1 / 12), 12)
    for name in ("config.yaml", "metrics.jsonl", "curves.png", "attention.png", "summary.json", "tensorboard"):
        assert (folder / name).exists()
        assert str(folder / name) in text
    assert (Path(summary["best_checkpoint"]) / "model.safetensors").is_file()
    assert (folder / "attention.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{summary['val_accuracy']:.4f}" in text
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    layers = {f"{name}/layer_{layer:02d}" for name in ("coding_rate", "sparsity") for layer in range(2)}
    assert {"loss", "accuracy", "lr", "val_accuracy", "images_per_s"} | layers <= set(events.Tags()["scalars"])
    model = CRATE(image_size=32, patch_size=8, num_classes=12, dim=32, depth=2, heads=2, dim_head=16)
    load_weights(model, Path(summary["last_checkpoint"]) / "model.safetensors")


def test_training_fits_eight_images_of_noise():
    learning = trainer(epochs=10, dim=64, lr=3e-3, weight_decay=0.0, label_smoothing=0.0)
    images = itertools.repeat(batches(learning)[0])
    for _ in range(learning.total_steps):
        loss = learning.train_step(images).measures["loss"]
    assert loss < 0.1


@pytest.mark.parametrize("decay_all", [False, True])
def test_layer_decay_by_hand(decay_all):
    decayed = trainer(depth=3, layer_decay=0.5, decay_all=decay_all, lr=1e-3, warmup_epochs=0.0)
    names = {id(parameter): name for name, parameter in decayed.model.named_parameters()}
    next(steps(decayed))
    seen = {names[id(p)]: group for group in decayed.optimizer.param_groups for p in group["params"]}
    assert seen.keys() == set(names.values())
    for name, power in (("mlp_head.1.weight", 0), ("transformer.layers.2.1.fn.weight", 1), ("pos_embedding", 4)):
        assert seen[name]["lr"] == pytest.approx(1e-3 * 0.5**power)
    assert seen["transformer.layers.0.0.fn.qkv.weight"]["lr"] == pytest.approx(1e-3 * 0.5**3)
    decays = {name: group["weight_decay"] > 0 for name, group in seen.items()}
    assert decays["mlp_head.1.weight"]
    assert decays["pos_embedding"] == decays["mlp_head.0.bias"] == decay_all


@pytest.mark.parametrize("mode", ["norm", "value"])
def test_clipping_by_hand(mode):
    model, before = build_model(tiny_config(depth=1), 12), {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        before[name] = parameter.grad.clone()
    clip_gradients(model, 0.02, mode, gradient_norm(model))
    total = torch.cat([gradient.flatten() for gradient in before.values()]).norm()
    for name, parameter in model.named_parameters():
        gradient = before[name]
        expected = gradient * 0.02 / total if mode == "norm" else gradient.clamp(-0.02, 0.02)
        torch.testing.assert_close(parameter.grad, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_clips_gradients_by_its_mode():
    found = {mode: [step.measures["loss"] for step in steps(trainer(clip_mode=mode))] for mode in ("norm", "value")}
    assert found["norm"][0] == found["value"][0]  # before any clipping
    assert found["norm"][3] != found["value"][3]


def test_coarse_segmentation_of_a_run_equals_its_summary(finished, tmp_path):
    folder, _ = finished
    words = ["--data", "shape_scenes:3", "--limit", "12", "--output", str(tmp_path)]  # the run's seed
    assert coarse_segmentation.main([f"run={folder}@12", *words]) == 0
    scored = json.loads((tmp_path / "results.json").read_text())["results"]["run"]
    assert scored == json.loads((folder / "summary.json").read_text())["attention_miou"]


def _save(root: Path, step: int, value: float) -> Path:
    weights = {"w": torch.full((1000,), value)}
    return checkpoint.save(root, step, weights, {"step": step}, {"config": {}})


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("model.safetensors", "cut", r"is damaged: it has \d+ bytes instead of"),
        ("model.safetensors", "flip", "is damaged: its SHA-256 differs"),
        ("model.safetensors", "delete", "is missing"),
        ("training.pt", "flip", "is damaged: its SHA-256 differs"),
        ("manifest.json", "cut", "cannot be read"),
        ("manifest.json", "delete", "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_and_the_previous_one_loads(tmp_path, name, harm, reason):
    _save(tmp_path, 1, 1.0)
    path = _save(tmp_path, 2, 2.0) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x41
    path.write_bytes(content[: len(content) // 2] if harm == "cut" else content)
    if harm == "delete":
        path.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} {reason}.*step_00000001 is intact: delete"):
        checkpoint.load(tmp_path, 2)
    saved = checkpoint.load(tmp_path, 1)
    assert (saved.weights["w"][0], saved.training["step"]) == (1.0, 1)


def test_a_failed_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    _save(tmp_path, 1, 1.0)
    for number, reason, remedy in (
        (errno.ENOSPC, "No space", "free some space"),
        (errno.EACCES, "denied", "check its permissions"),
    ):
        monkeypatch.setattr(checkpoint.torch, "save", Mock(side_effect=OSError(number, reason)))
        with pytest.raises(checkpoint.DiskError, match=f"{reason}.*{remedy}"):
            _save(tmp_path, 2, 2.0)
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path):
    for step in range(1, 7):
        _save(tmp_path, step, step)
        if step == 2:
            checkpoint.record_best(tmp_path, {"step": step, "val_accuracy": 0.9})
        checkpoint.rotate(tmp_path, 2)
    assert (checkpoint.steps(tmp_path), checkpoint.best_step(tmp_path)) == ([2, 5, 6], 2)


def test_the_cosine_schedule():
    config = TrainConfig(epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step, 50) for step in range(500)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99] == pytest.approx(1.0)
    assert all(a < b for a, b in itertools.pairwise(rates[:100]))
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))
    assert rates[300] == pytest.approx(0.1 + 0.9 / 2)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_the_released_schedule_is_constant_within_an_epoch():
    config = TrainConfig(epochs=200, warmup_epochs=20, lr=2e-4, schedule="released")
    by_epoch = [learning_rate(config, epoch * 5, 5) for epoch in range(200)]
    assert all(learning_rate(config, epoch * 5 + 4, 5) == by_epoch[epoch] for epoch in range(200))
    for epoch, rate in enumerate(by_epoch):
        rising, falling = (epoch + 1) / 20, 0.5 * (1 + math.cos(math.pi * epoch / 200))
        assert rate == pytest.approx(2e-4 * min(rising, falling))
