"""Fast implementation of CRATE, the white-box vision transformer.

>>> import torch
>>> from crate_fast import CRATE
>>> model = CRATE(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=2, dim_head=32)
>>> model(torch.zeros(1, 3, 32, 32)).shape
torch.Size([1, 10])
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
SPIN_COUNT = 10000

# OpenMP threads spin at every barrier, which is slow on a CPU that other processes use too
# (benchmarks/results/busy_cpu.md). OpenMP reads the variable at PyTorch's import. A value set by the user is kept.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)

# Commands import torch and timm only when needed, so that `--help` is immediate.
_IS_COMMAND = Path(sys.argv[0]).stem == "crate-fast" or "crate_fast.cli" in sys.orig_argv

if TYPE_CHECKING or not _IS_COMMAND:
    from crate_fast.mae import CRATEMAE
    from crate_fast.model import (
        CRATE,
        CRATE_alpha_base,
        CRATE_alpha_large,
        CRATE_base,
        CRATE_large,
        CRATE_small,
        CRATE_tiny,
    )
    from crate_fast.pretrained import load_pretrained
    from crate_fast.registry import create_mae  # the import registers the models with timm

__all__ = [
    "CRATE",
    "CRATEMAE",
    "CRATE_alpha_base",
    "CRATE_alpha_large",
    "CRATE_base",
    "CRATE_large",
    "CRATE_small",
    "CRATE_tiny",
    "__version__",
    "create_mae",
    "load_pretrained",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from crate_fast import mae, model, pretrained, registry

    modules = (mae, model, pretrained, registry)
    return next(getattr(module, name) for module in modules if hasattr(module, name))
