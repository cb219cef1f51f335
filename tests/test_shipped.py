"""The models that come with the package: what they are, that they see objects, and how such a file is made."""

import json

import pytest
import torch
from safetensors.torch import save_file

from crate_fast.errors import UserError
from crate_fast.eval.common import shipped
from crate_fast.eval.common.images import SceneImages, batches
from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.segmentation import attention_to_mask, intersection_over_union
from crate_fast.train.data.shape_scenes import CLASSES
from crate_fast.train.runs import load_model


@torch.no_grad()
def test_segmentation_shows_in_the_crate_that_comes_along():
    """mIoU by mass of the best head at the default layer, on scenes that no model was trained on."""
    (batch,) = batches(SceneImages(128, 32, seed=900_002), 32, [])
    objects = torch.stack([sample.target.on_grid((16, 16))[0][0] for sample in batch.samples])

    def best_head_miou(name: str) -> float:
        loaded = open_model(name)
        layer = loaded.extract.default_layer
        masks = attention_to_mask(loaded.features(batch.images, [layer]).cls_attention(layer), "mass")
        return intersection_over_union(masks, objects[:, None]).amax(dim=1).mean().item()

    assert best_head_miou("shipped:CRATE") > 0.45  # 0.515 on 500 scenes, docs/emergence/earlier/first/report.md
    assert best_head_miou("shipped:ViT") < 0.4  # 0.306
    assert best_head_miou("shipped:CRATE@untrained") < 0.2  # 0.130


def test_they_are_what_they_say():
    for name in shipped.shipped_names():
        model, facts = shipped.open_shipped(name)
        assert facts["classes"] == list(CLASSES)
        assert "commit" in facts["source"]
        assert model.num_classes == 12
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("name", ["shipped:crate", "shipped:", "shipped:../CRATE", "shipped:CRATE@4"])
def test_others_are_refused(name):
    with pytest.raises(ValueError, match="shipped:CRATE"):
        open_model(name)


def test_a_damaged_file_of_the_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    (tmp_path / "mine.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    for read in (shipped.open_shipped, shipped.shipped_facts):
        with pytest.raises(UserError, match="mine.safetensors is a git-lfs pointer"):
            read("mine")
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="does not say what model it holds: install the package again"):
        open_model("shipped:mine")
    facts = {"name": "crate_tiny_patch8_224", "arguments": {"depth": 1, "img_size": 32}}
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "mine.safetensors", {"crate_fast": json.dumps(facts)})
    with pytest.raises(UserError, match="shipped:mine does not hold the weights.*install the package again"):
        open_model("shipped:mine")


def test_a_run_can_be_shipped(tiny_run, tmp_path, monkeypatch):
    assert shipped.main([str(tiny_run), str(tmp_path / "mine.safetensors")]) == 0
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    loaded = open_model("shipped:mine")
    images = torch.rand(2, 3, 32, 32)
    trained = load_model(tiny_run)[0]
    with torch.no_grad():
        assert loaded.model(images) == pytest.approx(trained(images), abs=5e-3)
    assert not torch.equal(open_model("shipped:mine@untrained").model(images), loaded.model(images))
