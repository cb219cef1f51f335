"""Reports of a run: layer statistics at each evaluation, and final figures, curves and summary.json."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from crate_fast import CRATE, CRATEMAE
from crate_fast.eval.common.figures import Curve, Picture, curve_figure, image_grid
from crate_fast.eval.common.segmentation import NoObjectsError, mask_to_grid, score_attention, scores_table
from crate_fast.train import checkpoint
from crate_fast.train.data.loader import eval_loader, readable
from crate_fast.train.reconstruction import RATIOS, reconstruction_figure, reconstructions
from crate_fast.whitebox import attention_layer, layer_statistics, trace

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
    split, run = trainer.data.val, trainer.run
    images = [image for image, *_ in readable(split, range(min(WHITEBOX_IMAGES, len(split))))]
    if not images:
        return
    images, encoder = torch.stack(images), model.encoder() if isinstance(model, CRATEMAE) else model
    for name, rows in layer_statistics(encoder, trainer.prepare_images(images)).items():
        means = {f"{name}/layer_{layer:02d}": mean for layer, (mean, _) in enumerate(rows.tolist())}
        run.add_scalars(trainer.step, means)
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
    if isinstance(model, CRATEMAE):
        _draw_reconstructions(trainer, model)
    if isinstance(model, CRATE | CRATEMAE):
        summary |= _attention_report(trainer, model.encoder() if isinstance(model, CRATEMAE) else model)
    with checkpoint.writing(folder):
        checkpoint.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _shown(split: Dataset, classes: Sequence[str]) -> tuple[list[tuple], Tensor, list[str]]:
    """Return up to eight samples of a split, evenly spaced, with their images [B, 3, S, S] and class names."""
    count = min(SHOWN_IMAGES, len(split))
    samples = readable(split, [i * len(split) // count for i in range(count)])
    return samples, torch.stack([sample[0] for sample in samples]), [classes[sample[1]] for sample in samples]


def _draw_reconstructions(trainer: Trainer, model: CRATEMAE) -> None:
    config = trainer.config
    _, images, titles = _shown(trainer.data.val, trainer.data.classes)
    n_patches = model.grid_size[0] * model.grid_size[1]
    ratios = sorted({config.mask_ratio, *(ratio for ratio in RATIOS if 0 < int(n_patches * (1 - ratio)) < n_patches)})
    path = trainer.run.folder / "reconstruction.png"
    reconstruction_figure(model, images, trainer.normalize, [path], ratios, config.seed, titles)


@torch.inference_mode()
def _attention_report(trainer: Trainer, model: CRATE) -> dict:
    """Draw CLS attention of every head at two layers, one row per image; score it if there are object masks."""
    data, layer = trainer.data, attention_layer(model)
    samples, images, titles = _shown(data.val if data.masks is None else data.masks, data.classes)
    rows, columns = [[Picture(image.permute(1, 2, 0).numpy())] for image in images], ["image"]
    if data.masks is not None:
        columns.append("object")
        for row, (_, _, mask) in zip(rows, samples, strict=True):
            row.append(Picture(mask.float().numpy(), "gray", (0, 1)))
    model.eval()
    pixels = trainer.normalize(images.to(trainer.device))
    for layer_trace in trace(model, pixels, sorted({layer, model.transformer.depth - 1})):
        maps = layer_trace.cls_attention().float().cpu().unflatten(-1, model.grid_size)
        columns += [f"layer {layer_trace.index}, head {head}" for head in range(maps.shape[1])]
        for row, heads in zip(rows, maps, strict=True):
            row.extend(Picture(head.numpy()) for head in heads)
    image_grid(rows, [trainer.run.folder / "attention.png"], row_titles=titles, column_titles=columns)
    if data.masks is None:
        return {}

    def read() -> Iterator[tuple]:
        for batch in eval_loader(trainer.config, data.masks):
            pixels = trainer.normalize(batch.images.to(trainer.device))
            maps = {layer_trace.index: layer_trace.cls_attention() for layer_trace in trace(model, pixels)}
            yield maps, [mask[None] for mask in mask_to_grid(batch.masks, model.grid_size)], None

    try:
        scores = score_attention(read())
    except NoObjectsError as error:  # a finished training must not end in an error
        warnings.warn(f"attention maps are not scored: {error}", stacklevel=2)
        return {}
    return {"attention_layer": layer, "attention_miou": scores}


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
