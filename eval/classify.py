"""Classification: a model's own head, k nearest neighbours, and a linear probe on frozen features.

A run is evaluated on its own data set unless the options name another. Images are not augmented; for other models
they are resized and cropped as their pretrained_cfg says. Features are the input of the head: the CLS token after the
final LayerNorm, or the mean of the patches for models that pool these.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_fast.errors import UserError, require
from crate_fast.eval.common import paper
from crate_fast.eval.common.command import Evaluation, open_models
from crate_fast.eval.common.images import LabelledImages, batches
from crate_fast.eval.common.models import LoadedModel
from crate_fast.options import main_of
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.loader import DataSplits, plain_splits

PROTOCOLS = ("head", "knn", "linear")
KS = (10, 20, 100, 200)  # numbers of neighbours
RAW_SIDE = 16  # side of raw images, in pixels
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # values of scikit-learn's C, the inverse regularisation strength
_STRENGTH, _MAX_ITERATIONS = "logisticregression__C", 500
_MAX_SIMILARITIES = 2**26  # in memory at once: 256 MiB
_DATA_OPTIONS = ("dataset", "data_dir", "train_split", "val_split", "train_samples", "val_samples")
_DATA_SETTINGS = (*_DATA_OPTIONS, "image_size", "seed")


# --- probes of frozen features


def pooled(model: nn.Module, tokens: Tensor, pool: str = "cls") -> Tensor:
    """Pool tokens [B, N, C] of `forward_features` to one vector per image [B, C], after the final LayerNorm.

    `pool` is "cls", or "mean" over the patches, which follow the prefix tokens.
    """
    prefix = model.num_prefix_tokens
    token = tokens[:, :1] if pool == "cls" else tokens[:, prefix:].mean(dim=1, keepdim=True)
    if getattr(model, "attn_pool", None) is not None:  # a pooling layer of the model's own, which changes tokens
        return model.fc_norm(token[:, 0])
    # `forward_head` pools by itself, which leaves equal tokens unchanged
    return model.forward_head(token.expand(-1, prefix + 1, -1), pre_logits=True)


def knn_predictions(
    train: Tensor, labels: Tensor, val: Tensor, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Classify by a vote of the k nearest training images with weights exp(cosine / T) (DINO's protocol).

    Args:
        train: Training features [n, C].
        labels: Training classes [n], from 0.
        val: Validation features [m, C].
        ks: Numbers of neighbours.
        temperature: T, above 0.

    Returns:
        k → predicted classes [m].

    Raises:
        UserError: A k is below 1 or above n.

    >>> knn_predictions(torch.eye(2), torch.tensor([4, 7]), torch.tensor([[0.1, 0.9]]), [1])
    {1: tensor([7])}
    """
    check_neighbours(ks, len(train))
    unit = F.normalize(train.float(), dim=1)
    n_classes = int(labels.max()) + 1
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in val.float().split(max(1, _MAX_SIMILARITIES // len(train))):
        similarity, nearest = (F.normalize(part, dim=1) @ unit.T).topk(max(ks), dim=1)
        weights, classes = (similarity / temperature).exp(), labels[nearest]
        for k in ks:
            votes = weights.new_zeros(len(part), n_classes)
            found[k].append(votes.scatter_add_(1, classes[:, :k], weights[:, :k]).argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in found.items()}


def check_neighbours(ks: Sequence[int], n_images: int) -> None:
    """Raise a `UserError` if a k is below 1 or above the number of training images."""
    for k in ks:
        if not 1 <= k <= n_images:
            raise UserError(f"--k {k}: there are {n_images} training images; give a number from 1 to {n_images}")


class LinearProbe(NamedTuple):
    """Result of `linear_probe`."""

    predictions: Tensor  # predicted classes of the validation images [m]
    C: float  # chosen inverse regularisation strength
    held_out: dict[float, float]  # C → accuracy on the held-out training images


def linear_probe(train: Tensor, labels: Tensor, val: Tensor, seed: int = 0) -> LinearProbe:
    """Fit scikit-learn's multinomial logistic regression on standardised frozen features.

    C is chosen from `STRENGTHS` on a held-out fifth of the training images. The final fit uses all of them.

    Args:
        train: Training features [n, C].
        labels: Training classes [n].
        val: Validation features [m, C].
        seed: Seed of the choice of held-out images.

    Raises:
        UserError: scikit-learn is missing, there are fewer than ten training images, or the images that are not held
            out have fewer than two classes.
    """
    require("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    apart, rest = order.tensor_split([int(0.2 * len(train))])
    n_classes = len(labels[rest].unique())
    if n_classes < 2 or len(train) < 10:
        raise UserError(
            f"{len(train)} training images of {n_classes} classes are too few for a linear probe: raise --train-limit"
        )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS))  # warns without convergence
    search = GridSearchCV(probe, {_STRENGTH: STRENGTHS}, cv=[(rest.numpy(), apart.numpy())])
    search.fit(train.double().numpy(), labels.numpy())  # of equally good C the smallest
    held_out = dict(zip(STRENGTHS, search.cv_results_["mean_test_score"].tolist(), strict=True))
    predictions = torch.from_numpy(search.predict(val.double().numpy()))
    return LinearProbe(predictions, search.best_params_[_STRENGTH], held_out)


# --- the protocol


def _outputs(loaded: LoadedModel, data: DataSplits) -> list[int]:
    """Return the number of the head's output for each class of the data; raise a `UserError` if they do not fit.

    Outputs and classes are matched by name, or by number if the model's or the data's names are not known.
    """
    classes, numbers = list(data.classes), list(range(loaded.model.num_classes))
    known, remedy = f"the head of {loaded.label}", "score the features instead, with --protocol knn,linear"
    if len(numbers) != len(classes):
        raise UserError(f"{known} has {len(numbers)} classes and the data set {len(classes)}: {remedy}")
    in_order = [str(number) for number in numbers]
    if loaded.classes is None and classes != in_order and set(classes) == set(in_order):
        raise UserError(
            f"the classes of the data are numbers in the order {', '.join(classes[:3])}, …, and {known} has no "
            f"names: write the numbers with leading zeros, so that they are in the order of the outputs, or {remedy}"
        )
    names = list(loaded.classes or classes)
    if names != classes and set(names) == set(classes):
        return [names.index(name) for name in classes]
    if names != classes and in_order not in (names, classes):  # numbers: names not known
        differing = ", ".join(sorted(set(names) ^ set(classes))[:4])
        raise UserError(f"{known} and the data set have different classes, such as {differing}: {remedy}")
    return numbers


def check(
    loaded: LoadedModel,
    data: DataSplits,
    protocols: Sequence[str],
    *,
    ks: Sequence[int] | None = None,
    pool: str = "cls",
    train_limit: int | None = None,
) -> None:
    """Raise a `UserError` for wrong arguments of `evaluate`, before anything is computed."""
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UserError(f"--protocol {protocol!r}: choose among {', '.join(PROTOCOLS)}, separated by commas")
    if "head" in protocols:
        _outputs(loaded, data)
    if pool == "cls" and not loaded.extract.has_cls:
        raise UserError(f"{loaded.label} has no CLS token: pass --pool mean")
    if "knn" in protocols:
        check_neighbours(ks or (), min(train_limit or len(data.train), len(data.train)))
    if "linear" in protocols:
        require("sklearn")


@torch.inference_mode()
def _read(
    loaded: LoadedModel, images: LabelledImages, pool: str, head: list[int] | None, raw_pixels: bool, **reading
) -> dict[str, Tensor]:
    """Return labels and features of the images; also loss and top classes of `head`'s outputs, and raw images."""
    parts: dict[str, list[Tensor]] = {}
    for batch in batches(images, progress=f"{loaded.label}, {images.name}", **reading):
        labels = torch.tensor([sample.label for sample in batch.samples])
        tokens = loaded.model.forward_features(loaded.normalize(batch.images.to(loaded.device)))
        found = {"labels": labels, "features": pooled(loaded.model, tokens, pool).float().cpu()}
        if head:
            logits = loaded.model.forward_head(tokens).float().cpu()[:, head]
            found["ranked"] = logits.topk(min(5, logits.shape[1]), dim=1).indices
            found["loss"] = F.cross_entropy(logits, labels, reduction="none")
        if raw_pixels:
            found["pixels"] = F.adaptive_avg_pool2d(batch.images.float(), RAW_SIDE).flatten(1) / 255
        if not found["features"].isfinite().all():
            raise UserError(f"the features of {loaded.label} hold NaN or infinity: use an undamaged checkpoint")
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _probe(train: dict, val: dict, name: str, protocols: Sequence[str], ks: Sequence[int] | None, seed: int) -> dict:
    """Score k-NN and the linear probe on train[name] and val[name]."""
    found: dict = {}
    if "knn" in protocols:
        n_images = len(train["labels"])
        ks = ks or [k for k in KS if k <= n_images] or [n_images]
        predictions = knn_predictions(train[name], train["labels"], val[name], ks)
        found["knn"] = {k: _share(predicted == val["labels"]) for k, predicted in predictions.items()}
    if "linear" in protocols:
        probe = linear_probe(train[name], train["labels"], val[name], seed=seed)
        top1 = _share(probe.predictions == val["labels"])
        found["linear"] = {"top1": top1, "C": probe.C, "held_out": probe.held_out}
    return found


def _share(right: Tensor) -> float:
    return right.float().mean().item()


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
        loaded: The model; its image size must be that of the data.
        data: Result of `plain_splits`; "head" needs no training split.
        protocols: Any of "head", "knn" and "linear".
        ks: Numbers of neighbours; when None, the values of `KS` up to the number of training images.
        limit, train_limit: Maximum numbers of validation and training images, evenly spaced; all when None.
        raw_pixels: Also score k-NN and the linear probe on images of 16×16 pixels.
        pool, seed, **reading: See `pooled`, `linear_probe` and `images.batches`.

    Returns:
        "images", "train_images": numbers of images read; "classes": number of classes; "chance": share of the most
        frequent class among the validation images; "head": top1, top5 (None with at most five classes), loss in nats;
        "knn": k → top1; "linear": top1, C, "held_out" accuracy of each C; "raw_pixels": knn and linear
        on raw pixels.

    Raises:
        UserError: See `check`; or too few images can be read.
    """
    check(loaded, data, protocols, ks=ks, pool=pool, train_limit=train_limit)
    probing = "knn" in protocols or "linear" in protocols
    raw_pixels = raw_pixels and probing
    images = LabelledImages(data.val, "validation", limit)
    head = _outputs(loaded, data) if "head" in protocols else None
    val = _read(loaded, images, pool, head, raw_pixels, **reading)
    labels = val["labels"]
    found: dict = {"images": len(labels), "classes": len(data.classes)}
    found["chance"] = torch.bincount(labels).max().item() / len(labels)
    if "head" in protocols:
        right = val["ranked"] == labels[:, None]
        top5 = _share(right.any(dim=1)) if len(data.classes) > 5 else None
        found["head"] = {"top1": _share(right[:, 0]), "top5": top5, "loss": val["loss"].mean().item()}
    if probing:
        images = LabelledImages(data.train, "training", train_limit)
        train = _read(loaded, images, pool, None, raw_pixels, **reading)
        found |= {"train_images": len(train["labels"])} | _probe(train, val, "features", protocols, ks, seed)
        if raw_pixels:
            found["raw_pixels"] = _probe(train, val, "pixels", protocols, ks, seed)
    return found


def _row(label: str, counts: dict, scores: dict) -> dict:
    row = {"model": label, "images": counts["images"], "training images": counts.get("train_images")}
    row["chance"] = counts["chance"]
    if head := scores.get("head"):
        row |= {"head top-1": head["top1"], "head top-5": head["top5"], "head loss": head["loss"]}
    row |= {f"{k}-NN": accuracy for k, accuracy in scores.get("knn", {}).items()}
    if linear := scores.get("linear"):
        row |= {"linear": linear["top1"], "C": f"{linear['C']:g}"}
    return row


def _published(label: str, dataset: str, n_classes: int) -> float | None:
    """Return the model's accuracy on the data set in the paper's Table 3, in percent; 1,000 classes are ImageNet."""
    return paper.find("table3", label).get("imagenet" if n_classes == 1000 else dataset)


def _command(options: argparse.Namespace) -> None:
    models = open_models(options)
    plan = []
    changes = {name: getattr(options, name) for name in _DATA_OPTIONS if getattr(options, name) is not None}
    changes["download"] = options.download
    for loaded in models:
        changes["image_size"] = loaded.extract.image_size[0]
        if loaded.config is not None:
            config = dataclasses.replace(loaded.config, **changes)
        elif options.dataset is not None:
            config = TrainConfig(seed=options.seed, **changes)
        else:
            raise UserError(f"{loaded.label} is not a run, so it has no data set: pass --dataset and --data-dir")
        if options.data_dir and config.dataset == "shape_scenes":
            raise UserError(
                f"--data-dir {options.data_dir} has no effect on dataset='shape_scenes': pass --dataset too"
            )
        default = ("head",) if loaded.model.num_classes else ("knn",)
        protocols = tuple(options.protocol.split(",")) if options.protocol else default
        probing = {"knn", "linear"} & {*protocols}
        for option, given, used, where in (
            ("--k", options.k, "knn" in protocols, "knn in --protocol"),
            ("--raw-pixels", options.raw_pixels, probing, "knn or linear in --protocol"),
            ("--train-limit", options.train_limit, probing, "knn or linear in --protocol"),
            (f"--pool {options.pool}", options.pool, probing, "knn or linear in --protocol"),
            ("--train-samples", options.train_samples, config.dataset == "shape_scenes", "--dataset shape_scenes"),
            ("--val-samples", options.val_samples, config.dataset == "shape_scenes", "--dataset shape_scenes"),
        ):
            if given and not used:
                raise UserError(f"{option} has no effect without {where}: leave it out, or add that")
        own = getattr(loaded.model, "pretrained_cfg", {}) if loaded.config is None else {}
        how = {name: own[name] for name in ("crop_pct", "interpolation") if name in own}
        data = plain_splits(config, train=bool(probing), **how)
        pools_patches = not loaded.extract.has_cls or getattr(loaded.model, "global_pool", "") in ("avg", "mean")
        limits = {"ks": options.k, "train_limit": options.train_limit}
        limits["pool"] = options.pool or ("mean" if pools_patches else "cls")
        check(loaded, data, protocols, **limits)  # check all models before the first one runs
        plan.append((loaded, config, data, protocols, limits, how))
    evaluation = Evaluation("classify", options, models)
    settings = {name: getattr(options, name) for name in ("limit", "seed", "batch_size", "workers")}
    settings["problems"] = evaluation.problems
    results, rows, notes, sources = {}, [], [], []
    for loaded, config, data, protocols, limits, how in plan:
        source = {name: getattr(config, name) for name in _DATA_SETTINGS} | how
        raw = options.raw_pixels and source not in sources  # once per data set
        sources.append(source)
        found = evaluate(loaded, data, protocols, raw_pixels=raw, **settings, **limits)
        results[loaded.label] = found | {"data": source, "pool": limits["pool"]}
        of_raw = f"raw pixels {RAW_SIDE}×{RAW_SIDE} ({config.dataset})"
        if (published := _published(loaded.label, config.dataset, found["classes"])) is not None:
            notes.append(f"{loaded.label}: the paper's Table 3 has {published} % after fine-tuning all weights")
        for name, scores in ((loaded.label, found), (of_raw, found.get("raw_pixels"))):
            if scores:
                rows.append(_row(name, found, scores))
                if "linear" in scores and scores["linear"]["C"] in (min(STRENGTHS), max(STRENGTHS)):
                    notes.append(f"{name}: C = {scores['linear']['C']:g} is at the end of the range tried")
    evaluation.write_table("classify", rows)
    evaluation.finish(results, notes=notes)


main = main_of("eval classify", _command)
