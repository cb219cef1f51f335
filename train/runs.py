"""Models of runs: build them from settings, load them from a run's folder, or start from existing weights."""

import json
from collections.abc import Sequence
from pathlib import Path

from timm.layers import PatchEmbed
from torch import Tensor, nn

from crate_fast import CRATE, CRATEMAE
from crate_fast.arguments import patch_grid
from crate_fast.checkpoints import (
    adapt_state_dict,
    is_demo,
    load_strictly,
    read_state_dict,
    unwrap_state_dict,
)
from crate_fast.errors import UserError, nearest
from crate_fast.mae import encoder_state_dict
from crate_fast.pretrained import is_model_folder, record
from crate_fast.registry import MAE, MAE_ENCODER, create_model, is_mae, is_model, model_names
from crate_fast.train import checkpoint
from crate_fast.train.config import DROP_RATES, FORM, SIZES, TrainConfig, load_recipe
from crate_fast.train.data.transforms import STATISTICS
from crate_fast.train.faults import poisoned

_AUTOENCODER_SETTINGS = ("mask_ratio", "norm_pix_loss", "visible_only", "decoder_depth")


# --- build


def model_arguments(config: TrainConfig, num_classes: int) -> dict:
    """Return the arguments of `registry.create_model` that the configuration sets, under timm's names."""
    arguments = {"img_size": config.image_size}
    arguments |= {name: getattr(config, name) for name in DROP_RATES if getattr(config, name)}
    if is_mae(config.model):
        if config.frozen:
            encoder = MAE_ENCODER + config.model.removeprefix(MAE)
            raise UserError(f"frozen=True: an autoencoder has no classifier; probe its encoder, --model {encoder}")
        arguments |= {"norm_pix_loss": config.norm_pix_loss, "visible_only": config.visible_only}
    else:
        unused = [name for name in _AUTOENCODER_SETTINGS if getattr(config, name) != getattr(TrainConfig, name)]
        if unused:
            raise UserError(f"{', '.join(unused)}: model={config.model!r} is not an autoencoder; leave them out")
        arguments["num_classes"] = num_classes
    for name in (*SIZES, *FORM):
        if getattr(config, name) is not None:
            arguments[{"dim": "embed_dim", "heads": "num_heads"}.get(name, name)] = getattr(config, name)
    return arguments


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """Build the configured model on the CPU. Autoencoders ignore `num_classes`."""
    if not is_model(config.model):
        raise UserError(f"model={config.model!r}{nearest(config.model, model_names()) or ': timm has no such model'}")
    arguments = model_arguments(config, num_classes)
    try:
        model = create_model(config.model, **arguments)
    except TypeError as error:
        raise UserError(
            f"model={config.model!r} does not accept all of {', '.join(arguments)} ({error}): leave out the settings "
            "that it lacks; models without img_size cannot be trained here"
        ) from error
    if isinstance(embed := getattr(model, "patch_embed", None), PatchEmbed):  # timm would leave out pixels
        patch_grid(embed.img_size, embed.patch_size)
    if config.frozen:
        _put_probe(model)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except AssertionError as error:  # of timm
            raise UserError(f"grad_checkpointing=True: model={config.model!r} has none; leave it out") from error
    return model


def _put_probe(model: nn.Module) -> None:
    """Replace the classifier with MAE's linear probe (BatchNorm without affine, Linear); freeze everything else."""
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise UserError(f"frozen=True: the classifier of {type(model).__name__} is not nn.Linear; use another model")
    linear = nn.Linear(classifier.in_features, classifier.out_features)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(classifier.in_features, affine=False, eps=1e-6)
    model.set_submodule(_classifier_name(model), nn.Sequential(norm, linear))
    model.requires_grad_(False)
    linear.requires_grad_(True)


# --- open a run


def run_config(folder: Path) -> TrainConfig:
    """Return the configuration of a run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run (it has no config.yaml): pass a run's folder, such as runs/NAME")
    return TrainConfig(**load_recipe(str(folder / "config.yaml")))


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of a run's checkpoints, ascending and at least one."""
    steps = checkpoint.steps(folder / "checkpoints")
    if not steps:
        raise UserError(f"{folder} holds no checkpoints: pass a run's folder, such as runs/NAME")
    return steps


def run_weights(folder: Path, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """Return the weights of a run's checkpoint and its step; the EMA weights if the run keeps an EMA.

    By default it is the best checkpoint, or the newest if none was evaluated.
    """
    steps = checkpoint_steps(folder)
    if step is None:
        step = checkpoint.best_step(folder / "checkpoints") or steps[-1]
    if step not in steps:
        raise UserError(f"{folder} has no checkpoint at step {step}: choose one of {steps}")
    saved = checkpoint.load(folder / "checkpoints", step)
    return (saved.weights if saved.ema is None else saved.ema), step


def num_classes_of(weights: dict) -> int:
    """Return the number of classes in a state dict of a CRATE or timm model; 0 if it has no classifier."""
    weights = unwrap_state_dict(weights)  # renames the demo checkpoint's `head` to mlp_head.2
    heads = [name for name in weights if name.startswith(("mlp_head.", "head.", "fc.")) and name.endswith("weight")]
    matrices = [name for name in heads if weights[name].dim() == 2]
    # MaxViT's hidden layer, head.pre_logits.fc, has a longer name than its classifier, head.fc
    last = max(matrices, key=lambda name: (-name.count("."), name), default=None)
    return 0 if last is None else len(weights[last])


def load_model(folder: Path, step: int | None = None) -> tuple[nn.Module, TrainConfig, int]:
    """Return the model of a run's checkpoint, on the CPU in eval mode, with its configuration and step.

    The run's data set is not needed. `step` is that of `run_weights`.
    """
    weights, step = run_weights(folder, step)
    config = run_config(folder)
    model = build_model(config, num_classes_of(weights))
    remedy = "its config.yaml belongs to another run or version: restore it, or use another checkpoint"
    load_strictly(model, weights, f"{folder} at step {step}", remedy)
    return model.eval(), config, step


# --- start from existing weights: nothing is replaced, dropped or left random silently


def initial_run(init: str) -> tuple[Path, int | None] | None:
    """Return the run and step that `--init` names, or None if it names a file or a shared model."""
    run, _, step = init.rpartition("@")
    if is_model_folder(init):
        return None
    if Path(init).is_dir():
        return Path(init), None
    if run and Path(run).is_dir():
        if not step.isdigit():
            raise UserError(f"init={init!r}: pass RUN@STEP with a step number, or RUN for its best checkpoint")
        return Path(run), int(step)
    if not Path(init).is_file():
        raise UserError(f"init={init!r} is neither a file nor the folder of a run or shared model: check the path")
    return None


def initial_settings(init: str) -> dict:
    """Return the settings of the run or shared model that `--init` names; none for a file."""
    if not is_model_folder(init):
        run = initial_run(init)
        return {} if run is None else dict(vars(run_config(run[0])))
    try:
        shared = json.loads((Path(init) / "config.json").read_text())
        mean = shared["pretrained_cfg"]["mean"]
        known = next(name for name, (own, _) in STATISTICS.items() if list(own) == mean)
        own_names = {"embed_dim": "dim", "num_heads": "heads"}
        settings = {own_names.get(name, name): value for name, value in shared["model_args"].items()}
        return settings | {"model": shared["architecture"], "mean": known}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{init}/config.json is not one of `crate-fast share` ({error!r}): pass {init}/model.safetensors, with "
            "--model, its sizes and --mean"
        ) from error


def load_initial(model: nn.Module, config: TrainConfig, classes: Sequence[str] = ()) -> str:
    """Load `config.init` into a model on the CPU; return a text that describes the source and all changes.

    The classifier must fit, unless `head="new"` or `frozen` keeps a random one; its classes, if known, must be those
    of the data, `classes`. Positions of another patch grid are resampled.

    Raises:
        UserError: The file is damaged, or its weights do not fit; the message names what differs and the remedy.
    """
    where, run, visible_only = f"init={config.init!r}", initial_run(config.init), False
    new_classifier = config.head == "new" or config.frozen
    if run is None:
        file = Path(config.init, "model.safetensors") if is_model_folder(config.init) else config.init
        weights, source = read_state_dict(file), config.init
        theirs = record(config.init).get("label_names") if is_model_folder(config.init) else None
    else:
        weights, step = run_weights(*run)
        source, visible_only = f"{run[0]} at step {step}", run_config(run[0]).visible_only
        theirs = checkpoint.manifest(run[0] / "checkpoints", step)["data"]["classes"]
    notes = []
    if "decoder_pred.weight" in weights and isinstance(model, CRATE):
        weights = encoder_state_dict(weights, visible_only)
        notes.append("the encoder of an autoencoder")
    if isinstance(model, CRATEMAE) and config.head == "new":
        raise UserError("head='new': an autoencoder has no classifier to replace; leave it out")
    token, own_token = weights.get("cls_token"), getattr(model, "cls_token", None)
    if token is None or own_token is None or token.shape == own_token.shape:  # `load_strictly` refuses another width
        try:
            adapted = adapt_state_dict(weights, model)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if any(adapted[name] is not value for name, value in weights.items()):
            notes.append("positions of this image size" if isinstance(model, CRATEMAE) else "positions resampled")
            weights = adapted
    if isinstance(model, CRATE):
        _check_demo(weights, model, config, new_classifier)
    if new_classifier:
        notes.append(f"new classifier ({num_classes_of(weights) or 'no'} → {model.num_classes} classes)")
        kept = {key: value for key, value in weights.items() if not _in_classifier(key, model)}
        weights = kept | {key: value for key, value in model.state_dict().items() if _in_classifier(key, model)}
    if bad := poisoned(weights):
        raise UserError(f"{where} holds NaN or infinity in {', '.join(bad[:4])}: the file is damaged; use another")
    shapes = [{key: value.shape for key, value in state.items()} for state in (weights, model.state_dict())]
    differing = [key for key, _ in shapes[0].items() ^ shapes[1].items()]
    if differing and not isinstance(model, CRATEMAE) and all(_in_classifier(key, model) for key in differing):
        raise UserError(
            f"{where} does not fit (it has {num_classes_of(weights) or 'no'} classes, and the data have "
            f"{model.num_classes}): pass --head new to start with a new classifier"
        )
    remedy = (
        "set model, patch_size, dim, depth, heads (and image_size, if positions are not resampled) as in the file"
    )
    load_strictly(model, weights, where, remedy)
    if not new_classifier and not isinstance(model, CRATEMAE):
        _check_classes(theirs, classes, where)
    usual = (getattr(model, "pretrained_cfg", None) or {}).get("mean")  # None for an autoencoder
    if run is None and not is_model_folder(config.init) and usual not in (None, STATISTICS[config.mean][0]):
        notes.append(f"pixels normalised as --mean {config.mean}; by default {config.model} has the mean {usual}")
    return source + (f" ({', '.join(notes)})" if notes else "")


def _check_classes(theirs: Sequence[str] | None, classes: Sequence[str], where: str) -> None:
    """Refuse a classifier whose outputs are other classes than the data's; numbers are unknown names."""
    both = [list(names) for names in (theirs or (), classes)]
    named = all(names and names != [str(number) for number in range(len(names))] for names in both)
    if named and both[0] != both[1]:
        pair = next(pair for pair in zip(*both, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"{where} has a classifier for other classes, or in another order: {pair[0]!r} where the data have "
            f"{pair[1]!r}; pass --head new to start with a new classifier"
        )


def _check_demo(weights: dict[str, Tensor], model: CRATE, config: TrainConfig, new_classifier: bool) -> None:
    """Refuse models with which the emergence paper's demo checkpoint would compute something else."""
    where = f"init={config.init!r}"
    if is_demo(weights) and model.embed_dim == 768 and config.heads is None:
        raise UserError(
            f"{where} looks like the emergence paper's demo checkpoint, which has 6 heads, but the number is not "
            "stored: pass --heads 6, or the number of your model"
        )
    if "mlp_head.2.weight" in weights and not (model.head_hidden or new_classifier):
        raise UserError(f"{where} has a classifier with a hidden layer: pass --head new to start with a new one")


def _classifier_name(model: nn.Module) -> str:
    target = model.get_classifier()
    for name, module in model.named_modules():
        if module is target:
            return name
    raise UserError(f"the classifier of {type(model).__name__} is not one of its modules and cannot be replaced")


def _in_classifier(key: str, model: nn.Module) -> bool:
    if isinstance(model, CRATE):  # mlp_head.0 is the LayerNorm before the classifier
        return key.startswith("mlp_head.") and not key.startswith("mlp_head.0.")
    return key.startswith(_classifier_name(model) + ".")
