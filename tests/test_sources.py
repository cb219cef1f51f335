"""Sources: damaged images are named and never end a run by themselves; nothing is unpacked outside its folder."""

import io
import sys
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import build_splits, eval_loader, open_source, plain_splits, readable, train_loader
from crate_fast.train.data.sources import Source, TorchvisionSource, common_classes, nothing_outside
from crate_fast.train.data.unreadable import Unreadable

BROKEN = {1: "truncated", 4: "text", 9: "empty"}  # of twelve images a split


def _jpeg(value: int) -> bytes:
    file = io.BytesIO()
    draw = np.random.default_rng(value)
    Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def _content(i: int) -> bytes:
    whole = _jpeg(i)
    return {"truncated": whole[: len(whole) // 2], "text": b"no image at all", "empty": b"", None: whole}[
        BROKEN.get(i)
    ]


def _add(archive: tarfile.TarFile, name: str, content: bytes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _make(root, kind: str) -> TrainConfig:
    """Twelve images a split in that form, three of them damaged."""
    for split in ("train", "validation"):
        names = [f"{'ant' if i < 6 else 'bee'}/{i:02d}.jpg" for i in range(12)]
        if kind == "folder":
            for i, name in enumerate(names):
                (root / split / name).parent.mkdir(parents=True, exist_ok=True)
                (root / split / name).write_bytes(_content(i))
        elif kind in ("tar", "shards"):
            (root / "classes.txt").write_text("ant\nbee\n")
            with tarfile.open(root / f"{split}.tar", "w") as archive:
                for i, name in enumerate(names):
                    _add(archive, name, _content(i))
                    if kind == "shards":
                        _add(archive, name.replace(".jpg", ".cls"), b"%d" % (i // 6))
        else:
            _make_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    settings = {"image_size": 16, "batch_size": 4, "epochs": 3, "workers": 0, "crop": "random", "hflip": 0.5}
    return TrainConfig(dataset=kind, data_dir=str(root), **settings)


def _make_parquet(path, **renamed):
    datasets = pytest.importorskip("datasets")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [{"bytes": _content(i), "path": None} for i in range(12)],
        "label": [i // 6 for i in range(12)],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for old, new in renamed.items():
        data = data.rename_column(old, new)
    data.to_parquet(str(path))


@pytest.fixture(params=["folder", "tar", "shards", "hf"])
def damaged(request, tmp_path, monkeypatch):
    if request.param == "hf":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.disable_progress_bars()
    return _make(tmp_path, request.param)


def test_every_source_has_the_same_images_and_names_the_damaged(damaged):
    data = build_splits(damaged)
    assert data.classes == ("ant", "bee")
    assert (len(data.train), len(data.val)) == (12, 12)
    for i in range(12):
        if i in BROKEN:
            with pytest.raises(Unreadable, match=rf"({i:02d}\.jpg|image {i} ).*: \w+Error: "):
                data.val[0, i]
            continue
        picture, label = data.val.images[i]
        assert (picture.mode, label) == ("RGB", i // 6)
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(_jpeg(i)))))


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_leaves_the_damaged_out_and_sees_the_rest_once(damaged, world_size):
    data = build_splits(damaged)
    batches = [
        batch
        for rank in range(world_size)
        for batch in eval_loader(damaged, data.val, rank=rank, world_size=world_size)
    ]
    assert sum(len(batch.images) for batch in batches) == 9
    assert all(len(batch.images) == len(batch.labels) == len(batch.flips) for batch in batches)
    seen = {image.numpy().tobytes() for batch in batches for image in batch.images}
    assert seen == {data.val[0, i][0].numpy().tobytes() for i in range(12) if i not in BROKEN}
    assert not torch.cat([batch.flips for batch in batches]).any()
    assert len({line for batch in batches for line in batch.problems}) == 3
    assert len(readable(data.val, range(12))) == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_the_damaged_alike_however_images_are_dealt_out(damaged, workers):
    damaged = TrainConfig(**(vars(damaged) | {"workers": workers}))
    data = build_splits(damaged)
    whole = list(train_loader(damaged, data.train))
    assert [len(batch.images) for batch in whole] == [4] * 9
    for epoch in range(3):  # each image is met once, and may be drawn as a replacement once more
        lines = [line for batch in whole[3 * epoch : 3 * epoch + 3] for line in batch.problems]
        assert len(set(lines)) == 3
    halves = [list(train_loader(damaged, data.train, rank=rank, world_size=2)) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for rank, part in enumerate(parts):
            for name in ("images", "labels", "flips"):
                assert torch.equal(getattr(batch, name)[rank::2], getattr(part, name))
        assert sorted(batch.problems) == sorted(parts[0].problems + parts[1].problems)
    rest = list(train_loader(damaged, data.train, first_step=5))
    for batch, again in zip(whole[5:], rest, strict=True):
        assert torch.equal(batch.images, again.images)
        assert batch.problems == again.problems


def test_replacements_differ_and_bring_their_own_labels(tmp_path):
    config = _make(tmp_path, "folder")
    data = build_splits(TrainConfig(**(vars(config) | {"crop": "none"})))
    plain = {data.train[0, i][0].numpy().tobytes(): data.train[0, i][1] for i in range(12) if i not in BROKEN}
    keys = [(epoch, 1, copy) for epoch in range(6) for copy in range(2)]
    batch = data.train.batch(keys, replace=True)
    labels = [plain[image.numpy().tobytes()] for image in batch.images]
    assert labels == batch.labels.tolist()
    assert set(labels) == {0, 1}
    assert len({image.numpy().tobytes() for image in batch.images}) > 3


def test_nothing_readable_at_all_is_an_error(tmp_path):
    config = _make(tmp_path, "folder")
    data = build_splits(config)
    for path in (tmp_path / "train").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"30 images in a row could not be read.*FileNotFoundError"):
        next(iter(train_loader(config, data.train)))


def test_what_fails_in_a_transform_is_no_unreadable_image(tmp_path, monkeypatch):
    data = build_splits(_make(tmp_path, "folder"))

    def failing(_picture):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(data.train, "transform", failing)
    with pytest.raises(ValueError, match="a mistake of ours"):
        data.train.batch([(0, 0, 0)], replace=True)


def test_probes_see_plain_images_and_are_told(tmp_path):
    data = plain_splits(_make(tmp_path, "folder"))
    assert torch.equal(data.train[0, 0][0], data.train[5, 0][0])
    with pytest.raises(Unreadable, match=r"04\.jpg"):
        data.train[0, 4]


def test_archives_in_an_archive_are_read(tmp_path):
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for k, name in enumerate(("ant", "bee")):
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w") as inside:
                    for i in (0, 2, 5):
                        _add(inside, f"{i}.jpg", _content(6 * k + i))
                _add(archive, f"{name}.tar", inner.getvalue())
    data = build_splits(TrainConfig(dataset="tar", data_dir=str(tmp_path), image_size=16))
    assert data.classes == ("ant", "bee")
    pictures = {np.asarray(data.val.images[i][0]).tobytes(): data.val.images[i][1] for i in range(6)}
    assert pictures == {
        np.asarray(Image.open(io.BytesIO(_jpeg(6 * k + i)))).tobytes(): k for k in range(2) for i in (0, 2, 5)
    }


LAYOUTS = {
    "class folders": ["cat/indoor/x.jpg", "cat/b.jpg", "dog/indoor/y.jpg", "dog/c.jpg"],
    "the folder of the split": ["train/cat/indoor/x.jpg", "train/cat/b.jpg", "./train/dog/y.jpg"],
    "hidden files": [
        "./cat/x.jpg",
        "./cat/._x.jpg",
        "./._cat/x.jpg",
        ".git/x.jpg",
        "dog/.ipynb_checkpoints/x.jpg",
        "dog/y.jpg",
    ],
    "names that sort otherwise": ["a-b/10.jpg", "a-b/9.jpg", "a/z.jpg", "a/b/c.jpg", "B/1.jpg", "a/b-c/d.jpg"],
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_an_archive_has_the_classes_and_order_of_its_folder(tmp_path, names):
    root = tmp_path if any("train/" in name for name in names) else tmp_path / "train"
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for i, name in enumerate(names):
            _add(archive, name, _jpeg(i))
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(_jpeg(i))
    configs = [TrainConfig(dataset=kind, data_dir=str(tmp_path)) for kind in ("folder", "tar")]
    folder, archive = (open_source(config, train=True) for config in configs)
    assert archive.classes == folder.classes
    read = [[(file.read(), label) for file, label in map(s.open, range(len(s)))] for s in (folder, archive)]
    assert read[0] == read[1]
    again = open_source(configs[1], train=True)  # from the kept index
    assert (again.classes, len(again)) == (archive.classes, len(archive))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x.jpg", "y.jpg"], "2 of its images are in no class folder, such as x.jpg"),
        (["train/x.jpg"], "1 of its images are in no class folder"),
        (["ant/x.jpg", "y.jpg"], "1 of its images are in no class folder"),
        (["ant/x.jpg", "bee/x.heic"], "1 class folders hold no images.*1 .heic"),
        (["ant/x.heic"], "it holds no images.*1 .heic"),
    ],
)
def test_archives_that_name_no_classes_are_refused(tmp_path, names, message):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name in names:
            _add(archive, name, _jpeg(0))
    with pytest.raises(UserError, match=rf"train\.tar cannot be used .*{message}"):
        open_source(TrainConfig(dataset="tar", data_dir=str(tmp_path)), True)


def test_classes_in_different_orders_are_refused(tmp_path):
    class Named:
        n_labels = 2

        def __init__(self, *classes):
            self.classes = classes

    assert common_classes(Named("a", "b"), Named("a", "b")) == ("a", "b")
    with pytest.raises(UserError, match="classes in different orders"):
        common_classes(Named("a", "b"), Named("b", "a"))
    with pytest.raises(UserError, match=r"different classes, such as \['b'\]"):
        common_classes(Named("a", "b"), Named("a"))


def test_pictures_of_any_mode_become_rgb(tmp_path):
    modes = ("L", "RGBA", "P", "CMYK", "1", "LA")
    for split in ("train", "validation"):
        (tmp_path / split / "ant").mkdir(parents=True)
        for i, mode in enumerate(modes):
            Image.new(mode, (20, 30)).save(tmp_path / split / "ant" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    data = build_splits(TrainConfig(dataset="folder", data_dir=str(tmp_path), image_size=16))
    assert [data.val[0, i][0].shape for i in range(len(modes))] == [(3, 16, 16)] * len(modes)


def test_empty_folders_and_damaged_archives_say_so(tmp_path):
    (tmp_path / "train").mkdir()
    config = TrainConfig(dataset="folder", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"train cannot be used.*folder named after its class"):
        build_splits(config)
    (tmp_path / "train.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"train\.tar is no whole, uncompressed tar archive"):
        build_splits(TrainConfig(dataset="tar", data_dir=str(tmp_path)))
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        _add(archive, "notes.txt", b"words")
    with pytest.raises(ValueError, match=r"train\.tar cannot be used"):
        build_splits(TrainConfig(dataset="tar", data_dir=str(tmp_path)))


class TestHuggingFace:
    def test_a_missing_package_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"needs the package datasets: pip install crate_fast\[hf\]"):
            build_splits(TrainConfig(dataset="hf", data_dir=str(tmp_path)))

    def test_nothing_is_fetched_unasked(self):
        pytest.importorskip("datasets")
        with pytest.raises(UserError, match=r"'some/name' is no folder.*--download"):
            build_splits(TrainConfig(dataset="hf", data_dir="some/name"))

    def test_unusable_data_is_refused(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        for split in ("train", "validation"):
            _make_parquet(tmp_path / "renamed" / f"{split}.parquet", image="img")
            _make_parquet(tmp_path / "plain" / f"{split}.parquet")
        with pytest.raises(ValueError, match=r"columns \['img', 'label'\]: rename two to image and label"):
            build_splits(TrainConfig(dataset="hf", data_dir=str(tmp_path / "renamed")))
        with pytest.raises(ValueError, match=r"Unknown split \"val\".*--val-split"):
            build_splits(TrainConfig(dataset="hf", data_dir=str(tmp_path / "plain"), val_split="val"))
        with pytest.raises(ValueError, match="datasets cannot open.*--train-split"):
            build_splits(TrainConfig(dataset="hf", data_dir=str(tmp_path / "cache")))

    def test_a_null_image_is_one_that_cannot_be_read(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        images = [None if i == 2 else {"bytes": b"" if i == 3 else _jpeg(i), "path": None} for i in range(5)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        for split in ("train", "validation"):
            data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1, 0]}, features=features)
            data.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
        config = TrainConfig(dataset="hf", data_dir=str(tmp_path / "data"), image_size=16, batch_size=5, workers=0)
        data = build_splits(config)
        (batch,) = eval_loader(config, data.val)
        assert batch.labels.tolist() == [0, 1, 0]
        assert [line.split("image ")[1][0] for line in batch.problems] == ["2", "3"]
        assert "neither bytes nor a path" in batch.problems[0]
        assert len(next(iter(train_loader(config, data.train))).images) == 5

    def test_a_column_of_no_images_is_refused(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]}).to_parquet(
            str(tmp_path / "data" / "train.parquet")
        )
        with pytest.raises(UserError, match="the column image holds no images"):
            open_source(TrainConfig(dataset="hf", data_dir=str(tmp_path / "data")), True)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (["cat", "dog"], "not .'cat', 'dog'.*class_encode_column"),
            ([[0], [1]], r"not \[\[0\]"),
            ([0, 2**62], "not"),
        ],
    )
    def test_labels_that_are_no_class_numbers_are_refused(self, tmp_path, monkeypatch, labels, message):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        data = datasets.Dataset.from_dict({"image": [_jpeg(0)] * 2, "label": labels})
        data.to_parquet(str(tmp_path / "data" / "train.parquet"))
        with pytest.raises(UserError, match=f"labels must be integers from 0, below 10,000,000, {message}"):
            open_source(TrainConfig(dataset="hf", data_dir=str(tmp_path / "data")), True)

    def test_files_with_other_columns_are_refused(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        for number, name in enumerate(("label", "fine_label")):
            data = datasets.Dataset.from_dict({"image": [_jpeg(0)], name: [0]})
            data.to_parquet(str(tmp_path / "data" / f"train-{number}.parquet"))
        with pytest.raises(UserError, match="datasets cannot open .*column names don't match") as caught:
            open_source(TrainConfig(dataset="hf", data_dir=str(tmp_path / "data")), True)
        assert "\n" not in str(caught.value)

    def test_unlabelled_images_are_refused(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        for split, labels in (("train", [0, 1, 3]), ("validation", [0, -1, -1])):
            columns = {"image": [{"bytes": _jpeg(0), "path": None}] * 3, "label": labels}
            features = {"image": datasets.Image(), "label": datasets.Value("int64")}
            data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            data.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
        config = TrainConfig(dataset="hf", data_dir=str(tmp_path / "data"))
        with pytest.raises(ValueError, match=r"split validation: labels must be integers from 0.*-1"):
            build_splits(config)
        numbered = build_splits(TrainConfig(**(vars(config) | {"val_split": "train"})))
        assert numbered.classes == ("0", "1", "2", "3")


def _evil(path, kind: str):
    with tarfile.open(path, "w") as archive:
        if kind == "parent":
            _add(archive, "../evil.txt", b"evil")
        elif kind == "absolute":
            _add(archive, str(path.parent / "evil.txt"), b"evil")
        else:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, str(path.parent)
            archive.addfile(info)
            _add(archive, "link/evil.txt", b"evil")
    return path


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
@pytest.mark.parametrize("unpack", ["torchvision", "tarfile"])
def test_no_archive_writes_outside_its_folder(tmp_path, kind, unpack):
    archive = _evil(tmp_path / "evil.tar", kind)
    inside = tmp_path / "inside"
    inside.mkdir()

    def extract():
        if unpack == "torchvision":
            torchvision.datasets.utils.extract_archive(str(archive), str(inside))
        else:  # as releases of torchvision do that know no filters
            with tarfile.open(archive) as opened:
                opened.extractall(inside)

    before = tarfile.TarFile.extraction_filter
    with nothing_outside():
        if kind == "absolute":
            extract()  # below the folder, without its first slash
        else:
            with pytest.raises(tarfile.FilterError):
                extract()
    assert not (tmp_path / "evil.txt").exists()
    assert tarfile.TarFile.extraction_filter is before
    if unpack == "tarfile" and sys.version_info < (3, 14):  # later Pythons filter by themselves
        extract()
        assert (tmp_path / "evil.txt").exists()  # so the archive is one that does it


def test_downloads_are_unpacked_under_that_guard(tmp_path, monkeypatch):
    archive = _evil(tmp_path / "evil.tar", "parent")

    class Downloading(torch.utils.data.Dataset):
        def __init__(self, root, train, download):
            assert download
            with tarfile.open(archive) as opened:
                opened.extractall(root)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloading)
    (tmp_path / "data").mkdir()
    with pytest.raises(tarfile.FilterError, match="outside the destination"):
        build_splits(TrainConfig(dataset="cifar10", data_dir=str(tmp_path / "data"), download=True))
    assert not (tmp_path / "evil.txt").exists()


def test_torchvisions_folders_without_their_lists_are_named(tmp_path):
    for name in ("images", "annotations"):
        (tmp_path / "oxford-iiit-pet" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="pets is not in data_dir=.*trainval.txt.*--download"):
        open_source(TrainConfig(dataset="pets", data_dir=str(tmp_path)), True)


def test_torchvisions_unreadable_images_are_named(tmp_path):
    class Broken(torch.utils.data.Dataset):
        classes = ("a",)

        def __getitem__(self, index):
            return Image.open(io.BytesIO(b"text")), 0

    source: Source = TorchvisionSource(Broken(), "pets")
    with pytest.raises(Unreadable, match="pets, image 3: UnidentifiedImageError"):
        source[3]
