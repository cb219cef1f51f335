"""Masked autoencoding: `torchrun train/pretrain_mae.py`, or plain `python train/pretrain_mae.py`.

By default it trains a small CRATE-MAE on `shape_scenes`, a data set generated on the fly, and draws a figure of
reconstructed images. Labels are not used. The encoder can then be fine-tuned by `finetune --init RUN`, probed by
`linear_probe --init RUN`, and evaluated by every `crate-fast eval` protocol.
"""

import sys

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig, train_command


def _autoencoder(values: dict, chosen: dict) -> dict:
    from crate_fast.registry import is_mae  # imports torch: after command-line errors

    settings = values | chosen
    model = settings.get("model", TrainConfig.model)
    if not is_mae(model):
        raise UserError(
            f"model={model!r} is not a masked autoencoder: choose one, such as "
            "crate_mae_tiny_patch16_224, or use pretrain"
        )
    return settings


main = train_command("pretrain_mae", "Masked autoencoding with CRATE-MAE.", "shape_scenes_mae", _autoencoder)

if __name__ == "__main__":
    sys.exit(main())
