"""The two small models that come with the package: a CRATE and a ViT of the experiment's first seed.

    subject = open_model("shipped:CRATE")            # 158 k parameters, 128 px, twelve classes of shape_scenes
    python -m crate_fast.eval.shipped RUN FILE       # write such a file from a run of one's own

They are what `crate-fast reproduce emergence --size small` trains (docs/emergence/earlier/first/report.md), in half
precision: to look inside, not to compare. The file is safetensors; what the model is stands in its header.
"""

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from crate_fast.errors import UserError, run_command
from crate_fast.train import checkpoint
from crate_fast.train.runs import load_model, model_arguments

__all__ = ["FOLDER", "main", "open_shipped", "shipped_facts", "shipped_names", "write_shipped"]

FOLDER = Path(__file__).parent / "weights"


def shipped_names() -> list[str]:
    """Of the models that come with the package.

    >>> shipped_names()
    ['CRATE', 'ViT']
    """
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def shipped_facts(name: str) -> dict:
    """What a model of the package is: "name" and "arguments" for timm, "mean" of its images, "classes", "source".

    Args:
        name: Of `shipped_names`.

    Raises:
        UserError: There is no such model.
    """
    if name not in shipped_names():
        raise UserError(f"shipped:{name}: there are shipped:{', shipped:'.join(shipped_names())}")
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["crate_fast"])


def open_shipped(name: str) -> tuple[nn.Module, dict]:
    """A model of the package in fp32, and its `shipped_facts`.

    Raises:
        UserError: There is no such model.
    """
    facts = shipped_facts(name)
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118  (no dictionary)
    model = timm.create_model(facts["name"], **facts["arguments"])
    model.load_state_dict(weights, strict=True)
    return model, facts


def write_shipped(run: Path, path: Path) -> None:
    """Write the best model of a run in half precision.

    Args:
        run: Its folder.
        path: The file, ending in .safetensors.

    Raises:
        UserError: There is no run.
        UserError: An older version wrote it, without the names of the classes.
    """
    model, config, step = load_model(run)
    manifest = checkpoint.manifest(run / "checkpoints", step)
    classes = manifest.get("data", {}).get("classes")
    if not classes:
        raise UserError(f"{run} does not name its classes: train it again, or ship another run")
    facts = {"name": config.model, "arguments": model_arguments(config, len(classes)), "mean": config.mean}
    facts |= {"classes": classes, "source": f"step {step} of a run with commit {manifest['commit']}"}
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, {"crate_fast": json.dumps(facts)})


def main(argv: list[str] | None = None) -> int:
    """`RUN FILE`."""
    parser = argparse.ArgumentParser(description="Write the best model of a run as a file to ship.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("file", type=Path, help="ending in .safetensors")
    options = parser.parse_args(argv)
    return run_command(write_shipped, options.run, options.file)


if __name__ == "__main__":
    sys.exit(main())
