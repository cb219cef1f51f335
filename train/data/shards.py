"""Tar archives of images, WebDataset shards or class folders, with random access.

Neighbouring members whose file names are alike up to the first dot are one sample: `n01/a.jpg` and `n01/a.cls`. The
label is the number in `cls`, or "label" in `json`. The headers are read once, into an index of (archive, offset,
size, label); each image is then one read. So an epoch's order is a permutation of all images, and a run resumes at
any step, unlike with readers of whole shards. A spinning disk or network share is too slow: copy shards to an SSD
first.
"""

import io
import itertools
import json
import os
import posixpath
import re
import sys
import tarfile
import time
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from crate_fast.errors import UserError
from crate_fast.train.data.image_files import EXTENSIONS, ImageTree, is_hidden, is_image, looks_like_image
from crate_fast.train.data.sources import MOST_CLASSES, Source

_VERSION = 5  # of a cached index; EXTENSIONS that change need another
_FIRST_DOT = "WebDataset ends the name of a sample at its first dot: write it without others, as in a_1.jpg"
_PADDING = 16 * 2**20  # bytes at most behind the end of an archive; tar writes up to 10 KiB of zeros
_HEADER = 512  # bytes of a tar header; a member's last one is right in front of its data


def find_shards(root: Path, split: str, option: str = "--train-split", other: str = "") -> list[Path]:
    """Return the shards of a split, sorted: <split>*.tar in `root`, or *.tar in its folder <split>.

    No letter or digit follows the split's name in a file's name: validation-000.tar is no shard of val. Those of the
    `other` split, such as val-small, are left out. `option` names the split, for messages.
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


# --- the members of an archive


def _members(archive: Path, nested: bool = False) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Return (name, offset, size) of an archive's files, and the links that lead to none of them.

    Hidden files are left out. The name of a folder ends in a slash. A link has the offset and size of its file. With
    `nested` an archive in the archive counts as a folder of its name, without .tar.
    """
    try:
        with archive.open("rb") as file:
            found = list(_headers(file, 0, "", nested))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{archive} is no whole, uncompressed tar archive ({error}): copy it again, or unpack its compression"
        ) from error
    except OSError as error:
        raise UserError(f"{archive} cannot be used ({error}): make it readable, or copy it again") from error
    places = {name: place for name, *place, target in found if target is None}
    links = {name: target for name, *_, target in found if target is not None}
    places.update((name, places[target]) for name, target in links.items() if target in places)
    members = [(name, *(places[name] if name in links else place)) for name, *place, _ in found if name in places]
    return members, [f"{archive}/{name}" for name in links if name not in places]


def _headers(file: BinaryIO, start: int, prefix: str, nested: bool) -> Iterator[tuple[str, int, int, str | None]]:
    """Yield (name, offset, size, None) of files and folders, and (name, 0, 0, name of its file) of links."""
    with tarfile.open(fileobj=file, mode="r:") as opened:
        for member in opened:
            opened.members = []  # tarfile would keep every header
            name, offset = _plain(member.name), start + member.offset_data
            if not name or is_hidden(name):  # no name: the folder itself, of `tar -C folder .`
                continue
            name = prefix + name
            if member.issparse():
                raise tarfile.ReadError(f"{name} has holes, written by tar --sparse")
            if member.isdir():
                yield f"{name}/", offset, 0, None
            elif member.isreg() and nested and name.lower().endswith(".tar"):
                with opened.extractfile(member) as inner:
                    yield from _headers(inner, offset, f"{name[:-4]}/", nested)
            elif member.isreg():
                yield name, offset, member.size, None
            elif member.islnk():
                yield name, 0, 0, prefix + _plain(member.linkname)
            elif member.issym():
                yield name, 0, 0, posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        _check_end(file, opened.offset)


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _check_end(file: BinaryIO, end: int) -> None:
    """Refuse an archive with more behind the last header: `tarfile` takes a damaged header for the end."""
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


# --- their images


class ArchiveSource(Source):
    """The images of tar archives in one folder, through an index cached in the hidden file `cache_name` there.

    A cached index is replaced when an archive's name, size or modification time differs. Where the folder is
    read-only, it stays in memory. `items` is int64 [n, 4]: archive, offset, size, label.
    """

    def __init__(self, paths: Sequence[Path], cache_name: str):
        self.paths = [Path(path) for path in paths]
        index = self._load(self.paths[0].parent / cache_name)
        self.items, remarks = index["samples"], index["remarks"].tolist()
        self.classes = tuple(index["classes"].tolist()) or None
        if not len(self.items):
            first, reason = self.paths[0], f": {remarks[0]}" if remarks else ""
            raise UserError(f"{first.parent}: the {len(self.paths)} shards from {first.name} hold no images{reason}")
        self.n_labels = int(self.items[:, 3].max()) + 1
        for remark in remarks:
            print(remark, file=sys.stderr)

    @abstractmethod
    def _scan(self) -> tuple[list[tuple[int, int, int, int]], list[str], Sequence[str]]:
        """Return the rows of `items`, remarks to print, and the names of the classes if members have them."""

    def _load(self, cache: Path) -> dict[str, np.ndarray]:
        try:
            files = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in self.paths]
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}): copy it again") from error
        state = np.array([f"version {_VERSION}", *files])
        damage = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with suppress(*damage), np.load(cache, allow_pickle=False) as cached:
            if np.array_equal(cached["state"], state):
                return dict(cached)
        began = time.perf_counter()
        rows, remarks, classes = self._scan()
        index = {"samples": np.array(rows, np.int64).reshape(-1, 4)}
        index |= {"remarks": np.array(remarks, str), "classes": np.array(classes, str)}
        where = str(cache)
        partial = cache.with_name(f"{cache.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                np.savez(file, state=state, **index)
            os.replace(partial, cache)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            where = f"memory only ({error})"
        took = f"in {time.perf_counter() - began:.1f} s"
        print(f"indexed {len(rows)} images of {len(files)} shards {took}; kept in {where}", file=sys.stderr)
        return index

    def _read(self, number: int, offset: int, size: int) -> bytes:
        with self.paths[number].open("rb", buffering=0) as archive:
            archive.seek(offset)
            content = archive.read(size)
        if len(content) < size:
            raise OSError(f"the archive ends {size - len(content)} bytes early")
        return content

    def open(self, index: int) -> tuple[io.BytesIO, int]:
        number, offset, size, label = self.items[index].tolist()
        return io.BytesIO(self._read(number, offset, size)), label

    def name(self, index: int) -> str:
        """Return "archive/member" of an image, from its header, which cuts names of over 100 bytes."""
        number, offset, _, _ = self.items[index].tolist()
        try:
            header = self._read(number, offset - _HEADER, _HEADER)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            member = f"byte {offset}"
        return f"{self.paths[number]}/{member}"


class TarSource(ArchiveSource):
    """The images of one tar archive, in the order and of the classes that the unpacked folder would have.

    The archive holds the class folders, or one folder with the archive's name that holds them. Archives in it count
    as folders.
    """

    def __init__(self, path: Path):
        super().__init__([path], f".{path.stem}.folders.npz")

    def _scan(self):
        path = self.paths[0]
        members, links = _members(path, nested=True)
        places = {name: place for name, *place in members}  # the later of two with one name
        top, images = f"{path.stem}/", [name for name in places if is_image(name)]
        if images and all(name.startswith(top) for name in images):
            places = {name.removeprefix(top): place for name, place in places.items() if name.startswith(top)}
        folders = {name.partition("/")[0] for name in places if "/" in name}
        tree = ImageTree((name for name in places if not name.endswith("/")), folders)
        classes, labels = tree.labelled(str(path))
        rows = [(0, *places[name], label) for name, label in zip(tree.names, labels.tolist(), strict=True)]
        remarks = _about_links(links) + [f"{path}: {remark}" for remark in tree.remarks()]
        return rows, remarks, classes


class ShardSource(ArchiveSource):
    """The samples of WebDataset shards in one folder, in the order of the shards and of their members.

    `root` may hold the class names: a name a line in classes.txt.
    """

    def __init__(self, shards: Sequence[Path], root: Path):
        super().__init__(shards, f".{Path(shards[0]).stem}.index.npz")
        self.classes = _class_names(root)
        if self.classes is not None and len(self.classes) < self.n_labels:
            names, label = len(self.classes), self.n_labels - 1
            raise UserError(f"{root} has {names} class names and a label {label}: complete classes.txt")

    def _scan(self):
        rows, passed_over, links = [], [], []
        for number, path in enumerate(self.paths):
            members, dangling = _members(path)
            links += dangling
            for key, parts in _samples(path, members):
                image = next((place for suffix, place in parts.items() if f".{suffix}" in EXTENSIONS), None)
                if image is None:
                    passed_over += [(f"{path}: {key}", end) for end in parts if looks_like_image(f"_.{end}")]
                    continue
                suffix = next((suffix for suffix in ("cls", "json") if suffix in parts), None)
                if suffix is None:
                    raise UserError(f"{path}: the image {key} has no label: put {key}.cls or {key}.json beside it")
                label = _label(f"{path}: {key}", suffix, self._read(number, *parts[suffix]))
                rows.append((number, *image, label))
        remarks = _about_links(links)
        if passed_over:
            where, suffix = passed_over[0]
            why = _FIRST_DOT if "." in suffix else f"images are {' '.join(EXTENSIONS)}"
            remarks.append(f"{len(passed_over)} image files are passed over, such as {where}.{suffix} ({why})")
        return rows, remarks, ()


def _samples(shard: Path, members: list[tuple[str, int, int]]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    files = []
    for name, *place in members:
        folder, slash, file = name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        if dot:
            files.append((folder + slash + stem, suffix.lower(), tuple(place), name))
    for key, group in itertools.groupby(files, key=lambda file: file[0]):
        parts = {}
        for _, suffix, place, name in group:
            if suffix in parts:
                raise UserError(f"{shard}: {name} is there twice in a sample: give each sample its own name")
            parts[suffix] = place
        yield key, parts


def _label(where: str, suffix: str, content: bytes) -> int:
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        label = json.loads(content)["label"] if suffix == "json" else int(content)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MOST_CLASSES:
            return label
    wanted = '{"label": 3}' if suffix == "json" else "3"
    raise UserError(
        f"{where}.{suffix} holds {content[:40]!r}: write an integer from 0, below {MOST_CLASSES:,}, into it, such as "
        f"{wanted}"
    )


def _class_names(root: Path) -> tuple[str, ...] | None:
    file = root / "classes.txt"
    if not file.exists():
        return None
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} does not hold the names of the classes ({error}): correct or remove it") from error
    names = tuple(line.strip() for line in lines)
    if "" in names:
        raise UserError(f"{file}: the name of class {names.index('')} is empty: write it, or remove its line")
    return names
