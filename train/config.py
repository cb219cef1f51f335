"""The configuration of a run: frozen dataclass → YAML recipe → command line.

Each field's docstring is its `--help` text. An unknown key is an error that suggests the nearest one.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import textwrap
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

__all__ = ["PretrainConfig", "build_config", "dump_config", "field_help", "load_recipe", "recipe_names"]

RECIPES = Path(__file__).parent / "recipes"
DATASETS = ("shape_scenes", "folder", "tar", "cifar10", "cifar100", "flowers102", "pets")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a pre-training run. A recipe names what differs from these defaults."""

    # --- data
    dataset: str = "shape_scenes"
    """shape_scenes (made on the fly); folder or tar (timm); cifar10, cifar100, flowers102 or pets (torchvision)."""
    data_dir: str = ""
    """Folder of the data set. folder: it holds one folder per split; tar: one <split>.tar per split."""
    download: bool = False
    """Let torchvision download the data set into data_dir. Nothing is downloaded unless this is set."""
    train_split: str = "train"
    """Name of the split trained on (folder and tar)."""
    val_split: str = "validation"
    """Name of the split evaluated on (folder and tar)."""
    train_samples: int = 20_000
    """Training images of shape_scenes."""
    val_samples: int = 1_000
    """Validation images of shape_scenes."""
    image_size: int = 64
    """Height and width of the images, in pixels."""
    crop: str = "none"
    """Training crop: none, pad (4 pixels in 32 of border, random position), random (scale and shape), center."""
    crop_scale: float = 0.08
    """Smallest share of the image's area that crop=random keeps."""
    hflip: float = 0.0
    """Probability of a horizontal flip in training."""
    auto_augment: str = ""
    """timm's policy string, such as rand-m14-n2; none when empty."""
    random_erasing: float = 0.0
    """Probability that a rectangle of a training image is replaced by noise."""
    mixup: float = 0.0
    """α of mixup: pairs of training images blended, with their labels; 0 for none."""
    cutmix: float = 0.0
    """α of cutmix: a rectangle of one image put into another; 0 for none. With both on a batch has one of them."""
    mixup_prob: float = 1.0
    """Probability that a micro-batch is mixed, with mixup or cutmix on."""
    mean: str = "imagenet"
    """Pixel normalisation: imagenet, cifar10 or half (mean and deviation 0.5)."""
    workers: int | None = None
    """Data-loading processes per training process; 0: none. Unset: 0 on a CPU, up to 8 beside a GPU."""

    # --- model
    model: str = "crate_tiny_patch8_224"
    """Any classification model that timm can create, ours or another; its size can be changed below."""
    patch_size: int | None = None
    """Side of a patch in pixels; the model's own when unset, as for the six below."""
    dim: int | None = None
    """Token width."""
    depth: int | None = None
    """Number of layers."""
    heads: int | None = None
    """Number of heads; the head width becomes dim / heads."""
    residual: str | None = None
    """released: x + MSSA(LN(x)); paper: LN(x) + MSSA(LN(x))."""
    attention: str | None = None
    """mssa, or mhsa for the ablation."""
    sparsifier: str | None = None
    """ista, or mlp for the ablation."""
    threshold: str | None = None
    """relu or soft."""
    dropout: float = 0.0
    """Dropout on attention weights and outputs."""

    # --- optimisation
    epochs: int = 6
    """Passes over the training images."""
    batch_size: int = 128
    """Images per optimiser step, over all processes and accumulation steps together."""
    accumulate: int = 1
    """Forward-backward passes per optimiser step."""
    optimizer: str = "adamw"
    """timm's name of the optimiser: adamw, lion, …"""
    lr: float = 1e-3
    """Peak learning rate, for the whole batch."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    decay_all: bool = False
    """Decay every parameter, as the released recipe; else not biases, norms, positions and CLS, as timm."""
    layer_decay: float = 1.0
    """Learning rate of a layer over that of the layer above it; below 1 the early layers move less."""
    schedule: str = "cosine"
    """cosine: per step after a linear warm-up; released: min(warm-up, cosine), per epoch."""
    warmup_epochs: float = 0.5
    """Length of the linear warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""
    clip_grad: float = 1.0
    """Limit of gradients, by clip_mode; 0 for no clipping."""
    clip_mode: str = "norm"
    """norm: of the whole gradient; value: of each entry; agc: of each row's norm in proportion to its weights' norm
    (Brock et al., 2021), the classifier excepted; 0.01 to 0.1 are usual limits there."""

    # --- engine
    seed: int = 0
    """Of weights, data order, augmentation and shape_scenes."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    precision: str = "auto"
    """fp32, bf16 (autocast), or auto: bf16 on a GPU that has it, fp32 on a CPU."""
    compile: bool = False
    """Run the model through torch.compile."""
    grad_checkpointing: bool = False
    """Recompute layers in the backward pass to save memory."""
    threads: int = 0
    """CPU threads per process; 0 shares the cores out among the processes of this host."""
    eval_every: int = 1
    """Epochs between evaluations (the last epoch is always evaluated)."""
    checkpoint_every: int = 0
    """Optimiser steps between checkpoints; 0 for one at each evaluation."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best."""
    log_every: int = 20
    """Optimiser steps between log entries."""
    segmentation_samples: int = 500
    """Images with known masks scored at the end, if the data set has masks."""

    def __post_init__(self):
        _choice("dataset", self.dataset, DATASETS)
        _choice("crop", self.crop, ("none", "pad", "random", "center"))
        _choice("mean", self.mean, ("imagenet", "cifar10", "half"))
        _choice("clip_mode", self.clip_mode, ("norm", "value", "agc"))
        _choice("schedule", self.schedule, ("cosine", "released"))
        _choice("precision", self.precision, ("auto", "fp32", "bf16"))
        for name in (
            "train_samples",
            "val_samples",
            "image_size",
            "epochs",
            "batch_size",
            "accumulate",
            "eval_every",
        ):
            _at_least(name, getattr(self, name), 1)
        for name in ("keep_checkpoints", "log_every", "segmentation_samples"):
            _at_least(name, getattr(self, name), 1)
        for name in (
            "weight_decay",
            "seed",
            "warmup_epochs",
            "min_lr",
            "clip_grad",
            "mixup",
            "cutmix",
            "threads",
            "checkpoint_every",
        ):
            _at_least(name, getattr(self, name), 0)
        for name in ("hflip", "dropout", "label_smoothing", "crop_scale", "random_erasing", "mixup_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be between 0 and 1")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay}: it must be above 0, and at most 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: it must be positive and finite")
        for name in ("patch_size", "dim", "depth", "heads"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.workers is not None:
            _at_least("workers", self.workers, 0)
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")
        if self.dataset != "shape_scenes" and not self.data_dir:
            raise ValueError(f"dataset={self.dataset!r} needs data_dir: pass --data-dir FOLDER")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}{_nearest(str(value), choices)}; choose one of {', '.join(choices)}")


def _at_least(name: str, value: float, low: float) -> None:
    if not low <= value < math.inf:
        raise ValueError(f"{name}={value}: it must be at least {low}, and finite")


def _nearest(word: str, choices: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f": did you mean {match[0]!r}?" if match else ""


def field_help(config_class: type) -> dict[str, str]:
    """Field name → the docstring written under it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body
    texts = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = text.value.value
    return texts


def _value_type(annotation) -> type:
    """The type a command-line word is turned into: T for `T` and for `T | None`."""
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    return inner[0] if inner else annotation


def _checked(config_class: type, values: dict, source: str) -> dict:
    """`values` with each value's type checked against its field."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{source}: unknown key {name!r}{_nearest(str(name), fields)}")
        kind = _value_type(fields[name].type)
        optional = kind is not fields[name].type
        if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            try:  # YAML reads 1e-3 as a string
                value = float(value)
            except ValueError as error:
                raise ValueError(f"{source}: {name}={value!r} is not a number") from error
        if not (value is None and optional) and (type(value) is not kind):
            raise ValueError(f"{source}: {name}={value!r} must be {kind.__name__}")
        checked[name] = value
    return checked


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, config_class: type = PretrainConfig) -> dict:
    """A recipe's settings: a name from `recipe_names()` or the path of a YAML file.

    Raises:
        ValueError: No such recipe, or it holds an unknown key or a value of the wrong type.
    """
    path = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"no recipe {name!r}{_nearest(name, recipe_names())}; "
            f"choose {', '.join(recipe_names())} or a YAML file's path"
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of settings, not {type(values).__name__}")
    return _checked(config_class, values, str(path))


class _Parser(argparse.ArgumentParser):
    """An unknown option's error suggests the nearest."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {unknown[0]!r}{_nearest(unknown[0].split('=')[0], options)}")
        return parsed


def build_config(argv: list[str] | None, description: str, default_recipe: str, config_class: type = PretrainConfig):
    """Read the command line: recipe, then single settings, then where to write.

    Args:
        argv: Arguments; those of the process when None.
        description: For `--help`.
        default_recipe: Used when `--recipe` is absent.
        config_class: The dataclass.

    Returns:
        (config, options), options holding `recipe`, `output` and `resume`.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--recipe", default=default_recipe, help=f"{', '.join(recipe_names())}, or a YAML file's path"
    )
    parser.add_argument("--output", default=None, help="folder of the run; runs/<recipe>-<date> when absent")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    texts = field_help(config_class)
    for field in dataclasses.fields(config_class):
        option = "--" + field.name.replace("_", "-")
        kind = _value_type(field.type)
        help_text = texts[field.name].replace("%", "%%")
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        else:
            parser.add_argument(option, type=kind, default=None, metavar=kind.__name__.upper(), help=help_text)
    options = parser.parse_args(argv)
    chosen = {f.name: getattr(options, f.name) for f in dataclasses.fields(config_class)}
    try:
        values = load_recipe(options.recipe, config_class) | {k: v for k, v in chosen.items() if v is not None}
        config = config_class(**values)
    except ValueError as error:
        parser.error(str(error))
    if options.resume and options.output is None:
        parser.error("--resume continues the run in --output: name its folder with --output")
    return config, options


def dump_config(config) -> str:
    """The resolved configuration as YAML that `--recipe` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
