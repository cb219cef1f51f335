"""Pictures of the explorer: files of one folder, or free photographs and scenes; and uploads.

Requests name pictures by ids from `Pictures.listing` and `Pictures.add`, never by paths. Uploads stay in memory, and
the least recently used are dropped first. Pillow decodes a few formats only. Nothing is written to disk.
"""

import hashlib
import io
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.eval.common.images import SceneImages, free_photographs, squash
from crate_fast.train.data.image_files import (
    EXTENSIONS,
    FORMATS,
    UNREADABLE,
    as_text,
    find_images,
    open_image,
    to_rgb,
)

MAX_UPLOAD_BYTES = 20 * 2**20
_MAX_PIXELS = 50_000_000
_MAX_SIDE = 2048  # larger pictures are scaled down
_DECODING = threading.BoundedSemaphore(2)  # one picture may take 350 MiB
_MAX_UPLOADS = 12  # in memory
_MAX_LISTED = 200  # images of a folder
_SCENES, _SCENE_SIZE = 12, 256  # number, and side in pixels


class LRUCache:
    """Thread-safe mapping of at most `limit` values, which drops the least recently used."""

    def __init__(self, limit: int):
        self.limit = limit
        self.values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        """Return the value of a key, or None."""
        with self._lock:
            if key in self.values:
                self.values.move_to_end(key)
            return self.values.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Store a value."""
        with self._lock:
            self.values[key] = value
            self.values.move_to_end(key)
            while len(self.values) > self.limit:
                self.values.popitem(last=False)

    def once(self, key: Hashable, lock: threading.Lock, make: Callable[[], Any]) -> Any:
        """Return the value of a key; if missing, make it under `lock`, so that threads make it only once."""
        if (found := self.get(key)) is None:
            with lock:
                if (found := self.get(key)) is None:
                    found = make()
                    self.put(key, found)
        return found


def decode(data: bytes, name: str) -> Image.Image:
    """Decode a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM file as `read_image` does, to at most 2,048 pixels per side."""
    try:
        with _DECODING, open_image(io.BytesIO(data)) as file:
            width, height = file.size
            if width * height > _MAX_PIXELS:
                raise ValueError(f"{width * height / 1e6:.0f} megapixels, above the limit of {_MAX_PIXELS / 1e6:.0f}")
            file.draft("RGB", (_MAX_SIDE, _MAX_SIDE))  # a JPEG is decoded no larger than needed
            picture = to_rgb(file)
            picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
            return picture
    except Image.UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise UserError(f"{name} is no image of a supported format: choose one of {known}") from error
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be read ({error}): choose another") from error


class Pictures:
    """Selectable pictures: the images of a folder, or free photographs and scenes; and uploads."""

    def __init__(self, folder: Path | None):
        self._uploads = LRUCache(_MAX_UPLOADS)  # id → (name, data)
        self.note, self._root = "", None  # text above the list on the page; resolved folder
        self._known: dict[str, tuple[str, Path | int]]  # id → name, and file or number of the scene
        if folder is None:
            self._known = {f"p{number}": entry for number, entry in enumerate(free_photographs().items())}
            self._known |= {f"s{number}": (f"scene {number}", number) for number in range(_SCENES)}
            self.note = "Photographs from installed packages, and scenes of shape_scenes (validation split)."
            return
        if not folder.is_dir():
            raise UserError(f"--images {folder}: no such folder; pass one with images")
        self._root, tree = folder.resolve(), find_images(folder, follow_links=False)
        paths = sorted(folder / name for name in tree.names)
        found = [*itertools.islice(filter(self._inside, paths), _MAX_LISTED)]
        if not found:
            note = f"; {tree.note}" if tree.note else ""
            note += "; links that lead out of the folder are left out" if paths else ""
            raise UserError(f"--images {folder} holds no images ({', '.join(EXTENSIONS)}{note}); pass another")
        names = [as_text(str(path.resolve().relative_to(self._root))) for path in found]
        self._known = {f"f{number}": entry for number, entry in enumerate(zip(names, found, strict=True))}
        if len(paths) > len(found) == _MAX_LISTED:
            self.note = f"The first {_MAX_LISTED} of {len(paths):,} images in the folder."
        if tree.note:
            self.note = f"{self.note} {tree.note.capitalize()}.".strip()

    def _inside(self, path: Path) -> bool:
        return path.is_file() and (self._root is None or path.resolve().is_relative_to(self._root))

    def listing(self) -> list[dict[str, str]]:
        """Return "id" and "name" of every picture except uploads."""
        return [{"id": key, "name": name} for key, (name, _) in self._known.items()]

    def add(self, data: bytes, name: str) -> str:
        """Keep an upload and return its id, a hash of its content."""
        decode(data, name)
        key = "u" + hashlib.sha256(data).hexdigest()
        self._uploads.put(key, (name, data))
        return key

    def version(self, key: str) -> tuple[int, int] | None:
        """Return the time and size of a picture's file, which change when it is edited; None for other pictures."""
        place = self._known.get(key, ("", None))[1]
        found = place.stat() if isinstance(place, Path) and place.exists() else None
        return None if found is None else (found.st_mtime_ns, found.st_size)

    def view(self, key: str) -> Image.Image:
        """Return a picture with its original aspect ratio."""
        _, place = self._known.get(key, ("", None))
        if isinstance(place, int):
            return Image.fromarray(self.pixels(key, _SCENE_SIZE).permute(1, 2, 0).numpy())
        if place is not None:
            if not self._inside(place):
                raise UserError(f"{place.name} is no longer in the folder: restart the explorer")
            if place.stat().st_size > MAX_UPLOAD_BYTES:
                raise UserError(f"{place.name} has more than 20 MiB: make it smaller")
            return decode(place.read_bytes(), as_text(place.name))
        upload = self._uploads.get(key)
        if upload is None:
            raise UserError("this picture is not in memory: choose another, or upload it again")
        name, data = upload
        return decode(data, name)

    def pixels(self, key: str, size: int) -> Tensor:
        """Return a picture as model input, uint8 [3, size, size]: scenes are drawn at this size, others squashed."""
        _, place = self._known.get(key, ("", None))
        return SceneImages(size, _SCENES)[place].image if isinstance(place, int) else squash(self.view(key), size)
