"""Masked autoencoding: `torchrun train/pretrain_mae.py`, or plain `python train/pretrain_mae.py`.

Without arguments it trains a small CRATE-MAE on `shape_scenes`, a data set made on the fly, and ends with a figure of
images that it fills in. Labels are not used. Its encoder is then fine-tuned by `finetune --init RUN`, probed by
`linear_probe --init RUN`, and read by every `crate-fast eval` protocol.
"""

import sys

from crate_fast.errors import UserError
from crate_fast.train.config import train_command


def _autoencoder(values: dict, chosen: dict) -> dict:
    from crate_fast.registry import is_mae  # with torch, after errors of the command line

    settings = values | chosen
    if not is_mae(settings.get("model", "")):
        raise UserError(
            f"model={settings.get('model')!r} is no masked autoencoder: choose one such as "
            "crate_mae_tiny_patch16_224, or train it with pretrain"
        )
    return settings


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; return the exit status."""
    return train_command(
        "pretrain_mae", argv, "Masked autoencoding with CRATE-MAE.", "shape_scenes_mae", _autoencoder
    )


if __name__ == "__main__":
    sys.exit(main())
