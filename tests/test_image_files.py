"""Image files of every mode, depth and orientation are read equally by training, evaluation and the explorer."""

import io
import struct
import zlib
from collections import UserList

import numpy as np
import pytest
from image_data import encoded, write_tree
from PIL import Image, ImageOps

from crate_fast.errors import UserError
from crate_fast.eval.common.images import open_images
from crate_fast.eval.explore.pictures import decode
from crate_fast.train import write_shards
from crate_fast.train.data.image_files import as_stored, find_images, read_image
from crate_fast.train.data.sources import FolderSource, TorchvisionSource

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
    dds = encoded(Image.fromarray(BLOCKS), "DDS")
    (tmp_path / "dds.png").write_bytes(dds[:80] + b"\x91" + dds[81:])  # Pillow: NotImplementedError
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
    assert "NotImplementedError" in problems[images.keys().index("dds.png")]


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
