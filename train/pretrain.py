"""Supervised pre-training: `torchrun train/pretrain.py`, or plain `python train/pretrain.py`.

Without arguments it trains a small CRATE on `shape_scenes`, a data set made on the fly, and ends with its accuracy
and the segmentation score of its attention maps. The loop is `Trainer.train` in trainer.py.
"""

import sys

from crate_fast.train.config import train_command


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; return the exit status."""
    return train_command("pretrain", argv, "Supervised pre-training of CRATE (or a timm ViT).", "shape_scenes")


if __name__ == "__main__":
    sys.exit(main())
