"""What this machine has, which backend would run and why: `python -m crate_fast.env`."""

import importlib.metadata
import platform
import sys

import torch

from crate_fast.backends import explain_backend
from crate_fast.settings import onednn_wanted

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
    onednn = "on" if onednn_wanted() and torch.backends.mkldnn.is_available() else "off"
    capability = torch.backends.cpu.get_cpu_capability()
    facts["cpu"] = f"{torch.get_num_threads()} threads, {capability}, oneDNN {onednn}"
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        if device.type == "cuda":
            facts[str(device)] = torch.cuda.get_device_name(device)
        name, reason = explain_backend(device)
        facts[f"backend on {device}"] = f"{name} ({reason})"
    return facts


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
