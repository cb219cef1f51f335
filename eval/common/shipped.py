"""The two small models that come with the package: a CRATE and a ViT of the experiment's first seed.

    loaded = open_model("shipped:CRATE")            # 158 k parameters, 128 px, twelve classes of shape_scenes
    python -m crate_fast.eval.common.shipped RUN FILE       # write such a file from a run

`crate-fast reproduce emergence --size small` trained them (docs/emergence/earlier/first/report.md). They are in half
precision, for a look inside, not for comparisons. The file is safetensors; its header describes the model.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from crate_fast.checkpoints import load_strictly, read_state_dict
from crate_fast.errors import CommandParser, UserError, run_command
from crate_fast.registry import create_model
from crate_fast.train import checkpoint
from crate_fast.train.runs import load_model, model_arguments

__all__ = ["FOLDER", "main", "open_shipped", "shipped_facts", "shipped_names", "write_shipped"]

FOLDER = Path(__file__).parents[1] / "weights"


def shipped_names() -> list[str]:
    """Return the names of the models that come with the package.

    >>> shipped_names()
    ['CRATE', 'ViT']
    """
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def _read(name: str) -> tuple[dict[str, Tensor], dict]:
    if name not in shipped_names():
        raise UserError(f"shipped:{name}: there are shipped:{', shipped:'.join(shipped_names())}")
    path = FOLDER / f"{name}.safetensors"
    weights = read_state_dict(path)
    with safe_open(path, "pt") as file:
        facts = (file.metadata() or {}).get("crate_fast")
    if facts is None:
        raise UserError(f"{path} does not say what model it holds: install the package again")
    return weights, json.loads(facts)


def shipped_facts(name: str) -> dict:
    """Return "name" and "arguments" for timm, "mean", "classes" and "source" of a model of the package."""
    return _read(name)[1]


def open_shipped(name: str) -> tuple[nn.Module, dict]:
    """Return a model of the package in fp32, and its `shipped_facts`.

    Raises:
        UserError: There is no such model, or its file is damaged.
    """
    weights, facts = _read(name)
    model = create_model(facts["name"], **facts["arguments"])
    weights = {key: value.float() for key, value in weights.items()}
    return load_strictly(model, weights, f"shipped:{name}", "install the package again"), facts


def write_shipped(run: Path, file: Path) -> None:
    """Write the best model of the run in a folder to a .safetensors file, in half precision."""
    model, config, step = load_model(run)
    manifest = checkpoint.manifest(run / "checkpoints", step)
    classes = manifest.get("data", {}).get("classes")
    if not classes:
        raise UserError(f"{run} does not name its classes: train it again, or ship another run")
    facts = {"name": config.model, "arguments": model_arguments(config, len(classes)), "mean": config.mean}
    facts |= {"classes": classes, "source": f"step {step} of a run with commit {manifest['commit']}"}
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, {"crate_fast": json.dumps(facts)})


def main(argv: list[str] | None = None) -> int:
    """Write the best model of a run into a file; see the module's text."""
    parser = CommandParser(description="Write the best model of a run as a file to ship.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("file", type=Path, help="ending in .safetensors")
    return run_command(lambda: write_shipped(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
