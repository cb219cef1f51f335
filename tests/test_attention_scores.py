"""Scores of attention, coarse segmentation and localization: against values by hand, and the commands."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_data import encoded, write_tree, write_voc
from PIL import Image

from crate_fast.env import provenance
from crate_fast.eval import coarse_segmentation, localization
from crate_fast.eval.common.boxes import BoxedImages
from crate_fast.eval.common.images import open_images
from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.segmentation import attention_to_mask, average_precision, score_attention
from crate_fast.eval.common.segmentation import intersection_over_union as iou
from crate_fast.eval.localization import THRESHOLDS, evaluate, largest_boxes

MODEL = "crate_tiny_patch8_224@untrained"
SMALL = ["depth=2", "dim=32", "heads=2", "img_size=32"]


def test_masks_keep_the_largest_weights():
    attention = torch.tensor([[0.5, 0.1, 0.3, 0.05, 0.05], [0.0, 0.0, 0.0, 0.0, 1.0]])
    for scale in (1, 7):
        assert attention_to_mask(scale * attention, "topk", 0.6).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 1]]
        assert attention_to_mask(scale * attention, "mass", 0.6).int().tolist() == [[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
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
    target, valid = torch.tensor([[True, True, False, False]]), torch.tensor([False, True, True, True])
    result = _scores(torch.ones(1, 1, 4), [target], [valid], fraction=1.0)["topk"]
    assert result["constant"] == pytest.approx(1 / 3)  # one of three valid patches is object
    assert result["layers"][0]["best_head"] == pytest.approx(1 / 3)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        assert [provenance(device)["device"].split(",")[0] == "a GPU" for device in ("auto", "cpu")] == [True, False]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| A | mIoU topk | 0 * |" in table
    assert "| B | attention AP | 1 |" in table
    assert "random maps" in capsys.readouterr().out
    assert coarse_segmentation.main([*words, "--fraction", "0.1", "--output", str(tmp_path / "less")]) == 0
    assert "attention mIoU, mass 10%, 2 images" in capsys.readouterr().out
    topk, less = (drawn[run][0][0][2].pixels for run in (0, 2))  # the first image's mask by the first model
    assert topk.sum() > less.sum() > 0


# --- localization: boxes and scores against a slow independent implementation, and the three formats of boxes ---


def _slow_boxes(values: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return the box of the largest component of eight neighbours above each threshold."""
    values, boxes = (values - values.min()) / (values.max() - values.min()), []
    for threshold in THRESHOLDS:
        left, largest = set(map(tuple, np.argwhere(values > threshold))), []
        while left:
            found = [min(left)]
            left.remove(found[0])
            for y, x in found:  # grows
                near = left.intersection(itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)))
                left -= near
                found += near
            largest = max(largest, found, key=len)
        ys, xs = zip(*largest, strict=True)
        boxes.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return boxes


def test_boxes_enclose_the_largest_component():
    maps = np.random.default_rng(0).random((3, 9, 12)) ** 2
    np.testing.assert_array_equal(largest_boxes(maps), [_slow_boxes(values) for values in maps])
    assert not largest_boxes(np.ones((1, 4, 4))).any()  # a constant map has no box


@pytest.fixture
def photos(tmp_path):
    """Six images of 40×20 pixels in two folders, and boxes of the first five in COCO's format."""
    images, files = [], {}
    for number in range(6):
        picture = np.full((20, 40, 3), 30, np.uint8)
        picture[5:15, 10 : 20 + number] = 220
        images.append({"id": number, "file_name": f"{'ab'[number % 2]}/{number}.png", "width": 40, "height": 20})
        files[f"photos/{images[-1]['file_name']}"] = encoded(Image.fromarray(picture))
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [10, 5, 10 + i, 10], "iscrowd": 0} for i in range(5)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "o"}]}
    write_tree(tmp_path, files | {"boxes.json": json.dumps(content).encode()})
    return tmp_path / "photos", tmp_path / "boxes.json"


def test_a_map_of_the_object_scores_1_and_baselines_score_less(photos, monkeypatch):
    monkeypatch.setattr(localization, "RESOLUTION", 40)

    def features(images, layers):
        """Let the first head attend to bright pixels and the second to dark ones."""
        grid = images.float().mean(dim=1)[:, ::2, ::2]
        maps = torch.stack([grid, 255 - grid], dim=1).flatten(2)
        return SimpleNamespace(grid=tuple(grid.shape[1:]), cls_attention=lambda layer: maps)

    model = SimpleNamespace(extract=SimpleNamespace(resolve_layers=lambda _: [0]), features=features)
    scores = evaluate(model, BoxedImages(photos[0], 40, photos[1]))
    assert (scores["images"], scores["without_boxes"]) == (5, 1)
    row = scores["layers"][0]
    for found in (row["best_head"], row["one_head"]):
        assert found["MaxBoxAcc 0.7"] == found["GT-known"] == found["pointing"] == 1
        assert found["AP"] > 0.9
    assert row["per_head"][1]["pointing"] == 0
    assert row["per_head"][1]["AP"] < 0.3
    shares = [(10 + n) * 10 / 800 for n in range(5)]
    whole = scores["baselines"]["whole picture"]
    assert whole["MaxBoxAcc 0.3"] == np.mean(np.array(shares) >= 0.3)
    assert whole["AP"] == pytest.approx(np.mean(shares), abs=0.02)
    assert scores["baselines"]["mean box"]["MaxBoxAcc 0.5"] == 1  # all boxes are similar


@pytest.mark.parametrize(("strongest", "box"), [((3, 4), (0.5, 0.375, 0.625, 0.5)), ((3, 0), (0.03, 0.3, 0.4, 0.7))])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_pointing_game_takes_the_patch_with_the_largest_weight(strongest, box, mirrored):
    """Not the largest pixel of the enlarged map, which may be a weaker patch's in a corner, or a plateau's first."""
    maps, (left, top, right, bottom) = torch.zeros(1, 8, 8), box
    maps[0][strongest], maps[0, 0, 7] = 1, 0.9
    if mirrored:
        maps, left, right = maps.flip(-1), 1 - right, 1 - left
    assert localization._measure(maps, np.float64([[left, top, right, bottom]]))[1].all()


@pytest.mark.parametrize("grid", [(8, 8), (28, 28), (14, 28), (60, 60), (70, 70)])
def test_every_patch_gets_a_box_of_the_same_size(grid):
    corners = [(0, 0), (grid[0] // 2, 3), (5, grid[1] - 2), (6, 5)]
    maps = torch.zeros(len(corners), *grid)
    for one, (row, column) in zip(maps, corners, strict=True):
        one[row, column] = 1
    boxes = localization._relative_boxes(localization._enlarge(maps))[1:, 50] * [grid[1], grid[0], grid[1], grid[0]]
    left, top, right, bottom = boxes.T
    assert len({*(right - left).round(6), *(bottom - top).round(6)}) == 1


def test_the_head_and_threshold_are_chosen_on_other_images():
    even = np.zeros((4, 100), np.float32)
    even[::2, 10], even[1::2, 20] = 1, 1  # the best threshold of one half is wrong for the other
    scores = localization._scores(even, np.ones(4), np.ones(4))
    assert (scores["MaxBoxAcc 0.5"], scores["GT-known"]) == (0.5, 0)


def test_boxes_are_found_by_path_or_by_a_unique_name(tmp_path):
    photos = ("a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png")
    write_tree(tmp_path / "photos", dict.fromkeys(photos, encoded(Image.new("RGB", (40, 20)))))
    for name, width, *lefts in (("a/0", 40, 3), ("b/0", 0, 7), ("deeper/2", 40, 10, 7)):  # some tools write no size
        corners = [f"<xmin>{left}</xmin><ymin>5</ymin><xmax>{left + 9}</xmax><ymax>14</ymax>" for left in lefts]
        boxes = "".join(f"<object><bndbox>{edges}</bndbox></object>" for edges in corners)
        xml = f"<annotation><size><width>{width}</width><height>{width // 2}</height></size>{boxes}</annotation>"
        write_tree(tmp_path / "xml", {f"{name}.xml": xml.encode()})
    images = [("./a/0.png", 80.0), ("b/2.png", 40.0)]  # the second has another shape than its file
    content = {
        "images": [{"id": i, "file_name": name, "width": w, "height": 40.0} for i, (name, w) in enumerate(images)]
    }
    boxes = [(0, [4, 4, 4, 4]), (0, [60, -2, 40, 10]), (1, [1, 1, 1, 1])]
    content["annotations"] = [{"image_id": image, "bbox": box} for image, box in boxes]
    (tmp_path / "boxes.json").write_text("\ufeff" + json.dumps(content))
    by_xml, by_json = (BoxedImages(tmp_path / "photos", 40, tmp_path / name) for name in ("xml", "boxes.json"))
    assert [by_xml[i].target.boxes[:1, 0].tolist() for i in range(5)] == [[3], [], [7], [], [10]]
    assert [by_json[i].target.boxes.tolist() for i in range(2)] == [[[2, 2, 4, 4], [30, 0, 40, 4]], []]
    assert "annotated size is (40, 40), the image has (20, 40)" in by_json[4].problem
    assert by_json.annotated_size("a/0.png") == (40, 80)  # by which a picture is turned upright or not
    assert by_xml[4].target.boxes.tolist() == [[10, 5, 20, 15], [7, 5, 17, 15]]


def test_files_without_boxes_are_errors(photos, tmp_path):
    for content, message in (
        ('{"images": [{"id": 1, "file_name": "0"}, {"id": 2, "file_name": "0"}], "annotations": []}', "join them"),
        ('{"images": [{"id": 1, "file_name": "0"}], "annotations": [{"image_id": 1, "bbox": [9,1,-3,1]}]}', "bbox"),
        ('{"images": [{"id": 1, "file_name": "no.png"}], "annotations": [], "categories": []}', "none of the"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            BoxedImages(photos[0], 40, tmp_path / "bad.json")


@pytest.mark.usefixtures("unsaved_figures")
def test_the_command_writes_scores_and_a_figure(tmp_path):
    words = "shipped:CRATE --limit 4 --layers -2 --figure-images 2"
    assert localization.main([*words.split(), "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert next(iter(found.values()))["images"] == 4
    assert (tmp_path / "boxes_01.png").exists()
