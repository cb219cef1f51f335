"""Starts the runs of an experiment, several at a time, and continues those that were interrupted."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from crate_fast.cpu import processor_name
from crate_fast.errors import UserError
from crate_fast.eval.emergence.analysis import chosen_lr, load_results
from crate_fast.eval.emergence.job import Job, Places, do, result_file
from crate_fast.eval.emergence.protocol import Protocol, Run, planned_runs, stages_of, training_config
from crate_fast.provenance import provenance
from crate_fast.train.config import TrainConfig
from crate_fast.train.distributed import choose_device
from crate_fast.train.interruption import Interruption
from crate_fast.train.plan import Flops, count_flops, meta_model
from crate_fast.train.run_folder import RunLock
from crate_fast.train.shape_scenes import CLASSES

__all__ = ["Machine", "RunFailedError", "conduct"]

_POLL_SECONDS = 0.5
_CLASSES = {"cifar10": 10}  # else those of shape_scenes
_FORK = multiprocessing.get_context("forkserver")  # jobs start at once, and CUDA may be used in them
_FORK.set_forkserver_preload(["crate_fast.eval.emergence.job"])


class RunFailedError(UserError):
    """A run ended without a result."""


class Machine:
    """How many runs go at once, and on what.

    Args:
        device: "auto", "cpu", "cuda" for all GPUs, or "cuda:N".
        jobs: Runs at once; None: a CPU core each, or four a GPU, which one of so small models does not fill.
    """

    def __init__(self, device: str, jobs: int | None = None):
        self.cores = os.cpu_count() or 1
        chosen = choose_device(device)
        self.on_gpu = chosen.type == "cuda"
        every = self.on_gpu and ":" not in device
        self.devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if every else [str(chosen)]
        self.jobs = jobs or (4 * len(self.devices) if self.on_gpu else self.cores)
        self.threads = max(1, self.cores // self.jobs)
        self.workers = max(1, self.threads - 1) if self.on_gpu else 0

    def __str__(self) -> str:
        names = [torch.cuda.get_device_name(device) for device in self.devices] if self.on_gpu else []
        return f"{', '.join([*names, processor_name()])}, {self.cores} cores, {self.jobs} runs at once"


def conduct(protocol: Protocol, places: Places, machine: Machine, minutes: float | None = None) -> bool:
    """Do what is not done yet of an experiment.

    Args:
        protocol: The experiment.
        places: Where things are; what was done with another protocol must not be there.
        machine: What it runs on.
        minutes: Stop politely after so many; None: at the end.

    Returns:
        Whether all is done; False when it was stopped, by time or by a signal. The same call then continues.

    Raises:
        CheckpointError: Another process is conducting an experiment there.
        RunFailedError: The message says which run, and where its log is. What is done is kept.
    """
    lock = RunLock(places.output)
    lock.acquire()
    lock.sign()
    try:
        with Interruption(signal.SIGINT) as interruption:
            deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
            with _Conductor(protocol, places, machine) as conductor:
                return conductor.run(lambda: interruption.requested() or time.monotonic() > deadline)
    finally:
        lock.release()


class _Conductor:
    def __init__(self, protocol: Protocol, places: Places, machine: Machine):
        self.protocol, self.places, self.machine = protocol, places, machine
        runs = planned_runs(protocol, places.cifar10 is not None)
        self.costs = {run: _costs(protocol, run, places) for run in runs}
        self.waiting = [run for run in runs if not result_file(places, run).is_file()]
        self.running: dict[Run, multiprocessing.Process] = {}
        self.devices: dict[Run, str] = {}
        self.origin = provenance() | {"device": str(machine)}  # of the code that the jobs have: they are forked of it
        del self.origin["command"]  # it names this machine's folders
        self.logs = places.output / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "_Conductor":
        return self

    def __exit__(self, *_) -> None:
        """No job stays behind, whatever happened."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.join()

    def run(self, stop: Callable[[], object]) -> bool:
        total = sum(map(sum, self.costs.values()))
        bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        interval = 0.5 if sys.stderr.isatty() else 60
        often = {"mininterval": interval, "maxinterval": interval}
        with tqdm(total=total, initial=self.done(), bar_format=bar_format, smoothing=0, **often) as bar:
            stopping = False
            while self.waiting or self.running:
                if stop() and not stopping:  # before the jobs are looked at: the signal may have reached them too
                    stopping = True
                    bar.write("stopping: the runs save what they have")
                    for process in self.running.values():
                        process.terminate()
                self._reap(bar, stopping)
                if stopping and not self.running:
                    return False
                while not stopping and self._start_next():
                    pass
                finished = len(self.costs) - len(self.waiting) - len(self.running)
                bar.set_description_str(f"{finished}/{len(self.costs)} runs", refresh=False)
                bar.set_postfix_str(", ".join(run.name for run in self.running), refresh=False)
                bar.update(max(0.0, self.done() - bar.n))
                time.sleep(_POLL_SECONDS)
        return True

    def done(self) -> float:
        """Operations spent on what is done, unfinished runs among it."""
        done = 0.0
        for run, costs in self.costs.items():
            whole = run not in self.running and run not in self.waiting
            done += sum(costs) if whole else self._spent(run)
        return done

    def _spent(self, run: Run) -> float:
        """On an unfinished run, as its logs say."""
        spent = 0.0
        for number, (stage, cost) in enumerate(zip(stages_of(self.protocol, run), self.costs[run], strict=False)):
            path = self.places.output / "runs" / run.name / f"stage{number}" / "metrics.jsonl"
            if not path.is_file():
                break
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            step = max((json.loads(line)["step"] for line in lines[-2:]), default=0)
            spent += cost * min(1.0, step / stage.steps)
        return spent

    def _start_next(self) -> bool:
        """Start the first run that can be; whether there was one."""
        if len(self.running) == self.machine.jobs or not self.waiting:
            return False
        results = load_results(self.places.report)
        for run in self.waiting:
            lr = chosen_lr(results, self.protocol, run.model) if run.lr is None else run.lr
            if lr is not None:
                self._start(run, lr)
                return True
        return False

    def _start(self, run: Run, lr: float) -> None:
        machine, used = self.machine, list(self.devices.values())
        device = min(machine.devices, key=used.count)
        job = Job(run, lr, self.protocol, self.places, device, machine.threads, machine.workers, self.origin)
        process = _FORK.Process(target=do, args=(job, self.logs / f"{run.name}.txt"))
        process.start()
        self.waiting.remove(run)
        self.running[run], self.devices[run] = process, device

    def _reap(self, bar: tqdm, stopping: bool) -> None:
        for run, process in list(self.running.items()):
            if process.exitcode is None:
                continue
            del self.running[run], self.devices[run]
            if result_file(self.places, run).is_file():
                bar.write(f"{run.name}: done")
            elif stopping:
                self.waiting.append(run)
            else:
                log = self.logs / f"{run.name}.txt"
                raise RunFailedError(
                    f"{run.name} ended with status {process.exitcode} and no result:\n{_tail(log)}\nIts log: {log}"
                )


def _tail(log: Path, lines: int = 8) -> str:
    text = log.read_text(errors="replace") if log.is_file() else ""
    return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])


def _costs(protocol: Protocol, run: Run, places: Places) -> list[float]:
    """Operations of each stage's training and, last, of scoring: what a run counts for in the progress bar."""
    costs, flops = [], None
    for number, stage in enumerate(stages_of(protocol, run)):
        config = training_config(protocol, run, number, 1e-3, places.cifar10)
        flops = _flops(dataclasses.replace(config, seed=0), _CLASSES.get(run.kind, len(CLASSES)))
        costs.append(stage.steps * stage.batch_size * flops.step)
    scored = protocol.selection_images + 2 * protocol.test_images + 2 * protocol.maskcut_images
    return [*costs, len(protocol.points) * scored * flops.forward if run.kind == "scenes" else 0]


@cache
def _flops(config: TrainConfig, classes: int) -> Flops:
    return count_flops(meta_model(config, classes), config.image_size)
