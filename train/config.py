"""Settings of a training run, in a frozen dataclass. Recipes override defaults; the command line overrides recipes.

The docstring of a field is its `--help` text. An unknown key raises an error that suggests the nearest one.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import math
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import yaml

from crate_fast.errors import CommandParser, UserError, nearest, run_command

RECIPES = Path(__file__).parent / "recipes"
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # of torch.compile
FORM = ("residual", "attention", "sparsifier", "odl_ratio", "odl_steps", "odl_tied", "odl_residual", "threshold")
SIZES = ("patch_size", "dim", "depth", "heads", "decoder_depth")
DROP_RATES = ("drop_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "drop_path_rate")  # timm's names


class Limits(NamedTuple):
    """Range of a numeric setting: a check and its description for error messages."""

    hold: Callable[[float], bool]
    words: str


Torchvision = Literal["cifar10", "cifar100", "flowers102", "pets"]
Count = Annotated[int, Limits(lambda value: value >= 1, "at least 1")]
Natural = Annotated[int, Limits(lambda value: value >= 0, "at least 0")]
# PyTorch crashes when the system refuses to start more threads
Cores = Annotated[int, Limits(lambda value: 0 <= value <= 1024, "at least 0, and at most 1024")]
Amount = Annotated[float, Limits(lambda value: 0 <= value < math.inf, "at least 0, and finite")]
Positive = Annotated[float, Limits(lambda value: 0 < value < math.inf, "positive and finite")]
Share = Annotated[float, Limits(lambda value: 0 <= value <= 1, "between 0 and 1")]
Rate = Annotated[float, Limits(lambda value: 0 <= value < 1, "at least 0, and below 1")]
Factor = Annotated[float, Limits(lambda value: 0 < value <= 1, "above 0, and at most 1")]
Fraction = Annotated[float, Limits(lambda value: 0 < value < 1, "above 0, and below 1")]


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run. A recipe changes some of these defaults."""

    # --- data
    dataset: Literal["shape_scenes", "folder", "tar", "shards", "hf", Torchvision] = "shape_scenes"
    """Data set: shape_scenes (generated); folder or tar (class folders); shards (WebDataset); hf (Hugging Face
    datasets); cifar10, cifar100, flowers102 or pets (torchvision)."""
    data_dir: str = ""
    """Folder of the data set. folder: one folder per split; tar: <split>.tar; shards: <split>*.tar or <split>/*.tar;
    hf: anything that `datasets.load_dataset` reads."""
    download: bool = False
    """Download the data set: torchvision into data_dir, hf into its cache. By default nothing is downloaded."""
    train_split: str = "train"
    """Name of the training split (folder, tar, shards and hf)."""
    val_split: str = "validation"
    """Name of the validation split (folder, tar, shards and hf)."""
    train_samples: Count = 20_000
    """Training images of shape_scenes."""
    val_samples: Count = 1_000
    """Validation images of shape_scenes."""
    image_size: Count = 64
    """Height and width of the images, in pixels."""
    crop: Literal["none", "pad", "random", "center"] = "none"
    """Training crop: none (squashes images that are not square, while evaluation crops their middle); pad (as none,
    then a random position, with padding of 1/8 of the size); random (scale and aspect ratio); center."""
    crop_scale: Share = 0.08
    """Smallest fraction of the image's area that crop=random keeps."""
    hflip: Share = 0.0
    """Probability of a horizontal flip in training."""
    auto_augment: str = ""
    """timm's policy string, such as rand-m9-n2-mstd0.5; none when empty. randaugment-n2-m14 is torchvision's
    RandAugment(2, 14), with magnitudes up to 30 (timm: 10)."""
    repeats: Count = 1
    """Copies of an image in a batch, each augmented differently (repeated augmentation). An epoch keeps its length
    and shows fewer different images."""
    random_erasing: Share = 0.0
    """Probability that a rectangle of a training image is replaced by noise."""
    mixup: Amount = 0.0
    """α of mixup, which blends pairs of training images and their labels; 0 turns it off."""
    cutmix: Amount = 0.0
    """α of CutMix, which pastes a rectangle of one image into another; 0 turns it off. If mixup is on too, each
    batch uses one of the two."""
    mean: Literal["imagenet", "cifar10", "half"] = "imagenet"
    """Pixel normalisation: imagenet, cifar10 or half (mean and standard deviation 0.5)."""
    max_unreadable: Share = 0.01
    """Largest fraction of a split's images that may be unreadable in an epoch; above it the run stops. Training
    replaces unreadable images with others, evaluation skips them, and unreadable.txt lists them."""
    workers: Cores | None = None
    """Data-loading processes per training process; 0 loads in the training process. Default: 0 on a CPU, up to 8
    with a GPU."""

    # --- model
    init: str = ""
    """Initial weights: a run's folder (its best checkpoint), RUN@STEP, a folder of `crate-fast share`, or a weights
    file; random when empty."""
    head: Literal["keep", "new"] = "keep"
    """Classifier of a model with init: keep (the one in init, which must match the number of classes) or new (random
    weights)."""
    frozen: bool = False
    """Freeze the model and train only a linear classifier after a BatchNorm (MAE's linear probe)."""
    model: str = "crate_tiny_patch8_224"
    """A model of this package, including CRATE-MAE, or a timm model that accepts img_size, such as a ViT. If it is
    named on the command line, the recipe's sizes (patch_size to heads, decoder_depth) do not apply."""
    patch_size: Count | None = None
    """Side of a patch in pixels. For this and the next eleven settings, the default is the model's own value."""
    dim: Count | None = None
    """Token width."""
    depth: Count | None = None
    """Number of layers."""
    heads: Count | None = None
    """Number of heads; the head width becomes dim / heads."""
    residual: str | None = None
    """Residual form: released, x + MSSA(LN(x)); paper, LN(x) + MSSA(LN(x))."""
    attention: str | None = None
    """Attention: mssa, or mhsa (ablation)."""
    sparsifier: str | None = None
    """Second half of a layer: ista, odl (CRATE-α) or mlp (ablation)."""
    odl_ratio: int | None = None
    """Number of atoms in ODL's dictionary, as a multiple of the token width."""
    odl_steps: int | None = None
    """ISTA steps in ODL: 1 or 2."""
    odl_tied: bool | None = None
    """Decode with ODL's encoding dictionary instead of a second one."""
    odl_residual: bool | None = None
    """Add a residual connection around ODL: h + ODL(LN(h)) instead of ODL(LN(h))."""
    threshold: str | None = None
    """Thresholding function of ISTA: relu or soft."""
    drop_rate: Rate = 0.0
    """Dropout before the classifier. This rate and the next four are timm's, and mean the same for CRATE and ViT."""
    attn_drop_rate: Rate = 0.0
    """Dropout on attention weights."""
    proj_drop_rate: Rate = 0.0
    """Dropout on attention outputs and inside the MLP."""
    pos_drop_rate: Rate = 0.0
    """Dropout on the embedded tokens."""
    drop_path_rate: Rate = 0.0
    """Stochastic depth: probability that a sample skips a residual branch of the last layer. It increases linearly
    from 0 at the first layer."""

    # --- masked autoencoding, with a model such as crate_mae_tiny_patch16_224
    mask_ratio: Fraction = 0.75
    """Fraction of the patches to hide."""
    norm_pix_loss: bool = False
    """Predict each patch normalised by its own mean and standard deviation."""
    visible_only: bool = False
    """Encode only the visible patches, as MAE does. By default mask tokens are encoded too, as in the released
    CRATE-MAE."""
    decoder_depth: Count | None = None
    """Number of decoder layers. Default: the number of encoder layers."""

    # --- optimisation
    epochs: Count = 6
    """Passes over the training images."""
    batch_size: Count = 128
    """Images per optimiser step, summed over all processes and accumulation steps."""
    accumulate: Count = 1
    """Forward-backward passes per optimiser step."""
    optimizer: str = "adamw"
    """timm's name of the optimiser, such as adamw, lion or lars (no trust ratio for biases, as in MAE's probe)."""
    beta2: Fraction | None = None
    """Decay rate of the second moment (adamw and similar optimisers) or of lion's momentum. Default: the optimiser's
    own."""
    lr: Positive = 1e-3
    """Peak learning rate for the whole batch, before lr_scaling."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Scaling of lr with the batch: none; linear, by batch_size / 256; sqrt, by its square root."""
    weight_decay: Amount = 0.05
    """Weight decay: decoupled for adamw, lion and muon; an L2 penalty for sgd, adam and lars."""
    decay_all: bool = False
    """Apply weight decay to every parameter, as the released recipe does. By default biases, norms, learned
    positions and a classifier's CLS token are exempt, as in timm."""
    layer_decay: Factor = 1.0
    """Layer-wise learning-rate decay: a layer's rate is this factor times the rate of the layer above."""
    schedule: Literal["cosine", "released"] = "cosine"
    """Learning-rate schedule: cosine, per step after a linear warm-up; released, min(warm-up, cosine) per epoch."""
    warmup_epochs: Amount = 0.5
    """Length of the linear warm-up in epochs."""
    min_lr: Amount = 0.0
    """Final learning rate."""
    label_smoothing: Share = 0.1
    """Label smoothing of the cross-entropy."""
    clip_grad: Amount = 1.0
    """Limit of gradient clipping, applied as clip_mode says; 0 turns it off."""
    clip_mode: Literal["norm", "value"] = "norm"
    """Quantity that clip_grad limits: norm (of the whole gradient) or value (of each entry)."""

    ema_decay: Rate = 0.0
    """Decay of the exponential moving average (EMA) of the weights, at step n at most 1 − n^(−2/3); 0 turns it off.
    The EMA weights are evaluated too, and are loaded when the run is opened."""

    # --- engine
    seed: Natural = 0
    """Seed of initial weights, data order, augmentation and shape_scenes."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:N, or auto (cuda if there is a GPU)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision: fp32; bf16 or fp16 (autocast; fp16 with a gradient scaler); auto (bf16 on a GPU that supports it,
    else fp32)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile: default; reduce-overhead or max-autotune, which use CUDA graphs; or
    max-autotune-no-cudagraphs."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism. ddp: each process holds the whole model; fsdp: FSDP2, each process holds a shard."""
    grad_checkpointing: bool = False
    """Recompute layers in the backward pass to save memory."""
    threads: Cores = 0
    """CPU threads per process; 0 divides the usable cores of a host equally among its processes, and leaves a single
    process PyTorch's default."""
    eval_every: Count = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_every: Natural = 0
    """Optimiser steps between checkpoints; 0 saves only at evaluations."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, in addition to the best."""
    log_every: Count = 20
    """Optimiser steps between log entries."""
    segmentation_samples: Count = 500
    """Number of images to score attention maps on after training, if the data set has object masks."""
    nonfinite_limit: Count = 10
    """Consecutive steps with a non-finite loss or gradient before the run stops. Each such step is skipped and
    counted."""

    def __post_init__(self):
        for name, annotation in {field.name: field.type for field in dataclasses.fields(self)}.items():
            value, (_, _, choices, limits) = getattr(self, name), _parts(annotation)
            if choices and value not in choices:
                raise UserError(f"{name}={value!r}{nearest(value, choices)}; choose one of {', '.join(choices)}")
            if limits and value is not None and not limits.hold(value):
                raise UserError(f"{name}={value}: it must be {limits.words}")
        peak, size = self.peak_lr, f"batch_size={self.batch_size} is not a multiple of"
        mode, graphs = f"compile_mode={self.compile_mode!r}", self.compile_mode in MODES_WITH_GRAPHS
        with_probe = self.frozen and (self.mixup or self.cutmix or self.layer_decay < 1)
        no_init = self.head == "new" and not self.init
        no_folder = self.dataset != "shape_scenes" and not self.data_dir
        not_compiled = self.compile_mode != "default" and not self.compile
        refused = {
            f"min_lr={self.min_lr} is above the peak learning rate {peak:g}: lower min_lr": self.min_lr > peak,
            f"warmup_epochs={self.warmup_epochs:g} is above epochs={self.epochs}, so the learning rate never reaches "
            "its peak: lower warmup_epochs": self.warmup_epochs > self.epochs,
            f"{size} accumulate={self.accumulate}: change one of them": self.batch_size % self.accumulate,
            f"{size} repeats={self.repeats}: change one of them": self.batch_size % self.repeats,
            "frozen=True trains only a linear classifier: leave out mixup, cutmix and layer_decay": with_probe,
            "head='new' needs initial weights: pass --init, or leave out --head": no_init,
            f"dataset={self.dataset!r} needs data_dir: pass --data-dir FOLDER": no_folder,
            f"{mode} needs compile=True: pass --compile too": not_compiled,
            # pytorch/pytorch#169545
            f"{mode}: PyTorch's CUDA graphs overwrite gradients with accumulate={self.accumulate}; use "
            "compile_mode='default' or 'max-autotune-no-cudagraphs'": graphs and self.accumulate > 1,
            f"{mode} records the addresses of weights, but parallel='fsdp' moves them: use compile_mode='default', "
            "or parallel='ddp'": graphs and self.parallel == "fsdp",
        }
        for message, wrong in refused.items():
            if wrong:
                raise UserError(message)

    @property
    def peak_lr(self) -> float:
        """Peak learning rate after `lr_scaling`."""
        ratio = self.batch_size / 256
        return self.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.lr_scaling]


# --- from a recipe and the command line


@functools.cache
def field_help(config_class: type) -> dict[str, str]:
    """Return a dictionary from each field's name to the docstring below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body
    pairs = [pair for pair in itertools.pairwise(body) if isinstance(pair[0], ast.AnnAssign)]
    return {field.target.id: text.value.value for field, text in pairs if isinstance(text, ast.Expr)}


def _parts(annotation) -> tuple[type, bool, tuple[str, ...], Limits | None]:
    """Return a setting's type, whether it may be None, its choices and its limits."""
    optional = type(None) in get_args(annotation)
    inner = get_args(annotation)[0] if optional else annotation
    if get_origin(inner) is Literal:
        return str, optional, get_args(inner), None
    kind, limits = get_args(inner) or (inner, None)
    return kind, optional, (), limits


def _checked(values: dict, source: str) -> dict:
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    checked = dict(values)
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{source}: unknown key {name!r}{nearest(str(name), fields)}")
        kind, optional, _, _ = _parts(fields[name].type)
        if kind is float and type(value) in (int, str):
            try:  # YAML reads 1e-3 as a string
                checked[name] = float(value)
            except ValueError as error:
                raise UserError(f"{source}: {name}={value!r} is not a number") from error
        elif type(value) is not kind and not (value is None and optional):
            raise UserError(f"{source}: {name}={value!r} must be {kind.__name__}")
    return checked


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> dict:
    """Return the settings of a recipe, given one of `recipe_names()` or the path of a YAML file."""
    path = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name)
    if not path.is_file():
        raise UserError(
            f"no recipe {name!r}{nearest(name, recipe_names())}; "
            f"choose {', '.join(recipe_names())} or the path of a YAML file"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of settings, not {type(values).__name__}")
    return _checked(values, str(path))


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", help="folder of the run (default: runs/<recipe>-<date>)")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    add("--dry-run", action="store_true", help="test the run: two steps, then save and load, in a temporary folder")


def _check_data_settings(values: dict, given: dict) -> dict:
    """Refuse settings without effect; drop those of a recipe whose data set is replaced by shape_scenes."""
    scenes, of_files = TrainConfig.dataset, ("data_dir", "crop", "crop_scale", "auto_augment")
    if (values | given).get("dataset", scenes) == scenes:
        if values.get("dataset", scenes) != scenes:
            values = {name: value for name, value in values.items() if name not in of_files}
        for name in of_files:
            found, default = (values | given).get(name), getattr(TrainConfig, name)
            if found not in (None, default):
                raise UserError(
                    f"{name}={found!r} has no effect on dataset={scenes!r}, which generates its images: leave "
                    f"out --{name.replace('_', '-')}, or choose another --dataset"
                )
    elif "crop_scale" in given and (values | given).get("crop") != "random":
        raise UserError(f"crop_scale={given['crop_scale']} needs crop='random': pass --crop random too")
    return values


def build_config(
    argv: list[str] | None,
    description: str,
    default_recipe: str,
    *,
    prog: str | None = None,
    adjust: Callable[[dict, dict], dict] = lambda values, chosen: values | chosen,
    add_options: Callable[[argparse.ArgumentParser], None] = _add_run_options,
):
    """Parse the command line: a recipe, single settings and the command's own options.

    `prog` is the command's name in its help. `adjust` merges the settings of the recipe and the command line; by
    default the latter win. `add_options` adds the command's own options, by default those of a run (`--output`, …).

    Returns:
        (config, options); `options` holds `recipe` and the command's own options.
    """
    parser = CommandParser(prog=prog, description=description)
    parser.add_argument(
        "--recipe", default=default_recipe, help=f"{', '.join(recipe_names())}, or the path of a YAML file"
    )
    add_options(parser)
    texts = field_help(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        option, text = "--" + field.name.replace("_", "-"), texts[field.name].replace("%", "%%")
        kind = _parts(field.type)[0]
        if kind is bool:
            parser.add_argument(option, default=None, help=text, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(option, default=None, help=text, type=kind, metavar=kind.__name__.upper())
    options = parser.parse_args(argv)
    given = {name: value for name in texts if (value := getattr(options, name)) is not None}
    recipe = load_recipe(options.recipe)
    if "model" in given:  # the recipe's sizes belong to the recipe's model
        recipe = {name: value for name, value in recipe.items() if name not in SIZES}
    config = TrainConfig(**adjust(_check_data_settings(recipe, given), given))
    return config, options


def train_command(
    name: str,
    description: str,
    recipe: str,
    adjust: Callable[[dict, dict], dict] = lambda values, chosen: values | chosen,
) -> Callable[..., int]:
    """Return the `main` of a training command: `crate-fast` `name`, with a default recipe.

    `adjust` is that of `build_config`.
    """

    def train(argv: list[str] | None) -> int:
        config, options = build_config(argv, description, recipe, prog=f"crate-fast {name}", adjust=adjust)
        if options.resume and not options.output:
            raise UserError("--resume needs the folder of the run to continue: pass --output FOLDER")
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
        if restarts and not options.resume and not options.dry_run:
            raise UserError("torchrun --max-restarts needs a run to continue: pass --output FOLDER --resume")
        from crate_fast.train.trainer import launch  # imports torch, which is slow: after command-line errors

        return launch(config, options)

    def main(argv: list[str] | None = None) -> int:
        """Train with the options in `argv` or the command line; return the exit status, 2 after an error."""
        return run_command(train, argv)

    return main


def dump_config(config) -> str:
    """Return the resolved configuration as YAML that `--recipe` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
