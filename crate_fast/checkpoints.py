"""Load released state dicts into a model, and convert a model's weights to the released form.

Parameter names are those of the released code. Loading removes wrappers and resamples positions to another grid of
patches; `crate_fast.weight_files` reads the files.
"""

import os
import textwrap
import warnings

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from crate_fast.errors import UserError
from crate_fast.layers import ODL
from crate_fast.mae import CRATEMAE, sincos_positions
from crate_fast.model import CRATE, resample_positions
from crate_fast.weight_files import read_state_dict, unwrap_state_dict

_TABLES = ("pos_embed", "decoder_pos_embed")  # positions of CRATE-MAE: computed, not learned


class MismatchError(UserError, RuntimeError):
    """Error for weights of another architecture; a RuntimeError too, as `load_state_dict` raises."""


def _given_or_square(patches: int, given: tuple[int, int] | None, argument: str) -> tuple[int, int]:
    if given is not None:
        rows, columns = given
        if rows * columns != patches or rows < 1:
            raise UserError(
                f"{argument}={rows}×{columns} has {rows * columns} patches and the weights have {patches} positions: "
                "pass the rows and columns of patches of the weights"
            )
        return rows, columns
    side = round(patches**0.5)
    if side * side != patches or not patches:
        raise UserError(
            f"positions cannot be resampled: {patches} patches do not form a square grid, and the weights do not "
            f"record their grid: pass {argument}, its rows and columns"
        )
    return side, side


def _recorded_grid(state_dict: dict, model: CRATE, patches: int) -> tuple[int, int] | None:
    """Return the grid saved with the weights, else that of timm's `pretrained_cfg`; None if neither fits."""
    recorded = getattr(state_dict, "_metadata", {}).get("", {}).get("grid", (0, 0))
    _, *size = getattr(model, "pretrained_cfg", {}).get("input_size") or (0, 0, 0)
    configured = (side // patch for side, patch in zip(size, model.patch_size, strict=True))
    return next((grid for grid in (tuple(recorded), tuple(configured)) if grid[0] * grid[1] == patches), None)


def table_grid(table: Tensor) -> tuple[int, int] | None:
    """Return the grid of a CRATE-MAE's table of sine-cosine positions [1, 1 + N, C]; None if no grid fits."""
    patches, dim = table.shape[1] - 1, table.shape[2]
    for rows in (rows for rows in range(1, patches + 1) if patches % rows == 0 and dim % 4 == 0):
        grid = (rows, patches // rows)
        if torch.allclose(sincos_positions(dim, grid), table.float(), atol=0.02):  # bf16 rounds by up to 0.004
            return grid
    return None


def adapt_state_dict(
    state_dict: dict, model: nn.Module, source_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Unwrap a state dict and resample its positions to the model's grid of patches (`pretrained_filter_fn` of timm).

    Grids are compared, not shapes: 4×4 positions are resampled for a 2×8 model. The grid of the weights is the first
    one known of: `source_grid`; the grid saved by `CRATE.state_dict()`; the `input_size` of timm's `pretrained_cfg`,
    if it has as many patches; a square. A CRATE-MAE keeps its own positions, because they are computed.

    Classifiers are not changed: `load_state_dict` raises an error for another number of classes.

    Args:
        state_dict: Contents of a file, or a model's `state_dict()`.
        model: A CRATE or a CRATEMAE.
        source_grid: Rows and columns of patches of the positions in `state_dict`.

    Raises:
        UserError: The grid is unknown and not square, or does not fit the number of positions, or the width differs.
    """
    return resample_weights(unwrap_state_dict(state_dict), model, source_grid)


def resample_weights(
    state_dict: dict, model: nn.Module, source_grid: tuple[int, int] | None, argument: str = "source_grid"
) -> dict[str, Tensor]:
    """Resample positions as `adapt_state_dict` does, for a state dict without wrappers, and also for a timm ViT.

    `argument` is the name of `source_grid` in messages. Returns `state_dict` itself if its grid is the model's, else
    a new dictionary.
    """
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
    patches = positions.shape[1] - prefix
    if isinstance(model, CRATE):
        source_grid = source_grid or _recorded_grid(state_dict, model, patches)
    grid = _given_or_square(patches, source_grid, argument)
    if grid == target:
        return state_dict
    if source_grid is None and patches == target[0] * target[1]:
        rows, columns = grid
        warnings.warn(
            f"the weights do not record the grid of their {patches} positions: assuming {rows}×{columns}, resampling "
            f"to {target[0]}×{target[1]}; if this is wrong, pass {argument}",
            stacklevel=2,
        )
    if isinstance(model, CRATE):
        return dict(state_dict) | {name: resample_positions(positions, grid, target)}
    return dict(state_dict) | {name: resample_abs_pos_embed(positions, list(target), list(grid), prefix)}


def _positions_of(model: nn.Module) -> tuple[str, tuple[int, int] | None]:
    """Return the name of a model's learned positions and their grid, None if patches have no positions."""
    if isinstance(model, CRATE):
        return "pos_embedding", model.native_grid
    positions = getattr(model, "pos_embed", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    of_patches = grid is not None and isinstance(positions, Tensor) and positions.dim() == 3
    return "pos_embed", tuple(grid) if of_patches and positions.shape[1] >= grid[0] * grid[1] else None


def _with_own_tables(state_dict: dict[str, Tensor], model: CRATEMAE) -> dict[str, Tensor]:
    """Replace position tables of another grid by the model's. A table of another width is kept and fails to load."""
    own = model.state_dict()
    tables = {}
    for name in _TABLES:
        table = state_dict.get(name)
        if table is None or table.dim() != 3 or table.shape[-1] != own[name].shape[-1]:
            continue
        if table.shape != own[name].shape or table_grid(table) not in (None, model.grid_size):
            tables[name] = own[name]
    return dict(state_dict) | tables if tables else state_dict


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
        MismatchError: Keys or shapes differ; the message names some of them in one line.
        UserError: The weights are integers of a quantized model, which PyTorch would convert silently.
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
        raise MismatchError(f"{source} does not hold the weights of {name} ({found}): {remedy}") from error
    return model


def load_weights(
    model: nn.Module, path: str | os.PathLike, *, resample: bool = False, source_grid: tuple[int, int] | None = None
) -> nn.Module:
    """Load a file's weights into `model`, strictly.

    Args:
        model: A CRATE of the file's architecture.
        path: A released checkpoint, one of this package, or any file or `FILE#ENTRY` that `read_state_dict` accepts.
        resample: Resample positions of another image size to the model's.
        source_grid: Rows and columns of patches in the file, if it does not record them and they are not square.

    Returns:
        The model.

    Raises:
        UserError: See `read_state_dict` and `adapt_state_dict`.
        MismatchError: Keys or shapes differ; the message lists some.
    """
    state_dict = read_state_dict(path)
    if resample or source_grid is not None:
        try:
            state_dict = adapt_state_dict(state_dict, model, source_grid)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    remedy = "build the model that it was saved from; if only the image size differs, pass resample=True"
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
    model = getattr(model, "_orig_mod", model)  # unwrap torch.compile
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
