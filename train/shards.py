"""WebDataset shards by number: tar archives of images and labels, read at any place in any order.

A shard is an uncompressed tar archive. Its members that follow one another and are alike up to the first dot of
their file's name are one sample: `n01/a.jpg` and `n01/a.cls`. The image is the member called jpg, jpeg, png, webp,
bmp, ppm, tif or tiff behind that dot, the label the number in `cls`, or "label" in `json`. A member called anything
else is left alone, and so is a sample without an image.

timm has a reader of shards, and it is not used: it deals shards out to processes and shuffles what passes by in each,
so which images a step sees depends on how many processes there are, and a run cannot continue at a step without
reading everything before it. Here the headers are read once, to an index of (shard, offset, size, label), and each
image by one `pread`. An epoch's order is then a permutation of all images, as of a folder; shards are not shuffled as
wholes with a window inside them, which would make the order depend on how the data was cut up. The price is one
random read an image: no matter to memory or an SSD, too slow for a spinning disk or a network share, from which
shards should be copied to an SSD first.
"""

import io
import json
import os
import re
import sys
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from crate_fast.errors import UserError

__all__ = ["Archives", "ShardIndex", "find_shards"]

_IMAGE = {"jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff"}
_VERSION = 1
_OPEN_SHARDS = 128  # per process, well below the usual limit of 1,024 files
_HEADER = 512  # bytes of a tar header; a member's last one is right in front of its data


def find_shards(root: Path, split: str, option: str = "--train-split") -> list[Path]:
    """The shards of a split, sorted: <split>*.tar in `root`, or *.tar in its folder <split>.

    What follows the split's name in a file's name is no letter or digit: val does not take validation-000.tar.

    Args:
        root: Folder of the data set.
        split: Name of the split.
        option: That names the split, for messages.

    Raises:
        UserError: There are none.
        UserError: There are both kinds.
    """
    own = re.compile(re.escape(split) + r"(?![A-Za-z0-9]).*\.tar")
    beside = sorted(path for path in root.glob("*.tar") if own.fullmatch(path.name))
    inside = sorted((root / split).glob("*.tar"))
    if beside and inside:
        raise UserError(
            f"{root} holds shards of {split!r} both beside ({beside[0].name}, …) and in {split}/: move one kind away"
        )
    if not beside and not inside:
        present = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else "no such folder"
        raise UserError(
            f"no shards {split}*.tar or {split}/*.tar in {root} (it holds: {present}): pass --data-dir, or {option}"
        )
    return beside or inside


def _label(shard: Path, key: str, suffix: str, content: bytes) -> int:
    """The label in the content of a cls or json member.

    Raises:
        UserError: There is none.
    """
    try:
        label = json.loads(content)["label"] if suffix == "json" else int(content)
        if isinstance(label, int) and not isinstance(label, bool) and label >= 0:
            return label
    except (ValueError, KeyError, TypeError):
        pass
    wanted = '{"label": 3}' if suffix == "json" else "3"
    raise UserError(
        f"{shard}: {key}.{suffix} holds {content[:40]!r}: write an integer from 0 into it, such as {wanted}"
    )


def _samples(shard: Path) -> list[tuple[int, int, int]]:
    """(offset, size, label) of a shard's samples.

    Raises:
        UserError: It is no whole tar archive, or an image has no label.
    """
    found: list[tuple[int, int, int]] = []

    def finish(key: str | None, parts: dict[str, tuple[int, int]]) -> None:
        image = next((parts[suffix] for suffix in parts if suffix in _IMAGE), None)
        if image is None:
            return
        suffix = next((suffix for suffix in ("cls", "json") if suffix in parts), None)
        if suffix is None:
            raise UserError(f"{shard}: the image {key} has no label: put {key}.cls or {key}.json beside it")
        offset, size = parts[suffix]
        found.append((*image, _label(shard, key, suffix, os.pread(file.fileno(), size, offset))))

    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            key, parts = None, {}
            for member in archive:
                archive.members = []  # which would else hold every header
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isreg() or not stem or not dot:
                    continue
                if (folder, stem) != key:
                    finish(key and "/".join(filter(None, key)), parts)
                    key, parts = (folder, stem), {}
                parts[suffix.lower()] = (member.offset_data, member.size)
            finish(key and "/".join(filter(None, key)), parts)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{shard} is no whole, uncompressed tar archive ({error}): copy it again, or unpack its compression"
        ) from error
    return found


def _class_names(root: Path) -> tuple[str, ...] | None:
    """From classes.txt, a name a line, or the list "classes" of _info.json; None where there is neither."""
    if (root / "classes.txt").exists():
        return tuple((root / "classes.txt").read_text().splitlines())
    if (root / "_info.json").exists():
        names = json.loads((root / "_info.json").read_text()).get("classes")
        return None if names is None else tuple(map(str, names))
    return None


class Archives:
    """Files read at any place, kept open: so many of them that a process may open, the longest unused closed first.

    Forked processes may share the descriptors, for `pread` leaves their position alone; spawned ones open their own.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "_open": OrderedDict()}

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes of file `number` from `offset` on.

        Raises:
            OSError: It is gone, or ends before.
        """
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) >= _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(self.paths[number], os.O_RDONLY)
        content = os.pread(self._open[number], size, offset)
        if len(content) < size:
            raise OSError(f"the archive ends {size - len(content)} bytes early")
        return content


class ShardIndex:
    """Samples of shards by number, in the order of the shards and of their members.

    The index is kept beside the shards, in `.<first shard's name>.index.npz`, and made anew when a shard's name, size
    or time of change differs; where that folder cannot be written it is kept in memory. Which, is said on stderr.

    Args:
        shards: Paths, in one folder.
        root: Folder with the class names: a name a line in classes.txt, or the list "classes" in _info.json.

    Attributes:
        classes: Names of the classes, or None.
        n_labels: Labels are below this.

    Raises:
        UserError: A shard is damaged or compressed, an image has no label, there are no images, or fewer class names
            than labels.
    """

    def __init__(self, shards: Sequence[Path], root: Path):
        self.shards = [Path(shard) for shard in shards]
        self.archives = Archives(self.shards)
        folder = self.shards[0].parent
        # int64 [n, 4]: shard, offset, size, label
        self.samples = self._load(folder / f".{self.shards[0].stem}.index.npz")
        if not len(self.samples):
            raise UserError(f"{folder}: the {len(self.shards)} shards from {self.shards[0].name} hold no images")
        self.n_labels = int(self.samples[:, 3].max()) + 1
        self.classes = _class_names(root)
        if self.classes is not None and len(self.classes) < self.n_labels:
            raise UserError(
                f"{root} has {len(self.classes)} class names and a label {self.n_labels - 1}: complete classes.txt"
            )

    def _load(self, cache: Path) -> np.ndarray:
        """The samples from the cache, or from the shards' headers if it is absent, damaged or out of date."""
        stats = [shard.stat() for shard in self.shards]
        state = np.array([[stat.st_size, stat.st_mtime_ns] for stat in stats], np.int64)
        names = np.array([shard.name for shard in self.shards])
        try:
            with np.load(cache, allow_pickle=False) as kept:
                same = [kept["version"] == _VERSION, np.array_equal(kept["names"], names)]
                if all(same) and np.array_equal(kept["state"], state):
                    return kept["samples"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
        began = time.perf_counter()
        rows = [(number, *sample) for number, shard in enumerate(self.shards) for sample in _samples(shard)]
        samples = np.array(rows, np.int64).reshape(-1, 4)
        where = str(cache)
        partial = cache.with_name(f"{cache.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                np.savez(file, version=_VERSION, names=names, state=state, samples=samples)
            os.replace(partial, cache)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            where = f"memory only ({error})"
        took = f"in {time.perf_counter() - began:.1f} s"
        print(f"indexed {len(samples)} images of {len(self.shards)} shards {took}; kept in {where}", file=sys.stderr)
        return samples

    def __len__(self) -> int:
        return len(self.samples)

    def open(self, index: int) -> tuple[io.BytesIO, int]:
        """The file of image `index`, not decoded, and its label.

        Raises:
            OSError: The shard is gone, or shorter than when it was indexed.
        """
        shard, offset, size, label = self.samples[index].tolist()
        return io.BytesIO(self.archives.read(shard, offset, size)), label

    def name(self, index: int) -> str:
        """ "shard/member" of image `index`, from the header in front of it (which cuts names of over 100 bytes)."""
        shard, offset, _, _ = self.samples[index].tolist()
        try:
            header = self.archives.read(shard, offset - _HEADER, _HEADER)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            member = f"byte {offset}"
        return f"{self.shards[shard]}/{member}"
