"""Supervised pre-training: `torchrun train/pretrain.py`, or plain `python train/pretrain.py`.

By default it trains a small CRATE on `shape_scenes`, a data set generated on the fly, and prints the accuracy and the
segmentation scores of the attention maps. The loop is `Trainer.train` in trainer.py.
"""

import sys

from crate_fast.train.config import train_command


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` and train; return the exit status."""
    return train_command("pretrain", argv, "Supervised pre-training of CRATE (or a timm ViT).", "shape_scenes")


if __name__ == "__main__":
    sys.exit(main())
