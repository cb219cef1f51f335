"""Classification: a model's own head, k nearest neighbours, and a linear probe on frozen features.

    crate-fast eval classify runs/NAME runs/NAME@untrained --protocol head,knn,linear --raw-pixels
    crate-fast eval classify vit_small_patch8_224.dino@pretrained --protocol knn,linear --dataset cifar10 \\
        --data-dir data

A run is scored on its own data set unless options name another. No image is augmented. Features are those that the
head reads: the CLS token after the final LayerNorm.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_fast.errors import UserError, require
from crate_fast.eval.common import paper, probes
from crate_fast.eval.common.command import Evaluation, open_models
from crate_fast.eval.common.images import batches
from crate_fast.eval.common.models import LoadedModel
from crate_fast.options import main_of
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import DataSplits, plain_splits

__all__ = ["KS", "check", "evaluate", "main"]

PROTOCOLS = ("head", "knn", "linear")
KS = (10, 20, 100, 200)
RAW_SIDE = 16  # pixels
_DATA_OPTIONS = ("dataset", "data_dir", "train_split", "val_split", "train_samples", "val_samples")
_DATA_SETTINGS = (*_DATA_OPTIONS, "image_size", "seed")


def check(
    loaded: LoadedModel,
    data: DataSplits,
    protocols: Sequence[str],
    *,
    ks: Sequence[int] | None = None,
    pool: str = "cls",
    train_limit: int | None = None,
) -> None:
    """Refuse what cannot be scored, before anything is computed; see `evaluate` for the arguments.

    Raises:
        UserError: A protocol is misspelt, the model's head does not fit the data set, the model lacks the token that
            is pooled, or there are fewer training images than neighbours, or too few for the linear probe.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UserError(f"--protocol {protocol!r}: choose among {', '.join(PROTOCOLS)}, separated by commas")
    outputs, classes = loaded.model.num_classes, len(data.classes)
    if "head" in protocols and outputs != classes:
        raise UserError(
            f"the head of {loaded.label} has {outputs} classes and the data set {classes}, so its outputs cannot be "
            "scored: look at its features, with --protocol knn,linear"
        )
    probes.check_pool(loaded.model, pool)
    n_images = min(train_limit or len(data.train), len(data.train))
    if "knn" in protocols:
        probes.check_neighbours(ks or (), n_images)
    if "linear" in protocols:
        require("sklearn")
        probes.check_linear(n_images, classes)


@torch.inference_mode()
def _read(
    loaded: LoadedModel, images: probes.LabelledImages, pool: str, head: bool, raw_pixels: bool, **reading
) -> dict[str, Tensor]:
    """Read labels and features of the images, and on demand the head's loss and ranking, and small raw images."""
    parts: dict[str, list[Tensor]] = {}
    for batch in batches(images, progress=f"{loaded.label}, {images.name}", **reading):
        labels = torch.tensor([sample.label for sample in batch.samples])
        tokens = loaded.model.forward_features(loaded.normalize(batch.images.to(loaded.device)))
        found = {"labels": labels, "features": probes.pooled(loaded.model, tokens, pool).float().cpu()}
        if head:
            logits = loaded.model.forward_head(tokens).float().cpu()
            found["ranked"] = logits.topk(min(5, logits.shape[1]), dim=1).indices
            found["loss"] = F.cross_entropy(logits, labels, reduction="none")
        if raw_pixels:
            found["pixels"] = F.adaptive_avg_pool2d(batch.images.float(), RAW_SIDE).flatten(1) / 255
        if not found["features"].isfinite().all():
            raise UserError(f"the features of {loaded.label} hold NaN or infinity: its checkpoint is damaged")
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _per_class(correct: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float | None]:
    count = torch.bincount(labels, minlength=len(classes))
    right = torch.bincount(labels[correct], minlength=len(classes))
    return {name: (r / n if n else None) for name, r, n in zip(classes, right.tolist(), count.tolist(), strict=True)}


def _probe(
    train: dict, val: dict, name: str, classes: Sequence[str], protocols: Sequence[str], ks: Sequence[int], seed: int
) -> dict:
    """Score k-NN and the linear probe on train[name] and val[name]; leave out what there are too few images for."""
    found: dict = {"per_class": {}, "left_out": {}}
    if "knn" in protocols:
        n_images = len(train["labels"])
        for k in ks:
            if k > n_images:
                found["left_out"][f"{k}-NN"] = f"there are {n_images} training images"
        ks = [k for k in ks if k <= n_images] or [n_images]
        predictions = probes.knn_predictions(train[name], train["labels"], val[name], ks)
        correct = {k: predicted == val["labels"] for k, predicted in predictions.items()}
        found["knn"] = {k: right.float().mean().item() for k, right in correct.items()}
        found["per_class"][f"knn, k = {ks[0]}"] = _per_class(correct[ks[0]], val["labels"], classes)
    if "linear" in protocols:
        try:
            probe = probes.linear_probe(train[name], train["labels"], val[name], seed=seed)
        except UserError as error:  # the other results stand
            found["left_out"]["linear"] = str(error)
            return found
        right = probe.predictions == val["labels"]
        found["linear"] = {"top1": right.float().mean().item(), "C": probe.C}
        found["linear"] |= {"held_out": probe.held_out, "converged": probe.converged}
        found["per_class"]["linear"] = _per_class(right, val["labels"], classes)
    return found


def evaluate(
    loaded: LoadedModel,
    data: DataSplits,
    protocols: Sequence[str] = ("head", "knn"),
    *,
    ks: Sequence[int] | None = None,
    pool: str = "cls",
    limit: int | None = None,
    train_limit: int | None = None,
    raw_pixels: bool = False,
    seed: int = 0,
    **reading,
) -> dict:
    """Score one model; all accuracies are in [0, 1].

    Args:
        loaded: The model, expecting images of the data's size.
        data: Result of `plain_splits`; the training split is read only for "knn" and "linear".
        protocols: Among "head", "knn", "linear".
        ks: Numbers of neighbours; when None those of `KS` up to the number of training images.
        pool: See `pooled`.
        limit, train_limit: Validation and training images, evenly spaced; all when None.
        raw_pixels: Also score k-NN and the linear probe on images of 16×16 pixels.
        seed: Seed of the linear probe's held-out images.
        **reading: See `images.batches`.

    Returns:
        "images" (and "train_images"): those read; "classes"; "chance": share of the most frequent class among the
        validation images; "head": top1, top5 (None with at most five classes), loss in nats; "knn": k → top1;
        "linear": top1, C, "held_out" accuracy of each C, "converged"; "per_class": protocol → class → top1 (k-NN: of
        the first k), None for a class without images; "left_out": score → reason why there is none; "raw_pixels":
        knn, linear, per_class and left_out of raw pixels.

    Raises:
        UserError: See `check`; or nothing could be scored.
    """
    check(loaded, data, protocols, ks=ks, pool=pool, train_limit=train_limit)
    ks = KS if ks is None else ks
    probing = "knn" in protocols or "linear" in protocols
    raw_pixels = raw_pixels and probing
    images = probes.LabelledImages(data.val, "validation", limit)
    val = _read(loaded, images, pool, "head" in protocols, raw_pixels, **reading)
    labels, classes = val["labels"], data.classes
    found: dict = {"images": len(labels), "classes": len(classes), "per_class": {}}
    found["chance"] = torch.bincount(labels).max().item() / len(labels)
    if "head" in protocols:
        right = val["ranked"] == labels[:, None]
        top5 = right.any(dim=1).float().mean().item() if len(classes) > 5 else None
        found["head"] = {"top1": right[:, 0].float().mean().item(), "top5": top5, "loss": val["loss"].mean().item()}
        found["per_class"]["head"] = _per_class(right[:, 0], labels, classes)
    if not probing:
        return found
    try:
        images = probes.LabelledImages(data.train, "training", train_limit)
        train = _read(loaded, images, pool, False, raw_pixels, **reading)
    except UserError as error:
        if "head" not in found:
            raise
        return found | {"left_out": dict.fromkeys((p for p in protocols if p != "head"), str(error))}
    found["train_images"] = len(train["labels"])
    probed = _probe(train, val, "features", classes, protocols, ks, seed)
    found["per_class"] |= probed.pop("per_class")
    found |= probed
    if not found.keys() & set(PROTOCOLS):
        raise UserError("; ".join(found["left_out"].values()))
    if raw_pixels:
        found["raw_pixels"] = _probe(train, val, "pixels", classes, protocols, ks, seed)
    return found


def _data_config(loaded: LoadedModel, options: argparse.Namespace) -> TrainConfig:
    """Return the data settings of the options, else of the run."""
    if loaded.config is None and options.dataset is None:
        raise UserError(f"{loaded.label} is not a run with a data set of its own: pass --dataset, and --data-dir")
    side = loaded.extract.image_size[0]
    changes = {name: getattr(options, name) for name in _DATA_OPTIONS if getattr(options, name) is not None}
    if loaded.config is None:
        return TrainConfig(image_size=side, seed=options.seed, **changes)
    return dataclasses.replace(loaded.config, image_size=side, download=False, **changes)


def _paper_score(label: str, config: TrainConfig, n_classes: int) -> float | None:
    """Return Table 3's number for a model of this name on the data set, known by its name or its folder's."""
    names = [config.dataset, Path(config.data_dir).name.lower()] + (["imagenet"] if n_classes == 1000 else [])
    return next((paper.TRANSFER[name].get(label) for name in names if name in paper.TRANSFER), None)


def _row(label: str, counts: dict, scores: dict) -> dict:
    row = {"model": label, "images": counts["images"], "training images": counts.get("train_images")}
    row["chance"] = counts["chance"]
    if head := scores.get("head"):
        row |= {"head top-1": head["top1"], "head top-5": head["top5"], "head loss": head["loss"]}
    row |= {f"{k}-NN": accuracy for k, accuracy in scores.get("knn", {}).items()}
    if linear := scores.get("linear"):
        row |= {"linear": linear["top1"], "C": f"{linear['C']:g}"}
    if scores.get("paper_fine_tuned"):
        row["paper, fine-tuned"] = scores["paper_fine_tuned"]
    return row


def _doubts(label: str, scores: dict) -> list[str]:
    """Return what was left out, and what speaks against a linear probe's score."""
    doubts = [f"{label}: {what} left out: {why}" for what, why in scores.get("left_out", {}).items()]
    if linear := scores.get("linear"):
        chosen, low, high = linear["C"], min(linear["held_out"]), max(linear["held_out"])
        if not linear["converged"]:
            doubts.append(f"{label}: the linear probe's fit did not converge")
        if chosen in (low, high):
            doubts.append(f"{label}: C = {chosen:g} is at the end of those tried ({low:g} to {high:g})")
    return doubts


def _command(options: argparse.Namespace) -> None:
    models = open_models(options)
    plan = []
    for loaded in models:
        config = _data_config(loaded, options)
        default = ("head", "knn") if loaded.model.num_classes else ("knn",)
        protocols = tuple(options.protocol.split(",")) if options.protocol else default
        data = plain_splits(config)
        limits = {"ks": options.k, "pool": options.pool, "train_limit": options.train_limit}
        check(loaded, data, protocols, **limits)  # all models, before the first is run
        plan.append((loaded, config, data, protocols))
    evaluation = Evaluation("classify", options, models)
    names = ("pool", "limit", "train_limit", "seed", "batch_size", "workers")
    settings = {name: getattr(options, name) for name in names} | {"ks": options.k, "problems": evaluation.problems}
    rows, doubts, raw_scored = [], [], []

    def score(loaded: LoadedModel, config: TrainConfig, data: DataSplits, protocols: tuple[str, ...]) -> dict:
        source = {name: getattr(config, name) for name in _DATA_SETTINGS}
        raw = options.raw_pixels and source not in raw_scored
        found = evaluate(loaded, data, protocols, raw_pixels=raw, **settings)
        raw_scored.append(source)
        return found | {"data": source, "paper_fine_tuned": _paper_score(loaded.label, config, len(data.classes))}

    results = evaluation.score(score, {task[0].label: task for task in plan})
    for label, found in results.items():
        of_raw = f"raw pixels {RAW_SIDE}×{RAW_SIDE} ({found['data']['dataset']})"
        for name, scores in ((label, found), (of_raw, found.get("raw_pixels"))):
            if scores:
                rows.append(_row(name, found, scores))
                doubts += _doubts(name, scores)
    evaluation.write_table("classify", rows)
    if any("paper, fine-tuned" in row for row in rows):
        doubts.insert(0, "paper, fine-tuned: Table 3, all weights fine-tuned on the data set; no score here is.")
    evaluation.finish(results, notes=doubts)


main = main_of("eval classify", _command)
