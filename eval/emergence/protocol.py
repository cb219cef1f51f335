"""All settings of the experiment, fixed before its runs; docs/emergence/photographs/protocol.md explains them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crate_fast.train.config import TrainConfig

ORDER = ("CRATE", "CRATE-MLP", "CRATE-MHSA", "ViT")  # the compared models, those of the paper's Table 2, best first
MODELS: dict[str, dict[str, str]] = {  # model → settings that differ from CRATE's
    "CRATE": {},
    "CRATE-MLP": {"sparsifier": "mlp"},
    "CRATE-MHSA": {"attention": "mhsa"},
    "ViT": {"attention": "mhsa", "sparsifier": "mlp"},
    "CRATE-alpha": {"sparsifier": "odl"},  # not compared: an extra row of the report
}
# Fields that `TrainConfig` has too
_OF_TRAINING = ("patch_size", "dim", "depth", "heads", "image_size", "batch_size", "optimizer", "weight_decay")
_OF_TRAINING += ("label_smoothing", "crop_scale", "hflip", "precision")


class Run(NamedTuple):
    """One training run of the experiment: a sweep of the learning rate, or a run whose checkpoints are scored."""

    model: str  # a key of `MODELS`
    seed: int  # of weights, data and order
    lr: float | None = None  # of a sweep; scored runs use the rate that the sweeps select

    @property
    def sweep(self) -> bool:
        """True for a sweep."""
        return self.lr is not None

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return f"sweep-{self.model}-lr{self.lr:g}" if self.sweep else f"photographs-{self.model}-seed{self.seed}"


@dataclass(frozen=True)
class Protocol:
    """The experiment at one size, by default at the small size."""

    patch_size: int = 8
    dim: int = 192  # of every model; the head width is dim / heads
    depth: int = 6
    heads: int = 3
    image_size: int = 64  # side in pixels
    images: int = 50_000  # number of training images; the command sets it to that of the data
    epochs: int = 12
    batch_size: int = 128
    checkpoints: int = 6  # number of scored checkpoints after the untrained twin, evenly spaced, the last at the end
    sweep_images: int = 100_000  # number of images that a sweep trains on, in whole epochs
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3)  # learning rates to try, ascending
    seeds: tuple[int, ...] = (0, 1, 2)  # of the compared runs, for weights, images and their order
    selection_images: int = 1500  # maximum number of photographs for choosing heads and layers
    test_images: int = 1500  # maximum number of scored photographs
    maskcut_images: int = 79  # number of photographs with masks
    sweep_seed: int = 100
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup_share: float = 0.05  # of a run's steps
    primary: str = "AP, best head"  # measure that decides the claims
    models: tuple[str, ...] = ORDER
    crop_scale: float = 0.35
    hflip: float = 0.5
    precision: str = "bf16"
    mask_size: int = 128  # side in pixels at which photographs with masks are scored
    coverage: tuple[float, float] = (0.05, 0.6)  # share of a scored photograph that its boxes cover
    box_images: int = 1000  # number of test photographs with scores of `crate-fast eval localization`, which is slow

    @property
    def scored_steps(self) -> list[int]:
        """Steps of the scored checkpoints; 0 is the untrained twin."""
        return [self._steps * number // self.checkpoints for number in range(self.checkpoints + 1)]

    @property
    def _steps(self) -> int:
        return self.images // self.batch_size * self.epochs

    def settings(self) -> dict:
        """Return the settings as JSON values, which are saved with results."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def in_words(self) -> dict[str, str]:
        """Return the settings as text, for a table."""
        return {name: _in_words(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def of_settings(cls, settings: dict) -> "Protocol":
        """Return the protocol of a protocol.json; "size" and settings of an earlier version are ignored.

        Earlier versions saved the settings of training in a list "stages" of one element.
        """
        values, names = settings | settings.get("stages", [{}])[0], {field.name for field in dataclasses.fields(cls)}
        return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items() if n in names})

    def planned_runs(self, models: list[str] | None = None, seeds: list[int] | None = None) -> list[Run]:
        """Return all runs in order: sweeps, then seed by seed, so that an early stop leaves complete seeds.

        `models` and `seeds` are the protocol's when None.
        """
        models, seeds = models or self.models, self.seeds if seeds is None else seeds
        sweeps = [Run(model, self.sweep_seed, lr) for model in models for lr in self.lrs]
        return sweeps + [Run(model, seed) for seed in seeds for model in models]

    def epochs_of(self, run: Run) -> int:
        """Return the number of epochs of a run."""
        return max(1, round(self.sweep_images / self.images)) if run.sweep else self.epochs

    def training_config(self, run: Run, lr: float, data_dir: Path, **further) -> TrainConfig:
        """Return the training settings of a run with the peak learning rate `lr`.

        `data_dir` is the folder of `data.prepare_photographs`; `further` holds other settings, such as `device`.
        """
        settings = {name: getattr(self, name) for name in _OF_TRAINING} | MODELS[run.model]
        if not run.sweep:  # keep all checkpoints, also those saved at an interruption
            settings |= {"checkpoint_every": self._steps // self.checkpoints, "keep_checkpoints": self._steps}
        epochs = self.epochs_of(run)
        settings |= {"epochs": epochs, "warmup_epochs": self.warmup_share * epochs, "lr": lr, "seed": run.seed}
        return TrainConfig(
            model="crate_tiny_patch8_224",
            dataset="folder",
            data_dir=str(data_dir),
            val_split="selection",
            crop="random",
            log_every=50,
            segmentation_samples=8,  # for the run's own figure; the experiment scores more
            **settings | further,
        )


SIZES = {
    "smoke": Protocol(
        dim=16,
        depth=2,
        heads=2,
        image_size=32,
        images=16,
        epochs=2,
        batch_size=8,
        checkpoints=2,
        sweep_images=16,
        lrs=(1e-3, 2e-3),
        seeds=(0,),
        selection_images=6,
        test_images=6,
        maskcut_images=2,
        precision="auto",
        mask_size=64,
        coverage=(0.0, 1.0),
        box_images=2,
    ),
    "small": Protocol(),
    "full": Protocol(
        dim=384, depth=12, heads=6, epochs=60, batch_size=256, checkpoints=12, sweep_images=250_000, precision="auto"
    ),
}


def _in_words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
