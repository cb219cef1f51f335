"""The folder that a run writes: lock, settings, logs, profiles and checkpoints. `runs` opens a finished one.

Only the first process (rank 0) writes.
"""

import csv
import io
import json
import os
import secrets
import socket
import warnings
from contextlib import nullcontext
from pathlib import Path

import filelock
import torch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.tensorboard import SummaryWriter

from crate_fast.env import provenance
from crate_fast.errors import UserError
from crate_fast.train import checkpoint
from crate_fast.train.checkpoint import CheckpointError, writing
from crate_fast.train.config import TrainConfig, dump_config, renamed_settings
from crate_fast.train.distributed import Processes
from crate_fast.train.faults import NonFiniteError, poisoned

# Settings that a resumed run may change: they decide how and where it is computed, and what is kept. As with the
# number of processes, rounding and what is drawn by micro-batch may differ.
FREE_SETTINGS = (
    *("data_dir", "download", "workers", "threads", "checkpoint_every", "keep_checkpoints", "log_every", "profile"),
    *("wandb", "parallel", "accumulate", "device", "cuda_graphs", "grad_checkpointing", "max_unreadable"),
    "nonfinite_limit",
)
_LOCK_SECONDS = 120.0
_BEFORE_PROFILE = 10  # steps: compilation, caches and clocks settle


class RunLock:
    """The lock of a folder, FOLDER/.lock, held by one process until `release` or its end; FOLDER/.owner names it."""

    def __init__(self, folder: Path):
        self.folder, self.owner = folder, folder / ".owner"
        self._lock = filelock.FileLock(folder / ".lock")

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lock; wait `patience` seconds, for a file server holds a dead host's lock for a while.

        Raises:
            CheckpointError: Another process has it; the message says which.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
        try:
            self._lock.acquire(timeout=patience)
        except filelock.Timeout as error:
            owner = self._read()
            raise CheckpointError(
                f"{self.folder} is being written by another run (process {owner.get('process', 'unknown')} on "
                f"{owner.get('host', 'another host')}): end it first, or give another --output. After torchrun "
                "itself was killed, its processes may still be running"
            ) from error
        except (OSError, NotImplementedError) as error:  # some clusters mount their file system without locks
            warnings.warn(
                f"{self.folder / '.lock'} cannot be locked ({error}): make sure that one run alone writes there",
                stacklevel=2,
            )

    def ours(self) -> bool:
        """Return True if the last run in the folder was started by the torchrun that started this process."""
        return self._read().get("launcher") == _launcher()

    def sign(self) -> None:
        """Write down who holds the lock."""
        owner = {"host": socket.gethostname(), "process": os.getpid(), "launcher": _launcher()}
        with writing(self.folder):
            checkpoint.write_text(self.owner, json.dumps(owner))

    def release(self) -> None:
        """Give the lock back, if it is held."""
        self._lock.release()

    def _read(self) -> dict:
        try:
            return json.loads(self.owner.read_text())
        except (OSError, ValueError):  # nobody has signed yet
            return {}


def _launcher() -> str:
    """Name the torchrun above this process: the same for its restarts.

    On several hosts any may have the first process after a restart: then the name is `--rdzv-id`, if there is one.
    """
    name, hosts = os.environ.get("TORCHELASTIC_RUN_ID", "none"), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    return name if hosts > 1 and name != "none" else f"{name} {socket.gethostname()} {os.getppid()}"


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


class RunFolder:
    """A run on disk. `data_facts` must be the same in a resumed run: number of training images, classes."""

    def __init__(self, folder: Path, config: TrainConfig, data_facts: dict, processes: Processes):
        self.folder, self.config, self.data_facts, self.processes = folder, config, data_facts, processes
        self.checkpoints = folder / "checkpoints"
        self.history: list[dict] = []
        self.best: dict = {"step": None, "score": None}
        self.board: SummaryWriter | None = None
        self.online = None  # the page at Weights & Biases
        self.saved: int | None = None  # the step of the last checkpoint
        self.lock = RunLock(folder)

    def begin(self, resume: bool, restarted: bool = False) -> checkpoint.Checkpoint | None:
        """Open the folder; return the newest checkpoint if there is a run to continue, None for a new run.

        `restarted` is True if torchrun has started this process again: it continues a run that it began, no other.

        Raises:
            UserError: There is a run in the folder that is not to be continued, or it cannot be continued.
        """
        if self.processes.first:
            self.lock.acquire(patience=_LOCK_SECONDS if restarted else 0.0)
            resume = resume or (restarted and self.lock.ours())
            if resume:
                with writing(self.folder):
                    checkpoint.sweep(self.checkpoints)
        resume = self.processes.agree(str(resume)) == "True"
        step = checkpoint.newest(self.checkpoints)
        if self.processes.agree(str(step)) != str(step):
            raise CheckpointError(
                f"process {self.processes.rank} finds the newest checkpoint in {self.folder} at step {step}, the "
                "first process at another: give --output a folder that all hosts share"
            )
        if step is not None and not resume:
            raise UserError(
                f"{self.folder} holds a run at step {step}: pass --resume to continue it, or another --output"
            )
        saved = None if step is None else checkpoint.load(self.checkpoints, step)
        if saved is not None:
            self._check_same_run(saved.manifest)
            self.history, self.best, self.saved = saved.manifest["history"], saved.manifest["best"], step
        if self.processes.first:
            self.lock.sign()
            with writing(self.folder):
                if self.best["step"] is not None:  # it may have been killed between the checkpoint and this note
                    checkpoint.record_best(self.checkpoints, self.best)
                checkpoint.write_text(self.folder / "config.yaml", dump_config(self.config))
                lines = [json.dumps(entry) + "\n" for entry in self.history]  # none of an interrupted session
                checkpoint.write_text(self.folder / "metrics.jsonl", "".join(lines))
                self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=(step or 0) + 1)
            self.online = _wandb_run(self.folder, self.config) if self.config.wandb else None
        self.processes.wait()
        return saved

    def _check_same_run(self, manifest: dict) -> None:
        if manifest.get("format") != checkpoint.FORMAT:
            raise CheckpointError(
                f"the checkpoint in {self.folder} was written by another version of crate_fast "
                f"({manifest.get('crate_fast', 'unknown')}): resume with that one, or start a new run in another "
                "--output; --init takes its weights"
            )
        saved, present = renamed_settings(manifest["config"]), vars(self.config)
        pairs = [(name, saved.get(name), present.get(name)) for name in sorted(saved.keys() | present.keys())]
        differing = [pair for pair in pairs if pair[0] not in FREE_SETTINGS and pair[1] != pair[2]]
        facts = manifest["data"]
        differing += [(n, facts.get(n), v) for n, v in self.data_facts.items() if facts.get(n) != v]
        if differing:
            changes = ", ".join(f"{name}: {before!r} → {now!r}" for name, before, now in differing)
            raise CheckpointError(
                f"the checkpoint in {self.folder} was made with other settings or data ({changes}): resume with its "
                f"own (--recipe {self.folder / 'config.yaml'}), or start a new run in another --output"
            )

    def evaluated(self, step: int) -> bool:
        """Return True if the history has an evaluation of that step."""
        return any(entry["step"] == step and "val_loss" in entry for entry in reversed(self.history))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append an entry to the history and the logs."""
        self.history.append({"step": step, **values})
        if not self.processes.first:
            return
        with writing(self.folder):
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
            self.add_scalars(step, values)
            if "val_loss" in values:
                checkpoint.write_text(self.folder / "summary.csv", _summary(self.history))

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Add numbers to the curves alone, on the first process."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.online is not None:
            self.online.log(values, step=step)

    def save(
        self, step: int, epoch: float, weights: dict, ema: dict | None, training: dict, score: float | None = None
    ) -> None:
        """Write a checkpoint, and delete older ones. One with the largest score so far becomes the best.

        A collective call: when the first process cannot write, all raise, and earlier checkpoints are untouched.
        """
        better = score is not None and (self.best["score"] is None or score > self.best["score"])
        best = {"step": step, "score": score} if better else self.best
        facts = {"epoch": epoch, "config": vars(self.config), "data": self.data_facts}
        problem: Exception | None = None
        if self.processes.first:
            facts |= {"history": self.history, "best": best} | provenance()
            try:
                bad = poisoned(weights) + poisoned(ema or {})
                if bad:
                    raise NonFiniteError(
                        f"after step {step} the weights {', '.join(bad[:5])} are not finite, and are not saved; the "
                        "checkpoints before are whole: lower lr or raise the warm-up in a new run"
                    )
                checkpoint.save(self.checkpoints, step, weights, training, facts, ema)
                with writing(self.checkpoints):
                    if best["step"] == step:
                        checkpoint.record_best(self.checkpoints, best)
                    checkpoint.rotate(self.checkpoints, self.config.keep_checkpoints)
            except (OSError, UserError) as error:
                problem = error
        if self.processes.agree(str(problem or "")):
            raise problem or checkpoint.DiskError("the first process could not write a checkpoint; it says why")
        self.best, self.saved = best, step

    def close(self) -> None:
        """Close the logs and release the folder."""
        if self.board is not None:
            with writing(self.folder):
                self.board.close()
        if self.online is not None:
            self.online.finish()
        self.lock.release()


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
        checkpoint.write_text(note, secrets.token_hex(8))
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
