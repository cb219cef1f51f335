"""The environment variables that the package reads, and the number of cores that it may use."""

import os

from crate_fast.errors import UserError

FUSED_PRODUCTS = "CRATE_FAST_FUSED_PRODUCTS"
SELF_CHECK = "CRATE_FAST_SELF_CHECK"


def _flag(name: str) -> bool | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if value not in ("0", "1"):
        raise UserError(f"{name}={value!r}: set it to 0 or 1, or unset it")
    return value == "1"


def onednn_wanted() -> bool | None:
    """Return `CRATE_FAST_ONEDNN`: fp32 products on the CPU by oneDNN (1) or MKL (0); None: by the processor."""
    return _flag("CRATE_FAST_ONEDNN")


def fused_products_wanted() -> bool | None:
    """Return `CRATE_FAST_FUSED_PRODUCTS`: attention's output map with bias and residual in one kernel (1), or a
    product of PyTorch (0); None: by the tile table. For measurements and tests."""
    return _flag(FUSED_PRODUCTS)


def self_check_wanted() -> bool | None:
    """Return `CRATE_FAST_SELF_CHECK`: check the first launch of each kernel variant against PyTorch (1) or not (0);
    None: on a GPU, not in Triton's interpreter."""
    return _flag(SELF_CHECK)


def tiles_file() -> str | None:
    """Return `CRATE_FAST_TILES`: a JSON file of measured tiles that override kernels/launch.py, or None."""
    return os.environ.get("CRATE_FAST_TILES")


def usable_cores(processes: int = 1) -> int:
    """Return the number of CPU cores for each of the processes that torchrun has started on this host.

    These are the cores that the process may use, but not more than its share of torchrun's. A job scheduler limits
    torchrun's, and `--numa-binding` those of each process.
    """
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 1) // processes)
    own = len(os.sched_getaffinity(0))
    return own if processes == 1 else max(1, min(own, len(os.sched_getaffinity(os.getppid())) // processes))


def require_gpu() -> bool:
    """Return `CRATE_FAST_REQUIRE_GPU` (default 0): without a GPU, GPU tests fail instead of skipping."""
    return bool(_flag("CRATE_FAST_REQUIRE_GPU"))


def require_browser() -> bool:
    """Return `CRATE_FAST_REQUIRE_BROWSER` (default 0): without Chromium, tests of the explorer's page fail."""
    return bool(_flag("CRATE_FAST_REQUIRE_BROWSER"))
