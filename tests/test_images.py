"""Image sets of the evaluation: VOC's and COCO's formats, damaged annotations, folders, scenes, photographs."""

import itertools
import json

import numpy as np
import pytest
import torch
from image_data import coco_box, write_tree
from PIL import Image
from pycocotools import mask as rle

from crate_fast.errors import UserError
from crate_fast.eval.common.images import Target, batches, open_images


def make_voc(root):
    """Write VOC2012 with three images: class 1 on the left half and a void stripe; classes 3 and 20; no object."""
    base, labels = root / "VOC2012", np.zeros((3, 40, 60), np.uint8)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    labels[0, :, :30], labels[0, :, 28:32] = 1, 255
    labels[1, :20, :20], labels[1, 20:, 40:] = 3, 20
    for name, label in zip("abc", labels, strict=True):
        Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(base / "JPEGImages" / f"{name}.jpg")
        picture = Image.fromarray(label, mode="P")
        picture.putpalette([0, 0, 0, 128, 0, 0, *([64] * (254 * 3))])
        picture.save(base / "SegmentationClass" / f"{name}.png")
    (base / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\n")
    return root


def test_voc_has_classes_masks_and_void_and_a_wrong_annotation_is_a_problem(tmp_path):
    root = make_voc(tmp_path) / "VOC2012"
    images = open_images(f"voc:{tmp_path}", 32)
    assert images.keys() == ["a", "b", "c"]
    first, second, third = (images[i] for i in range(3))
    assert (first.image.shape, first.size, first.target.classes) == ((3, 32, 32), (40, 60), [1])
    assert first.target.masks.sum() == 40 * 28
    assert (~first.target.valid).sum() == 40 * 4
    assert second.target.classes == [3, 20]
    assert third.target.masks.shape == (0, 40, 60)
    assert images.class_names()[20] == "tvmonitor"
    masks, valid = first.target.on_grid((2, 3))  # patches of 20×20 pixels
    assert masks.tolist() == [[True, True, False] * 2]  # the middle: half of its valid pixels
    assert valid.all()
    (root / "SegmentationClass" / "a.png").unlink()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "SegmentationClass" / "b.png")
    first, second, third = (images[i].problem for i in range(3))
    assert "a.png" in first
    assert "annotation b.png has size (9, 9), its image (40, 60)" in second
    assert third is None
    (root / "ImageSets/Segmentation/val.txt").write_text("")
    with pytest.raises(UserError, match="lists no images"):
        open_images(f"voc:{tmp_path}", 32)


def test_patches_that_are_mostly_void_are_invalid():
    masks, valid = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    masks[0, :, :2] = True
    valid[0, 1] = valid[1, :2] = False  # one of four pixels is valid
    on_grid, usable = Target([1], masks, valid).on_grid((2, 2))
    assert usable.tolist() == [False, True, True, True]
    assert on_grid.tolist() == [[False, False, True, False]]


def make_coco(root):
    """Write COCO with one image of two categories, one with overlapping instances, and a crowd."""
    (root / "val2017").mkdir(parents=True)
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(root / "val2017" / "x.jpg")
    boxes = (7, 0, 0, 20, 20), (7, 10, 0, 20, 20), (2, 40, 20, 20, 20), (2, 0, 30, 10, 10, 1)
    annotations = [coco_box(number, 5, *box) for number, box in enumerate(boxes, start=1)]
    content = {"images": [{"id": 5, "file_name": "x.jpg", "height": 40, "width": 60}], "annotations": annotations}
    content["categories"] = [{"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}]
    return write_tree(root, {"annotations/instances_val2017.json": json.dumps(content).encode()})


@pytest.mark.parametrize(
    ("orientation", "stored_as"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (6, None)],
    ids=["upside down", "turned", "drawn on the stored pixels"],
)
def test_masks_fit_the_object_in_every_orientation(tmp_path, orientation, stored_as):
    """Masks belong to the upright picture, or to the stored pixels if only these have the masks' size."""
    corner = np.zeros((40, 60), np.uint8)
    corner[:10, :15] = 1
    picture, exif = Image.fromarray(corner * 255).convert("RGB"), Image.Exif()
    exif[0x0112] = orientation
    if stored_as is not None:
        picture = picture.transpose(stored_as)
    voc, coco = make_voc(tmp_path) / "VOC2012", tmp_path / "coco"
    changed_coco(coco, lambda content, _: {"annotations": [coco_box(1, 5, 7, 0, 0, 15, 10)]})
    Image.fromarray(corner, mode="P").save(voc / "SegmentationClass" / "a.png")
    for path in (voc / "JPEGImages" / "a.jpg", coco / "val2017" / "x.jpg"):
        picture.save(path, exif=exif, quality=95)
    for name in (f"coco:{coco}", f"voc:{tmp_path}"):
        sample = open_images(name, 32)[0]
        assert (sample.problem, sample.size) == (None, (40, 60))
        (mask,) = sample.target.masks.float()
        grid = torch.nn.functional.interpolate(mask[None, None], (32, 32), mode="area")[0, 0]
        white = sample.image.float().mean(0)
        assert white[grid > 0.99].mean() > 240, name
        assert white[grid < 0.01].mean() < 15, name


def test_corrupt_images_are_named_and_skipped(tmp_path, capsys):
    for name in ("a.png", "b.jpg", "c.png", "caf\udce9.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"text")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:40])
    for name in ("notes.txt", "d.heic", ".hidden.png"):
        (tmp_path / name).write_text("not an image by its name")
    problems = []
    seen = [s.key for batch in batches(open_images(f"folder:{tmp_path}", 16), 2, problems) for s in batch.samples]
    assert seen == ["a.png", r"caf\udce9.png"]  # the second is not UTF-8
    assert [p.split(":")[0].split("/")[-1] for p in problems] == ["b.jpg", "c.png"]
    error = capsys.readouterr().err
    assert "unreadable" in error
    assert f"{tmp_path}: image files of unsupported formats are ignored: 1 .heic" in error
    assert len(open_images(f"folder:{tmp_path}", 16, 1)) == 1
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "caf\udce9.png").unlink()
    with pytest.raises(ValueError, match="none of the 3 images could be read"):
        list(batches(open_images(f"folder:{tmp_path}", 16), 2, []))


def test_missing_data_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    make_coco(tmp_path / "coco")
    for name, message in (
        ("voc:{}/absent", "no SegmentationClass folder"),
        ("coco:{}/absent", "neither .*instances_val2017.json nor .*instances_val2017.json exists"),
        ("coco:{}/coco:train2017", "instances_train2017.json"),
        ("folder:{}/absent", "no such folder"),
        ("folder:{}/empty", "holds no images"),
        ("imagenet", "write folder:PATH"),
        ("shape_scenes:x", "write shape_scenes or"),
    ):
        with pytest.raises(UserError, match=message):
            open_images(name.format(tmp_path), 32)


def changed_coco(root, change):
    """Write the folder of `make_coco` after `change(content, annotation 2)`; annotation 2 is a box at x = 10."""
    file = make_coco(root) / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content |= change(content, content["annotations"][1]) or {}
    file.write_text(json.dumps(content))
    return f"coco:{root}"


def without(*names):
    """Return a change that removes fields from every annotation."""
    return lambda content, _: [content["annotations"][i].pop(n) for i in range(3) for n in names] and None


def as_run_lengths(content, annotation):
    """Change masks to RLE, half of them compressed by pycocotools."""
    for number, entry in enumerate(content["annotations"]):
        x, y, width, height = entry["bbox"]
        pixels = np.zeros((40, 60), np.uint8, order="F")
        pixels[y : y + height, x : x + width] = 1
        runs = [0] * int(pixels[0, 0]) + [len([*run]) for _, run in itertools.groupby(pixels.ravel("F"))]
        entry["segmentation"] = {"size": [40, 60], "counts": runs}
        if number % 2:  # with empty runs, which other programs write
            code = rle.frPyObjects(entry["segmentation"] | {"counts": [runs[0], 0, 0, *runs[1:]]}, 40, 60)["counts"]
            entry["segmentation"]["counts"] = code.decode()


@pytest.mark.parametrize(
    "change",
    [
        without(),
        without("area"),
        without("bbox"),
        without("area", "bbox", "iscrowd"),
        as_run_lengths,
        lambda content, _: content["annotations"].append({"id": 9, "image_id": 77}),  # no such image
        lambda _, annotation: annotation["segmentation"].insert(0, [30, 30, 40, 40]),  # a polygon of two points
        lambda _, annotation: annotation.update(bbox=[], area=None, iscrowd=None),
    ],
)
def test_coco_masks_are_unions_crowds_are_void_and_missing_values_are_computed(tmp_path, capsys, change):
    images = open_images(changed_coco(tmp_path, change), 32)
    target, entries = images[0].target, images.coco.loadAnns([1, 2, 3, 4])
    assert (images.keys(), target.classes, images.class_names()) == ([5], [2, 7], {2: "cat", 7: "dog"})
    assert target.masks.sum(dim=(1, 2)).tolist() == [400, 600]
    assert (~target.valid).sum() == 100
    boxes = [[0, 0, 20, 20], [10, 0, 20, 20], [40, 20, 20, 20], [0, 30, 10, 10]]
    assert [entry["bbox"] for entry in entries] == boxes
    assert [entry["area"] for entry in entries] == [400, 400, 400, 100]
    assert [entry["iscrowd"] for entry in entries] == [0, 0, 0, 1]
    assert capsys.readouterr().out == ""  # pycocotools prints its progress


def test_categories_without_names_are_numbered(tmp_path):
    specification = changed_coco(tmp_path, lambda *_: {"categories": [{"id": 2}, {"id": 7, "name": "dog"}]})
    assert open_images(specification, 32).class_names() == {2: "2", 7: "dog"}


RUNS = {"size": [40, 60], "counts": [0, 2400]}
VALUES = [  # wrong values of annotation 2
    *(("segmentation", value) for value in ([], "RLE", [1, 2, 3, 4, 5, 6], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]])),
    *(("segmentation", [[1, 2, 3, 4, 5, value]]) for value in (float("nan"), "6", 1e9)),
    ("segmentation", RUNS | {"size": [60, 40]}),
    *(("segmentation", RUNS | {"counts": counts}) for counts in ([0, 2399], [-1, 2401], "0", "\x7f")),
    *(("bbox", value) for value in ([1, 2, 3], [1, 2, -3, 4], [1, 2, 3, None])),
    *(("iscrowd", "0"), ("area", -1), ("area", float("inf"))),
]


def _drops(name):
    return lambda _, annotation: annotation.pop(name) and None


def _image(**values):
    return lambda content, _: content["images"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda _, annotation, v=v: annotation.update([v]), "annotation 2 cannot be used") for v in VALUES),
        (_drops("segmentation"), "annotation 2 cannot be used, 'segmentation' is missing"),
        (lambda _, annotation: annotation.update(image_id="5"), r"annotations\[1\] .*image_id '5'.*different types"),
        (_drops("id"), r"annotations\[1\] cannot be used, 'id' is missing"),
        (lambda content, _: content["images"][0].pop("width") and None, "annotation 1 .*'width' is missing"),
        (_image(file_name=""), "a file_name is empty"),
        (lambda content, _: content["images"][0].pop("file_name") and None, "'file_name'"),
        (lambda content, _: content["images"].append(content["images"][0]), "two with the same id"),
        (lambda content, _: {"images": []}, "lists no images"),
        (lambda content, _: content.pop("annotations") and None, "COCO's annotations .*'annotations'"),
        (lambda content, _: {"annotations": [7]}, r"annotations\[0\] cannot be used"),
        (lambda content, _: {"categories": [{"name": "cat"}]}, "categories cannot be used, 'id' is missing"),
    ],
)
def test_wrong_annotations_are_errors_when_the_file_is_opened(tmp_path, change, message):
    specification = changed_coco(tmp_path, change)
    with pytest.raises(UserError, match=rf"^[^\n]*instances_val2017\.json[^\n]*{message}[^\n]*$"):
        open_images(specification, 32)


@pytest.mark.parametrize("name", ["val2017/x.jpg", "./x.jpg", "val2017\\x.jpg", "photos/x.jpg"])
def test_file_names_may_include_the_folder(tmp_path, name):
    specification = changed_coco(tmp_path, _image(file_name=name))
    if name.startswith("photos"):
        (tmp_path / "val2017" / "x.jpg").rename((tmp_path / "photos").mkdir() or tmp_path / "photos" / "x.jpg")
    assert open_images(specification, 32)[0].target.classes == [2, 7]


def test_a_wrong_image_size_is_a_problem_before_masks_are_allocated(tmp_path):
    specification = changed_coco(tmp_path, _image(height=10**6, width=10**6))
    assert "annotated size is (1000000, 1000000), the image has (40, 60)" in open_images(specification, 32)[0].problem


def test_a_file_without_annotations_is_an_error(tmp_path):
    file = make_coco(tmp_path) / "annotations" / "instances_val2017.json"
    for content in (file.read_bytes()[:100], b"[" * 100_000, b"[1, 2]", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="instances_val2017.json does not hold COCO's annotations"):
            open_images(f"coco:{tmp_path}", 32)
