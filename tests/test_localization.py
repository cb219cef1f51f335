"""Localization: boxes and scores against a slow independent implementation, and the three formats of boxes."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_data import encoded, write_tree
from PIL import Image

from crate_fast.eval import localization
from crate_fast.eval.common.boxes import BoxedImages
from crate_fast.eval.localization import THRESHOLDS, evaluate, largest_boxes


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

    model = SimpleNamespace(extract=SimpleNamespace(depth=1), features=features)
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
    content = {"images": [{"id": 1, "file_name": "./a/0.png", "width": 80.0, "height": 40.0}]}
    content["annotations"] = [{"image_id": 1, "bbox": [4, 4, 4, 4]}]
    (tmp_path / "boxes.json").write_text("\ufeff" + json.dumps(content))
    by_xml, by_json = (BoxedImages(tmp_path / "photos", 40, tmp_path / name) for name in ("xml", "boxes.json"))
    assert [by_xml[i].target.boxes[:1, 0].tolist() for i in range(5)] == [[3], [], [7], [], [10]]
    assert [by_json[i].target.boxes[:1, 0].tolist() for i in range(5)] == [[2], [], [], [], []]
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


def test_the_command_writes_scores_and_a_figure(tmp_path):
    words = "shipped:CRATE --limit 4 --layers -2 --figure-images 2"
    assert localization.main([*words.split(), "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert next(iter(found.values()))["images"] == 4
    assert (tmp_path / "boxes_01.png").exists()
