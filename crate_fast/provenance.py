"""Where a result comes from: commit, versions, machine, time."""

import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import timm
import torch

import crate_fast
from crate_fast.cpu import processor_name

__all__ = ["provenance"]


def _commit() -> str:
    """The source tree's commit, with "+changes" if it is not clean; "installed" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "installed"

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def provenance() -> dict[str, str]:
    """Commit, versions, processor or GPU, command line and time, as plain strings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    return {
        "commit": _commit(),
        "crate_fast": crate_fast.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": f"{device}, {torch.get_num_threads()} threads",
        "command": " ".join(sys.argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
