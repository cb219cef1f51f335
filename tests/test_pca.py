"""PCA of features: planted foregrounds and parts, scores by hand, and every mode of the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crate_fast.eval.common.features import Features, LayerTokens
from crate_fast.eval.common.images import Batch, Sample, SceneImages, Target
from crate_fast.eval.pca import TooFewPatchesError, evaluate, foreground, main, pca_rgb

CRATE = ["A=crate_tiny_patch8_224@untrained", "--model-args", "depth=3", "dim=32", "heads=2", "img_size=32"]


def test_the_planted_foreground_is_found_for_both_signs():
    mask = torch.zeros(2, 6, 6, dtype=torch.bool)
    mask[0, 2:4, 1:5] = mask[1, 1:5, 2:4] = True
    mask, direction = mask.flatten(1), torch.tensor([0.6, -0.8, 0, 0, 0, 0, 0, 0])
    features = torch.where(mask[..., None], 2 * direction, -direction) + 0.05 * torch.randn(2, 36, 8)
    for sign in (1, -1):
        found = foreground(sign * features)
        assert torch.equal(found.mask, mask)
        assert found.explained[0] > 0.95
        assert len(found.explained) == 4
    faint = torch.cat([features[:1], 0.4 * features[1:]])  # the images share one component
    assert torch.equal(foreground(faint).mask, mask)
    assert not foreground(1e-3 * features).mask.any()
    assert not torch.equal(foreground(features + 10).mask, mask)


def test_projections_from_the_threshold_on_are_kept():
    features = torch.zeros(1, 16, 3)
    features[0, [5, 6, 9, 10], 0] = torch.tensor([0.25, 0.5, 0.75, 3.0])
    for settings, kept in (({}, [6, 9, 10]), ({"threshold": 0.7}, [9, 10]), ({"threshold": 0}, [5, 6, 9, 10])):
        assert foreground(features, **settings).mask[0].nonzero().flatten().tolist() == kept
    np.testing.assert_allclose(foreground(features).projection[0, [5, 10, 0]], [0.25, 3, 0], atol=1e-12)


def test_bad_input_is_an_error():
    features = torch.ones(2, 36, 8)
    with pytest.raises(ValueError, match="NaN"):
        foreground(features * torch.nan)
    with pytest.raises(ValueError, match="3 components need 3 features, not 2"):
        pca_rgb(torch.ones(2, 36, 2))
    with pytest.raises(TooFewPatchesError, match="3 of 16 patches.*--threshold"):
        pca_rgb(torch.randn(1, 16, 8), torch.arange(16)[None] < 3)


def test_colours_are_projections_of_the_chosen_patches_clipped_to_two_percentiles():
    features, mask = torch.randn(3, 50, 8) * torch.arange(9, 1, -1), torch.rand(3, 50) < 0.7
    tokens = features[mask].double().numpy()
    _, _, directions = np.linalg.svd(tokens, full_matrices=False)
    for first in (1, 2):
        colours = pca_rgb(features, mask, first)
        assert colours[~mask].eq(0).all()
        for channel, direction in enumerate(directions[first - 1 :][:3]):
            values = tokens @ direction * np.sign(direction[np.abs(direction).argmax()])
            low, high = np.quantile(values, [0.02, 0.98])
            expected = np.clip((values - low) / (high - low), 0, 1)
            np.testing.assert_allclose(colours[mask][:, channel], expected, atol=1e-5)
        assert (colours.min(), colours[mask].max()) == (0, 1)


def _subject(features: torch.Tensor) -> SimpleNamespace:
    """Return a model of prepared features [J, 16, C]: an image filled with the value i has features i."""

    def prepared(images, layers):
        rows = features[images[:, 0, 0, 0].long()].unsqueeze(2)
        keys = torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)
        return Features((4, 4), {layer: LayerTokens(keys, (layer + 1) * keys, 1.0) for layer in layers})

    shape = SimpleNamespace(grid=(4, 4), resolve_layer=lambda layer: 5 if layer is None else layer)
    return SimpleNamespace(extract=shape, features=prepared)


def _batch(number: int, mask: torch.Tensor | None = None) -> Batch:
    image = torch.full((3, 4, 4), number, dtype=torch.uint8)
    target = None if mask is None else Target([1], mask.view(1, 4, 4), torch.ones(4, 4, dtype=torch.bool))
    return Batch(image[None], [Sample(number, image, (4, 4), target)])


def test_scores_by_hand():
    features = -torch.ones(3, 16, 4)
    features[:2, [5, 6, 9, 10]] = 3.0
    features += 0.01 * torch.randn(features.shape)
    object_mask = torch.zeros(16, dtype=torch.bool)
    object_mask[[5, 6]] = True
    batches = [_batch(0, object_mask), _batch(1, object_mask & False), _batch(2)]
    (result,) = evaluate(_subject(features), batches)["layers"]
    assert (result["layer"], result["problem"]) == (5, None)
    assert [image["name"] for image in result["images"]] == ["0", "1", "2"]
    assert [image["foreground_share"] for image in result["images"]] == [0.25, 0.25, 0]
    assert [image["iou"] for image in result["images"]] == [0.5, None, None]
    assert result["images"][0]["constant_iou"] == 2 / 16
    assert result["mean"]["iou"] == 0.5
    assert result["mean"]["foreground_share"] == pytest.approx(0.5 / 3)
    assert [colours.shape for colours in result["colours"]] == [(4, 4, 3)] * 3
    assert (result["colours"][0].sum(axis=-1) > 0).reshape(-1).nonzero()[0].tolist() == [5, 6, 9, 10]


def test_layers_are_analysed_separately():
    layers = evaluate(_subject(torch.randn(2, 16, 6)), [_batch(0), _batch(1)], [3, 0], first=2)["layers"]
    assert [result["layer"] for result in layers] == [3, 0]
    np.testing.assert_allclose(layers[0]["projections"][1], 4 * layers[1]["projections"][1], rtol=1e-6)
    assert layers[0]["explained"] == pytest.approx(layers[1]["explained"])


def _run(tmp_path, *words, models=CRATE):
    assert main([*models, "--data", "shape_scenes", "--output", str(tmp_path), *words]) == 0
    return json.loads((tmp_path / "results.json").read_text())


def test_with_one_layer_the_figure_has_a_column_per_model(tmp_path, drawn):
    models = [CRATE[0], "V=vit_tiny_patch16_224@untrained", "--model-args", "depth=2", "img_size=64"]
    results = _run(tmp_path, "--limit", "3", "--threshold", "0.01", models=models)
    ((rows, titles),) = drawn
    assert titles["column_titles"] == ["image", "object", "A\nlayer 0", "V\nlayer 1"]
    assert [picture.pixels.shape for picture in rows[2][2:]] == [(8, 8, 3), (4, 4, 3)]
    (layer,) = results["results"]["V"]["layers"]
    assert len(layer["images"]) == 3
    assert 0 < layer["mean"]["foreground_share"] < 1


def test_with_all_layers_every_model_has_a_figure_with_component_1_in_grey_above_the_colours(tmp_path, drawn, capsys):
    results = _run(tmp_path, "--limit", "2", "--layers", "all", "--components", "2-4")
    assert [layer["layer"] for layer in results["results"]["A"]["layers"]] == [0, 1, 2]
    assert "| A | 2 |" in capsys.readouterr().out
    ((rows, titles),) = drawn
    assert titles["column_titles"] == ["image", "layer 0", "layer 1", "layer 2"]
    assert [[picture.pixels.ndim for picture in row] for row in rows] == [[3, 2, 2, 2], [2, 3, 3, 3]] * 2
    assert (rows[3][1].pixels.sum(axis=-1) > 0).mean() > 0.9  # no patch is left out


def test_images_without_foreground_are_reported_and_left_empty(tmp_path, capsys, drawn):
    results = _run(tmp_path, "--limit", "3", "--layers", "2", "--threshold", "1e6")
    assert all(row[2] is None for row in drawn[0][0])
    assert "too few for 3 components" in results["results"]["A"]["layers"][0]["problem"]
    assert "no colours for A, layer 2: " in capsys.readouterr().err


def test_images_can_be_limited_to_a_class_which_must_exist(tmp_path, drawn, refuses):
    scenes = SceneImages(32, 40)
    star = {name: number for number, name in scenes.class_names().items()}["star"]
    expected = [str(i) for i in range(40) if scenes[i].target.classes == [star]][:2]
    results = _run(tmp_path, "--class", "star", "--limit", "2", "--batch-size", "7")
    assert [image["name"] for image in results["results"]["A"]["layers"][0]["images"]] == expected
    words = ["--data", "shape_scenes", "--limit", "1", "--output", str(tmp_path), "--class", "unicorn"]
    refuses("no such class; it has disc, ring", main, [*CRATE, *words])
