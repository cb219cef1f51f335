"""Noise, entropies and correlations of attention maps against values by hand; every figure of the command."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crate_fast.eval.attention_maps import _best_heads, add_noise, evaluate, main, map_correlation
from crate_fast.eval.common.features import Features, LayerTokens
from crate_fast.eval.common.images import Batch, Sample, Target

CRATE = ["A=crate_tiny_patch8_224@untrained", "--model-args", "depth=2", "dim=32", "heads=2", "img_size=32"]


def test_noise_has_the_given_share_of_pixels_and_deviation_and_depends_on_seed_and_image_number_alone():
    images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    noisy = add_noise(images, 30, 0.25, seed=0)
    changed = noisy.ne(images).any(dim=1)
    assert changed.flatten(1).sum(dim=1).tolist() == pytest.approx([1024, 1024], abs=2)  # a draw may round to zero
    chosen = noisy.permute(0, 2, 3, 1)[changed].double()
    assert chosen.std().item() == pytest.approx(30, rel=0.03)
    assert chosen.mean().item() == pytest.approx(128, abs=1.5)
    assert images.eq(128).all()
    assert not torch.equal(changed[0], changed[1])
    assert torch.equal(noisy[1:], add_noise(images[1:], 30, 0.25, seed=0, first=1))
    assert not torch.equal(noisy, add_noise(images, 30, 0.25, seed=1))


def test_more_noise_keeps_the_pixels_of_less_noise_scales_with_sigma_and_is_clipped_not_wrapped():
    images = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    few, more, all_ = (add_noise(images, 20, share, seed=3).int() for share in (0.2, 0.6, 1))
    for smaller, larger in ((few, more), (more, all_)):
        touched = smaller != 128
        assert torch.equal(smaller[touched], larger[touched])
        assert (larger != 128).sum() > 1.4 * touched.sum()
    weak = add_noise(images, 10, 0.2, seed=3).int()
    assert ((few - 128) - 2 * (weak - 128)).abs().max() <= 1  # both are rounded
    for sigma, share in ((0, 1), (99, 0), (0.09, 1)):  # the last is rounded to the nearest
        assert torch.equal(add_noise(images, sigma, share, seed=3), images)
    for value in (0, 255):
        noisy = add_noise(torch.full_like(images, value), 40, 1, seed=0)
        assert noisy.eq(value).double().mean().item() == pytest.approx(0.5, abs=0.03)
        assert (noisy.int() - value).abs().max() < 40 * 5


def test_correlation_by_hand():
    a = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 0.0, 3.0], [0.1, 0.1, 0.1]])
    b = torch.tensor([[5.0, 7.0, 9.0], [2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 1.0, 2.0]])
    assert map_correlation(a, b).tolist() == pytest.approx([1, -1, -0.5, math.nan], nan_ok=True)


def _brightness_subject() -> SimpleNamespace:
    """Return a model of two heads on 2 × 3 patches of 2 × 2 pixels: one attends to brightness, the other evenly."""

    def features(images, layers):
        patches = images.float().mean(dim=1).unflatten(1, (2, 2)).unflatten(3, (3, 2)).mean(dim=(2, 4)).flatten(1)
        logits = torch.stack([patches.clamp(min=1e-9).log(), torch.zeros_like(patches)], dim=-1)[..., None]
        keys = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)
        return Features((2, 3), {layers[0]: LayerTokens(torch.ones_like(keys), keys, 1.0)})

    shape = SimpleNamespace(grid=(2, 3), resolve_layer=lambda layer: 7 if layer is None else layer)
    return SimpleNamespace(extract=shape, features=features)


def _batch(patches: list[list[float]], name: str) -> Batch:
    image = torch.tensor(patches).byte().repeat_interleave(2, 0).repeat_interleave(2, 1).expand(3, 4, 6)
    return Batch(image[None], [Sample(name, image, (4, 6))])


def test_entropy_and_maps_by_hand():
    batches = [_batch([[0, 0, 0], [0, 60, 60]], "a"), _batch([[0, 0, 200], [0, 0, 0]], "b")]
    result = evaluate(_brightness_subject(), batches)
    assert (result["layer"], result["grid"], result["images"]) == (7, [2, 3], ["a", "b"])
    expected = [[math.log(2), math.log(6)], [0, math.log(6)]]
    np.testing.assert_allclose(result["entropy"], expected, atol=1e-5)
    expected = [[[0, 0, 0], [0, 0.5, 0.5]], [[0, 0, 1], [0, 0, 0]]]
    np.testing.assert_allclose(result["maps"][:, 0], expected, atol=1e-6)
    assert (result["noisy_maps"], result["noise"]) == (None, [])


def test_correlation_with_the_clean_map_falls_with_noise_and_ignores_constant_maps():
    batches = [_batch([[40, 80, 120], [160, 200, 90]], "a"), _batch([[200, 80, 120], [60, 20, 90]], "b")]
    result = evaluate(_brightness_subject(), batches, noise=[(0, 0.5), (10, 1.0), (100, 1.0)], seed=0)
    levels = result["noise"]
    assert [(level["sigma"], level["share"]) for level in levels] == [(0, 0.5), (10, 1.0), (100, 1.0)]
    assert levels[0]["correlation"] == pytest.approx(1)
    assert 0.9999 > levels[1]["correlation"] > 0.98
    assert levels[1]["correlation"] > levels[2]["correlation"] + 0.05
    assert all(level["per_head"][1] is None for level in levels)  # the even head's map is constant
    noisy = [Batch(add_noise(b.images, 100, 1.0, 0, first=i), b.samples) for i, b in enumerate(batches)]
    again = evaluate(_brightness_subject(), noisy)
    np.testing.assert_array_equal(result["noisy_maps"][2], again["maps"])


def _run(tmp_path, *words, models=CRATE):
    assert main([*models, "--data", "shape_scenes", "--output", str(tmp_path), *words]) == 0
    return json.loads((tmp_path / "results.json").read_text())


def test_heads_figure_pages_and_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("crate_fast.eval.common.figures.ROWS_A_PAGE", 2)
    results = _run(tmp_path / "one", "--limit", "3")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    pages = {f"attention_0{page}.{suffix}" for page in (1, 2) for suffix in ("png", "pdf")}
    assert names == pages | {"attention.npz", "attention.md", "attention.csv", "results.json"}
    with np.load(tmp_path / "one" / "attention.npz") as maps:
        assert sorted(maps) == ["0", "1", "2"]
        assert maps["2"].shape == (2, 4, 4)
        assert maps["2"].sum(axis=(1, 2)) == pytest.approx([1, 1])
        entropy = -(maps["2"][1] * np.log(maps["2"][1])).sum()
    assert results["results"]["A"]["entropy"][2][1] == pytest.approx(entropy, rel=1e-4)
    assert "| A | 0 | 1 |" in capsys.readouterr().out
    _run(tmp_path / "two", "--limit", "3")
    for path in (tmp_path / "one").glob("attention*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_figure_columns_are_the_requested_heads(tmp_path, drawn):
    _run(tmp_path, "--figure", "semantic", "--heads", "1,mean,0", "--limit", "2", "--style", "overlay")
    ((rows, titles),) = drawn
    assert titles["column_titles"] == ["image", "object", "head 1", "mean of heads", "head 0"]
    with np.load(tmp_path / "attention.npz") as maps:
        np.testing.assert_array_equal(rows[1][2].pixels, maps["1"][1])
        np.testing.assert_allclose(rows[1][3].pixels, maps["1"].mean(axis=0), rtol=1e-6)
        np.testing.assert_array_equal(rows[0][4].pixels, maps["0"][0])
    np.testing.assert_array_equal(rows[1][2].over, rows[1][0].pixels)


def test_noise_figures_have_one_row_per_level(tmp_path, drawn):
    results = _run(tmp_path, "--figure", "noise_share", "--limit", "2")
    _, (rows, titles) = drawn
    assert titles["column_titles"] == ["image", "head 0", "head 1"]
    shares = [0, 0.1, 0.25, 0.5, 0.75, 1]
    noisy = [(row[0].pixels != rows[0][0].pixels).any(axis=-1).mean() for row in rows]
    assert noisy == pytest.approx(shares, abs=0.05)  # clipped noise may change nothing
    image = torch.from_numpy(rows[0][0].pixels).permute(2, 0, 1)[None]
    shown = torch.from_numpy(rows[3][0].pixels).permute(2, 0, 1)[None]
    assert torch.equal(shown, add_noise(image, 75, 0.5, seed=0, first=1))  # the model's input
    levels = results["results"]["A"]["noise"]
    assert [(level["sigma"], level["share"]) for level in levels] == [(75, share) for share in shares]
    assert levels[0]["correlation"] == pytest.approx(1)
    with np.load(tmp_path / "attention.npz") as maps:
        assert maps["1"].shape == (6, 2, 4, 4)
        np.testing.assert_array_equal(rows[5][1].pixels, maps["1"][5, 0])
    levels = _run(tmp_path, "--figure", "noise_sigma", "--limit", "1")["results"]["A"]["noise"]
    assert [(level["sigma"], level["share"]) for level in levels] == [(25 * number, 0.5) for number in range(6)]


def test_models_of_different_grids_are_drawn_side_by_side(tmp_path, drawn):
    models = [CRATE[0], "B=vit_tiny_patch16_224@untrained", "--model-args", "depth=2", "img_size=64"]
    assert set(_run(tmp_path, "--limit", "2", "--figure", "models", models=models)["results"]) == {"A", "B"}
    ((rows, titles),) = drawn
    models = ("A, layer 0", "B, layer 1")
    assert titles["column_titles"][2:] == [f"{m}\n{h}" for m in models for h in ("mean of heads", "best head")]
    assert [picture.pixels.shape for picture in rows[0][2:]] == [(8, 8), (8, 8), (4, 4), (4, 4)]
    with np.load(tmp_path / "B" / "attention.npz") as maps:
        assert any(np.array_equal(rows[0][5].pixels, head) for head in maps["0"])


def test_the_best_head_of_an_image_attends_to_its_object():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2] = True
    sample = Sample(0, torch.zeros(3, 4, 4, dtype=torch.uint8), (4, 4), Target([1], mask, torch.ones_like(mask[0])))
    below, above = np.array([[0.0, 0.0], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.0, 0.0]])
    maps = np.array([[below, above], [above, below]], np.float32)
    assert _best_heads(maps, [sample, sample]).tolist() == [1, 0]
