"""Fine-tuning on other data: `torchrun train/finetune.py --init RUN --recipe finetune_cifar10 --data-dir DATA`.

Starts from a run's best checkpoint, RUN@STEP, or a weights file. From a run come its architecture and pixel
statistics too, unless the command line says otherwise; from a CRATE-MAE its encoder (a file of one needs --model
crate_mae_encoder_…). Its classifier is kept, and must fit, or with `--head new` (as
the recipes have it) replaced; positions are resampled to the new image size. What was done is printed.
"""

import sys
from pathlib import Path

from crate_fast.errors import UserError
from crate_fast.registry import MAE, MAE_ENCODER, is_mae
from crate_fast.train.launch import train_command
from crate_fast.train.runs import initial_run, run_config

__all__ = ["inheriting", "main"]

INHERITED = (
    *("model", "patch_size", "dim", "depth", "heads", "residual", "attention", "sparsifier", "threshold", "mean"),
)


def inheriting(values: dict, chosen: dict) -> dict:
    """A recipe's settings under those of the run it starts from, under the command line's.

    Args:
        values: The recipe's.
        chosen: The command line's.

    Raises:
        UserError: There is nothing to start from.
    """
    init = (values | chosen).get("init", "")
    if not init:
        raise UserError("there is nothing to start from: pass --init with a run's folder or a weights file")
    if "init" in values:  # the settings of such a run, resumed: nothing is to be added
        return values | chosen
    gone = not any(Path(place).exists() for place in (init, init.rpartition("@")[0] or init))
    run = None if gone else initial_run(init)  # a resumed run no longer needs it; another will be told
    source = {} if run is None else dict(vars(run_config(run[0])))
    if source and is_mae(source["model"]):
        source["model"] = MAE_ENCODER + source["model"].removeprefix(MAE)
    return values | {name: source[name] for name in INHERITED if name in source} | chosen


def main(argv: list[str] | None = None) -> int:
    """Fine-tune as the command line says; returns the exit status."""
    return train_command(argv, "Fine-tuning of a CRATE (or a timm ViT).", "finetune_cifar10", inheriting)


if __name__ == "__main__":
    sys.exit(main())
