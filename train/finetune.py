"""Fine-tuning on another data set: `torchrun train/finetune.py --init RUN --recipe finetune_cifar10 --data-dir DATA`.

It starts from a run's best checkpoint, RUN@STEP, a folder of `crate-fast share`, or a weights file. Architecture and
pixel statistics are those of the run or folder, unless the command line changes them. From a CRATE-MAE only the
encoder is used (a weights file needs --model crate_mae_encoder_…). The classifier must match the classes, or is
replaced with `--head new`, as in the recipes.
"""

import sys
from pathlib import Path

from crate_fast.errors import UserError
from crate_fast.train.config import FORM, train_command

INHERITED = ("model", "patch_size", "dim", "depth", "heads", "mean", *FORM)


def is_gone(init: str) -> bool:
    """Return True if neither `init` nor, of RUN@STEP, the run exists."""
    return not any(Path(path).exists() for path in (init, init.rpartition("@")[0] or init))


def inheriting(values: dict, chosen: dict) -> dict:
    """Merge settings: the command line (`chosen`) overrides the initial run, and that the recipe (`values`)."""
    from crate_fast.registry import MAE, MAE_ENCODER, is_mae  # imports torch: after command-line errors
    from crate_fast.train.runs import initial_settings

    init = (values | chosen).get("init", "")
    if not init:
        raise UserError("initial weights are missing: pass --init with a run's folder or a weights file")
    if values.keys() >= {"init", "model", "patch_size", "dim", "depth", "heads", "mean"}:  # a run's config.yaml
        return values | chosen
    source = {} if is_gone(init) else initial_settings(init)  # a resumed run does not need it; a new run reports it
    if source and is_mae(source["model"]):
        source["model"] = MAE_ENCODER + source["model"].removeprefix(MAE)
    return values | {name: source[name] for name in INHERITED if name in source} | chosen


main = train_command("finetune", "Fine-tuning of a CRATE (or a timm ViT).", "finetune_cifar10", inheriting)

if __name__ == "__main__":
    sys.exit(main())
