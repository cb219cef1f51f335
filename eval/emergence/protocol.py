"""All settings of the experiment, fixed before its runs.

docs/emergence/protocol.md (shape_scenes) and docs/emergence/photographs/protocol.md explain them.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crate_fast.train.config import TrainConfig

MODELS: dict[str, dict[str, str]] = {  # model → settings that differ from CRATE's
    "CRATE": {},
    "CRATE-MLP": {"sparsifier": "mlp"},
    "CRATE-MHSA": {"attention": "mhsa"},
    "ViT": {"attention": "mhsa", "sparsifier": "mlp"},
    "CRATE-sth": {"threshold": "soft"},
}
ORDER = ("CRATE", "CRATE-MLP", "CRATE-MHSA", "ViT")  # the paper's Table 2, best first
_CIFAR_SIZE, _CIFAR_IMAGES = 32, 50_000
_OF_PHOTOGRAPHS = ("data", "models", "crop_scale", "hflip", "precision", "mask_size", "coverage", "box_images")
_OF_TRAINING = ("dim", "depth", "heads", "optimizer", "weight_decay", "label_smoothing")  # also in `TrainConfig`
_OF_SCENES = ("cifar_epochs", "selection_seed", "test_seed")


@dataclass(frozen=True)
class Stage:
    """One stage of a training run."""

    image_size: int  # side in pixels
    images: int  # number of training images
    epochs: int
    lr_share: float = 1.0  # peak learning rate as a fraction of the run's
    checkpoints: int = 1  # number of scored checkpoints, evenly spaced, the last at the end
    batch_size: int = 64

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.images // self.batch_size * self.epochs


class Point(NamedTuple):
    """A scored checkpoint: its stage, its step there (0 is the untrained twin), and the images seen so far."""

    stage: int
    step: int
    images: int


class Run(NamedTuple):
    """One training run of the experiment."""

    kind: str  # "sweep" of the learning rate; "scenes" or "photographs", compared; "cifar10", for accuracy only
    model: str  # a key of `MODELS`
    seed: int  # of weights, data and order
    lr: float | None = None  # of a sweep; other runs use the rate that the sweeps select

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return f"{self.kind}-{self.model}-" + (f"lr{self.lr:g}" if self.kind == "sweep" else f"seed{self.seed}")

    @property
    def scored(self) -> bool:
        """True if the attention of its checkpoints is scored."""
        return self.kind in ("scenes", "photographs")


@dataclass(frozen=True)
class Protocol:
    """The experiment at one size, by default at the small size on scenes.

    Each stage of a compared run starts from the weights of the previous stage. Do not change the default of
    `primary`: reports of earlier protocols rely on it.
    """

    patch_size: int = 8
    dim: int = 96  # of every model; the head width is dim / heads
    depth: int = 4
    heads: int = 3
    stages: tuple[Stage, ...] = (Stage(64, 50_000, 4, 1.0, 4), Stage(128, 24_064, 1, 0.5, 2))  # of a compared run
    sweep_images: int = 60_000  # number of training images of a sweep run, which is otherwise like the first stage
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3)  # learning rates to try, ascending
    seeds: tuple[int, ...] = (0, 1, 2)  # of the compared runs, for weights, images and their order
    cifar_epochs: int = 2
    selection_images: int = 500  # number of images for choosing heads and layers; the maximum number for photographs
    test_images: int = 500  # number of scored images; the maximum number for photographs
    maskcut_images: int = 200  # number of images for MaskCut: the first test scenes, or photographs with masks
    selection_seed: int = 900_001  # of scenes; no model is trained on these and on the test scenes
    test_seed: int = 900_002
    sweep_seed: int = 100
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup_share: float = 0.05  # of a stage's steps
    primary: str = "mIoU mass, best head"  # measure that decides the claims
    data: str = "shape_scenes"  # or "photographs"
    models: tuple[str, ...] = tuple(MODELS)
    crop_scale: float = 1.0  # of photographs
    hflip: float = 0.0  # of photographs
    precision: str = "auto"
    mask_size: int = 128  # side in pixels at which photographs with masks are scored
    coverage: tuple[float, float] = (0.0, 1.0)  # share of a scored photograph that its boxes cover
    box_images: int = 0  # number of test photographs for the scores of `crate-fast eval localization`, which are slow

    @property
    def photographs(self) -> bool:
        """True if the images are photographs."""
        return self.data == "photographs"

    @property
    def kind(self) -> str:
        """Kind of the compared runs, and the name of the images in the report."""
        return "photographs" if self.photographs else "scenes"

    @property
    def fixed_map(self) -> str:
        """Name of the baseline that is one map for all images."""
        return "mean box" if self.photographs else "mean mask"

    @property
    def image_size(self) -> int:
        """Image size of all scores, in pixels."""
        return self.stages[-1].image_size

    @property
    def points(self) -> list[Point]:
        """Scored checkpoints of a compared run, in order."""
        found, seen = [Point(0, 0, 0)], 0
        for number, stage in enumerate(self.stages):
            for count in range(1, stage.checkpoints + 1):
                step = stage.steps * count // stage.checkpoints
                found.append(Point(number, step, seen + step * stage.batch_size))
            seen = found[-1].images
        return found

    def settings(self) -> dict:
        """Return the settings as JSON values, which are saved with results."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def in_words(self) -> dict[str, str]:
        """Return the settings that apply to the data as text, for a table."""
        left_out = _OF_SCENES if self.photographs else _OF_PHOTOGRAPHS
        names = [field.name for field in dataclasses.fields(self) if field.name not in left_out]
        return {name: _in_words(getattr(self, name)) for name in names}

    @classmethod
    def of_settings(cls, settings: dict) -> "Protocol":
        """Return the protocol of a protocol.json; "size" is ignored, and "scenes" is an old name of "images"."""
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items() if n != "size"}
        if "sweep_scenes" in values:
            values["sweep_images"] = values.pop("sweep_scenes")
        stages = [{"images" if name == "scenes" else name: v for name, v in s.items()} for s in settings["stages"]]
        return cls(**values | {"stages": tuple(Stage(**stage) for stage in stages)})

    def planned_runs(self, cifar10: bool = True) -> list[Run]:
        """Return all runs in order: sweeps, then seed by seed, so that an early stop leaves complete seeds."""
        sweeps = [Run("sweep", model, self.sweep_seed, lr) for model in self.models for lr in self.lrs]
        kinds = (self.kind, "cifar10") if cifar10 else (self.kind,)
        return sweeps + [Run(kind, m, seed) for kind in kinds for seed in self.seeds for m in self.models]

    def stages_of(self, run: Run) -> tuple[Stage, ...]:
        """Return the stages of a run; sweeps and CIFAR-10 have one."""
        first = self.stages[0]
        if run.scored:
            return self.stages
        if run.kind == "cifar10":
            return (Stage(_CIFAR_SIZE, _CIFAR_IMAGES, self.cifar_epochs, batch_size=128),)
        if self.photographs:
            return (dataclasses.replace(first, epochs=max(1, round(self.sweep_images / first.images))),)
        return (dataclasses.replace(first, images=self.sweep_images, epochs=1),)

    def training_config(
        self, run: Run, number: int, lr: float, data_dir: Path | None = None, **further
    ) -> TrainConfig:
        """Return the training settings of stage `number` of a run with the peak learning rate `lr`.

        `data_dir` is the folder of CIFAR-10 (train/<class>/ and test/<class>/, or torchvision's) or of
        `data.prepare_photographs`; `further` holds other settings, such as `device`, and `init` of a later stage.
        """
        stage = self.stages_of(run)[number]
        if run.kind == "cifar10":
            folders = (data_dir / "train").is_dir()
            data = {"dataset": "folder", "val_split": "test"} if folders else {"dataset": "cifar10"}
            data |= {"data_dir": str(data_dir), "patch_size": 4, "crop": "pad", "hflip": 0.5, "mean": "cifar10"}
        elif self.photographs:
            data = {"dataset": "folder", "data_dir": str(data_dir), "val_split": "selection", "crop": "random"}
            data |= {"crop_scale": self.crop_scale, "hflip": self.hflip, "patch_size": self.patch_size}
        else:
            data = {"dataset": "shape_scenes", "patch_size": self.patch_size, "mean": "half"}
            data |= {"train_samples": stage.images, "val_samples": self.selection_images}
        if run.scored:  # keep all checkpoints, also those saved at an interruption
            data |= {"checkpoint_every": stage.steps // stage.checkpoints, "keep_checkpoints": stage.steps}
        return TrainConfig(
            model="crate_tiny_patch8_224",
            **{name: getattr(self, name) for name in _OF_TRAINING},
            **MODELS[run.model],
            **data,
            image_size=stage.image_size,
            batch_size=stage.batch_size,
            epochs=stage.epochs,
            warmup_epochs=self.warmup_share * stage.epochs,
            lr=lr * stage.lr_share,
            seed=run.seed,
            log_every=50,
            segmentation_samples=8,  # for the run's own figure; the experiment scores more
            **{"precision": self.precision} | further,
        )


_SMALL = Protocol(primary="AP, best head")
_SMOKE = {"dim": 16, "depth": 2, "heads": 2}  # scenes test comparisons over seeds, photographs the choice of a rate
_SCENES = {
    "smoke": dataclasses.replace(
        _SMALL,
        **_SMOKE,
        stages=(Stage(32, 64, 2, 1.0, 1, 16), Stage(64, 32, 1, 0.5, 1, 16)),
        sweep_images=32,
        lrs=(1e-3,),
        seeds=(0, 1),
        cifar_epochs=1,
        selection_images=6,
        test_images=8,
        maskcut_images=2,
    ),
    "small": _SMALL,
    "full": dataclasses.replace(
        _SMALL,
        dim=192,
        depth=12,
        stages=(Stage(128, 307_200, 2, 1.0, 8, 256),),
        sweep_images=150_000,
        cifar_epochs=10,
        selection_images=1000,
        test_images=1000,
        maskcut_images=500,
    ),
}
_SMALL_PHOTOGRAPHS = dataclasses.replace(
    _SMALL,
    dim=192,
    depth=6,
    stages=(Stage(64, 50_000, 12, 1.0, 6, 128),),
    sweep_images=100_000,
    cifar_epochs=0,
    selection_images=1500,
    test_images=1500,
    maskcut_images=79,
    data="photographs",
    models=ORDER,
    crop_scale=0.35,
    hflip=0.5,
    precision="bf16",
    coverage=(0.05, 0.6),
    box_images=1000,
)
_PHOTOGRAPHS = {
    "smoke": dataclasses.replace(
        _SMALL_PHOTOGRAPHS,
        **_SMOKE,
        stages=(Stage(32, 16, 2, 1.0, 2, 8),),
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
    "small": _SMALL_PHOTOGRAPHS,
    "full": dataclasses.replace(
        _SMALL_PHOTOGRAPHS,
        dim=384,
        depth=12,
        heads=6,
        stages=(Stage(64, 50_000, 60, 1.0, 12, 256),),
        sweep_images=250_000,
        precision="auto",
    ),
}
SIZES = {"shape_scenes": _SCENES, "photographs": _PHOTOGRAPHS}


def settings_table(data: str = "shape_scenes") -> list[dict]:
    """Return the table of a protocol's page, with a row per setting and a column per size."""
    words = {size: protocol.in_words() for size, protocol in SIZES[data].items()}
    names = next(iter(words.values()))
    return [{"setting": f"`{name}`", **{size: settings[name] for size, settings in words.items()}} for name in names]


def _in_words(value: object) -> str:
    if isinstance(value, tuple):
        return "; ".join(map(_in_words, value)) if isinstance(value[0], Stage) else ", ".join(map(str, value))
    if isinstance(value, Stage):
        words = f"{value.epochs} × {value.images:,} images of {value.image_size} px, batch {value.batch_size}, "
        return words + f"{value.lr_share:g} × lr, {value.checkpoints} checkpoints"
    return f"{value:,}" if isinstance(value, int) else str(value)
