"""Image sets of the evaluation: VOC's and COCO's formats, damaged annotations, folders; and image files."""

import io
import itertools
import json
import os
import resource
import struct
import zlib
from collections import UserList

import numpy as np
import pytest
import torch
from image_data import coco_box, encoded, write_tree, write_voc
from PIL import Image, ImageOps
from pycocotools import mask as rle

from crate_fast.errors import UserError
from crate_fast.eval.common.images import SceneImages, Target, batches, open_images
from crate_fast.eval.explore.pictures import decode
from crate_fast.train import write_shards
from crate_fast.train.data.image_files import as_stored, find_images, read_image
from crate_fast.train.data.sources import FolderSource, TorchvisionSource


def test_voc_has_classes_masks_and_void_and_a_wrong_annotation_is_a_problem(tmp_path):
    root = write_voc(tmp_path) / "VOC2012"
    images = open_images(f"voc:{tmp_path}", 32)
    assert images.keys() == ["a", "b", "c"]
    first, second, third = (images[i] for i in range(3))
    assert (first.image.shape, first.size, first.target.classes) == ((3, 32, 32), (40, 60), [1])
    assert first.target.masks.sum() == 40 * 28
    assert (~first.target.valid).sum() == 40 * 4
    assert second.target.classes == [3, 20]
    assert third.target.masks.shape == (0, 40, 60)
    assert images.class_names()[20] == "tvmonitor"
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
    masks, valid = torch.zeros(1, 4, 6, dtype=torch.bool), torch.ones(4, 6, dtype=torch.bool)
    masks[0, :, :3] = True
    valid[0, 1] = valid[1, :2] = False  # one of four pixels of the first patch is valid
    valid[3, 2:4] = False  # half of the middle patch below, and half of its valid pixels are object
    on_grid, usable = Target([1], masks, valid).on_grid((2, 3))
    assert usable.tolist() == [False, True, True, True, True, True]
    assert on_grid.tolist() == [[False, True, False, True, True, False]]


def make_coco(root, change=lambda content, annotation: None):
    """Write COCO with one image of two categories, one with overlapping instances, and a crowd.

    First `change(content, annotation 2)`, a box at x = 10, changes them in place or returns new entries.
    """
    (root / "val2017").mkdir(parents=True)
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(root / "val2017" / "x.jpg")
    boxes = (7, 0, 0, 20, 20), (7, 10, 0, 20, 20), (2, 40, 20, 20, 20), (2, 0, 30, 10, 10, 1)
    annotations = [coco_box(number, 5, *box) for number, box in enumerate(boxes, start=1)]
    content = {"images": [{"id": 5, "file_name": "x.jpg", "height": 40, "width": 60}], "annotations": annotations}
    content["categories"] = [{"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}]
    content |= change(content, annotations[1]) or {}
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
    voc, coco = write_voc(tmp_path) / "VOC2012", tmp_path / "coco"
    make_coco(coco, lambda *_: {"annotations": [coco_box(1, 5, 7, 0, 0, 15, 10)]})
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
            padded = {"size": [40, 60], "counts": [runs[0], 0, 0, *runs[1:], 0, 0]}
            entry["segmentation"]["counts"] = rle.frPyObjects(padded, 40, 60)["counts"].decode()


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
        lambda content, _: content["annotations"].append(coco_box(9, 5, 2, 7, 7, 0, 0)),  # without area
    ],
)
def test_coco_masks_are_unions_crowds_are_void_and_missing_values_are_computed(tmp_path, capsys, change):
    images = open_images(f"coco:{make_coco(tmp_path, change)}", 32)
    target, entries = images[0].target, images.coco.loadAnns([1, 2, 3, 4])
    assert (images.keys(), target.classes, images.class_names()) == ([5], [2, 7], {2: "cat", 7: "dog"})
    assert target.masks.sum(dim=(1, 2)).tolist() == [400, 600]
    assert (~target.valid).sum() == 100
    assert len(target.boxes) == 3
    boxes = [[0, 0, 20, 20], [10, 0, 20, 20], [40, 20, 20, 20], [0, 30, 10, 10]]
    assert [entry["bbox"] for entry in entries] == boxes
    assert [entry["area"] for entry in entries] == [400, 400, 400, 100]
    assert [entry["iscrowd"] for entry in entries] == [0, 0, 0, 1]
    assert capsys.readouterr().out == ""  # pycocotools prints its progress


def test_categories_without_names_are_numbered(tmp_path):
    make_coco(tmp_path, lambda *_: {"categories": [{"id": 2}, {"id": 7, "name": "dog"}]})
    assert open_images(f"coco:{tmp_path}", 32).class_names() == {2: "2", 7: "dog"}


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
        (lambda _, annotation: annotation.update(image_id="5"), r"annotations\[1\] .*image_id.*of the type of"),
        (_drops("id"), r"annotations\[1\] cannot be used, 'id' is missing"),
        (lambda content, _: content["images"][0].pop("width") and None, "annotation 1 .*'width' is missing"),
        (_image(width=0), r"annotation 1 .*height and width \[40, 0\]"),
        (_image(width="60"), r"annotation 1 .*height and width \[40, '60'\]"),
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
    make_coco(tmp_path, change)
    with pytest.raises(UserError, match=rf"^[^\n]*instances_val2017\.json[^\n]*{message}[^\n]*$"):
        open_images(f"coco:{tmp_path}", 32)


@pytest.mark.parametrize("name", ["val2017/x.jpg", "./x.jpg", "val2017\\x.jpg", "photos/x.jpg"])
def test_file_names_may_include_the_folder(tmp_path, name):
    make_coco(tmp_path, _image(file_name=name))
    if name.startswith("photos"):
        (tmp_path / "val2017" / "x.jpg").rename((tmp_path / "photos").mkdir() or tmp_path / "photos" / "x.jpg")
    assert open_images(f"coco:{tmp_path}", 32)[0].target.classes == [2, 7]


def test_a_wrong_image_size_is_a_problem_before_masks_are_allocated(tmp_path):
    make_coco(tmp_path, _image(height=10**6, width=10**6))
    problem = open_images(f"coco:{tmp_path}", 32)[0].problem
    assert "annotated size is (1000000, 1000000), the image has (40, 60)" in problem


def test_a_file_without_annotations_is_an_error(tmp_path):
    file = make_coco(tmp_path) / "annotations" / "instances_val2017.json"
    for content in (file.read_bytes()[:100], b"[" * 100_000, b"[1, 2]", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="instances_val2017.json does not hold COCO's annotations"):
            open_images(f"coco:{tmp_path}", 32)


# --- files of every mode, depth and orientation are read equally by training, evaluation and the explorer ---

RAMP = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
BLOCKS = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def _read(content: bytes) -> np.ndarray:
    picture = read_image(io.BytesIO(content))
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def _tiff(bits: int, content: bytes, width: int, height: int, white_is_zero: bool = False) -> bytes:
    """Return an uncompressed grey TIFF. Pillow cannot write 12 bits or white as zero."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8 + 2 + 9 * 12 + 4}
    tags |= {277: 1, 278: height, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + content


def _oriented(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(BLOCKS), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


def test_sixteen_bits_keep_their_full_range():
    big_endian = RAMP.astype(">u2").tobytes()
    tiff = encoded(Image.frombytes("I;16B", (64, 64), big_endian), "TIFF")
    for content in (encoded(Image.fromarray(RAMP)), tiff, b"P5 64 64 65535\n" + big_endian):  # PNG, TIFF, PGM
        assert np.abs(_read(content) - (RAMP / 257)[..., None]).max() < 1


def test_files_of_twelve_bits_and_with_white_as_zero_are_read():
    levels = np.arange(0, 4096, 16)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in levels.reshape(-1, 2).tolist())
    assert np.abs(_read(_tiff(12, packed, 256, 1))[0, :, 0] - levels / 4095 * 255).max() < 1
    negative = _read(_tiff(16, RAMP.astype("<u2").tobytes(), 64, 64, white_is_zero=True))
    assert np.abs(negative - (255 - RAMP / 257)[..., None]).max() < 1


def test_thirty_two_bits_are_refused_everywhere(tmp_path):
    for dtype in (np.int32, np.float32):
        content = encoded(Image.fromarray(np.zeros((8, 8), dtype)), "TIFF")
        write_tree(tmp_path, {"train/ant/a.tif": content})
        with pytest.raises(UserError, match="32 bits have no known range: save the image with 8 or 16"):
            read_image(io.BytesIO(content))
        with pytest.raises(OSError, match=r"a\.tif: UserError: pixels of 32 bits"):
            FolderSource(tmp_path / "train")[0]
        assert "32 bits" in open_images(f"folder:{tmp_path}", 8)[0].problem
        with pytest.raises(UserError, match="32 bits"):
            decode(content, "a.tif")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_transparent_parts_are_white():
    rgba = np.dstack([BLOCKS, np.linspace(0, 255, 24 * 32).astype(np.uint8).reshape(24, 32)])
    numbers = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 3
    colours = np.array([[10, 20, 30, 255], [40, 50, 60, 0], [70, 80, 90, 128]], np.uint8)
    palette = Image.fromarray(numbers, mode="P")
    palette.putpalette(colours[:, :3].tobytes())
    key = tuple(BLOCKS[0, 0].tolist())
    deep = np.array([[[0x1234, 0x5678, 0x9ABC], [0x3434, 0x7878, 0xBCBC]]], ">u2")
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), (b"tRNS", deep[0, 0].tobytes())]
    parts += [(b"IDAT", zlib.compress(b"\0" + deep.tobytes())), (b"IEND", b"")]
    for content, pixels, alpha in (
        (encoded(Image.fromarray(rgba)), BLOCKS, rgba[..., 3]),
        (encoded(palette, transparency=colours[:, 3].tobytes()), colours[numbers, :3], colours[numbers, 3]),
        (encoded(Image.fromarray(BLOCKS), transparency=key), BLOCKS, 255 * (key != BLOCKS).any(-1)),
        (encoded(Image.fromarray(RAMP), transparency=9362), RAMP[..., None] / 257, 255 * (RAMP != 9362)),
        (b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts), deep >> 8, np.array([[0, 255]])),
    ):
        alpha = alpha[..., None] / 255
        assert np.abs(_read(content) - (pixels * alpha + 255 * (1 - alpha))).max() <= 1


def test_opaque_modes_are_converted_to_rgb_as_by_pillow():
    for mode in ("1", "L", "P", "CMYK", "YCbCr"):
        content = encoded(Image.fromarray(BLOCKS).convert(mode), "TIFF")
        assert np.array_equal(_read(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))), mode


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_upright_for_all_readers(kind, tmp_path):
    for orientation in range(1, 9):
        content = _oriented(orientation, kind)
        right = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        write_tree(tmp_path, {f"train/ant/a.{kind.lower()}": content})
        assert np.array_equal(_read(content), right)
        assert np.array_equal(np.asarray(decode(content, "a")), right)
        assert np.array_equal(np.asarray(FolderSource(tmp_path / "train")[0][0]), right)
        assert open_images(f"folder:{tmp_path}", 8)[0].size == right.shape[:2]
        pixels = BLOCKS if kind == "TIFF" else Image.open(io.BytesIO(content)).convert("RGB")  # Pillow turns TIFFs
        assert np.array_equal(np.asarray(as_stored(read_image(io.BytesIO(content)))), np.asarray(pixels))


@pytest.mark.parametrize(("shorter_side", "size"), [(12, (12, 16)), (256, (24, 32))])
def test_pictures_in_written_shards_are_upright(shorter_side, size):
    content = _oriented(6, "JPEG")
    _, written = write_shards.encoded(content, shorter_side, 95)
    assert (written == content) == (shorter_side == 256)
    small = np.asarray(read_image(io.BytesIO(content)).resize(size, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(small - _read(written)).mean() < 20  # of 255: JPEG's loss; a turned picture differs by 80


def test_torchvisions_files_are_read_upright(tmp_path):
    (tmp_path / "a.jpg").write_bytes(_oriented(6, "JPEG"))
    pets = UserList([(Image.open(tmp_path / "a.jpg").convert("RGB"), 0)])  # as torchvision reads it
    pets.classes = ("a",)
    picture, label = TorchvisionSource(pets, "pets")[0]
    assert (picture.size, label) == ((24, 32), 0)


@pytest.mark.filterwarnings("ignore")
def test_a_picture_with_damaged_exif_is_read_without_orientation():
    good = _oriented(6, "JPEG")
    for offset, length in ((0, 8), (8, 6)):
        start = good.index(b"Exif\0\0") + 6 + offset
        damaged = good[:start] + b"\xff" * length + good[start + length :]
        assert read_image(io.BytesIO(damaged)).size == (32, 24)


@pytest.mark.filterwarnings("ignore")
def test_a_randomly_damaged_file_is_read_or_has_a_problem(tmp_path):
    wholes = [encoded(Image.fromarray(BLOCKS), kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM")]
    png, chunks = wholes[1], ((b"tRNS", b"\0" * 3), (b"iCCP", b"\xff" * 9), (b"zTXt", b"a\0\0\xff"))
    wholes += [png[:33] + _chunk(*chunk) + png[33:] for chunk in chunks]  # in front of the pixels
    draw = np.random.default_rng(0)
    for number, whole in enumerate(wholes):
        for turn in range(12):
            damaged = bytearray(whole[: draw.integers(8, len(whole) + 1)])
            for _ in range(turn):
                damaged[draw.integers(2, len(damaged))] = draw.integers(256)
            (tmp_path / f"{number}-{turn}.png").write_bytes(damaged)
    images = open_images(f"folder:{tmp_path}", 8)
    problems = [images[i].problem for i in range(len(images))]
    assert sum(problem is not None for problem in problems) > 60


def test_only_formats_of_photographs_are_opened(monkeypatch):
    """Pillow would run Ghostscript on an EPS file, whatever its suffix."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    for kind in ("EPS", "DDS"):
        with pytest.raises(Image.UnidentifiedImageError, match="none of the formats JPEG, PNG"):
            read_image(io.BytesIO(encoded(Image.fromarray(BLOCKS), kind)))


def test_samples_from_workers_can_all_be_kept():
    """Each of their tensors keeps a file descriptor open, of which a process may have 1,024 by default."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, before[1]))
    try:
        kept = [sample for batch in batches(SceneImages(32, 40), workers=1) for sample in batch.samples]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(kept) == 40


def test_folders_that_link_to_each_other_are_read_once_per_path(tmp_path):
    for name, others in {"a": "bc", "b": "ca", "c": "ab"}.items():
        write_tree(tmp_path, {f"{name}/{name}.png": b""})
        for other in others:
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    found = [name for name in find_images(tmp_path).names if name.startswith("a/")]
    ways = ["a", "a/to_b", "a/to_b/to_c", "a/to_c", "a/to_c/to_b"]
    assert found == [f"{way}/{way[-1]}.png" for way in ways]
    assert find_images(tmp_path, follow_links=False).names == ["a/a.png", "b/b.png", "c/c.png"]
    with pytest.raises(UserError, match="nowhere cannot be listed"):
        find_images(tmp_path / "nowhere")
