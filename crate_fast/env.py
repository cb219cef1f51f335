"""Versions, devices and backends of this machine (`python -m crate_fast.env`), and the provenance of results."""

import argparse
import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import crate_fast
from crate_fast.backends import explain_backend
from crate_fast.cpu_ops import processor_name, uses_onednn
from crate_fast.errors import run_command
from crate_fast.options import parse

_PACKAGES = ("crate_fast", "torch", "triton", "torchvision", "timm", "numpy", "safetensors")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, str]:
    """Return the versions, devices and backends of this machine, as printed by `python -m crate_fast.env`."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: _version(name) for name in _PACKAGES}
    products = "oneDNN" if uses_onednn() else "PyTorch's default"
    capability = torch.backends.cpu.get_cpu_capability()
    facts["cpu"] = f"{torch.get_num_threads()} threads, {capability}, fp32 products by {products}"
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        if device.type == "cuda":
            facts[str(device)] = torch.cuda.get_device_name(device)
            facts["driver"] = driver_version()
        name, reason = explain_backend(device)
        facts[f"backend on {device}"] = f"{name} ({reason})"
        if name == "triton" and not torch.version.hip:
            facts[f"ptxas for {device}"] = _ptxas(device)
    return facts


def _ptxas(device: torch.device) -> str:
    """Return the version of Triton's assembler, with a warning if it is known to miscompile (triton issue 9433)."""
    version = ptxas_version(device)
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if torch.cuda.get_device_capability(device)[0] == 9 and numbers < (13, 3):
        return f"{version}, which can miscompile on Hopper: set TRITON_PTXAS_PATH to 13.3 or newer (docs/settings.md)"
    return version


def ptxas_version(device: torch.device) -> str:
    """Return the version of the assembler that Triton uses for this GPU; without a GPU, for Hopper."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
        return get_ptxas(10 * major + minor).version
    except (ImportError, RuntimeError) as error:  # another version of Triton, or no ptxas
        return f"unknown ({type(error).__name__})"


def compiler_versions(device: torch.device) -> str:
    """Return the versions behind the kernels on a device: "torch …, triton …, ptxas …"."""
    versions = f"torch {torch.__version__}, triton {_version('triton')}"
    if device.type != "cuda":
        return f"{versions}, interpreted"
    return versions if torch.version.hip else f"{versions}, ptxas {ptxas_version(device)}"


def driver_version() -> str:
    """Return the version of NVIDIA's driver, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def _commit() -> str:
    """Return the source tree's commit, with "+changes" if it is not clean; "installed" outside a checkout."""
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
    """Return commit, versions, processor or GPU, command line and time, as strings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    return {
        "commit": _commit(),
        "crate_fast": crate_fast.__version__,
        "torch": torch.__version__,
        "timm": _version("timm"),
        "python": platform.python_version(),
        "device": f"{device}, {torch.get_num_threads()} threads",
        "command": shlex.join(sys.argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _print_facts(_options: argparse.Namespace) -> None:
    facts = describe()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def main(argv: list[str] | None = None) -> int:
    """Print `describe()`."""
    return run_command(lambda: _print_facts(parse("env", argv)))


if __name__ == "__main__":
    sys.exit(main())
