"""Saved results of the experiment, and comparisons of its models over seeds."""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from crate_fast.eval.emergence.protocol import ORDER, Protocol, Run

# Measures of attention: name → (reading of `segmentation.score_attention`, choice of the head)
COARSE: dict[str, tuple[str, str]] = {
    f"{name}, {heads}": (reading, heads)
    for reading, name in (("ap", "AP"), ("mass", "mIoU mass"), ("topk", "mIoU topk"))
    for heads in ("best head", "fixed head")
}
MASKED = [f"masks: {name}" for name in COARSE]  # the same on photographs with masks
# Measures of boxes, at the first and last checkpoint only: name → (key of the choice of the head, score)
BOXED: dict[str, tuple[str, str]] = {
    f"{name}, {heads}": (heads.replace(" ", "_"), name)
    for name in ("MaxBoxAccV2", "GT-known")
    for heads in ("best head", "one head")
}
MASKCUT = ("box AP50", "box AP", "box AR100", "mask AP50", "mask AP", "mask AR100")


# --- values of a result ---


def _row(checkpoint: dict, split: str, reading: str, layer: int) -> dict:
    return next(row for row in checkpoint[split][reading]["layers"] if row["layer"] == layer)


def head_chosen(checkpoint: dict, reading: str, layer: int) -> int:
    """Return the head with the best mean score on the selection images."""
    heads = _row(checkpoint, "selection", reading, layer)["per_head"]
    return heads.index(max(heads))


def _coarse(measure: str, split: str, checkpoint: dict, layer: int | str) -> float:
    reading, heads = COARSE[measure]
    if layer == "chosen":
        layers = [row["layer"] for row in checkpoint["selection"][reading]["layers"]]
        layer = max(layers, key=lambda number: _coarse(measure, "selection", checkpoint, number))
    row = _row(checkpoint, split, reading, layer)
    return 100 * (
        row["best_head"] if heads == "best head" else row["per_head"][head_chosen(checkpoint, reading, layer)]
    )


def at_checkpoint(measure: str, index: int = -1, layer: int | str = "paper") -> Callable[[dict], float]:
    """Return a function that reads a measure from a result, at a checkpoint: 0 is the untrained twin, -1 the last.

    The measure is one of the lists above, "accuracy", "coding_rate" or "sparsity". All but the last two are in
    percent. `layer` is a number, "paper" for the layer used in the paper, or for measures of attention "chosen", the
    best on the selection images.
    """

    def value(result: dict) -> float:
        checkpoint = result["checkpoints"][index]
        at = checkpoint["default_layer"] if layer == "paper" else layer
        if measure == "accuracy":
            return 100 * checkpoint["accuracy"]
        if measure in MASKCUT:
            return checkpoint["maskcut"][str(at)][measure]
        if measure in BOXED:
            heads, score = BOXED[measure]
            return 100 * next(row for row in checkpoint["boxes"]["layers"] if row["layer"] == at)[heads][score]
        if measure in COARSE:
            return _coarse(measure, "test", checkpoint, at)
        if measure in MASKED:
            return _coarse(measure.removeprefix("masks: "), "masks", checkpoint, at)
        return checkpoint["white_box"][at][measure]

    return value


def held_out_accuracies(result: dict) -> dict[int, float]:
    """Return index → accuracy in percent of the validated checkpoints, the untrained twin first.

    It is measured on the run's validation images; for the untrained twin, on the test images.
    """
    known = {entry["step"]: 100 * entry["val_accuracy"] for entry in result["validation"]}
    known[0] = 100 * result["checkpoints"][0]["accuracy"]
    steps = [checkpoint["step"] for checkpoint in result["checkpoints"]]
    return {index: known[step] for index, step in enumerate(steps) if step in known}


def at_accuracy(measure: str, accuracy: float, layer: str = "paper") -> Callable[[dict], float | None]:
    """Return a function from a result to a measure at the point where the run first reached an accuracy.

    It interpolates linearly between two checkpoints, and returns None if the run did not cross the accuracy.
    """

    def value(result: dict) -> float | None:
        for (before, low), (after, high) in itertools.pairwise(held_out_accuracies(result).items()):
            if low < accuracy <= high:
                first, second = (at_checkpoint(measure, index, layer)(result) for index in (before, after))
                return first + (second - first) * (accuracy - low) / (high - low)
        return None

    return value


# --- models over seeds ---


class Paired(NamedTuple):
    """A paired comparison over seeds."""

    mean: float  # mean of the differences
    low: float | None = None  # 95 % interval by Student's t; None with one seed
    high: float | None = None
    p: float | None = None  # two-sided p of the paired t-test; None with one seed

    def __str__(self) -> str:
        words = f"{self.mean:+.1f}"
        return words if self.low is None else f"{words} ({self.low:.1f} to {self.high:.1f}; p = {self.p:.3f})"


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare first − second, seed by seed.

    >>> print(paired([3.0, 4.0, 5.0], [1.0, 1.0, 1.0]))
    +3.0 (0.5 to 5.5; p = 0.035)
    """
    from scipy import stats

    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Paired(mean)
    if len(set(differences)) == 1:
        return Paired(mean, mean, mean, float(mean == 0))
    test = stats.ttest_1samp(differences, 0)
    return Paired(mean, *map(float, test.confidence_interval()), float(test.pvalue))


class Claim(NamedTuple):
    """A statement of the protocol, its verdict (None if one seed cannot decide), and the evidence."""

    text: str
    holds: bool | None
    evidence: str


class Results:
    """Results of an experiment; `runs` maps run names to results."""

    def __init__(self, runs: dict[str, dict], protocol: Protocol):
        self.runs, self.protocol = runs, protocol

    @classmethod
    def load(cls, report: Path, protocol: Protocol) -> "Results":
        """Load every result in a report's folder."""
        paths = sorted((report / "results").glob("*.json"))
        return cls({path.stem: json.loads(path.read_text()) for path in paths}, protocol)

    def chosen_lr(self, model: str) -> float | None:
        """Return the learning rate whose sweep ended with the best accuracy, or None if a sweep is missing."""
        scores = self.sweeps(model)
        return max(scores, key=scores.get) if len(scores) == len(self.protocol.lrs) else None  # the smaller on a tie

    def sweeps(self, model: str) -> dict[float, float]:
        """Return the held-out accuracy of each finished sweep: learning rate → accuracy."""
        found = {lr: self.run(model, self.protocol.sweep_seed, lr) for lr in self.protocol.lrs}
        return {lr: sweep["validation"][-1]["val_accuracy"] for lr, sweep in found.items() if sweep}

    def run(self, model: str, seed: int, lr: float | None = None) -> dict | None:
        """Return the result of a run, or None if it is missing."""
        return self.runs.get(Run(model, seed, lr).name)

    @property
    def scored(self) -> list[dict]:
        """Results with scored checkpoints: all but sweeps."""
        return [result for result in self.runs.values() if "checkpoints" in result]

    @property
    def seeds(self) -> list[int]:
        """Compared seeds: those that both CRATE and ViT have."""
        return [s for s in self.protocol.seeds if all(self.run(model, s) for model in ("CRATE", "ViT"))]

    @property
    def models(self) -> list[str]:
        """Compared models: those of the protocol with a run of every compared seed."""
        return [model for model in self.protocol.models if all(self.run(model, seed) for seed in self.seeds)]

    @property
    def others(self) -> dict[str, list[dict]]:
        """Runs of all other models: model → results."""
        found: dict[str, list[dict]] = {}
        for result in self.scored:
            if result["model"] not in self.models:
                found.setdefault(result["model"], []).append(result)
        return found

    @property
    def complete(self) -> bool:
        """True if every model and seed of the protocol is compared."""
        return (len(self.models), len(self.seeds)) == (len(self.protocol.models), len(self.protocol.seeds))

    def by_seed(self, model: str, value: Callable) -> list:
        """Return a value of one model's runs, in the order of `seeds`; `value` is a function of a result."""
        return [value(self.run(model, seed)) for seed in self.seeds]

    def by_model(self, value: Callable) -> dict[str, list]:
        """Return `by_seed` for every compared model."""
        return {model: self.by_seed(model, value) for model in self.models}

    def have(self, name: str) -> bool:
        """Return True if the last checkpoints of all compared runs have scores of this name."""
        return all(all(found) for found in self.by_model(lambda result: name in result["checkpoints"][-1]).values())

    def with_measure(self, name: str) -> list[str]:
        """Return the models that have R^c ("coding_rate") or "sparsity"."""
        found = self.by_model(lambda result: any(name in row for row in result["checkpoints"][-1]["white_box"]))
        return [model for model, has in found.items() if all(has)]

    def baselines(self, measure: str, split: str = "test") -> dict[str, float]:
        """Return the scores of baseline maps by a measure of `COARSE`, in percent; `split` is "test" or "masks"."""
        scores = self.last_of_crate[split][COARSE[measure][0]]
        return {name: 100 * scores[name] for name in ("mean_mask", "random", "constant", "true_mask")}

    @property
    def last_of_crate(self) -> dict:
        """Last checkpoint of CRATE's first compared run; its scores of baselines are those of every run."""
        return self.run("CRATE", self.seeds[0])["checkpoints"][-1]

    def common_accuracy(self) -> float:
        """Return the highest accuracy in percent that every compared run reached."""
        learned = [found for runs in self.by_model(held_out_accuracies).values() for found in runs]
        return min(max(found.values()) for found in learned)

    def claims(self, measure: str = "", accuracy: float | None = None) -> list[Claim]:
        """Decide the protocol's statements by its rules, with a key of `COARSE` or the primary measure.

        Runs are compared where they first reached an accuracy in percent, or at their ends. CRATE and ViT need a
        common seed.
        """
        measure = measure or self.protocol.primary
        scores = self.by_model(at_checkpoint(measure) if accuracy is None else at_accuracy(measure, accuracy))
        crate, vit = scores["CRATE"], scores["ViT"]
        untrained = self.by_seed("CRATE", at_checkpoint(measure, 0))
        fixed_map = self.baselines(measure)["mean_mask"]
        gap = paired(crate, vit)
        interval = "" if gap.low is None else f", 95 % interval {gap.low:.1f} to {gap.high:.1f}, p = {gap.p:.3f}"
        means = [statistics.fmean(values) for values in scores.values()]
        ordered = [_falls(row) for row in zip(*scores.values(), strict=True)]
        without = "".join(f", without {model}" for model in ORDER if model not in self.models)
        return [
            Claim(
                "It comes from training: in every seed CRATE scores above its untrained twin",
                all(a > b for a, b in zip(crate, untrained, strict=True)),
                f"{_listed(crate)} against {_listed(untrained)}",
            ),
            Claim(
                "It depends on the image: in every seed CRATE scores above the objects' mean box, one map for all "
                "images",
                all(value > fixed_map for value in crate),
                f"{_listed(crate)} against {fixed_map:.1f}",
            ),
            Claim(
                "It is specific to CRATE: CRATE scores above ViT, and the 95 % interval of the paired difference is "
                "above 0",
                None if gap.low is None else gap.low > 0,
                f"{_listed(crate)} against {_listed(vit)}: {gap.mean:+.1f}{interval}",
            ),
            Claim(
                "It does not appear in a ViT: no ViT scores above the mean box",
                all(value <= fixed_map for value in vit),
                f"{_listed(vit)} against {fixed_map:.1f}",
            ),
            Claim(
                f"The order of Table 2, in the means: {' > '.join(ORDER)}",
                None if without and _falls(means) else _falls(means),
                f"{_listed(means, ' / ')}{without}; in {sum(ordered)} of {len(ordered)} seeds",
            ),
        ]


def _falls(values: Sequence[float]) -> bool:
    return all(a > b for a, b in itertools.pairwise(values))


def _listed(values: Sequence[float], separator: str = ", ") -> str:
    return separator.join(f"{value:.1f}" for value in values)
