"""Segmentation over training: AP, mIoU and principal components at every checkpoint of a run (paper, Fig. 10).

    crate-fast eval by_epoch runs/NAME --data coco:PATH

A run keeps its newest checkpoints alone unless it was trained with `--keep-checkpoints 100`. Step 0 is the model
before training, from `--seed`.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from crate_fast.errors import UserError, run_command
from crate_fast.eval.by_layer import MEASURES, check_measures, curves, measure_options
from crate_fast.eval.by_layer import evaluate as measure
from crate_fast.eval.common.command import evaluation_parser, output_folder, settings_of
from crate_fast.eval.common.figures import Picture, curve_figure, image_grid
from crate_fast.eval.common.images import open_images
from crate_fast.eval.common.models import Subject, open_model, split_label
from crate_fast.eval.common.principal_components import TooFewPatchesError, pca_rgb
from crate_fast.eval.common.results import say_written, write_results, write_table
from crate_fast.eval.maskcut import PAPER, MaskCutSettings
from crate_fast.train.checkpoint import CheckpointError
from crate_fast.train.distributed import choose_device
from crate_fast.train.runs import checkpoint_epoch, checkpoint_steps

__all__ = ["evaluate", "main"]


def evaluate(
    subjects: Iterable[tuple[int, Subject]],
    images: Dataset,
    layer: int | None = None,
    measures: Sequence[str] = MEASURES,
    settings: MaskCutSettings = PAPER,
    problems: list[str] | None = None,
    seed: int = 0,
    **reading,
) -> dict[int, dict[str, float]]:
    """Numbers of one layer at every step, in percent.

    Args:
        subjects: (optimiser step, the model then), opened one by one as they are asked for.
        images, measures, settings, seed, **reading: See `by_layer.evaluate`.
        layer: The model's default layer when None.
        problems: Filled with what could not be read.

    Returns:
        Step → numbers, as `by_layer.evaluate` names them.
    """
    rows, found = {}, []
    for step, subject in subjects:
        wanted = subject.extract.resolve_layer(layer)
        found.clear()  # the same images for every step
        titled = {**reading, "progress": f"step {step}"} if reading.get("progress") else reading
        rows[step] = measure(subject, images, [wanted], measures, settings, found, seed, **titled)[wanted]
    if problems is not None:
        problems.extend(found)
    return rows


@torch.no_grad()
def _figure(
    subjects: Iterable[tuple[int, Subject]], names: Sequence[str], images: Dataset, layer: int, paths: list[Path]
) -> None:
    """The first readable images, and their components 2 to 4 at each step (paper, Fig. 10, right)."""
    readable = (sample for sample in (images[i] for i in range(len(images))) if sample.problem is None)
    samples = list(itertools.islice(readable, 4))
    rows = [[Picture(sample.image.permute(1, 2, 0).numpy())] for sample in samples]
    pixels = torch.stack([sample.image for sample in samples])
    for _, subject in subjects:
        features = subject.extract(subject.normalize(pixels.to(subject.device)), [layer])
        for row, tokens in zip(rows, features.keys(layer).cpu(), strict=True):
            row.append(_colours(tokens, features.grid))
    image_grid(rows, paths, column_titles=["image", *names])


def _colours(tokens: Tensor, grid: tuple[int, int]) -> Picture | None:
    try:
        colours, _ = pca_rgb(tokens.unsqueeze(0), first=2)
    except TooFewPatchesError:
        return None
    return Picture(colours.view(*grid, 3).numpy())


def _command(options: argparse.Namespace) -> None:
    if options.model_args:
        raise UserError(f"--model-args {' '.join(options.model_args)}: a run knows its own model; leave them out")
    label, source = split_label(options.model)
    folder = Path(source)
    steps = checkpoint_steps(folder)
    chosen = steps if options.steps is None else options.steps
    absent = sorted(set(chosen) - set(steps))
    if absent:
        raise UserError(f"--steps {absent[0]}: {folder} has no such checkpoint; choose from {steps}")
    device = choose_device(options.device)
    options.device = str(device)
    names = {step: f"{label}={folder}@{step or 'untrained'}" for step in [0, *chosen]}
    facts: dict[int, dict] = {}
    left_out: dict[int, str] = {}

    def subjects() -> Iterator[tuple[int, Subject]]:
        for step, name in names.items():
            try:
                subject = open_model(name, device, options.image_size, seed=options.seed)
            except CheckpointError as error:  # one that is damaged does not lose the others' numbers
                if step not in left_out:
                    print(f"left out: step {step}: {error}", file=sys.stderr)
                left_out[step] = str(error)
                continue
            facts[step] = subject.facts
            yield step, subject

    first = next((subject for _, subject in subjects()), None)
    if first is None:
        raise UserError(f"{folder} has no checkpoint that can be read; the first: {next(iter(left_out.values()))}")
    layer = first.extract.resolve_layer(options.layer)
    images = open_images(options.data, first.extract.image_size[0], options.limit)
    measures = check_measures(options.measures, first, images, options.data)
    output = output_folder(options, "by_epoch")
    settings, problems = MaskCutSettings(options.num_objects, options.tau), []
    reading = {"batch_size": options.batch_size, "workers": options.workers, "progress": "step"}
    results = evaluate(subjects(), images, layer, measures, settings, problems, options.seed, **reading)

    if not results.keys() - {0}:
        raise UserError(f"{folder}: none of the steps {chosen} can be read; the first: {left_out[chosen[0]]}")
    epochs = {0: 0.0} | {step: checkpoint_epoch(folder, step) for step in chosen if step in results}
    known = None not in epochs.values()
    rows = [{"step": step, "epoch": epochs[step], **numbers} for step, numbers in results.items()]
    print(write_table(output, "table", rows, digits=2))
    config = settings_of(options) | {"layer": layer, "models": list(facts.values())}
    paths = [
        write_results(output, "by_epoch", config, {"rows": rows, "left_out": left_out}, problems),
        output / "table.md",
    ]
    charts = [output / "by_epoch.png", output / "by_epoch.pdf"]
    along = {epochs[step] if known else step: numbers for step, numbers in results.items()}
    xlabel = "epoch" if known else "optimiser step"
    curve_figure(curves({label: along}), xlabel, charts, from_zero=True, columns=3)
    pictures = [output / "components.png", output / "components.pdf"]
    titles = [f"epoch {epochs[step]:g}" if known else f"step {step}" for step in results]
    _figure(subjects(), titles, images, layer, pictures)
    print("numbers but counts in %")
    say_written(paths + charts + pictures, problems)


def main(argv: list[str] | None = None) -> int:
    """Run as the command line says; returns the exit status."""
    parser = evaluation_parser("by_epoch", "AP, mIoU and PCA over a run's checkpoints.", many=False, image_size=480)
    measure_options(parser)
    parser.add_argument("--layer", type=int, help="whose features; the last but one of CRATE, the last of a ViT")
    parser.add_argument("--steps", type=int, nargs="+", help="checkpoints; all when absent")
    return run_command(lambda: _command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
