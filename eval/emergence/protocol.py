"""Every choice of the experiment, made before its runs; docs/emergence/protocol.md says why."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from crate_fast.train.config import TrainConfig

__all__ = [
    "MODELS",
    "SIZES",
    "Point",
    "Protocol",
    "Run",
    "Stage",
    "planned_runs",
    "settings_table",
    "stages_of",
    "training_config",
]

MODELS: dict[str, dict[str, str]] = {  # what differs from CRATE
    "CRATE": {},
    "CRATE-MLP": {"sparsifier": "mlp"},
    "CRATE-MHSA": {"attention": "mhsa"},
    "ViT": {"attention": "mhsa", "sparsifier": "mlp"},
    "CRATE-sth": {"threshold": "soft"},
}
_CIFAR_SIZE, _CIFAR_IMAGES = 32, 50_000


@dataclass(frozen=True)
class Stage:
    """A part of a training run.

    Attributes:
        image_size: In pixels.
        scenes: Training images.
        epochs: Passes over them.
        lr_share: Its peak learning rate over the run's.
        checkpoints: Scored of it, evenly spaced, the last at its end.
        batch_size: Images a step.
    """

    image_size: int
    scenes: int
    epochs: int
    lr_share: float = 1.0
    checkpoints: int = 1
    batch_size: int = 64

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.scenes // self.batch_size * self.epochs


@dataclass(frozen=True)
class Point:
    """When a run is scored.

    Attributes:
        stage: Number of the stage.
        step: Of it; 0, of the first stage alone, is the untrained twin.
        images: Seen in training until then.
    """

    stage: int
    step: int
    images: int


@dataclass(frozen=True)
class Protocol:
    """The experiment at one size.

    Attributes:
        patch_size: In pixels.
        dim, depth, heads: Of every model; the head width is dim / heads.
        stages: Of a compared run; each starts from the weights the one before ends with. Scores are taken at the last
            one's image size, of all checkpoints.
        sweep_scenes: Training images, seen once, of a run that only chooses a learning rate; it is the first stage
            otherwise.
        lrs: Learning rates tried, ascending.
        sweep_seed: Of those runs.
        seeds: Of the runs that are compared: of weights, scenes and their order.
        cifar_epochs: Passes over CIFAR-10's training images.
        selection_images, test_images: Scenes that heads and layers are chosen on, and scenes scored.
        maskcut_images: The first of the test scenes that MaskCut is run on.
        selection_seed, test_seed: Of those scenes; no model is trained on either.
        optimizer, weight_decay, label_smoothing: As `TrainConfig`'s.
        warmup_share: Of a stage's steps.
        primary: The measure of `analysis.COARSE` that decides; the default is that of the first protocol.
    """

    patch_size: int
    dim: int
    depth: int
    heads: int
    stages: tuple[Stage, ...]
    sweep_scenes: int
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    cifar_epochs: int
    selection_images: int
    test_images: int
    maskcut_images: int
    selection_seed: int = 900_001
    test_seed: int = 900_002
    sweep_seed: int = 100
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup_share: float = 0.05
    primary: str = "mIoU mass, best head"

    @property
    def image_size(self) -> int:
        """At which scores are taken, in pixels."""
        return self.stages[-1].image_size

    @property
    def points(self) -> list[Point]:
        """When a compared run is scored, in order."""
        found, seen = [Point(0, 0, 0)], 0
        for number, stage in enumerate(self.stages):
            for count in range(1, stage.checkpoints + 1):
                step = stage.steps * count // stage.checkpoints
                found.append(Point(number, step, seen + step * stage.batch_size))
            seen = found[-1].images
        return found

    def settings(self) -> dict:
        """Plain values, as saved beside results."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def in_words(self) -> dict[str, str]:
        """Every setting, for a table."""
        return {field.name: _in_words(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def of_settings(cls, settings: dict) -> "Protocol":
        """The protocol that `settings` came from."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
        return cls(**values | {"stages": tuple(Stage(**stage) for stage in settings["stages"])})


SIZES = {
    "smoke": Protocol(
        patch_size=8,
        dim=16,
        depth=2,
        heads=2,
        stages=(Stage(32, 64, 2, 1.0, 1, 16), Stage(64, 32, 1, 0.5, 1, 16)),
        sweep_scenes=32,
        lrs=(1e-3, 2e-3),
        seeds=(0, 1),
        cifar_epochs=1,
        selection_images=12,
        test_images=16,
        maskcut_images=8,
        primary="AP, best head",
    ),
    "small": Protocol(
        patch_size=8,
        dim=96,
        depth=4,
        heads=3,
        stages=(Stage(64, 50_000, 4, 1.0, 4), Stage(128, 24_064, 1, 0.5, 2)),
        sweep_scenes=60_000,
        lrs=(5e-4, 1e-3, 2e-3),
        seeds=(0, 1, 2),
        cifar_epochs=2,
        selection_images=500,
        test_images=500,
        maskcut_images=200,
        primary="AP, best head",
    ),
    "full": Protocol(
        patch_size=8,
        dim=192,
        depth=12,
        heads=3,
        stages=(Stage(128, 307_200, 2, 1.0, 8, 256),),
        sweep_scenes=150_000,
        lrs=(5e-4, 1e-3, 2e-3),
        seeds=(0, 1, 2),
        cifar_epochs=10,
        selection_images=1000,
        test_images=1000,
        maskcut_images=500,
        primary="AP, best head",
    ),
}


def settings_table() -> list[dict]:
    """The sizes side by side: a row a setting, for docs/emergence/protocol.md."""
    words = {size: protocol.in_words() for size, protocol in SIZES.items()}
    names = [field.name for field in dataclasses.fields(Protocol)]
    return [{"setting": f"`{name}`", **{size: settings[name] for size, settings in words.items()}} for name in names]


def _in_words(value: object) -> str:
    if isinstance(value, tuple):
        return "; ".join(map(_in_words, value)) if isinstance(value[0], Stage) else ", ".join(map(str, value))
    if isinstance(value, Stage):
        words = f"{value.epochs} × {value.scenes:,} scenes of {value.image_size} px, batch {value.batch_size}, "
        return words + f"{value.lr_share:g} × lr, {value.checkpoints} checkpoints"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass(frozen=True)
class Run:
    """One training run of the experiment.

    Attributes:
        kind: "sweep", to choose a learning rate; "scenes", compared; "cifar10", compared in accuracy.
        model: Of `MODELS`.
        seed: Of weights, data and order.
        lr: Of a sweep; None where the sweep decides.
    """

    kind: str
    model: str
    seed: int
    lr: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.kind}-{self.model}-" + (f"lr{self.lr:g}" if self.kind == "sweep" else f"seed{self.seed}")


def planned_runs(protocol: Protocol, cifar10: bool = True) -> list[Run]:
    """All runs in the order in which they are started: the sweeps; then seed by seed, so that an experiment cut short
    still compares like with like.

    Args:
        protocol: The experiment.
        cifar10: Whether CIFAR-10 is at hand.
    """
    sweeps = [Run("sweep", model, protocol.sweep_seed, lr) for model in MODELS for lr in protocol.lrs]
    kinds = ("scenes", "cifar10") if cifar10 else ("scenes",)
    return sweeps + [Run(kind, model, seed) for kind in kinds for seed in protocol.seeds for model in MODELS]


def stages_of(protocol: Protocol, run: Run) -> tuple[Stage, ...]:
    """The stages of a run; a sweep has a shorter first one, CIFAR-10's images are of one size."""
    if run.kind == "scenes":
        return protocol.stages
    if run.kind == "sweep":
        return (dataclasses.replace(protocol.stages[0], scenes=protocol.sweep_scenes, epochs=1),)
    return (Stage(_CIFAR_SIZE, _CIFAR_IMAGES, protocol.cifar_epochs, batch_size=128),)


def training_config(
    protocol: Protocol, run: Run, number: int, lr: float, cifar10: Path | None = None, **further
) -> TrainConfig:
    """The settings of a stage of a run.

    Args:
        protocol: The experiment.
        run: Which.
        number: Of the stage.
        lr: The run's peak learning rate.
        cifar10: Folder with train/<class>/ and test/<class>/, or with CIFAR-10 as torchvision keeps it.
        **further: Settings that decide where it is computed, such as `device`; and `init` of a later stage.
    """
    stage = stages_of(protocol, run)[number]
    if run.kind == "cifar10":
        folders = (cifar10 / "train").is_dir()
        data = {"dataset": "folder", "val_split": "test"} if folders else {"dataset": "cifar10"}
        data |= {"data_dir": str(cifar10), "patch_size": 4, "crop": "pad", "hflip": 0.5, "mean": "cifar10"}
    else:
        data = {"dataset": "shape_scenes", "patch_size": protocol.patch_size, "mean": "half"}
        data |= {"train_samples": stage.scenes, "val_samples": protocol.selection_images}
    kept = {}
    if run.kind == "scenes":
        kept["checkpoint_every"] = stage.steps // stage.checkpoints
        kept["keep_checkpoints"] = stage.steps  # all: every polite stop saves one too
    return TrainConfig(
        model="crate_tiny_patch8_224",
        dim=protocol.dim,
        depth=protocol.depth,
        heads=protocol.heads,
        **MODELS[run.model],
        **data,
        **kept,
        image_size=stage.image_size,
        batch_size=stage.batch_size,
        epochs=stage.epochs,
        warmup_epochs=protocol.warmup_share * stage.epochs,
        optimizer=protocol.optimizer,
        lr=lr * stage.lr_share,
        weight_decay=protocol.weight_decay,
        label_smoothing=protocol.label_smoothing,
        seed=run.seed,
        log_every=50,
        segmentation_samples=8,  # for the run's own figure; `scores` scores it
        **further,
    )
