"""The report of the experiment, written from saved results and pictures only."""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from crate_fast.errors import UserError
from crate_fast.eval.common import paper
from crate_fast.eval.common.results import markdown_table
from crate_fast.eval.emergence.figures import CAPTIONS, draw, load_pictures
from crate_fast.eval.emergence.protocol import ORDER, Protocol
from crate_fast.eval.emergence.results import (
    BOXED,
    COARSE,
    MASKCUT,
    MASKED,
    Results,
    at_accuracy,
    at_checkpoint,
    paired,
)
from crate_fast.eval.white_box import trend
from crate_fast.train.checkpoint import write_text

_PAIRS = (*itertools.pairwise(ORDER), ("CRATE", "ViT"), ("CRATE", "CRATE-sth"))
_PAPERS_LAYER = "the last but one of models with MSSA, the last of those with MHSA"
_CITED = {  # column of the paper's numbers → its cell for a row of the paper's Table 2, {} for other models
    "paper, VOC": lambda row: row.get("VOC mIoU"),
    "paper, COCO: box AP50 / AP": lambda row: f"{row['box AP50']} / {row['box AP']}" if row else None,
}


def write_report(report: Path, protocol: Protocol, size: str) -> Path:
    """Write report.md and its figures into the folder with results/ and pictures/; return the path of report.md."""
    results = Results.load(report, protocol)
    if not results.seeds():
        raise UserError(
            f"{report / 'results'} does not hold runs of CRATE and ViT with a common seed: continue the experiment"
        )
    figures = draw(results, load_pictures(report, protocol.kind), report / "figures")
    page = "photographs/protocol.md" if protocol.photographs else "protocol.md"
    protocol_page = "[protocol.md](protocol.md)" if (report / "protocol.md").is_file() else f"docs/emergence/{page}"
    coarse = "## Coarse segmentation (Fig. 4, Table 2)"
    parts = [
        f"# Emergence{' on photographs' if protocol.photographs else ''}: results ({size})",
        "Written by `crate-fast reproduce emergence` from the files in `results/` and `pictures/`. The rules were "
        f"fixed before the runs, in {protocol_page}. Scores are in percent, at the last checkpoint, on test "
        f"{protocol.kind} that were not used for any choice; ± is the standard deviation over seeds.",
        "## Does the claim hold?",
        _verdicts(results),
        *(path.read_text() for path in (report / "discussion.md",) if path.is_file()),  # written by hand
        "## Attention and boxes" if protocol.photographs else coarse,
        _coarse(results),
        *(["## Boxes from attention (localization)", _boxes(results)] if results.have("boxes") else []),
        *([coarse, _masks(results)] if results.have("masks") else []),
        *(["## MaskCut (Table 2)", _detection(results)] if results.have("maskcut") else []),
        "## Differences between models",
        _differences(results),
        "## Accuracy",
        _accuracy(results),
        "## Attention at equal accuracy",
        _at_equal_accuracy(results),
        "## White box",
        _white_box(results),
        *(["## Figures", _figures_note(protocol)] if figures else []),
        *(f"![{CAPTIONS[name]}](figures/{path.name})\n\n*{CAPTIONS[name]}*" for name, path in figures.items()),
        *_earlier(report),
        "## How it was run",
        _origin(results, size),
    ]
    path = report / "report.md"
    write_text(path, "\n\n".join(part.strip() for part in parts) + "\n")
    return path


def _figures_note(protocol: Protocol) -> str:
    if protocol.photographs:
        return (
            f"Grids show freely licensed photographs from Python packages, at {protocol.mask_size} px, and the "
            "models of the first seed. The photographs were chosen by licence before the runs. No model was "
            "trained on them."
        )
    text = "Grids show the first test scenes, and the models of the first seed."
    sizes = [stage.image_size for stage in protocol.stages]
    if len(set(sizes)) == 1:
        return text
    return (
        f"{text} All checkpoints are scored at {sizes[-1]} px. Those of the first stage were trained at {sizes[0]} "
        "px, where objects are smaller, so their accuracy at this size is not meaningful."
    )


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _claims(results: Results, measure: str, accuracy: float | None = None) -> str:
    found = results.claims(measure, accuracy)
    so_far = "" if results.complete else " so far"
    words = {True: "holds", False: "does not hold", None: "undecided"}
    rows = [{"statement": c.text, "": f"**{words[c.holds]}{so_far}**", measure: c.evidence} for c in found]
    holding = sum(claim.holds is True for claim in found)
    return f"{markdown_table(rows)}\n{holding} of {len(found)} statements hold{so_far}."


def _verdicts(results: Results) -> str:
    protocol, primary = results.protocol, results.protocol.primary
    if protocol.photographs:
        at = results.common_accuracy()
        reached = results.by_model(at_accuracy(primary, at))
        learned = not any(None in reached[model] for model in results.ranked)  # every run started below this accuracy
        parts = [
            f"On the primary score, {primary}, at the end of training:",
            _claims(results, primary),
            f"And at equal accuracy, where each run first reached {at:.1f} % on its held-out photographs, the "
            "highest accuracy that all reached:",
            _claims(results, primary, at) if learned else "Not every run reached this accuracy.",
        ]
    else:
        parts = [f"On the primary score, {primary}, as defined in the protocol:", _claims(results, primary)]
    parts += [
        f"The best of {protocol.heads} heads is chosen with knowledge of the object, which favours it over the "
        f"{protocol.fixed_map}, a single map. So these are the same statements with one head for all images, chosen "
        f"on other {protocol.kind}. They are not part of the protocol's decision:",
        _claims(results, primary.replace("best head", "fixed head")),
    ]
    if primary != Protocol.primary and not protocol.photographs:
        text = "By the paper's score, which decided the first protocol and depends on how far maps spread:"
        parts += [text, _claims(results, Protocol.primary)]
    return "\n\n".join(parts)


# --- tables of scores ---


def _rows(results: Results, columns: dict[str, Callable[[dict], float]]) -> list[dict]:
    found = {name: results.by_model(value) for name, value in columns.items()}
    return [
        {"model": model} | {name: _with_spread(values[model]) for name, values in found.items()}
        for model in results.models
    ]


def _with_twins(results: Results, measures: Sequence[str], cited: str | None = None) -> list[dict]:
    """Return rows at the paper's layer: the trained models, with a column of `_CITED`, and their untrained twins."""
    rows, twins = (_rows(results, {name: at_checkpoint(name, index) for name in measures}) for index in (-1, 0))
    for row in rows if cited else ():
        row[cited] = _CITED[cited](paper.find("table2", row["model"]))
    return rows + [{**row, "model": f"{row['model']}, untrained"} for row in twins]


def _baseline_rows(results: Results, measures: Sequence[str], split: str = "test") -> list[dict]:
    """Return one table row per baseline map, with the names of the measures as columns."""
    names = {"mean_mask": "mean mask", "random": "random maps", "constant": "constant mask", "true_mask": "true mask"}
    if results.protocol.photographs and split == "test":
        names |= {"mean_mask": "mean box", "true_mask": "true box"}
    prefix = "masks: " if split == "masks" else ""
    return [
        {"model": text}
        | {
            prefix + measure: f"{results.baselines(measure, split)[name]:.1f}"
            for measure in measures
            if name != "random" or measure.endswith("best head")  # best of as many random maps as heads
        }
        for name, text in names.items()
    ]


def _coarse(results: Results) -> str:
    measures, protocol = results.coarse_measures(), results.protocol
    rows = _with_twins(results, measures, None if protocol.photographs else "paper, VOC")
    rows += _baseline_rows(results, measures)
    chosen = _rows(results, {name: at_checkpoint(name, layer="chosen") for name in measures})
    objects = " An object is the area inside its boxes." if protocol.photographs else ""
    return (
        f"At the paper's layer: {_PAPERS_LAYER}. The best head is chosen for each image; the fixed head is one for "
        f"all images, chosen on other {protocol.kind}.{objects}\n\n"
        + markdown_table(rows, digits=1)
        + f"\nAt the layer that is best on other {protocol.kind}, chosen for each run and score:\n\n"
        + markdown_table(chosen, digits=1)
    )


def _boxes(results: Results) -> str:
    rows = _with_twins(results, list(BOXED))
    for prior, scores in results.scored[0]["checkpoints"][-1]["boxes"]["baselines"].items():
        rows.append({"model": prior})
        for name, (heads, score) in BOXED.items():
            found = scores[heads] if prior == "random" else scores
            rows[-1][name] = f"{100 * found[score]:.1f}"
    return (
        "Scored as by `crate-fast eval localization`, at the paper's layer. Centre, mean box and whole picture are "
        "the same map for all images.\n\n" + markdown_table(rows, digits=1)
    )


def _masks(results: Results) -> str:
    rows = _with_twins(results, MASKED, "paper, VOC")
    rows += _baseline_rows(results, list(COARSE), "masks")
    scored = results.scored[0]["checkpoints"][-1]["masks"]["ap"]
    return (
        f"On {scored['images']} photographs with masks, at {results.protocol.mask_size} px with interpolated "
        f"positions; {scored['objects']} objects, one per class and image.\n\n" + markdown_table(rows, digits=1)
    )


def _detection(results: Results) -> str:
    where = "detected distractors count as errors"
    if results.protocol.photographs:
        where = f"on the photographs with masks, at {results.protocol.mask_size} px"
    rows = _with_twins(results, MASKCUT, "paper, COCO: box AP50 / AP")
    return f"At the paper's layer; {where}.\n\n" + markdown_table(rows, digits=1)


def _pairs(results: Results) -> list[tuple[str, str]]:
    return [pair for pair in _PAIRS if {*pair} <= {*results.models}]


def _differences(results: Results) -> str:
    columns = results.coarse_measures()
    columns += [name for name in ("box AP50", "mask AP") if results.have("maskcut")]
    scores = {name: results.by_model(at_checkpoint(name)) for name in columns}
    rows = [
        {"": f"{first} − {second}"}
        | {name: str(paired(scores[name][first], scores[name][second])) for name in columns}
        for first, second in _pairs(results)
    ]
    seeds = ", ".join(map(str, results.seeds()))
    return (
        f"Paired over seeds ({seeds}): mean, 95 % interval by Student's t, p of the paired t-test. p is not "
        "corrected for the number of comparisons: one in twenty is below 0.05 by chance.\n\n" + markdown_table(rows)
    )


def _accuracy(results: Results) -> str:
    protocol = results.protocol
    rows = _rows(results, {protocol.data: at_checkpoint("accuracy")})
    cifar = results.by_model(lambda r: 100 * r["validation"][-1]["val_accuracy"], "cifar10")
    with_cifar = bool(results.seeds("cifar10"))
    for row in rows:
        model = row["model"]
        for number, stage in enumerate(protocol.stages[:-1]):  # held-out accuracy, at the stage's image size
            validations = results.by_seed(model, lambda r: r["validation"])
            ends = [[100 * e["val_accuracy"] for e in entries if e["stage"] == number][-1] for entries in validations]
            row[f"after stage {number + 1}, at {stage.image_size} px"] = _with_spread(ends)
        if not protocol.photographs:
            row["CIFAR-10"] = _with_spread(cifar[model]) if with_cifar else None
        lr = results.chosen_lr(model)
        row["learning rate"] = None if lr is None else f"{lr:g}"
        row |= {f"sweep at {lr:g}": 100 * accuracy for lr, accuracy in results.sweeps(model).items()}
        row["parameters"] = results.by_seed(model, lambda r: r["parameters"])[0]
    table = markdown_table(rows, digits=1)
    if protocol.photographs:
        return f"On test photographs at the end; sweeps on the selection photographs.\n\n{table}"
    missing = "" if with_cifar else "\nThe CIFAR-10 runs are missing or incomplete.\n"
    error = 100 * (0.15 * 0.85 / protocol.selection_images) ** 0.5
    noise = f"on {protocol.selection_images} scenes an accuracy of 15 % has a standard error of {error:.1f}."
    return f"Chance is {100 / 12:.1f} on scenes and 10 on CIFAR-10. In a sweep, {noise}\n\n{table}{missing}"


def _at_equal_accuracy(results: Results) -> str:
    protocol, accuracy, parts = results.protocol, results.common_accuracy(), []
    for layer, where in (
        ("paper", "At the paper's layer"),
        ("chosen", f"At the layer that is best on other {protocol.kind}"),
    ):
        compared = [(model, None) for model in results.models]
        compared += [pair for pair in _pairs(results) if pair[1] in ORDER]
        rows = [{"": first if second is None else f"{first} − {second}"} for first, second in compared]
        for measure in (name for name in results.coarse_measures() if COARSE[name][0] != "topk"):
            scores = results.by_model(at_accuracy(measure, accuracy, layer))
            for row, (first, second) in zip(rows, compared, strict=True):
                if None in scores[first] or (second and None in scores[second]):
                    row[measure] = None
                elif second:
                    row[measure] = str(paired(scores[first], scores[second]))
                else:
                    row[measure] = _with_spread(scores[first])
        parts.append(f"{where}:\n\n{markdown_table(rows).strip()}")
    end = (
        "The statements at equal accuracy above are decided by the first of these tables."
        if protocol.photographs
        else "This comparison was added after the results were known, and decides nothing. A dash means that not "
        "every run reached this accuracy."
    )
    stage = ", in the first stage" if len(protocol.stages) > 1 else ""
    text = (
        f"Each model when it first classified {accuracy:.1f} % of its held-out {protocol.kind} correctly{stage}. "
        "This is the highest accuracy that every run of Table 2's models reached. Scores are "
        f"interpolated between checkpoints, of which the untrained twin is the first. {end}"
    )
    return "\n\n".join([text, *parts])


def _white_box(results: Results) -> str:
    rows, layers = [], range(results.protocol.depth)
    for model, (index, when) in itertools.product(results.models, ((0, "untrained"), (-1, "trained"))):
        row = {}
        for name, title in (("coding_rate", "R^c"), ("sparsity", "non-zeros")):
            if model not in results.with_measure(name):
                continue
            by_layer = [results.by_seed(model, at_checkpoint(name, index, layer)) for layer in layers]
            trends = [trend(values) for values in zip(*by_layer, strict=True)]
            ends = (f"{found['first']:.3g} → {found['last']:.3g}" for found in trends)
            row[f"{title}, first layer → last"] = " · ".join(ends)
            row[f"{title} falls with depth"] = " · ".join(found["falls"] for found in trends)
        if row:
            rows.append({"model": model, "": when} | row)
    words = (
        '"yes": the value falls at every step; "in part": its rank correlation with depth is negative; "no": neither.'
    )
    return f"One entry for each seed. {words}\n\n{markdown_table(rows)}"


# --- the other parts ---


def _earlier(report: Path) -> list[str]:
    """Return the verdicts of earlier protocols, from the folders earlier/NAME."""
    parts = []
    for path in sorted((report / "earlier").glob("*/protocol.json")):
        before, name = Protocol.of_settings(json.loads(path.read_text())), path.parent.name
        verdicts = _claims(Results.load(path.parent, before), before.primary)
        parts.append(f"### {name}\n\n[Its report](earlier/{name}/report.md).\n\n{verdicts}")
    return ["## Earlier protocols and their results", *parts] if parts else []


def _origin(results: Results, size: str) -> str:
    runs, protocol = list(results.runs.values()), results.protocol
    with_cifar = any(run["kind"] == "cifar10" for run in runs)
    scoring = sum(checkpoint["seconds"] for run in results.scored for checkpoint in run["checkpoints"])
    hours = (sum(run["training_seconds"] for run in runs) + scoring) / 3600
    if protocol.photographs:
        options = " --data photographs:DIR" + (" --masks coco:DIR" if results.have("masks") else "")
        without = ""
    else:
        options = " --cifar10 DIR" if with_cifar else ""
        without = "" if with_cifar else ", CIFAR-10's left out"
    left_out = [model for model in protocol.models if model not in results.models]
    facts = {
        "command": f"`crate-fast reproduce emergence --size {size}{options}`",
        "runs": f"{len(runs)} of {len(protocol.planned_runs(with_cifar))}{without}",
        "seeds compared": ", ".join(map(str, results.seeds())),
        **({"models left out, without these seeds": ", ".join(left_out)} if left_out else {}),
        "hours of all runs together": f"{hours:.1f}, {scoring / 3600:.1f} of them scoring",
    }
    for title, name in (("hardware", "device"), ("commits", "commit"), ("torch", "torch")):
        facts[title] = "; ".join(dict.fromkeys(run["provenance"][name] for run in runs))
    facts |= {name.replace("_", " "): value for name, value in protocol.in_words().items()}
    return markdown_table([{"": name, " ": str(value)} for name, value in facts.items()])
