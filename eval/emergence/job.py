"""One run: trained, scored at its checkpoints, its result written.

    OUTPUT/runs/RUN/stage0/    a training run, as of `train/pretrain.py`
    OUTPUT/scores/RUN/         a record for each checkpoint scored so far
    REPORT/results/RUN.json    the result, when all is done
    REPORT/pictures/           what the figures show of the first seed's models, and the scenes

A job killed anywhere is continued by the next.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crate_fast.errors import UserError
from crate_fast.eval.emergence.protocol import Point, Protocol, Run, Stage, stages_of, training_config
from crate_fast.eval.emergence.scores import checkpoint_scores, pictures, shown_scenes
from crate_fast.eval.models import Subject, open_model
from crate_fast.eval.records import Records
from crate_fast.train.checkpoint import write_text
from crate_fast.train.interruption import Interruption
from crate_fast.train.launch import launch
from crate_fast.train.nonfinite import NonFiniteError
from crate_fast.train.run_folder import RunLock
from crate_fast.train.runs import run_config

__all__ = ["Job", "Places", "do", "result_file", "train_and_score"]

_ORPHAN_SECONDS = 120.0  # for a job that lost its parent to stop


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        output: Of runs and unfinished scores: large, and needed only until a run has its result.
        report: Of results, pictures and the report: small, and enough to make the report again.
        cifar10: Of CIFAR-10; None if it is not at hand.
    """

    output: Path
    report: Path
    cifar10: Path | None = None


@dataclass(frozen=True)
class Job:
    """What a process is told to do.

    Attributes:
        run: Which.
        lr: Its learning rate.
        protocol: The experiment.
        places: Where things are.
        device: As of `TrainConfig`.
        threads, workers: For this process.
        origin: Of the code that runs, for the result.
    """

    run: Run
    lr: float
    protocol: Protocol
    places: Places
    device: str
    threads: int
    workers: int
    origin: dict[str, str]

    def stage_folder(self, number: int) -> Path:
        """Of a stage's training run."""
        return self.places.output / "runs" / self.run.name / f"stage{number}"


def result_file(places: Places, run: Run) -> Path:
    """Where the result of a run is, or will be."""
    return places.report / "results" / f"{run.name}.json"


def do(job: Job, log: Path) -> None:
    """Do a job in this process, which then ends: with 0, also when it was asked to stop and has saved.

    Args:
        job: Which.
        log: File that takes what is printed.
    """
    stream = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started this process decides
    _stop_with_parent()
    lock = RunLock(job.places.output / "locks" / job.run.name)
    lock.acquire(_ORPHAN_SECONDS)
    lock.sign()
    torch.set_num_threads(job.threads)
    try:
        train_and_score(job)
    finally:
        lock.release()
    sys.exit(0)


def train_and_score(job: Job) -> None:
    """Write the result of a job, unless asked to stop before; a sweep that diverges has the accuracy 0."""
    try:
        if _trained(job):
            _score(job)
    except NonFiniteError as error:
        if job.run.kind != "sweep":
            raise
        print(f"a learning rate that cannot be chosen: {error}", flush=True)
        _write(job, _facts(job) | {"validation": [{"val_accuracy": 0.0}], "diverged": str(error)})


def _stop_with_parent() -> None:
    """Ask this process to stop politely when the one that started it is gone, however that went."""

    def watch() -> None:
        multiprocessing.parent_process().join()  # getppid() is the fork server's, which lives as long as a job does
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _trained(job: Job) -> bool:
    """Train to the end, or until asked to stop; whether it is done.

    Raises:
        UserError: A finished stage in the folder was trained at another learning rate.
    """
    init = ""
    for number, stage in enumerate(stages_of(job.protocol, job.run)):
        folder = job.stage_folder(number)
        further = {"device": job.device, "threads": job.threads, "workers": job.workers, "init": init}
        config = training_config(job.protocol, job.run, number, job.lr, job.places.cifar10, **further)
        if not (folder / "summary.json").is_file():
            launch(config, argparse.Namespace(recipe="emergence", output=str(folder), resume=True, dry_run=False))
            if not (folder / "summary.json").is_file():
                return False
        elif run_config(folder).lr != config.lr:
            raise UserError(
                f"{folder} was trained at lr {run_config(folder).lr:g}, and the sweeps now say {config.lr:g}: remove "
                "it, or bring back the sweeps' results that it was trained with"
            )
        init = f"{folder}@{stage.steps}"
    return True


def _score(job: Job) -> None:
    run, stages = job.run, stages_of(job.protocol, job.run)
    histories = [_history(job.stage_folder(number)) for number in range(len(stages))]
    result = _facts(job) | {
        "parameters": json.loads((job.stage_folder(0) / "summary.json").read_text())["parameters"],
        "training_seconds": round(sum(map(_seconds, histories, stages))),
        "validation": _listed(histories, "val_loss", "val_accuracy"),
        "training": _listed(histories, "loss", "accuracy"),
    }
    if run.kind == "scenes":
        with Interruption() as interruption:
            checkpoints = _score_checkpoints(job, interruption)
        if checkpoints is None:
            return
        result["checkpoints"] = checkpoints
    _write(job, result)


def _facts(job: Job) -> dict:
    run = job.run
    facts = {"kind": run.kind, "model": run.model, "seed": run.seed, "lr": job.lr, "training_seconds": 0}
    return facts | {"protocol": job.protocol.settings(), "provenance": job.origin}


def _write(job: Job, result: dict) -> None:
    path = result_file(job.places, job.run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result) + "\n")


def _history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _listed(histories: list[list[dict]], *names: str) -> list[dict]:
    """These values of every log entry that has them, with stage and step."""
    return [
        {"stage": number, **{name: entry[name] for name in ("step", *names)}}
        for number, history in enumerate(histories)
        for entry in history
        if names[0] in entry
    ]


def _seconds(history: list[dict], stage: Stage) -> float:
    """Of training, over all its sessions: from the speed of each log interval."""
    seconds, before = 0.0, 0
    for entry in history:
        if "images_per_s" in entry:
            seconds += (entry["step"] - before) * stage.batch_size / entry["images_per_s"]
            before = entry["step"]
    return seconds


def _score_checkpoints(job: Job, interruption: Interruption) -> list[dict] | None:
    """The scores of every checkpoint, in order; None when asked to stop."""
    points = job.protocol.points
    decides = {"protocol": job.protocol.settings(), "lr": job.lr}
    records = Records(job.places.output / "scores" / job.run.name, decides, key="checkpoint")
    for number, point in enumerate(points):
        if interruption.requested():
            return None
        if number not in records.read():
            began, subject = time.perf_counter(), _subject(job, point)
            where = {**dataclasses.asdict(point), "default_layer": subject.extract.default_layer}
            scores = checkpoint_scores(subject, job.protocol)
            seconds = {"seconds": round(time.perf_counter() - began, 1)}
            records.append([{"checkpoint": number, **where, **scores, **seconds}])
            print(f"scored checkpoint {number} of {len(points) - 1}", flush=True)
    if job.run.seed == job.protocol.seeds[0]:
        _draw(job)
    found = records.read()
    return [found[number] for number in range(len(points))]


def _subject(job: Job, point: Point) -> Subject:
    source = f"{job.run.model}={job.stage_folder(point.stage)}@{point.step or 'untrained'}"
    return open_model(source, job.device, job.protocol.image_size, seed=job.run.seed)


def _draw(job: Job) -> None:
    """All layers of the last checkpoint, and components at the default layer of all checkpoints; the scenes shown."""
    points = job.protocol.points
    last = _subject(job, points[-1])
    arrays = pictures(last, job.protocol, range(last.extract.depth))
    by_point = [pictures(_subject(job, point), job.protocol, [last.extract.default_layer]) for point in points]
    arrays["components_by_checkpoint"] = np.concatenate([found["components"] for found in by_point])
    folder = job.places.report / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / f"{job.run.model}.npz", arrays)
    _save(folder / "scenes.npz", shown_scenes(job.protocol))  # the same of every model


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)
