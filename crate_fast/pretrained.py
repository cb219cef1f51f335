"""Load models with weights: the models of the package, folders that were shared, and the Hugging Face Hub.

    model = crate_fast.load_pretrained("photographs")           # part of the package
    model = crate_fast.load_pretrained("FOLDER")                # written by `crate-fast share RUN FOLDER`
    model = crate_fast.load_pretrained("hf-hub:USER/NAME")      # uploaded by the same command
    model.pretrained_cfg["mean"], model.pretrained_cfg["label_names"]

A folder holds config.json and model.safetensors. `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

The models of the package are the first seed of two experiments, in half precision, for inspection rather than
comparison. `photographs` and `photographs-ViT` were trained on 50,000 labelled photographs of 64 px, with positions
interpolated to 128 px (docs/emergence/photographs/protocol.md); `CRATE` and `ViT` on shape_scenes
(docs/emergence/earlier/first/report.md).
"""

import json
from pathlib import Path

from torch import nn

from crate_fast.checkpoints import load_strictly, read_state_dict
from crate_fast.errors import UserError
from crate_fast.registry import create_model

FOLDER = Path(__file__).parent / "weights"
HUB = "hf-hub:"


def packaged_models() -> list[str]:
    """Return the names of the models in the package, those trained on photographs first.

    >>> packaged_models()
    ['photographs', 'photographs-ViT', 'CRATE', 'ViT']
    """
    names = (path.parent.name for path in FOLDER.glob("*/config.json"))
    return sorted(names, key=lambda name: (not name.startswith("photographs"), name))


def is_model_folder(path: str | Path) -> bool:
    """Return True for a folder that `crate-fast share` wrote."""
    return (Path(path) / "config.json").is_file()


def _folder_of(name: str) -> Path:
    folder = FOLDER / name if name in packaged_models() and not is_model_folder(name) else Path(name)
    if not is_model_folder(folder):
        raise UserError(
            f"{name!r} is not a model with weights: pass one of {', '.join(packaged_models())}, a folder of "
            f"`crate-fast share`, or {HUB}USER/NAME"
        )
    return folder


def record(name: str) -> dict:
    """Return timm's `pretrained_cfg` of a model of the package or in a folder; "label_names" may be missing."""
    config = json.loads((_folder_of(name) / "config.json").read_text())
    return config.get("pretrained_cfg", config)


def load_pretrained(name: str | Path, *, weights: bool = True) -> nn.Module:
    """Return a model with its weights in fp32, in evaluation mode.

    Args:
        name: A folder, one of `packaged_models()`, or hf-hub:USER/NAME; see the module docstring.
        weights: False for the same model with random weights.

    Raises:
        UserError: There is no such model, it cannot be fetched, or its files are damaged.
    """
    name = str(name)
    if name.startswith(HUB):
        if name.count("/") != 1:
            raise UserError(f"{name!r} is not a name on the Hub: pass {HUB}USER/NAME")
        try:
            return create_model(name, pretrained=weights).eval()
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{name}: {reason}; try again with a network, or pass a folder") from error
    folder = _folder_of(name)
    try:
        model = create_model(f"local-dir:{folder}").eval()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}/config.json is not valid ({error!r}): write the folder again") from error
    if not weights:
        return model
    values = {key: value.float() for key, value in read_state_dict(folder / "model.safetensors").items()}
    return load_strictly(model, values, str(folder), "write the folder again, or install the package again")
