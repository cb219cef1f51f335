"""CLS attention maps of each head, under noise, and next to other models (paper, Fig. 1, 7, 8, 11-14).

Writes attention_01.png and .pdf (then 02, …: eight rows per page; with noise one figure per image), attention.npz
with the maps by image name, results.json, and a table of entropies or, with noise, of correlations with clean maps.
Each map has its own colour scale, since one head may spread its weight over a hundred times as many patches as
another. Compare colours within a map, not between maps.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.eval.common.command import Evaluation, open_models, read_images
from crate_fast.eval.common.figures import Picture, image_picture, image_rows, short_name, write_pages
from crate_fast.eval.common.images import Batch, Sample
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.segmentation import attention_to_mask, intersection_over_union
from crate_fast.options import main_of

NOISE = {  # figure → (sigma, share) of its levels
    "noise_sigma": [(sigma, 0.5) for sigma in (0.0, 25.0, 50.0, 75.0, 100.0, 125.0)],
    "noise_share": [(75.0, share) for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)],
}


def add_noise(images: Tensor, sigma: float, share: float, seed: int, first: int = 0) -> Tensor:
    """Add Gaussian noise to all channels of randomly chosen pixels; round and clip to 0..255.

    Pixels and noise depend only on the seed and the image number. A larger sigma scales the same noise, and a larger
    share adds pixels to those of a smaller share.

    Args:
        images: uint8 [B, C, H, W].
        sigma: Standard deviation, on the scale of 0..255.
        share: Share of noisy pixels, 0 to 1.
        seed: Not negative.
        first: Number of the first image in its data set.

    Returns:
        Noisy copies, uint8 [B, C, H, W].

    Raises:
        UserError: The images are not uint8, or sigma or share is out of range.

    >>> add_noise(torch.full((1, 3, 4, 4), 100, dtype=torch.uint8), 20, 0.5, seed=0).ne(100).any(dim=1).sum().item()
    8
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise UserError(f"images are {images.dtype} {tuple(images.shape)}: pass uint8 [B, C, H, W]")
    if not 0 <= sigma < math.inf or not 0 <= share <= 1:
        raise UserError(f"noise of sigma={sigma} and share={share}: give a finite sigma ≥ 0 and a share from 0 to 1")
    flat = images.flatten(2).cpu().numpy()
    noisy = flat.copy()
    for number in range(len(flat)):
        generator = np.random.default_rng((seed, first + number))
        chosen = generator.permutation(flat.shape[2])[: round(share * flat.shape[2])]
        noise = generator.standard_normal(flat.shape[1:])
        noisy[number][:, chosen] = np.rint(flat[number][:, chosen] + sigma * noise[:, chosen]).clip(0, 255)
    return torch.from_numpy(noisy).view_as(images).to(images.device)


def map_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the Pearson correlation of maps [..., P] over patches, float64 [...]; NaN if a map is constant.

    Unlike an IoU, it needs no threshold, and chance level is 0 whatever area a head covers.
    """

    def deviation(x: Tensor) -> Tensor:
        centred = x.double() - x.double().mean(dim=-1, keepdim=True)
        size = centred.norm(dim=-1, keepdim=True)
        constant = size <= torch.finfo(torch.float32).eps * x.double().norm(dim=-1, keepdim=True)
        return (centred / size).masked_fill(constant, math.nan)

    return (deviation(a) * deviation(b)).sum(dim=-1)


def evaluate(
    loaded: LoadedModel,
    batches: Iterable[Batch],
    layer: int | None = None,
    noise: Sequence[tuple[float, float]] = (),
    seed: int = 0,
) -> dict:
    """Compute CLS attention of one layer on every image, and on noisy copies of it.

    Args:
        noise: (sigma, share) of each level; see `add_noise`. Other arguments: see `crate_fast.eval`.

    Returns:
        "layer", "grid" [rows, columns];
        "images", their names; "entropy", that of each image's maps in nats [images][heads];
        "noise", each level with "sigma", "share", "per_head", the correlation of noisy and clean maps averaged over
            images, and "correlation", its mean over heads (None if all maps are constant);
        "maps", an array [images, heads, rows, columns];
        "noisy_maps", an array [levels, images, heads, rows, columns], or None without noise.

    Raises:
        UserError: The model has no CLS token, or no such layer.
    """
    layer = loaded.extract.resolve_layer(layer)

    def attention(images: Tensor) -> Tensor:
        return loaded.features(images, [layer]).cls_attention(layer).cpu()

    names, clean, noisy = [], [], [[] for _ in noise]
    for batch in batches:
        clean.append(attention(batch.images))
        for level, (sigma, share) in zip(noisy, noise, strict=True):
            level.append(attention(add_noise(batch.images, sigma, share, seed, first=len(names))))
        names += [str(sample.key) for sample in batch.samples]
    maps = torch.cat(clean)
    grid = loaded.extract.grid
    levels, agreement = [torch.cat(level) for level in noisy], []
    for (sigma, share), level in zip(noise, levels, strict=True):
        per_head = map_correlation(maps, level).nanmean(dim=0)
        mean, *values = (None if math.isnan(v) else v for v in (per_head.nanmean().item(), *per_head.tolist()))
        agreement.append({"sigma": sigma, "share": share, "correlation": mean, "per_head": values})
    return {
        "layer": layer,
        "grid": list(grid),
        "images": names,
        "entropy": torch.special.entr(maps.double()).sum(dim=-1).tolist(),
        "noise": agreement,
        "maps": maps.unflatten(-1, grid).numpy(),
        "noisy_maps": torch.stack(levels).unflatten(-1, grid).numpy() if levels else None,
    }


class _ModelMaps(NamedTuple):
    """Figure data of one model; maps are [images, heads, rows, columns]."""

    title: str
    samples: list[Sample]
    maps: np.ndarray
    noisy_maps: np.ndarray | None


def _columns(maps: np.ndarray, heads: Sequence[int | str], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Return column title → maps [images, rows, columns] of the heads, from maps [images, heads, rows, columns]."""
    columns: dict[str, np.ndarray] = {}
    for head in heads:
        if head == "mean":
            columns["mean of heads"] = maps.mean(axis=1)
        elif head == "best":
            columns["best head"] = maps[np.arange(len(maps)), _best_heads(maps, samples)]
        else:
            numbers = range(maps.shape[1]) if head == "all" else [head]
            columns |= {f"head {number}": maps[:, number] for number in numbers}
    return columns


def _best_heads(maps: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
    """Return for each image the head whose mask (60 % of the mass) has the largest IoU with the objects."""
    targets, valid = zip(*(sample.target.on_grid(maps.shape[2:]) for sample in samples), strict=True)
    masks = attention_to_mask(torch.from_numpy(maps).flatten(2), "mass")
    union = torch.stack([target.any(dim=0) for target in targets])
    return intersection_over_union(masks, union[:, None], torch.stack(valid)[:, None]).argmax(dim=1).numpy()


def _pictures(maps: np.ndarray, images: Iterable[Tensor], style: str) -> list[Picture]:
    shown = zip(maps, map(image_picture, images), strict=True)
    return [Picture(m, over=image.pixels if style == "overlay" else None) for m, image in shown]


def _images_figure(
    shown: Sequence[_ModelMaps], heads: Sequence[int | str], style: str, folder: Path, title: str | None = None
) -> list[Path]:
    """Draw a row per image: the image, its objects, and each model's maps."""
    samples, columns = shown[0].samples, {}
    images = [sample.image for sample in samples]
    for model in shown:
        for name, maps in _columns(model.maps, heads, model.samples).items():
            columns[name if title else f"{model.title}\n{name}"] = _pictures(maps, images, style)
    rows, titles = image_rows(samples, columns)
    return write_pages(rows, folder, "attention", [short_name(sample) for sample in samples], titles, title)


def _noise_figures(
    model: _ModelMaps, levels: Sequence[tuple[float, float]], options: argparse.Namespace, folder: Path
) -> list[Path]:
    """Draw a figure per image, with a row per level: the noisy image and its maps."""
    if options.figure == "noise_sigma":
        names, what = [f"σ = {sigma:g}" for sigma, _ in levels], f"noise on {levels[0][1]:.0%} of the pixels"
    else:
        names, what = [f"{share:.0%} noisy" for _, share in levels], f"noise of σ = {levels[0][0]:g}"
    written = []
    for number, sample in enumerate(model.samples):
        noisy = torch.cat([add_noise(sample.image[None], *level, options.seed, first=number) for level in levels])
        columns = _columns(model.noisy_maps[:, number], options.heads or ["all"], [])
        pictures = [_pictures(maps, noisy, options.style) for maps in columns.values()]
        rows = list(zip(map(image_picture, noisy), *pictures, strict=True))
        title = f"{model.title}: image {short_name(sample, 40)}, {what}"
        written += write_pages(rows, folder, f"attention_image{number + 1:02d}", names, ["image", *columns], title)
    return written


def _table(label: str, outcome: dict) -> list[dict]:
    row = {"model": label, "layer": outcome["layer"]}
    if outcome["noise"]:
        names = ("sigma", "share", "correlation")
        return [row | {name: level[name] for name in names} for level in outcome["noise"]]
    uniform = math.log(max(2, math.prod(outcome["grid"])))  # the largest entropy
    mean = np.mean(outcome["entropy"], axis=0).tolist()
    return [row | {"head": h, "entropy (nats)": e, "entropy / ln P": e / uniform} for h, e in enumerate(mean)]


def _command(options: argparse.Namespace) -> None:
    noise = NOISE.get(options.figure, [])
    models = open_models(options)
    labelled = not options.data.startswith(("folder", "photographs"))
    default = {"heads": ["all", "mean"], "models": ["mean", "best"] if labelled else ["mean"]}
    heads = options.heads or default.get(options.figure, ["all"])
    if "best" in heads and noise:
        raise UserError("--heads best would change heads between noise levels: choose heads by number")
    if "best" in heads and not labelled:
        raise UserError("--heads best needs object masks: use coco, voc or shape_scenes as --data")
    for loaded in models:
        loaded.require_cls()
        loaded.extract.resolve_layer(options.layer)
        for head in heads:
            if isinstance(head, int) and head >= loaded.extract.heads:
                raise UserError(f"--heads {head}: {loaded.label} has heads 0 to {loaded.extract.heads - 1}")
    evaluation = Evaluation("attention_maps", options, models)
    results, rows, shown = {}, [], []
    for loaded in models:
        folder = evaluation.model_folder(loaded)
        samples: list[Sample] = []
        outcome = evaluate(loaded, read_images(evaluation, loaded, samples), options.layer, noise, options.seed)
        title = f"{loaded.label}, layer {outcome['layer']}"
        model = _ModelMaps(title, samples, outcome.pop("maps"), outcome.pop("noisy_maps"))
        shown.append(model)
        if noise:
            evaluation.written += _noise_figures(model, noise, options, folder)
        elif options.figure != "models":
            evaluation.written += _images_figure([model], heads, options.style, folder, model.title)
        evaluation.written.append(folder / "attention.npz")
        folder.mkdir(parents=True, exist_ok=True)
        by_image = model.maps if model.noisy_maps is None else model.noisy_maps.swapaxes(0, 1)
        np.savez(folder / "attention.npz", **{str(s.key): maps for s, maps in zip(samples, by_image, strict=True)})
        results[loaded.label] = outcome
        rows += _table(loaded.label, outcome)
    if options.figure == "models":
        evaluation.written += _images_figure(shown, heads, options.style, evaluation.folder)
    evaluation.write_table("attention", rows)
    evaluation.finish(results, {"heads": heads})


main = main_of("eval attention_maps", _command)
