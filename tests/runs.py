"""What the tests of training share: tiny runs as a user starts them, in processes of their own."""

import json
import socket
import subprocess
import sys
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


def start(*arguments: str, launcher: tuple[str, ...] = (), script: str = "pretrain", **options) -> subprocess.Popen:
    """Start a tiny run; its output is in one pipe."""
    command = [sys.executable, *launcher, str(ROOT / "train" / f"{script}.py"), *TINY, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, **options)


def run(*arguments: str, launcher: tuple[str, ...] = (), script: str = "pretrain", status: int = 0, **options) -> str:
    """Run to the end; what it printed."""
    process = start(*arguments, launcher=launcher, script=script, **options)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == status, text
    return text


def torchrun(processes: int, *words: str) -> tuple[str, ...]:
    """`torchrun` on this host, on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    start = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port))
    return (*start, *words)


def wait_until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    """Until the condition holds; the process must not end before."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline, "waited too long"
        time.sleep(0.01)


def weights(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    """A checkpoint's weights ("model") or their moving average ("ema")."""
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal, bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def entries(folder: Path) -> list[dict]:
    """All of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
