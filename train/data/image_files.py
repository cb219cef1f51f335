"""Find image files with their classes, and decode them to RGB in the same way for all sources but torchvision's.

The class of an image is the first folder below its split, in the order of torchvision's `ImageFolder`. Images become
8-bit RGB, upright by their EXIF orientation, with white behind transparent pixels. 16-bit grey is scaled to 8 bits;
32-bit integers and floats are refused, because their range is unknown.
"""

import os
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from crate_fast.errors import UserError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # with Pillow's others, an EPS would run Ghostscript
_UNSUPPORTED = (  # image formats that some or all releases of Pillow cannot read
    *(".avif", ".heic", ".heif", ".j2k", ".jp2", ".jpx", ".jxl", ".svg", ".psd", ".tga", ".ico", ".pcx", ".dds"),
    *(".dib", ".qoi", ".exr", ".hdr", ".pfm", ".dcm", ".dng", ".raw", ".arw", ".cr2", ".cr3", ".nef", ".orf", ".rw2"),
)
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # raised on damaged files
_EXIF_FAULTS = (*UNREADABLE, AssertionError, EOFError, KeyError, TypeError, ZeroDivisionError, struct.error)

_ORIENTATION = ExifTags.Base.Orientation
_UPRIGHT = {  # orientation → operation that turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags and a value


class Unreadable(OSError):
    """Error for an image that cannot be read; its message comes from `describe`."""


def describe(image: str, error: Exception) -> str:
    """Return the log line of a corrupt image: "path: error: reason"."""
    return as_text(f"{image}: {type(error).__name__}: {error}")


def as_text(name: str) -> str:
    """Return a file's name with escapes for bytes that are not UTF-8, which can be neither written nor drawn."""
    return name.encode("utf-8", "backslashreplace").decode()


def print_once(remarks: Iterable[str]) -> None:
    """Print remarks on the data to stderr; of the processes of a host, only the first does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for remark in remarks:
            print(remark, file=sys.stderr)


# --- finding files


def is_image(name: str) -> bool:
    """Return True if the file name has the suffix of a supported image format."""
    return name.lower().endswith(EXTENSIONS)


def looks_like_image(name: str) -> bool:
    """Return True if the file name has the suffix of an image format, supported or not."""
    return is_image(name) or os.path.splitext(name)[1].lower() in _UNSUPPORTED


def is_hidden(name: str) -> bool:
    """Return True if a part of a relative path begins with a dot, such as .ipynb_checkpoints or ._x.png."""
    return name.startswith(".") or "/." in name


class ImageTree:
    """Image files below a folder, or in an archive of one.

    Args:
        files: Paths relative to the folder, parts separated by "/".
        folders: Names of the top-level folders, with and without images.
    """

    def __init__(self, files: Iterable[str], folders: set[str]):
        files = list(files)
        self.names, self.folders = sorted(filter(is_image, files), key=_order), folders
        counts = Counter(os.path.splitext(name)[1].lower() for name in files)
        found = [f"{counts[suffix]} {suffix}" for suffix in sorted(counts.keys() & set(_UNSUPPORTED))]
        self.note = f"image files of unsupported formats are ignored: {', '.join(found)}" if found else ""

    def labelled(self, where: str) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the sorted class names and the class index of every image; `where` names the folder in messages.

        Raises:
            UserError: There are no images, an image is in no class folder, or a class folder has no images.
        """
        loose = [name for name in self.names if "/" not in name]
        of_images = [name.partition("/")[0] for name in self.names]
        empty = sorted(self.folders.difference(of_images))
        fault = ""
        if not self.names:
            fault = f"it holds no images ({' '.join(EXTENSIONS)})"
        elif loose:
            fault = f"{len(loose)} of its images are in no class folder, such as {loose[0]}"
        elif empty:
            fault = f"{len(empty)} class folders hold no images, such as {empty[:8]}: fill or remove them"
        if fault:
            note = f"; {self.note}" if self.note else ""
            raise UserError(
                f"{where} cannot be used ({fault}{note}): it must hold images, each in a folder named after its class"
            )
        classes = tuple(sorted(set(of_images)))
        numbers = {name: number for number, name in enumerate(classes)}
        return tuple(map(as_text, classes)), np.array([numbers[name] for name in of_images], np.int64)

    def remarks(self) -> list[str]:
        """Return warnings about ignored image files, and about a single class that holds folders."""
        tops = {name.partition("/")[0] for name in self.names}
        below = sorted({name.split("/")[1] for name in self.names if name.count("/") > 1})
        one = f"all images have one class, {min(tops, default='')!r}: the top folder is the class, not a folder in it"
        found = f"{one}, such as {below[0]!r}" if len(tops) == 1 and len(below) > 1 else ""
        return [remark for remark in (self.note, found) if remark]


def _order(name: str) -> tuple[str, str, str]:
    folder, _, file = name.rpartition("/")
    return folder.partition("/")[0], folder, file


def find_images(root: Path, follow_links: bool = True) -> ImageTree:
    """Return the images below a folder, except in hidden files and folders; raise a UserError if it is unreadable."""

    def refuse(error: OSError) -> None:  # os.walk would skip the folder silently
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): make it readable, or remove it")

    top, tops, paths = str(root), set(), []
    for folder, folders, files in os.walk(top, onerror=refuse, followlinks=follow_links):
        folders[:] = [name for name in folders if name[0] != "." and not _leads_back(folder, name)]
        if folder == top:
            tops.update(folders)
        inner = "" if folder == top else os.path.relpath(folder, top).replace(os.sep, "/") + "/"
        paths += [inner + name for name in files if name[0] != "."]
    return ImageTree(paths, tops)


def _leads_back(folder: str, name: str) -> bool:
    """Return True if a link points to a folder that contains it, which would be an endless loop."""
    if not os.path.islink(os.path.join(folder, name)):
        return False
    target = os.path.realpath(os.path.join(folder, name))
    return any(Path(os.path.realpath(place)).is_relative_to(target) for place in (folder, *Path(folder).parents))


# --- decoding


@contextmanager
def open_image(file: BinaryIO | str | Path) -> Iterator[Image.Image]:
    """Open an image file without decoding it; damage found while it is open raises one of `UNREADABLE`."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError:  # its message contains a memory address
        raise UnidentifiedImageError(f"none of the formats {', '.join(FORMATS)}") from None
    except UNREADABLE:
        raise
    except Exception as error:  # Pillow raises many kinds of exceptions on damaged files
        raise OSError(f"damaged ({type(error).__name__}: {error})") from error


def read_image(file: BinaryIO | str | Path) -> Image.Image:
    """Return the first frame of a file as upright 8-bit RGB on white.

    Raises:
        UserError: The pixels have 32 bits, and so no known range.
        UNREADABLE: The file is damaged.
    """
    with open_image(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image as `read_image` does; `info["orientation"]` is its EXIF orientation in the file."""
    deep = any(";16" in str(part[3]) for part in getattr(image, "tile", ()))  # empty after loading
    stored = _orientation(image)  # before loading, in which Pillow rotates a TIFF
    image.load()
    left = _orientation(image)
    colour = image.info.get("transparency")
    if deep and image.mode == "RGB" and isinstance(colour, tuple):  # Pillow reads only the upper byte of pixels
        image.info["transparency"] = tuple(level >> 8 for level in colour)
    picture = _eight_bit_rgb(image)
    if left in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[left])
    picture.info = {"orientation": stored}  # without EXIF, which would rotate a saved copy again
    return picture


def as_stored(picture: Image.Image) -> Image.Image:
    """Return a picture of `to_rgb` in the orientation of the file."""
    orientation = picture.info.get("orientation", 1)
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    return picture.transpose(_UPRIGHT[inverse]) if inverse in _UPRIGHT else picture


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _EXIF_FAULTS:
        return 1
    return found if isinstance(found, int) else 1


def _eight_bit_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # `convert` would copy it
    sixteen = image.mode == "I" and image.format in ("PNG", "PPM")  # formats of at most 16 bits
    if image.mode.startswith("I;16") or sixteen:
        return _from_sixteen_bits(image).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError("pixels of 32 bits have no known range: save the image with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Return the upper 8 bits of a grey image, as Pillow does for 16-bit colours."""
    levels, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = int(np.max(tags.get(_BITS_PER_SAMPLE, 16)))  # a TIFF may have 12
    grey = (levels >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8-bit images only
        grey = 255 - grey
    if isinstance(image.info.get("transparency"), int):
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey)
