"""Versions, devices and backends of this machine (`crate-fast env`), and the provenance of results.

The functions import PyTorch themselves, which takes seconds, so that the command can print the versions first.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import crate_fast
from crate_fast.options import main_of

if TYPE_CHECKING:
    import torch

_PACKAGES = ("crate_fast", "torch", "triton", "torchvision", "timm", "numpy", "safetensors")


def version_of(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> Iterator[tuple[str, str]]:
    """Yield name and value of each line of `crate-fast env`: versions, devices, backends."""
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    for name in _PACKAGES:
        yield name, version_of(name)
    import torch

    from crate_fast.backends import explain_backend
    from crate_fast.cpu_ops import uses_onednn

    products = "oneDNN" if uses_onednn() else "PyTorch's default"
    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{torch.get_num_threads()} threads, {capability}, fp32 products by {products}"
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        if device.type == "cuda":
            yield str(device), torch.cuda.get_device_name(device)
            yield "driver", driver_version()
        name, reason = explain_backend(device)
        yield f"backend on {device}", f"{name} ({reason})"
        if name == "triton" and not torch.version.hip:
            yield f"ptxas for {device}", _ptxas(device)


def _ptxas(device: torch.device) -> str:
    """Return the version of Triton's assembler, with a warning if it is known to miscompile (triton issue 9433)."""
    import torch

    version = ptxas_version(device)
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if torch.cuda.get_device_capability(device)[0] == 9 and numbers < (13, 3):
        return f"{version}, which can miscompile on Hopper: set TRITON_PTXAS_PATH to 13.3 or newer (docs/settings.md)"
    return version


def ptxas_version(device: torch.device) -> str:
    """Return the version of the assembler that Triton uses for this GPU; without a GPU, for Hopper."""
    import torch

    try:
        from triton.backends.nvidia.compiler import get_ptxas

        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
        return get_ptxas(10 * major + minor).version
    except (ImportError, RuntimeError) as error:  # another version of Triton, or no ptxas
        return f"unknown ({type(error).__name__})"


def compiler_versions(device: torch.device) -> str:
    """Return the versions behind the kernels on a device: "torch …, triton …, ptxas …"."""
    import torch

    versions = f"torch {torch.__version__}, triton {version_of('triton')}"
    if device.type != "cuda":
        return f"{versions}, interpreted"
    return versions if torch.version.hip else f"{versions}, ptxas {ptxas_version(device)}"


def driver_version() -> str:
    """Return the version of NVIDIA's driver, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


@functools.cache  # a long run has the commit that it was started from
def _commit() -> str:
    """Return the source tree's commit, with "+changes" if it is not clean; "installed" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "installed"
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def provenance(device: str = "auto") -> dict[str, str]:
    """Return commit, versions, processor or GPU, command line and time, as strings.

    `device` is the one that computes: "cpu", "cuda:N", or "auto" for a GPU if there is one.
    """
    import torch

    from crate_fast.cpu_ops import processor_name

    on_gpu = device != "cpu" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else processor_name()
    return {
        "commit": _commit(),
        "crate_fast": crate_fast.__version__,
        "torch": torch.__version__,
        "timm": version_of("timm"),
        "python": platform.python_version(),
        "device": f"{name}, {torch.get_num_threads()} threads",
        "command": shlex.join(sys.argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _print_facts(_options: argparse.Namespace) -> None:
    for name, value in describe():
        print(f"{name:<17}  {value}", flush=True)


main = main_of("env", _print_facts)
