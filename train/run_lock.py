"""One writer a folder: the first process of a run holds its lock while it lives."""

import contextlib
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path

from crate_fast.train.checkpoint import CheckpointError, writing

__all__ = ["RunLock"]

_TAKEN = (BlockingIOError, PermissionError)  # which of them, the system chooses


class RunLock:
    """RUN/.lock, held from `acquire` to `release` or to the end of the process, however that comes.

    It is a POSIX record lock: loading processes do not inherit it, and file systems shared by hosts know it. It is a
    process's: two in one do not see each other.

    Args:
        folder: Of the run; made if it is not there.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file = None

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lock.

        Args:
            patience: Seconds to wait for it: a file server holds a dead host's lock for a while.

        Raises:
            CheckpointError: Another process has it; the message says which.
            DiskError: The folder cannot be written.
        """
        with writing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
        self._file, deadline = file, time.monotonic() + patience
        try:
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except _TAKEN:
                    if time.monotonic() >= deadline:
                        raise
                time.sleep(1)
        except _TAKEN as error:
            owner = self._read()
            self.release()
            raise CheckpointError(
                f"{self.path.parent} is being written by another run (process {owner.get('process', 'unknown')} on "
                f"{owner.get('host', 'another host')}): end it first, or give another --output. After torchrun "
                "itself was killed, its processes may still be running"
            ) from error
        except OSError as error:  # some clusters mount their file system without locks
            warnings.warn(
                f"{self.path} cannot be locked ({error}): see to it that one run alone writes there", stacklevel=2
            )

    def ours(self) -> bool:
        """Whether the last run in the folder was started by the torchrun that started this process."""
        return self._read().get("launcher") == _launcher()

    def sign(self) -> None:
        """Write into the lock who holds it."""
        with writing(self.path.parent):
            self._file.seek(0)
            self._file.truncate()
            json.dump({"host": socket.gethostname(), "process": os.getpid(), "launcher": _launcher()}, self._file)
            self._file.flush()

    def release(self) -> None:
        """Give the lock back; nothing if it is not held."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # on a full disk, which has been reported
                self._file.close()
            self._file = None

    def _read(self) -> dict:
        self._file.seek(0)
        try:
            return json.loads(self._file.read())
        except ValueError:  # nobody has signed yet
            return {}


def _launcher() -> str:
    """Names the torchrun above this process: the same for its restarts.

    Of several hosts any may have the first process after a restart: then the name is `--rdzv-id` alone, if it is one.
    """
    name, hosts = os.environ.get("TORCHELASTIC_RUN_ID", "none"), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    return name if hosts > 1 and name != "none" else f"{name} {socket.gethostname()} {os.getppid()}"
