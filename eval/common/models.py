"""Models by name.

    runs/NAME            a run's best checkpoint        crate_small_patch8_224@weights.pth    a file, loaded strictly
    runs/NAME@12000      its checkpoint at a step       vit_small_patch8_224.dino@pretrained  weights from timm
    runs/NAME@untrained  its random initial weights     vit_small_patch8_224@untrained        weights from --seed
    shipped:photographs  a small model of the package   shipped:photographs-ViT, shipped:CRATE, shipped:ViT@untrained
    SHARED               a folder of `crate-fast share`, or hf-hub:USER/NAME; SHARED@untrained

Put a name for tables in front, as in `CRATE-S/8=runs/NAME`. Of a CRATE-MAE, the encoder is evaluated. From a file
with weights and their moving average, the average is read.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from crate_fast import CRATEMAE
from crate_fast.checkpoints import is_demo, load_strictly, read_state_dict
from crate_fast.errors import UserError, nearest
from crate_fast.eval.common.features import FeatureExtractor, Features, extractor_for
from crate_fast.eval.common.results import file_name
from crate_fast.pretrained import FOLDER, HUB, is_model_folder, load_pretrained, packaged_models
from crate_fast.registry import create_model, is_mae, is_model, model_names
from crate_fast.train import checkpoint
from crate_fast.train.checkpoint import CheckpointError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.transforms import Normalize
from crate_fast.train.runs import build_model, checkpoint_steps, load_model, num_classes_of, run_config

_SHIPPED = "shipped:"


@dataclass(frozen=True)
class LoadedModel:
    """A model under evaluation."""

    label: str  # name in tables and figures
    model: nn.Module  # in evaluation mode, on its device
    normalize: Normalize  # from uint8 images [B, 3, H, W] to the model's input
    extract: FeatureExtractor = field(repr=False)
    facts: dict  # specification, number of parameters, image size, hash of the weights
    classes: Sequence[str] | None = None  # names of the logits' classes, if known
    config: TrainConfig | None = None  # of the model's run
    autoencoder: CRATEMAE | None = None  # the CRATE-MAE whose encoder `model` is

    def require_cls(self) -> None:
        """Raise a `UserError` if the model has no CLS token."""
        if not self.extract.has_cls:
            raise UserError(
                f"{self.label} has no CLS token, thus no CLS attention: use maskcut or pca, or leave it out"
            )

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return next(self.model.parameters()).device

    def features(self, images: Tensor, layers: Sequence[int]) -> Features:
        """Return the features of some layers for uint8 images [B, 3, H, W] on any device."""
        return self.extract(self.normalize(images.to(self.device)), layers)


def split_source(source: str) -> tuple[str, str]:
    """Split `SOURCE@WEIGHTS` into its parts; the second is "" if missing. A folder or file may have @ in its name.

    >>> split_source("runs/a@1200"), split_source("runs/a")
    (('runs/a', '1200'), ('runs/a', ''))
    """
    name, separator, weights = source.partition("@")
    if not separator or Path(source).is_dir():
        return source, ""
    return (name, weights) if Path(weights).is_file() else tuple(source.rsplit("@", 1))


def split_label(specification: str) -> tuple[str, str]:
    """Split `NAME=MODEL` into its parts; the default name is the last part of the model's path.

    >>> split_label("CRATE-S/8=runs/a"), split_label("runs/a@1200")
    (('CRATE-S/8', 'runs/a'), ('a@1200', 'runs/a@1200'))
    """
    label, separator, source = specification.partition("=")
    is_path = Path(split_source(specification)[0]).is_dir()  # its name may contain =
    if separator and label and source and "@" not in label and not is_path:
        return label, source
    return specification.rstrip("/").split("/")[-1], specification


def check_labels(specifications: Sequence[str]) -> None:
    """Raise a `UserError` if two models have the same name in tables, figures and names of files."""
    names = [file_name(split_label(specification)[0]) for specification in specifications]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name!r}: give each a name, as in NAME=MODEL")


def _parse_arguments(words: list[str] | None) -> dict:
    arguments = {}
    for word in words or []:
        name, separator, value = word.partition("=")
        if not separator or not name:
            raise UserError(f"--model-args {word!r}: write KEY=VALUE, such as heads=6")
        try:
            arguments[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            arguments[name] = value
        if isinstance(arguments[name], int | float) and not arguments[name] >= 0:  # timm accepts num_heads=-3
            raise UserError(f"--model-args {word!r}: give a number of at least 0")
    return arguments


def _seeded(build, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _from_run(folder: Path, version: str, seed: int) -> tuple[nn.Module, TrainConfig, list[str]]:
    """Return a run's model with its configuration and the names of its classes."""
    if version == "untrained":
        config, step = run_config(folder), checkpoint_steps(folder)[-1]
    elif version and not version.isdigit():
        raise UserError(
            f"{folder}@{version}: after a run's folder write @STEP or @untrained, or nothing for the best checkpoint"
        )
    else:
        model, config, step = load_model(folder, int(version) if version else None)
    classes = checkpoint.manifest(folder / "checkpoints", step)["data"]["classes"]
    if version == "untrained":
        model = _seeded(lambda: build_model(config, len(classes)), config.seed + seed)
    return model, config, classes


def _shared(source: str) -> str | None:
    """Return the argument of `load_pretrained` for a packaged model, shared folder or Hub model; None for others."""
    if source.startswith(_SHIPPED):
        name = source.removeprefix(_SHIPPED)
        if name not in packaged_models():
            raise UserError(f"{source}: choose one of {', '.join(_SHIPPED + known for known in packaged_models())}")
        return str(FOLDER / name)  # also if a folder here has this name
    if is_model_folder(source):
        return source
    return source if source.startswith(HUB) else None


def _from_timm(name: str, version: str, arguments: dict, seed: int) -> nn.Module:
    def create(**known) -> nn.Module:
        try:
            return create_model(name, **(known | arguments))
        except UserError:
            raise
        except Exception as error:  # timm raises many types for arguments that do not fit
            reason = " ".join(str(error).split()).removesuffix(".")
            if "pretrained" in known and isinstance(error, RuntimeError | OSError):
                raise UserError(
                    f"{name}@pretrained: {reason}. Give a file of its weights, as in {name}@FILE"
                ) from error
            reason = f"{type(error).__name__}: {reason}"
            raise UserError(f"{name} does not take --model-args {known | arguments} ({reason})") from error

    if not is_model(name):
        near = nearest(name, [*(_SHIPPED + known for known in packaged_models()), *model_names()])
        raise UserError(f"{name!r} is neither the folder of a run nor a timm model{near}; correct the name")
    if version == "untrained":
        return _seeded(create, seed)
    if version == "pretrained":
        return create(pretrained=True)
    if not version:
        raise UserError(f"{name}: choose weights: {name}@FILE, {name}@pretrained or {name}@untrained (random)")
    weights = read_state_dict(version)
    known = {} if is_mae(name) else {"num_classes": num_classes_of(weights)}
    if name.startswith("crate_") and "mlp_head.2.weight" in weights:
        known["head_hidden"] = True
        if is_demo(weights) and "heads" not in arguments:
            raise UserError(
                f"{version} looks like the emergence paper's demo checkpoint, which has 6 heads; the number is not "
                "in the file: pass --model-args heads=6, or your model's number"
            )
    remedy = "name the model of the file, or pass its sizes with --model-args, such as num_heads=6 img_size=480"
    return load_strictly(create(**known), weights, version, remedy, name)


def open_model(
    specification: str,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    model_args: list[str] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Open a model by its name (see the module's docstring).

    Args:
        image_size: Height and width of the input, in pixels; the model's own when None.
        model_args: `KEY=VALUE` arguments of `registry.create_model`; ignored for runs and shared models.
        seed: Seed of untrained weights; of a run's, added to its own seed.

    Raises:
        UserError: The run, checkpoint or file is missing, or the name or the image size does not fit.
    """
    label, source = split_label(specification)
    name, version = split_source(source)
    arguments, config, shared, classes = _parse_arguments(model_args), None, _shared(name), None
    if Path(name).is_dir() and shared is None:
        model, config, classes = _from_run(Path(name), version, seed)
        statistics = config.mean
    else:
        if shared is None:
            model = _from_timm(name, version, arguments, seed)
        elif version in ("", "untrained"):
            model = _seeded(lambda: load_pretrained(shared, weights=not version), seed)
        else:
            raise UserError(f"{name}@{version}: write {name} or {name}@untrained")
        timm_config = getattr(model, "pretrained_cfg", None)  # None for an autoencoder
        statistics = (timm_config["mean"], timm_config["std"]) if timm_config else "imagenet"
        classes = timm_config.get("label_names") if timm_config else None
    autoencoder = model.to(device) if isinstance(model, CRATEMAE) else None
    model = model.encoder() if autoencoder else model
    extract = extractor_for(model)
    if extract.channels != 3:
        raise UserError(f"{source} expects images of {extract.channels} channels, not RGB: name another model")
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        error = UserError if config is None else CheckpointError
        raise error(f"the weights of {source} hold NaN or infinity: the checkpoint is damaged; name another")
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    height, width = extract.image_size
    if image_size is None and height != width:
        raise UserError(f"{source} expects {height}×{width} images, but images become squares: pass --image-size N")
    extract.set_image_size(height if image_size is None else image_size)  # raises if patches do not cover the image
    facts = {
        "model": source,
        "label": label,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": digest.hexdigest()[:16],
        "image_size": list(extract.image_size),
        "patch_size": list(extract.patch_size),
        "normalization": statistics
        if isinstance(statistics, str)
        else dict(zip(("mean", "std"), statistics, strict=True)),
        "model_args": arguments if config is None and shared is None else {},  # the others ignore them
        "seed": seed,
    }
    normalize = Normalize(statistics).to(device)
    return LoadedModel(label, model.to(device), normalize, extract, facts, classes, config, autoencoder)


def check_model_args(words: Sequence[str] | None, models: Sequence[LoadedModel]) -> None:
    """Raise a UserError if `--model-args` is given and no model takes it."""
    if words and not any(loaded.facts["model_args"] for loaded in models):
        given = " ".join(words)
        raise UserError(f"--model-args {given}: runs and shared models have their own settings; leave them out")
