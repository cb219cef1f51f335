"""k-NN, linear probe and a model's own head: by hand, on planted features, and through the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_data import encoded, write_tree
from PIL import Image

from crate_fast.eval import classify
from crate_fast.eval.classify import LabelledImages, knn_predictions, linear_probe, pooled
from crate_fast.eval.common.models import open_model
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import plain_splits

MODEL = "crate_tiny_patch8_224@untrained"
SMALL = ["depth=2", "dim=32", "heads=2", "img_size=32", "num_classes=3"]


def test_knn_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.1, 0.9], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    val = torch.tensor([[5.0, 0.4], [0.0, 0.1], [-2.0, -0.1]])
    found = knn_predictions(train, labels, val, [1, 3])
    assert found[1].tolist() == [0, 1, 2]
    assert found[3].tolist() == [0, 1, 2]  # the nearest of class 2 outweighs two of other classes by exp(cosine/0.07)
    even = knn_predictions(train, labels, val, [5], temperature=1e3)  # weights all but equal
    assert even[5].tolist() == [0, 1, 1]  # two far ones outvote the near one of class 2
    with pytest.raises(ValueError, match="--k 6: there are 5 training images"):
        knn_predictions(train, labels, val, [6])


def test_knn_in_chunks_is_knn(monkeypatch):
    train, labels, val = torch.randn(50, 8), torch.randint(0, 4, (50,)), torch.randn(23, 8)
    whole = knn_predictions(train, labels, val, [1, 5])
    for held in (1, 350):  # similarities: one and seven validation images at a time
        monkeypatch.setattr(classify, "_MAX_SIMILARITIES", held)
        parts = knn_predictions(train, labels, val, [1, 5])
        assert all(torch.equal(parts[k], whole[k]) for k in whole)


def test_a_linear_probe_finds_a_planted_direction_and_no_other():
    labels = torch.arange(300) % 3
    features = torch.randn(300, 10)
    planted = features.clone()
    planted[:, :3] += 4 * torch.eye(3)[labels]
    probe = linear_probe(planted[:200], labels[:200], planted[200:])
    assert (probe.predictions == labels[200:]).float().mean() > 0.95
    assert probe.converged
    assert probe.C in probe.held_out
    shuffled = linear_probe(features[:200], labels[:200], features[200:])
    assert (shuffled.predictions == labels[200:]).float().mean() < 0.5
    scaled = linear_probe(1000 * planted[:200] + 7, labels[:200], 1000 * planted[200:] + 7)
    assert torch.equal(scaled.predictions, probe.predictions)  # standardised
    with pytest.raises(ValueError, match="of 1 classes are too few"):
        linear_probe(features, torch.zeros(300, dtype=torch.long), features)


def test_limits_are_spread_over_the_split():
    images = LabelledImages([None] * 100, "validation", 4)
    assert images.indices == [0, 25, 50, 75]
    assert len(LabelledImages([None] * 3, "validation", 10)) == 3


@pytest.mark.parametrize("name", ["crate_tiny_patch8_224", "vit_tiny_patch16_224"])
def test_features_are_what_the_head_reads(name):
    patch = {"depth": 2, "img_size": 32, "num_classes": 3}
    model = timm.create_model(name, **patch).eval()
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(2, 3, 32, 32))
        wanted = model.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(pooled(model, tokens), wanted)
        assert pooled(model, tokens, "mean").shape == wanted.shape
        assert not torch.allclose(pooled(model, tokens, "mean"), wanted)


def test_notes_about_a_linear_probe():
    tried = {0.1: 0.5, 1.0: 0.6, 10.0: 0.4}
    assert classify._notes("A", {"linear": {"C": 1.0, "held_out": tried, "converged": True}}) == []
    said = classify._notes("A", {"linear": {"C": 10.0, "held_out": tried, "converged": False}})
    assert said[0] == "A: the linear probe's fit did not converge"
    assert said[1] == "A: C = 10 is at the end of the range tried (0.1 to 10)"
    assert classify._notes("A", {"knn": {}}) == []


def _folder(root: Path, per_class: int = 6) -> Path:
    """Three classes of plain colours with noise, train and val."""
    draw, files = np.random.default_rng(0), {}
    for split in ("train", "val"):
        for k, name in enumerate(("blue", "green", "red")):
            for i in range(per_class):
                picture = draw.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                picture[..., 2 - k] += 150
                files[f"{split}/{name}/{i}.png"] = encoded(Image.fromarray(picture))
    return write_tree(root, files)


def test_neither_split_is_augmented_and_broken_files_are_named(folder):
    where = {"dataset": "folder", "data_dir": str(folder), "val_split": "val", "image_size": 32}
    config = TrainConfig(**where, crop="random", hflip=0.5)
    data = plain_splits(config)
    image, label = data.train[0, 7]
    again, _ = data.train[5, 7]
    assert torch.equal(image, again)
    assert label == 1
    (folder / "train" / "green" / "1.png").write_bytes(b"broken")
    sample = LabelledImages(plain_splits(config).train, "training")[7]
    assert "green/1.png" in sample.problem


@pytest.fixture
def folder(tmp_path):
    return _folder(tmp_path / "data")


def _words(folder, output, *more, labels=("ours",)) -> list[str]:
    data = ["--dataset", "folder", "--data-dir", str(folder), "--val-split", "val", "--output", str(output)]
    return [*(f"{label}={MODEL}" for label in labels), "--model-args", *SMALL, *data, *more]


def _run(*words) -> dict:
    assert classify.main(_words(*words)) == 0
    return json.loads((words[1] / "results.json").read_text())


def test_the_command_on_a_folder(folder, tmp_path, capsys):
    (folder / "val" / "red" / "5.png").write_bytes(b"broken")
    words = ["--protocol", "head,knn,linear", "--k", "1,5", "--raw-pixels"]
    content = _run(folder, tmp_path / "out", *words)
    result = content["results"]["ours"]
    assert result["images"] == 17
    assert result["train_images"] == 18
    assert result["chance"] == pytest.approx(6 / 17)
    assert result["head"]["top5"] is None  # of three classes any five are all
    assert set(result["knn"]) == {"1", "5"}
    assert result["raw_pixels"]["knn"]["1"] == 1.0  # plain colours
    assert content["unreadable"]["count"] == 1
    assert "red/5.png" in content["unreadable"]["images"][0]
    assert "unreadable images: 1" in capsys.readouterr().out
    assert _run(folder, tmp_path / "again", *words)["results"] == content["results"]


def test_default_neighbours_are_those_there_are_images_for(folder, tmp_path, capsys):
    result = _run(folder, tmp_path / "out", "--protocol", "head,knn,linear")["results"]["ours"]
    assert set(result["knn"]) == {"10"}
    assert result["head"]
    assert result["linear"]
    assert "ours: 20-NN left out: there are 18 training images" in capsys.readouterr().out
    result = _run(folder, tmp_path / "few", "--train-limit", "6", "--protocol", "knn")["results"]["ours"]
    assert set(result["knn"]) == {"6"}
    assert set(result["left_out"]) == {"10-NN", "20-NN", "100-NN", "200-NN"}


@pytest.mark.parametrize(
    ("whole", "left_out", "knn"),
    [
        ("nothing", {"knn", "linear"}, set()),
        ("red/*.png", {"linear"}, {"2", "5"}),
        ("*/0.png", {"5-NN", "linear"}, {"2"}),
    ],
)
def test_what_only_reading_shows_does_not_lose_the_other_results(folder, tmp_path, capsys, whole, left_out, knn):
    """Training images are broken, all but some."""
    for path in (folder / "train").rglob("*.png"):
        if not path.match(whole):
            path.write_bytes(b"broken")
    words = ["--protocol", "head,knn,linear", "--k", "2,5"]
    result = _run(folder, tmp_path / "out", *words)["results"]["ours"]
    assert result["head"]["top1"] >= 0
    assert set(result["left_out"]) == left_out
    assert set(result.get("knn", {})) == knn
    assert "linear left out" in capsys.readouterr().out


def test_a_run_brings_its_own_data(tiny_run, tmp_path):
    arguments = [str(tiny_run), "--protocol", "head,knn", "--k", "5", "--output", str(tmp_path)]
    assert classify.main(arguments) == 0
    result = json.loads((tmp_path / "results.json").read_text())["results"]["tiny"]
    recorded = json.loads((tiny_run / "summary.json").read_text())
    assert result["images"] == 16
    assert result["head"]["top1"] == pytest.approx(recorded["best_val_accuracy"])  # the best checkpoint's
    assert len(result["per_class"]["head"]) == 12


def test_the_papers_number_stands_beside_a_model_of_its_name():
    config = TrainConfig(dataset="folder", data_dir="data/cifar10")
    assert classify._paper_score("CRATE-S/8", config, 10) == 0.972
    assert classify._paper_score("mine", config, 10) is None
    assert open_model(MODEL, model_args=SMALL).config is None
