"""Classification: a model's own head, k nearest neighbours, and a linear probe on frozen features.

    crate-fast eval classify runs/NAME runs/NAME@untrained --protocol head,knn,linear --raw-pixels
    crate-fast eval classify vit_small_patch8_224.dino@pretrained --protocol knn,linear --dataset cifar10 --data-dir
    data

A run is scored on its own data set unless options name another. No image is augmented. Features are those the head
reads: the last layer's CLS token behind the final LayerNorm.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_fast.errors import UserError, require, run_command
from crate_fast.eval.common import paper
from crate_fast.eval.common.command import evaluation_parser, open_models, output_folder, positive, settings_of
from crate_fast.eval.common.images import batches
from crate_fast.eval.common.models import Subject
from crate_fast.eval.common.probes import (
    LabelledImages,
    check_linear,
    check_pool,
    knn_predictions,
    linear_probe,
    pooled,
)
from crate_fast.eval.common.results import raise_failures, say_written, write_results, write_table
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import DataSplits, plain_splits

__all__ = ["KS", "check", "evaluate", "main"]

PROTOCOLS = ("head", "knn", "linear")
KS = (10, 20, 100, 200)
RAW_SIDE = 16  # pixels
_DATA_SETTINGS = (
    "dataset",
    "data_dir",
    "train_split",
    "val_split",
    "train_samples",
    "val_samples",
    "image_size",
    "seed",
)


def check(
    subject: Subject,
    data: DataSplits,
    protocols: Sequence[str],
    *,
    ks: Sequence[int] | None = None,
    pool: str = "cls",
    train_limit: int | None = None,
) -> None:
    """Refuse what cannot be scored, before anything is computed.

    Args:
        subject, data, protocols, ks, pool, train_limit: See `evaluate`.

    Raises:
        UserError: A protocol is misspelt, the model's head does not fit the data set, the model lacks the token that
            is pooled, or there are fewer training images than neighbours, or too few for the linear probe.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UserError(f"--protocol {protocol!r}: choose among {', '.join(PROTOCOLS)}, separated by commas")
    outputs, classes = subject.model.num_classes, len(data.classes)
    if "head" in protocols and outputs != classes:
        raise UserError(
            f"the head of {subject.label} has {outputs} classes and the data set {classes}, so its outputs cannot be "
            "scored: look at its features, with --protocol knn,linear"
        )
    check_pool(subject.model, pool)
    n_images = min(train_limit or len(data.train), len(data.train))
    for k in ks or ():
        if "knn" in protocols and not 1 <= k <= n_images:
            raise UserError(f"--k {k}: there are {n_images} training images; ask for at most as many neighbours")
    if "linear" in protocols:
        require("sklearn")
        check_linear(n_images, classes)


@torch.inference_mode()
def _read(
    subject: Subject, images: LabelledImages, pool: str, head: bool, raw_pixels: bool, problems: list[str], **loading
) -> dict[str, Tensor]:
    """Of every readable image: label, features; loss and ranked classes of the head; small raw image."""
    parts: dict[str, list[Tensor]] = {}
    for batch in batches(images, problems=problems, progress=f"{subject.label}, {images.name}", **loading):
        labels = torch.tensor([sample.label for sample in batch.samples])
        tokens = subject.model.forward_features(subject.normalize(batch.images.to(subject.device)))
        found = {"labels": labels, "features": pooled(subject.model, tokens, pool).float().cpu()}
        if head:
            logits = subject.model.forward_head(tokens).float().cpu()
            found["ranked"] = logits.topk(min(5, logits.shape[1]), dim=1).indices
            found["loss"] = F.cross_entropy(logits, labels, reduction="none")
        if raw_pixels:
            found["pixels"] = F.adaptive_avg_pool2d(batch.images.float(), RAW_SIDE).flatten(1) / 255
        if not found["features"].isfinite().all():
            raise UserError(f"the features of {subject.label} hold NaN or infinity: its checkpoint is damaged")
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
    """k-NN and the linear probe on train[name] and val[name]; what the images read are too few for is left out."""
    found: dict = {"per_class": {}, "left_out": {}}
    if "knn" in protocols:
        n_images = len(train["labels"])
        for k in ks:
            if k > n_images:
                found["left_out"][f"{k}-NN"] = f"there are {n_images} training images"
        ks = [k for k in ks if k <= n_images] or [n_images]
        predictions = knn_predictions(train[name], train["labels"], val[name], ks)
        correct = {k: predicted == val["labels"] for k, predicted in predictions.items()}
        found["knn"] = {k: right.float().mean().item() for k, right in correct.items()}
        found["per_class"][f"knn, k = {ks[0]}"] = _per_class(correct[ks[0]], val["labels"], classes)
    if "linear" in protocols:
        try:
            probe = linear_probe(train[name], train["labels"], val[name], seed=seed)
        except UserError as error:  # the other results stand
            found["left_out"]["linear"] = str(error)
            return found
        right = probe.predictions == val["labels"]
        found["linear"] = {"top1": right.float().mean().item(), "C": probe.C}
        found["linear"] |= {"held_out": probe.held_out, "converged": probe.converged}
        found["per_class"]["linear"] = _per_class(right, val["labels"], classes)
    return found


def evaluate(
    subject: Subject,
    data: DataSplits,
    protocols: Sequence[str] = ("head", "knn"),
    *,
    ks: Sequence[int] | None = None,
    pool: str = "cls",
    limit: int | None = None,
    train_limit: int | None = None,
    raw_pixels: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    problems: list[str] | None = None,
) -> dict:
    """Classification accuracy of one model, all in [0, 1].

    Args:
        subject: The model, expecting images of the data's size.
        data: Of `plain_splits`; the training split is read only for "knn" and "linear".
        protocols: Among "head", "knn", "linear".
        ks: Numbers of neighbours; when None those of `KS` that there are training images for.
        pool: See `pooled`.
        limit, train_limit: Validation and training images, evenly spaced; all when None.
        raw_pixels: Also score k-NN and the linear probe on images of 16×16 pixels.
        batch_size, workers: Of reading.
        seed: Of the linear probe's held-out images.
        problems: Filled with what could not be read.

    Returns:
        "images" (and "train_images"): those read; "classes"; "chance": share of the most frequent class among the
        validation images; "head": top1, top5 (None with at most five classes), loss in nats; "knn": k → top1;
        "linear": top1, C, "held_out" accuracy of each C, "converged"; "per_class": protocol → class → top1, None
        where there is no image of it (k-NN: of the first k); "left_out": what could not be scored → why;
        "raw_pixels": knn, linear, per_class and left_out of those.

    Raises:
        UserError: See `check`; or nothing could be scored.
    """
    check(subject, data, protocols, ks=ks, pool=pool, train_limit=train_limit)
    ks = KS if ks is None else ks
    loading = {"problems": [] if problems is None else problems, "batch_size": batch_size, "workers": workers}
    probing = "knn" in protocols or "linear" in protocols
    raw_pixels = raw_pixels and probing
    val = _read(
        subject, LabelledImages(data.val, "validation", limit), pool, "head" in protocols, raw_pixels, **loading
    )
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
        train = _read(
            subject, LabelledImages(data.train, "training", train_limit), pool, False, raw_pixels, **loading
        )
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


def _data_config(subject: Subject, options: argparse.Namespace) -> TrainConfig:
    """The data of the run, or of the options, which come first."""
    if subject.config is None and options.dataset is None:
        raise UserError(f"{subject.label} is not a run with a data set of its own: pass --dataset, and --data-dir")
    height, width = subject.extract.image_size
    if height != width:
        raise UserError(f"{subject.label} expects images of {height}×{width} pixels: pass --image-size for a square")
    named = ("dataset", "data_dir", "train_split", "val_split", "train_samples", "val_samples")
    changes = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    if subject.config is None:
        return TrainConfig(image_size=height, seed=options.seed, **changes)
    return dataclasses.replace(subject.config, image_size=height, download=False, **changes)


def _paper_score(label: str, config: TrainConfig, n_classes: int) -> float | None:
    """What Table 3 says of a model of this name, on this data set or one that is stored in a folder of its name."""
    names = [config.dataset, Path(config.data_dir).name.lower()] + (["imagenet"] if n_classes == 1000 else [])
    return next((paper.TRANSFER[name].get(label) for name in names if name in paper.TRANSFER), None)


def _row(label: str, result: dict, scores: dict) -> dict:
    row = {"model": label, "images": result["images"], "training images": result.get("train_images")}
    row["chance"] = result["chance"]
    if "head" in scores:
        head = scores["head"]
        row |= {"head top-1": head["top1"], "head top-5": head["top5"], "head loss": head["loss"]}
    row |= {f"{k}-NN": accuracy for k, accuracy in scores.get("knn", {}).items()}
    if "linear" in scores:
        row |= {"linear": scores["linear"]["top1"], "C": f"{scores['linear']['C']:g}"}
    if result.get("paper_fine_tuned") and scores is result:
        row["paper, fine-tuned"] = result["paper_fine_tuned"]
    return row


def _doubts(label: str, scores: dict) -> list[str]:
    """Return what was left out, and what speaks against a linear probe's score."""
    doubts = [f"{label}: {what} left out: {why}" for what, why in scores.get("left_out", {}).items()]
    if "linear" not in scores:
        return doubts
    chosen, tried = scores["linear"]["C"], list(scores["linear"]["held_out"])
    if not scores["linear"]["converged"]:
        doubts.append(f"{label}: the linear probe's fit did not converge")
    if chosen in (min(tried), max(tried)):
        doubts.append(f"{label}: C = {chosen:g} is at the end of those tried ({min(tried):g} to {max(tried):g})")
    return doubts


def _run(options: argparse.Namespace) -> None:
    subjects = open_models(options)
    plan = []
    for subject in subjects:
        config = _data_config(subject, options)
        default = ("head", "knn") if subject.model.num_classes else ("knn",)
        protocols = tuple(options.protocol.split(",")) if options.protocol else default
        data = plain_splits(config)
        known = {"ks": options.k, "pool": options.pool, "train_limit": options.train_limit}
        check(subject, data, protocols, **known)  # of all models, before the first is run
        plan.append((subject, config, data, protocols))
    folder = output_folder(options, "classify")
    settings = ("pool", "limit", "train_limit", "batch_size", "workers", "seed")
    chosen = {name: getattr(options, name) for name in settings} | {"ks": options.k}
    problems: list[str] = []
    results, rows, doubts, seen, failures = {}, [], [], set(), []
    for subject, config, data, protocols in plan:
        source = {name: getattr(config, name) for name in _DATA_SETTINGS}
        raw = options.raw_pixels and tuple(source.values()) not in seen
        try:
            found = evaluate(subject, data, protocols, raw_pixels=raw, problems=problems, **chosen)
        except UserError as error:
            failures.append(f"{subject.label}: {error}")
            continue
        seen.add(tuple(source.values()))
        reported = _paper_score(subject.label, config, len(data.classes))
        results[subject.label] = found | {"data": source, "paper_fine_tuned": reported}
        rows.append(_row(subject.label, results[subject.label], results[subject.label]))
        doubts += _doubts(subject.label, found)
        if "raw_pixels" in found:
            label = f"raw pixels {RAW_SIDE}×{RAW_SIDE} ({config.dataset})"
            rows.append(_row(label, found, found["raw_pixels"]))
            doubts += _doubts(label, found["raw_pixels"])
    if not results:
        raise_failures(failures)
    problems = list(dict.fromkeys(problems))  # two models may have met the same image
    print(write_table(folder, "classify", rows))
    if any("paper, fine-tuned" in row for row in rows):
        print("paper, fine-tuned: Table 3, all weights fine-tuned on the data set; no score here is.")
    print("".join(f"{doubt}\n" for doubt in doubts), end="")
    config = settings_of(options) | {"models": [subject.facts for subject in subjects]}
    written = write_results(folder, "classify", config, results, problems)
    say_written([written, folder / "classify.md"], problems)
    raise_failures(failures, folder)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(word) for word in text.split(","))


def main(argv: list[str] | None = None) -> int:
    """Run as the command line says; returns the exit status."""
    parser = evaluation_parser("classify", __doc__.splitlines()[0], data=False)
    parser.set_defaults(batch_size=64)
    parser.add_argument("--protocol", help="among head,knn,linear; default head,knn, or knn without a head")
    parser.add_argument(
        "--dataset", help="as in training: shape_scenes, folder, tar, shards, …; default the run's own"
    )
    parser.add_argument("--data-dir", help="its folder")
    parser.add_argument("--train-split", help="name of the training split: of folder, tar, shards, hf")
    parser.add_argument("--val-split", help="name of the validation split, likewise")
    parser.add_argument("--train-samples", type=positive, help="of shape_scenes: training images")
    parser.add_argument("--val-samples", type=positive, help="of shape_scenes: validation images")
    parser.add_argument("--limit", type=positive, help="validation images, evenly spaced; all when absent")
    parser.add_argument("--train-limit", type=positive, help="training images, evenly spaced; all when absent")
    parser.add_argument("--k", type=_numbers, help="neighbours; default those of 10,20,100,200 there are images for")
    parser.add_argument("--pool", choices=("cls", "mean"), default="cls", help="features: CLS or the patches' mean")
    parser.add_argument("--raw-pixels", action="store_true", help="score images of 16×16 pixels in the same way")
    return run_command(lambda: _run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
