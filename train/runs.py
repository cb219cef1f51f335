"""Open a finished (or running) run: its configuration, its data, and the model of one of its checkpoints."""

from pathlib import Path

from torch import Tensor, nn

from crate_fast.checkpoints import load_strictly, unwrap_state_dict
from crate_fast.errors import UserError, nearest
from crate_fast.registry import MAE, MAE_ENCODER, create_model, is_mae, is_model, model_names
from crate_fast.train import checkpoint
from crate_fast.train.command_line import load_recipe
from crate_fast.train.config import DROP_RATES, TrainConfig
from crate_fast.train.data import DataSplits, build_splits

__all__ = [
    "build_model",
    "checkpoint_epoch",
    "checkpoint_steps",
    "load_model",
    "load_run",
    "model_arguments",
    "num_classes_of",
    "patch_size_of",
    "run_config",
    "run_weights",
]


_OF_AUTOENCODERS = ("mask_ratio", "norm_pix_loss", "visible_only", "decoder_depth")


def model_arguments(config: TrainConfig, num_classes: int) -> dict:
    """Return the arguments for `registry.create_model`: what the configuration sets, under timm's names."""
    arguments = {"img_size": config.image_size}
    arguments |= {name: getattr(config, name) for name in DROP_RATES if getattr(config, name)}
    names = {"patch_size": "patch_size", "dim": "embed_dim", "depth": "depth", "heads": "num_heads"}
    if is_mae(config.model):
        if config.frozen:
            encoder = MAE_ENCODER + config.model.removeprefix(MAE)
            raise UserError(f"frozen=True: an autoencoder has no classifier; probe its encoder, --model {encoder}")
        arguments |= {"norm_pix_loss": config.norm_pix_loss, "visible_only": config.visible_only}
        names |= {"decoder_depth": "decoder_depth"}
    else:
        unused = [name for name in _OF_AUTOENCODERS if getattr(config, name) != getattr(TrainConfig, name)]
        if unused:
            raise UserError(f"{', '.join(unused)}: model={config.model!r} is no autoencoder; leave them out")
        arguments["num_classes"] = num_classes
    names |= {name: name for name in ("residual", "attention", "sparsifier", "threshold")}
    chosen = {ours: getattr(config, name) for name, ours in names.items()}
    return arguments | {name: value for name, value in chosen.items() if value is not None}


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The model that the configuration names, on the CPU: for `num_classes` classes, unless it is an autoencoder.

    Raises:
        UserError: timm has no such model, or it does not take the settings.
    """
    if not is_model(config.model):
        raise UserError(f"model={config.model!r}{nearest(config.model, model_names()) or ': timm has no such model'}")
    arguments = model_arguments(config, num_classes)
    try:
        model = create_model(config.model, **arguments)
    except TypeError as error:
        raise UserError(
            f"model={config.model!r} does not take all of {', '.join(arguments)} ({error}): leave out those that are "
            "not its own; models without img_size cannot be trained here"
        ) from error
    if config.frozen:
        _put_probe(model)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def patch_size_of(model: nn.Module) -> int | None:
    """Return the side of a patch in pixels, None where a model has no patches."""
    sizes = getattr(model, "patch_size", None) or getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return sizes[0] if isinstance(sizes, tuple | list) else sizes


def _put_probe(model: nn.Module) -> None:
    """Put MAE's linear probe in the classifier's place, BatchNorm without affine and Linear; freeze all but it."""
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise UserError(f"frozen=True: the classifier of {type(model).__name__} is no nn.Linear to be replaced")
    name = next(name for name, module in model.named_modules() if module is classifier)
    linear = nn.Linear(classifier.in_features, classifier.out_features)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(classifier.in_features, affine=False, eps=1e-6)
    model.set_submodule(name, nn.Sequential(norm, linear))
    model.requires_grad_(False)
    linear.requires_grad_(True)


def run_config(folder: Path, **changes) -> TrainConfig:
    """The configuration of a run, with `changes`.

    Raises:
        UserError: There is no run in the folder.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run (it has no config.yaml): give the folder of one, such as runs/NAME")
    return TrainConfig(**(load_recipe(str(folder / "config.yaml")) | changes))


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps at which a run has checkpoints, ascending.

    Raises:
        UserError: There are none.
    """
    root = folder / "checkpoints"
    steps = checkpoint.steps(root) if root.is_dir() else []
    if not steps:
        raise UserError(f"{folder} holds no checkpoints: give the folder of a run, such as runs/NAME")
    return sorted(steps)


def checkpoint_epoch(folder: Path, step: int) -> float | None:
    """Passes over the training images at a checkpoint; None if an older version wrote it, without saying."""
    return checkpoint.manifest(folder / "checkpoints", step).get("epoch")


def load_model(folder: Path, step: int | None = None) -> tuple[nn.Module, TrainConfig, int]:
    """The model of a run's checkpoint; its data need not be there.

    Args:
        folder: Of the run; the moving average of its weights is taken if it keeps one.
        step: Of the checkpoint; when None the best, or the newest if none was evaluated.

    Returns:
        (model on the CPU in evaluation mode, configuration, step).

    Raises:
        UserError: There is no run in the folder, or no such checkpoint.
        CheckpointError: The checkpoint is damaged.
    """
    weights, step = run_weights(folder, step)
    config = run_config(folder)
    model = build_model(config, num_classes_of(weights))
    remedy = "its config.yaml is another run's or another version's: restore it, or use another checkpoint"
    load_strictly(model, weights, f"{folder} at step {step}", remedy)
    return model.eval(), config, step


def run_weights(folder: Path, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """The weights of a run's checkpoint, of the moving average if the run keeps one, and its step.

    Args:
        folder, step: See `load_model`.

    Raises:
        UserError: There is no such checkpoint.
        CheckpointError: It is damaged.
    """
    steps = checkpoint_steps(folder)
    root = folder / "checkpoints"
    if step is None:
        step = checkpoint.best_step(root) or steps[-1]
    if step not in steps:
        raise UserError(f"{folder} has no checkpoint at step {step}: choose one of {steps}")
    saved = checkpoint.load(root, step)
    return (saved.weights if saved.ema is None else saved.ema), step


def num_classes_of(weights: dict) -> int:
    """Return the outputs of the classifier in a state dict of a CRATE or a timm model; 0 if it has none."""
    weights = unwrap_state_dict(weights)  # the demo checkpoint's `head` is behind mlp_head
    heads = [name for name in weights if name.startswith(("mlp_head.", "head.", "fc.")) and name.endswith("weight")]
    matrices = [weights[name] for name in sorted(heads) if weights[name].dim() == 2]
    return matrices[-1].shape[0] if matrices else 0


def load_run(folder: Path, step: int | None = None, **changes) -> tuple[nn.Module, TrainConfig, DataSplits, int]:
    """`load_model` with the run's data.

    Args:
        folder, step: See `load_model`.
        **changes: Settings to change, such as `segmentation_samples`.

    Returns:
        (model, configuration, data, step).
    """
    model, _, step = load_model(folder, step)
    config = run_config(folder, **changes)
    return model, config, build_splits(config), step
