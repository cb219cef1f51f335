"""Register all model sizes of the papers and the encoders of CRATE-MAE for `timm.create_model`.

Patch-16 names are the sizes of the released code (ImageNet-1k). Patch-8 names are those of the emergence paper
(ImageNet-21k, 21,842 classes), whose T and S have the widths of ViT. `pretrained=True` downloads released weights of
CRATE-α; for other models timm raises an error. An autoencoder is not a classifier, so only `create_mae` builds it.
"""

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from crate_fast.arguments import TIMM_NAMES, head_width, rename_arguments
from crate_fast.checkpoints import adapt_state_dict, load_weights
from crate_fast.errors import UserError
from crate_fast.mae import CRATEMAE, ENCODER_OPTIONS
from crate_fast.model import ALPHA_OPTIONS, CRATE

MAE, MAE_ENCODER = "crate_mae_", "crate_mae_encoder_"  # prefixes of autoencoders, and of their encoders as CRATE

_ALPHA_HUB = "UCSC-VLAA/CRATE-alpha"
_TO_TIMM = {ours: timms for timms, ours in TIMM_NAMES.items()}


# --- timm's registry ---


def _cfg(patch_size: int, num_classes: int = 1000, **more) -> dict:
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
    } | more


# Name: patch size, width, layers, heads, other arguments
_SIZES = {
    "crate_tiny_patch16_224": (16, 384, 12, 6, {}),
    "crate_small_patch16_224": (16, 576, 12, 12, {}),
    "crate_base_patch16_224": (16, 768, 12, 12, {}),
    "crate_large_patch16_224": (16, 1024, 24, 16, {}),
    "crate_tiny_patch8_224": (8, 192, 12, 3, {}),
    "crate_small_patch8_224": (8, 384, 12, 6, {}),
    "crate_base_patch8_224": (8, 768, 12, 12, {}),
    "crate_mae_encoder_tiny_patch16_224": (16, 384, 12, 6, ENCODER_OPTIONS),
    "crate_mae_encoder_small_patch16_224": (16, 576, 12, 12, ENCODER_OPTIONS),
    "crate_mae_encoder_base_patch16_224": (16, 768, 12, 12, ENCODER_OPTIONS),
    "crate_mae_encoder_large_patch16_224": (16, 1024, 24, 16, ENCODER_OPTIONS),
    **{f"crate_alpha_base_patch{patch}_224": (patch, 768, 12, 12, ALPHA_OPTIONS) for patch in (32, 16, 14, 8)},
    **{f"crate_alpha_large_patch{patch}_224": (patch, 1024, 24, 16, ALPHA_OPTIONS) for patch in (32, 16, 14, 8)},
}
_AUTOENCODERS = {  # as their encoders
    name.replace(MAE_ENCODER, MAE): sizes[1:4] for name, sizes in _SIZES.items() if name.startswith(MAE_ENCODER)
}
_EMERGENCE = {f"crate_{size}_patch8_224" for size in ("tiny", "small", "base")}
_RELEASED = {f"crate_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
# Released weights of CRATE-α: name and tag, file
_ALPHA_FILES = {
    "crate_alpha_base_patch32_224.in21k": "in21k_Pretrain/crate_alpha_B32_in21k.pth",
    "crate_alpha_base_patch16_224.in21k_ft_in1k": "crate_alpha_B16.pth",
    "crate_alpha_base_patch16_224.in21k": "in21k_Pretrain/crate_alpha_B16_IN21K",
    "crate_alpha_base_patch8_224.in21k": "in21k_Pretrain/crate_alpha_B8_IN21K",
    "crate_alpha_large_patch32_224.in21k": "in21k_Pretrain/crate_alpha_L32_in21k.pth",
    "crate_alpha_large_patch14_224.in21k_ft_in1k": "crate_alpha_L14.pth",
    "crate_alpha_large_patch14_224.in21k": "in21k_Pretrain/crate_alpha_L14_IN21K",
    "crate_alpha_large_patch8_224.in21k": "in21k_Pretrain/crate_alpha_L8_IN21K",
}


def _cfgs() -> dict[str, dict]:
    released = {name.partition(".")[0] for name in _ALPHA_FILES}
    others = [name for name in _SIZES if name not in released]
    cfgs = {name: _cfg(_SIZES[name][0], 21_842 if name in _EMERGENCE else 1000) for name in others}
    for name in _RELEASED:  # the released code resizes to 256 and crops 224, bilinearly
        cfgs[name] |= {"crop_pct": 0.875, "interpolation": "bilinear"}
    for name, file in _ALPHA_FILES.items():
        more = {"num_classes": 19_167} if name.endswith(".in21k") else {}
        more |= {"hf_hub_id": _ALPHA_HUB, "hf_hub_filename": f"torch/{file}", "license": "apache-2.0"}
        cfgs[name] = _cfg(_SIZES[name.partition(".")[0]][0], interpolation="bilinear", **more)
    return cfgs


default_cfgs = generate_default_cfgs(_cfgs())


def _weights_for(state_dict: dict, model: CRATE) -> dict[str, Tensor]:
    """Adapt the weights of a file to the model (`pretrained_filter_fn` of timm)."""
    state_dict = adapt_state_dict(state_dict, model)
    kernel = state_dict.get("to_patch_embedding.2.weight")
    own = model.to_patch_embedding[2].in_features
    if kernel is not None and kernel.shape[1] != own:  # timm would treat it as the kernel of a convolution
        raise UserError(
            f"the weights are for patches of {kernel.shape[1]} values and the model has {own}: build the model with "
            "the in_chans and patch_size of the weights"
        )
    return state_dict


def _create(name: str, pretrained: bool, kwargs: dict, sizes: list[int], options: dict) -> CRATE:
    named = dict(zip(("patch_size", "embed_dim", "depth", "num_heads"), sizes, strict=True))
    arguments = named | options | rename_arguments(kwargs, _TO_TIMM)
    if "dim_head" not in arguments:
        arguments["dim_head"] = head_width(arguments["embed_dim"], arguments["num_heads"])
    if arguments.get("head_hidden"):
        overlay = arguments.get("pretrained_cfg_overlay") or {}
        arguments["pretrained_cfg_overlay"] = {"classifier": "mlp_head.2"} | overlay
    try:
        return build_model_with_cfg(
            CRATE,
            name,
            pretrained,
            pretrained_filter_fn=_weights_for,
            feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
            **arguments,
        )
    except OSError as error:  # no network
        if not pretrained or isinstance(arguments.get("pretrained_cfg"), dict):  # a folder or Hub: `load_pretrained`
            raise
        raise UserError(
            f"pretrained=True: cannot download the weights of {name} ({type(error).__name__}): try again with a "
            f"network, or download a file from https://huggingface.co/{_ALPHA_HUB}/tree/main/torch and pass it as "
            "checkpoint_path"
        ) from error


def _register(name: str) -> None:
    *sizes, options = _SIZES[name]

    def entrypoint(pretrained: bool = False, **kwargs) -> CRATE:
        return _create(name, pretrained, kwargs, sizes, options)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = (
        f"Build a CRATE with patches of {sizes[0]}, width {sizes[1]}, {sizes[2]} layers, {sizes[3]} heads."
    )
    globals()[name] = register_model(entrypoint)


for _name in _SIZES:
    _register(_name)


# --- the autoencoders, and all names ---


def is_mae(name: str) -> bool:
    """Return True for the name of a masked autoencoder."""
    return name.startswith(MAE) and not name.startswith(MAE_ENCODER)


def create_mae(name: str, pretrained: bool = False, checkpoint_path: str = "", **kwargs) -> CRATEMAE:
    """Build a CRATE-MAE by name.

    Args:
        name: "crate_mae_tiny_patch16_224", or small, base or large.
        pretrained: Must be False: there are no weights to download.
        checkpoint_path: Weight file to load strictly; none if empty.
        **kwargs: Arguments of `CRATEMAE`, which has neither classifier nor dropout; they override those of the size.

    Raises:
        UserError: There is no such autoencoder, or it does not have such an argument.

    >>> create_mae("crate_mae_tiny_patch16_224", depth=1, decoder_depth=1).embed_dim
    384
    """
    if name not in _AUTOENCODERS:
        raise UserError(f"{name!r} is not a CRATE-MAE: choose one of {', '.join(_AUTOENCODERS)}")
    if pretrained:
        raise UserError(f"pretrained=True: no weights of {name} can be downloaded; pass a file as checkpoint_path")
    sizes = dict(zip(("embed_dim", "depth", "num_heads"), _AUTOENCODERS[name], strict=True))
    try:
        model = CRATEMAE(**(sizes | kwargs))
    except TypeError as error:
        raise UserError(
            f"{name}: {error}. Leave it out, or create {MAE_ENCODER}{name.removeprefix(MAE)}, which has a "
            "classifier, dropout and the other forms of a layer"
        ) from error
    return load_weights(model, checkpoint_path) if checkpoint_path else model


def model_names() -> list[str]:
    """Return the names for `create_model`: all of timm's registry, which includes ours, and the autoencoders."""
    return [*timm.list_models(), *_AUTOENCODERS]


def is_model(name: str) -> bool:
    """Return True if `create_model` accepts the name, including its tag if it has one."""
    if name in _AUTOENCODERS:
        return True
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # unknown tag
        return False
    return timm.is_model(name)


def create_model(name: str, **kwargs) -> nn.Module:
    """Build a model by its name: an autoencoder by `create_mae`, any other, also with a tag, by timm."""
    if is_mae(name):
        return create_mae(name, **kwargs)
    try:
        return timm.create_model(name, **kwargs)
    except (AssertionError, ZeroDivisionError) as error:  # timm's errors for sizes that do not fit
        raise UserError(f"model={name!r} cannot be built with {kwargs} ({error}): choose sizes that fit") from error
