"""The folder that a run writes: its lock, settings, measurements and checkpoints. `runs` opens a finished one.

Only the first process (rank 0) writes.
"""

from __future__ import annotations

import json
import os
import socket
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from crate_fast.env import provenance
from crate_fast.errors import UserError
from crate_fast.train import checkpoint
from crate_fast.train.checkpoint import CheckpointError, writing
from crate_fast.train.command_line import dump_config
from crate_fast.train.config import TrainConfig, renamed_settings
from crate_fast.train.distributed import Processes
from crate_fast.train.faults import NonFiniteError, poisoned
from crate_fast.train.loggers import Loggers

if TYPE_CHECKING:
    from crate_fast.train.trainer import Trainer

# Settings that a resumed run may change: they decide how and where it is computed, and what is kept. As with the
# number of processes, rounding and what is drawn by micro-batch may differ.
FREE_SETTINGS = (
    *("data_dir", "download", "workers", "threads", "checkpoint_every", "keep_checkpoints", "log_every", "profile"),
    *("wandb", "parallel", "accumulate", "device", "cuda_graphs", "grad_checkpointing", "max_unreadable"),
    "nonfinite_limit",
)
_LOCK_SECONDS = 120.0


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


class RunFolder:
    """A run on disk. `data_facts` must be the same in a resumed run: number of training images, classes."""

    def __init__(self, folder: Path, config: TrainConfig, data_facts: dict, processes: Processes):
        self.folder, self.config, self.data_facts, self.processes = folder, config, data_facts, processes
        self.checkpoints = folder / "checkpoints"
        self.history: list[dict] = []
        self.best: dict = {"step": None, "score": None}
        self.loggers: Loggers | None = None
        self.saved: int | None = None  # the step of the last checkpoint
        self.lock = RunLock(folder)

    def begin(self, trainer: Trainer, resume: bool, restarted: bool = False) -> None:
        """Start afresh, or restore the newest checkpoint into `trainer`, at step 0, if there is one.

        Args:
            trainer: The trainer.
            resume: Continue the run in the folder, if there is one.
            restarted: True if torchrun has started this process again: it continues a run that it began, no other.

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
        if step is not None:
            saved = checkpoint.load(self.checkpoints, step)
            self._check_same_run(saved.manifest)
            trainer.restore(*saved[:3])
            self.history, self.best, self.saved = saved.manifest["history"], saved.manifest["best"], step
        if self.processes.first:
            self.lock.sign()
            with writing(self.folder):
                if self.best["step"] is not None:  # it may have been killed between the checkpoint and this note
                    checkpoint.record_best(self.checkpoints, self.best)
                checkpoint.write_text(self.folder / "config.yaml", dump_config(self.config))
            self.loggers = Loggers(self.folder, self.history, trainer.step, self.config)
        self.processes.wait()

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
        entry = {"step": step, **values}
        self.history.append(entry)
        if self.loggers is not None:
            self.loggers.add(entry)

    def save(self, trainer: Trainer, score: float | None = None) -> None:
        """Write a checkpoint, and delete older ones. One with the largest score so far becomes the best.

        A collective call: when the first process cannot write, all raise, and earlier checkpoints are untouched.
        """
        state = trainer.state()
        better = score is not None and (self.best["score"] is None or score > self.best["score"])
        best = {"step": trainer.step, "score": score} if better else self.best
        problem: Exception | None = None
        if self.processes.first:
            try:
                self._write(trainer, *state, best)
            except (OSError, UserError) as error:
                problem = error
        if self.processes.agree(str(problem or "")):
            raise problem or checkpoint.DiskError("the first process could not write a checkpoint; it says why")
        self.best, self.saved = best, trainer.step

    def _write(self, trainer: Trainer, weights: dict, ema: dict | None, training: dict, best: dict) -> None:
        bad = poisoned(weights) + poisoned(ema or {})
        if bad:
            raise NonFiniteError(
                f"after step {trainer.step} the weights {', '.join(bad[:5])} are not finite, and are not saved; the "
                "checkpoints before are whole: lower lr or raise the warm-up in a new run"
            )
        facts = {"epoch": trainer.step / trainer.steps_per_epoch, "config": vars(self.config)}
        facts |= {"data": self.data_facts, "history": self.history, "best": best} | provenance()
        checkpoint.save(self.checkpoints, trainer.step, weights, training, facts, ema)
        with writing(self.checkpoints):
            if best["step"] == trainer.step:
                checkpoint.record_best(self.checkpoints, best)
            checkpoint.rotate(self.checkpoints, self.config.keep_checkpoints)

    def close(self) -> None:
        """Close the logs and release the folder."""
        if self.loggers is not None:
            self.loggers.close()
        self.lock.release()
