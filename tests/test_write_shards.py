"""Writing shards: what is written is what was there, smaller where it was too large, without what was damaged."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crate_fast.train import write_shards
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import build_splits


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for k, name in enumerate(("ant", "bee")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                size = (64, 48) if i % 2 else (20, 24)
                pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
                picture.save(tmp_path / "data" / split / name / f"{k}{i}.{'jpg' if i < 2 else 'png'}", quality=95)
    (tmp_path / "data" / "train" / "bee" / "13.png").write_bytes(b"text")
    return tmp_path


def test_shards_hold_the_readable_images_made_smaller(folder, capsys):
    words = (
        f"--data-dir {folder / 'data'} --val-split val --output {folder / 'shards'} --shorter-side 24 --per-shard 3"
    )
    assert write_shards.main([*words.split(), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "unreadable images left out: 1" in said
    assert "bee/13.png: UnidentifiedImageError" in said
    written = sorted(path.name for path in (folder / "shards").glob("*.tar*"))
    assert written == [f"{split}-0000{i}.tar" for split in ("train", "val") for i in range(3)]
    common = {"val_split": "val", "image_size": 16}
    before = build_splits(TrainConfig(dataset="folder", data_dir=str(folder / "data"), **common))
    after = build_splits(TrainConfig(dataset="shards", data_dir=str(folder / "shards"), **common))
    assert after.classes == before.classes == ("ant", "bee")
    assert (len(after.train), len(after.val)) == (7, 8)
    for i in range(8):
        (old, label), (new, new_label) = before.val.images[i], after.val.images[i]
        assert label == new_label
        if old.size == (64, 48):
            assert new.size == (32, 24)
            smaller = np.asarray(old.resize((32, 24), Image.Resampling.BICUBIC)).astype(float)
            assert np.abs(smaller - np.asarray(new)).mean() < 6  # of 255: what JPEG loses of loud colours
        else:
            assert np.array_equal(np.asarray(old), np.asarray(new))
            assert after.val.images.open(i)[0].read() == Path(before.val.images.name(i)).read_bytes()


def test_what_is_there_is_not_mixed_with(folder, capsys):
    words = f"--data-dir {folder / 'data'} --val-split val --output {folder / 'shards'}"
    (folder / "shards").mkdir()
    (folder / "shards" / "old.tar").write_bytes(b"")
    assert write_shards.main(words.split()) == 2
    assert "holds archives already" in capsys.readouterr().err
    assert write_shards.main([*words.split(), "--train-split", "a/b"]) == 2
    assert write_shards.main([*words.split(), "--output", __file__]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert write_shards.main([*words.split(), "--quality", "0"]) == 2
    assert "--quality 0: it must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--output", "file"], ["--output", "new", "--quality", "101"], ["--bad"]])
def test_what_cannot_be_written_is_one_line(folder, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert (
        write_shards.main(["--data-dir", str(folder / "data"), "--val-split", "val", "--workers", "1", *words]) == 2
    )
    assert capsys.readouterr().err.count("\n") == 1


def test_formats_that_no_shard_has_become_jpegs():
    file = io.BytesIO()
    Image.new("P", (20, 20)).save(file, "GIF")
    suffix, content = write_shards.encoded(file.getvalue(), 256, 95)
    assert suffix == "jpg"
    assert Image.open(io.BytesIO(content)).size == (20, 20)
