"""Every environment variable the package reads, in one place."""

import os

__all__ = ["onednn_wanted", "require_gpu"]


def _flag(name: str, default: bool) -> bool:
    value = os.environ.get(name)
    if value is None:
        return default
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r}: set it to 0 or 1, or unset it (default {int(default)})")
    return value == "1"


def onednn_wanted() -> bool:
    """`CRATE_FAST_ONEDNN` (default 1): fp32 products on the CPU through oneDNN instead of PyTorch's default."""
    return _flag("CRATE_FAST_ONEDNN", True)


def require_gpu() -> bool:
    """`CRATE_FAST_REQUIRE_GPU` (default 0): GPU tests fail instead of skipping where there is no GPU."""
    return _flag("CRATE_FAST_REQUIRE_GPU", False)
