"""Sources: every form of a data set gives the same images and reports corrupt ones."""

import dataclasses
import io
import os
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from image_data import config_of, encoded, write_tar, write_tree
from PIL import Image

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.image_files import EXTENSIONS, Unreadable, describe
from crate_fast.train.data.loader import build_splits, eval_loader, open_source, train_loader
from crate_fast.train.data.sources import TORCHVISION, common_classes

CORRUPT = {1, 4, 9}  # of the twelve images of a split: cut, no image, empty


def _jpeg(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), "JPEG", quality=95)


def _content(i: int) -> bytes:
    return {1: _jpeg(1)[: len(_jpeg(1)) // 2], 4: b"no image at all", 9: b""}.get(i, _jpeg(i))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The package `datasets`, with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield datasets


def _write_parquet(hub, path, columns, label=None):
    """Write columns as parquet, "image" as images and "label" of the type `label`, if given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = hub.Features({"image": hub.Image(), "label": label}) if label else None
    hub.Dataset.from_dict(columns, features=features).to_parquet(str(path))


def _write(root, kind: str, hub=None) -> TrainConfig:
    """Write twelve images per split in one of the forms, three of them corrupt."""
    names = [f"{'ant' if i < 6 else 'bee'}/{i:02d}.jpg" for i in range(12)]
    files = {name: _content(i) for i, name in enumerate(names)}
    for split in ("train", "validation"):
        if kind == "folder":
            write_tree(root / split, files)
        elif kind == "tar":
            write_tar(root / f"{split}.tar", files.items())
        elif kind == "shards":
            labels = [(name.replace(".jpg", ".cls"), b"%d" % (i // 6)) for i, name in enumerate(names)]
            write_tar(root / f"{split}.tar", sorted([*files.items(), *labels]))
            (root / "classes.txt").write_text("ant\nbee\n")
        else:
            columns = {"image": [{"bytes": content, "path": None} for content in files.values()]}
            columns["label"] = [i // 6 for i in range(12)]
            path = root / "data" / f"{split}-00000-of-00001.parquet"
            _write_parquet(hub, path, columns, hub.ClassLabel(names=["ant", "bee"]))
    return config_of(root, kind, epochs=3, crop="random", hflip=0.5)


@pytest.fixture(scope="module", params=["folder", "tar", "shards", "hf"])
def damaged(request, tmp_path_factory):
    hub = request.getfixturevalue("hub") if request.param == "hf" else None
    return _write(tmp_path_factory.mktemp(request.param), request.param, hub)


def test_every_source_has_the_same_images_and_names_corrupt_ones(damaged):
    data = build_splits(damaged)
    assert data.classes == ("ant", "bee")
    assert (len(data.train), len(data.val)) == (12, 12)
    for i in range(12):
        if i in CORRUPT:
            with pytest.raises(Unreadable, match=rf"({i:02d}\.jpg|image {i} ).*: \w+Error: "):
                data.val.images[i]
            continue
        picture, label = data.val.images[i]
        assert (picture.mode, label) == ("RGB", i // 6)
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(_jpeg(i)))))


def test_evaluation_skips_corrupt_images_and_reads_the_others_once(damaged):
    data = build_splits(damaged)
    batches = [batch for rank in range(5) for batch in eval_loader(damaged, data.val, rank=rank, world_size=5)]
    assert all(len(batch.images) == len(batch.labels) for batch in batches)
    seen = [image.numpy().tobytes() for batch in batches for image in batch.images]
    whole = data.val.batch([(0, i) for i in range(12)])
    assert sorted(seen) == sorted(image.numpy().tobytes() for image in whole.images)
    assert len({line for batch in batches for line in batch.problems}) == 3


def test_replacements_of_corrupt_images_do_not_depend_on_processes_and_workers(damaged):
    data = build_splits(damaged)
    whole = list(train_loader(damaged, data.train))
    assert [len(batch.images) for batch in whole] == [4] * 9
    for epoch in range(3):  # every image occurs once, and may also be drawn as a replacement
        lines = [line for batch in whole[3 * epoch : 3 * epoch + 3] for line in batch.problems]
        assert len(set(lines)) == 3
    halves = [train_loader(damaged, data.train, rank=rank, world_size=2) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for rank, part in enumerate(parts):
            for name in ("images", "labels"):
                assert torch.equal(getattr(batch, name)[rank::2], getattr(part, name))
        assert sorted(batch.problems) == sorted(parts[0].problems + parts[1].problems)
    in_workers = train_loader(dataclasses.replace(damaged, workers=2), data.train, first_step=5)
    for batch, again in zip(whole[5:], in_workers, strict=True):
        assert torch.equal(batch.images, again.images)
        assert batch.problems == again.problems


def test_replacements_differ_and_have_their_own_labels(tmp_path):
    data = build_splits(dataclasses.replace(_write(tmp_path, "folder"), crop="none", hflip=0.0))
    whole = data.train.batch([(0, i) for i in range(12)])
    plain = {image.numpy().tobytes(): label for image, label in zip(whole.images, whole.labels.tolist(), strict=True)}
    batch = data.train.batch([(epoch, 1, copy) for epoch in range(6) for copy in range(2)])
    labels = [plain[image.numpy().tobytes()] for image in batch.images]
    assert labels == batch.labels.tolist()
    assert set(labels) == {0, 1}
    assert len({image.numpy().tobytes() for image in batch.images}) > 3


def test_a_split_without_a_readable_image_is_an_error(tmp_path):
    config = _write(tmp_path, "folder")
    data = build_splits(config)
    for path in (tmp_path / "train").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"30 images in a row could not be read.*FileNotFoundError"):
        next(iter(train_loader(config, data.train)))


def test_an_error_in_a_transform_is_not_a_corrupt_image(tmp_path, monkeypatch):
    data = build_splits(_write(tmp_path, "folder"))
    monkeypatch.setattr(data.train, "transform", Mock(side_effect=ValueError("a mistake of ours")))
    with pytest.raises(ValueError, match="a mistake of ours"):
        data.train.batch([(0, 0, 0)])


LAYOUTS = {
    "as torchvision": [
        *("cat/indoor/x.png", "cat/b.jpg", "cat/indoor-2/a.png", "cat/indoor/z/a.png", "dog/indoor/y.png"),
        *("Dog/1.png", "class10/a.png", "class2/b.png", "class2/img_10.png", "class2/img_2.png"),
        *("a-b/10.jpg", "a-b/9.jpg", "a/z/c.PNG", "a/z/c.webp", "a/c.TIFF", "a/c.bmp", "a/c.pgm", "a/b-c/d.jpg"),
    ],
    "not UTF-8": [os.fsdecode(b"caf\xe9/x.jpg"), "dog/y.jpg"],
    "in a folder of the archive's name": ["train/cat/indoor/x.jpg", "train/cat/b.jpg", "./train/dog/y.jpg"],
    "hidden files": [
        *("./cat/x.jpg", "./cat/._x.jpg", "./._cat/x.jpg", ".git/x.jpg", "dog/.ipynb_checkpoints/x.jpg", "dog/y.jpg"),
        *(".x.png", "cat/.jpg"),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_and_archives_have_the_same_classes_and_order(tmp_path, layout):
    files = {name: _jpeg(i) for i, name in enumerate(LAYOUTS[layout])}
    write_tar(tmp_path / "train.tar", [("./", tarfile.DIRTYPE, ""), *files.items()])  # as of `tar -C folder .`
    root = tmp_path if any(name.startswith("train/") for name in files) else tmp_path / "train"
    write_tree(root, files)
    folder, archive = (open_source(config_of(tmp_path, kind), train=True) for kind in ("folder", "tar"))
    assert archive.classes == folder.classes
    read = [[(file.read(), label) for file, label in map(s.open, range(len(s)))] for s in (folder, archive)]
    assert read[0] == read[1]
    again = open_source(config_of(tmp_path, "tar"), train=True)  # from the cached index
    assert (again.classes, len(again)) == (archive.classes, len(archive))
    if layout == "as torchvision":
        theirs = torchvision.datasets.ImageFolder(tmp_path / "train")
        assert list(folder.classes) == theirs.classes
        assert [(folder.name(i), folder.open(i)[1]) for i in range(len(folder))] == theirs.samples
    if layout == "hidden files":
        assert len(folder) == 2
    if layout == "not UTF-8":
        assert folder.classes == ("caf\\udce9", "dog")
        assert describe(folder.name(0), ValueError("cut")).endswith("caf\\udce9/x.jpg: ValueError: cut")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/x.jpg", "y.jpg", "z.jpg"], "2 of its images are in no class folder, such as y.jpg"),
        (["a/x.jpg", "b/x.heic"], r"1 class folders hold no images, such as \['b'\].*formats are ignored: 1 \.heic"),
        (["a/notes.txt"], "it holds no images"),
    ],
)
def test_data_without_classes_are_an_error(tmp_path, names, message):
    (tmp_path / "train").mkdir()
    write_tree(tmp_path / "train", dict.fromkeys(names, b""))
    write_tar(tmp_path / "train.tar", [(name, b"") for name in names])
    for kind, place in (("folder", "train"), ("tar", r"train\.tar")):
        with pytest.raises(UserError, match=f"{place} cannot be used .*{message}.*folder named after its class"):
            open_source(config_of(tmp_path, kind), train=True)


def test_files_of_other_formats_and_a_single_class_are_reported_once(tmp_path, capsys, monkeypatch):
    names = [f"train/ant/a{extension}" for extension in EXTENSIONS]
    write_tree(tmp_path, dict.fromkeys([*names, "train/ant/b.heic", "train/ant/c.AVIF", "train/ant/d.txt"], b""))
    assert len(open_source(config_of(tmp_path), train=True)) == len(EXTENSIONS)
    said = f"{tmp_path}/train: image files of unsupported formats are ignored: 1 .avif, 1 .heic\n"
    assert capsys.readouterr().err == said
    write_tree(tmp_path / "deep", {"train/train/ant/x.png": b"", "train/train/bee/x.png": b""})
    assert open_source(config_of(tmp_path / "deep"), train=True).classes == ("train",)
    assert "all images have one class, 'train'" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")  # of the processes of a host, only the first prints
    open_source(config_of(tmp_path), train=True)
    assert capsys.readouterr().err == ""


def test_archives_in_an_archive_are_read(tmp_path):
    inner = [write_tar(tmp_path / f"{k}.tar", [(f"{i}.jpg", _content(6 * k + i)) for i in (0, 2, 5)]) for k in (0, 1)]
    write_tar(tmp_path / "train.tar", [(f"{'ab'[k]}.tar", path.read_bytes()) for k, path in enumerate(inner)])
    source = open_source(config_of(tmp_path, "tar"), train=True)
    assert source.classes == ("a", "b")
    read = {(file.read(), label) for file, label in map(source.open, range(6))}
    assert read == {(_jpeg(6 * k + i), k) for k in range(2) for i in (0, 2, 5)}


def test_splits_with_different_classes_are_an_error():
    named = [SimpleNamespace(classes=tuple(names)) for names in ("ab", "ab", "ba", "a")]
    assert common_classes(*named[:2]) == ("a", "b")
    for other, message in ((2, "classes in different orders"), (3, r"different classes, such as \['b'\]")):
        with pytest.raises(UserError, match=message):
            common_classes(named[0], named[other])


class TestHuggingFace:
    def test_data_that_cannot_be_opened_are_an_error(self, hub, tmp_path, monkeypatch):
        written = _write(tmp_path, "hf", hub)
        (tmp_path / "empty").mkdir()
        for config, train, message in (
            (config_of("some/name", "hf"), True, r"'some/name' is not a folder.*--download"),
            (dataclasses.replace(written, val_split="val"), False, r"Unknown split \"val\".*--val-split"),
            (config_of(tmp_path / "empty", "hf"), True, "datasets cannot open.*--train-split"),
        ):
            with pytest.raises(UserError, match=message):
                open_source(config, train)
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"needs the package datasets: pip install .*\[hf\]"):
            open_source(config, True)

    def test_a_null_image_is_corrupt(self, hub, tmp_path):
        images = [None if i == 2 else {"bytes": b"" if i == 3 else _jpeg(i), "path": None} for i in range(5)]
        columns = {"image": images, "label": [0, 1, 0, 1, 0]}
        for split in ("train", "validation"):
            _write_parquet(hub, tmp_path / "data" / f"{split}.parquet", columns, hub.Value("int64"))
        config = config_of(tmp_path / "data", "hf", batch_size=5)
        data = build_splits(config)
        assert data.classes == ("0", "1")
        (batch,) = eval_loader(config, data.val)
        assert batch.labels.tolist() == [0, 1, 0]
        assert [line.split("image ")[1][0] for line in batch.problems] == ["2", "3"]
        assert "neither bytes nor a path" in batch.problems[0]
        assert len(next(iter(train_loader(config, data.train))).images) == 5

    def test_other_columns_are_not_decoded(self, hub, tmp_path):
        row = {"image": {"bytes": _jpeg(0), "path": None}, "label": 0, "mask": {"bytes": b"x", "path": None}}
        features = hub.Features({"image": hub.Image(), "label": hub.Value("int64"), "mask": hub.Image()})
        (tmp_path / "data").mkdir()
        hub.Dataset.from_list([row], features).to_parquet(str(tmp_path / "data" / "train.parquet"))
        assert open_source(config_of(tmp_path / "data", "hf"), True)[0][1] == 0

    def test_image_files_are_opened_by_their_paths(self, hub, tmp_path):
        write_tree(tmp_path, {f"train/{name}/{i}.jpg": _jpeg(i) for i, name in enumerate(("ant", "bee"))})
        source = open_source(config_of(tmp_path, "hf"), True)
        assert (source.classes, [source[i][1] for i in range(2)]) == (("ant", "bee"), [0, 1])

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"img": [0], "label": [0]}, r"columns \['img', 'label'\]: rename two to image and label"),
            ({"image": [1, 2], "label": [0, 1]}, "images in the column image"),
            (["cat", "dog"], "integers from 0 to 9,999,999, not .'cat', 'dog'.*class_encode_column"),
            ([[0], [1]], "integers in the column label"),
            ([0, 2**62], "labels must be integers.*not"),
            ([0, -1], r"split train: labels must be integers.*not \[-1\]"),
        ],
    )
    def test_unusable_columns_are_errors(self, hub, tmp_path, columns, message):
        columns = columns if isinstance(columns, dict) else {"image": [_jpeg(0)] * 2, "label": columns}
        _write_parquet(hub, tmp_path / "data" / "train.parquet", columns)
        with pytest.raises(UserError, match=message):
            open_source(config_of(tmp_path / "data", "hf"), True)


def test_torchvision_unpacks_only_archives_that_it_knows(tmp_path, monkeypatch):
    """It does not check the paths in an archive, so its MD5 must be checked before."""
    from torchvision.datasets import utils

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, file, **_: Path(file).write_bytes(b"another archive"))
    monkeypatch.setattr(utils, "extract_archive", Mock(side_effect=AssertionError))
    for name in TORCHVISION:
        with pytest.raises(UserError, match="corrupted"):
            open_source(config_of(tmp_path / name, name, download=True), True)
