"""The emergence experiment: its protocol, its statistics, and its smoke size, interrupted and killed once."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from image_data import encoded, write_tar, write_tree
from PIL import Image
from runs import ROOT, same, wait_until, without_figures

from crate_fast import cli
from crate_fast.errors import UserError
from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.results import markdown_table
from crate_fast.eval.emergence import figures as figures_module
from crate_fast.eval.emergence import report as report_module
from crate_fast.eval.emergence import runs as runs_module
from crate_fast.eval.emergence.command import main
from crate_fast.eval.emergence.data import PhotographData, prepare_photographs
from crate_fast.eval.emergence.protocol import MODELS, ORDER, SIZES, Protocol, Run, settings_table
from crate_fast.eval.emergence.results import Results, at_accuracy, at_checkpoint, held_out_accuracies
from crate_fast.eval.emergence.runs import Folders, Job, Resources, train_and_score
from crate_fast.train.data import build_splits
from crate_fast.train.distributed import process_group
from crate_fast.train.faults import Interruption, NonFiniteError
from crate_fast.train.trainer import Trainer

SCENES, PHOTOGRAPHS = SIZES["shape_scenes"], SIZES["photographs"]
SMOKE = SCENES["smoke"]
ON_CPU = {"device": "cpu", "threads": 1, "workers": 0}


@pytest.mark.parametrize("size", SCENES)
def test_models_differ_only_in_the_ablation(size):
    protocol = SCENES[size]
    for number, stage in enumerate(protocol.stages):
        assert protocol.training_config(Run("scenes", "ViT", 0), number, 1e-3).keep_checkpoints >= stage.steps
        configs = {m: vars(protocol.training_config(Run("scenes", m, 0), number, 1e-3)) for m in MODELS}
        for model, config in configs.items():
            differing = {name: value for name, value in config.items() if value != configs["CRATE"][name]}
            assert differing == MODELS[model]
    points = protocol.points
    assert points[0].step == points[0].images == 0
    assert points[-1].images == sum(stage.steps * stage.batch_size for stage in protocol.stages)
    assert [p.images for p in points] == sorted({p.images for p in points})
    if size != "smoke":  # enough patches for masks
        assert protocol.image_size // protocol.patch_size >= 16


@pytest.mark.parametrize(("able", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_processor_without_bf16_products_trains_in_fp32(able, precision, monkeypatch):
    monkeypatch.setattr(runs_module, "multiplies_bf16", lambda: able)
    resources = Resources("cpu", 1)
    run = Run("photographs", "CRATE", 0)
    assert PHOTOGRAPHS["small"].training_config(run, 0, 1e-3, **resources.settings).precision == precision
    assert str(resources).endswith(", fp32") is not able


@pytest.mark.parametrize(
    ("data", "page"), [("shape_scenes", "protocol.md"), ("photographs", "photographs/protocol.md")]
)
def test_the_page_of_a_protocol_has_its_settings_and_every_size_several_seeds(data, page):
    assert markdown_table(settings_table(data)) in (ROOT / "docs" / "emergence" / page).read_text()
    for size, protocol in SIZES[data].items():
        assert protocol.models == (ORDER if data == "photographs" else tuple(MODELS))
        assert all(stage.steps % stage.checkpoints == 0 for stage in protocol.stages)
        assert size == "smoke" or len(protocol.seeds) >= 3
        assert Protocol.of_settings(json.loads(json.dumps(protocol.settings()))) == protocol


def test_runs_have_different_names_and_are_ordered_by_seed():
    runs = SCENES["small"].planned_runs()
    assert len({run.name for run in runs}) == len(runs) == 15 + 15 + 15
    assert [run.seed for run in runs if run.kind == "scenes"] == [0] * 5 + [1] * 5 + [2] * 5


def checkpoint(best: float, heads: list[float], selected: list[float], layers: int = 2) -> dict:
    """Return a checkpoint whose heads score `heads` on test and `selected` on selection scenes; layer 1 has half."""

    def rows(values: list[float]) -> dict:
        halves = [(i, i + 1) for i in range(layers)]
        found = [{"layer": i, "best_head": best / n, "per_head": [v / n for v in values]} for i, n in halves]
        baselines = {"constant": 0.1, "random": 0.12, "mean_mask": 0.3, "true_mask": 0.6}
        return {threshold: {"layers": found, **baselines} for threshold in ("ap", "mass", "topk")}

    return {"default_layer": 1, "test": rows(heads), "selection": rows(selected), "accuracy": 0.5}


def results_with(scores: dict[str, list[float]]) -> Results:
    """Return results with the given primary scores at the default layer, in percent, for each model and seed."""
    results = {}
    for model, values in scores.items():
        for seed, value in zip(SMOKE.seeds, values, strict=False):
            untrained = checkpoint(0.3, [0.1, 0.2], [0.2, 0.1])
            trained = checkpoint(2 * value / 100, [0.1, 0.2], [0.2, 0.1])
            result = {"kind": "scenes", "checkpoints": [untrained, trained]}
            results[f"scenes-{model}-seed{seed}"] = result
    return Results(results, SMOKE)


def test_the_fixed_head_is_chosen_on_the_selection_scenes():
    result = results_with({model: [40.0, 40.0] for model in MODELS}).runs["scenes-CRATE-seed0"]
    score = at_checkpoint("AP, fixed head")(result)
    assert score == pytest.approx(100 * 0.1 / 2)  # head 0 is best on selection scenes, head 1 on test scenes
    assert at_checkpoint("mIoU mass, best head")(result) == pytest.approx(40.0)
    assert at_checkpoint("mIoU mass, best head", layer="chosen")(result) == pytest.approx(80.0)  # layer 0


def test_claims_hold_for_good_scores_only():
    scores = {"CRATE-MLP": [45, 46], "CRATE-MHSA": [40, 41], "CRATE-sth": [9, 9]}
    good = results_with(scores | {"CRATE": [50, 51], "ViT": [20, 21.1]})
    assert [claim.holds for claim in good.claims()] == [True] * 5
    bad = results_with(scores | {"CRATE": [20, 10], "ViT": [32, 33]})
    assert [claim.holds for claim in bad.claims()] == [False] * 5
    noisy = {"CRATE": [60, 31], "CRATE-MLP": [45, 30], "CRATE-MHSA": [40, 29], "ViT": [20, 28]}
    noisy = results_with(scores | noisy)
    assert [claim.holds for claim in noisy.claims()] == [True, True, False, True, True]


def test_a_seed_is_compared_only_if_every_model_has_it():
    results = results_with({model: [40.0, 41.0] for model in MODELS})
    del results.runs["scenes-ViT-seed1"]
    assert results.by_seed("CRATE", at_checkpoint("mIoU mass, best head")) == pytest.approx([40.0])
    assert results.claims()[2].holds is None  # one seed has no interval
    assert not results.complete


@pytest.mark.parametrize(("mhsa", "order"), [(41.0, None), (39.0, False)])
def test_a_model_that_lacks_seeds_of_crate_and_vit_is_left_out(mhsa, order):
    scores = {"CRATE": [50, 51], "CRATE-MLP": [45], "CRATE-MHSA": [mhsa, mhsa], "ViT": [40, 40], "CRATE-sth": [9, 9]}
    results = results_with(scores)
    assert (results.models, results.seeds()) == (["CRATE", "CRATE-MHSA", "ViT", "CRATE-sth"], [0, 1])
    claim = results.claims()[-1]
    assert claim.holds is order
    assert "without CRATE-MLP" in claim.evidence
    assert not results.complete


@pytest.mark.parametrize(("accuracies", "best"), [([0.3], None), ([0.3, 0.4], 2e-3), ([0.3, 0.3], 1e-3)])
def test_the_learning_rate_is_that_of_the_best_sweep(accuracies, best):
    ends = [{"validation": [{"val_accuracy": 0.9}, {"val_accuracy": accuracy}]} for accuracy in accuracies]
    sweeps = {f"sweep-ViT-lr0.00{number}": end for number, end in enumerate(ends, start=1)}
    assert Results(sweeps, PHOTOGRAPHS["smoke"]).chosen_lr("ViT") == best


def test_a_diverged_sweep_is_not_chosen_and_any_other_diverged_run_fails(tmp_path, monkeypatch):
    def diverges(_config, _options):
        raise NonFiniteError("the loss is not finite")

    monkeypatch.setattr(runs_module, "launch", diverges)
    folders = Folders(tmp_path / "runs", tmp_path / "report")
    protocol = PHOTOGRAPHS["smoke"]
    sweep = Job(Run("sweep", "ViT", 100, 2e-3), 2e-3, protocol, folders, ON_CPU, {"commit": "abc"})
    train_and_score(sweep)
    results = Results.load(folders.report, protocol)
    assert results.runs["sweep-ViT-lr0.002"]["diverged"] == "the loss is not finite"
    results.runs["sweep-ViT-lr0.001"] = {"validation": [{"val_accuracy": 0.1}]}
    assert results.chosen_lr("ViT") == 1e-3
    with pytest.raises(NonFiniteError):
        train_and_score(sweep._replace(run=Run("photographs", "ViT", 0)))


def options(output: Path) -> list[str]:
    """Return the options of the smoke size."""
    return ["--size", "smoke", "--output", str(output), "--device", "cpu", "--jobs", "2"]


def report_again(report: Path, size: str = "smoke") -> str:
    """Write the report again from its folder; return its text."""
    assert main(["--size", size, "--report-only", "--report", str(report)]) == 0
    return (report / "report.md").read_text()


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished report's folder."""
    return shutil.copytree(finished[0] / "report", tmp_path / "report")


@pytest.fixture
def undrawn(monkeypatch):
    """A report without figures."""
    monkeypatch.setattr(report_module, "draw", lambda *_: {})


def job_without_figures(job: Job) -> None:
    """Do a job, in its own process, without the figures of its training runs."""
    without_figures()
    runs_module._run_job(job)


@pytest.fixture(scope="module", autouse=True)
def _quick_jobs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "_run_job", job_without_figures)
        yield


def jobs_of(output: Path) -> list[str]:
    """Return the names of the runs whose jobs hold their locks."""
    found = []
    for path in (output / "locks").glob("*/.lock"):
        with path.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                found.append(path.parent.name)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of the smoke size, interrupted once and killed once, and the results it had when it was killed."""
    output = tmp_path_factory.mktemp("emergence")
    results = output / "report" / "results"
    command = [sys.executable, "-m", "crate_fast.cli", "reproduce", "emergence", *options(output)]  # as a user does
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **popen)
    wait_until(lambda: len(list(results.glob("*.json"))) >= 2, process)
    os.killpg(process.pid, signal.SIGTERM)  # as from a job scheduler: the runs get it too
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert "the same command continues" in text
    process = runs_module._FORKSERVER.Process(target=cli.main, args=(command[3:],))
    process.start()
    started = output / "runs" / "scenes-CRATE-seed0" / "stage0" / "checkpoints"
    wait_until(lambda: started.is_dir() and any(started.iterdir()))
    assert jobs_of(output)
    process.kill()
    process.join()
    before = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    wait_until(lambda: not jobs_of(output), seconds=60)  # no job outlives its parent
    with pytest.MonkeyPatch.context() as patch:  # a test below draws figures
        for name in ("image_grid", "curve_figure"):
            patch.setattr(figures_module, name, lambda *_, **__: None)
        assert main(options(output)) == 0
    return output, before


def test_a_killed_experiment_continues_and_repeats_no_run(finished):
    output, before = finished
    results = {path.name: path.stat().st_mtime_ns for path in (output / "report" / "results").glob("*.json")}
    assert len(before) >= 4  # the sweeps; the last may still run
    assert before.items() <= results.items()
    assert set(results) == {f"{run.name}.json" for run in SMOKE.planned_runs(cifar10=False)}
    scored = json.loads((output / "report" / "results" / "scenes-CRATE-seed0.json").read_text())
    points = [(row["stage"], row["step"], row["images"]) for row in scored["checkpoints"]]
    assert points == [(0, 0, 0), (0, 8, 128), (1, 2, 160)]
    assert [(entry["stage"], entry["step"]) for entry in scored["validation"]] == [(0, 4), (0, 8), (1, 2)]
    assert not list((output / "report").glob("**/.*"))
    later = (output / "runs" / "scenes-CRATE-seed0" / "stage1" / "config.yaml").read_text()
    assert f"init: {output / 'runs' / 'scenes-CRATE-seed0' / 'stage0'}@8" in later
    assert "image_size: 64" in later


def test_the_report_is_made_from_the_results_alone(finished, copied):
    text = (copied / "report.md").read_text()
    (copied / "report.md").unlink()
    assert report_again(copied) == text
    assert text.count("](figures/") == len(list((copied / "figures").glob("*.png"))) == 10
    assert "15 of 15, CIFAR-10's left out" in text
    assert str(finished[0]) not in text


def test_a_report_includes_the_discussion_and_only_complete_seeds(copied, undrawn):
    (copied / "results" / "scenes-ViT-seed0.json").unlink()
    (copied / "discussion.md").write_text("## What did not reproduce\n\nIt is a smoke test.\n")
    text = report_again(copied)
    assert "14 of 15" in text
    assert "so far**" in text
    assert "| seeds compared | 1 |" in text
    assert "It is a smoke test." in text
    assert "left out, without these seeds" not in text
    (copied / "results" / "scenes-CRATE-MLP-seed1.json").unlink()
    assert "| models left out, without these seeds | CRATE-MLP |" in report_again(copied)


def test_runs_on_cifar10_are_in_the_report(copied, tmp_path, undrawn):
    for split, count in (("train", 13), ("test", 2)):
        for label in range(10):
            folder = tmp_path / "cifar10" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (25 * label, 10 * number, 99)).save(folder / f"{number}.png")
    run, origin = Run("cifar10", "CRATE", 0), {"device": "cpu", "commit": "abc", "torch": "2"}
    folders = Folders(tmp_path / "runs", copied, tmp_path / "cifar10")
    train_and_score(Job(run, 1e-3, SMOKE, folders, ON_CPU, origin))
    result = Results.load(copied, SMOKE).runs[run.name]
    assert [entry["step"] for entry in result["validation"]] == [1]
    for other in SMOKE.planned_runs()[15:]:
        folders.result(other).write_text(json.dumps(result | {"model": other.model, "seed": other.seed}))
    text = report_again(copied)
    assert "25 of 25" in text
    assert "CIFAR-10 is missing" not in text


def test_the_untrained_model_has_the_runs_initial_weights(finished, tmp_path):
    output, _ = finished
    config = SMOKE.training_config(Run("scenes", "ViT", 1), 0, 1e-3, device="cpu")
    with process_group("cpu") as processes, Interruption() as interruption:
        trainer = Trainer(config, tmp_path / "run", build_splits(config), processes, interruption)
    twin = open_model(f"{output}/runs/scenes-ViT-seed1/stage0@untrained", seed=1)
    assert same(twin.model.state_dict(), trainer.model.state_dict())


def test_a_failed_run_is_named_and_the_other_results_are_kept(finished, tmp_path, capsys):
    output, _ = finished
    copy = shutil.copytree(output, tmp_path / "copy")
    (copy / "report" / "results" / "scenes-ViT-seed1.json").unlink()
    scores = copy / "scores" / "scenes-ViT-seed1" / "records-0.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:-1]))  # all but the last checkpoint's
    for weights in (copy / "runs" / "scenes-ViT-seed1" / "stage1").glob("checkpoints/*/model.safetensors"):
        weights.write_bytes(b"damaged")
    assert main(["--size", "smoke", "--output", str(copy), "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "scenes-ViT-seed1 ended with status 1" in message
    assert "scenes-ViT-seed1.txt" in message
    assert len(list((copy / "report" / "results").glob("*.json"))) == 14


def learning(accuracies: list[float], scores: list[float]) -> dict:
    """Return a result with scores and held-out accuracies in percent at steps 4, 8, …; at step 0 they are 0 and 5."""
    steps = [4 * number for number in range(len(scores) + 1)]
    found = [checkpoint(score / 100, [0.5], [0.5], 1) for score in (0.0, *scores, 99.0)]
    wheres = [{"stage": 0, "step": step, "default_layer": 0, "accuracy": 0.05} for step in steps]
    wheres += [{"stage": 1, "step": 4}]
    entries = [*((0, step, value / 100) for step, value in zip(steps[1:], accuracies, strict=True)), (1, 4, 1.0)]
    validation = [dict(zip(("stage", "step", "val_accuracy"), entry, strict=True)) for entry in entries]
    return {"checkpoints": [a | b for a, b in zip(found, wheres, strict=True)], "validation": validation}


def test_scores_at_an_accuracy_are_interpolated_between_checkpoints_of_the_first_stage():
    result = learning([10.0, 20.0, 18.0, 30.0], [40.0, 60.0, 70.0, 80.0])
    assert held_out_accuracies(result) == pytest.approx({0: 5.0, 1: 10.0, 2: 20.0, 3: 18.0, 4: 30.0})
    found = [at_accuracy("AP, best head", accuracy)(result) for accuracy in (7.5, 15.0, 20.0, 24.0, 5.0, 31.0)]
    assert found[:4] == pytest.approx([20.0, 50.0, 60.0, 75.0])
    assert found[4:] == [None, None]
    runs = {f"scenes-{model}-seed{seed}": result for model in MODELS for seed in SMOKE.seeds}
    assert Results(runs, SMOKE).common_accuracy() == pytest.approx(30.0)
    runs["scenes-ViT-seed1"] = learning([10.0, 25.0], [10.0, 20.0])
    assert Results(runs, SMOKE).common_accuracy() == pytest.approx(25.0)
    runs["scenes-CRATE-sth-seed0"] = learning([10.0, 12.0], [10.0, 20.0])
    assert Results(runs, SMOKE).common_accuracy() == pytest.approx(25.0)


@pytest.mark.parametrize("folder", [".", "earlier/first", "photographs"])
def test_the_committed_reports_follow_from_their_results(folder, tmp_path, monkeypatch):
    report = shutil.copytree(ROOT / "docs" / "emergence" / folder, tmp_path / "report")
    text = (report / "report.md").read_text()
    figures = [Path(name) for name in re.findall(r"!\[[^]]*\]\((figures/.*?)\)", text)]
    monkeypatch.setattr(report_module, "draw", lambda *_: {path.stem: path for path in figures})
    assert report_again(report, "small") == text
    assert all((report / path).is_file() for path in figures)


def test_results_of_another_protocol_are_refused(finished, monkeypatch, capsys):
    output, _ = finished
    other = dataclasses.replace(SMOKE, weight_decay=0.1)
    monkeypatch.setitem(SCENES, "smoke", other)
    assert main(["--size", "smoke", "--output", str(output)]) == 2
    assert "weight_decay: 0.05 there, 0.1 now" in capsys.readouterr().err


def test_a_report_without_results_and_a_missing_cifar10_are_errors(finished, tmp_path, refuses):
    refuses("holds no protocol.json", main, ["--size", "smoke", "--report-only", "--report", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
    shutil.copy(finished[0] / "report" / "protocol.json", tmp_path)
    words = ["--report-only", "--report", str(tmp_path)]
    refuses("does not hold runs of CRATE and ViT", main, ["--size", "smoke", *words])
    refuses("another --size than small: pass --size smoke", main, ["--size", "small", *words])
    words = ["--size", "smoke", "--cifar10", str(tmp_path), "--output", str(tmp_path)]
    refuses("holds neither train/", main, words)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Folder of noise images in two classes: a training tar, a validation folder with boxes, and COCO's masks."""
    root = tmp_path_factory.mktemp("photographs")
    pictures = [encoded(Image.effect_noise((32, 32), 60 + i).convert("RGB")) for i in range(10)]
    folders = {"train/cat": 10, "train/dog": 10, "val/cat": 6, "val/dog": 6}
    files = {f"{folder}/{i}.png": pictures[i] for folder, count in folders.items() for i in range(count)}
    write_tree(root, {name: content for name, content in files.items() if name.startswith("val/")})
    write_tar(root / "train.tar", [(name.removeprefix("train/"), c) for name, c in files.items() if name[0] == "t"])
    names = [name.removeprefix("val/") for name in files if name.startswith("val/")]
    images = [{"id": i, "file_name": name, "width": 32, "height": 32} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 16, 10 + i]} for i in range(len(names))]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (root / "val_boxes.json").write_text(json.dumps(content))
    masks = [b | {"segmentation": [[4, 4, 20, 4, 20, 14, 4, 14]], "area": 160, "iscrowd": 0} for b in boxes]
    write_tree(root / "coco" / "val2017", {name: files[f"val/{name}"] for name in names})
    (root / "coco" / "instances_val2017.json").write_text(json.dumps(content | {"annotations": masks}))
    return root


def on_photographs(folder: Path, output: Path) -> list[str]:
    data = ["--data", f"photographs:{folder}", "--masks", f"coco:{folder / 'coco'}"]
    return ["--size", "smoke", *data, "--output", str(output), "--device", "cpu"]


def test_the_experiment_on_photographs_ends_in_a_report(photographs, tmp_path, capsys):
    command = on_photographs(photographs, tmp_path / "run")
    assert main([*command, "--minutes", "0.0001"]) == 0
    assert "the same command continues" in capsys.readouterr().out
    assert main(command) == 0
    data, report = tmp_path / "run" / "data", tmp_path / "run" / "report"
    halves = [{p.name for p in (data / split / "cat").iterdir()} for split in ("selection", "test")]
    assert halves == [{"0.png", "2.png", "4.png"}, {"1.png", "3.png", "5.png"}]
    assert len(list((data / "train").glob("*/*.png"))) == 20
    result = json.loads((report / "results" / "photographs-ViT-seed0.json").read_text())
    first, middle, last = result["checkpoints"]
    assert ["boxes" in checkpoint for checkpoint in (first, middle, last)] == [True, False, True]
    assert all(c["masks"]["ap"]["images"] == 2 and "0" in c["maskcut"] for c in (first, middle, last))
    assert result["protocol"]["stages"][0]["images"] == 20
    text = (report / "report.md").read_text()
    for words in ("at equal accuracy", "mean box", "## Boxes from attention", "## MaskCut", "12 of 12"):
        assert words in text
    assert text.count("](figures/") == len(list((report / "figures").glob("*.png"))) == 9
    assert str(tmp_path) not in text


def test_photographs_are_chosen_by_the_area_of_their_boxes(photographs, tmp_path):
    prepare_photographs(photographs, None, None, tmp_path / "data")
    protocol = dataclasses.replace(PHOTOGRAPHS["smoke"], coverage=(0.0, 0.3))
    data = PhotographData(protocol, tmp_path / "data")
    covered = [16 * (10 + i) / 1024 for i in (*range(1, 6, 2), *range(7, 12, 2))]  # the test half, cats then dogs
    samples = list(data.test)
    assert [float(s.target.masks.float().mean()) for s in samples] == [c for c in covered if c <= 0.3]
    assert [s.target.classes for s in samples] == [[0], [0], [0], [1], [1]]
    assert len(data.classified) == 6
    assert data.with_masks is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data", "photographs:{tmp}/none"], "a folder with train and val"),
        (["--data", "photos"], "write shape_scenes, or photographs:DIR"),
        (["--masks", "voc:{data}"], "write coco:PATH"),
        (["--boxes", "{tmp}/none.json"], "name the boxes"),
        (["--cifar10", "{data}"], "belongs to --data shape_scenes"),
    ],
)
def test_missing_photographs_are_errors(photographs, tmp_path, refuses, change, words):
    change = [word.format(tmp=tmp_path, data=photographs) for word in change]
    refuses(words, main, [*on_photographs(photographs, tmp_path / "run"), *change])


def test_other_photographs_need_another_folder(photographs, tmp_path):
    prepare_photographs(photographs, None, None, tmp_path / "data")
    assert prepare_photographs(photographs, None, None, tmp_path / "data") == 20
    with pytest.raises(UserError, match="other photographs"):
        prepare_photographs(photographs, None, f"coco:{photographs / 'coco'}", tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "few").mkdir()
    shutil.copytree(photographs / "val" / "cat", tmp_path / "few" / "val" / "cat")
    shutil.copytree(photographs / "val", tmp_path / "few" / "train")
    with pytest.raises(UserError, match="must have the classes of train.*dog"):
        prepare_photographs(tmp_path / "few", photographs / "val_boxes.json", None, tmp_path / "data")
