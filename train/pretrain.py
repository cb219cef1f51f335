"""Supervised pre-training: `torchrun train/pretrain.py`, or plain `python train/pretrain.py`.

By default it trains a small CRATE on `shape_scenes`, a data set generated on the fly, and prints the accuracy and the
segmentation scores of the attention maps. The loop is `Trainer.train` in trainer.py.
"""

import sys

from crate_fast.train.config import train_command

main = train_command("pretrain", "Supervised pre-training of CRATE (or a timm ViT).", "shape_scenes")

if __name__ == "__main__":
    sys.exit(main())
