"""White-box curves: R^c of each layer's subspace tokens, and the share of non-zeros after ISTA.

CRATE is derived to minimise both, so both should fall with depth. The command prints for each model, trained or
untrained, whether they do. Absolute values of R^c grow with the number of heads, the head width and 1/ε: compare them
within a model only.
"""

import argparse
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from crate_fast.errors import UserError
from crate_fast.eval.common.command import Evaluation, open_data, open_models
from crate_fast.eval.common.figures import Curve, curve_figure
from crate_fast.eval.common.images import Batch, batches
from crate_fast.eval.common.models import LoadedModel
from crate_fast.layers import ISTA, MSSA, ODL
from crate_fast.model import CRATE
from crate_fast.options import main_of
from crate_fast.whitebox import layer_measures

# measure → (column in tables, y-axis label in the figure or None without a panel)
MEASURES = {
    "coding_rate": ("R^c", "R$^c$ of the subspace tokens (nats)"),
    "coding_rate_after_mssa": ("R^c after MSSA", None),
    "sparsity": ("non-zeros", "share of non-zeros in the code"),
}


def left_out(model: nn.Module) -> dict[str, str]:
    """Return the measures that are undefined for a model: measure → reason."""
    reasons = {}
    first = model.transformer.layers[0] if isinstance(model, CRATE) else None
    if first is None or not isinstance(first[0].fn, MSSA):
        reason = "no subspaces: query, key and value are separate"
        reasons |= {"coding_rate": reason, "coding_rate_after_mssa": reason}
    if first is None or not isinstance(first[1].fn, ISTA | ODL):
        reasons["sparsity"] = "no sparse code: its tokens are dense"
    return reasons


def trend(values: Sequence[float]) -> dict:
    """Describe how a measure changes with depth, from its values by layer.

    Return its "first" and "last" value; "steps", the number of steps between layers, and "steps_down", how many of
    them fall; "spearman", the rank correlation of layer and value (ties share their mean rank; None for one layer or
    constant values); "falls": "yes" if every step falls, "in part" if "spearman" is negative, else "no".

    >>> trend([3.0, 2.0, 2.5, 1.0])["spearman"], trend([3.0, 2.0, 2.5, 1.0])["falls"]
    (-0.8, 'in part')
    """
    y = torch.tensor(values, dtype=torch.float64)
    ranks = (y[:, None] > y).sum(dim=1) + 0.5 * (y[:, None] == y).sum(dim=1)
    layers = torch.arange(len(y), dtype=torch.float64)
    ordered = len(y) > 1 and len(set(values)) > 1
    rho = round(torch.corrcoef(torch.stack([layers, ranks]))[0, 1].item(), 6) if ordered else None
    down = int((y.diff() < 0).sum())
    falls = "yes" if 0 < down == len(y) - 1 else "in part" if (rho or 0) < 0 else "no"
    ends = {"first": values[0], "last": values[-1]}
    return ends | {"steps_down": down, "steps": len(y) - 1, "spearman": rho, "falls": falls}


def evaluate(loaded: LoadedModel, image_batches: Iterable[Batch], epsilon: float = 0.01) -> dict:
    """Measure the white-box curves of one model.

    Args:
        loaded: Any model. Measures that are undefined for it are left out; if none remains, no image is read. Other
            arguments: see `crate_fast.eval`.
        epsilon: ε of R^c.

    Returns:
        "images", number of images; "layers", for each layer its index "layer" and for each measure the mean over
        images and, with the suffix "_std", the standard deviation; "trends", measure → `trend` of its means;
        "left_out", measure → reason.

    Raises:
        UserError: ε is not positive.
    """
    reasons = left_out(loaded.model)
    if len(reasons) == len(MEASURES):
        return {"images": 0, "layers": [], "trends": {}, "left_out": reasons}
    parts: dict[str, list[Tensor]] = {}
    for batch in image_batches:
        pixels = loaded.normalize(batch.images.to(loaded.device))
        for name, values in layer_measures(loaded.model, pixels, epsilon, after_mssa=True).items():
            parts.setdefault(name, []).append(values.double().cpu())
    measures = {name: torch.cat(parts[name]) for name in MEASURES if name in parts}  # each [images, depth]
    count, depth = next(iter(measures.values())).shape
    layers: list[dict] = [{"layer": index} for index in range(depth)]
    for name, values in measures.items():
        spread = values.std(dim=0, correction=0)
        for row, mean, std in zip(layers, values.mean(dim=0).tolist(), spread.tolist(), strict=True):
            row |= {name: mean, f"{name}_std": std}
    trends = {name: trend([row[name] for row in layers]) for name in measures}
    return {"images": count, "layers": layers, "trends": trends, "left_out": reasons}


def _command(options: argparse.Namespace) -> None:
    if not options.epsilon > 0:
        raise UserError(f"--epsilon {options.epsilon}: give a positive precision, such as the default 0.01")
    models = open_models(options)
    if all(len(left_out(loaded.model)) == len(MEASURES) for loaded in models):
        raise UserError("none of these models has subspaces or ISTA: name at least one CRATE")
    evaluation = Evaluation("white_box", options, models)
    results, by_layer, by_measure = {}, [], []
    panels: dict[str, list[Curve]] = {axis: [] for _, axis in MEASURES.values() if axis}
    for loaded in models:
        label, untrained = loaded.label, loaded.facts["model"].endswith("@untrained")
        read = batches(open_data(options, loaded), **evaluation.reading(f"white box, {label}"))
        result = results[label] = evaluate(loaded, read, options.epsilon)
        for row in result["layers"]:
            by_layer.append({"model": label, "layer": row["layer"]})
            for name, (column, _) in MEASURES.items():
                by_layer[-1] |= {column: row.get(name), f"{column} ±": row.get(f"{name}_std")}
        for name, (column, axis) in MEASURES.items():
            found = result["trends"].get(name, {"falls": result["left_out"].get(name)})
            by_measure.append({"model": label, "measure": column} | found)
            if axis and name in result["trends"]:
                points = [(row["layer"], row[name], row[f"{name}_std"]) for row in result["layers"]]
                panels[axis].append(Curve(label, *zip(*points, strict=True), dashed=untrained))
    evaluation.write_table("white_box", by_layer)
    evaluation.write_table("trends", by_measure)
    panels = {axis: curves for axis, curves in panels.items() if curves}
    curve_figure(panels, "layer", evaluation.figure("white_box"))
    evaluation.finish(results)


main = main_of("eval white_box", _command)
