"""Thresholds and IoU against hand-computed cases."""

import pytest
import torch

from crate_fast import CRATE
from crate_fast.eval.common.segmentation import (
    AttentionScores,
    attention_to_mask,
    average_precision,
    intersection_over_union,
    mask_to_grid,
    score_attention,
    scores_table,
)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [("topk", [[1, 1, 1, 0, 0], [1, 1, 0, 0, 1]]), ("mass", [[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]])],
)
def test_masks_keep_the_largest_entries(threshold, expected):
    attention = torch.tensor([[0.5, 0.1, 0.3, 0.05, 0.05], [0.0, 0.0, 0.0, 0.0, 1.0]])
    assert torch.equal(attention_to_mask(attention, threshold, 0.6), torch.tensor(expected).bool())
    assert torch.equal(attention_to_mask(attention * 7, threshold, 0.6), torch.tensor(expected).bool())
    assert attention_to_mask(attention, "topk", 0.61).sum(-1).tolist() == [4, 4]
    assert attention_to_mask(attention, "topk", 1.0).all()
    assert attention_to_mask(torch.full((10,), 0.1), "mass", 0.6).sum() == 6


def test_iou_by_hand():
    predicted = torch.tensor([True, True, False, False])
    target = torch.tensor([True, False, True, False])
    assert intersection_over_union(predicted, target).item() == pytest.approx(1 / 3)
    valid = torch.tensor([True, True, False, True])
    assert intersection_over_union(predicted, target, valid).item() == pytest.approx(1 / 2)
    empty = torch.zeros(4, dtype=torch.bool)
    assert intersection_over_union(empty, empty).item() == 0
    assert intersection_over_union(predicted, predicted).item() == 1


def _area(weights: torch.Tensor, target: torch.Tensor) -> float:
    """Under the curve of precision over recall, threshold by threshold."""
    area, recall = 0.0, 0.0
    for threshold in weights.unique().flip(0):
        chosen = weights >= threshold
        precision, reached = target[chosen].float().mean(), target[chosen].sum() / target.sum()
        area += float(precision * (reached - recall))
        recall = reached
    return area


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_is_the_area_under_its_curve(levels):
    weights = torch.randint(levels, (5, 7, 40)) / levels  # of few levels many are equal
    target, valid = torch.rand(5, 1, 40) < 0.3, torch.rand(5, 1, 40) < 0.8
    found = average_precision(weights, target, valid)
    assert found.shape == (5, 7)
    for i in range(5):
        for j in range(7):
            kept = valid[i, 0]
            assert found[i, j].item() == pytest.approx(_area(weights[i, j][kept], target[i, 0][kept]), abs=1e-6)
    assert torch.equal(average_precision(weights**3, target, valid), found)  # the order alone counts
    assert average_precision(weights, torch.zeros_like(target)).eq(0).all()


def test_average_precision_does_not_see_how_far_a_map_spreads():
    target = torch.tensor([[True, True, True, False, False]])
    maps = torch.tensor([[[0.4, 0.3, 0.3, 0.0, 0.0], [0.9, 0.08, 0.02, 0.0, 0.0]]])
    scores = AttentionScores()
    scores.add({0: maps}, [target])
    result = scores.result()
    assert result["ap"]["layers"][0]["per_head"] == [1.0, 1.0]
    assert result["mass"]["layers"][0]["per_head"] == pytest.approx([2 / 3, 1 / 3])
    assert result["ap"]["constant"] == pytest.approx(3 / 5)
    assert result["ap"]["true_mask"] == result["ap"]["mean_mask"] == 1.0


def test_the_best_head_is_chosen_per_image():
    target = torch.tensor([[True, True, False, False], [False, False, True, True]])
    left, right = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])
    attention = torch.stack([torch.stack([left, right])] * 2)
    scores = AttentionScores(fraction=0.9)
    scores.add({0: attention}, target.unsqueeze(1))
    result = scores.result()["mass"]
    assert result["layers"][0]["per_head"] == [0.5, 0.5]  # each head is right in one image and wrong in the other
    assert result["layers"][0]["best_head"] == 1.0
    assert result["constant"] == 0.5


def test_a_patch_is_object_when_half_of_it_is():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, :2] = True  # half of the first patch
    mask[0, 2, 2] = True  # a quarter of the last
    assert mask_to_grid(mask, (2, 2)).tolist() == [[True, False, False, False]]


def _looker() -> CRATE:
    """A CRATE whose first head's CLS attends to bright patches, and whose second attends to all alike."""
    model = CRATE(image_size=8, patch_size=2, num_classes=2, dim=4, depth=1, heads=2, dim_head=2, channels=1)
    embed = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    model.embed = lambda images: torch.cat(
        [embed.expand(len(images), 1, 4), images[:, 0, ::2, ::2].reshape(len(images), -1, 1) * embed], dim=1
    )
    attention = model.transformer.layers[0][0]
    attention.norm = torch.nn.Identity()
    with torch.no_grad():
        attention.fn.qkv.weight.zero_()
        attention.fn.qkv.weight[0, 0] = 9.0
    return model


def test_scores_of_a_model_that_looks_where_the_object_is():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = masks[1, 4:, 4:] = masks[2, :2] = True
    batches = [(masks[i : i + 1, None].float(), torch.zeros(1), masks[i : i + 1]) for i in range(3)]
    scores = score_attention(_looker(), batches, lambda images: images)
    mass = scores["mass"]
    assert mass["layers"][0]["per_head"][0] == pytest.approx(0.75)  # three of four equal patches hold 60 %
    assert mass["layers"][0]["best_head"] == pytest.approx(mass["true_mask"]) == pytest.approx(0.75)
    assert mass["constant"] == pytest.approx(0.25)
    assert mass["images"] == 3
    assert scores["topk"]["true_mask"] == pytest.approx(4 / 10)  # ten of sixteen patches are kept
    assert scores["ap"]["layers"][0]["per_head"] == pytest.approx([1.0, 0.25])
    assert "one head for all images 0.750" in scores_table(scores, marked=0)
    assert "attention AP, patches by weight, 3 images" in scores_table(scores)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="threshold=.top"):
        attention_to_mask(torch.rand(4), "top")
    with pytest.raises(ValueError, match=r"fraction=1\.5"):
        attention_to_mask(torch.rand(4), fraction=1.5)
