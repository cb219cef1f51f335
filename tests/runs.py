"""Tiny training runs in separate processes, as a user starts them, for the tests."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
TINY = [
    *("--train-samples", "96", "--val-samples", "21", "--image-size", "32", "--patch-size", "8", "--dim", "32"),
    *("--depth", "2", "--heads", "2", "--batch-size", "16", "--epochs", "2", "--log-every", "1"),
    *("--segmentation-samples", "12", "--threads", "1", "--seed", "3", "--device", "cpu"),
]


class Forked:
    """A run in processes forked from one that has imported everything, so that they start at once; like a `Popen`.

    Args:
        argv: Command line of the script.
        script: Its module in crate_fast.train.
        processes: Number of processes, with the environment that torchrun sets.
    """

    def __init__(self, argv: list[str], script: str, processes: int):
        port = str(free_port())
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")  # noqa: SIM115  (open as long as this object)
        self.processes = []
        for rank in range(processes):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1"}
            arguments = (script, argv, environment if processes > 1 else {}, self.log.name)
            self.processes.append(_FORKED.Process(target=_main, args=arguments))
        for process in self.processes:
            process.start()

    @property
    def returncode(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        deadline = time.time() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.time()))
            if process.exitcode is None:
                self.kill()
                raise TimeoutError(f"after {timeout} s it still runs:\n{self.log.read()}")
        return self.log.read(), None


_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["crate_fast.train.pretrain", "crate_fast.train.linear_probe"])


def _main(script: str, argv: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.exit(importlib.import_module(f"crate_fast.train.{script}").main(argv))


def start(
    *arguments: str, processes: int = 1, script: str = "pretrain", launcher: tuple[str, ...] = ()
) -> subprocess.Popen | Forked:
    """Start a tiny run: with a launcher, such as `torchrun(2)`, as a user does; else forked, which is quicker."""
    if not launcher:
        return Forked([*TINY, *arguments], script, processes)
    command = [sys.executable, *launcher, str(ROOT / "train" / f"{script}.py"), *TINY, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def run(*arguments: str, status: int = 0, **how) -> str:
    """Run to the end, and return the output; see `start`."""
    process = start(*arguments, **how)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == status, text
    return text


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(processes: int, *words: str) -> tuple[str, ...]:
    """Return the words that start `torchrun` on this host, on a free port."""
    start = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port()))
    return (*start, *words)


def wait_until(condition: Callable[[], object], process: subprocess.Popen | Forked, seconds: float = 120) -> None:
    """Wait until the condition holds; the process must not end before."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline, "waited too long"
        time.sleep(0.01)


def weights(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    """Load a checkpoint's weights ("model") or their moving average ("ema")."""
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return True if two state dicts are bit-identical."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(folder: Path) -> dict[int, float]:
    """Return the training loss by step."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def entries(folder: Path) -> list[dict]:
    """Return the entries of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
