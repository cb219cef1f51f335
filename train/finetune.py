"""Fine-tuning on other data: `torchrun train/finetune.py --init RUN --recipe finetune_cifar10 --data-dir DATA`.

Starts from a run's best checkpoint, RUN@STEP, or a weights file. A run also gives its architecture and pixel
statistics, unless the command line names others. A CRATE-MAE gives its encoder (its file needs --model
crate_mae_encoder_…). The classifier is kept, and must fit, or is new with `--head new`, as in the recipes.
"""

import sys
from pathlib import Path

from crate_fast.errors import UserError
from crate_fast.train.config import FORM, train_command

INHERITED = ("model", "patch_size", "dim", "depth", "heads", "mean", *FORM)


def inheriting(values: dict, chosen: dict) -> dict:
    """Return settings: the command line's (`chosen`), then those of the run that it starts from, then the recipe's.

    Raises:
        UserError: There is nothing to start from.
    """
    from crate_fast.registry import MAE, MAE_ENCODER, is_mae  # with torch, after errors of the command line
    from crate_fast.train.runs import initial_run, run_config

    init = (values | chosen).get("init", "")
    if not init:
        raise UserError("there is nothing to start from: pass --init with a run's folder or a weights file")
    if "init" in values:  # a resumed run's own settings are complete
        return values | chosen
    gone = not any(Path(path).exists() for path in (init, init.rpartition("@")[0] or init))
    run = None if gone else initial_run(init)  # a resumed run no longer needs it; a new one reports it later
    source = {} if run is None else dict(vars(run_config(run[0])))
    if source and is_mae(source["model"]):
        source["model"] = MAE_ENCODER + source["model"].removeprefix(MAE)
    return values | {name: source[name] for name in INHERITED if name in source} | chosen


def main(argv: list[str] | None = None) -> int:
    """Fine-tune as the command line says; return the exit status."""
    return train_command("finetune", argv, "Fine-tuning of a CRATE (or a timm ViT).", "finetune_cifar10", inheriting)


if __name__ == "__main__":
    sys.exit(main())
