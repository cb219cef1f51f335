"""The pictures that visitors look at: files of one folder or scenes, and what they upload, decoded with care.

A visitor names pictures by ids that were given out, never by paths. Uploads are held in memory, the oldest dropped
first; they are decoded by Pillow from a short list of formats, and nothing is written to disk.
"""

import hashlib
import io
import threading
from collections import OrderedDict
from pathlib import Path

from PIL import Image
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.eval.common.images import SceneImages, squash
from crate_fast.train.image_files import EXTENSIONS, UNREADABLE, find_images, open_image, to_rgb

__all__ = ["LARGEST_UPLOAD", "Pictures", "UnknownPictureError", "UnreadablePictureError", "decode"]

LARGEST_UPLOAD = 20 * 2**20  # bytes
_LARGEST_PIXELS = 50_000_000
_LARGEST_SIDE = 2048  # of what is kept of a picture
_DECODING = threading.BoundedSemaphore(2)  # at once, as each may take some 350 MiB
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_UPLOADS_BYTES = 256 * 2**20
_MOST_LISTED = 200
_SCENES, _SCENE_SIZE = 12, 256


class UnreadablePictureError(UserError):
    """A picture that cannot be decoded, or is too large."""


class UnknownPictureError(UserError):
    """There is no picture with this id, or no longer."""


def decode(data: bytes, name: str) -> Image.Image:
    """Return an image file's picture as `read_image` does, but at most 2,048 pixels a side.

    Args:
        data: The whole file: JPEG, PNG, WebP, BMP, GIF, TIFF or PPM.
        name: For messages.

    Raises:
        UnreadablePictureError: It is none of these, is damaged, has more than 50 megapixels, or 32 bits a channel.
    """
    if len(data) > LARGEST_UPLOAD:
        raise UnreadablePictureError(f"{name} has {len(data) / 2**20:.0f} MiB: at most 20 are read; make it smaller")
    try:
        with _DECODING, open_image(io.BytesIO(data), _FORMATS) as file:
            width, height = file.size
            if width * height > _LARGEST_PIXELS:
                raise UnreadablePictureError(
                    f"{name} is {width}×{height}, {width * height / 1e6:.0f} megapixels: at most "
                    f"{_LARGEST_PIXELS / 1e6:.0f} are read; make it smaller"
                )
            file.draft("RGB", (_LARGEST_SIDE, _LARGEST_SIDE))  # a JPEG is decoded no larger than needed
            picture = to_rgb(file)
            picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
            return picture
    except UnreadablePictureError:
        raise
    except UserError as error:
        raise UnreadablePictureError(f"{name} has {error}") from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(_FORMATS)
        raise UnreadablePictureError(f"{name} is no image that can be read here ({known}); choose another") from error
    except UNREADABLE as error:
        raise UnreadablePictureError(f"{name} cannot be read: {error}; choose another") from error


class Pictures:
    """What can be looked at.

    Args:
        folder: Of the images that are offered; scenes of `shape_scenes` are when None.

    Attributes:
        note: What the page says above the list; "" where there is nothing to say.

    Raises:
        UserError: There is no such folder, or no image in it.
    """

    def __init__(self, folder: Path | None):
        self._root = None if folder is None else folder.resolve()
        self._files: list[Path] = []
        self._uploads: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self.note = "" if folder else "Scenes drawn by shape_scenes (validation split)."
        if folder is not None:
            self._find(folder)

    def _find(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"--images {folder}: no such folder; pass one with images")
        tree = find_images(folder, follow_links=False)
        found = [path for path in sorted(folder / name for name in tree.names) if self._inside(path)]
        if not found:
            note = f"; {tree.note}" if tree.note else ""
            raise UserError(f"--images {folder} holds no images ({', '.join(EXTENSIONS)}{note}); pass another")
        self._files = found[:_MOST_LISTED]
        if len(found) > _MOST_LISTED:
            self.note = f"The first {_MOST_LISTED} of {len(found):,} images of the folder."
        if tree.note:
            self.note = f"{self.note} {tree.note.capitalize()}.".strip()

    def _inside(self, path: Path) -> bool:
        """Whether a file is in the folder itself: a link to somewhere else is not."""
        return path.is_file() and path.resolve().is_relative_to(self._root)

    def listing(self) -> list[dict[str, str]]:
        """ "id" and "name" of every picture but the uploads."""
        if self._root is None:
            return [{"id": f"s{number}", "name": f"scene {number}"} for number in range(_SCENES)]
        names = [_printable(str(path.resolve().relative_to(self._root))) for path in self._files]
        return [{"id": f"f{number}", "name": name} for number, name in enumerate(names)]

    def add(self, data: bytes, name: str) -> str:
        """Keep an upload; its id, which only its content determines.

        Raises:
            UnreadablePictureError: See `decode`.
        """
        decode(data, name)
        key = "u" + hashlib.sha256(data).hexdigest()
        with self._lock:
            self._uploads[key] = (name, data)
            self._uploads.move_to_end(key)
            while sum(len(kept) for _, kept in self._uploads.values()) > _UPLOADS_BYTES:
                self._uploads.popitem(last=False)
        return key

    def view(self, key: str) -> Image.Image:
        """A picture in its own shape.

        Raises:
            UnknownPictureError: There is none with this id.
            UnreadablePictureError: See `decode`.
        """
        number = self._number(key)
        if key.startswith("s") and self._root is None and number in range(_SCENES):
            pixels = SceneImages(_SCENE_SIZE, _SCENES)[number].image
            return Image.fromarray(pixels.permute(1, 2, 0).numpy())
        if key.startswith("f") and number in range(len(self._files)):
            return self._read(self._files[number])
        with self._lock:
            found = self._uploads.get(key)
        if found is None:
            raise UnknownPictureError("this picture is not here, or no longer: choose or upload it again")
        return decode(found[1], found[0])

    def pixels(self, key: str, size: int) -> Tensor:
        """A picture as a model sees it: squashed to a square, or drawn at this size; uint8 [3, size, size].

        Args:
            key: Its id.
            size: Height and width in pixels.

        Raises:
            UnknownPictureError, UnreadablePictureError: See `view`.
        """
        number = self._number(key)
        if key.startswith("s") and self._root is None and number in range(_SCENES):
            return SceneImages(size, _SCENES)[number].image
        return squash(self.view(key), size)

    @staticmethod
    def _number(key: str) -> int:
        return int(key[1:]) if key[1:].isdecimal() and key.isascii() and len(key) < 8 else -1

    def _read(self, path: Path) -> Image.Image:
        if not self._inside(path):
            raise UnknownPictureError(f"{path.name} is no longer in the folder: start the explorer again")
        if path.stat().st_size > LARGEST_UPLOAD:
            raise UnreadablePictureError(f"{path.name} has more than 20 MiB: make it smaller")
        return decode(path.read_bytes(), _printable(path.name))


def _printable(name: str) -> str:
    """A file's name for the page, which takes UTF-8 only."""
    return name.encode("utf-8", "replace").decode()
