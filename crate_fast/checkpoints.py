"""Load released state dicts into a model, and convert a model's weights to the released form.

Parameter names are those of the released code. Loading removes wrappers and resamples positions to another grid of
patches; `crate_fast.weight_files` reads the files.
"""

import math
import os
import textwrap

import torch
from timm.layers import resample_abs_pos_embed
from timm.utils import unwrap_model
from torch import Tensor, nn

from crate_fast.errors import UserError
from crate_fast.layers import ODL
from crate_fast.mae import CRATEMAE
from crate_fast.model import CRATE, resample_positions
from crate_fast.weight_files import read_state_dict, unwrap_state_dict


def adapt_state_dict(
    state_dict: dict, model: nn.Module, source_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Unwrap a state dict and resample its positions to the model's grid of patches (`pretrained_filter_fn` of timm).

    As in timm, weights with as many positions as the model keep them, and the positions of others form a square
    grid; `source_grid` names another one. A CRATE-MAE keeps its own positions, because they are computed. Classifiers
    are not changed: `load_state_dict` raises an error for another number of classes.

    Args:
        state_dict: Contents of a file, or a model's `state_dict()`.
        model: A CRATE, a CRATEMAE or a ViT of timm.
        source_grid: Rows and columns of patches of the positions in `state_dict`.

    Raises:
        UserError: The grid is unknown and not square, or does not fit the number of positions, or the width differs.
    """
    state_dict = unwrap_state_dict(state_dict)
    if isinstance(model, CRATEMAE):
        return _with_own_tables(state_dict, model)
    name, target = _positions_of(model)
    positions, own = state_dict.get(name), getattr(model, name, None)
    if positions is None or target is None:
        return state_dict
    if positions.dim() != 3 or len(positions) != 1 or positions.shape[2] != own.shape[2]:
        raise UserError(
            f"{name} {tuple(positions.shape)} cannot be resampled to {tuple(own.shape)}: it must be "
            f"[1, 1 + patches, {own.shape[2]}]; build the model with the width of the weights"
        )
    prefix = own.shape[1] - target[0] * target[1]
    grid = _grid_of(positions.shape[1] - prefix, target, source_grid)
    if grid == target:
        return state_dict
    if isinstance(model, CRATE):
        return state_dict | {name: resample_positions(positions, grid, target)}
    return state_dict | {name: resample_abs_pos_embed(positions, list(target), list(grid), prefix)}


def _grid_of(patches: int, target: tuple[int, int], given: tuple[int, int] | None) -> tuple[int, int]:
    """Return the grid of the weights: the given one, else the model's if it has as many patches, else a square."""
    side = math.isqrt(max(0, patches))
    grid = given or (target if patches == target[0] * target[1] else (side, side))
    rows, columns = grid
    if rows * columns != patches or rows < 1:
        raise UserError(
            f"positions of {patches} patches cannot be resampled as a grid of {rows}×{columns}: pass source_grid, "
            "the rows and columns of patches of the weights, to load_weights in Python"
        )
    return grid


def _positions_of(model: nn.Module) -> tuple[str, tuple[int, int] | None]:
    """Return the name of a model's learned positions and their grid, None if patches have no positions."""
    if isinstance(model, CRATE):
        return "pos_embedding", model.native_grid
    positions = getattr(model, "pos_embed", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    of_patches = grid is not None and isinstance(positions, Tensor) and positions.dim() == 3
    return "pos_embed", tuple(grid) if of_patches and positions.shape[1] >= grid[0] * grid[1] else None


def _with_own_tables(state_dict: dict[str, Tensor], model: CRATEMAE) -> dict[str, Tensor]:
    """Replace finite position tables by the model's, unless they are equal up to rounding, or of another width."""
    tables = {}
    for name in ("pos_embed", "decoder_pos_embed"):  # computed, not learned
        table, own = state_dict.get(name), getattr(model, name).detach()
        if table is None or table.dim() != 3 or table.shape[-1] != own.shape[-1] or not table.isfinite().all():
            continue
        if table.shape != own.shape or not torch.allclose(table.to(own), own, atol=0.02):  # bf16 rounds by 0.004
            tables[name] = own
    return state_dict | tables


def is_demo(state_dict: dict) -> bool:
    """Return True for weights like the emergence paper's demo checkpoint, whose file does not record its 6 heads."""
    hidden = state_dict.get("mlp_head.1.weight")
    return "mlp_head.2.weight" in state_dict and hidden is not None and hidden.shape == (768, 768)


def load_strictly(
    model: nn.Module, state_dict: dict, source: str, remedy: str, name: str = "this model"
) -> nn.Module:
    """Load a state dict whose keys and shapes equal the model's; return the model.

    The messages name the `source` of the weights, the `name` of the model, and a `remedy`.

    Raises:
        UserError: Keys or shapes differ (the message names some of them), or the weights are integers of a quantized
            model, which PyTorch would convert silently.
    """
    for key, own in model.state_dict().items():
        found = state_dict.get(key)
        if found is not None and own.is_floating_point() and not found.is_floating_point():
            raise UserError(
                f"{source} holds {key} as {found.dtype}, as quantized models do, not as {own.dtype}: use the "
                "weights from before quantization"
            )
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        lines = [textwrap.shorten(line, 160, placeholder=" …") for line in str(error).splitlines()[1:]]
        found = "; ".join(line.rstrip(".") for line in lines[:4]) + ("; …" if len(lines) > 4 else "")
        raise UserError(f"{source} does not hold the weights of {name} ({found}): {remedy}") from error
    return model


def load_weights(
    model: nn.Module, path: str | os.PathLike, *, resample: bool = False, source_grid: tuple[int, int] | None = None
) -> nn.Module:
    """Load a file's weights into `model`, strictly.

    Args:
        model: A CRATE of the file's architecture.
        path: A released checkpoint, one of this package, or any file that `read_state_dict` accepts.
        resample: Resample positions of another image size to the model's.
        source_grid: Rows and columns of patches in the file, if they are not square; positions are resampled.

    Returns:
        The model.

    Raises:
        UserError: See `read_state_dict`, `adapt_state_dict` and `load_strictly`.
    """
    state_dict = read_state_dict(path)
    if resample or source_grid is not None:
        try:
            state_dict = adapt_state_dict(state_dict, model, source_grid)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    remedy = "build the model that it was saved from; for another image size use load_weights(…, resample=True)"
    return load_strictly(model, state_dict, os.fspath(path), remedy)


def _unreleased(model: CRATE | CRATEMAE) -> str:
    """List the arguments of a model that have values the released code does not support; "" if there are none."""
    if isinstance(model, CRATEMAE):
        sparsify = model.blocks[0].layers[0][1].fn
        found = {  # the value, then the values in the released code
            "visible_only": (model.visible_only, False),
            "sparsity": (sparsify.lambd, 0.5),
            "ista": (sparsify.step_size, 0.1),
            "image_size": (model.image_size, model.image_size[:1] * 2),
        }
    else:
        layer = model.transformer.layers[0]
        attend, sparsify = layer[0].fn, layer[1].fn
        alpha, mapped = isinstance(sparsify, ODL), isinstance(attend.to_out, nn.Sequential)
        found = {
            "attention": (type(attend).__name__, "MSSA"),
            "sparsifier": (type(sparsify).__name__, "ISTA", "ODL"),
            "residual": (layer.residual, "released"),
            "threshold": (getattr(sparsify, "threshold", "relu"), "relu"),
            "sparsity": (getattr(sparsify, "lambd", 0.1), 0.1),
            "pool": (model.pool, "cls", "cls" if alpha else "mean"),
            "layer_eps": (layer[0].norm.eps, 1e-6 if alpha else 1e-5),
            "norm_eps": (getattr(model.mlp_head[0], "eps", None), 1e-5),
            "num_classes": (model.num_classes, model.num_classes or 1),
            "output_bias": (attend.to_out[0].bias is not None if mapped else not alpha, not alpha),
            "embed_norm": (model.embed_norm, not alpha),
        }
        if alpha:
            found |= {
                "odl_residual": (layer.skips_sparsifier, True),
                "odl_tied": (sparsify.D1 is None, False),
                "odl_steps": (sparsify.steps, 2),
                "odl_ratio": (sparsify.D.shape[1] // sparsify.D.shape[0], 4),
                "ista": (sparsify.step_size, 0.1),
                "head_hidden": (model.head_hidden, False),
            }
    if isinstance(model, CRATEMAE) or alpha:
        found |= {"channels": (model.channels, 3), "patch_size": (model.patch_size, model.patch_size[:1] * 2)}
    return ", ".join(f"{name}={value!r}" for name, (value, *released) in found.items() if value not in released)


def released_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's weights for `load_state_dict` of the released code, detached, on the CPU.

    A classifier with a hidden layer is named as in the emergence paper's demo checkpoint. CRATE-α's patch projection
    becomes a convolution.

    Raises:
        UserError: The released code cannot build the model (an ablation or another residual form).
    """
    model = unwrap_model(model)
    if different := _unreleased(model):
        raise UserError(
            f"the released code has no such model ({different}): its weights would not load there, or would give "
            "other outputs. Save model.state_dict() for use with crate_fast."
        )
    state_dict = unwrap_state_dict(model.state_dict())
    for name in list(state_dict):
        state_dict[name.replace("mlp_head.2.", "head.")] = state_dict.pop(name).detach().cpu()
    if isinstance(model, CRATE) and isinstance(model.transformer.layers[0][1].fn, ODL):
        kernel = state_dict.pop("to_patch_embedding.2.weight").unflatten(1, (*model.patch_size, model.channels))
        state_dict["conv1.weight"] = kernel.permute(0, 3, 1, 2).contiguous()
        state_dict["conv1.bias"] = state_dict.pop("to_patch_embedding.2.bias")
    return state_dict
