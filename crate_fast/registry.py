"""timm's registry: every size of both papers, and the encoders of CRATE-MAE, under `timm.create_model`.

Patch-16 names are the released repository's sizes (ImageNet-1k), patch-8 names the emergence paper's (ImageNet-21k,
21,842 classes), whose T and S are ViT-wide. No weights can be downloaded: `pretrained=True` is timm's error. An
autoencoder is no classifier and stays out of timm's registry: `create_mae` builds it by name.
"""

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from crate_fast.arguments import TIMM_NAMES, head_width, rename_arguments
from crate_fast.checkpoints import adapt_state_dict, load_weights
from crate_fast.errors import UserError
from crate_fast.mae import (
    CRATEMAE,
    ENCODER_OPTIONS,
    CRATEMAE_base,
    CRATEMAE_large,
    CRATEMAE_small,
    CRATEMAE_tiny,
)
from crate_fast.model import CRATE

__all__ = ["MAE", "MAE_ENCODER", "create_mae", "create_model", "is_mae", "is_model", "model_names"]

MAE, MAE_ENCODER = "crate_mae_", "crate_mae_encoder_"  # in front of a size: an autoencoder; its encoder as a CRATE

_AUTOENCODERS = {
    "crate_mae_tiny_patch16_224": CRATEMAE_tiny,
    "crate_mae_small_patch16_224": CRATEMAE_small,
    "crate_mae_base_patch16_224": CRATEMAE_base,
    "crate_mae_large_patch16_224": CRATEMAE_large,
}
_TO_TIMM = {ours: timms for timms, ours in TIMM_NAMES.items()}
_DROP_RATES = ("drop_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "drop_path_rate")


# --- timm's registry ---


def _cfg(patch_size: int, num_classes: int = 1000) -> dict:
    return {
        "num_classes": num_classes,
        "input_size": (3, 224, 224),
        "pool_size": (224 // patch_size, 224 // patch_size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "to_patch_embedding.2",
        "classifier": "mlp_head.1",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {
        "crate_tiny_patch16_224": _cfg(16),
        "crate_small_patch16_224": _cfg(16),
        "crate_base_patch16_224": _cfg(16),
        "crate_large_patch16_224": _cfg(16),
        "crate_tiny_patch8_224": _cfg(8, num_classes=21842),
        "crate_small_patch8_224": _cfg(8, num_classes=21842),
        "crate_base_patch8_224": _cfg(8, num_classes=21842),
        "crate_mae_encoder_tiny_patch16_224": _cfg(16),
        "crate_mae_encoder_small_patch16_224": _cfg(16),
        "crate_mae_encoder_base_patch16_224": _cfg(16),
        "crate_mae_encoder_large_patch16_224": _cfg(16),
    }
)


def _weights_for(state_dict: dict, model: CRATE) -> dict[str, Tensor]:
    """Adapt a file's weights to the model, as timm asks of a registered model."""
    state_dict = adapt_state_dict(state_dict, model)
    kernel = state_dict.get("to_patch_embedding.2.weight")
    own = model.to_patch_embedding[2].in_features
    if kernel is not None and kernel.shape[1] != own:  # timm would take it for the kernel of a convolution
        raise UserError(
            f"the weights are for patches of {kernel.shape[1]} values and the model has {own}: build the model with "
            "their in_chans and patch_size"
        )
    return state_dict


def _create(name: str, pretrained: bool, kwargs: dict, sizes: tuple[int, int, int, int], options: dict | None = None):
    named = dict(zip(("patch_size", "embed_dim", "depth", "num_heads"), sizes, strict=True))
    arguments = named | (options or {}) | rename_arguments(kwargs, _TO_TIMM)
    if "dim_head" not in arguments:
        arguments["dim_head"] = head_width(arguments["embed_dim"], arguments["num_heads"])
    if arguments.get("head_hidden"):
        overlay = arguments.get("pretrained_cfg_overlay") or {}
        arguments["pretrained_cfg_overlay"] = {"classifier": "mlp_head.2"} | overlay
    return build_model_with_cfg(
        CRATE,
        name,
        pretrained,
        pretrained_filter_fn=_weights_for,
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **arguments,
    )


@register_model
def crate_tiny_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """CRATE-T/16 of the released code: 384 wide, 12 layers, 6 heads."""
    return _create("crate_tiny_patch16_224", pretrained, kwargs, (16, 384, 12, 6))


@register_model
def crate_small_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """CRATE-S/16 of the released code: 576 wide, 12 layers, 12 heads."""
    return _create("crate_small_patch16_224", pretrained, kwargs, (16, 576, 12, 12))


@register_model
def crate_base_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """CRATE-B/16 of the released code: 768 wide, 12 layers, 12 heads."""
    return _create("crate_base_patch16_224", pretrained, kwargs, (16, 768, 12, 12))


@register_model
def crate_large_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """CRATE-L/16 of the released code: 1024 wide, 24 layers, 16 heads."""
    return _create("crate_large_patch16_224", pretrained, kwargs, (16, 1024, 24, 16))


@register_model
def crate_tiny_patch8_224(pretrained: bool = False, **kwargs) -> CRATE:
    """CRATE-T/8 of the emergence paper: 192 wide, 12 layers, 3 heads."""
    return _create("crate_tiny_patch8_224", pretrained, kwargs, (8, 192, 12, 3))


@register_model
def crate_small_patch8_224(pretrained: bool = False, **kwargs) -> CRATE:
    """CRATE-S/8 of the emergence paper: 384 wide, 12 layers, 6 heads."""
    return _create("crate_small_patch8_224", pretrained, kwargs, (8, 384, 12, 6))


@register_model
def crate_base_patch8_224(pretrained: bool = False, **kwargs) -> CRATE:
    """CRATE-B/8 of the emergence paper: 768 wide, 12 layers, 12 heads."""
    return _create("crate_base_patch8_224", pretrained, kwargs, (8, 768, 12, 12))


@register_model
def crate_mae_encoder_tiny_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """Return the encoder of CRATE-MAE-T: 384 wide, 12 layers, 6 heads."""
    return _create("crate_mae_encoder_tiny_patch16_224", pretrained, kwargs, (16, 384, 12, 6), ENCODER_OPTIONS)


@register_model
def crate_mae_encoder_small_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """Return the encoder of CRATE-MAE-S: 576 wide, 12 layers, 12 heads."""
    return _create("crate_mae_encoder_small_patch16_224", pretrained, kwargs, (16, 576, 12, 12), ENCODER_OPTIONS)


@register_model
def crate_mae_encoder_base_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """Return the encoder of CRATE-MAE-B: 768 wide, 12 layers, 12 heads."""
    return _create("crate_mae_encoder_base_patch16_224", pretrained, kwargs, (16, 768, 12, 12), ENCODER_OPTIONS)


@register_model
def crate_mae_encoder_large_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """Return the encoder of CRATE-MAE-L: 1024 wide, 24 layers, 16 heads."""
    return _create("crate_mae_encoder_large_patch16_224", pretrained, kwargs, (16, 1024, 24, 16), ENCODER_OPTIONS)


# --- the autoencoders, and every name in one place ---


def is_mae(name: str) -> bool:
    """Return whether a model's name is that of a masked autoencoder."""
    return name.startswith(MAE) and not name.startswith(MAE_ENCODER)


def create_mae(name: str, pretrained: bool = False, checkpoint_path: str = "", **kwargs) -> CRATEMAE:
    """Build a CRATE-MAE by name.

    Args:
        name: "crate_mae_tiny_patch16_224", or small, base or large.
        pretrained: Only False: no weights can be downloaded.
        checkpoint_path: File of weights to load, strictly; none when empty.
        **kwargs: Arguments of `CRATEMAE` that replace the size's.

    Raises:
        UserError: There is no such autoencoder, or it has no such argument.

    >>> create_mae("crate_mae_tiny_patch16_224", depth=1, decoder_depth=1).embed_dim
    384
    """
    if name not in _AUTOENCODERS:
        raise UserError(f"{name!r} is no CRATE-MAE: choose one of {', '.join(_AUTOENCODERS)}")
    if pretrained:
        raise UserError(f"pretrained=True: no weights of {name} can be downloaded; name a file with checkpoint_path")
    if kwargs.pop("features_only", False):
        encoder = MAE_ENCODER + name.removeprefix(MAE)
        raise UserError(f"features_only=True: {name} gives pixels; its features are those of {encoder}")
    absent = {name: kwargs.pop(name) for name in ("num_classes", *_DROP_RATES) if name in kwargs}
    if any(absent.values()):
        raise UserError(
            f"{', '.join(f'{name}={value}' for name, value in absent.items() if value)}: CRATE-MAE has neither "
            "classifier nor dropout; its `encoder(num_classes, drop_rate=…)` may have both"
        )
    model = _AUTOENCODERS[name](**kwargs)
    return load_weights(model, checkpoint_path) if checkpoint_path else model


def model_names() -> list[str]:
    """Return the names that `create_model` takes: timm's, ours among them, and those of the autoencoders."""
    return [*timm.list_models(), *_AUTOENCODERS]


def is_model(name: str) -> bool:
    """Return whether `create_model` takes the name, with its tag if it has one."""
    if name in _AUTOENCODERS:
        return True
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # there is no such tag
        return False
    return timm.is_model(name)


def create_model(name: str, **kwargs) -> nn.Module:
    """Build an autoencoder with `create_mae`, any other model with `timm.create_model`.

    Args:
        name: One of `model_names()`, or one of timm's with a tag.
        **kwargs: The model's arguments.

    Raises:
        UserError: timm's model cannot be built with them.
    """
    if is_mae(name):
        return create_mae(name, **kwargs)
    try:
        return timm.create_model(name, **kwargs)
    except AssertionError as error:  # which timm raises for sizes that do not fit
        raise UserError(f"model={name!r} cannot be built with {kwargs} ({error}): choose sizes that fit") from error
