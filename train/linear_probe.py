"""Linear probing as MAE's: `torchrun train/linear_probe.py --init RUN --data-dir DATA`.

The model is frozen; a BatchNorm without affine parameters and a linear classifier behind it learn by LARS. `eval
classify --protocol linear` is another probe, logistic regression on features computed once: quicker, and without
augmentation.
"""

import sys

from crate_fast.train.command_line import build_config
from crate_fast.train.finetune import inheriting
from crate_fast.train.launch import launch

__all__ = ["main"]


def _frozen(values: dict, chosen: dict) -> dict:
    settings = inheriting(values, chosen)
    if not settings.get("frozen"):
        raise ValueError("frozen=False: a linear probe trains a classifier alone; for the whole model use finetune")
    return settings


def main(argv: list[str] | None = None) -> int:
    """Probe as the command line says; returns the exit status."""
    text = "Linear probe of a frozen CRATE (or a timm ViT), by MAE's protocol."
    config, options = build_config(argv, text, "probe_in1k", adjust=_frozen)
    return launch(config, options)


if __name__ == "__main__":
    sys.exit(main())
