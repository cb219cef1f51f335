"""Checks of arguments, and the argument names of the released code and of timm."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from crate_fast.errors import UserError

TIMM_NAMES = {  # timm's name: name in the released code
    "img_size": "image_size",
    "in_chans": "channels",
    "embed_dim": "dim",
    "num_heads": "heads",
    "global_pool": "pool",
    "pos_drop_rate": "emb_dropout",
}
TIMM_POOLS = {"token": "cls"}  # timm's value: ours; "avg" and "" are equal in both


def size_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return the argument `name` as (height, width) in pixels; raise a UserError unless it is one number or two."""
    pair = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UserError(f"{name}={value!r}: give one positive integer, or two as (height, width), in pixels")
    return pair


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a UserError unless the value of the argument `name` is one of the choices."""
    if value not in choices:
        raise UserError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")


def rename_arguments(arguments: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return keyword arguments under one set of names; `names` maps other names to these.

    For these arguments, None counts as absent.

    Raises:
        UserError: An argument is given under both names, with different values.
    """
    renamed, both = {}, {*names, *names.values()}
    for given, value in arguments.items():
        name = names.get(given, given)
        if given in both and value is None:
            continue
        if name in renamed and _plain(renamed[name]) != _plain(value):  # timm's Hub files have both names
            other = next(other for other, own in names.items() if own == name)
            raise UserError(
                f"{name}={arguments[name]!r} and {other}={arguments[other]!r} are the same argument: pass only one"
            )
        renamed[name] = value
    return renamed


def _plain(value: Any) -> Any:
    if isinstance(value, int):
        return (value, value)  # a size in pixels
    return tuple(value) if isinstance(value, list) else TIMM_POOLS.get(value, value)


def takes_timm_names(init: Callable) -> Callable:
    """Make a constructor accept arguments under timm's names too, and numbers of NumPy."""

    @functools.wraps(init)
    def renaming(self, **arguments):
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in arguments.items()}
        init(self, **rename_arguments(plain, TIMM_NAMES))

    return renaming


def head_width(dim: int, heads: int) -> int:
    """Return dim / heads; raise a UserError if `heads` does not divide `dim`."""
    check_positive(dim=dim, heads=heads)
    if dim % heads:
        raise UserError(f"heads={heads} does not divide dim={dim}: choose another number of heads or pass dim_head")
    return dim // heads


def check_rates(**rates: float) -> None:
    """Raise a UserError unless all values are at least 0 and below 1."""
    for name, rate in rates.items():
        if not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise UserError(f"{name}={rate!r}: give a probability of at least 0 and below 1")


def check_not_negative(**values: float) -> None:
    """Raise a UserError unless all values are finite and at least 0."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name}={value}: give a finite number of at least 0")


def check_positive(**sizes: int) -> None:
    """Raise a UserError unless all values are positive integers."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size <= 0:
            raise UserError(f"{name}={size!r}: give a positive integer")


def patch_grid(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of patches; raise a UserError if the patch size does not divide the image size."""
    if image_size[0] % patch_size[0] or image_size[1] % patch_size[1]:
        raise UserError(
            f"image size {image_size} is not a multiple of the patch size {patch_size}: "
            "resize or pad the image, or choose another patch size"
        )
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]
