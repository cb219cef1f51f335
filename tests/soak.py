"""Soak test: a run under torchrun that is killed repeatedly ends with bit-identical weights to an undisturbed run.

    python tests/soak.py --output SOAK --every 25 -- --dataset folder --data-dir DATA --val-split test …

The words after `--` are options of train/pretrain.py. Two processes train on a CPU, with gloo. They are killed at
random moments in one of three ways: kill -9 of one process (torchrun restarts all); kill -9 of all and torchrun
(started again with --resume); SIGTERM to torchrun. Not collected by pytest; docs/results/soak.md reports one hour.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from runs import ROOT, entries, free_port, same, weights

from crate_fast.train import checkpoint

KINDS = ("kill -9 of one process", "kill -9 of all", "SIGTERM to torchrun")


def torchrun(folder: Path, words: list[str], log: Path, restarts: int = 100) -> subprocess.Popen:
    """Start or continue a run of two processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--max-restarts", str(restarts), "--master_port", str(free_port())]
    command += [str(ROOT / "train" / "pretrain.py"), *words]
    command += ["--output", str(folder), "--resume", "--device", "cpu"]
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True)


def children(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    command = ["ps", "-o", "pid=", "--ppid", str(pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def _kill(kind: str, process: subprocess.Popen, draw: random.Random) -> None:
    """Kill in the given way; torchrun survives only the first."""
    pids = children(process.pid)
    if kind == KINDS[0] and pids:
        os.kill(draw.choice(pids), signal.SIGKILL)
    elif kind == KINDS[1]:
        for pid in (process.pid, *pids):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    else:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def disturb(folder: Path, words: list[str], every: float, seed: int) -> dict:
    """Run to the end through kills, on average `every` seconds apart; return counts and times for the report."""
    draw, kinds, saving, lost = random.Random(seed), Counter(), 0, []
    began, log = time.time(), folder.with_suffix(".log")
    process = torchrun(folder, words, log)
    while not (folder / "summary.json").exists():
        moment = time.time() + draw.expovariate(1 / every)
        while time.time() < moment and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            _finish(process, log)
            break
        before = _step(folder)
        kind = draw.choice(KINDS)
        _kill(kind, process, draw)
        kinds[kind] += 1
        saving += bool(list((folder / "checkpoints").glob(".step_*")))
        newest = checkpoint.newest(folder / "checkpoints")
        if newest is not None:
            checkpoint.load(folder / "checkpoints", newest)
            lost.append(max(0, before - newest))
        if process.poll() is not None and not (folder / "summary.json").exists():  # the kill ended torchrun
            process = torchrun(folder, words, log)
    process.wait()
    return {
        "kills": dict(kinds),
        "kills_that_left_a_half_written_checkpoint": saving,
        "steps_lost_by_a_kill_at_most": max(lost, default=0),
        "seconds": round(time.time() - began),
    }


def _finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for torchrun, which nobody kills; exit with an error if it fails."""
    if process.wait():
        sys.exit(f"error: a run ended by itself with status {process.returncode}: read {log}, change the settings")


def _step(folder: Path) -> int:
    try:
        return max((entry["step"] for entry in entries(folder)), default=0)
    except (OSError, ValueError):  # no file yet, or an unfinished line
        return 0


def compare(first: Path, second: Path) -> dict[str, bool]:
    """Compare the last checkpoints of two runs bit by bit."""
    step = checkpoint.newest(first / "checkpoints")
    saved = [checkpoint.load(run / "checkpoints", step).training["optimizer"] for run in (first, second)]
    moments = [{(p, k): torch.as_tensor(v) for p, m in one["state"].items() for k, v in m.items()} for one in saved]
    values = [[{k: v for k, v in e.items() if k != "images_per_s"} for e in entries(run)] for run in (first, second)]
    return {
        "weights": same(weights(first, step), weights(second, step)),
        "ema": same(weights(first, step, "ema"), weights(second, step, "ema")),
        "optimizer": same(*moments),
        "metrics": values[0] == values[1],
    }


def main(argv: list[str] | None = None) -> int:
    """Run the soak test; return 0 if the two runs end with equal states."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for both runs and report.json")
    parser.add_argument("--every", type=float, default=25.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0, help="of moments and kinds")
    parser.add_argument("words", nargs="+", help="settings of the run, after --; an EMA among them")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    quiet, broken = options.output / "undisturbed", options.output / "disturbed"
    log = quiet.with_suffix(".log")
    _finish(torchrun(quiet, [*options.words, "--dry-run"], log, restarts=0), log)
    calm = torchrun(quiet, options.words, log)
    report = disturb(broken, options.words, options.every, options.seed)
    _finish(calm, log)
    report["equal"] = compare(quiet, broken)
    report["steps"] = checkpoint.newest(quiet / "checkpoints")
    checkpoint.write_text(options.output / "report.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0 if all(report["equal"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
