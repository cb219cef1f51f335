"""Sets of images: VOC's and COCO's own formats, made by the tests, and what goes wrong with them."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from crate_fast.errors import UserError
from crate_fast.eval.images import Target, batches, open_images


def make_voc(root):
    """VOC2012 with two images: class 1 on the left half, void on a stripe; class 3 and 20, and no object."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / "VOC2012" / folder).mkdir(parents=True)
    base = root / "VOC2012"
    palette = [0, 0, 0, 128, 0, 0, *([64] * (254 * 3))]
    labels = np.zeros((3, 40, 60), np.uint8)
    labels[0, :, :30], labels[0, :, 28:32] = 1, 255
    labels[1, :20, :20], labels[1, 20:, 40:] = 3, 20
    for name, label in zip("abc", labels, strict=True):
        Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(base / "JPEGImages" / f"{name}.jpg")
        picture = Image.fromarray(label, mode="P")
        picture.putpalette(palette)
        picture.save(base / "SegmentationClass" / f"{name}.png")
    (base / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\n")
    return root


def test_voc_classes_void_and_background(tmp_path):
    images = open_images(f"voc:{make_voc(tmp_path)}", 32)
    assert images.keys() == ["a", "b", "c"]
    first, second, third = (images[i] for i in range(3))
    assert first.image.shape == (3, 32, 32)
    assert first.size == (40, 60)
    assert first.target.classes == [1]
    assert first.target.masks.sum() == 40 * 28
    assert (~first.target.valid).sum() == 40 * 4
    assert second.target.classes == [3, 20]
    assert third.target.masks.shape == (0, 40, 60)
    assert images.class_names()[20] == "tvmonitor"
    masks, valid = first.target.on_grid((2, 3))  # patches of 20×20 pixels
    assert masks.tolist() == [[True, True, False] * 2]  # the middle: 8 of its 16 pixels that count
    assert valid.all()


def test_void_patches_do_not_count():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :, :2] = True
    valid = torch.ones(4, 4, dtype=torch.bool)
    valid[:2, :2] = False
    valid[0, 0] = True  # one of four pixels
    on_grid, usable = Target([1], masks, valid).on_grid((2, 2))
    assert usable.tolist() == [False, True, True, True]
    assert on_grid.tolist() == [[False, False, True, False]]


def make_coco(root, crowd: bool = True):
    """COCO with one image of two categories, overlapping instances of one, and a crowd."""
    (root / "val2017").mkdir(parents=True)
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(root / "val2017" / "x.jpg")

    def box(identity: int, category: int, x: int, y: int, w: int, h: int, crowded: int = 0) -> dict:
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        area = {"bbox": [x, y, w, h], "area": w * h, "segmentation": polygon}
        return {"id": identity, "image_id": 5, "category_id": category, "iscrowd": crowded, **area}

    annotations = [box(1, 7, 0, 0, 20, 20), box(2, 7, 10, 0, 20, 20), box(3, 2, 40, 20, 20, 20)]
    annotations += [box(4, 2, 0, 30, 10, 10, 1)] if crowd else []
    content = {
        "images": [{"id": 5, "file_name": "x.jpg", "height": 40, "width": 60}],
        "annotations": annotations,
        "categories": [{"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def test_coco_unions_and_crowds(tmp_path, capsys):
    images = open_images(f"coco:{make_coco(tmp_path)}", 32)
    sample = images[0]
    assert images.keys() == [5]
    assert sample.target.classes == [2, 7]
    assert sample.target.masks.sum(dim=(1, 2)).tolist() == [400, 600]
    assert (~sample.target.valid).sum() == 100
    assert images.class_names() == {2: "cat", 7: "dog"}
    assert capsys.readouterr().out == ""


_CORNER = np.zeros((40, 60), bool)
_CORNER[:10, :15] = True


def _orient(path, upright: np.ndarray, orientation: int):
    """Write a picture that a viewer shows as `upright`, its pixels stored otherwise."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = next(
        turned
        for how in (None, *Image.Transpose)
        for turned in [Image.fromarray(upright) if how is None else Image.fromarray(upright).transpose(how)]
        if _shown(turned, exif, upright)
    )
    stored.save(path, exif=exif, quality=95)


def _shown(stored: Image.Image, exif: Image.Exif, upright: np.ndarray) -> bool:
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    return np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(file))), upright)


def _white_object(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)


def _on_object(sample) -> bool:
    """Whether the pixels of the mask are the white ones."""
    (mask,) = sample.target.masks.float()
    grid = torch.nn.functional.interpolate(mask[None, None], sample.image.shape[1:], mode="area")[0, 0]
    white = sample.image.float().mean(0)
    return bool(white[grid > 0.99].mean() > 240 and white[grid < 0.01].mean() < 15)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_on_the_object_however_its_pixels_are_stored(tmp_path, orientation):
    base = make_voc(tmp_path) / "VOC2012"
    make_coco(tmp_path / "coco", crowd=False)
    annotations = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0]["segmentation"] = [[0, 0, 15, 0, 15, 10, 0, 10]]
    annotations.write_text(json.dumps(content))
    _orient(tmp_path / "coco" / "val2017" / "x.jpg", _white_object(_CORNER), orientation)
    _orient(base / "JPEGImages" / "a.jpg", _white_object(_CORNER), orientation)
    Image.fromarray(_CORNER.astype(np.uint8), mode="P").save(base / "SegmentationClass" / "a.png")
    for name in (f"coco:{tmp_path}/coco", f"voc:{tmp_path}"):
        sample = open_images(name, 32)[0]
        assert sample.problem is None
        assert sample.size == (40, 60)
        assert _on_object(sample), name


@pytest.mark.parametrize("orientation", range(5, 9))
def test_masks_drawn_on_the_stored_pixels_stay_on_them(tmp_path, orientation):
    base = make_voc(tmp_path) / "VOC2012"
    picture = Image.fromarray(_white_object(_CORNER))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(base / "JPEGImages" / "a.jpg", exif=exif, quality=95)
    Image.fromarray(_CORNER.astype(np.uint8), mode="P").save(base / "SegmentationClass" / "a.png")
    sample = open_images(f"voc:{tmp_path}", 32)[0]
    assert sample.size == (40, 60)
    assert _on_object(sample)
    make_coco(tmp_path / "coco", crowd=False)
    picture.save(tmp_path / "coco" / "val2017" / "x.jpg", exif=exif, quality=95)
    sample = open_images(f"coco:{tmp_path}/coco", 32)[0]
    assert (sample.problem, sample.size) == (None, (40, 60))


def test_scenes_are_the_same_at_every_size():
    small, large = (open_images("shape_scenes:3", size, 4) for size in (32, 64))
    assert len(small) == 4
    assert [small[i].target.classes for i in range(4)] == [large[i].target.classes for i in range(4)]
    assert large[0].target.masks.shape == (1, 64, 64)


def test_unreadable_images_are_told_and_do_not_stop(tmp_path, capsys):
    for name in ("a.png", "b.jpg", "c.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"text")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("not an image by its name")
    problems: list[str] = []
    seen = [s.key for batch in batches(open_images(f"folder:{tmp_path}", 16), 2, problems) for s in batch.samples]
    assert seen == ["a.png"]
    assert [p.split(":")[0].split("/")[-1] for p in problems] == ["b.jpg", "c.png"]
    assert "unreadable" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 3 images could be read"):
        list(batches(open_images(f"folder:{tmp_path}", 16), 2, []))


def test_grey_and_transparent_images_and_limits(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "b.png")
    images = open_images(f"folder:{tmp_path}", 16)
    assert [images[i].image.shape for i in range(2)] == [(3, 16, 16)] * 2
    assert len(open_images(f"folder:{tmp_path}", 16, 1)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("voc:{}/absent", "no SegmentationClass folder"),
        ("coco:{}/absent", "instances_val2017.json is not there"),
        ("coco:{}/coco:train2017", "instances_train2017.json"),
        ("folder:{}/absent", "no such folder"),
        ("folder:{}/empty", "holds no images"),
        ("imagenet", "write folder:PATH"),
        ("shape_scenes:x", "write shape_scenes or"),
    ],
)
def test_what_is_not_there(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    make_coco(tmp_path / "coco")
    with pytest.raises(UserError, match=message):
        open_images(name.format(tmp_path), 32)


def test_damaged_annotations(tmp_path):
    root = make_voc(tmp_path) / "VOC2012"
    (root / "SegmentationClass" / "a.png").unlink()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "SegmentationClass" / "b.png")
    images = open_images(f"voc:{tmp_path}", 32)
    assert "a.png" in images[0].problem
    assert "annotation b.png is (9, 9), its image (40, 60)" in images[1].problem
    assert images[2].problem is None
    (root / "ImageSets/Segmentation/val.txt").write_text("")
    with pytest.raises(UserError, match="lists no images"):
        open_images(f"voc:{tmp_path}", 32)
    with pytest.raises(ValueError, match="--limit 0"):
        open_images("shape_scenes", 32, 0)


def test_damaged_coco_annotations(tmp_path):
    file = make_coco(tmp_path) / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    del content["annotations"][0]["segmentation"]
    file.write_text(json.dumps(content))
    assert "KeyError: 'segmentation'" in open_images(f"coco:{tmp_path}", 32)[0].problem
    for text in (file.read_text()[:100], "[1, 2]"):
        file.write_text(text)
        with pytest.raises(ValueError, match="does not hold COCO's annotations"):
            open_images(f"coco:{tmp_path}", 32)
