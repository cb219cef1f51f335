"""White-box curves: the same numbers as a trace gives, for every kind of model, and their command."""

import json

import pytest
import torch

from crate_fast.eval import white_box
from crate_fast.eval.common.images import batches, open_images
from crate_fast.eval.common.models import open_model
from crate_fast.eval.white_box import trend
from crate_fast.whitebox import coding_rate, layer_measures, layer_statistics, nonzero_fraction, trace

MODEL = "crate_tiny_patch8_224@untrained"
SMALL = ["depth=3", "dim=32", "heads=2", "img_size=32"]


def test_measures_are_the_traces():
    model = open_model(MODEL, model_args=SMALL).model
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        traces = trace(model, images)
        measured = layer_measures(model, images, after_mssa=True)
    for layer, layer_trace in enumerate(traces):
        torch.testing.assert_close(measured["coding_rate"][:, layer], layer_trace.coding_rate())
        torch.testing.assert_close(measured["sparsity"][:, layer], nonzero_fraction(layer_trace.after_ista))
        attention = model.transformer.layers[layer][0]
        with torch.no_grad():
            after = attention.fn.qkv(attention.norm(layer_trace.after_mssa)).unflatten(-1, (2, 16))
        torch.testing.assert_close(measured["coding_rate_after_mssa"][:, layer], coding_rate(after))
    assert ((measured["sparsity"] > 0) & (measured["sparsity"] < 1)).all()
    statistics = layer_statistics(model, images)
    for name in ("coding_rate", "sparsity"):
        torch.testing.assert_close(statistics[name][:, 0], measured[name].mean(dim=0))
        torch.testing.assert_close(statistics[name][:, 1], measured[name].std(dim=0, correction=0))


def test_batches_do_not_change_the_curves():
    loaded = open_model(MODEL, image_size=32, model_args=SMALL)
    images = open_images("shape_scenes", 32, 7)
    whole, parts = (white_box.evaluate(loaded, batches(images, size, [])) for size in (7, 2))
    assert whole["images"] == parts["images"] == 7
    for a, b in zip(whole["layers"], parts["layers"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_trends_by_hand():
    assert trend([3.0, 2.0, 1.0]) == {
        "first": 3.0, "last": 1.0, "steps_down": 2, "steps": 2, "spearman": -1.0, "falls": "yes",
    }  # fmt: skip
    assert trend([1.0, 2.0])["falls"] == "no"
    assert trend([3.0, 1.0, 2.0])["falls"] == "in part"
    assert trend([2.0, 2.0])["spearman"] is None
    assert trend([2.0])["falls"] == "no"


def test_the_command_trained_beside_untrained_and_ablations(tiny_run, tmp_path, capsys):
    models = [str(tiny_run), f"untrained={tiny_run}@untrained", f"mlp={MODEL}", "vit=vit_tiny_patch16_224@untrained"]
    words = ["--model-args", "img_size=32", "depth=2", "--limit", "6", "--output", str(tmp_path)]
    assert white_box.main([*models, *words]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["results"]["tiny"]["images"] == 6
    assert [row["layer"] for row in content["results"]["tiny"]["layers"]] == [0, 1]
    assert content["results"]["tiny"]["layers"] != content["results"]["untrained"]["layers"]
    assert content["results"]["vit"]["left_out"].keys() == {"coding_rate", "coding_rate_after_mssa", "sparsity"}
    assert "no subspaces" in (tmp_path / "trends.md").read_text()
    assert (tmp_path / "white_box.png").stat().st_size > 1000
    assert "falls with depth" in capsys.readouterr().out
    assert white_box.main(["vit_tiny_patch16_224@untrained", *words[:3], "--output", str(tmp_path)]) == 2
    assert "none of these models has subspaces or ISTA" in capsys.readouterr().err


@pytest.mark.parametrize(("ablation", "missing"), [("attention=mhsa", "coding_rate"), ("sparsifier=mlp", "sparsity")])
def test_what_an_ablation_lacks_is_left_out(ablation, missing):
    loaded = open_model(MODEL, image_size=32, model_args=[*SMALL, ablation])
    found = white_box.evaluate(loaded, batches(open_images("shape_scenes", 32, 2), 2, []))
    assert missing in found["left_out"]
    assert missing not in found["layers"][0]
    assert len(found["trends"]) == 3 - len(found["left_out"])
