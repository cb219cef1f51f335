"""Segmentation over training: AP, mIoU and principal components at every checkpoint of a run (paper, Fig. 10).

A run keeps only its newest checkpoints unless it was trained with `--keep-checkpoints 100`. Step 0 is the untrained
model, initialised from `--seed`.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

from crate_fast.errors import UserError
from crate_fast.eval.by_layer import check_measures, curves, evaluate
from crate_fast.eval.common.command import Evaluation, open_data
from crate_fast.eval.common.figures import Picture, curve_figure, image_grid, image_picture
from crate_fast.eval.common.images import readable
from crate_fast.eval.common.models import check_model_args, open_model, split_label
from crate_fast.eval.pca import component_colours
from crate_fast.options import main_of
from crate_fast.train.checkpoint import CheckpointError, manifest
from crate_fast.train.distributed import choose_device
from crate_fast.train.runs import checkpoint_steps


def _command(options: argparse.Namespace) -> None:
    check_model_args(options.model_args, [])
    label, source = split_label(options.models[0])
    run = Path(source)
    steps = checkpoint_steps(run)
    chosen = steps if options.steps is None else sorted(set(options.steps))
    absent = sorted(set(chosen) - set(steps))
    if absent:
        raise UserError(f"--steps {absent[0]}: {run} has no such checkpoint; choose from {steps}")
    options.device = str(choose_device(options.device))
    opening = {"device": options.device, "image_size": options.image_size, "seed": options.seed}
    untrained = open_model(f"{run}@untrained", **opening)
    layer = untrained.extract.resolve_layer(options.layer)
    images = open_data(options, untrained)
    measures = check_measures(options.measures, untrained, images, options.data)
    evaluation = Evaluation("by_epoch", options, [])
    shown = [sample.image for _, sample in itertools.islice(readable(images), 4)]
    columns = [[image_picture(image) for image in shown]]
    facts: list[dict] = []
    left_out: dict[int, str] = {}
    results: dict[int, dict[str, float]] = {}
    for step in chosen if untrained.config.init else [0, *chosen]:  # a run with `init` did not start untrained
        try:
            loaded = open_model(f"{run}@{step}", **opening) if step else untrained
        except CheckpointError as error:  # a damaged checkpoint does not stop the others
            print(f"left out: step {step}: {error}", file=sys.stderr)
            left_out[step] = str(error)
            continue
        facts.append(loaded.facts)
        reading = evaluation.reading(f"step {step}")
        results[step] = evaluate(loaded, images, [layer], measures, options.seed, **reading)[layer]
        features = loaded.features(torch.stack(shown), [layer])  # one PCA per image (paper, Fig. 10, right)
        colours = [component_colours(tokens[None], features.grid) for tokens in features.keys(layer).cpu()]
        columns.append([c if c is None else Picture(c.view(*features.grid, 3).numpy()) for c in colours])
    if not results.keys() - {0}:
        raise UserError(f"{run}: none of the steps {chosen} can be read; first problem: {left_out[chosen[0]]}")
    epochs = {step: manifest(run / "checkpoints", step)["epoch"] if step else 0.0 for step in results}
    rows = [{"step": step, "epoch": epochs[step], **numbers} for step, numbers in results.items()]
    evaluation.write_table("table", rows, digits=2)
    along = {epochs[step]: numbers for step, numbers in results.items()}
    curve_figure(curves({label: along}), "epoch", evaluation.figure("by_epoch"), from_zero=True, columns=3)
    titles = [f"epoch {epochs[step]:g}" for step in results]
    image_grid(list(zip(*columns, strict=True)), evaluation.figure("components"), column_titles=["image", *titles])
    notes = ["all numbers except counts are in %"]
    evaluation.finish({"rows": rows, "left_out": left_out}, {"layer": layer, "models": facts}, notes)


main = main_of("eval by_epoch", _command)
