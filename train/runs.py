"""Open a finished (or running) run: its configuration, its data, and the model of one of its checkpoints."""

from pathlib import Path

import timm
from torch import nn

from crate_fast.train import checkpoint
from crate_fast.train.config import PretrainConfig, load_recipe
from crate_fast.train.data import DataSplits, build_splits

__all__ = ["build_model", "load_run"]


def build_model(config: PretrainConfig, num_classes: int) -> nn.Module:
    """The model that the configuration names, for `num_classes` classes, on the CPU."""
    ours = ("patch_size", "dim", "depth", "heads", "residual", "attention", "sparsifier", "threshold")
    changes = {name: getattr(config, name) for name in ours if getattr(config, name) is not None}
    model = timm.create_model(
        config.model, num_classes=num_classes, img_size=config.image_size, drop_rate=config.dropout, **changes
    )
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def load_run(folder: Path, step: int | None = None, **changes) -> tuple[nn.Module, PretrainConfig, DataSplits, int]:
    """The model of a run's checkpoint, with everything around it.

    Args:
        folder: Of the run.
        step: Of the checkpoint; when None the best, or the newest if none was evaluated.
        **changes: Settings to change, such as `segmentation_samples`.

    Returns:
        (model on the CPU in evaluation mode, configuration, data, step).

    Raises:
        FileNotFoundError: There is no run in the folder, or no such checkpoint.
        CheckpointError: The checkpoint is damaged.
    """
    root = folder / "checkpoints"
    steps = checkpoint.steps(root) if root.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"{folder} holds no checkpoints: give the folder of a run, such as runs/NAME")
    if step is None:
        step = checkpoint.best_step(root) or max(steps)
    if step not in steps:
        raise FileNotFoundError(f"{folder} has no checkpoint at step {step}: choose one of {steps}")
    config = PretrainConfig(**(load_recipe(str(folder / "config.yaml")) | changes))
    data = build_splits(config)
    model = build_model(config, len(data.classes))
    weights, _, _ = checkpoint.load(root, step)
    model.load_state_dict(weights, strict=True)
    return model.eval(), config, data, step
