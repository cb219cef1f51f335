"""A run's folder and its checkpoints, which are complete or absent even if the process is killed.

    RUN/checkpoints/step_00001500/  model.safetensors (state dict), ema.safetensors, training.pt, manifest.json
    RUN/checkpoints/best.json       step with the best validation score
    RUN/config.yaml metrics.jsonl tensorboard/ .lock .owner

A checkpoint is written to a hidden folder, flushed to disk, then renamed. Loading verifies every file against the
manifest. States are saved unsharded, because loading PyTorch's sharded format unpickles. A resumed run keeps the
entries of metrics.jsonl up to its step. Only rank 0 writes.
"""

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crate_fast.env import provenance
from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig, dump_config
from crate_fast.train.distributed import Processes
from crate_fast.train.faults import NonFiniteError, poisoned, writing
from crate_fast.weight_files import describe_file

WEIGHTS, EMA, TRAINING, MANIFEST = "model.safetensors", "ema.safetensors", "training.pt", "manifest.json"
BEST = "best.json"


class CheckpointError(UserError):
    """Error for a checkpoint that is damaged, missing or from another run."""


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint at `step`."""
    return root / f"step_{step:08d}"


def _flush(path: Path) -> None:
    """Flush a file or folder to disk, so that it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically: write a temporary file, flush it, rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)


def steps(root: Path) -> list[int]:
    """Return the steps of the finished checkpoints in `root`, ascending."""
    return sorted(int(path.name[5:]) for path in root.glob("step_*") if path.is_dir() and path.name[5:].isdigit())


def newest(root: Path) -> int | None:
    """Return the step of the newest finished checkpoint, or None."""
    return max(steps(root), default=None)


def save(
    root: Path,
    step: int,
    weights: dict[str, Tensor],
    training: dict,
    facts: dict,
    ema: dict[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint, completely or not at all, and return its folder.

    `weights` and `ema` are state dicts of the model and of its moving average, if it has one. `training` holds
    optimiser state and progress as tensors and plain values; `facts` are JSON values for the manifest.

    Raises:
        UserError: The checkpoint could not be written; no part of it is left.
    """
    final = folder_of(root, step)
    temporary = root / f".{final.name}.tmp"
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            states = {WEIGHTS: weights} | ({EMA: ema} if ema is not None else {})
            for name, state in states.items():
                save_file(
                    {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, temporary / name
                )
            torch.save(training, temporary / TRAINING)
            files = {name: _fingerprint(temporary / name) for name in (*states, TRAINING)}
            content = {"step": step, "files": files, **facts}
            (temporary / MANIFEST).write_text(json.dumps(content, indent=2))
            for name in (*files, MANIFEST, "."):
                _flush(temporary / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _put_in_place(temporary, final)
    return final


def _put_in_place(temporary: Path, final: Path) -> None:
    temporary.replace(final)
    _flush(final.parent)


def manifest(root: Path, step: int) -> dict:
    """Return the manifest of a checkpoint: step, epoch, configuration, environment."""
    return _read_json(folder_of(root, step) / MANIFEST, "restore it, or delete its folder")


def _read_json(path: Path, remedy: str) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read (it is not a JSON object): {remedy}")
    return content


class Checkpoint(NamedTuple):
    """A checkpoint: state dicts of the model and its moving average, optimiser state and progress, manifest."""

    weights: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    training: dict
    manifest: dict


def load(root: Path, step: int) -> Checkpoint:
    """Read a checkpoint and verify it.

    Raises:
        CheckpointError: A file is missing or damaged. The message names it and the newest earlier intact checkpoint.
    """
    folder = folder_of(root, step)
    problem = _problem(folder)
    if problem:
        intact = [earlier for earlier in steps(root) if earlier < step and not _problem(folder_of(root, earlier))]
        remedy = f"{folder_of(root, intact[-1])} is intact: delete {folder} to continue from it" if intact else ""
        raise CheckpointError(f"{problem}. {remedy or 'No earlier checkpoint is intact'}")
    try:
        training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{folder / TRAINING} holds more than tensors and plain values, and loading it could run code: restore "
            f"it from a copy, or delete {folder}"
        ) from error
    ema = load_file(folder / EMA) if (folder / EMA).is_file() else None
    return Checkpoint(load_file(folder / WEIGHTS), ema, training, manifest(root, step))


def _problem(folder: Path) -> str | None:
    try:
        files = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / MANIFEST} cannot be read ({error})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        found = describe_file(path) if path.suffix == ".safetensors" else None
        if found and "git-lfs" in found[0]:
            return f"{path} is {found[0]}: {found[1]}"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} is damaged: it has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _fingerprint(path) != expected:
            return f"{path} is damaged: its SHA-256 differs from the one in {MANIFEST}"
    return None


def record_best(root: Path, best: dict) -> None:
    """Record the best checkpoint so far: `best` holds its "step" and its scores."""
    write_text(root / BEST, json.dumps(best))


def best_step(root: Path) -> int | None:
    """Return the step of the best checkpoint; None if none is recorded or that checkpoint was deleted."""
    path = root / BEST
    step = _read_json(path, "delete it to use the newest checkpoint").get("step") if path.is_file() else None
    return step if step in steps(root) else None


def sweep(root: Path) -> None:
    """Delete partial checkpoints that a killed process was writing or deleting."""
    for path in root.glob(".step_*"):
        shutil.rmtree(path)


def rotate(root: Path, keep: int) -> None:
    """Delete all checkpoints except the newest `keep` and the best."""
    kept = {*steps(root)[-keep:], best_step(root)}
    for folder in (folder_of(root, step) for step in steps(root) if step not in kept):
        hidden = folder.with_name(f".{folder.name}.gone")  # so that a kill leaves no partial checkpoint
        shutil.rmtree(hidden, ignore_errors=True)
        folder.replace(hidden)
        shutil.rmtree(hidden)


# --- the folder of a run

# Settings that a resumed run may change: how and where it computes, and what it keeps. As with another world size,
# rounding and the random numbers of a micro-batch may differ.
FREE_SETTINGS = (
    *("data_dir", "download", "workers", "threads", "checkpoint_every", "keep_checkpoints", "log_every"),
    *("parallel", "accumulate", "device", "grad_checkpointing", "max_unreadable", "nonfinite_limit"),
)
_LOCK_SECONDS = 120.0


@contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Lock a folder inside the context, by .lock; a killed process releases it. .owner names the process.

    Args:
        patience: Seconds to wait for the lock: a file server keeps the lock of a dead host for a while.

    Raises:
        CheckpointError: Another process holds the lock; the message names it.
    """
    owner, deadline = folder / ".owner", time.monotonic() + patience
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    with lock:  # closing it ends the lock
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    name = owner.read_text() if owner.is_file() else "unknown"
                    raise CheckpointError(
                        f"{folder} is being written by another run ({name}): stop it first, or pass another "
                        "--output. If torchrun itself was killed, its processes may still be running"
                    ) from error
                time.sleep(0.1)
            except OSError as error:  # some clusters mount file systems without locks
                only = "make sure that only one run writes there"
                warnings.warn(f"{folder / '.lock'} cannot be locked ({error}): {only}", stacklevel=3)
                break
        with writing(folder):
            write_text(owner, f"process {os.getpid()} on {socket.gethostname()}")
        yield


class RunFolder:
    """Folder of a run: checkpoints, logs and lock. A resumed run must have the same `data_facts`."""

    def __init__(self, folder: Path, config: TrainConfig, data_facts: dict, processes: Processes):
        self.folder, self.config, self.data_facts, self.processes = folder, config, data_facts, processes
        self.checkpoints = folder / "checkpoints"
        self.history: list[dict] = []  # the entries of metrics.jsonl
        self.board = None  # TensorBoard's writer
        self.saved: int | None = None  # the step of the last checkpoint
        self._lock = ExitStack()  # with `locked`

    def begin(self, resume: bool) -> Checkpoint | None:
        """Open the folder; return the newest checkpoint if there is a run to continue, None for a new run.

        Raises:
            UserError: The folder holds a run, and `resume` is False or the run cannot be resumed.
        """
        if self.processes.first:
            restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
            self._lock.enter_context(locked(self.folder, _LOCK_SECONDS if restarted else 0.0))
            if resume:
                with writing(self.folder):
                    sweep(self.checkpoints)
        self.processes.wait()  # until rank 0 has the lock: the run before may still save
        step = newest(self.checkpoints)
        if self.processes.agree(step) != step:
            raise CheckpointError(
                f"rank {self.processes.rank} finds the newest checkpoint in {self.folder} at step {step}, rank 0 "
                "at another step: pass an --output folder that all hosts share"
            )
        if step is not None and not resume:
            raise UserError(
                f"{self.folder} holds a run at step {step}: pass --resume to continue it, or another --output"
            )
        if step is None and (self.folder / "summary.json").is_file():  # a new run would replace its results
            raise UserError(f"{self.folder} holds a finished run without checkpoints: pass another --output")
        saved = None if step is None else load(self.checkpoints, step)
        if saved is not None:
            self._check_same_run(saved.manifest)
            self.history = self.processes.agree(self._read_history(step) if self.processes.first else [])
            self.saved = step
        if self.processes.first:
            from torch.utils.tensorboard import SummaryWriter  # slow, and evaluations import this module

            with writing(self.folder):
                write_text(self.folder / "config.yaml", dump_config(self.config))
                lines = [json.dumps(entry) + "\n" for entry in self.history]
                write_text(self.folder / "metrics.jsonl", "".join(lines))
                self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=(step or 0) + 1)
        self.processes.wait()
        return saved

    def _read_history(self, step: int) -> list[dict]:
        """Return the entries of metrics.jsonl up to a step. An interrupted session may have logged later ones."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last line
        return [entry for entry in entries if entry["step"] <= step]

    def _check_same_run(self, manifest: dict) -> None:
        saved = vars(TrainConfig()) | manifest["config"] | manifest["data"]  # an older version has fewer settings
        present = vars(self.config) | self.data_facts
        pairs = [(name, saved.get(name), present.get(name)) for name in sorted(saved.keys() | present.keys())]
        differing = [pair for pair in pairs if pair[0] not in FREE_SETTINGS and pair[1] != pair[2]]
        if differing:
            changes = ", ".join(f"{name}: {before!r} → {now!r}" for name, before, now in differing)
            raise CheckpointError(
                f"the checkpoint in {self.folder} has other settings or data ({changes}): resume with its "
                f"settings (--recipe {self.folder / 'config.yaml'}), or start a new run in another --output"
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

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers to TensorBoard only; call it on rank 0."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def save(self, step: int, epoch: float, weights: dict, ema: dict | None, training: dict) -> None:
        """Write a checkpoint and delete old ones. All processes must call it.

        If rank 0 cannot write, all processes raise, and earlier checkpoints stay intact.
        """
        problem: Exception | None = None
        if self.processes.first:
            facts = {"epoch": epoch, "config": vars(self.config), "data": self.data_facts}
            facts |= provenance(self.config.device)
            try:
                bad = poisoned(weights) + poisoned(ema or {})
                if bad:
                    raise NonFiniteError(
                        f"the weights {', '.join(bad[:5])} are not finite after step {step} and are not saved; "
                        "earlier checkpoints are intact: start a new run with a lower lr or a longer warm-up"
                    )
                _flush(self.folder / "metrics.jsonl")  # a resumed run reads its entries up to this step
                save(self.checkpoints, step, weights, training, facts, ema)
                with writing(self.checkpoints):
                    rotate(self.checkpoints, self.config.keep_checkpoints)
            except (OSError, UserError) as error:
                problem = error
        if self.processes.agree(str(problem or "")):
            raise problem or UserError("rank 0 could not write a checkpoint: see its error")
        self.saved = step

    def mark_best(self, best: dict) -> None:
        """Record the entry of the best evaluation, and delete the previous best checkpoint."""
        if self.processes.first:
            with writing(self.checkpoints):
                record_best(self.checkpoints, best)
                rotate(self.checkpoints, self.config.keep_checkpoints)

    def close(self) -> None:
        """Close the logs and release the folder."""
        if self.board is not None:
            with writing(self.folder):
                self.board.close()
        self._lock.close()
