"""Training: runs, optimisers, schedules, checkpoints, unreadable images. Killed runs: test_faults.py."""

import errno
import itertools
import json
import math
import multiprocessing
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from image_data import encoded, write_tree
from PIL import Image
from runs import TINY, back_to, batches, entries, run, same, steps, tiny_config, trainer, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crate_fast import CRATE
from crate_fast.checkpoints import load_weights
from crate_fast.errors import UserError
from crate_fast.eval import coarse_segmentation
from crate_fast.train import checkpoint, pretrain
from crate_fast.train import trainer as trainer_module
from crate_fast.train.config import TrainConfig
from crate_fast.train.distributed import Processes
from crate_fast.train.objective import Objective
from crate_fast.train.optimizer import clip_gradients, gradient_norm, learning_rate
from crate_fast.train.runs import build_model
from crate_fast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and printed text of a run with EMA, resumed after its end."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    words = ("--epochs", "3", "--eval-every", "2", "--ema-decay", "0.5", "--attn-drop-rate", "0.1")
    text = run(*words, "--output", str(folder))
    run(*words, "--output", str(folder), "--resume")
    return folder, text


def test_a_run_writes_its_files_and_prints_their_paths(finished):
    folder, text = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["chance"], summary["steps"]) == (pytest.approx(1 / 12), 18)
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "tensorboard"):
        assert (folder / name).exists()
        assert str(folder / name) in text
    assert (Path(summary["best_checkpoint"]) / "model.safetensors").is_file()
    assert f"{summary['val_accuracy']:.4f}" in text
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    layers = {f"{name}/layer_{layer:02d}" for name in ("coding_rate", "sparsity") for layer in range(2)}
    assert {"loss", "accuracy", "lr", "val_accuracy", "images_per_s"} | layers <= set(events.Tags()["scalars"])
    model = CRATE(image_size=32, patch_size=8, num_classes=12, dim=32, depth=2, heads=2, dim_head=16)
    load_weights(model, Path(summary["last_checkpoint"]) / "model.safetensors")


def test_the_summary_has_the_last_evaluation(finished):
    folder, _ = finished
    rows = [entry for entry in entries(folder) if "val_loss" in entry]
    assert [row["step"] for row in rows] == [12, 18]
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("val_accuracy", "val_loss", "ema_val_accuracy", "ema_val_loss"):
        assert rows[-1][name] == summary[name]
    assert summary["throughput"]["images_per_s_per_device"] > 0  # measured by the first session


@pytest.mark.usefixtures("unsaved_figures")
def test_coarse_segmentation_of_a_run_equals_its_summary(finished, tmp_path):
    folder, _ = finished
    words = ["--data", "shape_scenes:3", "--limit", "12", "--output", str(tmp_path)]  # the run's seed
    assert coarse_segmentation.main([f"run={folder}@18", *words]) == 0
    scored = json.loads((tmp_path / "results.json").read_text())["results"]["run"]
    assert scored == json.loads((folder / "summary.json").read_text())["attention_miou"]


def test_a_dry_run_trains_two_steps_and_writes_nothing(tmp_path, capsys, monkeypatch):
    taken, train_step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, *a: taken.append(self.step) or train_step(self, *a))
    assert pretrain.main([*TINY, "--output", str(tmp_path / "run"), "--dry-run", "--ema-decay", "0.9"]) == 0
    assert taken == [0, 1]
    assert list(tmp_path.iterdir()) == []
    assert "dry run: 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "--attention mhsa --sparsifier mlp --optimizer lion --precision bf16 --grad-checkpointing --clip-grad 0",
        "--residual paper --threshold soft --schedule released --decay-all --hflip 0.5",
        "--model vit_tiny_patch16_224 --heads 4",
    ],
    ids=lambda words: words.split()[1],
)
def test_runs_of_variants_end(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer_module, "multiplies_bf16", lambda: False)
    start = [*TINY, "--epochs", "1", "--train-samples", "32", "--output", str(tmp_path)]
    assert pretrain.main([*start, *words.split()]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert math.isfinite(summary["val_loss"])
    assert ("attention_miou" in summary) == ("vit" not in words)
    assert ("this processor has no bf16 instructions" in capsys.readouterr().out) == ("bf16" in words)


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


def test_the_ema_by_hand():
    averaged = trainer(ema_decay=0.9, epochs=2)
    expected = {}
    for step, _ in enumerate(steps(averaged, 8), start=1):
        decay = 0.0 if step == 1 else min(0.9, 1 - step ** (-2 / 3))
        for name, value in averaged.model.state_dict().items():
            expected[name] = decay * expected.get(name, 0) + (1 - decay) * value.clone()
    for name, value in averaged.ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_compiles_with_the_given_mode(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: seen.append(mode) or model)
    trainer(compile=True, compile_mode="max-autotune")
    assert seen == ["max-autotune"]


def test_bf16_is_the_default_on_gpus_that_multiply_it(monkeypatch):
    """PyTorch reports support also for GPUs that emulate it, such as V100 and T4."""
    alone = Processes(0, 0, 1, torch.device("cuda", 0))
    for supported, dtype in ((lambda including_emulation: including_emulation, None), (Mock(), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert Objective(TrainConfig(), alone).dtype is dtype
        assert Objective(TrainConfig(precision="bf16"), alone).dtype is torch.bfloat16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_stays_near_fp32(precision):
    ours, exact = ([step.measures["loss"] for step in steps(trainer(precision=each))] for each in (precision, "fp32"))
    assert ours == pytest.approx(exact, rel=0.02)
    assert ours != exact


def test_learning_rates_scale_with_the_batch():
    for rule, factor in (("none", 1), ("linear", 4), ("sqrt", 2)):
        config = TrainConfig(lr=1e-3, batch_size=1024, lr_scaling=rule, warmup_epochs=0, epochs=2)
        assert config.peak_lr == pytest.approx(1e-3 * factor)
        assert learning_rate(config, 0, 10) == pytest.approx(1e-3 * factor)
        assert learning_rate(config, 10, 10) == pytest.approx(0.5e-3 * factor)


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
        with pytest.raises(UserError, match=f"{reason}.*{remedy}"):
            _save(tmp_path, 2, 2.0)
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path):
    for step in range(1, 7):
        _save(tmp_path, step, step)
        if step == 2:
            checkpoint.record_best(tmp_path, {"step": step, "val_accuracy": 0.9})
        checkpoint.rotate(tmp_path, 2)
    assert (checkpoint.steps(tmp_path), checkpoint.best_step(tmp_path)) == ([2, 5, 6], 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of 100 training images, one cut and one a text, and 20 validation images, one empty."""
    draw, files = np.random.default_rng(0), {}
    for split, count in (("train", 50), ("validation", 10)):
        for name in [f"{split}/{label}/{i:02d}.jpg" for label in ("ant", "bee") for i in range(count)]:
            files[name] = encoded(Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)), "JPEG")
    files["train/ant/07.jpg"] = files["train/ant/07.jpg"][:700]
    files |= {"train/bee/31.jpg": b"not an image", "validation/bee/03.jpg": b""}
    return write_tree(tmp_path_factory.mktemp("images"), files)


def _words(folder, run: Path, share: str, *words: str) -> list[str]:
    words = ("--data-dir", str(folder), "--batch-size", "20", "--max-unreadable", share, *words)
    return [*TINY, "--dataset", "folder", "--output", str(run), *words]


def test_unreadable_images_are_named_counted_and_replaced(folder, tmp_path, capsys):
    whole, others = tmp_path / "whole", multiprocessing.active_children()  # of earlier tests
    assert pretrain.main(_words(folder, whole, "0.06", "--workers", "2")) == 0
    assert {*multiprocessing.active_children()} <= {*others}  # they ignore SIGTERM, so Python would wait for them
    lines = (whole / "unreadable.txt").read_text().splitlines()
    names = [line.split(": ")[0].split("/")[-2:] for line in lines]
    assert sorted(map("/".join, names)) == ["ant/07.jpg", "bee/03.jpg", "bee/31.jpg"]
    assert [entry["val_unreadable"] for entry in entries(whole) if "val_accuracy" in entry] == [1, 1]
    run = back_to(whole, 5, tmp_path / "run")  # the count continues in a resumed run
    assert pretrain.main(_words(folder, run, "0.06", "--resume")) == 0
    assert same(weights(whole, 10), weights(run, 10))
    assert [json.loads((f / "summary.json").read_text())["unreadable_images"] for f in (whole, run)] == [2, 2]
    assert sorted((run / "unreadable.txt").read_text().splitlines()) == sorted(lines)  # each once
    assert "training images that could not be read: 2; see unreadable.txt" in capsys.readouterr().out


def test_a_run_ends_if_no_image_of_its_figures_can_be_read(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    for label, i in itertools.product(("ant", "bee"), (0, 2, 5, 7)):  # the evenly spaced eight of twenty
        (data / "validation" / label / f"{i:02d}.jpg").write_bytes(b"")
    assert pretrain.main(_words(data, tmp_path / "run", "1", "--epochs", "1")) == 0


@pytest.mark.parametrize(("share", "split"), [("0.01", "2 of 100 images"), ("0.04", "1 of 20 images")])
def test_too_many_unreadable_images_stop_the_run(folder, tmp_path, share, split, refuses):
    message = f"{split}.*could not be read.*max_unreadable={share}"
    refuses(message, pretrain.main, _words(folder, tmp_path, share))
    assert (tmp_path / "unreadable.txt").read_text()
    if "20" in split:  # validation images: the epoch before is saved
        assert checkpoint.newest(tmp_path / "checkpoints") == 5


def test_unreadable_validation_images_are_limited_per_evaluation(folder, tmp_path, monkeypatch):
    """Each of two evaluations has one other unreadable image of twenty; the limit is between one and two."""
    numbers, eval_loader = iter(range(9)), trainer_module.eval_loader

    class Flaky(list):
        def __iter__(self):
            yield from (batch._replace(problems=[f"image {next(numbers)}: gone"]) for batch in super().__iter__())

    monkeypatch.setattr(trainer_module, "eval_loader", lambda *a, **o: Flaky(eval_loader(*a, **o)))
    assert pretrain.main(_words(folder, tmp_path, "0.07")) == 0
    assert next(numbers) == 2
