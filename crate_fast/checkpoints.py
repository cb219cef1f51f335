"""State dicts of the released code, in and out; weights as safetensors or as a `torch.save` file.

The model's own parameter names are the released ones, so there is nothing to rename: only wrappers to take off.
"""

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crate_fast.errors import UserError
from crate_fast.mae import CRATEMAE
from crate_fast.model import CRATE, resample_positions

__all__ = ["adapt_state_dict", "load_weights", "read_state_dict", "released_state_dict", "unwrap_state_dict"]

_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def unwrap_state_dict(content: dict) -> dict[str, Tensor]:
    """The state dict inside what a checkpoint file held.

    Takes it from under `state_dict` or `model`, and takes `module.` (DataParallel, DDP) and `_orig_mod.`
    (`torch.compile`) off the keys.

    Args:
        content: What `torch.load` returned.

    Returns:
        Parameter name → tensor.

    Raises:
        UserError: There is no state dict in it, or two keys become one without their prefixes.

    >>> unwrap_state_dict({"state_dict": {"module.cls_token": torch.zeros(1)}})
    {'cls_token': tensor([0.])}
    """
    if not isinstance(content, dict):
        raise UserError(f"no state dict found: the file holds a {type(content).__name__}")
    while True:
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"no state dict found: the file holds the keys {sorted(map(str, content))[:8]}")
    stripped = {}
    for key, value in tensors.items():
        name = key
        while name.startswith(_PREFIXES):
            name = name[len(next(p for p in _PREFIXES if name.startswith(p))) :]
        if name in stripped:
            raise UserError(f"the keys {name!r} and {key!r} name one parameter: keep one of the two")
        stripped[name] = value
    return stripped


def adapt_state_dict(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """`unwrap_state_dict`, and positions of another (square) grid resampled to the model's own.

    The filter that timm applies to pretrained weights. Heads are never touched: another number of classes stays an
    error of `load_state_dict`.
    """
    state_dict = unwrap_state_dict(state_dict)
    positions = state_dict.get("pos_embedding")
    if positions is not None and positions.shape != model.pos_embedding.shape:
        side = round((positions.shape[1] - 1) ** 0.5)
        if side * side != positions.shape[1] - 1 or positions.shape[2] != model.embed_dim:
            raise UserError(
                f"pos_embedding {tuple(positions.shape)} cannot be resampled to {tuple(model.pos_embedding.shape)}: "
                "it must be of a square grid and of the model's width"
            )
        state_dict = state_dict | {"pos_embedding": resample_positions(positions, (side, side), model.native_grid)}
    return state_dict


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` or a `torch.save` file, unwrapped, on the CPU. Never runs pickled code.

    Raises:
        UserError: There is no such file.
        UserError: The file is damaged, or holds something other than tensors; the message says what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return unwrap_state_dict(load_file(path))
        return unwrap_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        what = str(error) or type(error).__name__
        raise UserError(f"{path} is damaged or cut short ({what}): fetch it again, or use another one") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, and is not loaded, since that could run code. If you "
            "trust it, load it yourself, save its state dict alone with torch.save, and use that file."
        ) from error


def load_weights(model: nn.Module, path: str | os.PathLike, *, resample: bool = False) -> nn.Module:
    """Load a file's weights into `model`, strictly.

    Args:
        model: A CRATE of the file's architecture.
        path: A released checkpoint, one of ours, or any file `read_state_dict` takes.
        resample: Resample the positions of another image size to the model's.

    Returns:
        The model.

    Raises:
        UserError: See `read_state_dict`.
        RuntimeError: Keys or shapes differ; the message lists them.
    """
    state_dict = read_state_dict(path)
    if resample:
        state_dict = adapt_state_dict(state_dict, model)
    model.load_state_dict(state_dict, strict=True)
    return model


def _unreleased(model: CRATE) -> str:
    """What the released CRATE does not have."""
    layer = model.transformer.layers[0]
    kinds = [type(part.fn).__name__ for part in layer]
    if kinds != ["MSSA", "ISTA"] or layer.residual != "released" or layer[1].fn.threshold != "relu":
        return f"layers {kinds}, residual={layer.residual!r}"
    if layer[1].fn.lambd != 0.1:
        return f"sparsity={layer[1].fn.lambd}"
    return "" if model.embed_norm else "embed_norm=False"


def _unreleased_mae(model: CRATEMAE) -> str:
    """What the released CRATE-MAE does not have."""
    sparsify = model.blocks[0].layers[0][1].fn
    if model.visible_only or sparsify.lambd != 0.5 or sparsify.step_size != 0.1:
        return f"visible_only={model.visible_only}, sparsity={sparsify.lambd}, ista={sparsify.step_size}"
    square = model.image_size[0] == model.image_size[1] and model.patch_size[0] == model.patch_size[1]
    return "" if square and model.channels == 3 else f"images {model.image_size} of {model.channels} channels"


def released_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under the released code's keys, detached, on the CPU: what its `load_state_dict` takes.

    Raises:
        UserError: The model is one that the released code cannot build (an ablation or another residual form).
    """
    difference = _unreleased_mae(model) if isinstance(model, CRATEMAE) else _unreleased(model)
    if difference:
        raise UserError(
            f"the released code has no such model ({difference}): its weights would not load there, or would give "
            "other outputs. Save model.state_dict() for use with crate_fast."
        )
    return {name: tensor.detach().cpu() for name, tensor in unwrap_state_dict(model.state_dict()).items()}
