"""WebDataset shards: samples, labels, the cached index, damaged archives, and writing shards."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from image_data import config_of, encoded, grey, write_tar, write_tree
from PIL import Image
from runs import Forked, wait_until

from crate_fast.errors import UserError
from crate_fast.train import write_shards
from crate_fast.train.data.loader import build_splits, eval_loader
from crate_fast.train.data.shards import ShardSource, find_shards


def _write(path, values, label=lambda value: value % 2):
    """Write a shard of grey images and their labels."""
    members = [((f"{v:04d}.png", grey(v)), (f"{v:04d}.cls", b"%d" % label(v))) for v in values]
    return write_tar(path, [part for pair in members for part in pair])


def _open(*shards) -> ShardSource:
    return ShardSource(shards, shards[0].parent)


def _values(source: ShardSource) -> list[tuple[int, int]]:
    """Return (grey value, label) of every image."""
    files = map(source.open, range(len(source)))
    return [(int(np.asarray(Image.open(file))[0, 0, 0]), label) for file, label in files]


def test_neighbours_of_one_name_up_to_the_first_dot_are_a_sample(tmp_path):
    long = "f" * 90 + "/" + "x" * 60
    members = [
        ("README", b"no dot"),
        ("a.v1/0001.seg.png", grey(99)),  # another picture of the sample
        ("a.v1/0001.json", json.dumps({"label": 3, "caption": "é"}).encode()),
        ("a.v1/0001.PNG", grey(1)),
        ("b/0001.png", grey(2)),
        ("b/0001.cls", b" 4\n"),
        ("b/0001.txt", b"words"),
        ("b/0002.cls", b"7"),  # without an image
        (f"{long}.png", grey(3)),
        (f"{long}.json", b'{"label": 1}'),
        (f"{long}.cls", b"5"),
    ]
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        source = _open(write_tar(tmp_path / f"{format}.tar", members, format))
        assert _values(source) == [(1, 3), (2, 4), (3, 5)]
        assert source.n_labels == 6
        assert source.name(1) == f"{tmp_path}/{format}.tar/b/0001.png"
        assert source.name(2).startswith(f"{tmp_path}/{format}.tar/")


def test_shards_of_webdataset_are_read_as_by_timm(tmp_path):
    wds = pytest.importorskip("webdataset")
    from timm.data import create_dataset

    with wds.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=5, verbose=0) as writer:
        for value in range(13):
            picture = np.full((20, 30, 3), value, np.uint8)
            writer.write({"__key__": f"n{value % 3}/im{value:03d}", "png": picture, "cls": value % 3})
    ours = _values(pickle.loads(pickle.dumps(_open(*find_shards(tmp_path, "train")))))  # as a spawned worker gets it
    assert ours == [(value, value % 3) for value in range(13)]
    theirs = create_dataset("wds/", root=str(tmp_path), split="train-{0000..0002}.tar|13", num_samples=13)
    assert sorted((np.asarray(image)[0, 0, 0], label) for image, label in theirs) == sorted(ours)


def test_the_shards_of_a_split_are_found_by_name(tmp_path):
    names = ["val-0.tar", "val-1.tar", "validation-0.tar", "train/b.tar", "train/a.tar", "train/._a.tar", "x.tar"]
    for name in [*names, "val-small-0.tar"]:
        _write(tmp_path / name, [1])

    def found(split: str, other: str = "") -> list[str]:
        return [path.name for path in find_shards(tmp_path, split, "--val-split", other)]

    assert found("val", "val-small") == ["val-0.tar", "val-1.tar"]
    assert found("val") == ["val-0.tar", "val-1.tar", "val-small-0.tar"]
    assert found("val-small", "val") == ["val-small-0.tar"]
    assert found("train") == ["a.tar", "b.tar"]
    assert found("x") == ["x.tar"]
    with pytest.raises(UserError, match=r"no shards test\*.tar.*val-0.tar.*--val-split"):
        found("test")
    with pytest.raises(UserError, match="no such folder"):
        find_shards(tmp_path / "nowhere", "val")
    _write(tmp_path / "val" / "0.tar", [1])
    with pytest.raises(UserError, match="both at its top.*move one away"):
        found("val")


def test_links_have_the_content_of_their_targets(tmp_path, capsys):
    hard, symbolic = tarfile.LNKTYPE, tarfile.SYMTYPE
    links = [("d/a.png", hard, "./1.png"), ("d/a.cls", symbolic, "b.txt"), ("d/b.txt", symbolic, "../2.cls")]
    links += [("d/b.png", symbolic, "/nowhere.png")]
    files = [("1.png", grey(1)), ("1.cls", b"1"), ("2.png", grey(2)), ("2.cls", b"0")]
    assert _values(_open(write_tar(tmp_path / "train-0.tar", [*files, *links]))) == [(1, 1), (2, 0), (1, 0)]
    assert "1 broken links are ignored, such as" in capsys.readouterr().err


def test_ignored_image_files_are_counted_with_the_reason(tmp_path, capsys):
    dotted = [("img.0001.png", grey(1)), ("img.0001.cls", b"1"), ("img.0002.png", grey(2)), ("img.0002.cls", b"0")]
    shard = tmp_path / "train-0.tar"
    with pytest.raises(UserError, match=r"hold no images: 2 .* img\.0001\.png \(WebDataset ends .* its first dot"):
        _open(write_tar(shard, dotted))
    others = [("2.heic", b"a"), ("2.cls", b"1"), ("._3.png", grey(3)), (".cache/3.png", grey(3)), ("3.txt", b"a")]
    write_tar(shard, [("1.png", grey(1)), ("1.seg.png", grey(9)), ("1.cls", b"1"), *others, *dotted])
    for _ in range(2):  # from the archive, then from the cached index
        capsys.readouterr()
        assert _values(_open(shard)) == [(1, 1)]
        assert f"3 image files are ignored, such as {shard}: 2.heic (supported: .jpg" in capsys.readouterr().err


def test_class_names_are_read_from_a_file_or_refused(tmp_path):
    shard = _write(tmp_path / "train-0.tar", [1, 2, 3, 4], lambda value: value % 3)
    _write(tmp_path / "validation-0.tar", [1, 2], lambda value: 0)
    assert build_splits(config_of(tmp_path, "shards")).classes == ("0", "1", "2")  # validation shows one of them
    for content in ("ant\nbee\ncat\n", "ant\r\nbee\r\ncat\r\n  \r\n", "\ufeffant \nbee\ncat\n\n"):
        (tmp_path / "classes.txt").write_text(content, encoding="utf-8", newline="")
        assert _open(shard).classes == ("ant", "bee", "cat")
    for content, message in (
        (b"ant\nbee\n", "2 class names, but a label is 2: complete classes.txt"),
        (b"ant\n\nbee\n", r"classes\.txt: the name of class 1 is empty"),
        (b"\xff\xfe", r"classes\.txt cannot be read as class names"),
    ):
        (tmp_path / "classes.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            _open(shard)


def test_the_index_is_cached_until_a_shard_changes(tmp_path, capsys, monkeypatch):
    shard = _write(tmp_path / "train-0.tar", [1, 2])
    assert len(_open(shard)) == 2
    cache = tmp_path / ".train-0.index.npz"
    assert re.search(rf"indexed 2 images of 1 shards in .* s; cached in {cache}\n", capsys.readouterr().err)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # the headers are not read again
        assert _values(_open(shard)) == [(1, 1), (2, 0)]
    assert capsys.readouterr().err == ""
    before = shard.stat()
    _write(shard, [4, 6])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert shard.stat().st_size == before.st_size
    assert _values(_open(shard)) == [(4, 0), (6, 0)]
    second = _write(tmp_path / "train-1.tar", [8])
    _open(shard, second)
    capsys.readouterr()
    assert _values(_open(shard, second.rename(tmp_path / "train-2.tar")))[2] == (8, 0)
    assert "indexed 3 images" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("crate_fast.train.data.shards._VERSION", 0)
        _open(shard, tmp_path / "train-2.tar")
    assert "indexed 3 images" in capsys.readouterr().err
    for damage in (b"", b"text", cache.read_bytes()[:100]):
        cache.write_bytes(damage)
        assert len(_open(shard)) == 2
    assert not list(tmp_path.glob("*.npz.*"))  # nothing half-written


def test_an_index_that_cannot_be_written_is_kept_in_memory(tmp_path, capsys):
    (tmp_path / ".train-0.index.npz").mkdir()
    assert len(_open(_write(tmp_path / "train-0.tar", [1, 2]))) == 2
    assert "cached in memory only" in capsys.readouterr().err


def test_samples_without_image_or_a_right_label_are_errors(tmp_path):
    wrong = [("cls", b"cat"), ("cls", b"-1"), ("cls", b"1" + b"0" * 30)]
    wrong += [("json", b"{}"), ("json", b'{"label": "3"}'), ("json", b"[" * 100_000)]
    for members, message in (
        ([("b/1.png", grey(1)), ("b/1.txt", b"3")], r"image b/1 has no label: put b/1.cls or b/1.json"),
        ([("1.cls", b"1")], "hold no images"),
        ([("a.png", b""), ("a.cls", b"1")] * 2, r"train-0\.tar: a\.png occurs twice"),
        ([("1.pgm", b""), ("1.png", b""), ("1.cls", b"1")], r"1 has 2 images, 1\.pgm and 1\.png: .*1\.mask\.png"),
        *(([("1.png", b""), (f"1.{kind}", label)], rf"1.{kind} holds .*integer from 0") for kind, label in wrong),
    ):
        with pytest.raises(UserError, match=message):
            _open(write_tar(tmp_path / "train-0.tar", members))


def test_a_damaged_archive_is_an_error(tmp_path):
    shard = _write(tmp_path / "train-0.tar", range(4))
    whole = shard.read_bytes()
    with tarfile.open(shard) as opened:
        header = [member.offset for member in opened][4]
    damaged = [  # tarfile reads all but the last two as the end of the archive
        whole[:header] + b"x" * 512 + whole[header + 512 :],
        whole[:header] + bytes(512) + whole[header + 512 :],
        whole[:header],  # cut between members
        whole[: header + 100],  # cut in a header
        whole + whole,  # joined by cat
        whole[: header + 700],  # cut in a file
        b"\x1f\x8b" + whole,  # compressed
    ]
    message = r"train-0\.tar is not a complete, uncompressed.*copy it again, or decompress"
    for content in damaged:
        shard.write_bytes(content)
        with pytest.raises(UserError, match=message):
            _open(shard)
    shard.write_bytes(whole.rstrip(b"\0").ljust(len(whole) // 512 * 512 + 512 * 40, b"\0"))
    assert len(_open(shard)) == 4


def test_a_shard_that_shrinks_during_a_run_is_a_problem_of_its_images(tmp_path):
    for split in ("train", "validation"):
        shard = _write(tmp_path / f"{split}-0.tar", range(4))
    data = build_splits(config_of(tmp_path, "shards"))
    offset, size = data.val.images.items[3, 1:3]
    shard.write_bytes(shard.read_bytes()[: offset + size - 1])
    (batch,) = eval_loader(config_of(tmp_path, "shards"), data.val)
    assert len(batch.images) == 3
    assert batch.problems == [f"{shard}/0003.png: OSError: the archive ends 1 bytes early"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Arguments of write_shards for four images per class, large and small, one corrupt; workers are threads."""
    monkeypatch.setattr("crate_fast.train.write_shards.ProcessPoolExecutor", ThreadPoolExecutor)
    draw, files = np.random.default_rng(0), {}
    for folder, i in itertools.product(("train/ant", "train/bee", "val/ant", "val/bee"), range(4)):
        noise = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture = noise.resize((64, 48) if i % 2 else (20, 24), Image.Resampling.BICUBIC)
        suffix, kind = ("jpg", "JPEG") if i < 2 else ("png", "PNG")
        files[f"{folder}/{i}.{suffix}"] = encoded(picture, kind, quality=95)
    write_tree(tmp_path / "data", files | {"train/bee/3.png": b"text"})
    monkeypatch.chdir(tmp_path)
    return ["--data-dir", "data", "--val-split", "val", "--output", "shards", "--workers", "2"]  # one of 8 is corrupt


def test_written_shards_have_the_readable_images_at_the_given_size(folder, capsys):
    write_tree(Path(".shards.partial"), {"train-00009.tar": b"of a killed command"})
    words = ["--shorter-side", "24", "--per-shard", "3", "--max-unreadable", "0.13"]
    assert write_shards.main([*folder, *words]) == 0
    said = capsys.readouterr().out
    assert re.search("unreadable images left out: 1(?s:.*)bee/3.png: UnidentifiedImageError", said)
    written = sorted(path.name for path in Path("shards").glob("*.tar*"))
    assert written == [f"{split}-0000{i}.tar" for split in ("train", "val") for i in range(3)]
    before = build_splits(config_of("data", val_split="val"))
    after = build_splits(config_of("shards", "shards", val_split="val"))
    assert after.classes == before.classes == ("ant", "bee")
    assert (len(after.train), len(after.val)) == (7, 8)
    for i in range(8):
        (old, label), (new, new_label) = before.val.images[i], after.val.images[i]
        assert label == new_label
        if old.size == (64, 48):
            smaller = np.asarray(old.resize((32, 24), Image.Resampling.BICUBIC)).astype(float)
            assert np.abs(smaller - np.asarray(new)).mean() < 6  # of 255: the loss of JPEG
        else:
            assert after.val.images.open(i)[0].read() == Path(before.val.images.name(i)).read_bytes()


def test_errors_of_the_writer_leave_no_files(folder, refuses):
    write_tree(Path("old"), {"a.tar": b""})
    for message, *words in (
        ("old exists already: pass a new folder", "--output", "old"),
        ("names of shards cannot contain /", "--train-split", "a/b"),
        ("--quality: 0: give a positive integer", "--quality", "0"),
        ("1 of 8 images of train cannot be read, more than 1%; the first error: .*3.png",),
    ):
        refuses(message, write_shards.main, [*folder, *words])
    assert {path.name for path in Path().iterdir()} == {"data", "old"}


def test_a_killed_writing_process_is_an_error(tmp_path, monkeypatch):
    forkserver = multiprocessing.get_context("forkserver")  # starts at once: see runs.py
    monkeypatch.setattr(write_shards.multiprocessing, "get_context", lambda _: forkserver)

    class Deadly(list):
        def __reduce__(self):
            return os._exit, (137,)  # in the process that unpickles it

    options = SimpleNamespace(workers=2, per_shard=1)
    with pytest.raises(UserError, match="writes the shards of train was killed.*pass fewer --workers than 2"):
        write_shards._write_split(Deadly("ab"), tmp_path / "train", options)


def test_writing_processes_end_with_a_killed_command(folder):
    for name in ("data/train/ant/4.jpg", "stderr"):
        os.mkfifo(name)
    here = f"import os; os.chdir({os.getcwd()!r}); os.dup2(os.open('stderr', os.O_WRONLY), 2)"
    with open("stderr", "rb", 0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stderr:
        command = Forked(folder, script="write_shards", before=here)
        with open("data/train/ant/4.jpg", "wb"):  # opens when a writing process waits for this image
            command.send_signal(signal.SIGKILL)
            wait_until(lambda: stderr.read(2**16) == b"", seconds=60)  # when no process holds stderr
    command.communicate()


def test_formats_that_shards_do_not_have_become_jpegs():
    suffix, content = write_shards.encoded(encoded(Image.new("P", (20, 20)), "GIF"), 256, 95)
    assert suffix == "jpg"
    assert Image.open(io.BytesIO(content)).size == (20, 20)
