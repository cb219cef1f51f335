"""Random access to images in tar archives: WebDataset shards, or archives of class folders.

Adjacent members with the same name up to the first dot form a sample, such as `n01/a.jpg` and `n01/a.cls`. The label
is the number in `cls`, or "label" in `json`. The headers are read once into an index of (archive, offset, size,
label); each image is then a single read. Unlike with sequential readers, an epoch is a permutation of all images, and
a run resumes at any step. Hard disks and network shares are too slow: copy shards to an SSD first.
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
from crate_fast.train.data.image_files import (
    EXTENSIONS,
    ImageTree,
    is_hidden,
    is_image,
    looks_like_image,
    print_once,
)
from crate_fast.train.data.sources import MOST_CLASSES, Source

_VERSION = 7  # of the cached index; increase it when EXTENSIONS or the list of members changes
_FIRST_DOT = "WebDataset ends a sample's name at its first dot: use names without other dots, such as a_1.jpg"
_PADDING = 16 * 2**20  # largest padding of an archive in bytes; tar writes up to 10 KiB of zeros
_HEADER = 512  # bytes of a tar header; the last header of a member directly precedes its data


def find_shards(root: Path, split: str, option: str = "--train-split", other: str = "") -> list[Path]:
    """Return the sorted shards of a split: <split>*.tar in `root`, or *.tar in its folder <split>.

    After the split's name a file name has no letter or digit: validation-000.tar is not a shard of val. Shards of the
    `other` split, such as val-small, are left out. `option` is the option of the split, for messages.
    """
    own, others = (re.compile(re.escape(name) + r"(?![A-Za-z0-9]).*\.tar") for name in (split, other))
    beside = [path for path in sorted(root.glob("*.tar")) if own.fullmatch(path.name)]
    if other.startswith(split) and other != split:
        beside = [path for path in beside if not others.fullmatch(path.name)]
    inside = sorted(path for path in (root / split).glob("*.tar") if not is_hidden(path.name))
    if beside and inside:
        raise UserError(
            f"{root} holds shards of {split!r} both at its top ({beside[0].name}, …) and in {split}/: move one away"
        )
    if not beside and not inside:
        present = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else "no such folder"
        raise UserError(
            f"no shards {split}*.tar or {split}/*.tar in {root} (it holds: {present}): pass --data-dir, or {option}"
        )
    return beside or inside


# --- the members of an archive


def _members(archive: Path, nested: bool = False) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Return (name, offset, size) of an archive's members, and the paths of broken links.

    Hidden files are left out. Folder names end in a slash. A link has the offset and size of its target. With
    `nested`, an inner archive counts as a folder with its name, without .tar.
    """
    try:
        with archive.open("rb") as file:
            found = list(_headers(file, 0, "", nested))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{archive} is not a complete, uncompressed tar archive ({error}): copy it again, or decompress it"
        ) from error
    except OSError as error:
        raise UserError(f"{archive} cannot be read ({error}): make it readable, or copy it again") from error
    places = {name: place for name, *place, target in found if target is None}
    links = {name: target for name, *_, target in found if target is not None}
    resolved = {name: places[to] for name, to in links.items() if to in places}
    while resolved:  # a link may lead to another link
        places |= resolved
        resolved = {name: places[to] for name, to in links.items() if name not in places and to in places}
    members = [(name, *(places[name] if name in links else place)) for name, *place, _ in found if name in places]
    return members, [f"{archive}/{name}" for name in links if name not in places]


def _headers(file: BinaryIO, start: int, prefix: str, nested: bool) -> Iterator[tuple[str, int, int, str | None]]:
    """Yield (name, offset, size, None) of files and folders, and (name, 0, 0, target) of links."""
    with tarfile.open(fileobj=file, mode="r:") as opened:
        for member in opened:
            opened.members = []  # tarfile would keep every header in memory
            name, offset = _plain(member.name), start + member.offset_data
            if not name or is_hidden(name):  # an empty name is the folder itself, from `tar -C folder .`
                continue
            name = prefix + name
            if member.issparse():
                raise tarfile.ReadError(f"{name} is a sparse file, written by tar --sparse")
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
    """Refuse an archive with data after its end: `tarfile` takes a damaged header for the end."""
    file.seek(end)
    rest = file.read(_PADDING + 1)
    if len(rest) < _HEADER:
        raise tarfile.ReadError(f"it ends at byte {end} without an end mark")
    if len(rest) > _PADDING or rest.strip(b"\0"):
        raise tarfile.ReadError(f"byte {end} starts neither a member nor the end: damaged, or joined by cat")


def _about_links(links: list[str]) -> list[str]:
    if not links:
        return []
    return [f"{len(links)} broken links are ignored, such as {links[0]}: archive their targets (tar --dereference)"]


# --- their images


class ArchiveSource(Source):
    """Images of tar archives in one folder, with an index cached there in the hidden file `cache_name`.

    The index is replaced when an archive's name, size or modification time changes. If the folder is read-only, the
    index stays in memory. `items` is int64 [n, 4]: archive, offset, size, label.
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
        print_once(remarks)

    @abstractmethod
    def _scan(self) -> tuple[list[tuple[int, int, int, int]], list[str], Sequence[str]]:
        """Return the rows of `items`, remarks to print, and the class names if the archives have them."""

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
        print(f"indexed {len(rows)} images of {len(files)} shards {took}; cached in {where}", file=sys.stderr)
        return index

    def _read(self, number: int, offset: int, size: int) -> bytes:
        with self.paths[number].open("rb") as archive:
            archive.seek(offset)
            content = archive.read(size)
        if len(content) < size:
            raise OSError(f"the archive ends {size - len(content)} bytes early")
        return content

    def open(self, index: int) -> tuple[io.BytesIO, int]:
        number, offset, size, label = self.items[index].tolist()
        return io.BytesIO(self._read(number, offset, size)), label

    def name(self, index: int) -> str:
        """Return "archive/member" of an image; the header truncates names above 100 bytes."""
        number, offset, _, _ = self.items[index].tolist()
        try:
            header = self._read(number, offset - _HEADER, _HEADER)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            member = f"byte {offset}"
        return f"{self.paths[number]}/{member}"


class TarSource(ArchiveSource):
    """Images of one tar archive, in the order and with the classes of the unpacked folder.

    The archive holds the class folders, or one folder with the archive's name that holds them. Inner archives count
    as folders.
    """

    def __init__(self, path: Path):
        super().__init__([path], f".{path.stem}.folders.npz")

    def _scan(self):
        path = self.paths[0]
        members, links = _members(path, nested=True)
        places = {name: place for name, *place in members}  # of two with the same name, the later
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
    """Samples of WebDataset shards in one folder, in the order of the shards and of their members.

    `root` may hold the class names in classes.txt, one per line.
    """

    def __init__(self, shards: Sequence[Path], root: Path):
        super().__init__(shards, f".{Path(shards[0]).stem}.index.npz")
        self.classes = _class_names(root)
        if self.classes is not None and len(self.classes) < self.n_labels:
            names, label = len(self.classes), self.n_labels - 1
            raise UserError(f"{root} has {names} class names, but a label is {label}: complete classes.txt")

    def _scan(self):
        rows, ignored, links = [], [], []
        for number, path in enumerate(self.paths):
            members, dangling = _members(path)
            links += dangling
            for key, parts in _samples(path, members):
                images = [suffix for suffix in parts if f".{suffix}" in EXTENSIONS]
                if len(images) > 1:
                    raise UserError(
                        f"{path}: {key} has {len(images)} images, {key}.{f' and {key}.'.join(images)}: give all but "
                        f"one a second suffix, such as {key}.mask.{images[-1]}"
                    )
                if not images:
                    ignored += [(f"{path}: {key}", end) for end in parts if looks_like_image(f"_.{end}")]
                    continue
                suffix = next((suffix for suffix in ("cls", "json") if suffix in parts), None)
                if suffix is None:
                    raise UserError(f"{path}: the image {key} has no label: put {key}.cls or {key}.json next to it")
                label = _label(f"{path}: {key}", suffix, self._read(number, *parts[suffix]))
                rows.append((number, *parts[images[0]], label))
        remarks = _about_links(links)
        if ignored:
            where, suffix = ignored[0]
            why = _FIRST_DOT if "." in suffix else f"supported: {' '.join(EXTENSIONS)}"
            remarks.append(f"{len(ignored)} image files are ignored, such as {where}.{suffix} ({why})")
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
                raise UserError(f"{shard}: {name} occurs twice in a sample: give each sample its own name")
            parts[suffix] = place
        yield key, parts


def _label(where: str, suffix: str, content: bytes) -> int:
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        label = json.loads(content)["label"] if suffix == "json" else int(content)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MOST_CLASSES:
            return label
    wanted = '{"label": 3}' if suffix == "json" else "3"
    raise UserError(
        f"{where}.{suffix} holds {content[:40]!r}: write an integer from 0 to {MOST_CLASSES - 1:,}, such as {wanted}"
    )


def _class_names(root: Path) -> tuple[str, ...] | None:
    file = root / "classes.txt"
    if not file.exists():
        return None
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as class names ({error}): correct or remove it") from error
    names = tuple(line.strip() for line in lines)
    if "" in names:
        raise UserError(f"{file}: the name of class {names.index('')} is empty: write it, or remove its line")
    return names
