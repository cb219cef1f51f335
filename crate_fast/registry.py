"""timm's registry: every size of both papers, CRATE-MAE and its encoders, under `timm.create_model`.

Patch-16 names are the released repository's sizes (ImageNet-1k), patch-8 names the emergence paper's (ImageNet-21k,
21,842 classes), whose T and S are ViT-wide. No weights can be downloaded: `pretrained=True` is timm's error.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from crate_fast.checkpoints import adapt_state_dict
from crate_fast.errors import UserError
from crate_fast.mae import CRATEMAE, ENCODER_OPTIONS
from crate_fast.model import CRATE

MAE, MAE_ENCODER = "crate_mae_", "crate_mae_encoder_"  # in front of a size: an autoencoder; its encoder as a CRATE

_SIZES = {  # name: patch, width, layers, heads
    "crate_tiny_patch16_224": (16, 384, 12, 6),
    "crate_small_patch16_224": (16, 576, 12, 12),
    "crate_base_patch16_224": (16, 768, 12, 12),
    "crate_large_patch16_224": (16, 1024, 24, 16),
    "crate_tiny_patch8_224": (8, 192, 12, 3),
    "crate_small_patch8_224": (8, 384, 12, 6),
    "crate_base_patch8_224": (8, 768, 12, 12),
}
_RELEASED = {name.removeprefix("crate_"): sizes for name, sizes in _SIZES.items() if "patch16" in name}
_SIZES |= {MAE + name: sizes for name, sizes in _RELEASED.items()}
_SIZES |= {MAE_ENCODER + name: sizes for name, sizes in _RELEASED.items()}

__all__ = ["MAE", "MAE_ENCODER", "is_mae", *_SIZES]


def is_mae(name: str) -> bool:
    """Whether a model's name is that of a masked autoencoder."""
    return name.startswith(MAE) and not name.startswith(MAE_ENCODER)


def _cfg(name: str) -> dict:
    classes = 0 if is_mae(name) else 21842 if "patch8" in name else 1000
    return {
        "num_classes": classes,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "decoder_pred" if is_mae(name) else "mlp_head.1",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in _SIZES})


def _build(img_size, in_chans: int = 3, global_pool: str = "cls", drop_rate: float = 0.0, **kwargs) -> CRATE:
    """CRATE under timm's argument names."""
    pool = {"token": "cls", "avg": "mean"}.get(global_pool, global_pool)
    return CRATE(image_size=img_size, channels=in_chans, pool=pool, dropout=drop_rate, **kwargs)


def _build_mae(num_classes: int = 0, drop_rate: float = 0.0, **kwargs) -> CRATEMAE:
    """CRATEMAE under timm's argument names."""
    if num_classes or drop_rate:
        raise UserError(
            f"num_classes={num_classes}, drop_rate={drop_rate}: CRATE-MAE has neither classifier nor dropout; its "
            "`encoder(num_classes, dropout=…)` may have both"
        )
    return CRATEMAE(**kwargs)


def _create(name: str, pretrained: bool, kwargs: dict) -> nn.Module:
    patch_size, dim, depth, heads = _SIZES[name]
    if is_mae(name):
        if kwargs.pop("features_only", False):
            encoder = MAE_ENCODER + name.removeprefix(MAE)
            raise UserError(f"features_only: {name} gives pixels; its features are those of {encoder}")
        sizes = {"patch_size": patch_size, "embed_dim": dim, "depth": depth, "num_heads": heads}
        return build_model_with_cfg(
            _build_mae, name, pretrained, pretrained_filter_fn=adapt_state_dict, **(sizes | kwargs)
        )
    sizes = {"patch_size": patch_size, "dim": dim, "depth": depth, "heads": heads} | kwargs
    sizes.setdefault("dim_head", sizes["dim"] // sizes["heads"])
    if name.startswith(MAE_ENCODER):
        sizes = ENCODER_OPTIONS | sizes
    if sizes.get("head_hidden"):  # what timm drops for another number of classes
        sizes["pretrained_cfg_overlay"] = {
            "classifier": ("mlp_head.1", "mlp_head.2"),
            **(sizes.get("pretrained_cfg_overlay") or {}),
        }
    out_indices = sizes.pop("out_indices", 3)
    return build_model_with_cfg(
        _build,
        name,
        pretrained,
        pretrained_filter_fn=adapt_state_dict,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **sizes,
    )


def _register(name: str):
    patch_size, dim, depth, heads = _SIZES[name]

    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(name, pretrained, kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Patch {patch_size}, {dim} wide, {depth} layers, {heads} heads."
    return register_model(create)


globals().update({name: _register(name) for name in _SIZES})
