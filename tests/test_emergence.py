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
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from image_data import encoded, write_tar, write_tree
from PIL import Image
from runs import ALONE, ROOT, same, wait_until, without_figures

from crate_fast import cli
from crate_fast.errors import UserError
from crate_fast.eval.common.images import SceneImages
from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.results import markdown_table
from crate_fast.eval.emergence import runs as runs_module
from crate_fast.eval.emergence.command import main
from crate_fast.eval.emergence.data import PhotographData, prepare_photographs
from crate_fast.eval.emergence.protocol import MODELS, SIZES, Protocol, Run
from crate_fast.eval.emergence.results import Results
from crate_fast.eval.emergence.runs import Folders, Job, train_and_score
from crate_fast.eval.emergence.scores import checkpoint_scores
from crate_fast.train.data.loader import build_splits
from crate_fast.train.faults import Interruption, NonFiniteError
from crate_fast.train.runs import run_config
from crate_fast.train.trainer import Trainer

SMOKE = SIZES["smoke"]
PAGES = ROOT / "docs" / "emergence" / "photographs"
ON_CPU = {"device": "cpu", "threads": 1, "workers": 0}


@pytest.mark.parametrize("size", SIZES)
def test_models_differ_only_in_the_ablation(size):
    protocol = SIZES[size]
    configs = {model: vars(protocol.training_config(Run(model, 0), 1e-3, Path("data"))) for model in MODELS}
    for model, config in configs.items():
        differing = {name: value for name, value in config.items() if value != configs["CRATE"][name]}
        assert differing == MODELS[model]
    steps = protocol.scored_steps
    assert steps == sorted({0, *steps})
    assert steps[-1] == protocol.images // protocol.batch_size * protocol.epochs
    assert steps[1:] == [configs["ViT"]["checkpoint_every"] * n for n in range(1, len(steps))]
    assert configs["ViT"]["keep_checkpoints"] >= steps[-1]


def test_the_page_of_the_protocol_has_its_settings():
    words = {size: protocol.in_words() for size, protocol in SIZES.items()}
    rows = [{"setting": f"`{name}`"} | {size: words[size][name] for size in words} for name in words["smoke"]]
    assert markdown_table(rows) in (PAGES / "protocol.md").read_text()
    for protocol in SIZES.values():
        assert Protocol.of_settings(json.loads(json.dumps(protocol.settings()))) == protocol
        runs = protocol.planned_runs()
        assert len({run.name for run in runs}) == len(runs)
        seeds = [run.seed for run in runs if not run.sweep]
        assert seeds == [seed for seed in protocol.seeds for _ in protocol.models]  # an early stop leaves whole seeds
    assert Protocol.of_settings(json.loads((PAGES / "protocol.json").read_text())) == SIZES["small"]


def results_with(scores: dict[str, list[float]]) -> Results:
    """Return results with the given primary scores in percent, for each model and seed; untrained ones have 15."""
    baselines = {"constant": 0.1, "random": 0.12, "mean_mask": 0.3, "true_mask": 0.6}

    def checkpoint(score: float) -> dict:
        found = {"layers": [{"layer": 0, "best_head": score}], **baselines}
        return {"default_layer": 0, "test": dict.fromkeys(("ap", "mass", "topk"), found)}

    results = {}
    for model, values in scores.items():
        for seed, value in enumerate(values):
            checkpoints = [checkpoint(score) for score in (0.15, value / 100)]
            results[Run(model, seed).name] = {"model": model, "checkpoints": checkpoints}
    return Results(results, dataclasses.replace(SMOKE, seeds=(0, 1)))


def test_claims_hold_for_good_scores_only():
    scores = {"CRATE-MLP": [45, 46], "CRATE-MHSA": [40, 41], "CRATE-alpha": [9, 9]}
    good = results_with(scores | {"CRATE": [50, 51], "ViT": [20, 21.1]})
    assert [claim.holds for claim in good.claims()] == [True] * 5
    bad = results_with(scores | {"CRATE": [20, 10], "ViT": [32, 33]})
    assert [claim.holds for claim in bad.claims()] == [False] * 5
    noisy = {"CRATE": [60, 31], "CRATE-MLP": [45, 30], "CRATE-MHSA": [40, 29], "ViT": [20, 28]}
    noisy = results_with(scores | noisy)
    assert [claim.holds for claim in noisy.claims()] == [True, True, False, True, True]


def test_the_learning_rate_is_that_of_the_best_sweep():
    for accuracies, best in (([0.3], None), ([0.3, 0.4], 2e-3), ([0.3, 0.3], 1e-3)):
        ends = [{"validation": [{"val_accuracy": 0.9}, {"val_accuracy": accuracy}]} for accuracy in accuracies]
        sweeps = {f"sweep-ViT-lr0.00{number}": end for number, end in enumerate(ends, start=1)}
        assert Results(sweeps, SMOKE).chosen_lr("ViT") == best


def test_a_diverged_sweep_is_not_chosen_and_any_other_diverged_run_fails(tmp_path, monkeypatch):
    def diverges(_config, _options):
        raise NonFiniteError("the loss is not finite")

    monkeypatch.setattr(runs_module, "launch", diverges)
    folders = Folders(tmp_path / "runs", tmp_path / "report")
    sweep = Job(Run("ViT", 100, 2e-3), 2e-3, SMOKE, folders, ON_CPU, {"commit": "abc"})
    train_and_score(sweep)
    results = Results.load(folders.report, SMOKE)
    assert results.runs["sweep-ViT-lr0.002"]["diverged"] == "the loss is not finite"
    results.runs["sweep-ViT-lr0.001"] = {"validation": [{"val_accuracy": 0.1}]}
    assert results.chosen_lr("ViT") == 1e-3
    with pytest.raises(NonFiniteError):
        train_and_score(sweep._replace(run=Run("ViT", 0)))


def test_unreadable_photographs_do_not_change_the_accuracy():
    loaded, scenes = open_model("shipped:CRATE"), SceneImages(128, 6)
    data = SimpleNamespace(
        test=scenes, selection=scenes, protocol=SimpleNamespace(maskcut_images=1), classified=scenes
    )
    found = checkpoint_scores(loaded, data)
    assert found["classified"] == 6
    data.classified = [*map(scenes.__getitem__, range(6)), dataclasses.replace(scenes[0], problem="broken")]
    assert checkpoint_scores(loaded, data) == found


# --- the committed report ---


def report_again(report: Path, size: str) -> str:
    assert main(["--size", size, "--report-only", "--report", str(report)]) == 0
    return (report / "report.md").read_text()


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Copy of the committed report, whose figures are not drawn again."""
    report = shutil.copytree(PAGES, tmp_path / "committed")
    figures = [Path(name) for name in re.findall(r"\((figures/.*?)\)", (report / "report.md").read_text())]
    assert all((report / path).is_file() for path in figures)
    monkeypatch.setattr("crate_fast.eval.emergence.report.draw", lambda *_: {path.stem: path for path in figures})
    return report


def test_the_committed_report_follows_from_its_results(committed):
    assert report_again(committed, "small") == (PAGES / "report.md").read_text()


def test_only_complete_seeds_are_compared(committed):
    (committed / "results" / "photographs-ViT-seed0.json").unlink()
    text = report_again(committed, "small")
    for words in ("22 of 24", "so far**", "| seeds compared | 1, 2 |"):
        assert words in text
    others = text.partition("## Not part of the comparison")[2]
    assert "| CRATE-alpha | 1 |" in others
    assert "| CRATE-MLP | 2 |" in others
    for model in ("CRATE", "ViT"):
        (committed / "results" / f"photographs-{model}-seed2.json").unlink()
    assert "| CRATE-MLP |" not in report_again(committed, "small").partition("## Not part of the comparison")[2]
    (committed / "results" / "photographs-CRATE-MLP-seed1.json").unlink()
    text, _, others = report_again(committed, "small").partition("## Not part of the comparison")
    assert "without CRATE-MLP" in text
    assert "| CRATE-MLP | 1 |" in others


# --- the smoke size ---


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Folder of noise images in two classes: a training tar, a validation folder with boxes, and COCO's masks."""
    root = tmp_path_factory.mktemp("photographs")
    pictures = [encoded(Image.effect_noise((32, 32), 60 + i).convert("RGB")) for i in range(10)]
    write_tar(root / "train.tar", [(f"{name}/{i}.png", pictures[i]) for name in ("cat", "dog") for i in range(10)])
    val = {f"{name}/{i}.png": pictures[i] for name in ("cat", "dog") for i in range(6)}
    images = [{"id": i, "file_name": name, "width": 32, "height": 32} for i, name in enumerate(val)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 16, 10 + i]} for i in range(len(val))]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    masks = [b | {"segmentation": [[4, 4, 20, 4, 20, 14, 4, 14]], "area": 160, "iscrowd": 0} for b in boxes]
    for folder in ("val", "coco/val2017"):
        write_tree(root / folder, val)
    (root / "val_boxes.json").write_text(json.dumps(content))
    (root / "coco" / "instances_val2017.json").write_text(json.dumps(content | {"annotations": masks}))
    return root


FEW = ["CRATE", "ViT"]  # with six of the twelve runs


def options(photographs: Path, output: Path) -> list[str]:
    data = ["--data", str(photographs), "--masks", f"coco:{photographs / 'coco'}"]
    return ["--size", "smoke", *data, "--output", str(output), "--device", "cpu", "--jobs", "2", "--models", *FEW]


def job_without_figures(job: Job) -> None:
    without_figures()  # of this job's process
    runs_module._run_job(job)


@pytest.fixture(scope="module", autouse=True)
def _quick_jobs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "_run_job", job_without_figures)
        patch.setattr(runs_module, "_POLL_SECONDS", 0.05)
        yield


def a_job_runs(output: Path) -> bool:
    """Return True if a job holds its lock."""
    for path in (output / "locks").glob("*/.lock"):
        with path.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
    return False


def _times(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "report" / "results").glob("*.json")}


@pytest.fixture(scope="module")
def finished(photographs, tmp_path_factory):
    """Folder of the smoke size, interrupted once and killed once, and the results it had when it was killed."""
    output = tmp_path_factory.mktemp("emergence")
    words = options(photographs, output)
    command = [sys.executable, "-m", "crate_fast.cli", "reproduce", "emergence", *words]  # as a user does
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **popen)
    try:
        wait_until(lambda: len(_times(output)) >= 2, process)
        os.killpg(process.pid, signal.SIGTERM)  # as from a job scheduler: the runs get it too
        text, _ = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # after a failure
    assert process.returncode == 0, text
    assert "the same command continues" in text
    process = runs_module._FORKSERVER.Process(target=cli.main, args=(command[3:],))
    process.start()
    started = output / "runs" / "photographs-CRATE-seed0" / "stage0" / "checkpoints"
    wait_until(lambda: started.is_dir() and any(started.iterdir()))
    assert a_job_runs(output)
    process.kill()
    process.join()
    before = _times(output)
    wait_until(lambda: not a_job_runs(output), seconds=60)  # no job outlives its parent
    with pytest.MonkeyPatch.context() as patch:  # a test below makes figures
        for name in ("image_grid", "curve_figure"):
            patch.setattr(f"crate_fast.eval.emergence.figures.{name}", lambda *_, **__: None)
        assert main(words) == 0
    return output, before


def test_a_killed_experiment_continues_and_repeats_no_run(finished):
    output, before = finished
    results = _times(output)
    assert len(before) >= 3  # the sweeps; the last may still run
    assert before.items() <= results.items()
    assert set(results) == {f"{run.name}.json" for run in SMOKE.planned_runs(FEW)}
    result = json.loads((output / "report" / "results" / "photographs-CRATE-seed0.json").read_text())
    first, middle, last = result["checkpoints"]
    assert [(c["step"], c["images"]) for c in (first, middle, last)] == [(0, 0), (2, 16), (4, 32)]
    assert [entry["step"] for entry in result["validation"]] == [2, 4]
    assert ["boxes" in c for c in (first, middle, last)] == [True, False, True]
    assert all(c["masks"]["ap"]["images"] == 2 and "0" in c["maskcut"] for c in (first, middle, last))
    assert result["protocol"]["images"] == 20
    assert not list((output / "report").glob("**/.*"))


@pytest.mark.usefixtures("unsaved_figures")
def test_the_report_is_made_from_the_results_alone(finished, tmp_path):
    report = shutil.copytree(finished[0] / "report", tmp_path / "report")
    text = (report / "report.md").read_text()
    (report / "report.md").unlink()
    assert report_again(report, "smoke") == text
    assert text.count("](figures/") == len(list((report / "figures").glob("*.png"))) == 9
    for words in ("at equal accuracy", "mean box", "## Boxes from attention", "## MaskCut", "6 of 12"):
        assert words in text
    assert str(finished[0]) not in text


def test_another_model_is_trained_into_the_same_folder(finished, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("crate_fast.eval.emergence.report.draw", lambda *_: {})
    copy = shutil.copytree(finished[0], tmp_path / "copy", symlinks=True)
    words = [*options(photographs, copy), "--models", "CRATE-alpha", "--seeds", "0"]
    words[words.index("--data") + 1] = f"photographs:{photographs}"  # as earlier versions wrote it
    assert main([*words, "--minutes", "0.0001"]) == 0
    assert "the same command continues" in capsys.readouterr().out
    assert main(words) == 0
    before = _times(finished[0])
    names = {"photographs-CRATE-alpha-seed0", "sweep-CRATE-alpha-lr0.001", "sweep-CRATE-alpha-lr0.002"}
    assert _times(copy).keys() - before.keys() == {f"{name}.json" for name in names}
    text = (copy / "report" / "report.md").read_text()
    assert "| CRATE-alpha | 1 |" in text
    assert "6 of 12, and 3 that are not compared" in text
    before = (finished[0] / "report" / "report.md").read_text()
    of_crate, others = ([row for row in page.splitlines() if row.startswith("| CRATE |")] for page in (before, text))
    assert of_crate == others != []
    assert run_config(copy / "runs" / "photographs-CRATE-alpha-seed0" / "stage0").sparsifier == "odl"
    for path in (copy / "report" / "results").glob("photographs-ViT-*"):
        path.unlink()
    capsys.readouterr()
    assert main(words) == 0
    assert "the report follows when CRATE and ViT have a common seed" in capsys.readouterr().out


def test_the_untrained_model_has_the_runs_initial_weights(finished, tmp_path):
    config = SMOKE.training_config(Run("ViT", 0), 1e-3, finished[0] / "data", device="cpu")
    trainer = Trainer(config, tmp_path / "run", build_splits(config), ALONE, Interruption())
    twin = open_model(f"{finished[0]}/runs/photographs-ViT-seed0/stage0@untrained", seed=0)
    assert same(twin.model.state_dict(), trainer.model.state_dict())


def test_a_failed_run_is_named_and_the_other_results_are_kept(finished, photographs, tmp_path, refuses):
    copy = shutil.copytree(finished[0], tmp_path / "copy", symlinks=True)
    (copy / "report" / "results" / "photographs-ViT-seed0.json").unlink()
    scores = copy / "scores" / "photographs-ViT-seed0" / "records-0.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:-1]))  # all but the last checkpoint's
    for weights in (copy / "runs" / "photographs-ViT-seed0").glob("stage0/checkpoints/*/model.safetensors"):
        weights.write_bytes(b"damaged")
    message = r"photographs-ViT-seed0 ended with status 1.*photographs-ViT-seed0\.txt"
    refuses(message, main, options(photographs, copy))
    assert len(_times(copy)) == 5


def test_missing_results_and_another_protocol_are_errors(finished, photographs, tmp_path, monkeypatch, refuses):
    words = ["--report-only", "--report", str(tmp_path)]
    refuses("holds no protocol.json", main, ["--size", "smoke", *words])
    assert not any(tmp_path.iterdir())
    shutil.copy(finished[0] / "report" / "protocol.json", tmp_path)
    refuses("does not hold runs of CRATE and ViT", main, ["--size", "smoke", *words])
    refuses("another --size than small: pass --size smoke", main, ["--size", "small", *words])
    monkeypatch.setitem(SIZES, "smoke", dataclasses.replace(SMOKE, weight_decay=0.1))
    refuses("weight_decay: 0.05 there, 0.1 now", main, options(photographs, finished[0]))


def test_photographs_are_prepared_once_and_chosen_by_the_area_of_their_boxes(photographs, tmp_path):
    for _ in range(2):
        assert prepare_photographs(photographs, None, None, tmp_path / "data") == 20
    assert len(list((tmp_path / "data" / "train").glob("*/*.png"))) == 20
    halves = [{p.name for p in (tmp_path / "data" / split / "cat").iterdir()} for split in ("selection", "test")]
    assert halves == [{"0.png", "2.png", "4.png"}, {"1.png", "3.png", "5.png"}]
    data = PhotographData(dataclasses.replace(SMOKE, coverage=(0.0, 0.3)), tmp_path / "data")
    covered = [16 * (10 + i) / 1024 for i in (*range(1, 6, 2), *range(7, 12, 2))]  # the test half, cats then dogs
    samples = list(data.test)
    assert [float(s.target.masks.float().mean()) for s in samples] == [c for c in covered if c <= 0.3]
    assert [s.target.classes for s in samples] == [[0], [0], [0], [1], [1]]
    assert (len(data.classified), data.with_masks) == (6, None)
    with pytest.raises(UserError, match="masks: None there, 'coco:.* now.*give another --output"):
        prepare_photographs(photographs, None, f"coco:{photographs / 'coco'}", tmp_path / "data")
    for split in ("train", "val"):  # archives of the split's folder, with equal names in three folders of a class
        write_tar(tmp_path / f"{split}.tar", [(f"{split}/cat/{folder}/0.png", b"") for folder in "abc"])
    assert prepare_photographs(tmp_path, photographs / "val_boxes.json", None, tmp_path / "prepared") == 3
    assert len(list((tmp_path / "prepared").glob("[st]e*/cat/?/0.png"))) == 3


def test_missing_photographs_and_classes_are_errors(photographs, tmp_path, refuses):
    for option, value, message in (
        ("--data", f"{tmp_path}/none", "none: name a folder of photographs, with train and val"),
        ("--data", "", "name a folder of photographs, with train and val"),
        ("--masks", f"voc:{photographs}", "write coco:PATH"),
        ("--boxes", f"{tmp_path}/none.json", "name the boxes"),
    ):
        refuses(message, main, [*options(photographs, tmp_path / "run"), option, value])
    shutil.copytree(photographs / "val" / "cat", tmp_path / "few" / "val" / "cat")
    shutil.copytree(photographs / "val", tmp_path / "few" / "train")
    with pytest.raises(UserError, match="must have the classes of train.*dog"):
        prepare_photographs(tmp_path / "few", photographs / "val_boxes.json", None, tmp_path / "data")
