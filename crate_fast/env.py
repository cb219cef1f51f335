"""What this machine has, which backend would run and why: `python -m crate_fast.env`."""

import importlib.metadata
import platform
import sys

import torch

from crate_fast.backends import explain_backend
from crate_fast.cpu import uses_onednn

__all__ = ["describe", "main"]

_PACKAGES = ("crate_fast", "torch", "triton", "torchvision", "timm", "numpy", "einops", "safetensors")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, str]:
    """Versions, devices and backends of this machine, as printed by `python -m crate_fast.env`."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: _version(name) for name in _PACKAGES}
    products = "oneDNN" if uses_onednn() else "PyTorch's default"
    capability = torch.backends.cpu.get_cpu_capability()
    facts["cpu"] = f"{torch.get_num_threads()} threads, {capability}, fp32 products by {products}"
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        if device.type == "cuda":
            facts[str(device)] = torch.cuda.get_device_name(device)
        name, reason = explain_backend(device)
        facts[f"backend on {device}"] = f"{name} ({reason})"
        if name == "triton" and not torch.version.hip:
            facts[f"ptxas for {device}"] = _ptxas(device)
    return facts


def _ptxas(device: torch.device) -> str:
    """The assembler Triton would use, and a warning where it is known to miscompile (triton issue 9433)."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = torch.cuda.get_device_capability(device)
    tool = get_ptxas(10 * major + minor)
    if major == 9 and tuple(map(int, tool.version.split(".")[:2])) < (13, 3):
        return f"{tool.version}, which can miscompile on Hopper: set TRITON_PTXAS_PATH to 13.3 or newer (README)"
    return tool.version


def main(argv: list[str] | None = None) -> int:
    """Print `describe()`."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments:
        raise SystemExit(f"python -m crate_fast.env takes no arguments, got {arguments}")
    facts = describe()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
