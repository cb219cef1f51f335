"""Tar archives of images, WebDataset shards or class folders, read at any place in any order.

A shard is an uncompressed tar archive. Its members that follow one another and are alike up to the first dot of
their file's name are one sample: `n01/a.jpg` and `n01/a.cls`. The image is the member with one of `EXTENSIONS` behind
that dot, the label the number in `cls`, or "label" in `json`. Other members are left alone, as is a sample without an
image; image files among those are counted. A `FolderArchive` holds class folders instead of samples.

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
import posixpath
import re
import sys
import tarfile
import time
import zipfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from crate_fast.errors import UserError
from crate_fast.train.data.image_files import EXTENSIONS, ImageTree, is_hidden, is_image, looks_like_image

__all__ = ["MOST_CLASSES", "Archives", "FolderArchive", "ShardIndex", "TarIndex", "find_shards"]

MOST_CLASSES = 10_000_000  # a label above is a fault of the data, and a head of so many classes fits no memory
_VERSION = 3  # of a kept index: another one for other EXTENSIONS
_OPEN_SHARDS = 128  # per process, well below the usual limit of 1,024 files
_FIRST_DOT = "WebDataset ends the name of a sample at its first dot: write it without others, as in a_1.jpg"
_PADDING = 16 * 2**20  # bytes at most behind the end of an archive; tar writes up to 10 KiB of zeros
_HEADER = 512  # bytes of a tar header; a member's last one is right in front of its data


def find_shards(root: Path, split: str, option: str = "--train-split", other: str = "") -> list[Path]:
    """The shards of a split, sorted: <split>*.tar in `root`, or *.tar in its folder <split>.

    What follows the split's name in a file's name is no letter or digit: val does not take validation-000.tar.

    Args:
        root: Folder of the data set.
        split: Name of the split.
        option: That names the split, for messages.
        other: Another split, whose shards are not taken where its name begins with this one's, as val-small with val.

    Raises:
        UserError: There are none.
        UserError: There are both kinds.
    """
    own, others = (re.compile(re.escape(name) + r"(?![A-Za-z0-9]).*\.tar") for name in (split, other))
    beside = [path for path in sorted(root.glob("*.tar")) if own.fullmatch(path.name)]
    if other.startswith(split) and other != split:
        beside = [path for path in beside if not others.fullmatch(path.name)]
    inside = sorted(path for path in (root / split).glob("*.tar") if not is_hidden(path.name))
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


def _label(where: str, suffix: str, content: bytes) -> int:
    """Return the label in the content of a cls or json member.

    Raises:
        UserError: There is none.
    """
    try:
        label = json.loads(content)["label"] if suffix == "json" else int(content)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MOST_CLASSES:
            return label
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    wanted = '{"label": 3}' if suffix == "json" else "3"
    raise UserError(
        f"{where}.{suffix} holds {content[:40]!r}: write an integer from 0, below {MOST_CLASSES:,}, into it, such as "
        f"{wanted}"
    )


def _members(archive: Path, nested: bool = False) -> Iterator[tuple[str, int | str, int]]:
    """Yield (name, offset, size) of an archive's files, hidden ones left out; a folder's name ends in a slash.

    Of a link, which has no content, it yields (name, name of the file, 0).

    Args:
        archive: Its path.
        nested: Whether an archive in the archive counts as a folder of its name, without .tar.

    Raises:
        UserError: It is no whole tar archive, or cannot be read.
    """
    try:
        with archive.open("rb") as file:
            yield from _members_of(file, 0, "", nested)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{archive} is no whole, uncompressed tar archive ({error}): copy it again, or unpack its compression"
        ) from error
    except OSError as error:
        raise UserError(f"{archive} cannot be used ({error}): make it readable, or copy it again") from error


def _members_of(file: BinaryIO, start: int, prefix: str, nested: bool) -> Iterator[tuple[str, int | str, int]]:
    with tarfile.open(fileobj=file, mode="r:") as opened:
        for member in opened:
            opened.members = []  # which would else hold every header
            name = prefix + _plain(member.name)
            if is_hidden(name):
                continue
            if member.issparse():
                raise tarfile.ReadError(f"{name} has holes, written by tar --sparse")
            if member.isdir():
                yield name + "/", start, 0
            elif member.isreg() and nested and name.lower().endswith(".tar"):
                with opened.extractfile(member) as inner:
                    yield from _members_of(inner, start + member.offset_data, f"{name[:-4]}/", nested)
            elif member.isreg():
                yield name, start + member.offset_data, member.size
            elif member.islnk():
                yield name, prefix + _plain(member.linkname), 0
            elif member.issym():
                yield name, posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname)), 0
        _check_end(file, opened.offset)


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _check_end(file: BinaryIO, end: int) -> None:
    """Refuse an archive whose headers do not stop at its end, for `tarfile` takes a damaged one for the end.

    Raises:
        tarfile.ReadError: There is more behind the last header that it has read, or the mark of the end is missing.
    """
    file.seek(end)
    rest = file.read(_PADDING + 1)
    if len(rest) < _HEADER:
        raise tarfile.ReadError(f"it ends at byte {end} without a mark of its end")
    if len(rest) > _PADDING or rest.strip(b"\0"):
        raise tarfile.ReadError(f"at byte {end} is neither a member nor its end: damage, or archives joined by cat")


def _about_links(links: list[str]) -> list[str]:
    if not links:
        return []
    return [f"{len(links)} links are passed over, such as {links[0]}: archive what they lead to (tar --dereference)"]


def _class_names(root: Path) -> tuple[str, ...] | None:
    """Return the names in classes.txt, one a line, or in the list "classes" of _info.json; None without either.

    Raises:
        UserError: The file cannot be understood, or a name is empty.
    """
    file = next((root / name for name in ("classes.txt", "_info.json") if (root / name).exists()), None)
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = text.rstrip().split("\n") if file.suffix == ".txt" else json.loads(text).get("classes")
        if names is not None and not isinstance(names, list):
            raise ValueError('"classes" is no list')
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} does not hold the names of the classes ({error}): correct or remove it") from error
    if names is None:
        return None
    names = tuple(str(name).strip() for name in names)
    if "" in names:
        raise UserError(f"{file}: the name of class {names.index('')} is empty: write it, or remove its line")
    return names


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


class TarIndex(ABC):
    """Images in tar archives by number.

    The index is kept beside the archives, in a hidden file, and made anew when an archive's name, size or time of
    change differs; where that folder cannot be written it is kept in memory. Which, is said on stderr.

    Args:
        paths: Of the archives, in one folder.
        kept: Name of the file that keeps the index.

    Attributes:
        archives: What reads them.
        samples: int64 [n, 4]: archive, offset, size, label.
        classes: Names of the classes, or None.
        n_labels: Labels are below this.

    Raises:
        UserError: An archive is damaged or compressed.
    """

    classes: tuple[str, ...] | None
    n_labels: int

    def __init__(self, paths: Sequence[Path], kept: str):
        self.paths = [Path(path) for path in paths]
        self.archives = Archives(self.paths)
        contents = self._load(self.paths[0].parent / kept)
        self.samples = contents["samples"]
        self._remarks: list[str] = contents["remarks"].tolist()
        self._take(contents)
        for remark in self._remarks:
            print(remark, file=sys.stderr)

    @abstractmethod
    def _scan(self) -> dict[str, np.ndarray]:
        """Return what the headers say: at least "samples", and "remarks" about what they lack."""

    @abstractmethod
    def _take(self, contents: dict[str, np.ndarray]) -> None:
        """Set the classes from what `_scan` has returned, this time or an earlier one."""

    def _load(self, cache: Path) -> dict[str, np.ndarray]:
        """Return what the cache holds, or `_scan` finds if it is absent, damaged or out of date."""
        try:
            stats = [path.stat() for path in self.paths]
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}): copy it again") from error
        state = np.array([[stat.st_size, stat.st_mtime_ns] for stat in stats], np.int64)
        names = np.array([path.name for path in self.paths])
        try:
            with np.load(cache, allow_pickle=False) as kept:
                same = [kept["version"] == _VERSION, np.array_equal(kept["names"], names)]
                if all(same) and np.array_equal(kept["state"], state):
                    return dict(kept)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
        began = time.perf_counter()
        contents = self._scan()
        where = str(cache)
        partial = cache.with_name(f"{cache.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                np.savez(file, version=_VERSION, names=names, state=state, **contents)
            os.replace(partial, cache)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            where = f"memory only ({error})"
        count, took = len(contents["samples"]), f"in {time.perf_counter() - began:.1f} s"
        print(f"indexed {count} images of {len(names)} shards {took}; kept in {where}", file=sys.stderr)
        return contents

    def __len__(self) -> int:
        return len(self.samples)

    def open(self, index: int) -> tuple[io.BytesIO, int]:
        """Return the file of image `index`, not decoded, and its label.

        Raises:
            OSError: The archive is gone, or shorter than when it was indexed.
        """
        number, offset, size, label = self.samples[index].tolist()
        return io.BytesIO(self.archives.read(number, offset, size)), label

    def name(self, index: int) -> str:
        """Return "archive/member" of image `index`, from its header, which cuts names of over 100 bytes."""
        number, offset, _, _ = self.samples[index].tolist()
        try:
            header = self.archives.read(number, offset - _HEADER, _HEADER)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            member = f"byte {offset}"
        return f"{self.paths[number]}/{member}"


class ShardIndex(TarIndex):
    """Samples of WebDataset shards by number, in the order of the shards and of their members.

    Args:
        shards: Paths, in one folder.
        root: Folder with the class names: a name a line in classes.txt, or the list "classes" in _info.json.

    Raises:
        UserError: A shard is damaged or compressed, an image has no label, there are no images, a class has no name,
            or there are fewer class names than labels.
    """

    def __init__(self, shards: Sequence[Path], root: Path):
        self.root = root
        super().__init__(shards, f".{Path(shards[0]).stem}.index.npz")

    def _scan(self) -> dict[str, np.ndarray]:
        rows, passed_over, links = [], [], []
        for number in range(len(self.paths)):
            self._scan_shard(number, rows, passed_over, links)
        remarks = _about_links(links)
        if passed_over:
            where, suffix = passed_over[0]
            why = _FIRST_DOT if "." in suffix else f"images are {' '.join(EXTENSIONS)}"
            remarks.append(f"{len(passed_over)} image files are passed over, such as {where}.{suffix} ({why})")
        return {"samples": np.array(rows, np.int64).reshape(-1, 4), "remarks": np.array(remarks, str)}

    def _scan_shard(
        self,
        number: int,
        rows: list[tuple[int, int, int, int]],
        passed_over: list[tuple[str, str]],
        links: list[str],
    ) -> None:
        """Add the samples of a shard to `rows`; image files in none of them to `passed_over`, or to `links`.

        A link to a member that comes before it has its content.
        """

        def finish(key: str, parts: dict[str, tuple[int, int]]) -> None:
            where = f"{self.paths[number]}: {key}"
            image = next((parts[suffix] for suffix in parts if f".{suffix}" in EXTENSIONS), None)
            if image is None:
                passed_over.extend((where, suffix) for suffix in parts if looks_like_image(f"_.{suffix}"))
                return
            suffix = next((suffix for suffix in ("cls", "json") if suffix in parts), None)
            if suffix is None:
                raise UserError(
                    f"{self.paths[number]}: the image {key} has no label: put {key}.cls or {key}.json beside it"
                )
            rows.append((number, *image, _label(where, suffix, self.archives.read(number, *parts[suffix]))))

        key, parts, places = "", {}, {}
        for name, *place in _members(self.paths[number]):
            place = places.get(place[0], place)
            if isinstance(place[0], str):
                links.append(f"{self.paths[number]}/{name}")
                continue
            places[name] = place
            folder, slash, file = name.rpartition("/")
            stem, dot, suffix = file.partition(".")
            if not dot:
                continue
            if folder + slash + stem != key:
                finish(key, parts)
                key, parts = folder + slash + stem, {}
            if suffix.lower() in parts:
                raise UserError(
                    f"{self.paths[number]}: {name} is there twice in a sample: give each sample its own name"
                )
            parts[suffix.lower()] = tuple(place)
        finish(key, parts)

    def _take(self, contents: dict[str, np.ndarray]) -> None:
        if not len(self.samples):
            first = self.paths[0]
            more = f": {self._remarks[0]}" if self._remarks else ""
            raise UserError(f"{first.parent}: the {len(self.paths)} shards from {first.name} hold no images{more}")
        self.n_labels = int(self.samples[:, 3].max()) + 1
        self.classes = _class_names(self.root)
        if self.classes is not None and len(self.classes) < self.n_labels:
            names, label = len(self.classes), self.n_labels - 1
            raise UserError(f"{self.root} has {names} class names and a label {label}: complete classes.txt")


class FolderArchive(TarIndex):
    """Images of one tar archive by number, in the order and of the classes that the unpacked folder would have.

    The archive holds the class folders, or one folder with the archive's name that holds them. Archives in it count
    as folders.

    Args:
        path: Of the archive.

    Raises:
        UserError: See `TarIndex` and `ImageTree.labelled`.
    """

    def __init__(self, path: Path):
        super().__init__([path], f".{path.stem}.folders.npz")

    def _scan(self) -> dict[str, np.ndarray]:
        path = self.paths[0]
        places = {name: place for name, *place in _members(path, nested=True)}  # of two of a name, the later
        links = {name: place[0] for name, place in places.items() if isinstance(place[0], str)}
        places |= {name: places[target] for name, target in links.items() if target in places}
        lost = [name for name in links if isinstance(places[name][0], str)]
        places = {name: place for name, place in places.items() if isinstance(place[0], int)}
        top, images = f"{path.stem}/", [name for name in places if is_image(name)]
        if images and all(name.startswith(top) for name in images):
            places = {name.removeprefix(top): place for name, place in places.items() if name.startswith(top)}
        folders = {name.partition("/")[0] for name in places if "/" in name}
        tree = ImageTree.of((name for name in places if not name.endswith("/")), folders)
        classes, labels = tree.labelled(str(path))
        rows = [(0, *places[name], label) for name, label in zip(tree.names, labels.tolist(), strict=True)]
        remarks = _about_links([f"{path}/{name}" for name in lost])
        remarks += [f"{path}: {remark}" for remark in tree.remarks()]
        return {"samples": np.array(rows, np.int64), "classes": np.array(classes), "remarks": np.array(remarks, str)}

    def _take(self, contents: dict[str, np.ndarray]) -> None:
        self.classes = tuple(contents["classes"].tolist())
        self.n_labels = len(self.classes)
