"""The report of the experiment, written from saved results and pictures only."""

import itertools
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

Columns = dict[str, Callable[[dict], float | None]]  # column → function of a result
_PAIRS = tuple(itertools.combinations(ORDER, 2))
_FIGURES = (
    "Grids show freely licensed photographs from Python packages, at {size} px, and the models of the first seed. "
    "The photographs were chosen by licence before the runs. No model was trained on them."
)


def write_report(report: Path, protocol: Protocol, size: str) -> Path:
    """Write report.md and its figures into the folder with results/ and pictures/; return the path of report.md."""
    results = Results.load(report, protocol)
    if not results.seeds:
        raise UserError(
            f"{report / 'results'} does not hold runs of CRATE and ViT with a common seed, which the report needs: "
            "continue the experiment with these models"
        )
    figures = draw(results, load_pictures(report, protocol), report / "figures")
    beside, discussion = (report / "protocol.md").is_file(), report / "discussion.md"  # both written by hand
    protocol_page = "[protocol.md](protocol.md)" if beside else "docs/emergence/photographs/protocol.md"
    parts = [
        f"# Emergence on photographs: results ({size})",
        "Written by `crate-fast reproduce emergence` from the files in `results/` and `pictures/`. The rules were "
        f"fixed before the runs, in {protocol_page}. Scores are in percent, at the last checkpoint, on test "
        "photographs; ± is the standard deviation over seeds. Learning rates, fixed heads and the chosen layer "
        "come from other photographs, best heads from the object's truth; for boxes, thresholds and the one head "
        "come from the test photographs."
        + (" The section after the statements is written by hand." if discussion.is_file() else ""),
        "## Does the claim hold?",
        _verdicts(results),
        *([discussion.read_text()] if discussion.is_file() else []),
        "## Attention and boxes",
        _coarse(results),
        "## Boxes from attention (localization)",
        _boxes(results),
        *(_masks(results) if results.have("masks") else []),
        "## Differences between models",
        _differences(results),
        "## Accuracy",
        _accuracy(results),
        "## Attention at equal accuracy",
        _at_equal_accuracy(results),
        "## White box",
        _white_box(results),
        *(["## Not part of the comparison", _others(results)] if results.others else []),
        *(["## Figures", _FIGURES.format(size=protocol.mask_size)] if figures else []),
        *(f"![{CAPTIONS[name]}](figures/{path.name})\n\n*{CAPTIONS[name]}*" for name, path in figures.items()),
        "## How it was run",
        _origin(results, size),
    ]
    path = report / "report.md"
    write_text(path, "\n\n".join(part.strip() for part in parts) + "\n")
    return path


def _with_spread(values: Sequence[float | None]) -> str | None:
    if None in values:
        return None
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
    at = results.common_accuracy()
    reached = results.by_model(at_accuracy(primary, at)).values()
    learned = not any(None in values for values in reached)  # no run started above this accuracy
    parts = [
        f"On the primary score, {primary}, at the end of training:",
        _claims(results, primary),
        *([_order_at_figure_13(results)] if {*ORDER} <= {*results.models} else []),
        f"And at equal accuracy, where each run first reached {at:.1f} % on its held-out photographs, the "
        "highest accuracy that all reached:",
        _claims(results, primary, at) if learned else "Not every run reached this accuracy.",
        f"The best of {protocol.heads} heads is chosen with knowledge of the object, which favours it over the "
        "mean box, a single map. So these are the same statements with one head for all images, chosen "
        "on other photographs. They are not part of the protocol's decision:",
        _claims(results, primary.replace("best head", "fixed head")),
    ]
    return "\n\n".join(parts)


def _order_at_figure_13(results: Results) -> str:
    """Decide the last statement with CRATE-MHSA at its last but one layer, which the paper's Fig. 13 shows."""
    primary, layer = results.protocol.primary, max(0, results.protocol.depth - 2)
    scores = results.by_model(at_checkpoint(primary))
    scores["CRATE-MHSA"] = results.by_seed("CRATE-MHSA", at_checkpoint(primary, layer=layer))
    means = [statistics.fmean(values) for values in scores.values()]
    falls = all(a > b for a, b in itertools.pairwise(means))
    return (
        "The last statement takes CRATE-MHSA's last layer. At its last but one, which the paper's Fig. 13 shows, the "
        f"order {'holds' if falls else 'does not hold'}: {' / '.join(f'{mean:.1f}' for mean in means)}."
    )


# --- tables of scores ---


def _rows(results: Results, columns: Columns, title: str = "model") -> list[dict]:
    found = {name: results.by_model(value) for name, value in columns.items()}
    return [
        {title: model} | {name: _with_spread(values[model]) for name, values in found.items()}
        for model in results.models
    ]


def _pair_rows(results: Results, columns: Columns) -> list[dict]:
    """Return a row for each pair of compared models with its differences."""
    found, rows = {name: results.by_model(value) for name, value in columns.items()}, []
    for first, second in _PAIRS:
        if {first, second} <= {*results.models}:
            rows.append({"": f"{first} − {second}"})
            for name, values in found.items():
                both = values[first], values[second]
                rows[-1][name] = None if None in itertools.chain(*both) else str(paired(*both))
    return rows


def _with_twins(results: Results, measures: Sequence[str]) -> list[dict]:
    """Return rows at the paper's layer: the trained models and their untrained twins."""
    rows, twins = (_rows(results, {name: at_checkpoint(name, index) for name in measures}) for index in (-1, 0))
    return rows + [{**row, "model": f"{row['model']}, untrained"} for row in twins]


def _baseline_rows(results: Results, split: str) -> list[dict]:
    """Return one table row per baseline map, with the measures of attention as columns."""
    known = "box" if split == "test" else "mask"
    names = {"mean_mask": f"mean {known}", "random": "random maps", "constant": "constant mask"}
    names["true_mask"] = f"true {known}"
    prefix = "masks: " if split == "masks" else ""
    return [
        {"model": text}
        | {
            prefix + measure: f"{results.baselines(measure, split)[name]:.1f}"
            for measure in COARSE
            if name != "random" or measure.endswith("best head")  # best of as many random maps as heads
        }
        for name, text in names.items()
    ]


def _coarse(results: Results) -> str:
    rows = _with_twins(results, list(COARSE)) + _baseline_rows(results, "test")
    chosen = _rows(results, {name: at_checkpoint(name, layer="chosen") for name in COARSE})
    return (
        "At the paper's layer: the last but one of models with MSSA, the last of those with MHSA. For CRATE-MHSA "
        "this is our choice: the paper's Fig. 13 shows its last but one, and Table 2 names none. The best head is "
        "chosen for each object; the fixed head is one for all images, chosen on other photographs. An object is the "
        "area inside its boxes.\n\n"
        + markdown_table(rows, digits=1)
        + "\nAt the layer that is best on other photographs, chosen for each run and score:\n\n"
        + markdown_table(chosen, digits=1)
    )


def _boxes(results: Results) -> str:
    rows = _with_twins(results, list(BOXED))
    for prior, scores in results.last_of_crate["boxes"]["baselines"].items():
        rows.append({"model": prior})
        for name, (heads, score) in BOXED.items():
            found = scores[heads] if prior == "random" else scores
            rows[-1][name] = f"{100 * found[score]:.1f}"
    return (
        "Scored as by `crate-fast eval localization`, at the paper's layer. Centre and whole picture are one map "
        "for all images; the mean box is that of the other half of the images, on which also the one head is chosen."
        "\n\n" + markdown_table(rows, digits=1)
    )


def _masks(results: Results) -> list[str]:
    """Return the sections of the photographs with masks."""
    rows = _with_twins(results, MASKED) + _baseline_rows(results, "masks")
    detected = _with_twins(results, MASKCUT)
    for row, other in zip(rows, detected, strict=False):
        cited = paper.find("table2", row["model"])  # {} for an untrained model
        row["paper, VOC"] = cited.get("VOC mIoU")
        other["paper, COCO: box AP50 / AP"] = f"{cited['box AP50']} / {cited['box AP']}" if cited else None
    scored, size = results.last_of_crate["masks"]["ap"], results.protocol.mask_size
    return [
        "## Coarse segmentation (Fig. 4, Table 2)",
        f"On {scored['images']} photographs with masks, at {size} px with interpolated "
        f"positions; {scored['objects']} objects, one per class and image, without {scored['objects_without_patch']} "
        "smaller ones that cover no patch.\n\n" + markdown_table(rows, digits=1),
        "## MaskCut (Table 2)",
        f"At the paper's layer; on the photographs with masks, at {size} px.\n\n"
        + markdown_table(detected, digits=1),
    ]


def _others(results: Results) -> str:
    """Return the table of models that lack a compared seed."""
    measures = {"photographs": "accuracy", results.protocol.primary: "test", "mIoU mass, best head": "test"}
    measures |= {"MaxBoxAccV2, best head": "boxes", "masks: AP, best head": "masks"}
    rows = []
    for model, runs in results.others.items():
        rows.append({"model": model, "seeds": len(runs)})
        for name, group in measures.items():
            scored = all(group in run["checkpoints"][-1] for run in runs)
            value = at_checkpoint("accuracy" if group == "accuracy" else name)
            rows[-1][name] = _with_spread([value(run) for run in runs]) if scored else None
    return (
        "Models without a run of every compared seed, at the last checkpoint and the paper's layer. They are in no "
        "table, statement or mean above.\n\n" + markdown_table(rows)
    )


def _differences(results: Results) -> str:
    names = [*COARSE, *(("box AP50", "mask AP") if results.have("masks") else ())]
    rows = _pair_rows(results, {name: at_checkpoint(name) for name in names})
    seeds = ", ".join(map(str, results.seeds))
    return (
        f"Paired over seeds ({seeds}): mean, 95 % interval by Student's t, p of the paired t-test. p is not "
        "corrected for the number of comparisons: one in twenty is below 0.05 by chance.\n\n" + markdown_table(rows)
    )


def _accuracy(results: Results) -> str:
    rows = _rows(results, {"photographs": at_checkpoint("accuracy")})
    for row in rows:
        lr = results.chosen_lr(row["model"])
        row["learning rate"] = None if lr is None else f"{lr:g}"
        row |= {f"sweep at {lr:g}": 100 * accuracy for lr, accuracy in results.sweeps(row["model"]).items()}
        row["parameters"] = results.run(row["model"], results.seeds[0])["parameters"]
    table, lrs = markdown_table(rows, digits=1), results.protocol.lrs
    at_an_end = [row["model"] for row in rows if results.chosen_lr(row["model"]) in (min(lrs), max(lrs))]
    note = f" The best rate of {', '.join(at_an_end)} is at the end of the range: another may be better." * bool(
        at_an_end
    )
    return f"On test photographs at the end; sweeps on the selection photographs.{note}\n\n{table}"


def _at_equal_accuracy(results: Results) -> str:
    accuracy, parts = results.common_accuracy(), []
    for layer, where in (
        ("paper", "At the paper's layer"),
        ("chosen", "At the layer that is best on other photographs"),
    ):
        names = [name for name, (reading, _) in COARSE.items() if reading != "topk"]
        columns = {name: at_accuracy(name, accuracy, layer) for name in names}
        rows = _rows(results, columns, "") + _pair_rows(results, columns)
        parts.append(f"{where}:\n\n{markdown_table(rows).strip()}")
    text = (
        f"Each model when it first classified {accuracy:.1f} % of its held-out photographs correctly. "
        "This is the highest accuracy that every run of Table 2's models reached. Scores are "
        "interpolated between checkpoints, of which the untrained twin is the first. The statements at equal "
        "accuracy above are decided by the first of these tables."
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


def _origin(results: Results, size: str) -> str:
    runs, protocol = list(results.runs.values()), results.protocol
    scoring = sum(checkpoint["seconds"] for run in results.scored for checkpoint in run["checkpoints"])
    hours = (sum(run["training_seconds"] for run in runs) + scoring) / 3600
    planned = protocol.planned_runs()
    done = sum(run.name in results.runs for run in planned)
    further = f", and {len(runs) - done} that are not compared" if len(runs) > done else ""
    masks = " --masks coco:DIR" if results.have("masks") else ""
    facts = {
        "command": f"`crate-fast reproduce emergence --size {size} --data DIR{masks}`",
        "runs": f"{done} of {len(planned)}{further}",
        "seeds compared": ", ".join(map(str, results.seeds)),
        "hours of all runs together": f"{hours:.1f}, {scoring / 3600:.1f} of them scoring",
    }
    for title, name in (("hardware", "device"), ("commits", "commit"), ("torch", "torch")):
        facts[title] = "; ".join(dict.fromkeys(run["provenance"][name] for run in runs))
    in_fp32 = [
        f"{run['model']} {name[-1]}"
        for name, run in results.runs.items()
        if "checkpoints" in run and "fp32" in run["provenance"]["device"]
    ]
    facts["trained in fp32 (model, seed)"] = ", ".join(in_fp32) or "none"
    facts |= {name.replace("_", " "): value for name, value in protocol.in_words().items()}
    return markdown_table([{"": name, " ": str(value)} for name, value in facts.items()])
