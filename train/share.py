"""Export a run's best model, with a model card, as a folder for timm and the Hugging Face Hub.

    crate-fast share runs/NAME FOLDER                              # config.json, model.safetensors, README.md
    crate-fast share runs/NAME FOLDER --push USER/NAME             # upload the folder too

    model = crate_fast.load_pretrained("FOLDER")                   # once uploaded, hf-hub:USER/NAME
    model = timm.create_model("local-dir:FOLDER", pretrained=True)     # the same, by timm alone

The card lists data set, settings, accuracy, and attention scores with their baselines, but no paths of this machine.
"""

import argparse
import json
from pathlib import Path

import yaml
from timm.models import save_for_hf

from crate_fast import CRATEMAE
from crate_fast.checkpoints import adapt_state_dict
from crate_fast.errors import UserError
from crate_fast.options import main_of
from crate_fast.registry import create_model
from crate_fast.train import checkpoint
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.transforms import STATISTICS
from crate_fast.train.runs import load_model, model_arguments

_MACHINE_SETTINGS = ("data_dir", "init", "device", "threads", "workers", "download")


def _card(name: str, where: str, facts: dict, results: list[str], config: TrainConfig, license_name: str) -> str:
    changed = {key: value for key, value in vars(config).items() if value != getattr(TrainConfig, key)}
    settings = {key: value for key, value in changed.items() if key not in _MACHINE_SETTINGS}
    command = "finetune --init WEIGHTS" if config.init else "pretrain"
    head = {"library_name": "timm", "license": license_name, "tags": ["image-classification", "timm", "crate"]}
    usage = f'import crate_fast, timm\n\nmodel = timm.create_model("hf-hub:{where}", pretrained=True).eval()'
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name}",
        "Trained with crate_fast, the library of white-box vision transformers (CRATE).\n\n## Model",
        "\n".join(f"* {key}: {value}" for key, value in facts.items()),
        "## Results\n\n" + ("\n".join(f"* {line}" for line in results) or "None recorded."),
        f"## Use\n\n```python\n{usage}\n```\n\n## Training",
        f"As a recipe, for `crate-fast {command} --recipe FILE.yaml`:",
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n",
    ]
    return "\n\n".join(parts)


def _recorded_results(summary: dict, image_size: int) -> list[str]:
    """Return the best checkpoint's accuracy, and the last one's attention scores at the paper's layer, as lines.

    `image_size` is that of the run; a model that is shared for another size has not been measured at it.
    """
    best = summary.get("best_val_accuracy")
    lines = [] if best is None else [f"validation accuracy at {image_size} px: {best:.4f}"]
    for reading, found in summary.get("attention_miou", {}).items():
        score = next(row["best_head"] for row in found["layers"] if row["layer"] == summary["attention_layer"])
        name = "average precision" if reading == "ap" else f"mIoU ({reading})"
        lines.append(
            f"attention and object masks after the last step at {image_size} px, {name}, best head: {score:.3f}; "
            f"mean mask {found['mean_mask']:.3f}"
        )
    return lines


def write_model_folder(
    run: Path,
    folder: Path,
    license_name: str = "other",
    half: bool = False,
    description: str | None = None,
    image_size: int | None = None,
    push: str | None = None,
) -> None:
    """Write a run's best model with its card to `folder`; the arguments are the options of `crate-fast share`.

    Raises:
        UserError: `run` is not a run, timm cannot build its model (a CRATE-MAE, a linear probe), or `folder` already
            holds a model.
    """
    if (folder / "config.json").exists():
        raise UserError(f"{folder} already holds a model: pass another folder")
    model, config, step = load_model(run)
    if isinstance(model, CRATEMAE) or config.frozen:
        kind = "linear probe" if config.frozen else "autoencoder"
        raise UserError(f"{run} is a run of a {kind}, which timm cannot build: share a fine-tuned model")
    arguments = model_arguments(config, model.num_classes)
    if image_size:
        arguments["img_size"] = image_size
        resized = create_model(config.model, **arguments)
        resized.load_state_dict(adapt_state_dict(model.state_dict(), resized))
        model = resized.eval()
    found = checkpoint.manifest(run / "checkpoints", step)
    summary = run / "summary.json"
    results = _recorded_results(json.loads(summary.read_text()), config.image_size) if summary.is_file() else []
    mean, std = STATISTICS[config.mean]
    size = image_size or config.image_size
    ours = {"mean": mean, "std": std, "num_classes": model.num_classes, "license": license_name}
    ours["label_names"] = found["data"]["classes"]
    # of `eval_transform`, instead of the architecture's
    ours |= {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic", "input_size": (3, size, size)}
    ours |= {"test_crop_pct": None, "test_input_size": None, "pool_size": None}
    if description:
        ours["description"] = description
    model.pretrained_cfg = {**model.pretrained_cfg, **ours}
    facts = {"description": description} if description else {}
    facts |= {
        "architecture": config.model,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "images": f"{config.image_size} px" + (f"; positions interpolated to {image_size}" if image_size else ""),
        "data": f"{config.dataset}, {model.num_classes} classes",
        "checkpoint": f"step {step}, commit {found['commit']}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_for_hf(model.half() if half else model, folder, model_args=arguments, safe_serialization=True)
    checkpoint.write_text(
        folder / "README.md", _card(run.name, push or "USER/NAME", facts, results, config, license_name)
    )


def _command(options: argparse.Namespace) -> None:
    if options.private and not options.push:
        raise UserError("--private has no effect without --push: leave it out, or add that")
    look = {
        "push": options.push,
        "half": options.half,
        "description": options.description,
        "image_size": options.image_size,
    }
    write_model_folder(options.run, options.folder, options.license, **look)
    print("written:", *sorted(options.folder.iterdir()), sep="\n  ")
    if options.push:
        from huggingface_hub import HfApi

        try:
            api = HfApi()
            api.create_repo(options.push, private=options.private or None, exist_ok=True)
            print(api.upload_folder(repo_id=options.push, folder_path=options.folder))
        except Exception as error:  # its type depends on the HTTP library of huggingface_hub
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--push {options.push}: {reason}; the folder is written: check the network, log in with "
                f"`hf auth login`, then run `hf upload {options.push} {options.folder}`"
            ) from error


main = main_of("share", _command)
