"""A run's best model as a folder for timm and the Hub: equal outputs, a card with scores, no local paths."""

import json

import pytest
import timm
import torch

from crate_fast.train import share
from crate_fast.train.config import TrainConfig
from crate_fast.train.runs import load_model
from crate_fast.train.share import main


@pytest.fixture(scope="module")
def shared(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "model"
    row, box = {"layer": 0, "best_head": {"MaxBoxAccV2": 0.5}}, {"MaxBoxAccV2": 0.25}
    scores = folder.with_name("results.json")
    scores.write_text(json.dumps({"results": {"A": {"layers": [row], "baselines": {"mean box": box}}}}))
    assert main([str(tiny_run), str(folder), "--scores", str(scores), "--license", "mit"]) == 0
    return folder


@torch.no_grad()
def test_timm_loads_the_folder_with_equal_outputs(shared, tiny_run):
    model, config, _ = load_model(tiny_run)
    opened = timm.create_model(f"local-dir:{shared}", pretrained=True).eval()
    images = torch.randn(2, 3, config.image_size, config.image_size)
    assert torch.equal(opened(images), model(images))
    assert opened.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    written = json.loads((shared / "config.json").read_text())["pretrained_cfg"]
    assert written["label_names"][:2] == ["disc", "ring"]
    assert (written["num_classes"], written["license"]) == (12, "mit")


def test_the_card_has_the_runs_scores_and_no_local_paths(shared, tiny_run):
    card = (shared / "README.md").read_text()
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert f"validation accuracy: {summary['best_val_accuracy']:.4f}" in card
    for words in ("average precision, best head", "mean mask", "MaxBoxAccV2 0.500; mean box 0.250"):
        assert words in card
    assert {"license: mit", "dim: 32"} <= {*card.splitlines()}
    assert "/tmp" not in card


def test_runs_that_cannot_be_shared_are_errors(shared, tiny_run, tmp_path, refuses, monkeypatch):
    run, new = str(tiny_run), str(tmp_path / "new")
    refuses("already holds a model", main, [run, str(shared)])
    refuses("holds no checkpoints", main, [str(tmp_path), new])
    refuses("is not a results.json", main, [run, new, "--scores", str(tiny_run / "config.yaml")])
    monkeypatch.setattr(share, "load_model", lambda run: (None, TrainConfig(frozen=True), 4))
    refuses("a run of a linear probe", main, [run, new])
    assert not (tmp_path / "new").exists()


def test_a_failed_upload_gives_the_command_that_uploads_the_folder(tiny_run, tmp_path, monkeypatch, refuses):
    def fail(*arguments, **options):
        raise Exception("no network")  # no OSError in huggingface_hub 2

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    folder = tmp_path / "model"
    refuses(f"no network.*hf upload USER/NAME {folder}", main, [str(tiny_run), str(folder), "--push", "USER/NAME"])
    assert (folder / "model.safetensors").is_file()
