"""timm's registry: every size of both papers under `timm.create_model`.

Patch-16 names are the released repository's sizes (ImageNet-1k), patch-8 names the emergence paper's (ImageNet-21k,
21,842 classes), whose T and S are ViT-wide. No weights can be downloaded: `pretrained=True` is timm's error.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from crate_fast.checkpoints import adapt_state_dict
from crate_fast.model import CRATE

__all__ = [
    "crate_base_patch8_224",
    "crate_base_patch16_224",
    "crate_large_patch16_224",
    "crate_small_patch8_224",
    "crate_small_patch16_224",
    "crate_tiny_patch8_224",
    "crate_tiny_patch16_224",
]


def _cfg(num_classes: int) -> dict:
    return {
        "num_classes": num_classes,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "mlp_head.1",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {name: _cfg(21842 if "patch8" in name else 1000) for name in __all__},
)


def _build(img_size, in_chans: int = 3, global_pool: str = "cls", drop_rate: float = 0.0, **kwargs) -> CRATE:
    """CRATE under timm's argument names."""
    pool = {"token": "cls", "avg": "mean"}.get(global_pool, global_pool)
    return CRATE(image_size=img_size, channels=in_chans, pool=pool, dropout=drop_rate, **kwargs)


def _create(variant: str, pretrained: bool, sizes: dict, kwargs: dict) -> CRATE:
    if {"dim", "heads"} & kwargs.keys():
        kwargs.setdefault("dim_head", kwargs.get("dim", sizes["dim"]) // kwargs.get("heads", sizes["heads"]))
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        _build,
        variant,
        pretrained,
        pretrained_filter_fn=adapt_state_dict,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **(sizes | kwargs),
    )


@register_model
def crate_tiny_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """Released CRATE-T: 384 wide, 12 layers, 6 heads."""
    sizes = {"patch_size": 16, "dim": 384, "depth": 12, "heads": 6, "dim_head": 64}
    return _create("crate_tiny_patch16_224", pretrained, sizes, kwargs)


@register_model
def crate_small_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """Released CRATE-S: 576 wide, 12 layers, 12 heads of 48."""
    sizes = {"patch_size": 16, "dim": 576, "depth": 12, "heads": 12, "dim_head": 48}
    return _create("crate_small_patch16_224", pretrained, sizes, kwargs)


@register_model
def crate_base_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """Released CRATE-B: 768 wide, 12 layers, 12 heads."""
    sizes = {"patch_size": 16, "dim": 768, "depth": 12, "heads": 12, "dim_head": 64}
    return _create("crate_base_patch16_224", pretrained, sizes, kwargs)


@register_model
def crate_large_patch16_224(pretrained: bool = False, **kwargs) -> CRATE:
    """Released CRATE-L: 1024 wide, 24 layers, 16 heads."""
    sizes = {"patch_size": 16, "dim": 1024, "depth": 24, "heads": 16, "dim_head": 64}
    return _create("crate_large_patch16_224", pretrained, sizes, kwargs)


@register_model
def crate_tiny_patch8_224(pretrained: bool = False, **kwargs) -> CRATE:
    """The emergence paper's T/8: 192 wide, 12 layers, 3 heads."""
    sizes = {"patch_size": 8, "dim": 192, "depth": 12, "heads": 3, "dim_head": 64}
    return _create("crate_tiny_patch8_224", pretrained, sizes, kwargs)


@register_model
def crate_small_patch8_224(pretrained: bool = False, **kwargs) -> CRATE:
    """The emergence paper's S/8: 384 wide, 12 layers, 6 heads."""
    sizes = {"patch_size": 8, "dim": 384, "depth": 12, "heads": 6, "dim_head": 64}
    return _create("crate_small_patch8_224", pretrained, sizes, kwargs)


@register_model
def crate_base_patch8_224(pretrained: bool = False, **kwargs) -> CRATE:
    """The emergence paper's B/8: 768 wide, 12 layers, 12 heads."""
    sizes = {"patch_size": 8, "dim": 768, "depth": 12, "heads": 12, "dim_head": 64}
    return _create("crate_base_patch8_224", pretrained, sizes, kwargs)
