"""The report of the experiment, written from saved results and pictures alone."""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from crate_fast.errors import UserError
from crate_fast.eval.common import paper
from crate_fast.eval.common.results import markdown_table
from crate_fast.eval.emergence.figures import CAPTIONS, draw, load_pictures
from crate_fast.eval.emergence.protocol import ORDER, Protocol, planned_runs
from crate_fast.eval.emergence.scores import (
    BOXED,
    COARSE,
    MASKED,
    MEASURES,
    Paired,
    at_accuracy,
    at_checkpoint,
    baselines,
    by_model,
    by_seed,
    chosen_lr,
    claims,
    coarse_measures,
    common_accuracy,
    complete_seeds,
    has_measure,
    load_results,
    paired,
)
from crate_fast.eval.white_box import trend
from crate_fast.train.checkpoint import write_text

__all__ = ["write_report"]

_PAIRS = (*itertools.pairwise(ORDER), ("CRATE", "ViT"), ("CRATE", "CRATE-sth"))
_BASELINES = {
    "mean_mask": "mean mask",
    "random": "random maps",
    "constant": "constant mask",
    "true_mask": "true mask",
}
_MASKCUT = [name for name in MEASURES if name not in {**COARSE, **MASKED, **BOXED}]
_PAPERS_LAYER = "the last but one of models with MSSA, the last of those with MHSA"


def write_report(report: Path, protocol: Protocol, size: str) -> Path:
    """Write report.md and its figures.

    Args:
        report: Folder with results/ and pictures/.
        protocol: The experiment.
        size: A key of `SIZES`.

    Raises:
        UserError: No seed has results of all models.
    """
    results = load_results(report)
    if not complete_seeds(results, protocol):
        raise UserError(
            f"{report / 'results'} does not hold a run of every model with one seed yet: run on, then report"
        )
    figures = draw(results, load_pictures(report), protocol, report / "figures")
    page = "photographs/protocol.md" if protocol.photographs else "protocol.md"
    protocol_page = "[protocol.md](protocol.md)" if (report / "protocol.md").is_file() else f"docs/emergence/{page}"
    masked = _has(results, "masks")
    parts = [
        f"# Emergence{' on photographs' if protocol.photographs else ''}: what came out ({size})",
        "Written by `crate-fast reproduce emergence` from the files in `results/` and `pictures/`; the rules were "
        f"fixed before the runs, in {protocol_page}. Scores are percent on test {protocol.kind} that nothing was "
        "chosen on, at the last checkpoint; ± is the standard deviation over seeds.",
        "## Does the claim hold?",
        _verdicts(results, protocol),
        *_discussion(report),
        *(["## Attention and boxes"] if protocol.photographs else ["## Coarse segmentation (Fig. 4, Table 2)"]),
        _coarse(results, protocol),
        *(["## Boxes from attention (localization)", _boxes(results, protocol)] if _has(results, "boxes") else []),
        *(["## Coarse segmentation (Fig. 4, Table 2)", _masks(results, protocol)] if masked else []),
        *(["## MaskCut (Table 2)", _detection(results, protocol)] if _has(results, "maskcut") else []),
        "## Differences between models",
        _differences(results, protocol),
        "## Accuracy",
        _accuracy(results, protocol),
        "## Attention at equal accuracy",
        _at_equal_accuracy(results, protocol),
        "## White box",
        _white_box(results, protocol),
        *(["## Figures", _figures_note(protocol)] if figures else []),
        *(f"![{CAPTIONS[name]}](figures/{path.name})\n\n*{CAPTIONS[name]}*" for name, path in figures.items()),
        *_earlier(report),
        "## How it was run",
        _origin(results, protocol, size),
    ]
    path = report / "report.md"
    write_text(path, "\n\n".join(part.strip() for part in parts) + "\n")
    return path


def _has(results: dict, name: str) -> bool:
    """Return True if the last checkpoints have scores of this name."""
    return all(name in result["checkpoints"][-1] for result in results.values() if "checkpoints" in result)


def _figures_note(protocol: Protocol) -> str:
    if protocol.photographs:
        return (
            f"Grids show freely licensed photographs of Python packages, at {protocol.mask_size} px, and the models "
            "of the first seed. The photographs were chosen by licence, before the runs. No model saw them."
        )
    text = "Grids show the first test scenes, and the models of the first seed."
    sizes = [stage.image_size for stage in protocol.stages]
    if len(set(sizes)) == 1:
        return text
    return (
        f"{text} All checkpoints are scored at {sizes[-1]} px; those of the first stage had seen {sizes[0]} px "
        "alone, so that objects are larger than they know them, and their accuracy here says little."
    )


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _claims(results: dict, protocol: Protocol, measure: str, accuracy: float | None = None) -> str:
    found = claims(results, protocol, measure, accuracy)
    so_far = "" if len(complete_seeds(results, protocol)) == len(protocol.seeds) else " so far"
    words = {True: "holds", False: "does not hold", None: "undecided"}
    rows = [{"statement": c.text, "": f"**{words[c.holds]}{so_far}**", measure: c.evidence} for c in found]
    holding = sum(claim.holds is True for claim in found)
    return f"{markdown_table(rows)}\n{holding} of {len(found)} statements hold{so_far}."


def _verdicts(results: dict, protocol: Protocol) -> str:
    fixed = protocol.primary.replace("best head", "fixed head")
    if protocol.photographs:
        at = common_accuracy(results, protocol)
        reached = by_model(results, protocol, at_accuracy(protocol.primary, at))
        learned = not any(None in reached[model] for model in ORDER)  # each began below what all reached
        first = (
            f"On the primary score, {protocol.primary}, at the end of training:\n\n"
            f"{_claims(results, protocol, protocol.primary)}\n\nAnd, primary too, at equal accuracy: where each run "
            f"first reached {at:.1f} % on its held-out photographs, the most that all did:\n\n"
            + (_claims(results, protocol, protocol.primary, at) if learned else "Not every run learned that much.")
        )
    else:
        first = f"On the primary score, {protocol.primary}, as the protocol has it:\n\n"
        first += _claims(results, protocol, protocol.primary)
    text = (
        f"{first}\n\nThe "
        f"best of {protocol.heads} heads is chosen with the object in view, and {protocol.heads} maps that are the "
        "same for all images would gain from that too, while the mean mask is one map. So the same statements on one "
        f"head for all images, chosen on other {protocol.kind}; not what the protocol decides by:\n\n"
        + _claims(results, protocol, fixed)
    )
    before = Protocol.primary
    if protocol.primary == before or protocol.photographs:
        return text
    return (
        f"{text}\n\nAnd by the paper's way of scoring, which the first protocol decided by; it depends on how far "
        f"maps spread:\n\n{_claims(results, protocol, before)}"
    )


def _table(
    columns: dict[str, Callable[[dict], float]], results: dict, protocol: Protocol, kind: str = ""
) -> list[dict]:
    found = {name: by_model(results, protocol, value, kind) for name, value in columns.items()}
    return [
        {"model": model} | {name: _with_spread(values[model]) for name, values in found.items()}
        for model in protocol.models
    ]


def _with_twins(names: Sequence[str], results: dict, protocol: Protocol) -> list[dict]:
    """Return rows of the measures at the paper's layer: the trained models, then their untrained twins."""
    rows = _table({name: at_checkpoint(name) for name in names}, results, protocol)
    twins = _table({name: at_checkpoint(name, 0) for name in names}, results, protocol)
    return rows + [{**row, "model": f"{row['model']}, untrained"} for row in twins]


def _baseline_rows(measures: Sequence[str], results: dict, protocol: Protocol, split: str = "test") -> list[dict]:
    """Return a row a baseline map, under the names of the measures."""
    boxes = protocol.photographs and split == "test"
    names = _BASELINES | ({"mean_mask": "mean box", "true_mask": "true box"} if boxes else {})
    prefix = "masks: " if split == "masks" else ""
    return [
        {"model": text}
        | {
            prefix + measure: f"{baselines(results, measure, split)[name]:.1f}"
            for measure in measures
            if name != "random" or measure.endswith("best head")  # the best of as many maps as heads
        }
        for name, text in names.items()
    ]


def _coarse(results: dict, protocol: Protocol) -> str:
    measures = coarse_measures(results)
    rows = _with_twins(measures, results, protocol)
    if not protocol.photographs:
        for row in rows[: len(protocol.models)]:
            row["paper, VOC"] = paper.find("table2", row["model"]).get("VOC mIoU")
    rows += _baseline_rows(measures, results, protocol)
    chosen = _table({name: at_checkpoint(name, layer="chosen") for name in measures}, results, protocol)
    objects = " An object is what its boxes enclose." if protocol.photographs else ""
    return (
        f"At the layer that the paper looks at: {_PAPERS_LAYER}. The best head is the best of each image; the fixed "
        f"head is one for all images, chosen on other {protocol.kind}.{objects}\n\n"
        + markdown_table(rows, digits=1)
        + f"\nAt the layer that is best on other {protocol.kind}, chosen for each run and score:\n\n"
        + markdown_table(chosen, digits=1)
    )


def _boxes(results: dict, protocol: Protocol) -> str:
    rows = _with_twins(list(BOXED), results, protocol)
    priors = next(r for r in results.values() if "checkpoints" in r)["checkpoints"][-1]["boxes"]["baselines"]
    for prior, scores in priors.items():
        row = {"model": prior}
        for name in BOXED:
            measure, _, heads = name.rpartition(", ")
            found = scores["best_head" if heads == "best head" else "one_head"] if prior == "random" else scores
            row[name] = f"{100 * found[measure]:.1f}"
        rows.append(row)
    return (
        "As `crate-fast eval localization` scores, at the paper's layer. Centre, mean box and whole picture are one "
        "map for all images.\n\n" + markdown_table(rows, digits=1)
    )


def _masks(results: dict, protocol: Protocol) -> str:
    rows = _with_twins(list(MASKED), results, protocol)
    for row in rows[: len(protocol.models)]:
        row["paper, VOC"] = paper.find("table2", row["model"]).get("VOC mIoU")
    rows += _baseline_rows(list(COARSE), results, protocol, "masks")
    scored = next(r for r in results.values() if "checkpoints" in r)["checkpoints"][-1]["masks"]["ap"]
    return (
        f"On {scored['images']} photographs with masks at {protocol.mask_size} px, for which positions are "
        f"interpolated; {scored['objects']} objects, one for each class of an image.\n\n"
        + markdown_table(rows, digits=1)
    )


def _detection(results: dict, protocol: Protocol) -> str:
    rows = _with_twins(_MASKCUT, results, protocol)
    for row in rows[: len(protocol.models)]:
        numbers = paper.find("table2", row["model"])
        row["paper, COCO: box AP50 / AP"] = f"{numbers['box AP50']} / {numbers['box AP']}" if numbers else None
    where = "distractors found count as errors"
    if protocol.photographs:
        where = f"on photographs with masks at {protocol.mask_size} px"
    return f"At the paper's layer; {where}.\n\n" + markdown_table(rows, digits=1)


def _interval(found: Paired) -> str:
    if found.low is None:
        return f"{found.mean:+.1f}"
    return f"{found.mean:+.1f} ({found.low:.1f} to {found.high:.1f}; p = {found.p:.3f})"


def _pairs(protocol: Protocol) -> list[tuple[str, str]]:
    return [pair for pair in _PAIRS if pair[1] in protocol.models]


def _differences(results: dict, protocol: Protocol) -> str:
    columns = coarse_measures(results)
    columns += [name for name in ("box AP50", "mask AP") if _has(results, "maskcut")]
    rows = []
    for first, second in _pairs(protocol):
        row = {"": f"{first} − {second}"}
        for name in columns:
            scores = by_model(results, protocol, at_checkpoint(name))
            row[name] = _interval(paired(scores[first], scores[second]))
        rows.append(row)
    seeds = ", ".join(map(str, complete_seeds(results, protocol)))
    return (
        f"Paired over seeds ({seeds}): mean, 95 % interval by Student's t, p of the paired t-test. Nothing is "
        "corrected for the number of comparisons: of twenty without a difference one is expected at p < 0.05.\n\n"
        + markdown_table(rows)
    )


def _accuracy(results: dict, protocol: Protocol) -> str:
    scenes = _table({protocol.data: lambda r: 100 * r["checkpoints"][-1]["accuracy"]}, results, protocol)
    cifar = by_model(results, protocol, lambda r: 100 * r["validation"][-1]["val_accuracy"], "cifar10")
    with_cifar = bool(complete_seeds(results, protocol, "cifar10"))
    for row in scenes:
        for number, stage in enumerate(protocol.stages[:-1]):
            ends = by_seed(results, protocol, row["model"], lambda r, n=number: _accuracy_after(r, n))
            row[f"after stage {number + 1}, at {stage.image_size} px"] = _with_spread(ends)
        if not protocol.photographs:
            row["CIFAR-10"] = _with_spread(cifar[row["model"]]) if with_cifar else None
        lr = chosen_lr(results, protocol, row["model"])
        row["learning rate"] = None if lr is None else f"{lr:g}"
        row |= {
            f"sweep at {lr:g}": 100 * results[f"sweep-{row['model']}-lr{lr:g}"]["validation"][-1]["val_accuracy"]
            for lr in protocol.lrs
            if f"sweep-{row['model']}-lr{lr:g}" in results
        }
        row["parameters"] = by_seed(results, protocol, row["model"], lambda r: r["parameters"])[0]
    table = markdown_table(scenes, digits=1)
    if protocol.photographs:
        return (
            f"On test photographs at the end; sweeps on the photographs that learning rates are chosen by.\n\n{table}"
        )
    missing = "" if with_cifar else "\nCIFAR-10 was not at hand, or is not done.\n"
    error = 100 * (0.15 * 0.85 / protocol.selection_images) ** 0.5
    noise = f"on {protocol.selection_images} scenes an accuracy of 15 % has a standard error of {error:.1f}."
    return f"Chance is {100 / 12:.1f} on scenes and 10 on CIFAR-10. In a sweep, {noise}\n\n{table}{missing}"


def _at_equal_accuracy(results: dict, protocol: Protocol) -> str:
    accuracy, parts = common_accuracy(results, protocol), []
    for layer, where in (
        ("paper", "At the layer that the paper looks at"),
        ("chosen", f"At the layer best on other {protocol.kind}"),
    ):
        compared = [(model, None) for model in protocol.models]
        compared += [pair for pair in _pairs(protocol) if pair[1] in ORDER]
        rows = [{"": first if second is None else f"{first} − {second}"} for first, second in compared]
        for measure in (name for name in coarse_measures(results) if COARSE[name][0] != "topk"):
            scores = by_model(results, protocol, at_accuracy(measure, accuracy, layer))
            for row, (first, second) in zip(rows, compared, strict=True):
                if None in scores[first] or (second and None in scores[second]):
                    row[measure] = None
                elif second:
                    row[measure] = _interval(paired(scores[first], scores[second]))
                else:
                    row[measure] = _with_spread(scores[first])
        parts.append(f"{where}:\n\n{markdown_table(rows).strip()}")
    end = (
        "The verdicts above that are decided at equal accuracy come from the first of these tables."
        if protocol.photographs
        else "This was added after the results were known, and nothing is decided by it. A dash: not every run "
        "reached it."
    )
    text = (
        f"Each model when, in the first stage, it first classified {accuracy:.1f} % of its held-out {protocol.kind} "
        "rightly, the most that every run of Table 2's models did; on the line between two checkpoints, of which the "
        f"untrained twin is the first. {end}"
    )
    return "\n\n".join([text, *parts])


def _accuracy_after(result: dict, stage: int) -> float:
    """Return a run's held-out accuracy after a stage, at the stage's image size."""
    return 100 * [entry["val_accuracy"] for entry in result["validation"] if entry["stage"] == stage][-1]


def _white_box(results: dict, protocol: Protocol) -> str:
    rows = []
    for model in protocol.models:
        for index, when in ((0, "untrained"), (-1, "trained")):
            row = {"model": model, "": when}
            for name, title in (("coding_rate", "R^c"), ("sparsity", "non-zeros")):
                trends = _trends(results, protocol, model, index, name)
                row[f"{title}, first layer → last"] = trends and " · ".join(
                    f"{found['first']:.3g} → {found['last']:.3g}" for found in trends
                )
                row[f"{title} falls with depth"] = trends and " · ".join(found["falls"] for found in trends)
            if any(value for name, value in row.items() if name not in ("model", "")):
                rows.append(row)
    return "One entry a seed.\n\n" + markdown_table(rows)


def _trends(results: dict, protocol: Protocol, model: str, index: int, name: str) -> list[dict] | None:
    """Return the trend of R^c or sparsity over layers, a seed each; None for models without it."""
    if not all(by_seed(results, protocol, model, lambda result: has_measure(result, name))):
        return None
    curves = by_seed(results, protocol, model, lambda r: [row[name] for row in r["checkpoints"][index]["white_box"]])
    return [trend(curve) for curve in curves]


def _discussion(report: Path) -> list[str]:
    """Return the hand-written discussion, if the folder has one."""
    path = report / "discussion.md"
    return [path.read_text()] if path.is_file() else []


def _earlier(report: Path) -> list[str]:
    """Return the verdicts of earlier protocols, from the folders earlier/NAME."""
    parts = []
    for folder in sorted((report / "earlier").glob("*/protocol.json")):
        settings = json.loads(folder.read_text())
        settings.pop("size")
        before, name = Protocol.of_settings(settings), folder.parent.name
        verdicts = _claims(load_results(folder.parent), before, before.primary)
        parts.append(f"### {name}\n\n[Its report](earlier/{name}/report.md).\n\n{verdicts}")
    return ["## Earlier protocols, and what came out", *parts] if parts else []


def _origin(results: dict, protocol: Protocol, size: str) -> str:
    runs = list(results.values())
    with_cifar = any(run["kind"] == "cifar10" for run in runs)
    planned = planned_runs(protocol, with_cifar)
    scoring = sum(checkpoint["seconds"] for run in runs for checkpoint in run.get("checkpoints", []))
    hours = (sum(run["training_seconds"] for run in runs) + scoring) / 3600
    if protocol.photographs:
        options = " --data photographs:DIR" + (" --masks coco:DIR" if _has(results, "masks") else "")
        left_out = ""
    else:
        options = " --cifar10 DIR" if with_cifar else ""
        left_out = "" if with_cifar else ", CIFAR-10's left out"
    facts = {
        "command": f"`crate-fast reproduce emergence --size {size}{options}`",
        "runs": f"{len(runs)} of {len(planned)}{left_out}",
        "seeds with all models": ", ".join(map(str, complete_seeds(results, protocol))),
        "hours of all runs together": f"{hours:.1f}, {scoring / 3600:.1f} of them scoring",
    }
    for title, name in (("hardware", "device"), ("commits", "commit"), ("torch", "torch")):
        facts[title] = ", ".join(dict.fromkeys(run["provenance"][name] for run in runs))
    facts |= {name.replace("_", " "): value for name, value in protocol.in_words().items()}
    return markdown_table([{"": name, " ": str(value)} for name, value in facts.items()])
