"""Start from weights that exist: of a run, or of a file. Nothing is replaced, dropped or left random silently."""

import os
from pathlib import Path

from torch import Tensor, nn

from crate_fast import CRATE, CRATEMAE
from crate_fast.checkpoints import check_numbers, is_demo, read_state_dict, resample_weights, table_grid
from crate_fast.errors import UserError
from crate_fast.mae import encoder_state_dict
from crate_fast.train.config import TrainConfig
from crate_fast.train.runs import run_config, run_weights
from crate_fast.weight_files import split_entry

__all__ = ["initial_run", "load_initial"]


def initial_run(init: str) -> tuple[Path, int | None] | None:
    """Return the run and step that `--init` names, or None if it names a file.

    Raises:
        UserError: It names neither.
    """
    place, _, step = init.rpartition("@")
    if Path(init).is_dir():
        return Path(init), None
    if place and Path(place).is_dir():
        if not step.isdigit():
            raise UserError(f"init={init!r}: after a run's folder write @STEP, or nothing for its best checkpoint")
        return Path(place), int(step)
    if not split_entry(init)[0].is_file():
        raise UserError(f"init={init!r} is neither a file nor the folder of a run: check the path")
    return None


def load_initial(model: nn.Module, config: TrainConfig) -> str:
    """Load `config.init` into a model built for the data at hand.

    The classifier is the weights' own, and then must fit, or with `head="new"` (and in a frozen run) stays random.
    Positions of another grid of patches are resampled.

    Args:
        model: On the CPU.
        config: `init`, `init_grid`, `head` and `frozen` decide.

    Returns:
        What was loaded and what was changed, in words.

    Raises:
        UserError: The file is damaged, or its weights do not fit; the message names what differs and the remedy.
    """
    run, visible_only = initial_run(config.init), False
    stated = tuple(map(int, config.init_grid.split("x"))) if config.init_grid else None
    if run is None:
        weights, source = read_state_dict(config.init), config.init
    elif stated:
        raise UserError(f"init_grid={config.init_grid!r}: the run init={config.init!r} knows its grid; leave it out")
    else:
        weights, step = run_weights(*run)
        source, visible_only = f"{run[0]} at step {step}", run_config(run[0]).visible_only
    notes = []
    if "decoder_pred.weight" in weights and isinstance(model, CRATE):
        weights = encoder_state_dict(weights, visible_only)
        stated = stated or table_grid(weights["pos_embedding"])
        notes.append("the encoder of an autoencoder")
    if isinstance(model, CRATEMAE) and config.head == "new":
        raise UserError("head='new': an autoencoder has no classifier to replace; leave it out")
    adapted = weights if _other_width(weights, model) else resample_weights(weights, model, stated, "init_grid")
    if adapted is not weights:
        notes.append("positions of its own image size" if isinstance(model, CRATEMAE) else "positions resampled")
        weights = adapted
    if isinstance(model, CRATE):
        _check_demo(weights, model, config)
    if config.head == "new" or config.frozen:
        classes = _classes(weights, model)
        weights = {key: value for key, value in weights.items() if not _of_classifier(key, model)}
        notes.append(f"new classifier ({classes} → {model.num_classes} classes)")
    _check_fit(weights, model, config)
    check_numbers(weights, model, f"init={config.init!r}")
    bad = sorted(name for name, value in weights.items() if not value.isfinite().all())
    if bad:
        raise UserError(
            f"init={config.init!r} holds NaN or infinity in {', '.join(bad[:4])}: the file is damaged; use another"
        )
    model.load_state_dict(dict(weights), strict=False)  # what may be missing has been checked
    return source + (f" ({', '.join(notes)})" if notes else "")


def _other_width(weights: dict[str, Tensor], model: nn.Module) -> bool:
    """Return whether the weights are of another width, which `_check_fit` reports with the rest."""
    token, own = weights.get("cls_token"), getattr(model, "cls_token", None)
    return token is not None and own is not None and token.shape != own.shape


def _check_demo(weights: dict[str, Tensor], model: CRATE, config: TrainConfig) -> None:
    """Refuse a model that would compute something else with the emergence paper's demo checkpoint."""
    where = f"init={os.fspath(config.init)!r}"
    if is_demo(weights) and model.embed_dim == 768 and config.heads is None:
        raise UserError(
            f"{where} looks like the emergence paper's demo checkpoint, which has 6 heads, and a file does not tell "
            "them: pass --heads 6, or the number that yours has"
        )
    if "mlp_head.2.weight" in weights and not (model.head_hidden or config.head == "new" or config.frozen):
        raise UserError(f"{where} has a classifier with a hidden layer: pass --head new to start with a new one")


def _classifier_name(model: nn.Module) -> str:
    """Prefix of the classifier's parameters in a timm model."""
    target = model.get_classifier()
    for name, module in model.named_modules():
        if module is target:
            return name
    raise UserError(f"the classifier of {type(model).__name__} is not one of its modules: no new one can be put in")


def _of_classifier(key: str, model: nn.Module) -> bool:
    if isinstance(model, CRATE):  # whose LayerNorm in front of it is mlp_head.0
        return key.startswith("mlp_head.") and not key.startswith("mlp_head.0.")
    return key.startswith(_classifier_name(model) + ".")


def _classes(weights: dict[str, Tensor], model: nn.Module) -> int | str:
    sizes = [value.shape[0] for key, value in weights.items() if _of_classifier(key, model) and value.dim() == 2]
    return sizes[-1] if sizes else "no"


def _check_fit(weights: dict[str, Tensor], model: nn.Module, config: TrainConfig) -> None:
    own = model.state_dict()
    fresh = config.head == "new" or config.frozen
    wanted = {key for key in own if not (fresh and _of_classifier(key, model))}
    missing, unknown = sorted(wanted - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{key}: {list(weights[key].shape)} in the file, {list(own[key].shape)} in the model"
        for key in sorted(wanted & weights.keys())
        if weights[key].shape != own[key].shape
    ]
    if not (missing or unknown or shapes):
        return
    where = os.fspath(config.init)
    if not missing and not unknown and all(_of_classifier(line.split(":")[0], model) for line in shapes):
        raise UserError(
            f"init={where!r} classifies {_classes(weights, model)} classes and the data have {model.num_classes}: "
            "pass --head new to start with a new classifier"
        )
    if not unknown and not shapes and all(_of_classifier(key, model) for key in missing):
        raise UserError(f"init={where!r} has no classifier: pass --head new to start with a new one")
    parts = [
        *([f"missing: {', '.join(missing[:4])}"] if missing else []),
        *([f"unknown: {', '.join(unknown[:4])}"] if unknown else []),
        *shapes[:4],
    ]
    raise UserError(
        f"the weights of init={where!r} are not of this model ({'; '.join(parts)}): set model, patch_size, dim, "
        "depth, heads and, where a model does not resample, image_size as they were"
    )
