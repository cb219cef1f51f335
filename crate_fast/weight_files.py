"""Read the state dict of a weight file without its wrappers, or explain in one line why the file has none.

Pickled code never runs: `torch.load` is always called with `weights_only=True`.
"""

import argparse
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from crate_fast.errors import UserError

_ENTRIES = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")  # averages first, as in timm
_PREFIXES = ("module.", "_orig_mod.")  # added by DataParallel and DDP, and by torch.compile
_TORCH_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # near the start of files in torch.save's older format
_FETCH = "download it again, or use another file"
_STATE_DICT = "save only its state dict where it was made, with torch.save or as safetensors"


# --- the state dict in the contents of a file ---------------------------------------------------------------------


def unwrap_state_dict(content: Mapping) -> dict[str, Tensor]:
    """Return the state dict inside the contents of a checkpoint file.

    At every level, uses the first entry found of `state_dict_ema`, `model_ema`, `ema`, `state_dict` and `model`, with
    a warning if weights and their moving average are there. Removes the prefixes `module.` (DataParallel, DDP) and
    `_orig_mod.` (`torch.compile`) from the keys, and renames released parameters (`rename_released`).

    Args:
        content: Result of `torch.load`.

    Returns:
        Parameter name → tensor.

    Raises:
        UserError: There is no state dict, or two keys are equal without their prefixes.

    >>> unwrap_state_dict({"state_dict": {"module.cls_token": torch.zeros(1)}})
    {'cls_token': tensor([0.])}
    """
    if not isinstance(content, Mapping):
        raise UserError(f"no state dict found: it holds a {type(content).__name__}; {_STATE_DICT}")
    while found := [name for name in _ENTRIES if isinstance(content.get(name), Mapping)]:
        if len(found) > 1:
            both = " and ".join(found)
            warnings.warn(f"the weights hold {both}: using {found[0]}; to use another, save it alone", stacklevel=3)
        content = content[found[0]]
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        names = sorted(map(str, content))
        held = f"the keys {', '.join(names[:8])}" + ", …" * (len(names) > 8) if names else "nothing"
        raise UserError(f"no state dict found: it holds {held}; {_STATE_DICT}")
    stripped = {}
    for key, value in tensors.items():
        if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"{key} is not a dense tensor of real numbers: save the state dict of the plain model")
        name = key
        while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""):
            name = name.removeprefix(prefix)
        if name in stripped:
            raise UserError(f"the keys {name!r} and {key!r} name one parameter: remove one of them")
        stripped[name] = value
    return rename_released(stripped)


def rename_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the parameter names of `CRATE`; `state_dict` itself if it has them.

    Renames the classifier `head` of the emergence paper's demo checkpoint to `mlp_head.2`, and converts the
    convolution `conv1` [C, channels, height, width] of released CRATE-α weights to the projection
    `to_patch_embedding.2` of flat patches.
    """
    names = {}
    if "mlp_head.0.weight" in state_dict and "head.weight" in state_dict:
        names = {"head.weight": "mlp_head.2.weight", "head.bias": "mlp_head.2.bias"}
    kernel = state_dict.get("conv1.weight")
    if kernel is not None and kernel.dim() == 4 and "pos_embedding" in state_dict:
        names |= {"conv1.weight": "to_patch_embedding.2.weight", "conv1.bias": "to_patch_embedding.2.bias"}
        state_dict = state_dict | {"conv1.weight": kernel.permute(0, 2, 3, 1).flatten(1)}
    return {names.get(key, key): value for key, value in state_dict.items()} if names else state_dict


# --- files ----------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the state dict of a `.safetensors` or `torch.save` file, unwrapped, on the CPU, without running code.

    Raises:
        UserError: The file does not exist, is damaged or has other contents; the message includes a remedy.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: pass the weight file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; check the path")
    if found := describe_file(path):
        raise UserError(f"{path} is {found[0]}: {found[1]}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:  # many published files have training arguments in a Namespace, which is harmless (as in timm)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the readers raise many types on damaged files
        raise UserError(f"{path} {_why_unreadable(error)}") from error
    try:
        return unwrap_state_dict(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def describe_file(path: Path) -> tuple[str, str] | None:
    """Return what a file without weights or with a wrong suffix is, and the remedy; None if it may hold weights.

    The check reads the first bytes of the file, and the names in a zip archive.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions and its disk") from error
    if not head.strip(b"\x00"):
        return "empty or filled with zeros", _FETCH
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer instead of the weights", "fetch them with `git lfs pull`"
    of_safetensors = path.suffix == ".safetensors"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**8:  # header length, then the header
        return None if of_safetensors else ("a safetensors file", "rename it to end in .safetensors")
    kind = None
    if head.startswith(b"PK\x03\x04"):
        kind = _describe_zip(path)
    elif not head.startswith(b"\x80"):  # not a pickle
        kind = f"not a weight file (it begins with {head[:24]!r})", "download the weight file, or unpack the archive"
    elif _TORCH_MAGIC not in head[:64]:
        kind = "a Python pickle that torch.save did not write, and reading it could run code", _STATE_DICT
    if kind is None and of_safetensors:
        return "a torch.save file, not safetensors", "rename it to end in .pth"
    return kind


def _describe_zip(path: Path) -> tuple[str, str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError) as error:
        return f"damaged or truncated ({error})", f"its download may be incomplete: {_FETCH}"
    if "data.pkl" in names and "constants.pkl" not in names:
        return None
    what = "an archive or a program (TorchScript or torch.export), not a state dict"
    return what, f"pass the file inside, or {_STATE_DICT}"


def _why_unreadable(error: Exception) -> str:
    """Return one line on why `torch.load` or safetensors could not read a file, with a remedy."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror}): check its permissions and its disk"
    # PyTorch's message recommends weights_only=False, so only its reason is used
    text = str(error)
    reason = " ".join((text.partition("WeightsUnpickler error:")[2] or text).strip().partition("\n")[0].split())
    if code := re.search(r"GLOBAL ([\w.]+)", text):
        return f"holds more than tensors ({code[1]}), and reading it could run code: {_STATE_DICT}"
    reason = type(error).__name__ if not reason or re.search("weights_only|trust", reason) else reason[:200]
    return f"is damaged, truncated or not a plain state dict ({reason}): {_FETCH}, or {_STATE_DICT}"
