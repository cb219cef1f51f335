"""k-NN, linear probe and the model's own head: values by hand, planted features, and the command."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from image_data import encoded, write_tree
from PIL import Image
from torchvision import transforms

from crate_fast.errors import UserError
from crate_fast.eval import classify
from crate_fast.eval.classify import knn_predictions, linear_probe, pooled
from crate_fast.eval.common.images import LabelledImages
from crate_fast.eval.common.models import open_model
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.loader import plain_splits
from crate_fast.train.data.transforms import eval_transform

WORDS = "ours=crate_tiny_patch8_224@untrained --model-args depth=2 dim=32 heads=2 img_size=32 num_classes=3"
WORDS += " --dataset folder --val-split val"


def test_knn_by_hand(monkeypatch):
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.1, 0.9], [-1.0, 0.0]])
    labels, val = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([[5.0, 0.4], [0.0, 0.1], [-2.0, -0.1]])
    for held in (2**26, 10, 1):  # similarities of all, two or one of the validation images at a time
        monkeypatch.setattr(classify, "_MAX_SIMILARITIES", held)
        found = knn_predictions(train, labels, val, [1, 3])
        for k in (1, 3):  # class 2: weighted by exp(cosine/0.07), the nearest outvotes two others
            assert found[k].tolist() == [0, 1, 2]
    even = knn_predictions(train, labels, val, [5], temperature=1e3)  # nearly equal weights
    assert even[5].tolist() == [0, 1, 1]  # class 2: two distant neighbours outvote the nearest


def test_a_linear_probe_finds_a_planted_direction_and_nothing_in_noise():
    labels = torch.arange(300) % 3
    features = torch.randn(300, 10)
    planted = features + 4 * torch.eye(3, 10)[labels]
    probe = linear_probe(planted[:200], labels[:200], planted[200:])
    assert (probe.predictions == labels[200:]).float().mean() > 0.95
    shuffled = linear_probe(features[:200], labels[:200], features[200:])
    assert (shuffled.predictions == labels[200:]).float().mean() < 0.5
    scaled = linear_probe(1000 * planted[:200] + 7, labels[:200], 1000 * planted[200:] + 7)
    assert torch.equal(scaled.predictions, probe.predictions)  # features are standardised
    with pytest.raises(ValueError, match="of 1 classes are too few"):
        linear_probe(features, torch.zeros(300, dtype=torch.long), features)


def test_a_limit_takes_images_from_the_whole_split():
    assert LabelledImages([None] * 100, "validation", 4).indices == [0, 25, 50, 75]
    assert len(LabelledImages([None] * 3, "validation", 10)) == 3


@pytest.mark.parametrize("name", ["crate_tiny_patch8_224", "vit_tiny_patch16_224"])
def test_pooled_features_are_the_heads_input(name):
    model = timm.create_model(name, depth=2, img_size=32, num_classes=3).eval()
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(2, 3, 32, 32))
        wanted = model.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(pooled(model, tokens), wanted)
        assert pooled(model, tokens, "mean").shape == wanted.shape
        assert not torch.allclose(pooled(model, tokens, "mean"), wanted)


@torch.no_grad()
def test_pooled_features_do_not_pass_through_a_models_attention_pooling():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3, global_pool="map").eval()
    tokens = model.forward_features(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(pooled(model, tokens, "mean"), tokens[:, 1:].mean(dim=1))
    torch.testing.assert_close(pooled(model, tokens), tokens[:, 0])


@pytest.fixture
def folder(tmp_path):
    """Two splits of three classes, six images each: plain colours with noise."""
    draw, files = np.random.default_rng(0), {}
    for split, (k, name), i in itertools.product(("train", "val"), enumerate(("blue", "green", "red")), range(6)):
        picture = draw.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        picture[..., 2 - k] += 150
        files[f"{split}/{name}/{i}.png"] = encoded(Image.fromarray(picture))
    return write_tree(tmp_path / "data", files)


def test_no_split_is_augmented_and_broken_files_are_named(folder):
    where = {"dataset": "folder", "data_dir": str(folder), "val_split": "val", "image_size": 32}
    config = TrainConfig(**where, crop="random", hflip=0.5)
    data = plain_splits(config)
    (first, second), labels, *_ = data.train.batch([(0, 7), (5, 7)])
    assert torch.equal(first, second)
    assert labels.tolist() == [1, 1]
    (folder / "train" / "green" / "1.png").write_bytes(b"broken")
    assert "green/1.png" in LabelledImages(plain_splits(config).train, "training")[7].problem


def _run(folder, output, words: str) -> dict:
    words = f"{WORDS} --data-dir {folder} --output {output} {words}"
    assert classify.main(words.split()) == 0
    return json.loads((output / "results.json").read_text())


def test_the_command_on_a_folder(folder, tmp_path, capsys):
    (folder / "val" / "red" / "5.png").write_bytes(b"broken")
    words = "--protocol head,knn,linear --k 1,5 --raw-pixels"
    content = _run(folder, tmp_path / "out", words)
    result = content["results"]["ours"]
    assert (result["images"], result["train_images"]) == (17, 18)
    assert result["chance"] == pytest.approx(6 / 17)
    assert result["head"]["top5"] is None  # there are three classes
    assert (set(result["knn"]), "linear" in result) == ({"1", "5"}, True)
    assert result["raw_pixels"]["knn"]["1"] == 1.0  # plain colours
    assert "red/5.png" in content["unreadable"]["images"][0]
    assert "unreadable images: 1" in capsys.readouterr().out
    assert _run(folder, tmp_path / "again", words)["results"] == content["results"]


def test_default_numbers_of_neighbours_are_limited_by_the_images(folder, tmp_path):
    assert set(_run(folder, tmp_path / "out", "--protocol knn")["results"]["ours"]["knn"]) == {"10"}
    assert set(_run(folder, tmp_path / "few", "--train-limit 6 --protocol knn")["results"]["ours"]["knn"]) == {"6"}


def test_a_run_is_evaluated_on_its_own_data(tiny_run, tmp_path):
    arguments = [str(tiny_run), "--protocol", "head,knn", "--k", "5", "--output", str(tmp_path)]
    assert classify.main(arguments) == 0
    result = json.loads((tmp_path / "results.json").read_text())["results"]["tiny"]
    best = json.loads((tiny_run / "summary.json").read_text())["best_val_accuracy"]
    assert (result["images"], result["classes"]) == (16, 12)
    assert result["head"]["top1"] == pytest.approx(best)


def test_classes_that_are_numbers_in_the_order_of_texts_are_an_error(tmp_path):
    """0, 1, 10, 2, …: of a model without names of its classes, output 2 is not the third folder."""
    picture = encoded(Image.new("RGB", (32, 32)))
    write_tree(tmp_path, {f"val/{number}/0.png": picture for number in range(11)})
    loaded = open_model("crate_tiny_patch8_224@untrained", model_args=["depth=1", "num_classes=11"])
    data = plain_splits(TrainConfig(dataset="folder", data_dir=str(tmp_path), val_split="val"), train=False)
    with pytest.raises(UserError, match="numbers in the order 0, 1, 10, .*leading zeros"):
        classify.check(loaded, data, ["head"])


def test_a_heads_accuracy_needs_no_training_split_and_the_models_own_crop(folder, tmp_path):
    for path in (folder / "train").rglob("*.png"):
        path.unlink()
    result = _run(folder, tmp_path / "out", "--protocol head")["results"]["ours"]
    assert (result["data"]["crop_pct"], result["pool"]) == (1.0, "cls")
    released, picture = timm.create_model("crate_tiny_patch16_224").pretrained_cfg, Image.effect_noise((400, 300), 90)
    wanted = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(picture)  # of the released code
    how = {name: released[name] for name in ("crop_pct", "interpolation")}
    assert np.array_equal(np.asarray(eval_transform(224, **how)(picture)), np.asarray(wanted))


def test_a_model_that_pools_patches_is_probed_on_their_mean(folder, tmp_path):
    words = WORDS.replace("num_classes=3", "num_classes=3 global_pool=avg")
    words += f" --data-dir {folder} --output {tmp_path / 'out'} --protocol knn"
    assert classify.main(words.split()) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"]["ours"]["pool"] == "mean"


def test_a_head_is_matched_with_the_data_by_the_names_of_the_classes(tiny_run):
    loaded = open_model(str(tiny_run))
    data = plain_splits(loaded.config)
    found = classify.evaluate(loaded, data, ["head"])
    with pytest.raises(UserError, match="^[^\\n]*different classes, such as disc, disk: score.*knn"):
        classify.check(loaded, replace(data, classes=("disk", *data.classes[1:])), ["head"])
    assert classify.evaluate(loaded, replace(data, classes=tuple(map(str, range(12)))), ["head"]) == found  # no names
    order = torch.randperm(12).tolist()
    for values in loaded.model.get_classifier().parameters():
        values.data = values.data[order]
    loaded = replace(loaded, classes=[data.classes[number] for number in order])
    assert classify.evaluate(loaded, data, ["head"])["head"] == pytest.approx(found["head"])
