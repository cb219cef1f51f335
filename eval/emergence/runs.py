"""Run the experiment: train several runs in parallel, score their checkpoints, and resume them.

    OUTPUT/runs/RUN/stage0/    the training run, as written by `train/pretrain.py`
    OUTPUT/scores/RUN/         a record for each checkpoint scored so far
    OUTPUT/logs/RUN.txt        output of the run's process
    REPORT/results/RUN.json    the result of a finished run
    REPORT/pictures/           arrays for the figures: models of the first seed, and the images

`run_experiment` starts a process for each `Job`. The next call resumes jobs that were stopped or killed.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from crate_fast.cpu_ops import multiplies_bf16, processor_name
from crate_fast.env import provenance
from crate_fast.errors import UserError
from crate_fast.eval.common.models import LoadedModel, open_model
from crate_fast.eval.common.results import Records
from crate_fast.eval.emergence.data import PhotographData
from crate_fast.eval.emergence.protocol import Protocol, Run
from crate_fast.eval.emergence.results import Results
from crate_fast.eval.emergence.scores import box_scores, checkpoint_scores, mask_scores, pictures
from crate_fast.isolation import tail
from crate_fast.settings import usable_cores
from crate_fast.train.checkpoint import locked, write_text
from crate_fast.train.distributed import choose_device
from crate_fast.train.faults import Interruption, NonFiniteError
from crate_fast.train.runs import run_config
from crate_fast.train.trainer import launch

_POLL_SECONDS = 0.5
_LOCK_SECONDS = 120.0  # time for an orphaned job to save and stop
_FORKSERVER = multiprocessing.get_context("forkserver")  # jobs start fast and may use CUDA
_PRELOADED = ["crate_fast.eval.emergence.runs", "torch.utils.tensorboard", "scipy.ndimage", "pycocotools.cocoeval"]
_FORKSERVER.set_forkserver_preload(_PRELOADED)


@dataclass(frozen=True)
class Folders:
    """Folders of an experiment."""

    output: Path  # runs and unfinished scores; large, and not needed after a run has its result
    report: Path  # results, pictures and the report; small, and enough to write the report again

    @property
    def photographs(self) -> Path:
        """Folder of the photographs of `data.prepare_photographs`."""
        return self.output / "data"

    def result(self, run: Run) -> Path:
        """Return the result file of a run."""
        return self.report / "results" / f"{run.name}.json"

    def training(self, run: Run) -> Path:
        """Return the training folder of a run."""
        return self.output / "runs" / run.name / "stage0"  # the only stage; so named by earlier versions

    def log(self, run: Run) -> Path:
        """Return the log of a run."""
        return self.output / "logs" / f"{run.name}.txt"


class Resources:
    """Devices and number of parallel runs, by default one per CPU core or four per GPU; "cuda" means all GPUs.

    On a CPU without bf16 products, all runs train in fp32.
    """

    def __init__(self, device: str, jobs: int | None = None):
        self.cores = usable_cores()
        chosen = choose_device(device)
        self.on_gpu = chosen.type == "cuda"
        every = self.on_gpu and ":" not in device
        self.devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if every else [str(chosen)]
        self.jobs = jobs or (4 * len(self.devices) if self.on_gpu else self.cores)
        threads = max(1, self.cores // self.jobs)
        self.settings = {"threads": threads, "workers": max(1, threads - 1) if self.on_gpu else 0}
        if not (self.on_gpu or multiplies_bf16()):
            self.settings["precision"] = "fp32"

    def __str__(self) -> str:
        names = [torch.cuda.get_device_name(device) for device in self.devices] if self.on_gpu else []
        precision = ", fp32" if "precision" in self.settings else ""
        return f"{', '.join([*names, processor_name()])}, {self.cores} cores, {self.jobs} runs at once{precision}"


class Job(NamedTuple):
    """A run with everything that its process needs.

    `settings` are fields of `TrainConfig` for device and processes; `origin` is the provenance of the result.
    """

    run: Run
    lr: float
    protocol: Protocol
    folders: Folders
    settings: dict
    origin: dict[str, str]


# --- parallel runs ---


def run_experiment(
    runs: list[Run], protocol: Protocol, folders: Folders, resources: Resources, minutes: float | None = None
) -> bool:
    """Complete the unfinished runs of an experiment; the folders hold no runs of another protocol.

    Return True when all runs are done, and False after `minutes` or a signal; the same call then resumes. A failed
    run or another process in these folders is a `UserError`; finished runs are kept.
    """
    with locked(folders.output), Interruption(signal.SIGINT) as interruption:
        deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        scheduler = _Scheduler(runs, protocol, folders, resources)
        try:
            return scheduler.run(lambda: interruption.requested() or time.monotonic() > deadline)
        finally:
            scheduler.terminate()
            for process, _ in scheduler.running.values():
                process.join()


class _Scheduler:
    """Scheduler that starts and watches jobs; progress is measured in epochs."""

    def __init__(self, runs: list[Run], protocol: Protocol, folders: Folders, resources: Resources):
        self.protocol, self.folders, self.resources = protocol, folders, resources
        self.work = {run: protocol.epochs_of(run) for run in runs}
        self.waiting = [run for run in runs if not folders.result(run).is_file()]
        self.running: dict[Run, tuple[multiprocessing.Process, str]] = {}  # process and device
        self.origin = provenance() | {"device": str(resources)}  # of the code that the jobs run
        del self.origin["command"]  # it names local folders
        (folders.output / "logs").mkdir(parents=True, exist_ok=True)

    def terminate(self) -> None:
        for process, _ in self.running.values():
            process.terminate()

    def run(self, stop: Callable[[], object]) -> bool:
        total = sum(self.work.values())
        done = total - sum(self.work[run] for run in self.waiting)
        bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        interval = 0.5 if sys.stderr.isatty() else 60
        style = {"bar_format": bar_format, "smoothing": 0, "miniters": 0, "mininterval": interval}
        with tqdm(total=total, initial=done, maxinterval=interval, **style) as bar:
            stopping = False
            while self.waiting or self.running:
                if stop() and not stopping:  # checked before the jobs, which the signal may also have ended
                    stopping = True
                    bar.write("stopping: the runs save their state")
                    self.terminate()
                self._reap(bar, stopping)
                if stopping and not self.running:
                    return False
                while not stopping and self._start_next(stop):
                    pass
                finished = len(self.work) - len(self.waiting) - len(self.running)
                bar.set_description_str(f"{finished}/{len(self.work)} runs", refresh=False)
                bar.set_postfix_str(", ".join(run.name for run in self.running), refresh=False)
                bar.update(0)
                time.sleep(_POLL_SECONDS)
        return True

    def _start_next(self, stop: Callable[[], object]) -> bool:
        """Start the first run whose learning rate is known; return False if none was started."""
        if len(self.running) == self.resources.jobs or not self.waiting:
            return False
        results = Results.load(self.folders.report, self.protocol)
        lrs = ((run, run.lr if run.sweep else results.chosen_lr(run.model)) for run in self.waiting)
        run, lr = next(((run, lr) for run, lr in lrs if lr is not None), (None, None))
        if run is None:
            return False
        used = [device for _, device in self.running.values()]
        device = min(self.resources.devices, key=used.count)
        job = Job(run, lr, self.protocol, self.folders, self.resources.settings | {"device": device}, self.origin)
        process = _FORKSERVER.Process(target=_run_job, args=(job,))
        try:
            process.start()
        except (EOFError, OSError):
            if not stop():  # otherwise the stop signal has also ended the fork server
                raise
            return False
        self.waiting.remove(run)
        self.running[run] = process, device
        return True

    def _reap(self, bar: tqdm, stopping: bool) -> None:
        for run, (process, _) in list(self.running.items()):
            if process.exitcode is None:
                continue
            del self.running[run]
            if self.folders.result(run).is_file():
                bar.write(f"{run.name}: done")
                bar.update(self.work[run])
            elif stopping:
                self.waiting.append(run)
            else:
                log, status = self.folders.log(run), process.exitcode
                raise UserError(f"{run.name} ended with status {status} and no result:\n{tail(log, 8)}\nLog: {log}")


# --- one run ---


def _run_job(job: Job) -> None:
    """Run a job in this process; the exit status is 0 also after a requested stop."""

    def stop_with_parent() -> None:  # even after SIGKILL
        multiprocessing.parent_process().join()  # getppid() is the fork server, which lives as long as a job
        os.kill(os.getpid(), signal.SIGTERM)

    stream = os.open(job.folders.log(job.run), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its jobs with SIGTERM
    threading.Thread(target=stop_with_parent, daemon=True).start()
    torch.set_num_threads(job.settings["threads"])
    with locked(job.folders.output / "locks" / job.run.name, _LOCK_SECONDS):
        train_and_score(job)
    sys.exit(0)


def train_and_score(job: Job) -> None:
    """Run a job and write its result, unless it is stopped; a diverged sweep gets accuracy 0."""
    try:
        if _train(job):
            _score(job)
    except NonFiniteError as error:
        if not job.run.sweep:
            raise
        print(f"this learning rate diverges and gets accuracy 0: {error}", flush=True)
        _write(job, {"validation": [{"val_accuracy": 0.0}], "diverged": str(error)})


def _train(job: Job) -> bool:
    """Train; return False if stopped before the end."""
    folder = job.folders.training(job.run)
    config = job.protocol.training_config(job.run, job.lr, job.folders.photographs, **job.settings)
    summary = folder / "summary.json"
    if not summary.is_file():
        launch(config, argparse.Namespace(recipe="emergence", output=str(folder), resume=True, dry_run=False))
    elif run_config(folder).lr != config.lr:
        raise UserError(
            f"{folder} was trained at lr {run_config(folder).lr:g}, and the sweeps now select {config.lr:g}: "
            "remove the folder, or restore the results of its sweeps"
        )
    return summary.is_file()


def _score(job: Job) -> None:
    folder = job.folders.training(job.run)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [entry for entry in log if "images_per_s" in entry]
    seconds = 0.0  # of all sessions, from the speed of each log interval
    for before, entry in zip([{"step": 0}, *timed], timed, strict=False):
        seconds += (entry["step"] - before["step"]) * job.protocol.batch_size / entry["images_per_s"]
    result = {
        "training_seconds": round(seconds),
        "parameters": json.loads((folder / "summary.json").read_text())["parameters"],
        "validation": _entries(log, "val_loss", "val_accuracy"),
        "training": _entries(log, "loss", "accuracy"),
    }
    if not job.run.sweep:
        with Interruption() as interruption:
            checkpoints = _score_checkpoints(job, interruption)
        if checkpoints is None:
            return
        result["checkpoints"] = checkpoints
    _write(job, result)


def _write(job: Job, result: dict) -> None:
    run, path = job.run, job.folders.result(job.run)
    facts = {"model": run.model, "seed": run.seed, "lr": job.lr, "training_seconds": 0}
    facts |= {"protocol": job.protocol.settings(), "provenance": job.origin}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(facts | result) + "\n")


def _entries(log: list[dict], *names: str) -> list[dict]:
    """Return the named values of every log entry that has them, with its step."""
    return [{name: entry[name] for name in ("step", *names)} for entry in log if names[0] in entry]


def _score_checkpoints(job: Job, interruption: Interruption) -> list[dict] | None:
    """Return the scores of all checkpoints in order, or None when stopped."""
    protocol, steps = job.protocol, job.protocol.scored_steps
    settings = {"protocol": protocol.settings(), "lr": job.lr}
    records = Records(job.folders.output / "scores" / job.run.name, settings, key="checkpoint")
    data = PhotographData(protocol, job.folders.photographs)
    for number, step in enumerate(steps):
        if interruption.requested():
            return None
        if number not in records.read():
            began, loaded = time.perf_counter(), _open(job, step)
            record = {"checkpoint": number, "step": step, "images": step * protocol.batch_size}
            record |= {"default_layer": loaded.extract.default_layer, **checkpoint_scores(loaded, data)}
            if step in (0, steps[-1]):
                record |= box_scores(loaded, data)
            if data.with_masks is not None:
                record |= mask_scores(_open(job, step, protocol.mask_size), data)
            records.append([record | {"seconds": round(time.perf_counter() - began, 1)}])
            print(f"scored checkpoint {number} of {len(steps) - 1}", flush=True)
    if job.run.model in protocol.models and job.run.seed == protocol.seeds[0]:
        _save_pictures(job, data.shown())
    found = records.read()
    return [found[number] for number in range(len(steps))]


def _open(job: Job, step: int, image_size: int | None = None) -> LoadedModel:
    source = f"{job.run.model}={job.folders.training(job.run)}@{step or 'untrained'}"
    return open_model(source, job.settings["device"], image_size or job.protocol.image_size)


def _save_pictures(job: Job, shown: dict[str, np.ndarray]) -> None:
    """Save pictures of the last checkpoint's layers, components of every checkpoint's default layer, and images."""
    steps, images = job.protocol.scored_steps, shown["images"]
    last = _open(job, steps[-1], images.shape[1])
    arrays = pictures(last, images, range(last.extract.depth))
    layer = [last.extract.default_layer]
    by_step = [pictures(_open(job, step, images.shape[1]), images, layer) for step in steps]
    arrays["components_by_checkpoint"] = np.concatenate([found["components"] for found in by_step])
    folder = job.folders.report / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / f"{job.run.model}.npz", arrays)
    _save(folder / "photographs.npz", shown)  # the same for every model


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)
