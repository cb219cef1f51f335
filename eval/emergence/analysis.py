"""Models compared over seeds: which learning rate, head and layer, how large a difference, which claim holds."""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crate_fast.eval.emergence.protocol import MODELS, Protocol

__all__ = [
    "COARSE",
    "MEASURES",
    "ORDER",
    "Claim",
    "Paired",
    "at_accuracy",
    "at_checkpoint",
    "baselines",
    "by_model",
    "by_seed",
    "chosen_lr",
    "claims",
    "coarse_measures",
    "common_accuracy",
    "complete_seeds",
    "has_measure",
    "held_out_accuracy",
    "last",
    "load_results",
    "paired",
    "validated",
]

ORDER = ("CRATE", "CRATE-MLP", "CRATE-MHSA", "ViT")  # of the paper's Table 2, best first
Results = dict[str, dict]


def load_results(report: Path) -> Results:
    """Every result in a report's folder: name of the run → result."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((report / "results").glob("*.json"))}


def chosen_lr(results: Results, protocol: Protocol, model: str) -> float | None:
    """The learning rate whose sweep ended with the best accuracy on its held-out scenes, the smaller of two equal
    ones; None while a sweep is missing."""
    scores = {}
    for lr in protocol.lrs:
        sweep = results.get(f"sweep-{model}-lr{lr:g}")
        if sweep is None:
            return None
        scores[lr] = sweep["validation"][-1]["val_accuracy"]
    return max(scores, key=lambda lr: (scores[lr], -lr))


def _row(checkpoint: dict, split: str, reading: str, layer: int) -> dict:
    return next(row for row in checkpoint[split][reading]["layers"] if row["layer"] == layer)


def _head(checkpoint: dict, reading: str, layer: int) -> int:
    """The best head for all images of the selection scenes."""
    heads = _row(checkpoint, "selection", reading, layer)["per_head"]
    return heads.index(max(heads))


def _score(checkpoint: dict, reading: str, heads: str, layer: int, split: str = "test") -> float:
    row = _row(checkpoint, split, reading, layer)
    return 100 * (row["best_head"] if heads == "best head" else row["per_head"][_head(checkpoint, reading, layer)])


def _chosen_layer(checkpoint: dict, reading: str, heads: str) -> int:
    layers = [row["layer"] for row in checkpoint["selection"][reading]["layers"]]
    return max(layers, key=lambda layer: _score(checkpoint, reading, heads, layer, "selection"))


def _coarse(reading: str, heads: str) -> Callable[[dict, int | None], float]:
    def at(checkpoint: dict, layer: int | None) -> float:
        chosen = _chosen_layer(checkpoint, reading, heads) if layer is None else layer
        return _score(checkpoint, reading, heads, chosen)

    return at


def _detected(name: str) -> Callable[[dict, int | None], float]:
    return lambda checkpoint, layer: checkpoint["maskcut"][str(layer)][name]


# Of attention: name → (reading of `segmentation.AttentionScores`, whose)
COARSE: dict[str, tuple[str, str]] = {
    f"{name}, {heads}": (reading, heads)
    for reading, name in (("ap", "AP"), ("mass", "mIoU mass"), ("topk", "mIoU topk"))
    for heads in ("best head", "fixed head")
}
# Name → (checkpoint, layer) → percent. With layer None attention is scored at the layer best on the selection scenes.
MEASURES: dict[str, Callable[[dict, int | None], float]] = {
    name: _coarse(*reading_and_heads) for name, reading_and_heads in COARSE.items()
} | {name: _detected(name) for name in ("box AP50", "box AP", "box AR100", "mask AP50", "mask AP", "mask AR100")}


def coarse_measures(results: Results) -> list[str]:
    """Those of `COARSE` that the results have: AP came with the second protocol."""
    scored = [result["checkpoints"] for result in results.values() if result["kind"] == "scenes"]
    return [name for name, (reading, _) in COARSE.items() if all(reading in c["test"] for cs in scored for c in cs)]


def complete_seeds(results: Results, protocol: Protocol, kind: str = "scenes") -> list[int]:
    """The seeds that runs of all models are there of."""
    return [s for s in protocol.seeds if all(f"{kind}-{model}-seed{s}" in results for model in MODELS)]


def by_seed(
    results: Results, protocol: Protocol, model: str, value: Callable[[dict], float], kind: str = "scenes"
) -> list[float]:
    """A value of one model's runs, in the order of the complete seeds.

    Args:
        results: See `load_results`.
        protocol: The experiment.
        model: Of `MODELS`.
        value: Of a result.
        kind: Of runs.
    """
    return [value(results[f"{kind}-{model}-seed{seed}"]) for seed in complete_seeds(results, protocol, kind)]


def by_model(
    results: Results, protocol: Protocol, value: Callable[[dict], float], kind: str = "scenes"
) -> dict[str, list[float]]:
    """`by_seed` of every model."""
    return {model: by_seed(results, protocol, model, value, kind) for model in MODELS}


def last(measure: str, layer: str = "paper") -> Callable[[dict], float]:
    """A measure of a result's last checkpoint, at the paper's layer or the chosen one."""
    return at_checkpoint(measure, -1, layer)


def at_checkpoint(measure: str, index: int, layer: str = "paper") -> Callable[[dict], float]:
    """A measure of a result's checkpoint; 0 is the untrained twin."""

    def value(result: dict) -> float:
        checkpoint = result["checkpoints"][index]
        return MEASURES[measure](checkpoint, checkpoint["default_layer"] if layer == "paper" else None)

    return value


def validated(result: dict) -> list[int]:
    """The untrained twin, and the first stage's checkpoints at which the run classified its held-out scenes."""
    known = {entry["step"] for entry in result["validation"] if entry["stage"] == 0}
    return [i for i, c in enumerate(result["checkpoints"]) if c["stage"] == 0 and c["step"] in {0, *known}]


def held_out_accuracy(index: int) -> Callable[[dict], float]:
    """Accuracy on a run's held-out scenes at a checkpoint of `validated`, in percent; the twin's on test scenes."""

    def value(result: dict) -> float:
        step = result["checkpoints"][index]["step"]
        if step == 0:
            return 100 * result["checkpoints"][index]["accuracy"]
        return next(100 * e["val_accuracy"] for e in result["validation"] if (e["stage"], e["step"]) == (0, step))

    return value


def common_accuracy(results: Results, protocol: Protocol) -> float:
    """The highest accuracy that every run of the models of `ORDER` reached in the first stage, in percent."""

    def best(result: dict) -> float:
        return max(held_out_accuracy(index)(result) for index in validated(result))

    return min(value for model in ORDER for value in by_seed(results, protocol, model, best))


def at_accuracy(measure: str, accuracy: float, layer: str = "paper") -> Callable[[dict], float | None]:
    """A measure when a run first reached an accuracy, on the line between the checkpoints before and after.

    None where it did not in the first stage.
    """

    def value(result: dict) -> float | None:
        for before, after in itertools.pairwise(validated(result)):
            low, high = (held_out_accuracy(index)(result) for index in (before, after))
            if low < accuracy <= high:
                first, second = (at_checkpoint(measure, index, layer)(result) for index in (before, after))
                return first + (second - first) * (accuracy - low) / (high - low)
        return None

    return value


def baselines(results: Results, measure: str) -> dict[str, float]:
    """What maps that know nothing, or everything, score on the test scenes by a measure of `COARSE`, in percent."""
    scored = next(result for result in results.values() if result["kind"] == "scenes")["checkpoints"][-1]
    names = ("constant", "random", "mean_mask", "true_mask")
    return {name: 100 * scored["test"][COARSE[measure][0]][name] for name in names}


def has_measure(result: dict, name: str) -> bool:
    """Whether R^c ("coding_rate") or sparsity means something for a result's model."""
    rows = result["checkpoints"][-1]["white_box"]
    return bool(rows) and name in rows[0]


@dataclass(frozen=True)
class Paired:
    """A paired comparison over seeds.

    Attributes:
        differences: Of each seed.
        mean, std: Of them.
        low, high: 95 % interval of the mean by Student's t; with one seed there is none, and both are None.
        p: Two-sided, of the paired t-test; None with one seed.
    """

    differences: list[float]
    mean: float
    std: float | None
    low: float | None
    high: float | None
    p: float | None


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """first − second, seed by seed.

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
    """A statement of the protocol, and whether the results bear it out.

    Attributes:
        text: The statement.
        holds: Whether it does; None where one seed cannot tell.
        evidence: The numbers.
    """

    text: str
    holds: bool | None
    evidence: str


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def claims(results: Results, protocol: Protocol, measure: str = "") -> list[Claim]:
    """The protocol's statements, decided by its rules.

    Args:
        results: With every seed of at least one round of models.
        protocol: The experiment.
        measure: Of `COARSE`; the protocol's primary one when empty.
    """
    measure = measure or protocol.primary
    scores = by_model(results, protocol, last(measure))
    untrained = by_model(results, protocol, at_checkpoint(measure, 0))
    fixed_map = baselines(results, measure)["mean_mask"]
    crate, vit = scores["CRATE"], scores["ViT"]
    gap = paired(crate, vit)
    interval = "" if gap.low is None else f", 95 % interval {gap.low:.1f} to {gap.high:.1f}, p = {gap.p:.3f}"
    means = [statistics.fmean(scores[model]) for model in ORDER]
    seeds = [all(a > b for a, b in itertools.pairwise(row)) for row in zip(*(scores[m] for m in ORDER), strict=True)]
    return [
        Claim(
            "Training makes it: every CRATE scores above its untrained twin",
            all(a > b for a, b in zip(crate, untrained["CRATE"], strict=True)),
            f"{_listed(crate)} against {_listed(untrained['CRATE'])}",
        ),
        Claim(
            "It is about the image: every CRATE scores above the objects' mean mask, a map that is the same for all",
            all(value > fixed_map for value in crate),
            f"{_listed(crate)} against {fixed_map:.1f}",
        ),
        Claim(
            "It is CRATE's: CRATE scores above ViT, the 95 % interval of the paired difference above 0",
            None if gap.low is None else gap.low > 0,
            f"{_listed(crate)} against {_listed(vit)}: {gap.mean:+.1f}{interval}",
        ),
        Claim(
            "It does not appear in a ViT: no ViT scores above the mean mask",
            all(value <= fixed_map for value in vit),
            f"{_listed(vit)} against {fixed_map:.1f}",
        ),
        Claim(
            f"The order of Table 2, in the means: {' > '.join(ORDER)}",
            all(a > b for a, b in itertools.pairwise(means)),
            f"{' / '.join(f'{mean:.1f}' for mean in means)}; in {sum(seeds)} of {len(seeds)} seeds",
        ),
    ]
