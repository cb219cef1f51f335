"""Reports of a run: layer statistics at each evaluation, and final figures, curves and summary.json."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import Subset
from torchvision.utils import make_grid

from crate_fast import CRATE, CRATEMAE
from crate_fast.eval import coarse_segmentation
from crate_fast.eval.common.features import extractor_for
from crate_fast.eval.common.figures import Curve, Picture, curve_figure, image_grid, image_rows
from crate_fast.eval.common.images import LabelledImages, Sample, SceneImages, readable
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.segmentation import NoObjectsError, scores_table
from crate_fast.train import checkpoint
from crate_fast.train.reconstruction import RATIOS, reconstruction_figure, reconstructions
from crate_fast.whitebox import layer_measures

if TYPE_CHECKING:
    from crate_fast.train.trainer import Trainer

SHOWN_IMAGES, WHITEBOX_IMAGES = 8, 64


# --- at each evaluation


def log_layers(trainer: Trainer, model: nn.Module) -> None:
    """Log R^c and sparsity of every layer and, for a CRATE-MAE, reconstructed images.

    `model` is unsharded. Nothing is logged for models other than CRATE and CRATE-MAE.
    """
    if not isinstance(model, CRATE | CRATEMAE):
        return
    run, images = trainer.run, [sample.image for sample in _shown(trainer, WHITEBOX_IMAGES)]
    if not images:
        return
    images, encoder = torch.stack(images), model.encoder() if isinstance(model, CRATEMAE) else model
    for name, values in layer_measures(encoder, trainer.prepare_images(images)).items():
        means = enumerate(values.mean(dim=0).tolist())
        run.add_scalars(trainer.step, {f"{name}/layer_{layer:02d}": mean for layer, mean in means})
    if isinstance(model, CRATEMAE):
        config = trainer.config
        rows = reconstructions(model, images[:SHOWN_IMAGES], trainer.normalize, [config.mask_ratio], config.seed)
        cells = rows.flatten(0, 1).permute(0, 3, 1, 2)
        run.board.add_image("reconstruction", make_grid(cells, rows.shape[1], pad_value=255), trainer.step)


# --- at the end


def _curve(history: list[dict], name: str, label: str) -> list[Curve]:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [Curve(label, *zip(*points, strict=True))] if points else []


def write_report(trainer: Trainer, model: nn.Module, seconds: float) -> dict:
    """Write the figures and summary.json of a finished run, on rank 0; return the summary.

    `model` is unsharded; if the run keeps an EMA, it has the EMA weights. `seconds` is the duration of this session.
    Its throughput is the median over log intervals.
    """
    run, data = trainer.run, trainer.data
    folder = run.folder
    curves = {
        name: _curve(run.history, name, "training") + _curve(run.history, f"val_{name}", "validation")
        for name in ("loss", "accuracy")
    }
    curve_figure({name: lines for name, lines in curves.items() if lines}, "optimiser step", [folder / "curves.png"])
    objective = trainer.objective
    final = next(entry for entry in reversed(run.history) if "val_loss" in entry)
    summary = {name: value for name, value in final.items() if name.startswith(("val_", "ema_val_"))}
    if "accuracy" in objective.scores:
        summary["chance"] = 1 / len(data.classes)
    best = trainer.best()
    summary |= {
        f"best_val_{objective.scores[0]}": best[trainer.score],
        "best_checkpoint": str(checkpoint.folder_of(run.checkpoints, best["step"])),
        "last_checkpoint": str(checkpoint.folder_of(run.checkpoints, trainer.step)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.step,
        "skipped_steps": trainer.nonfinite.total,
        "unreadable_images": len(trainer.tally.met),
        "seconds_this_session": round(seconds, 1),
    }
    if trainer.speeds:
        on_gpu, count = trainer.device.type == "cuda", trainer.processes.world_size
        summary["throughput"] = {
            "images_per_s_per_device": statistics.median(trainer.speeds) / count,
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "devices": count,
            "precision": {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[trainer.objective.dtype],
        }
    elif (folder / "summary.json").is_file():  # a finished run was resumed: nothing was trained or measured
        summary |= {k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k == "throughput"}
    samples = _shown(trainer)
    if samples and isinstance(model, CRATEMAE):
        _draw_reconstructions(trainer, model, samples)
    if samples and isinstance(model, CRATE | CRATEMAE):
        summary |= _attention_report(trainer, model.encoder() if isinstance(model, CRATEMAE) else model, samples)
    with checkpoint.writing(folder):
        checkpoint.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _shown(trainer: Trainer, count: int = SHOWN_IMAGES) -> list[Sample]:
    """Return up to `count` readable validation images, evenly spaced."""
    return [sample for _, sample in readable(LabelledImages(trainer.data.val, "validation", count))]


def _draw_reconstructions(trainer: Trainer, model: CRATEMAE, samples: list[Sample]) -> None:
    config, titles = trainer.config, [trainer.data.classes[sample.label] for sample in samples]
    images, n_patches = torch.stack([sample.image for sample in samples]), model.grid_size[0] * model.grid_size[1]
    ratios = sorted({config.mask_ratio, *(ratio for ratio in RATIOS if 0 < int(n_patches * (1 - ratio)) < n_patches)})
    path = trainer.run.folder / "reconstruction.png"
    reconstruction_figure(model, images, trainer.normalize, [path], ratios, config.seed, titles)


@torch.inference_mode()
def _attention_report(trainer: Trainer, model: CRATE, samples: list[Sample]) -> dict:
    """Draw CLS attention of every head at two layers, one row per image; score it if there are object masks."""
    config, extract = trainer.config, extractor_for(model)
    loaded = LoadedModel("", model, trainer.normalize, extract, {})
    scenes, titles = None, [trainer.data.classes[sample.label] for sample in samples]
    if config.dataset == "shape_scenes":
        scenes = SceneImages(config.image_size, config.val_samples, config.seed)
        samples = [scenes[sample.key] for sample in samples]  # with masks
    layers = [extract.default_layer, extract.depth - 1]
    features, columns = loaded.features(torch.stack([sample.image for sample in samples]), layers), {}
    for layer in features.layers:
        maps = features.cls_attention(layer).cpu().unflatten(-1, features.grid).numpy()
        columns |= {f"layer {layer}, head {head}": map(Picture, maps[:, head]) for head in range(extract.heads)}
    rows, names = image_rows(samples, columns)
    image_grid(rows, [trainer.run.folder / "attention.png"], row_titles=titles, column_titles=names)
    if scenes is None:
        return {}
    scored = Subset(scenes, range(min(config.segmentation_samples, config.val_samples)))
    try:
        scores = coarse_segmentation.evaluate(loaded, scored, batch_size=min(256, config.batch_size))
    except NoObjectsError as error:  # a finished training must not end in an error
        warnings.warn(f"attention maps are not scored: {error}", stacklevel=2)
        return {}
    return {"attention_layer": extract.default_layer, "attention_miou": scores}


def scores_line(values: dict[str, float], scores: Sequence[str]) -> str:
    """Format an evaluation (an entry of metrics.jsonl) as text."""

    def listed(prefix: str) -> str:
        return ", ".join(f"{name} {values[prefix + name]:.4f}" for name in scores)

    average = f"; EMA weights: {listed('ema_val_')}" if "ema_val_loss" in values else ""
    return f"validation {listed('val_')}{average}"


def print_summary(summary: dict, folder: Path) -> None:
    """Print the final scores and files of a run."""
    scores = [name for name in ("accuracy", "loss", "top5") if f"val_{name}" in summary]
    chance = f"; chance {summary['chance']:.4f}" if "chance" in summary else ""
    print(f"\n{scores_line(summary, scores)}{chance}; best {scores[0]} {summary[f'best_val_{scores[0]}']:.4f}")
    if summary["skipped_steps"]:
        print(f"steps skipped because loss or gradient was not finite: {summary['skipped_steps']}")
    if summary["unreadable_images"]:
        print(f"training images that could not be read: {summary['unreadable_images']}; see unreadable.txt")
    if "attention_miou" in summary:
        print(scores_table(summary["attention_miou"], marked=summary["attention_layer"]))
        print("  (* the layer that the paper uses)")
    print("written:")
    for path in sorted(folder.iterdir()):
        if path.name[0] != "." and path.name != "checkpoints":
            print(f"  {path}")
    print(f"  {summary['last_checkpoint']} (last)\n  {summary['best_checkpoint']} (best)")
