"""Real faults: killed processes, signals under torchrun, full disks, losses that are not finite, other settings."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path
from threading import Timer
from unittest.mock import Mock

import pytest
import torch
from runs import TINY, back_to, entries, losses, run, same, start, wait_until, weights
from soak import children, compare, torchrun

from crate_fast.train import checkpoint, pretrain, trainer
from crate_fast.train.checkpoint import locked
from crate_fast.train.faults import diagnosis
from crate_fast.train.runs import load_model

EVERYTHING = (  # all that has a state or draws: EMA, scaler, dropout, mixing, erasing, repeats, accumulation
    *("--attn-drop-rate", "0.1", "--drop-rate", "0.1", "--drop-path-rate", "0.2", "--ema-decay", "0.9"),
    *("--mixup", "0.5", "--cutmix", "1.0", "--random-erasing", "0.3"),
    *("--hflip", "0.5", "--repeats", "2", "--precision", "fp16", "--accumulate", "2", "--checkpoint-every", "1"),
    *("--keep-checkpoints", "3", "--log-every", "5"),
)
EVERY_EPOCH = EVERYTHING[:-6]  # one checkpoint per epoch, one log entry per step

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of an undisturbed run with everything on."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    assert pretrain.main([*TINY, *EVERYTHING, "--output", str(folder)]) == 0
    return folder


def test_a_run_killed_while_saving_continues_from_a_whole_checkpoint(whole, tmp_path):
    """Killed at three points of a save: the previous or the new checkpoint is whole, and the final state is equal.

    The log intervals of five steps are interrupted too; their means are in the metrics that `compare` compares.
    """
    folder = back_to(whole, 10, tmp_path / "run")
    words = ("--output", str(folder), *EVERYTHING, "--resume")
    for target, newest in (("save_file", 10), ("_put_in_place", 10), ("rotate", 11)):
        code = "import os, signal; from crate_fast.train import checkpoint\n"
        code += f"checkpoint.{target} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)"
        run(*words, before=code, status=-signal.SIGKILL)
        assert checkpoint.newest(folder / "checkpoints") == newest
        checkpoint.load(folder / "checkpoints", newest)
        assert newest == 11 or list((folder / "checkpoints").glob(".step_00000011.tmp"))
    (folder / "checkpoints" / ".step_00000003.gone").mkdir()  # killed while deleting
    run(*words)
    assert not list((folder / "checkpoints").glob(".*"))
    assert all(compare(whole, folder).values())
    assert losses(whole).keys() == {5, 6, 10, 12}
    paths = [run / "checkpoints/step_00000012/training.pt" for run in (whole, folder)]
    scalers = [torch.load(path, weights_only=True)["scaler"] for path in paths]
    assert scalers[0] == scalers[1]


def test_an_evaluation_is_kept_if_the_run_was_killed_after_it(whole, tmp_path):
    folder = back_to(whole, 12, tmp_path / "run")  # without best.json
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    assert pretrain.main([*TINY, *EVERYTHING, "--output", str(folder), "--resume"]) == 0
    assert entries(folder) == entries(whole)
    assert checkpoint.best_step(folder / "checkpoints") == checkpoint.best_step(whole / "checkpoints")


def test_a_signal_saves_a_checkpoint_and_ends_the_run(whole, tmp_path):
    folder = tmp_path / "run"
    words = ("--output", str(folder), *EVERY_EPOCH)  # the signal's checkpoint is in between
    process = start(*words, "--workers", "1")
    wait_until(lambda: (folder / "metrics.jsonl").exists() and losses(folder), process)
    for loading in children(process.processes[0].pid):
        os.kill(loading, signal.SIGUSR1)  # torchrun signals the whole process group
    process.send_signal(signal.SIGUSR1)
    text, _ = process.communicate(timeout=120)
    assert process.poll() == 0, text
    reached = checkpoint.newest(folder / "checkpoints")
    assert f"SIGUSR1: saved step {reached} of 12" in text
    assert not (folder / "summary.json").exists()
    assert pretrain.main([*TINY, *words, "--resume"]) == 0
    assert same(weights(whole, 12), weights(folder, 12))
    assert [entry["step"] for entry in entries(folder) if "loss" in entry] == list(range(1, 13))


def test_ctrl_c_during_evaluation_postpones_the_evaluation(whole, tmp_path, monkeypatch, capsys, request):
    folder = tmp_path / "run"
    words = [*TINY, "--output", str(folder), *EVERY_EPOCH]
    prepare, calls = trainer.Trainer.prepare_images, []
    number, handler = signal.SIGINT, signal.default_int_handler
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, handler)))  # a shell may ignore SIGINT

    def interrupted(self, images):
        if not self.model.training:
            calls.append(os.kill(os.getpid(), number))
        return prepare(self, images)

    monkeypatch.setattr(trainer.Trainer, "prepare_images", interrupted)
    assert pretrain.main(words) == 0
    assert "SIGINT: saved step 6 of 12" in capsys.readouterr().out
    assert calls
    assert signal.getsignal(number) == handler  # restored
    assert not any("val_accuracy" in entry for entry in entries(folder))
    monkeypatch.undo()
    assert pretrain.main([*words, "--resume"]) == 0
    assert [entry["step"] for entry in entries(folder) if "val_accuracy" in entry] == [6, 12]
    assert same(weights(whole, 12), weights(folder, 12))


def test_torchrun_restarts_a_killed_process_and_its_sigterm_saves(tmp_path):
    """Two processes: the run resumes by itself, stops at a signal, and ends in the state of an undisturbed run."""
    pair, folder, log = tmp_path / "pair", tmp_path / "run", tmp_path / "log"
    words = (*EVERYTHING, "--epochs", "3")
    process = torchrun(folder, [*TINY, *words], log)
    wait_until(lambda: checkpoint.newest(folder / "checkpoints"), process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    killed_at = checkpoint.newest(folder / "checkpoints")
    wait_until(lambda: checkpoint.newest(folder / "checkpoints") > killed_at + 2, process)  # the second start
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    text = log.read_text()
    assert (text.count(" on 2 × cpu"), text.count("from step ")) == (2, 1)
    assert f"SIGTERM: saved step {checkpoint.newest(folder / 'checkpoints')} of 18" in text
    assert "exitcode  : 0" not in text
    run("--output", str(folder), *words, "--resume", processes=2)
    run("--output", str(pair), *words, processes=2)
    assert all(compare(pair, folder).values())


def test_only_one_run_at_a_time_writes_a_folder(tmp_path, refuses):
    folder = tmp_path / "run"
    words = ("--output", str(folder), "--epochs", "40")
    first = start(*words)
    wait_until(lambda: (folder / "metrics.jsonl").exists() and losses(folder), first)
    message = r"is being written by another run \(process \d+ on .*\): stop it first"
    refuses(message, pretrain.main, [*TINY, *words, "--resume"])
    Timer(0.5, first.send_signal, [signal.SIGKILL]).start()  # a lost host: a restart waits for its lock
    with locked(folder, patience=60):
        pass
    first.communicate()


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    with pytest.warns(UserWarning, match="cannot be locked .*make sure that only one run"), locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".owner").is_file()


def test_a_killed_process_takes_its_data_workers_along(tmp_path):
    """Even one that waits: it would keep the GPU memory of its parent, and make a restart fail."""
    folder = tmp_path / "run"
    first = start("--output", str(folder), "--epochs", "40", "--workers", "1")
    wait_until(lambda: (folder / "metrics.jsonl").exists() and losses(folder), first)
    pid = first.processes[0].pid
    workers = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    os.kill(workers[-1], signal.SIGSTOP)
    first.send_signal(signal.SIGKILL)
    states = [Path(f"/proc/{worker}/stat") for worker in workers]
    wait_until(lambda: not any(path.exists() and path.read_text().split(") ")[1][0] in "RSDT" for path in states))
    first.communicate()


def test_a_run_is_continued_only_on_request(whole, tmp_path, monkeypatch, refuses):
    words = [*TINY, "--output", str(tmp_path), "--resume"]
    (tmp_path / "summary.json").touch()
    refuses("holds a finished run without checkpoints: pass another --output", pretrain.main, words)
    words = [*TINY, "--output", str(whole), *EVERYTHING]
    refuses("holds a run at step 12: pass --resume to continue it", pretrain.main, words)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    refuses("needs a run to continue: pass --output FOLDER --resume", pretrain.main, words)
    assert pretrain.main([*words, "--dry-run"]) == 0


def test_a_full_disk_stops_all_processes_and_the_last_checkpoint_stays_whole(tmp_path, request):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]  # a file system of 1 MiB
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(tmp_path)], check=True))
    folder = tmp_path / "run"
    words = ("--output", str(folder), "--checkpoint-every", "1", "--keep-checkpoints", "99", "--workers", "1")
    text = run(*words, processes=2, status=2)
    assert "Traceback" not in text
    assert re.search("could not be written.*free some space, then continue .*--resume", text)
    *earlier, newest = checkpoint.steps(folder / "checkpoints")
    checkpoint.load(folder / "checkpoints", newest)
    assert not list((folder / "checkpoints").glob(".*.tmp"))
    for step in earlier:
        shutil.rmtree(checkpoint.folder_of(folder / "checkpoints", step))
    run("--output", str(folder), "--checkpoint-every", "1", "--keep-checkpoints", "1", "--resume")


def test_any_error_ends_a_run_with_data_workers(tmp_path):
    """Its frames hold the loader's iterator, whose workers ignore SIGTERM and would keep the process alive."""
    code = "from crate_fast.train.trainer import Trainer\n"
    code += "def train_step(self, batches):\n    batch = next(batches)\n    raise RuntimeError('a bug')\n"
    code += "Trainer.train_step = train_step"
    text = run("--output", str(tmp_path / "run"), "--workers", "1", before=code, status=1)
    assert "RuntimeError: a bug" in text


def _poisoning(monkeypatch, steps: set[int]) -> None:
    """Make the images of these steps not finite."""
    prepare = trainer.Trainer.prepare_images

    def poisoned(self, images):
        images = prepare(self, images)
        return images * math.nan if self.model.training and self.step in steps else images

    monkeypatch.setattr(trainer.Trainer, "prepare_images", poisoned)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch, capsys):
    _poisoning(monkeypatch, {2, 3, 7})
    words = [*TINY, "--ema-decay", "0.9", "--checkpoint-every", "1", "--keep-checkpoints", "99"]
    assert pretrain.main([*words, "--output", str(tmp_path)]) == 0
    for name in ("model", "ema"):
        assert same(weights(tmp_path, 2, name), weights(tmp_path, 4, name))
    assert not same(weights(tmp_path, 4), weights(tmp_path, 5))
    assert same(weights(tmp_path, 7), weights(tmp_path, 8))
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_steps"] == 3
    assert "was not finite: 3" in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert [e["skipped_steps"] for e in entries(tmp_path) if e["step"] == 9 and "lr" in e] == [3]


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_a_diagnosis(tmp_path, monkeypatch, refuses):
    _poisoning(monkeypatch, set(range(5, 12)))
    words = [*TINY, "--output", str(tmp_path), "--nonfinite-limit", "3", "--checkpoint-every", "1"]
    message = r"3 steps in a row were skipped.*step 7: .*gradient norm nan.*The images are not finite"
    refuses(message, pretrain.main, words)
    assert checkpoint.newest(tmp_path / "checkpoints") == 7
    saved = checkpoint.load(tmp_path / "checkpoints", 7)
    assert all(tensor.isfinite().all() for tensor in saved.weights.values())
    assert saved.training["nonfinite"]["in_a_row"] == 2
    refuses("3 steps in a row", pretrain.main, [*words, "--resume"])


def test_the_diagnosis_names_the_first_module_or_weight(whole):
    model, _, _ = load_model(whole)

    def found() -> str:
        return diagnosis(model, torch.zeros(2, 3, 32, 32), lambda model, images: (model(images),))

    assert "every output is finite" in found()
    model.transformer.layers[1][0].fn.to_out[0].weight.data.fill_(3e38)
    assert "is that of transformer.layers.1.0.fn.to_out.0" in found()
    model.cls_token.data[0, 0, 0] = math.inf
    assert "Weights are not finite: cls_token" in found()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, refuses):
    train_step = trainer.Trainer.train_step

    def poisoning(self, *arguments):
        result = train_step(self, *arguments)
        if self.step == 3:
            self.model.cls_token.data[0, 0, 0] = math.nan
        return result

    monkeypatch.setattr(trainer.Trainer, "train_step", poisoning)
    words = [*TINY, "--output", str(tmp_path), "--checkpoint-every", "1"]
    refuses("the weights cls_token are not finite after step 3 and are not saved", pretrain.main, words)
    assert checkpoint.newest(tmp_path / "checkpoints") == 2


def test_an_fp16_overflow_lowers_the_loss_scale_and_is_no_skipped_step(tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**40, **k))
    assert pretrain.main([*TINY, "--output", str(tmp_path), "--precision", "fp16"]) == 0
    last = [entry for entry in entries(tmp_path) if "loss_scale" in entry][-1]
    assert last["overflows"] > 10
    assert last["loss_scale"] == 2.0 ** (40 - last["overflows"])
    assert json.loads((tmp_path / "summary.json").read_text())["skipped_steps"] == 0


def test_a_checkpoint_of_other_settings_or_data_is_refused(whole, tmp_path, refuses):
    words = [*TINY, "--output", str(whole), *EVERYTHING, "--attn-drop-rate", "0.2", "--lr", "0.5", "--resume"]
    refuses(r"attn_drop_rate: 0\.1 → 0\.2, .*lr: 0\.\d+ → 0\.5", pretrain.main, words)
    manifest = back_to(whole, 12, tmp_path / "run") / "checkpoints/step_00000012/manifest.json"
    words = [*TINY, "--output", str(tmp_path / "run"), *EVERYTHING, "--resume"]
    facts = json.loads(manifest.read_text())
    facts["data"]["train_images"] = 95
    facts["config"]["a_setting_of_the_future"] = True
    del facts["config"]["crop_scale"]  # an older version had no such setting
    manifest.write_text(json.dumps(facts))
    refuses(r"\(a_setting_of_the_future: True → None, train_images: 95 → 96\)", pretrain.main, words)


def test_free_settings_may_differ_in_a_resumed_run(tmp_path):
    words = [*TINY, "--precision", "fp32", "--ema-decay", "0.9", "--checkpoint-every", "3", "--output", str(tmp_path)]
    assert pretrain.main(words) == 0
    expected = losses(tmp_path)
    for step in (9, 12):
        shutil.rmtree(checkpoint.folder_of(tmp_path / "checkpoints", step))
    changed = {"workers": "1", "threads": "0", "checkpoint_every": "4", "keep_checkpoints": "9", "log_every": "2"}
    changed |= {"parallel": "fsdp", "device": "auto", "max_unreadable": "0.5", "nonfinite_limit": "3"}
    changed |= {"accumulate": "2"}
    assert {*changed, "grad_checkpointing", "data_dir", "download"} == set(checkpoint.FREE_SETTINGS)
    options = [word for name, value in changed.items() for word in ("--" + name.replace("_", "-"), value)]
    assert pretrain.main([*words, *options, "--grad-checkpointing", "--resume"]) == 0
    found = losses(tmp_path)
    assert sorted(found) == [*range(1, 7), 8, 10, 12]
    for step in (8, 10, 12):
        assert found[step] == pytest.approx((expected[step - 1] + expected[step]) / 2, rel=2e-4)
    assert checkpoint.steps(tmp_path / "checkpoints")[-2:] == [8, 12]


def test_every_checkpoint_file_is_read_without_running_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = checkpoint.save(tmp_path / "checkpoints", 1, {"w": torch.zeros(2)}, {}, {"config": {}})
    torch.save({"step": Evil()}, folder / "training.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["training.pt"] = checkpoint._fingerprint(folder / "training.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match="holds more than tensors and plain values"):
        checkpoint.load(tmp_path / "checkpoints", 1)
    assert not (tmp_path / "ran").exists()
