"""WebDataset shards: read as webdataset writes and reads them, whatever lies in between; damage is named."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import build_splits, eval_loader, train_loader
from crate_fast.train.data.image_files import EXTENSIONS
from crate_fast.train.data.shards import ShardSource, find_shards


def _png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def _tar(path, members: list[tuple[str, bytes]], format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _plain(path, values, label=lambda value: value % 2):
    return _tar(
        path, [part for v in values for part in ((f"{v:04d}.png", _png(v)), (f"{v:04d}.cls", b"%d" % label(v)))]
    )


def _values(index: ShardSource) -> list[tuple[int, int]]:
    """(grey value, label) of every image."""
    found = []
    for i in range(len(index)):
        file, label = index.open(i)
        found.append((int(np.asarray(Image.open(file))[0, 0, 0]), label))
    return found


def _index(*shards) -> ShardSource:
    return ShardSource(shards, shards[0].parent)


def _config(root, **changes) -> TrainConfig:
    settings = {
        "dataset": "shards",
        "data_dir": str(root),
        "image_size": 16,
        "batch_size": 4,
        "epochs": 2,
        "workers": 0,
    }
    return TrainConfig(**(settings | changes))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_are_neighbours_alike_up_to_the_first_dot_of_the_files_name(tmp_path, format):
    long = "f" * 90 + "/" + "x" * 60
    members = [
        ("README", b"no dot"),
        ("a.v1/0001.seg.png", _png(99)),  # another picture of the sample
        ("a.v1/0001.json", json.dumps({"label": 3, "caption": "é"}).encode()),
        ("a.v1/0001.PNG", _png(1)),
        ("b/0001.png", _png(2)),
        ("b/0001.cls", b" 4\n"),
        ("b/0001.txt", b"words"),
        ("b/0002.cls", b"7"),  # without an image
        (f"{long}.png", _png(3)),
        (f"{long}.json", b'{"label": 1}'),
        (f"{long}.cls", b"5"),
    ]
    index = _index(_tar(tmp_path / "train-0.tar", members, format))
    assert _values(index) == [(1, 3), (2, 4), (3, 5)]
    assert index.n_labels == 6
    assert index.name(1) == f"{tmp_path}/train-0.tar/b/0001.png"
    assert index.name(2).startswith(f"{tmp_path}/train-0.tar/")


def test_webdatasets_writer_is_read_and_timms_reader_agrees(tmp_path):
    wds = pytest.importorskip("webdataset")
    from timm.data import create_dataset

    count = 13
    with wds.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=5, verbose=0) as writer:
        for value in range(count):
            picture = np.full((20, 30, 3), value, np.uint8)
            writer.write({"__key__": f"n{value % 3}/im{value:03d}", "png": picture, "cls": value % 3})
    shards = find_shards(tmp_path, "train")
    assert len(shards) == 3
    ours = _values(_index(*shards))
    assert ours == [(value, value % 3) for value in range(count)]
    theirs = create_dataset("wds/", root=str(tmp_path), split="train-{0000..0002}.tar|13", num_samples=13)
    assert sorted((np.asarray(image)[0, 0, 0], label) for image, label in theirs) == sorted(ours)


def test_a_split_is_beside_or_in_a_folder_and_names_end_where_they_end(tmp_path):
    for name in (
        "val-0.tar",
        "val-1.tar",
        "validation-0.tar",
        "train/b.tar",
        "train/a.tar",
        "train/._a.tar",
        "x.tar",
    ):
        _plain(tmp_path / name, [1])
    assert [path.name for path in find_shards(tmp_path, "val")] == ["val-0.tar", "val-1.tar"]
    assert [path.name for path in find_shards(tmp_path, "train")] == ["a.tar", "b.tar"]
    assert [path.name for path in find_shards(tmp_path, "x")] == ["x.tar"]
    with pytest.raises(UserError, match=r"no shards test\*.tar.*val-0.tar.*--val-split"):
        find_shards(tmp_path, "test", "--val-split")
    with pytest.raises(UserError, match="no such folder"):
        find_shards(tmp_path / "nowhere", "val")
    _plain(tmp_path / "val-small-0.tar", [1])
    assert [path.name for path in find_shards(tmp_path, "val", other="val-small")] == ["val-0.tar", "val-1.tar"]
    assert [path.name for path in find_shards(tmp_path, "val-small", other="val")] == ["val-small-0.tar"]
    _plain(tmp_path / "val" / "0.tar", [1])
    with pytest.raises(ValueError, match="both beside.*move one kind away"):
        find_shards(tmp_path, "val")


def test_the_index_is_kept_and_made_anew_when_a_shard_changes(tmp_path, capsys, monkeypatch):
    shard = _plain(tmp_path / "train-0.tar", [1, 2])
    assert len(_index(shard)) == 2
    cache = tmp_path / ".train-0.index.npz"
    assert f"indexed 2 images of 1 shards in 0.0 s; kept in {cache}" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # the headers are not read again
        assert _values(_index(shard)) == [(1, 1), (2, 0)]
    assert capsys.readouterr().err == ""
    stat = shard.stat()
    _plain(shard, [4, 6])  # of the same size
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert shard.stat().st_size == stat.st_size
    assert _values(_index(shard)) == [(4, 0), (6, 0)]
    second = _plain(tmp_path / "train-1.tar", [8])
    assert len(_index(shard, second)) == 3
    capsys.readouterr()
    assert _values(_index(shard, second.rename(tmp_path / "train-2.tar")))[2] == (8, 0)
    assert "indexed 3 images" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("crate_fast.train.data.shards._VERSION", 0)
        _index(shard, tmp_path / "train-2.tar")
    assert "indexed 3 images" in capsys.readouterr().err
    for damage in (b"", b"text", cache.read_bytes()[:100]):
        cache.write_bytes(damage)
        assert len(_index(shard)) == 2
    assert not list(tmp_path.glob("*.npz.*"))  # nothing half-written


def test_an_index_that_cannot_be_kept_is_in_memory(tmp_path, capsys):
    shard = _plain(tmp_path / "train-0.tar", [1, 2])
    (tmp_path / ".train-0.index.npz").mkdir()
    assert len(_index(shard)) == 2
    assert "kept in memory only" in capsys.readouterr().err


def test_damage_is_named(tmp_path):
    shard = _plain(tmp_path / "train-0.tar", range(8))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2 + 700])
    with pytest.raises(ValueError, match=r"train-0.tar is no whole, uncompressed tar archive"):
        _index(shard)
    with tarfile.open(shard, "w:gz") as archive:
        archive.add(__file__, "a.png")
    with pytest.raises(ValueError, match=r"uncompressed tar archive.*unpack its compression"):
        _index(shard)
    with pytest.raises(ValueError, match=r"image b/0001 has no label: put b/0001.cls or b/0001.json"):
        _index(_tar(shard, [("b/0001.png", _png(1)), ("b/0001.txt", b"3")]))
    for suffix, content in (
        ("cls", b"cat"),
        ("cls", b"-1"),
        ("json", b"{}"),
        ("json", b'{"label": "3"}'),
        ("json", b"[]"),
        ("json", b"[" * 100_000),
        ("cls", b"3000000000"),
        ("cls", b"1" + b"0" * 30),
    ):
        with pytest.raises(ValueError, match=rf"0001.{suffix} holds .*integer from 0"):
            _index(_tar(shard, [("0001.png", _png(1)), (f"0001.{suffix}", content)]))
    with pytest.raises(ValueError, match="hold no images"):
        _index(_tar(shard, [("0001.cls", b"1")]))
    with pytest.raises(UserError, match=r"train-0\.tar: a\.png is there twice"):  # webdataset refuses it too
        _index(_tar(shard, [("a.png", _png(1)), ("a.cls", b"1"), ("a.png", _png(2)), ("a.cls", b"0")]))


def test_an_archive_is_read_to_its_end_or_refused(tmp_path):
    shard = _plain(tmp_path / "train-0.tar", range(4))
    whole = shard.read_bytes()
    with tarfile.open(shard) as opened:
        header = [member.offset for member in opened][4]
    damaged = {  # tarfile takes each for the end of the archive
        "header": whole[:header] + b"x" * 512 + whole[header + 512 :],
        "zeros": whole[:header] + bytes(512) + whole[header + 512 :],
        "cut between members": whole[:header],
        "cut in a header": whole[: header + 100],
        "joined by cat": whole + whole,
    }
    for content in damaged.values():
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"train-0\.tar is no whole.*at byte \d+.*copy it again"):
            _index(shard)
    shard.write_bytes(whole.rstrip(b"\0").ljust(len(whole) // 512 * 512 + 512 * 40, b"\0"))
    assert len(_index(shard)) == 4


def test_links_in_an_archive_have_the_content_of_what_they_lead_to(tmp_path, capsys):
    shard = _plain(tmp_path / "train-0.tar", [1, 2])
    with tarfile.open(shard, "a") as archive:
        for name, kind, target in (
            ("d/a.png", tarfile.LNKTYPE, "./0001.png"),
            ("d/a.cls", tarfile.SYMTYPE, "../0002.cls"),
            ("d/b.png", tarfile.SYMTYPE, "/nowhere.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    assert _values(_index(shard)) == [(1, 1), (2, 0), (1, 0)]
    assert "1 links are passed over, such as" in capsys.readouterr().err


def test_a_shard_that_shrinks_under_a_run_is_named(tmp_path):
    for split in ("train", "validation"):
        shard = _plain(tmp_path / f"{split}-0.tar", range(4))
    data = build_splits(_config(tmp_path))
    whole = shard.read_bytes()
    offset, size = data.val.images.samples[3, 1:3]
    shard.write_bytes(whole[: offset + size - 1])
    (batch,) = eval_loader(_config(tmp_path), data.val)
    assert len(batch.images) == 3
    assert batch.problems == [f"{shard}/0003.png: OSError: the archive ends 1 bytes early"]


def test_class_names_are_those_written_down(tmp_path):
    for split in ("train", "validation"):
        n_classes = 3 if split == "train" else 1
        _plain(tmp_path / f"{split}-0.tar", [1, 2, 3, 4], lambda v, n=n_classes: v % n)
    assert build_splits(_config(tmp_path)).classes == ("0", "1", "2")  # validation shows one of them
    (tmp_path / "_info.json").write_text('{"classes": ["x", "y", "z"]}')
    assert build_splits(_config(tmp_path)).classes == ("x", "y", "z")
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert build_splits(_config(tmp_path)).classes == ("ant", "bee", "cat")
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="2 class names and a label 2: complete classes.txt"):
        build_splits(_config(tmp_path))


def test_blank_lines_and_unreadable_names_of_classes(tmp_path):
    for split in ("train", "validation"):
        _plain(tmp_path / f"{split}-0.tar", [1, 2])
    for content in ("ant\nbee\n\n", "ant\r\nbee\r\n  \r\n", "\ufeffant \nbee"):
        (tmp_path / "classes.txt").write_text(content, encoding="utf-8", newline="")
        assert build_splits(_config(tmp_path)).classes == ("ant", "bee")
    for content in (b"ant\n\nbee\n", b"\xff\xfe"):
        (tmp_path / "classes.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"classes\.txt"):
            build_splits(_config(tmp_path))
    (tmp_path / "classes.txt").unlink()
    for content in ("{", "[]", '{"classes": "ab"}', '{"classes": ["ant", ""]}'):
        (tmp_path / "_info.json").write_text(content)
        with pytest.raises(UserError, match=r"_info\.json"):
            build_splits(_config(tmp_path))


def test_image_files_that_are_no_samples_are_counted_with_the_reason(tmp_path, capsys):
    dotted = [("img.0001.png", _png(1)), ("img.0001.cls", b"1"), ("img.0002.png", _png(2)), ("img.0002.cls", b"0")]
    shard = tmp_path / "train-0.tar"
    with pytest.raises(UserError, match=r"hold no images: 2 .* img\.0001\.png \(WebDataset ends .* its first dot"):
        _index(_tar(shard, dotted))
    others = [("2.heic", b"a"), ("2.cls", b"1"), ("._3.png", _png(3)), (".cache/3.png", _png(3)), ("3.txt", b"a")]
    for _ in range(2):  # scanned, then from the kept index
        capsys.readouterr()
        index = _index(_tar(shard, [("1.png", _png(1)), ("1.seg.png", _png(9)), ("1.cls", b"1"), *others, *dotted]))
        assert _values(index) == [(1, 1)]
        assert f"3 image files are passed over, such as {shard}: 2.heic (images are .jpg" in capsys.readouterr().err


def test_every_readers_extensions_are_images_here_too(tmp_path):
    members = [part for end in EXTENSIONS for part in ((f"{end[1:]}{end}", _png(1)), (f"{end[1:]}.cls", b"1"))]
    assert len(_index(_tar(tmp_path / "train-0.tar", members))) == len(EXTENSIONS)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_read_shards_from_any_process(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("crate_fast.train.data.shards._OPEN_ARCHIVES", 2)  # of five: descriptors come and go
    for number in range(5):
        _plain(tmp_path / "train" / f"{number}.tar", range(number * 4, number * 4 + 4))
    _plain(tmp_path / "validation" / "0.tar", range(9))
    config = _config(tmp_path, workers=workers)
    data = build_splits(config)
    data.train[0, 0]  # leaves a descriptor open for the workers to inherit
    for epoch in range(2):
        loader = train_loader(config, data.train, first_step=5 * epoch)
        shown = [
            (int(i[0, 0, 0]), int(k))
            for b, _ in zip(loader, range(5), strict=False)
            for i, k in zip(b.images, b.labels, strict=True)
        ]
        assert sorted(shown) == [(value, value % 2) for value in range(20)]
    seen = [int(image[0, 0, 0]) for batch in eval_loader(config, data.val) for image in batch.images]
    assert seen == list(range(9))


def test_a_folder_and_shards_of_its_images_give_the_same_batches(tmp_path):
    for split in ("train", "validation"):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / "folder" / split / name).mkdir(parents=True)
            for i in range(6):
                (tmp_path / "folder" / split / name / f"{i}.png").write_bytes(_png(20 * label + i))
        _plain(tmp_path / f"{split}-0.tar", [*range(6), *range(20, 26)], lambda v: v // 20)
    config = _config(tmp_path, crop="random", hflip=0.5, auto_augment="randaugment-n2-m14")
    ours = train_loader(config, build_splits(config).train)
    config = _config(tmp_path / "folder", crop="random", hflip=0.5, auto_augment="randaugment-n2-m14")
    config = TrainConfig(**(vars(config) | {"dataset": "folder"}))
    for batch, other in zip(ours, train_loader(config, build_splits(config).train), strict=True):
        for a, b in zip(batch[:3], other[:3], strict=True):
            assert torch.equal(a, b)


def test_an_index_travels_without_its_descriptors(tmp_path):
    index = _index(_plain(tmp_path / "train-0.tar", [1, 2]))
    index.open(0)
    copy = pickle.loads(pickle.dumps(index))
    assert index.archives._open
    assert not copy.archives._open
    assert _values(copy) == _values(index)
