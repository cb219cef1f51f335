"""Sweeps over layers, checkpoints and models; tables; results; the command line and its errors."""

import errno
import importlib
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from image_data import write_coco
from torch.utils.data import DataLoader, Dataset

from crate_fast import cli
from crate_fast.errors import UserError, run_command
from crate_fast.eval import by_epoch, by_layer, coarse_segmentation, comparison, maskcut
from crate_fast.eval.common.command import Evaluation
from crate_fast.eval.common.images import open_images
from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.results import Records
from crate_fast.eval.emergence.command import main as emergence
from crate_fast.eval.white_box import main as white_box
from crate_fast.options import parse

UNTRAINED = "crate_tiny_patch8_224@untrained"
SMALL = ["--model-args", "depth=3", "dim=32", "heads=2", "img_size=32"]


def _results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of COCO images and boxes; in its folder `crowds` all annotations are crowds."""
    root = write_coco(tmp_path_factory.mktemp("coco"))
    file = write_coco(root / "crowds") / "instances_val2017.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    file.write_text(json.dumps(content))
    return root


def test_every_layer_has_the_scores_of_its_own_evaluation(data):
    subject = open_model(UNTRAINED, image_size=64, model_args=SMALL[1:])
    images = open_images(f"coco:{data}", 64)
    rows = by_layer.evaluate(subject, images, batch_size=4)
    assert list(rows) == [0, 1, 2]
    assert list(by_layer.evaluate(subject, images, [-1], batch_size=4)) == [2]
    coarse = coarse_segmentation.evaluate(subject, images, batch_size=4)
    for layer in rows:
        alone = maskcut.evaluate(subject, images, [layer])[layer]
        assert rows[layer]["mask AP"] == pytest.approx(100 * alone["segm"]["AP"])
        assert rows[layer]["box AR100"] == pytest.approx(100 * alone["bbox"]["AR100"])
        for reading, name in (("topk", "mIoU topk"), ("mass", "mIoU mass"), ("ap", "attention AP")):
            scores = coarse[reading]
            assert rows[layer][name] == pytest.approx(100 * scores["layers"][layer]["best_head"])
            assert rows[layer][f"random {name}"] == pytest.approx(100 * scores["random"])
            assert rows[layer][f"mean mask {name}"] == pytest.approx(100 * scores["mean_mask"])
    titles = [[curve.label for curve in panel] for panel in by_layer.curves({"A": rows}).values()]
    assert titles == [["A"]] * 2 + [["A", "mean mask", "random maps", "constant mask"]] * 3
    assert len({row["mIoU mass"] for row in rows.values()}) == 3


@pytest.mark.usefixtures("unsaved_figures")
def test_by_layer_and_by_epoch_agree_on_the_last_checkpoint(data, tmp_path, tiny_run, refuses):
    common = ["--data", f"coco:{data}", "--image-size", "64", "--limit", "2"]
    assert by_layer.main([f"tiny={tiny_run}@8", *common, "--output", str(tmp_path / "layers")]) == 0
    layers = _results(tmp_path / "layers")["results"]["tiny"]
    assert list(layers) == ["0", "1"]
    assert by_epoch.main([str(tiny_run), *common, "--output", str(tmp_path / "epochs")]) == 0
    rows = _results(tmp_path / "epochs")["results"]["rows"]
    assert [(row.pop("step"), row.pop("epoch")) for row in rows] == [(0, 0.0), (4, 1.0), (8, 2.0)]
    assert rows[-1] == layers["0"]  # the default layer
    assert (tmp_path / "layers" / "by_layer.png").exists()
    assert (tmp_path / "epochs" / "components.pdf").exists()
    refuses("--steps 5", by_epoch.main, [str(tiny_run), *common, "--steps", "5"])
    refuses("holds no checkpoints", by_epoch.main, [str(tmp_path), *common])


@pytest.mark.usefixtures("unsaved_figures")
def test_a_damaged_checkpoint_is_left_out_of_a_sweep(tmp_path, tiny_run, capsys, refuses):
    run = shutil.copytree(tiny_run, tmp_path / "run@4")
    arguments = [str(run), "--data", "shape_scenes", "--limit", "2", "--image-size", "32", "--measures", "coarse"]
    weights = next((run / "checkpoints").glob("*8/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    assert by_epoch.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    results = _results(tmp_path / "out")["results"]
    assert [row["step"] for row in results["rows"]] == [0, 4]
    assert "model.safetensors" in results["left_out"]["8"]
    assert capsys.readouterr().err.count("left out: step 8") == 1
    words = [*arguments, "--steps", "8", "--output", str(tmp_path / "none")]
    refuses(r"none of the steps \[8\] can be read", by_epoch.main, words)


CRATE = f"A={UNTRAINED} --model-args depth=2 dim=32 heads=2 img_size=32 num_classes=3"
NO_CLS = "vit_tiny_patch16_224@untrained --model-args depth=1 img_size=32 class_token=false global_pool=avg"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pca CRATE --data shape_scenes --threshold -1", "threshold=-1"),
        ("pca CRATE --data shape_scenes --image-size 16", "at least 3×3 patches"),
        ("pca CRATE --data shape_scenes --layers 0,2", "layer 2"),
        ("attention_maps CRATE --data shape_scenes --figure noise_sigma --heads best", "by number"),
        ("attention_maps CRATE --data shape_scenes --heads 2", "--heads 2: A has heads 0 to 1"),
        ("attention_maps CRATE --data folder:DATA --heads best", "needs object masks"),
        ("attention_maps CRATE --data shape_scenes --layer 2", "layers 0 to 1"),
        ("coarse_segmentation NO_CLS", "has no CLS token"),
        ("coarse_segmentation CRATE --data folder:DATA", "has no object masks"),
        ("coarse_segmentation A=crate_tiny_patch8_224@untrained CRATE", "two models are called"),
        ("coarse_segmentation A/8=runs/a A_8=runs/b", "two models are called 'A_8'"),
        ("localization CRATE --boxes DATA/instances_val2017.json", "must be folder:PATH"),
        ("localization CRATE --data folder:DATA", "has no boxes"),
        ("white_box CRATE --epsilon 0", "--epsilon 0.0"),
        ("white_box NO_CLS", "none of these models has subspaces or ISTA"),
        ("comparison CRATE --table table1", "pass --coco"),
        ("comparison CRATE --table table1 --coco coco:DATA --voc voc:DATA", "--voc has no effect on --table table1"),
        (
            "comparison CRATE --table figure4 --voc voc:DATA --image-size 9",
            "--image-size has no effect on --table figure4",
        ),
        ("comparison CRATE --table table2 --coco coco:DATA --voc voc:DATA", "no SegmentationClass folder"),
        ("comparison CRATE --table table2 --coco coco:DATA --voc coco:DATA --voc-size 9", "size 9"),
        ("by_layer CRATE --data folder:DATA", "maskcut needs coco:PATH or shape_scenes"),
        ("by_layer CRATE --data coco:DATA/crowds", "AP is undefined"),
        ("maskcut CRATE --data coco:DATA --image-size 8", "one patch cannot be cut: use larger images"),
        ("maskcut CRATE --data coco:DATA --device gpu", "choose auto, cpu"),
        pytest.param("maskcut CRATE --data coco:DATA --device cuda", "no GPU", marks=without_gpu),
        ("maskcut CRATE --data coco:DATA --model-args depht=2", "does not take --model-args"),
        ("maskcut CRATE --data coco:DATA --model-args in_chans=1", "expects images of 1 channels"),
        ("maskcut CRATE --data coco:DATA --output DATA/instances_val2017.json", "json cannot be created"),
        ("classify CRATE", "pass --dataset"),
        ("classify CRATE --dataset shape_scenes", "has 3 classes and the data set 12.*--protocol knn,linear"),
        ("classify CRATE --dataset shape_scenes --protocol svm", "--protocol 'svm'"),
        ("classify CRATE --dataset folder --data-dir absent", "does not exist"),
        ("classify CRATE --dataset shape_scenes --data-dir x", "--data-dir x has no effect"),
        ("classify CRATE --dataset shape_scenes --protocol linear --k 5", "--k has no effect without knn"),
        ("classify CRATE --dataset shape_scenes --protocol head --raw-pixels", "--raw-pixels has no effect"),
        ("classify CRATE --dataset shape_scenes --protocol head --pool mean", "--pool mean has no effect"),
        ("classify CRATE --dataset shape_scenes --protocol knn --train-samples 30 --k 5,31", "--k 31"),
        ("classify NO_CLS --dataset shape_scenes --protocol knn --pool cls", "pass --pool mean"),
    ],
)
def test_options_are_checked_before_a_model_is_scored(line, message, data, tmp_path, monkeypatch, refuses):
    line = line.replace("CRATE", CRATE).replace("NO_CLS", NO_CLS).replace("DATA", str(data))
    protocol, *words = line.split()
    module = importlib.import_module(f"crate_fast.eval.{protocol}")
    scoring = "maskcut" if protocol == "maskcut" else "evaluate"
    monkeypatch.setattr(module, scoring, lambda *_args, **_more: pytest.fail("a model was scored"))
    refuses(message, cli.main, ["eval", protocol, "--output", str(tmp_path), *words])


def test_weights_that_are_not_finite_are_an_error_when_opened(tmp_path):
    model = timm.create_model("crate_tiny_patch8_224", num_classes=3, depth=1)
    model.transformer.layers[0][0].fn.qkv.weight.data[0, 0] = float("inf")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth hold NaN or infinity"):
        open_model(f"crate_tiny_patch8_224@{tmp_path / 'w.pth'}", model_args=["depth=1"])


def test_the_comparison_has_the_papers_numbers_and_the_difference(data, tmp_path):
    models, data = [f"CRATE={UNTRAINED}", f"mine={UNTRAINED}", *SMALL], f"coco:{data}"
    arguments = [*models, "--table", "table2", "--coco", data, "--voc", data, "--output", str(tmp_path)]
    assert comparison.main([*arguments, "--limit", "2", "--image-size", "64"]) == 0
    rows, config = _results(tmp_path)["results"]["rows"], _results(tmp_path)["config"]
    assert (rows[0]["VOC mIoU paper"], rows[0]["COCO images"], rows[0]["VOC images"]) == (23.9, 2, 2)
    assert config["models for maskcut"][0]["image_size"] == [64, 64]
    assert config["models for coarse"][0]["image_size"] == [32, 32]
    assert rows[0]["VOC mIoU gap"] == pytest.approx(rows[0]["VOC mIoU"] - 23.9)
    assert rows[1]["VOC mIoU paper"] is None
    images = open_images(data, 32, limit=2)
    reading = coarse_segmentation.evaluate(open_model(UNTRAINED, image_size=32, model_args=SMALL[1:]), images)["mass"]
    at = next(row for row in reading["layers"] if row["layer"] == config["models for coarse"][0]["layer"])
    assert rows[0]["VOC mIoU, mass"] == pytest.approx(100 * at["best_head"])
    assert rows[0]["mean mask, mass"] == pytest.approx(100 * reading["mean_mask"])
    assert rows[0]["box AP"] == rows[1]["box AP"]
    for suffix in ("md", "csv"):
        assert "23.9" in (tmp_path / f"table2.{suffix}").read_text()


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("white_box runs/a A=runs/b --device cpu --workers 2", "white_box/runs_a+A_runs_b"),
        ("attention_maps runs/a --data coco:x --figure models", "attention_maps/runs_a/data=coco_x,figure=models"),
        ("pca runs/a --data folder:x --layers 0,3 --seed 1", "pca/runs_a/data=folder_x,seed=1,layers=0+3"),
        ("classify runs/a --raw-pixels --data-dir x/y", "classify/runs_a/data_dir=x_y,raw_pixels=True"),
        ("comparison runs/a --table figure4 --voc voc:x", "comparison/runs_a/table=figure4,voc=voc_x"),
    ],
)
def test_the_default_folder_is_named_after_models_and_options(line, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    protocol, *words = line.split()
    evaluation = Evaluation(protocol, parse(f"eval {protocol}", words), [])
    assert evaluation.folder == Path("runs/eval") / folder
    assert evaluation.folder.is_dir()


def test_long_names_have_different_default_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ("ä" * 200 + last for last in "ab")
    words = [["runs/a", "--data", f"folder:{path}"] for path in paths]
    folders = [Evaluation("pca", parse("eval pca", line), []).folder for line in words]
    assert len({*folders}) == 2


def test_nan_is_not_written_into_results(tmp_path):
    evaluation = Evaluation("x", Namespace(output=tmp_path, models=[], device="cpu"), [])
    with pytest.raises(ValueError, match="not JSON compliant"):
        evaluation.finish({"score": float("nan")})
    assert not (tmp_path / "results.json").exists()
    evaluation.problems.append("b.jpg: broken")
    evaluation.finish({"score": 1.0}, {"a": 1})
    content = _results(tmp_path)
    assert (content["results"], content["config"]["a"]) == ({"score": 1.0}, 1)
    assert content["unreadable"] == {"count": 1, "images": ["b.jpg: broken"]}


def test_records_are_written_one_by_one(tmp_path):  # read after a kill: test_maskcut.py
    def failing():
        yield {"image_id": 5}
        raise RuntimeError("stopped")

    records = Records(tmp_path, {})
    with pytest.raises(RuntimeError, match="stopped"):
        records.append(failing())
    assert 5 in records.read()


def test_the_command_line_lists_and_dispatches(capsys):  # misspelt words: see test_options.py
    assert cli.main([]) == cli.main(["eval"]) == 0
    out = capsys.readouterr().out
    assert [name for name in cli.PROTOCOLS if f"\n  {name} " not in out] == []
    assert cli.main(["env"]) == 0
    assert "backend on cpu" in capsys.readouterr().out


def _raise(error):
    raise error


def test_errors_that_a_user_can_correct_are_one_line_and_bugs_have_a_traceback(capsys):
    class Broken(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, _index):
            raise UserError("8 images in a row, the last: a.jpg: OSError: cut short. Is the disk there?")

    assert run_command(lambda: next(iter(DataLoader(Broken(), num_workers=1)))) == 2
    expected = "error: 8 images in a row, the last: a.jpg: OSError: cut short. Is the disk there?\n"
    assert capsys.readouterr().err == expected
    for error, message in (
        (OSError(errno.ENOSPC, "the reason", "figure.png"), "figure.png: the reason: free some space"),
        (OSError(errno.EACCES, "the reason", "figure.png"), "figure.png: the reason: check its permissions"),
        (ModuleNotFoundError("", name="scipy.stats"), 'this needs the package scipy: pip install -e ".[eval]"'),
    ):
        assert run_command(_raise, error) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    for bug in (
        FileNotFoundError(errno.ENOENT, "not there"),
        ModuleNotFoundError("No module named 'numqy'", name="numqy"),
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
    ):
        with pytest.raises(type(bug)):
            run_command(_raise, bug)


def test_tables_that_cannot_be_written_are_printed_with_an_error(tmp_path, monkeypatch, capsys):
    def full(_path, _text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("crate_fast.eval.common.command.write_text", full)
    assert white_box([UNTRAINED, *SMALL, "--limit", "1", "--output", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "No space left on device: free some space" in captured.err
    assert "| model |" in captured.out


def test_a_missing_package_is_an_error_before_an_experiment(monkeypatch, refuses):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    message = r'needs the package pycocotools: pip install -e "\.\[eval\]"'
    refuses(message, emergence, ["--size", "smoke", "--output", "none"])
