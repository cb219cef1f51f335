"""Linear probing as in MAE: `torchrun train/linear_probe.py --init RUN --data-dir DATA`.

The model is frozen; LARS trains a linear classifier after a BatchNorm without affine parameters. `eval classify
--protocol linear` is another probe: logistic regression on features computed once, faster and without augmentation.
"""

import sys

from crate_fast.errors import UserError
from crate_fast.train.config import train_command
from crate_fast.train.finetune import inheriting


def _frozen(values: dict, chosen: dict) -> dict:
    settings = inheriting(values, chosen)
    if not settings.get("frozen"):
        raise UserError("frozen=False: a linear probe trains only the classifier; use finetune for the whole model")
    return settings


_DESCRIPTION = "Linear probe of a frozen CRATE (or a timm ViT), by MAE's protocol."
main = train_command("linear_probe", _DESCRIPTION, "probe_in1k", _frozen)

if __name__ == "__main__":
    sys.exit(main())
