"""Helpers of the training tests: tiny runs, in this process or in others, and single training steps."""

import contextlib
import faulthandler
import importlib
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from crate_fast.train import report
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.loader import Batch, DataSplits
from crate_fast.train.distributed import Processes
from crate_fast.train.faults import Interruption
from crate_fast.train.trainer import StepResult, Trainer

ROOT = Path(__file__).parent.parent
TINY = [
    *("--train-samples", "96", "--val-samples", "21", "--image-size", "32", "--patch-size", "8", "--dim", "32"),
    *("--depth", "2", "--heads", "2", "--batch-size", "16", "--epochs", "2", "--log-every", "1"),
    *("--segmentation-samples", "12", "--threads", "1", "--seed", "3", "--device", "cpu"),
]

ALONE = Processes(0, 0, 1, torch.device("cpu"))


def tiny_config(**settings) -> TrainConfig:
    """Return the settings of a tiny run on shape_scenes."""
    sizes = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "batch_size": 8, "epochs": 1}
    return TrainConfig(**(sizes | settings))


def trainer(**settings) -> Trainer:
    """Return a trainer of a tiny model for steps on `batches`, four per epoch. It reads and writes no files."""
    config = tiny_config(**settings)
    data = DataSplits(range(4 * config.batch_size), range(8), tuple("abcdefghijkl"))
    return Trainer(config, Path("unused"), data, ALONE, Interruption())


def batches(trainer: Trainer) -> list[Batch]:
    """Return batches of noise for all steps of a trainer."""
    generator, size = torch.Generator().manual_seed(1), trainer.config.batch_size
    return [
        Batch(
            torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(12, (size,), generator=generator),
        )
        for _ in range(trainer.total_steps)
    ]


def steps(trainer: Trainer, count: int = 4) -> Iterator[StepResult]:
    """Take steps on `batches`."""
    loader = iter(batches(trainer))
    return (trainer.train_step(loader) for _ in range(count))


def without_figures(change=setattr) -> None:
    """Skip the figures of this process's runs, and waits for the disk; both take longer than a tiny run."""
    for name in ("curve_figure", "image_grid"):
        change(report, name, lambda *arguments, **options: None)
    change(os, "fsync", lambda descriptor: None)


class Forked:
    """A run with the interface of `Popen`, in processes forked from one that has imported everything.

    The processes have torchrun's environment and first run the Python code `before`. `script` is a module of
    crate_fast.train; a name with a dot is one of crate_fast.
    """

    def __init__(self, argv: list[str], processes=1, script="pretrain", before=""):
        port = str(free_port())
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")  # noqa: SIM115  (stays open)
        self.processes = []
        for rank in range(processes):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            numbers |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in numbers.items()} if processes > 1 else {}
            arguments = (script, argv, environment, self.log.name, before)
            self.processes.append(_FORKED.Process(target=_main, args=arguments))
            self.processes[-1].start()

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        deadline = time.time() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.time()))
            if process.exitcode is None:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout} s:\n{self.log.read()}")
        return self.log.read(), None


_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["crate_fast.train.trainer", "torch.utils.tensorboard"])


def _main(script: str, argv: list[str], environment: dict[str, str], log: str, before: str) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    _write_to(log)
    multiprocessing.set_start_method("fork", force=True)  # the data loaders' default
    without_figures()
    exec(before, {})
    package = "crate_fast" if "." in script else "crate_fast.train"
    sys.exit(importlib.import_module(f"{package}.{script}").main(argv))


def _write_to(log: str) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)


class ForkedPython:
    """Stand-in for `subprocess.Popen` in `isolation.Process`: a Python command in a forked process."""

    def __init__(self, command: list[str], cwd: Path, stdout: io.TextIOBase, env: dict[str, str], **_):
        self.process = _FORKED.Process(target=_run_python, args=(command[1:], cwd, stdout.name, env))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode


def _run_python(words: list[str], folder: Path, log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _write_to(log)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    if words[:2] == ["-X", "faulthandler"]:
        faulthandler.enable()
        words = words[2:]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


@contextlib.contextmanager
def forked_python(module, fresh: str):
    """Let isolation.py (imported as `module`) fork Python commands, except those that contain the word `fresh`."""

    def start(command: list[str], **options) -> ForkedPython | subprocess.Popen:
        return (subprocess.Popen if fresh in command else ForkedPython)(command, **options)

    first = _FORKED.Process(target=int)  # waits for the imports, which then count in no command's time limit
    first.start()
    first.join()
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT")}
    with unittest.mock.patch.object(module, "subprocess", SimpleNamespace(Popen=start, **names)):
        yield


def start(*arguments: str, **how) -> Forked:
    """Start a tiny run; `how` are the arguments of `Forked`."""
    return Forked([*TINY, *arguments], **how)


def run(*arguments: str, status: int = 0, script: str = "pretrain", **how) -> str:
    """Do a tiny run and return what it printed. It runs in this process unless `how` asks for others."""
    if how.get("processes", 1) > 1 or "before" in how:
        process = start(*arguments, script=script, **how)
        text, _ = process.communicate()
        assert process.poll() == status, text
        return text
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = importlib.import_module(f"crate_fast.train.{script}").main([*TINY, *arguments])
    assert found == status, printed.getvalue()
    return printed.getvalue()


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(condition: Callable, process: Forked | subprocess.Popen | None = None, seconds: float = 300) -> None:
    """Wait until the condition holds; fail if the process ends first."""
    deadline = time.time() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.time() < deadline, "waited too long"
        time.sleep(0.01)


def weights(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    """Load a checkpoint's weights ("model") or their moving average ("ema")."""
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return True if two state dicts are equal, bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def back_to(folder: Path, step: int, copy: Path) -> Path:
    """Copy a run as it was after it saved a step; return the copy's folder."""
    shutil.copytree(folder, copy)
    for later in (copy / "checkpoints").glob("step_*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    (copy / "checkpoints" / "best.json").unlink()
    return copy


def entries(folder: Path) -> list[dict]:
    """Return all entries of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Return the training loss by step."""
    return {entry["step"]: entry["loss"] for entry in entries(folder) if "loss" in entry}
