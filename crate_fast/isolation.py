"""Run commands in separate processes with time limits, to contain crashes, hangs and excessive output.

It uses only the standard library, so that the packages under test cannot break it.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 0.02
LAST_SECONDS = 3.0  # for a killed process to end; one that hangs in a driver is abandoned


@dataclass(frozen=True)
class Job:
    """A command and its limits."""

    name: str  # also of its log
    command: list[str]
    limit_s: float  # then it is killed, with all processes that it started
    environment: dict[str, str | None] = field(default_factory=dict)  # added to the runner's; None removes
    beat: Path | None = None  # a file that it must touch every `stall_s`; the first touch may take `start_s`
    stall_s: float = 0.0
    start_s: float = 60.0
    items: list[dict] = field(default_factory=list)  # its work items, if known


class Process:
    """A running job, in its own session, with its output in a file.

    `reason` is why it failed, None if its exit status was 0.
    """

    def __init__(self, job: Job, cwd: Path, logs: Path, environment: dict[str, str], hard: float):
        self.job, self.reason, self.killed_at = job, None, None
        self.log = logs / f"{job.name.replace('/', '_').replace(' ', '_')}.log"
        self.started = time.monotonic()
        self.deadline = min(self.started + job.limit_s, hard)
        if job.beat is not None:
            job.beat.touch()
            self.first_beat = job.beat.stat().st_mtime
        self.finished = False
        variables = (environment | job.environment).items()
        try:
            with open(self.log, "ab") as file:
                self.popen = subprocess.Popen(
                    job.command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    env={name: value for name, value in variables if value is not None}, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self.popen, self.finished, self.reason = None, True, f"does not start: {error}"

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def check(self) -> bool:
        """Return True if the process has ended; kill it if its time is up."""
        if self.finished:
            return True
        status = self.popen.poll()
        if status is not None:
            self._finish(self.reason or _ending(status))
        elif self.killed_at is not None:
            if time.monotonic() > self.killed_at + LAST_SECONDS:
                self._finish(f"{self.reason}, and cannot be killed")
        elif time.monotonic() >= self.deadline:
            self.kill(f"timed out after {self.seconds:.0f} s")
        elif self._stalled():
            self.kill(f"timed out: no progress for {self._stall_limit():.0f} s")
        return self.finished

    def _stall_limit(self) -> float:
        return self.job.start_s if self.job.beat.stat().st_mtime == self.first_beat else self.job.stall_s

    def _stalled(self) -> bool:
        return self.job.beat is not None and time.time() - self.job.beat.stat().st_mtime > self._stall_limit()

    def kill(self, reason: str) -> None:
        """Kill the process and all processes that it started, without waiting: `check` returns True once it ends."""
        if not self.finished and self.killed_at is None:
            self.reason, self.killed_at = reason, time.monotonic()
            _kill_all(self.popen.pid)

    def _finish(self, reason: str | None) -> None:
        self.finished, self.reason = True, reason
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)  # its remaining children


def _ending(status: int) -> str | None:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return None if status == 0 else f"exit status {status}"


def _kill_all(pid: int) -> None:
    """Send SIGKILL to a process's group and to all its descendants, which may be in other groups."""
    descendants = _descendants(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for found in [pid, *descendants]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(found, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, queue = [], deque([pid])
    while queue:
        below = children.get(queue.popleft(), [])
        found += below
        queue.extend(below)
    return found


def run_jobs(
    jobs: Iterable[Job],
    start: Callable[[Job], Process],
    done: Callable[[Process], Iterable[Job] | None],
    parallel: int,
    soft: float,
) -> list[Job]:
    """Run jobs in the given order, `parallel` at a time; return those that were not started.

    `start` starts a job, and `check` of its process enforces the limits. `done` is called with each process that has
    ended, and returns more jobs to run. No job is started after `soft`, a value of `time.monotonic()`.
    """
    queue, running = deque(jobs), []
    try:
        while running or (queue and time.monotonic() < soft):
            while queue and len(running) < parallel and time.monotonic() < soft:
                running.append(start(queue.popleft()))
            for process in [process for process in running if process.check()]:
                running.remove(process)
                queue.extend(done(process) or ())
            time.sleep(POLL_SECONDS)
    finally:
        for process in running:  # after an exception
            process.kill("interrupted")
        while not all(process.check() for process in running):
            time.sleep(POLL_SECONDS)
    return list(queue)


def tail(path: Path, lines: int = 12) -> str:
    """Return the end of a text file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 350 * lines))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
