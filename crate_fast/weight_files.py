"""Read the state dict of a weight file without its wrappers, or explain in one line why the file has none.

Pickled code never runs: `torch.load` is always called with `weights_only=True`.
"""

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
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
# First bytes of gzip, bzip2, xz, zstd and 7z files
_ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c")


# --- the state dict in the contents of a file ---------------------------------------------------------------------


def split_entry(path: str | os.PathLike) -> tuple[Path, str | None]:
    """Split `FILE#ENTRY` into the file and the name of the entry, None if there is none.

    >>> split_entry("weights.pth#state_dict"), split_entry("weights.pth")
    ((PosixPath('weights.pth'), 'state_dict'), (PosixPath('weights.pth'), None))
    """
    file, separator, entry = os.fspath(path).rpartition("#")
    if not separator or not entry or "/" in entry or Path(path).is_file():
        return Path(path), None
    return Path(file), entry


def _inner(content: Mapping, entry: str | None) -> tuple[Mapping, str | None, list[str]]:
    """Find the innermost dictionary; return it, its name, and the names of alternatives at the same level."""
    taken, others, choices = None, [], []
    while True:
        choices += [name for name, value in content.items() if isinstance(value, Mapping)]
        found = [name for name in _ENTRIES if isinstance(content.get(name), Mapping)]
        if entry is not None and isinstance(content.get(entry), Mapping):
            found, entry = [entry], None
        if not found:
            break
        content, taken, others = content[found[0]], found[0], others or found[1:]
    if entry is not None:
        choose = f"choose among {_names(choices)}" if choices else "pass the file without an entry"
        raise UserError(f"there is no dictionary {entry!r} in it: {choose}")
    return content, taken, others


def _names(content: Iterable) -> str:
    names = sorted(map(str, content))
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _strip(name: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def is_wrapped(state_dict: Mapping) -> bool:
    """Return True if `unwrap_state_dict` would remove a wrapper or a prefix, or change the layout."""
    return (
        any(isinstance(state_dict.get(name), Mapping) for name in _ENTRIES)
        or any(str(key).startswith(_PREFIXES) for key in state_dict)
        or _has_demo_head(state_dict)
        or _has_convolution(state_dict)
    )


def _has_demo_head(state_dict: Mapping) -> bool:
    return "mlp_head.0.weight" in state_dict and "head.weight" in state_dict


def _has_convolution(state_dict: Mapping) -> bool:
    """Return True for released weights of CRATE-α, whose patch projection is a convolution."""
    kernel = state_dict.get("conv1.weight")
    return kernel is not None and kernel.dim() == 4 and "pos_embedding" in state_dict


def unwrap_state_dict(content: Mapping, entry: str | None = None) -> dict[str, Tensor]:
    """Return the state dict inside the contents of a checkpoint file.

    At every level, uses the first entry found of `state_dict_ema`, `model_ema`, `ema`, `state_dict` and `model`.
    Removes the prefixes `module.` (DataParallel, DDP) and `_orig_mod.` (`torch.compile`) from the keys.
    Renames the classifier `head` of the emergence paper's demo checkpoint to `mlp_head.2`, and converts CRATE-α's
    convolution `conv1` [C, channels, height, width] to the projection `to_patch_embedding.2` of flat patches.

    Args:
        content: Result of `torch.load`.
        entry: Name of the dictionary to use instead.

    Returns:
        Parameter name → tensor; PyTorch's `_metadata`, which records the grid of positions, is kept.

    Raises:
        UserError: There is no state dict, or two keys are equal without their prefixes.

    >>> dict(unwrap_state_dict({"state_dict": {"module.cls_token": torch.zeros(1)}}))
    {'cls_token': tensor([0.])}
    """
    if not isinstance(content, Mapping):
        raise UserError(f"no state dict found: it holds a {type(content).__name__}; {_STATE_DICT}")
    content, _, _ = _inner(content, entry)
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        inner = [name for name, value in content.items() if isinstance(value, Mapping) and value]
        remedy = f"name the entry to use, as in FILE#{inner[0]}" if inner else _STATE_DICT
        held = f"the keys {_names(content)}" if content else "nothing"
        raise UserError(f"no state dict found: it holds {held}; {remedy}")
    for key, value in tensors.items():
        kind = _unsupported_kind(value)
        if kind:
            raise UserError(f"{key} is {kind}, not a dense tensor of numbers: save the state dict of the plain model")
    stripped = OrderedDict()
    for key, value in tensors.items():
        name = _strip(key)
        if name in stripped:
            raise UserError(f"the keys {name!r} and {key!r} name one parameter: remove one of them")
        stripped[name] = value
    if _has_demo_head(stripped):
        for kind in ("weight", "bias"):
            if f"head.{kind}" in stripped:
                stripped[f"mlp_head.2.{kind}"] = stripped.pop(f"head.{kind}")
    if _has_convolution(stripped):
        kernel = stripped.pop("conv1.weight")
        stripped["to_patch_embedding.2.weight"] = kernel.permute(0, 2, 3, 1).flatten(1)
        if "conv1.bias" in stripped:
            stripped["to_patch_embedding.2.bias"] = stripped.pop("conv1.bias")
    metadata = getattr(content, "_metadata", {})
    stripped._metadata = OrderedDict((_strip(f"{key}.")[:-1], value) for key, value in metadata.items())
    return stripped


def _unsupported_kind(tensor: Tensor) -> str:
    """Describe a tensor that is not a dense array of real numbers; return "" for one that is."""
    if tensor.is_meta:
        return "a meta tensor without values"
    if tensor.layout != torch.strided:
        return "sparse"
    return "quantized" if tensor.is_quantized else "complex" if tensor.is_complex() else ""


# --- files ----------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | os.PathLike, entry: str | None = None) -> dict[str, Tensor]:
    """Read the state dict of a `.safetensors` or `torch.save` file, unwrapped, on the CPU, without running code.

    If the file has both weights and their moving average, the average is used, as in timm, with a warning.

    Args:
        path: The file, or `FILE#ENTRY`.
        entry: Dictionary to use from the file, such as "state_dict" instead of "state_dict_ema".

    Raises:
        UserError: The file does not exist, is damaged or has other contents; the message includes a remedy.
    """
    path, named = split_entry(path)
    entry = entry or named
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
        if entry is None and isinstance(content, Mapping):
            _, taken, others = _inner(content, None)
            if others:
                warnings.warn(
                    f"{path} holds {' and '.join((taken, *others))}: using {taken}; for the other one pass "
                    f"{path}#{others[0]}",
                    stacklevel=2,
                )
        return unwrap_state_dict(content, entry)
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
        return "filled with zeros" if head else "empty", _FETCH
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer instead of the weights", "fetch them with `git lfs pull`"
    if head.startswith(_ARCHIVES) or head[257:262] == b"ustar":
        return "an archive", "unpack it with `tar -xf` or another program, and pass the file inside"
    of_safetensors = path.suffix == ".safetensors"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**8:  # header length, then the header
        return None if of_safetensors else ("a safetensors file", "rename it to end in .safetensors")
    if head.startswith(b"PK\x03\x04"):
        kind = _describe_zip(path)
    elif head.startswith(b"\x80"):
        what = "a Python pickle that torch.save did not write, and reading it could run code"
        kind = None if _TORCH_MAGIC in head[:64] else (what, _STATE_DICT)
    else:
        kind = _describe_text(head)
    if kind is None and of_safetensors:
        return "a torch.save file, not safetensors", "rename it to end in .pth"
    return kind


def _describe_zip(path: Path) -> tuple[str, str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError) as error:
        return f"damaged or truncated ({error})", f"its download may be incomplete: {_FETCH}"
    if "constants.pkl" in names:
        return "a TorchScript program, not a state dict", (
            f"save its state dict where it was made: torch.save(torch.jit.load({path.name!r}).state_dict(), "
            "'weights.pth')"
        )
    if "data.pkl" in names:
        return None
    if "archive_format" in names or "archive_version" in names:
        return "a torch.export program, not a state dict", "pass the weights that it was exported from"
    return "a zip archive that torch.save did not write", "unpack it, and pass the file inside"


def _describe_text(head: bytes) -> tuple[str, str]:
    text = head.decode("utf-8-sig", errors="ignore").strip()  # the first bytes may end within a character
    if re.search(r"<(!doctype html|html|head|body|title|script)\b", text[:1024], re.IGNORECASE):
        return "an HTML page", "download the file itself (its raw or `resolve` link, perhaps after logging in)"
    if text and all(letter.isprintable() or letter in "\t\r\n\f" for letter in text):
        shown = text.splitlines()[0][:40]
        return f"a text file (it begins with {shown!r})", "download the weight file itself, or pass its path"
    first = " ".join(f"{byte:02x}" for byte in head[:8])
    return f"neither a safetensors nor a torch.save file (it begins with the bytes {first})", _FETCH


def _why_unreadable(error: Exception) -> str:
    """Return one line on why `torch.load` or safetensors could not read a file, with a remedy."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror}): check its permissions and its disk"
    # PyTorch's message recommends weights_only=False, so only its reason is used
    text = str(error)
    reason = text.partition("WeightsUnpickler error:")[2] or text
    reason = " ".join(reason.strip().partition("\n")[0].split())[:200]
    reason = type(error).__name__ if not reason or "weights_only" in reason else reason
    name = re.search(r"GLOBAL ([\w.]+)", text)
    code = name or re.search(r"GLOBAL|unsupported class|only build|reduce", reason)
    if isinstance(error, pickle.UnpicklingError) and code:
        what = f" ({name[1]})" if name else ""
        return f"holds more than tensors and plain values{what}, and reading it could run code: {_STATE_DICT}"
    if reason == "Unsupported operand 149":
        return f"is pickled with protocol 4 or later, which is not supported: {_STATE_DICT}"
    return f"is damaged or truncated ({reason}): {_FETCH}"
