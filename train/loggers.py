"""Means between log entries, the logs (metrics.jsonl, summary.csv, TensorBoard, Weights & Biases), and profiles."""

import csv
import io
import json
import secrets
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.tensorboard import SummaryWriter

from crate_fast.errors import UserError
from crate_fast.train.checkpoint import write_text, writing
from crate_fast.train.config import TrainConfig
from crate_fast.train.distributed import Processes

_BEFORE_PROFILE = 10  # steps: compilation, caches and clocks settle


class Interval:
    """Means over the steps since the last log entry, which a resume continues, and this session's speed in it."""

    def __init__(self, taken: int = 0, sums: dict[str, float] | None = None):
        self.taken, self.sums = taken, dict(sums or {})
        self.steps, self.seconds = 0, 0.0

    def add(self, measures: dict[str, float], taken: bool, seconds: float) -> None:
        """Add a step; its measures count if it was taken."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        if taken:
            self.taken += 1
            self.sums = {name: self.sums.get(name, 0.0) + value for name, value in measures.items()}

    def means(self) -> dict[str, float]:
        """Return the means over the steps taken; nothing if none was."""
        return {name: total / self.taken for name, total in self.sums.items()}

    def state(self) -> dict:
        """Return the arguments of an `Interval` that continues this one."""
        return {"taken": self.taken, "sums": self.sums}


class Loggers:
    """The open logs of a run, on its first process.

    Args:
        folder: The run's.
        history: Entries up to here: metrics.jsonl is rewritten to hold them and no others.
        step: Optimiser steps done; later points of an interrupted session are dropped from TensorBoard.
        config: Settings of the run; `wandb` names a Weights & Biases project, or none.
    """

    def __init__(self, folder: Path, history: list[dict], step: int, config: TrainConfig):
        self.folder, self.history = folder, history
        with writing(folder):
            write_text(folder / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.online = _wandb_run(folder, config) if config.wandb else None

    def add(self, entry: dict) -> None:
        """Write the newest entry of the history, "step" and numbers, everywhere."""
        with writing(self.folder):
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.add_scalars(entry["step"], {name: value for name, value in entry.items() if name != "step"})
            if "val_loss" in entry:
                write_text(self.folder / "summary.csv", _summary(self.history))

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Add numbers to the curves alone."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.online is not None:
            self.online.log(values, step=step)

    def close(self) -> None:
        """Flush and close."""
        with writing(self.folder):
            self.board.close()
        if self.online is not None:
            self.online.finish()


def _summary(history: list[dict]) -> str:
    """Return a table of the evaluations, each with the last training measurements before it."""
    rows, training = [], {}
    for entry in history:
        training |= entry
        if "val_loss" in entry:
            rows.append(dict(training))
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _wandb_run(folder: Path, config: TrainConfig):
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError(
            f"wandb={config.wandb!r} needs Weights & Biases: pip install wandb, or leave --wandb out"
        ) from error
    note = folder / "wandb_id"  # a resumed run goes on with its page
    if not note.is_file():
        write_text(note, secrets.token_hex(8))
    where = {"project": config.wandb, "name": folder.name, "id": note.read_text(), "dir": str(folder)}
    return wandb.init(**where, resume="allow", config=vars(config))


def profiler(folder: Path, steps: int, left: int, processes: Processes):
    """Return a context whose `step()` is to be called after each step: PyTorch's profiler after the first ten.

    It records `steps` steps into `folder`/rank0.json, …, for chrome://tracing or Perfetto; 0 for none: it is then
    None. `left` are the steps that the run still has; a warning if they are too few.
    """
    if not steps:
        return nullcontext()
    if left < _BEFORE_PROFILE + steps:
        warnings.warn(
            f"profile={steps} records steps {_BEFORE_PROFILE + 1} to {_BEFORE_PROFILE + steps} of a session, and "
            f"{left} are left to run: the trace will be {'short' if left > _BEFORE_PROFILE else 'missing'}",
            stacklevel=2,
        )

    def write(finished: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / f"rank{processes.rank}.json"))

    activities = [ProfilerActivity.CPU]
    if processes.device.type == "cuda" and torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    window = schedule(wait=_BEFORE_PROFILE - 2, warmup=2, active=steps, repeat=1)
    return profile(activities=activities, schedule=window, on_trace_ready=write)
