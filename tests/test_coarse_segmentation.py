"""Coarse segmentation: masks and scores of attention against values by hand, and the command."""

import json

import pytest
import torch
from test_images import make_coco, make_voc

from crate_fast.eval import coarse_segmentation
from crate_fast.eval.common.images import open_images
from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.segmentation import AttentionScores, attention_to_mask, average_precision
from crate_fast.eval.common.segmentation import intersection_over_union as iou

MODEL = "crate_tiny_patch8_224@untrained"
SMALL = ["depth=2", "dim=32", "heads=2", "img_size=32"]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [("topk", [[1, 1, 1, 0, 0], [1, 1, 0, 0, 1]]), ("mass", [[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]])],
)
def test_masks_keep_the_largest_weights(threshold, expected):
    attention = torch.tensor([[0.5, 0.1, 0.3, 0.05, 0.05], [0.0, 0.0, 0.0, 0.0, 1.0]])
    assert torch.equal(attention_to_mask(attention, threshold, 0.6), torch.tensor(expected).bool())
    assert torch.equal(attention_to_mask(attention * 7, threshold, 0.6), torch.tensor(expected).bool())
    assert attention_to_mask(attention, "topk", 0.61).sum(-1).tolist() == [4, 4]
    assert attention_to_mask(attention, "topk", 1.0).all()
    assert attention_to_mask(torch.full((10,), 0.1), "mass", 0.6).sum() == 6


def test_iou_by_hand():
    predicted = torch.tensor([True, True, False, False])
    target = torch.tensor([True, False, True, False])
    assert iou(predicted, target).item() == pytest.approx(1 / 3)
    valid = torch.tensor([True, True, False, True])
    assert iou(predicted, target, valid).item() == pytest.approx(1 / 2)
    empty = torch.zeros(4, dtype=torch.bool)
    assert iou(empty, empty).item() == 0
    assert iou(predicted, predicted).item() == 1


def _area(weights: torch.Tensor, target: torch.Tensor) -> float:
    """Return the area under the curve of precision over recall, threshold by threshold."""
    area, recall = 0.0, 0.0
    for threshold in weights.unique().flip(0):
        chosen = weights >= threshold
        precision, reached = target[chosen].float().mean(), target[chosen].sum() / target.sum()
        area += float(precision * (reached - recall))
        recall = reached
    return area


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_is_the_area_under_its_curve(levels):
    weights = torch.randint(levels, (5, 7, 40)) / levels  # few levels: many equal weights
    target, valid = torch.rand(5, 1, 40) < 0.3, torch.rand(5, 1, 40) < 0.8
    found = average_precision(weights, target, valid)
    assert found.shape == (5, 7)
    for i in range(5):
        for j in range(7):
            kept = valid[i, 0]
            assert found[i, j].item() == pytest.approx(_area(weights[i, j][kept], target[i, 0][kept]), abs=1e-6)
    assert torch.equal(average_precision(weights**3, target, valid), found)  # only the order counts
    assert average_precision(weights, torch.zeros_like(target)).eq(0).all()


def test_average_precision_does_not_depend_on_the_spread_of_a_map():
    target = torch.tensor([[True, True, True, False, False]])
    maps = torch.tensor([[[0.4, 0.3, 0.3, 0.0, 0.0], [0.9, 0.08, 0.02, 0.0, 0.0]]])
    scores = AttentionScores()
    scores.add({0: maps}, [target])
    result = scores.result()
    assert result["ap"]["layers"][0]["per_head"] == [1.0, 1.0]
    assert result["mass"]["layers"][0]["per_head"] == pytest.approx([2 / 3, 1 / 3])
    assert result["ap"]["constant"] == pytest.approx(3 / 5)
    assert result["ap"]["true_mask"] == result["ap"]["mean_mask"] == 1.0


def test_the_best_head_is_chosen_for_each_image():
    target = torch.tensor([[True, True, False, False], [False, False, True, True]])
    left, right = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])
    attention = torch.stack([torch.stack([left, right])] * 2)
    scores = AttentionScores(fraction=0.9)
    scores.add({0: attention}, target.unsqueeze(1))
    result = scores.result()["mass"]
    assert result["layers"][0]["per_head"] == [0.5, 0.5]  # each head is right in one image
    assert (result["layers"][0]["best_head"], result["constant"]) == (1.0, 0.5)


def test_bad_options_are_errors():
    with pytest.raises(ValueError, match="threshold=.top"):
        attention_to_mask(torch.rand(4), "top")
    with pytest.raises(ValueError, match=r"fraction=1\.5"):
        attention_to_mask(torch.rand(4), fraction=1.5)


def test_scores_are_averaged_over_an_images_classes_and_then_over_images():
    """The first image has one class, the second two."""
    scores = AttentionScores()
    left, right, all_ = [1.0, 1, 0, 0], [0.0, 0, 1, 1], [1.0, 1, 1, 1]
    maps = torch.tensor([[left, all_], [left, right]])
    targets = [torch.tensor([left]).bool(), torch.tensor([[1, 0, 0, 0], right]).bool()]
    scores.add({3: maps}, targets, labels=[[5], [5, 6]])
    row = scores.result()["topk"]["layers"][0]  # 60 % of 4 entries: 3 are kept, equal ones in order
    # left keeps 0, 1, 2; right keeps 2, 3, 0. Image 1: 2/3 for both heads. Image 2: class 5 1/3, class 6 2/3 (right).
    assert row["layer"] == 3
    assert row["best_head"] == pytest.approx((2 / 3 + (1 / 3 + 2 / 3) / 2) / 2)
    assert row["by_class"] == pytest.approx({5: (2 / 3 + 1 / 3) / 2, 6: 2 / 3})
    assert row["per_head"] == pytest.approx([(2 / 3 + (1 / 3 + 1 / 4) / 2) / 2, (2 / 3 + (1 / 3 + 2 / 3) / 2) / 2])
    assert row["fixed_head"] == max(row["per_head"])


def test_void_patches_are_ignored():
    scores = AttentionScores(fraction=1.0)
    target = torch.tensor([[True, True, False, False]])
    scores.add({0: torch.ones(1, 1, 4)}, [target], [torch.tensor([False, True, True, False])])
    result = scores.result()["topk"]
    assert result["constant"] == pytest.approx(1 / 2)  # one of two valid patches is object
    assert result["layers"][0]["best_head"] == pytest.approx(1 / 2)


def test_the_mean_mask_is_the_mean_over_all_images():
    scores = AttentionScores(fraction=0.5)
    targets = [torch.tensor([[True, True, False, False]])] * 3 + [torch.tensor([[False, False, True, True]])]
    for target in targets:
        scores.add({0: torch.rand(1, 2, 4)}, [target])
    result = scores.result()["topk"]
    assert result["mean_mask"] == pytest.approx(3 / 4)
    assert (result["true_mask"], result["images"]) == (1.0, 4)


def test_images_without_objects_are_counted_but_not_scored():
    scores = AttentionScores()
    none = torch.zeros(0, 4, dtype=torch.bool)
    scores.add({0: torch.rand(2, 1, 4)}, [none, torch.tensor([[True, False, False, False]])])
    mass = scores.result()["mass"]
    assert (mass["images"], mass["without_objects"]) == (1, 1)
    empty = AttentionScores()
    empty.add({0: torch.rand(1, 1, 4)}, [none])
    with pytest.raises(ValueError, match="none of the 1 images has an object"):
        empty.result()


@pytest.mark.parametrize("data", ["voc:{}", "shape_scenes"])
def test_scores_do_not_depend_on_the_batch_size(tmp_path, data):
    loaded = open_model(MODEL, image_size=32, model_args=SMALL)
    folder = make_voc(tmp_path) / "VOC2012"
    (folder / "ImageSets/Segmentation/val.txt").write_text("c\na\nc\nb\n")  # c has no object
    images = open_images(data.format(tmp_path), 32, 6)
    whole, parts = (coarse_segmentation.evaluate(loaded, images, batch_size=size) for size in (10, 1))
    for reading in whole:
        for a, b in zip(whole[reading]["layers"], parts[reading]["layers"], strict=True):
            assert a["per_head"] == pytest.approx(b["per_head"], abs=1e-6)
        assert whole[reading]["random"] == pytest.approx(parts[reading]["random"])


def test_objects_without_a_patch_are_counted(tmp_path):
    file = make_coco(tmp_path) / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][2]["segmentation"] = [[40, 20, 46, 20, 46, 26, 40, 26]]  # the cat, now 6×6 pixels
    file.write_text(json.dumps(content))
    loaded = open_model(MODEL, image_size=32, model_args=SMALL)  # patches of 10×15 pixels
    images = open_images(f"coco:{tmp_path}", 32)
    result = coarse_segmentation.evaluate(loaded, images)["topk"]
    assert (result["images"], result["objects"], result["objects_without_patch"]) == (1, 1, 1)
    assert list(result["layers"][0]["by_class"]) == [7]
    one_patch = open_model(MODEL, image_size=8, model_args=SMALL)
    with pytest.raises(ValueError, match="none of the 1 images has an object that covers a patch"):
        coarse_segmentation.evaluate(one_patch, open_images(f"coco:{tmp_path}", 8))


@pytest.mark.parametrize("kind", ["voc", "shape_scenes"])
def test_the_command_writes_scores_tables_and_figures(kind, tmp_path, capsys, monkeypatch):
    data = f"voc:{make_voc(tmp_path / 'data')}" if kind == "voc" else kind
    words = [f"A={MODEL}", f"B={MODEL}", "--model-args", *SMALL, "--data", data, "--limit", "3"]
    words += ["--figure-images", "1"]
    if kind == "voc":
        monkeypatch.setattr("crate_fast.eval.common.figures.image_grid", lambda *_args, **_more: None)
    assert coarse_segmentation.main([*words, "--output", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    results = content["results"]
    assert results["A"] == results["B"]
    assert len(results["A"]["mass"]["layers"]) == 2
    assert content["config"]["models"][0]["image_size"] == [32, 32]
    assert {"commit", "torch", "command"} <= content["provenance"].keys()
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| A | mIoU topk | 0 * |" in table
    assert "| B | attention AP | 1 |" in table
    first, second = results["B"]["mass"]["layers"][1]["per_head"]
    assert f"| B | mIoU mass | 1 | {first:.3f} | {second:.3f} |" in (tmp_path / "out" / "heads.md").read_text()
    assert "random maps" in capsys.readouterr().out
    if kind == "voc":
        assert (results["A"]["topk"]["images"], results["A"]["topk"]["without_objects"]) == (2, 1)
    else:
        assert coarse_segmentation.main([*words, "--fraction", "0.1", "--output", str(tmp_path / "less")]) == 0
        assert "attention mIoU, mass 10%, 3 images" in capsys.readouterr().out
        pictures = [(tmp_path / name / "masks_topk_01.png").read_bytes() for name in ("out", "less")]
        assert pictures[0] != pictures[1]
