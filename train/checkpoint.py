"""Checkpoints that are complete or absent, whenever the process is killed.

    RUN/checkpoints/step_00001500/  model.safetensors (released names), ema.safetensors, training.pt, manifest.json
    RUN/checkpoints/best.json       step with the best validation score

A checkpoint is written into a hidden folder, flushed to disk, and renamed; reading verifies every file against the
manifest. States are unsharded: PyTorch's sharded format is not used, because its reader unpickles.
"""

import errno
import hashlib
import json
import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.weight_files import describe_file

WEIGHTS, EMA, TRAINING, MANIFEST = "model.safetensors", "ema.safetensors", "training.pt", "manifest.json"
BEST = "best.json"
FORMAT = 2  # version of training.pt and the manifest; another version is not resumed


class CheckpointError(UserError):
    """A checkpoint is damaged, missing or of another run."""


class DiskError(UserError):
    """A file of a run could not be written."""


@contextmanager
def writing(folder: Path):
    """Turn a failure to write below `folder` into a `DiskError` that says what is safe and what to do."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        number = error.errno if isinstance(error, OSError) else None
        cut = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)  # torch.save's reports
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or cut or free < 2**20
        if isinstance(error, RuntimeError) and not full:
            raise
        remedy = "free some space" if full else "see to its permissions and its disk"
        raise DiskError(
            f"{folder} could not be written ({error}; {free / 2**20:,.0f} MiB are free there). Finished checkpoints "
            f"are untouched: {remedy}, then continue with --resume"
        ) from error


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return root / f"step_{step:08d}"


def _flush(path: Path) -> None:
    """Write a file or folder through to the disk, so that it survives a power cut."""
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
    """Replace a small file atomically: write beside it, flush, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)


def steps(root: Path) -> list[int]:
    """Return the steps of the finished checkpoints in `root`, ascending."""
    return sorted(int(path.name[5:]) for path in root.glob("step_*") if path.is_dir() and path.name[5:].isdigit())


def newest(root: Path) -> int | None:
    """Return the step of the last finished checkpoint, or None."""
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

    `weights` and `ema` are state dicts of the model and of its moving average, if there is one. `training` has the
    optimiser's state and progress, tensors and plain values; `facts` are JSON values for the manifest.

    Raises:
        DiskError: It could not be written; nothing of it is left behind.
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
            content = {"step": step, "format": FORMAT, "files": files, **facts}
            (temporary / MANIFEST).write_text(json.dumps(content, indent=2))
            for name in (*files, MANIFEST, "."):
                _flush(temporary / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _put_in_place(temporary, final)
    return final


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename a written checkpoint. An older one of the same step is kept until then, where `sweep` finds it."""
    before = final.with_name(f".{final.name}.old")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():
        final.replace(before)
    temporary.replace(final)
    _flush(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def manifest(root: Path, step: int) -> dict:
    """Return what is recorded with a checkpoint: step, configuration, history, environment."""
    return _read_json(folder_of(root, step) / MANIFEST, "restore it, or delete its folder")


def _read_json(path: Path, remedy: str) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read (it holds no JSON object): {remedy}")
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
        CheckpointError: A file is missing or damaged; the message names it and the newest whole checkpoint before.
    """
    folder = folder_of(root, step)
    problem = _problem(folder)
    if problem:
        whole = [earlier for earlier in steps(root) if earlier < step and not _problem(folder_of(root, earlier))]
        remedy = f"{folder_of(root, whole[-1])} is whole: delete {folder} to continue from it" if whole else ""
        raise CheckpointError(f"{problem}. {remedy or 'no earlier one is whole'}")
    try:
        training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{folder / TRAINING} holds more than tensors and plain values and is not read, since that could run "
            f"code: restore it from a copy, or delete {folder}"
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
        if found and "damaged" not in found[0]:  # a git-lfs pointer in a clone, say
            return f"{path} is {found[0]}: {found[1]}"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} is damaged: {path.stat().st_size} bytes, {expected['bytes']} were written"
        if _fingerprint(path) != expected:
            return f"{path} is damaged: its SHA-256 is not the one written in {MANIFEST}"
    return None


def record_best(root: Path, best: dict) -> None:
    """Record the best checkpoint so far: `best` holds its "step" and "score"."""
    write_text(root / BEST, json.dumps(best))


def best_step(root: Path) -> int | None:
    """Return the step that `record_best` noted, or None if it noted none or that checkpoint is gone."""
    path = root / BEST
    step = _read_json(path, "delete it to use the newest checkpoint").get("step") if path.is_file() else None
    return step if step in steps(root) else None


def sweep(root: Path) -> None:
    """Clean up after a killed process: delete partial checkpoints, and restore one that was about to be replaced."""
    for path in root.glob(".step_*.old"):
        final = root / path.name[1 : -len(".old")]
        if not final.exists():
            path.replace(final)
    for suffix in ("tmp", "old", "gone"):
        for path in root.glob(f".step_*.{suffix}"):
            shutil.rmtree(path)


def rotate(root: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the best."""
    kept = {*steps(root)[-keep:], best_step(root)}
    for folder in (folder_of(root, step) for step in steps(root) if step not in kept):
        hidden = folder.with_name(f".{folder.name}.gone")  # a kill leaves no half of it under its name
        shutil.rmtree(hidden, ignore_errors=True)
        folder.replace(hidden)
        shutil.rmtree(hidden)
