"""The experiment's numbers: scores of one checkpoint, and comparisons of models over seeds from saved results."""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from crate_fast.eval import coarse_segmentation, localization, maskcut, white_box
from crate_fast.eval.common.images import batches
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.principal_components import TooFewPatchesError, foreground, pca_rgb
from crate_fast.eval.emergence.data import PhotographData, SceneData, spread
from crate_fast.eval.emergence.protocol import ORDER, Protocol

__all__ = [
    "BOXED",
    "COARSE",
    "MASKED",
    "MEASURES",
    "Claim",
    "Paired",
    "at_accuracy",
    "at_checkpoint",
    "baselines",
    "box_scores",
    "by_model",
    "by_seed",
    "checkpoint_scores",
    "chosen_lr",
    "claims",
    "coarse_measures",
    "common_accuracy",
    "complete_seeds",
    "has_measure",
    "head_chosen",
    "held_out_accuracy",
    "load_results",
    "paired",
    "photograph_scores",
    "pictures",
    "validated",
]

_BATCH = 50
_DIGITS = 6
Results = dict[str, dict]


# --- one checkpoint ---


def checkpoint_scores(loaded: LoadedModel, data: SceneData | PhotographData) -> dict:
    """Score a model at every layer.

    Args:
        loaded: The model at a checkpoint.
        data: The experiment's images.

    Returns:
        "accuracy" on test images; "selection" and "test", reading → "layers" ("best_head" and "per_head" of each)
        and baselines, as in `segmentation.score_attention`; "white_box", R^c and sparsity of each layer, empty for
        models without subspaces and ISTA. For scenes also `mask_scores`.
    """
    few = spread(data.test, data.protocol.maskcut_images) if data.protocol.photographs else data.with_masks
    scores = {
        "accuracy": _accuracy(loaded, data.classified),
        "selection": _segmentation(loaded, data.selection),
        "test": _segmentation(loaded, data.test),
        "white_box": _white_box(loaded, few),
    }
    if not data.protocol.photographs:
        scores["maskcut"] = _maskcut(loaded, few)
    return _rounded(scores)


def photograph_scores(loaded: LoadedModel, data: PhotographData) -> dict:
    """Score a model, opened at the size of photographs with masks, on those: "masks", as "test", and "maskcut"."""
    images = data.with_masks
    return _rounded({"masks": _segmentation(loaded, images), "maskcut": _maskcut(loaded, images)})


def box_scores(loaded: LoadedModel, data: PhotographData) -> dict:
    """Score a model's boxes, as `crate-fast eval localization` does: "boxes", its result without single heads."""
    found = localization.evaluate(loaded, spread(data.test, data.protocol.box_images), batch_size=_BATCH)
    for row in found["layers"]:
        del row["per_head"]
    return _rounded({"boxes": found})


def _maskcut(loaded: LoadedModel, images: Dataset) -> dict:
    layers = list(range(loaded.extract.depth))
    return {layer: _detection(numbers) for layer, numbers in maskcut.evaluate(loaded, images, layers).items()}


@torch.inference_mode()
def _accuracy(loaded: LoadedModel, images: Dataset) -> float:
    right = 0
    for batch in batches(images, _BATCH, []):
        found = loaded.model(loaded.normalize(batch.images.to(loaded.device))).argmax(dim=1).cpu()
        right += int((found == torch.tensor([sample.target.classes[0] for sample in batch.samples])).sum())
    return right / len(images)


def _segmentation(loaded: LoadedModel, images: Dataset) -> dict:
    scores = coarse_segmentation.evaluate(loaded, images, batch_size=_BATCH)
    left_out = ("by_class", "fixed_head")  # that head is chosen on these images; ours on the selection images
    for result in scores.values():
        result["layers"] = [{k: v for k, v in row.items() if k not in left_out} for row in result["layers"]]
    return scores


def _detection(numbers: dict) -> dict:
    kinds = {"box": numbers["bbox"], "mask": numbers["segm"]}
    names = ("AP50", "AP75", "AP", "AR100")
    found = {f"{kind} {name}": 100 * scores[name] for kind, scores in kinds.items() for name in names}
    return found | {"detections": numbers["detections"]}


def _white_box(loaded: LoadedModel, images: Dataset) -> list[dict]:
    if len(white_box.left_out(loaded.model)) == len(white_box.MEASURES):
        return []
    return white_box.evaluate(loaded, batches(images, _BATCH, []))["layers"]


def _rounded(value):
    """Round numbers and make keys text, so that values in memory equal those of the file."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, _DIGITS) if isinstance(value, float) else value


@torch.inference_mode()
def pictures(loaded: LoadedModel, shown: np.ndarray, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """Return a model's arrays for the figures on the shown images, which share one PCA.

    Args:
        loaded: The model at a checkpoint, opened at the images' size.
        shown: uint8 [8, S, S, 3].
        layers: The layers to read.

    Returns:
        "attention" float32 [layers, 8, heads, P]; "components" uint8 [layers, 8, P, 3], components 2 to 4 of all
        patches; "parts" uint8 [layers, 8, P, 3], the first three of the foreground, black elsewhere.
    """
    images = torch.from_numpy(shown).permute(0, 3, 1, 2).to(loaded.device)
    features = loaded.extract(loaded.normalize(images), list(layers))
    tokens = [features.keys(layer).cpu() for layer in layers]
    return {
        "attention": torch.stack([features.cls_attention(layer) for layer in layers]).float().cpu().numpy(),
        "components": np.stack([_bytes(pca_rgb(t, first=2)[0]) for t in tokens]),
        "parts": np.stack([_bytes(_parts(t, features.grid)) for t in tokens]),
    }


def _parts(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    try:
        return pca_rgb(tokens, foreground(tokens, grid=grid).mask)[0]
    except TooFewPatchesError:  # no foreground: all black
        return torch.zeros(*tokens.shape[:2], 3)


def _bytes(colours: Tensor) -> np.ndarray:
    return (255 * colours).round().byte().numpy()


# --- models over seeds ---


def load_results(report: Path) -> Results:
    """Return every result in a report's folder by the name of its run."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((report / "results").glob("*.json"))}


def chosen_lr(results: Results, protocol: Protocol, model: str) -> float | None:
    """Return the learning rate whose sweep ended with the best held-out accuracy; None while a sweep is missing.

    Of two equal ones it is the smaller.
    """
    scores = {}
    for lr in protocol.lrs:
        sweep = results.get(f"sweep-{model}-lr{lr:g}")
        if sweep is None:
            return None
        scores[lr] = sweep["validation"][-1]["val_accuracy"]
    return max(scores, key=lambda lr: (scores[lr], -lr))


def _row(checkpoint: dict, split: str, reading: str, layer: int) -> dict:
    return next(row for row in checkpoint[split][reading]["layers"] if row["layer"] == layer)


def head_chosen(checkpoint: dict, reading: str, layer: int) -> int:
    """Return the best head for all selection images."""
    heads = _row(checkpoint, "selection", reading, layer)["per_head"]
    return heads.index(max(heads))


def _score(checkpoint: dict, reading: str, heads: str, layer: int, split: str) -> float:
    row = _row(checkpoint, split, reading, layer)
    if heads == "best head":
        return 100 * row["best_head"]
    return 100 * row["per_head"][head_chosen(checkpoint, reading, layer)]


def _chosen_layer(checkpoint: dict, reading: str, heads: str) -> int:
    layers = [row["layer"] for row in checkpoint["selection"][reading]["layers"]]
    return max(layers, key=lambda layer: _score(checkpoint, reading, heads, layer, "selection"))


def _coarse(reading: str, heads: str, split: str = "test") -> Callable[[dict, int | None], float]:
    def at(checkpoint: dict, layer: int | None) -> float:
        chosen = _chosen_layer(checkpoint, reading, heads) if layer is None else layer
        return _score(checkpoint, reading, heads, chosen, split)

    return at


def _localized(name: str, heads: str) -> Callable[[dict, int | None], float]:
    def at(checkpoint: dict, layer: int | None) -> float:
        chosen = _chosen_layer(checkpoint, "ap", "best head") if layer is None else layer
        row = next(row for row in checkpoint["boxes"]["layers"] if row["layer"] == chosen)
        return 100 * row["best_head" if heads == "best head" else "one_head"][name]

    return at


def _detected(name: str) -> Callable[[dict, int | None], float]:
    return lambda checkpoint, layer: checkpoint["maskcut"][str(layer)][name]


# Measures of attention: name → (reading of `segmentation.AttentionScores`, head)
COARSE: dict[str, tuple[str, str]] = {
    f"{name}, {heads}": (reading, heads)
    for reading, name in (("ap", "AP"), ("mass", "mIoU mass"), ("topk", "mIoU topk"))
    for heads in ("best head", "fixed head")
}
# All measures: name → function of (checkpoint, layer) in percent. With layer None attention is scored at the layer
# that is best on the selection images.
MEASURES: dict[str, Callable[[dict, int | None], float]] = {
    name: _coarse(*reading_and_heads) for name, reading_and_heads in COARSE.items()
} | {name: _detected(name) for name in ("box AP50", "box AP", "box AR100", "mask AP50", "mask AP", "mask AR100")}
# The same measures of attention on the photographs with masks, and those of boxes, of the first and last checkpoint.
MASKED = {f"masks: {name}": _coarse(*reading_and_heads, "masks") for name, reading_and_heads in COARSE.items()}
BOXED = {
    f"{name}, {heads}": _localized(name, heads)
    for name in ("MaxBoxAccV2", "GT-known", "pointing")
    for heads in ("best head", "one head")
}
MEASURES |= MASKED | BOXED


def coarse_measures(results: Results) -> list[str]:
    """Return the measures of `COARSE` in the results: the first protocol has no AP."""
    scored = [result["checkpoints"] for result in results.values() if "checkpoints" in result]
    return [name for name, (reading, _) in COARSE.items() if all(reading in c["test"] for cs in scored for c in cs)]


def complete_seeds(results: Results, protocol: Protocol, kind: str = "") -> list[int]:
    """Return the seeds with runs of all models; without a kind, of the compared runs."""
    kind = kind or protocol.kind
    return [s for s in protocol.seeds if all(f"{kind}-{model}-seed{s}" in results for model in protocol.models)]


def by_seed(
    results: Results, protocol: Protocol, model: str, value: Callable[[dict], float], kind: str = ""
) -> list[float]:
    """Return a value of one model's runs, in the order of the complete seeds.

    Args:
        results: Result of `load_results`.
        protocol: The experiment.
        model: A key of `MODELS`.
        value: Function of a result.
        kind: Kind of runs; the compared ones when empty.
    """
    seeds, kind = complete_seeds(results, protocol, kind), kind or protocol.kind
    return [value(results[f"{kind}-{model}-seed{seed}"]) for seed in seeds]


def by_model(
    results: Results, protocol: Protocol, value: Callable[[dict], float], kind: str = ""
) -> dict[str, list[float]]:
    """Return `by_seed` for every model."""
    return {model: by_seed(results, protocol, model, value, kind) for model in protocol.models}


def at_checkpoint(measure: str, index: int = -1, layer: str = "paper") -> Callable[[dict], float]:
    """Return a function from a result to a measure of a checkpoint: 0 is the untrained twin, -1 the last.

    `layer` is "paper" for the layer that the paper looks at, or "chosen" for the best on the selection images.
    """

    def value(result: dict) -> float:
        checkpoint = result["checkpoints"][index]
        return MEASURES[measure](checkpoint, checkpoint["default_layer"] if layer == "paper" else None)

    return value


def validated(result: dict) -> list[int]:
    """Return the checkpoints of the first stage with a known held-out accuracy, the untrained twin first."""
    known = {entry["step"] for entry in result["validation"] if entry["stage"] == 0}
    return [i for i, c in enumerate(result["checkpoints"]) if c["stage"] == 0 and c["step"] in {0, *known}]


def held_out_accuracy(index: int) -> Callable[[dict], float]:
    """Return a function from a result to its accuracy at a checkpoint of `validated`, in percent.

    It is the accuracy on the images that the run was validated on, for the twin on test images.
    """

    def value(result: dict) -> float:
        step = result["checkpoints"][index]["step"]
        if step == 0:
            return 100 * result["checkpoints"][index]["accuracy"]
        return next(100 * e["val_accuracy"] for e in result["validation"] if (e["stage"], e["step"]) == (0, step))

    return value


def common_accuracy(results: Results, protocol: Protocol) -> float:
    """Return the highest accuracy that every run of `ORDER`'s models reached in the first stage, in percent."""

    def best(result: dict) -> float:
        return max(held_out_accuracy(index)(result) for index in validated(result))

    return min(value for model in ORDER for value in by_seed(results, protocol, model, best))


def at_accuracy(measure: str, accuracy: float, layer: str = "paper") -> Callable[[dict], float | None]:
    """Return a function from a result to a measure when the run first reached an accuracy.

    It interpolates linearly between the checkpoints before and after; None if the first stage did not reach it.
    """

    def value(result: dict) -> float | None:
        for before, after in itertools.pairwise(validated(result)):
            low, high = (held_out_accuracy(index)(result) for index in (before, after))
            if low < accuracy <= high:
                first, second = (at_checkpoint(measure, index, layer)(result) for index in (before, after))
                return first + (second - first) * (accuracy - low) / (high - low)
        return None

    return value


def baselines(results: Results, measure: str, split: str = "test") -> dict[str, float]:
    """Return the scores of baseline maps by a measure of `COARSE`, in percent; `split` is "test" or "masks"."""
    scored = next(result for result in results.values() if "checkpoints" in result)["checkpoints"][-1]
    names = ("constant", "random", "mean_mask", "true_mask")
    return {name: 100 * scored[split][COARSE[measure][0]][name] for name in names}


def has_measure(result: dict, name: str) -> bool:
    """Return True if a result's model has R^c ("coding_rate") or "sparsity"."""
    rows = result["checkpoints"][-1]["white_box"]
    return bool(rows) and name in rows[0]


@dataclass(frozen=True)
class Paired:
    """A paired comparison over seeds.

    Attributes:
        differences: One difference a seed.
        mean, std: Mean and standard deviation of the differences.
        low, high: 95 % interval of the mean by Student's t; None with one seed.
        p: Two-sided p of the paired t-test; None with one seed.
    """

    differences: list[float]
    mean: float
    std: float | None
    low: float | None
    high: float | None
    p: float | None


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare first − second, seed by seed.

    >>> found = paired([3.0, 4.0, 5.0], [1.0, 1.0, 1.0])
    >>> found.mean, round(found.low, 3), round(found.high, 3), round(found.p, 4)
    (3.0, 0.516, 5.484, 0.0351)
    """
    from scipy import stats

    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Paired(differences, mean, None, None, None, None)
    std = statistics.stdev(differences)
    if std == 0:
        return Paired(differences, mean, std, mean, mean, float(mean == 0))
    error = std / count**0.5
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Paired(differences, mean, std, mean - reach, mean + reach, p)


@dataclass(frozen=True)
class Claim:
    """A statement of the protocol with its verdict.

    Attributes:
        text: The statement.
        holds: The verdict; None where one seed cannot decide.
        evidence: The numbers.
    """

    text: str
    holds: bool | None
    evidence: str


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def claims(results: Results, protocol: Protocol, measure: str = "", accuracy: float | None = None) -> list[Claim]:
    """Decide the protocol's statements by its rules.

    Args:
        results: Results with at least one complete seed.
        protocol: The experiment.
        measure: A key of `COARSE`; empty for the protocol's primary measure.
        accuracy: Decide at the checkpoint where a run reached this accuracy, in percent; at the last when None.
    """
    measure = measure or protocol.primary
    trained = at_checkpoint(measure) if accuracy is None else at_accuracy(measure, accuracy)
    scores = by_model(results, protocol, trained)
    untrained = by_model(results, protocol, at_checkpoint(measure, 0))
    fixed_map = baselines(results, measure)["mean_mask"]
    crate, vit = scores["CRATE"], scores["ViT"]
    gap = paired(crate, vit)
    interval = "" if gap.low is None else f", 95 % interval {gap.low:.1f} to {gap.high:.1f}, p = {gap.p:.3f}"
    means = [statistics.fmean(scores[model]) for model in ORDER]
    seeds = [all(a > b for a, b in itertools.pairwise(row)) for row in zip(*(scores[m] for m in ORDER), strict=True)]
    fixed = "mean box" if protocol.photographs else "mean mask"
    return [
        Claim(
            "Training makes it: every CRATE scores above its untrained twin",
            all(a > b for a, b in zip(crate, untrained["CRATE"], strict=True)),
            f"{_listed(crate)} against {_listed(untrained['CRATE'])}",
        ),
        Claim(
            f"It is about the image: every CRATE scores above the objects' {fixed}, a map that is the same for all",
            all(value > fixed_map for value in crate),
            f"{_listed(crate)} against {fixed_map:.1f}",
        ),
        Claim(
            "It is CRATE's: CRATE scores above ViT, the 95 % interval of the paired difference above 0",
            None if gap.low is None else gap.low > 0,
            f"{_listed(crate)} against {_listed(vit)}: {gap.mean:+.1f}{interval}",
        ),
        Claim(
            f"It does not appear in a ViT: no ViT scores above the {fixed}",
            all(value <= fixed_map for value in vit),
            f"{_listed(vit)} against {fixed_map:.1f}",
        ),
        Claim(
            f"The order of Table 2, in the means: {' > '.join(ORDER)}",
            all(a > b for a, b in itertools.pairwise(means)),
            f"{' / '.join(f'{mean:.1f}' for mean in means)}; in {sum(seeds)} of {len(seeds)} seeds",
        ),
    ]
