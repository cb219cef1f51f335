"""Coarse segmentation: masks and scores of attention against values by hand, and the command."""

import itertools
import json

import pytest
import torch
from image_data import write_voc

from crate_fast.eval import coarse_segmentation
from crate_fast.eval.common.images import open_images
from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.segmentation import attention_to_mask, average_precision, score_attention
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
    for settings, message in (({"threshold": "top"}, "threshold=.top"), ({"fraction": 1.5}, r"fraction=1\.5")):
        with pytest.raises(ValueError, match=message):
            attention_to_mask(torch.rand(4), **settings)


def test_iou_by_hand():
    predicted, target, valid, empty = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]).bool()
    assert iou(predicted, target).item() == pytest.approx(1 / 3)
    assert iou(predicted, target, valid).item() == pytest.approx(1 / 2)
    assert (iou(empty, empty).item(), iou(predicted, predicted).item()) == (0, 1)


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
    for i, j in itertools.product(range(5), range(7)):
        kept = valid[i, 0]
        assert found[i, j].item() == pytest.approx(_area(weights[i, j][kept], target[i, 0][kept]), abs=1e-6)
    assert torch.equal(average_precision(weights**3, target, valid), found)  # only the order counts
    assert average_precision(weights, torch.zeros_like(target)).eq(0).all()


def _scores(maps: torch.Tensor, targets, valid=None, fraction: float = 0.6) -> dict[str, dict]:
    return score_attention([({0: maps}, targets, valid)], fraction)


def test_scores_are_averaged_over_an_images_classes_and_then_over_images():
    """The first image has one class, the second two."""
    left, right, all_ = [1.0, 1, 0, 0], [0.0, 0, 1, 1], [1.0, 1, 1, 1]
    targets = [torch.tensor([left]).bool(), torch.tensor([[1, 0, 0, 0], right]).bool()]
    result = _scores(torch.tensor([[left, all_], [left, right]]), targets)
    row = result["topk"]["layers"][0]  # 60 % of 4 entries: 3 are kept, equal ones in order
    # left keeps 0, 1, 2; right keeps 2, 3, 0. Image 1: 2/3 for both heads. Image 2: class 5 1/3, class 6 2/3 (right).
    assert row["best_head"] == pytest.approx((2 / 3 + (1 / 3 + 2 / 3) / 2) / 2)
    assert row["per_head"] == pytest.approx([(2 / 3 + (1 / 3 + 1 / 4) / 2) / 2, (2 / 3 + (1 / 3 + 2 / 3) / 2) / 2])
    assert row["fixed_head"] == max(row["per_head"])


def test_the_mean_mask_is_the_mean_over_all_images():
    left = torch.tensor([[True, True, False, False]])
    batches = [({0: torch.rand(1, 2, 4)}, [target], None) for target in (left, left, left, ~left)]
    result = score_attention(batches, fraction=0.5)["topk"]
    assert result["mean_mask"] == pytest.approx(3 / 4)
    assert (result["true_mask"], result["images"]) == (1.0, 4)


def test_void_patches_objects_without_a_patch_and_images_without_objects_are_not_scored():
    target, valid = torch.tensor([[True, True, False, False]]), torch.tensor([False, True, True, False])
    result = _scores(torch.ones(1, 1, 4), [target], [valid], fraction=1.0)["topk"]
    assert result["constant"] == pytest.approx(1 / 2)  # one of two valid patches is object
    assert result["layers"][0]["best_head"] == pytest.approx(1 / 2)
    targets = [target[:0], torch.cat([target & False, target])]  # the first object of the second image has no patch
    result = _scores(torch.rand(2, 1, 4), targets)["mass"]
    counts = [result[name] for name in ("images", "objects", "without_objects", "objects_without_patch")]
    assert counts == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="none of the 1 images has an object that covers a patch"):
        _scores(torch.rand(1, 1, 4), [target & False])


def test_scores_do_not_depend_on_the_batch_size(tmp_path):
    (write_voc(tmp_path) / "VOC2012/ImageSets/Segmentation/val.txt").write_text("c\na\nc\nb\n")  # c has no object
    loaded, images = open_model(MODEL, image_size=32, model_args=SMALL), open_images(f"voc:{tmp_path}", 32)
    whole, parts = (coarse_segmentation.evaluate(loaded, images, batch_size=size) for size in (10, 1))
    for reading in whole:
        for a, b in zip(whole[reading]["layers"], parts[reading]["layers"], strict=True):
            assert a["per_head"] == pytest.approx(b["per_head"], abs=1e-6)
        assert whole[reading]["random"] == pytest.approx(parts[reading]["random"])


def test_the_command_writes_scores_tables_and_figures(tmp_path, capsys, drawn):
    words = [f"A={MODEL}", f"B={MODEL}", "--model-args", *SMALL, "--data", f"voc:{write_voc(tmp_path / 'data')}"]
    words += ["--figure-images", "1"]
    assert coarse_segmentation.main([*words, "--output", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    results = content["results"]
    assert results["A"] == results["B"]
    assert (results["A"]["topk"]["images"], results["A"]["topk"]["without_objects"]) == (2, 1)
    assert content["config"]["models"][0]["image_size"] == [32, 32]
    assert {"commit", "torch", "command"} <= content["provenance"].keys()
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| A | mIoU topk | 0 * |" in table
    assert "| B | attention AP | 1 |" in table
    assert "random maps" in capsys.readouterr().out
    assert coarse_segmentation.main([*words, "--fraction", "0.1", "--output", str(tmp_path / "less")]) == 0
    assert "attention mIoU, mass 10%, 2 images" in capsys.readouterr().out
    topk, less = (drawn[run][0][0][2].pixels for run in (0, 2))  # the first image's mask by the first model
    assert topk.sum() > less.sum() > 0
