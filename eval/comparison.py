"""Several models in one table beside the paper's numbers (paper, Tables 1 and 2, Fig. 4).

    crate-fast eval comparison --table table1 CRATE-S/8=A ViT-S/8=B DINO-S/8=vit_small_patch8_224.dino@pretrained \\
        --coco coco:PATH
    crate-fast eval comparison --table table2 CRATE=A CRATE-MLP=B CRATE-MHSA=C ViT=D --coco coco:PATH --voc voc:PATH
    crate-fast eval comparison --table figure4 CRATE-S/8=A ViT-S/8=B --voc voc:PATH

A model whose name is one of the paper's gets the paper's numbers and the gap beside ours; another has only ours.
"""

import argparse
import sys

from torch.utils.data import Dataset

from crate_fast.errors import UserError, run_command
from crate_fast.eval import by_layer, coarse_segmentation
from crate_fast.eval.by_layer import check_measures
from crate_fast.eval.common import paper
from crate_fast.eval.common.command import evaluation_parser, open_models, output_folder, positive, settings_of
from crate_fast.eval.common.images import open_images
from crate_fast.eval.common.models import Subject
from crate_fast.eval.common.results import raise_failures, say_written, write_results, write_table
from crate_fast.eval.maskcut import PAPER, MaskCutSettings

__all__ = ["compare", "evaluate", "main"]

NEEDS = {"table1": ("maskcut",), "table2": ("maskcut", "coarse"), "figure4": ("coarse",)}


def evaluate(
    subject: Subject,
    images: Dataset,
    measure: str,
    layer: int | None = None,
    threshold: str = "topk",
    settings: MaskCutSettings = PAPER,
    problems: list[str] | None = None,
    **reading,
) -> dict[str, float]:
    """One model's numbers at one layer under the names of the paper's columns, in percent.

    Args:
        subject: The model.
        images: Of `Sample`s at its image size, with the annotations that the measure needs.
        measure: "maskcut" or "coarse".
        layer: The model's default layer when None.
        threshold: Of "coarse"; "topk" is the paper's words.
        settings: Of MaskCut.
        problems: Filled with what could not be read.
        **reading: See `images.batches`.

    Returns:
        "box AP50", "box AP75", "box AP", the same of "mask", "box AR100", "mask AR100" and "COCO images"; or "VOC
        mIoU", "random maps" and "constant mask", what those score, "attention AP", which needs no threshold, and "VOC
        images".
    """
    layer = subject.extract.resolve_layer(layer)
    numbers = by_layer.evaluate(subject, images, [layer], [measure], settings, problems, **reading)[layer]
    if measure == "maskcut":
        return {"COCO images" if name == "images" else name: value for name, value in numbers.items()}
    name = coarse_segmentation.NAMES[threshold]
    scores = {"VOC mIoU": numbers[name], "random maps": numbers[f"random {name}"]}
    others = {"constant mask": numbers["constant"], "attention AP": numbers["attention AP"]}
    return scores | others | {"VOC images": numbers["images"]}


def compare(table: str, ours: dict[str, dict[str, float]]) -> list[dict]:
    """Rows of the table: ours, the paper's and the gap (ours − paper's) of each column the paper has.

    Args:
        table: "table1", "table2" or "figure4".
        ours: Model's name → column → number.

    >>> compare("figure4", {"CRATE-S/8": {"VOC mIoU": 20.0}, "mine": {"VOC mIoU": 30.0}})[0]
    {'model': 'CRATE-S/8', 'VOC mIoU': 20.0, 'VOC mIoU paper': 23.9, 'VOC mIoU gap': -3.9}
    """
    known = list(dict.fromkeys(column for row in paper.TABLES[table].values() for column in row))
    rows = []
    for label, numbers in ours.items():
        theirs, row = paper.find(table, label), {"model": label}
        for column in known:
            value, said = numbers.get(column), theirs.get(column)
            gap = None if value is None or said is None else round(value - said, 6)
            row |= {column: value, f"{column} paper": said, f"{column} gap": gap}
        rows.append(row | {name: value for name, value in numbers.items() if name not in known})
    return rows


def _opened(options: argparse.Namespace, measure: str, data: str, size: int | None) -> list[tuple[Subject, Dataset]]:
    """The models at the measure's image size, each with the images, and checked."""
    opened = []
    for subject in open_models(argparse.Namespace(**(vars(options) | {"image_size": size}))):
        subject.extract.resolve_layer(options.layer)
        images = open_images(data, subject.extract.image_size[0], options.limit)
        check_measures([measure], subject, images, data)
        opened.append((subject, images))
    return opened


def _one_measure(
    options: argparse.Namespace,
    measure: str,
    opened: list[tuple[Subject, Dataset]],
    problems: list[str],
    failures: list[str],
) -> dict[str, dict[str, float]]:
    """Label → numbers; why a model has none is added to `failures`."""
    numbers = {}
    for subject, images in opened:
        found: list[str] = []
        reading = {"batch_size": options.batch_size, "workers": options.workers, "seed": options.seed}
        reading["progress"] = f"{measure}, {subject.label}"
        layer, threshold = options.layer, options.threshold
        try:
            numbers[subject.label] = evaluate(subject, images, measure, layer, threshold, problems=found, **reading)
        except UserError as error:
            failures.append(f"{subject.label}, {measure}: {error}")
        problems += [line for line in found if line not in problems]
    return numbers


def _command(options: argparse.Namespace) -> None:
    given = {
        "maskcut": (options.coco, "--coco", options.image_size),
        "coarse": (options.voc, "--voc", options.voc_size),
    }
    for measure in NEEDS[options.table]:
        if given[measure][0] is None:
            option = given[measure][1]
            raise UserError(f"--table {options.table} needs the images of {measure}: pass {option} KIND:PATH")
    problems: list[str] = []
    failures: list[str] = []
    ours: dict[str, dict[str, float]] = {}
    plan = {measure: _opened(options, measure, *given[measure][::2]) for measure in NEEDS[options.table]}
    output = output_folder(options, f"comparison_{options.table}")
    config = settings_of(options)
    for measure, opened in sorted(plan.items()):  # "coarse" first, which takes minutes where "maskcut" takes hours
        config[f"models for {measure}"] = [subject.facts for subject, _ in opened]
        for label, row in _one_measure(options, measure, opened, problems, failures).items():
            ours.setdefault(label, {}).update(row)
    if not ours:
        raise_failures(failures)
    rows = compare(options.table, ours)
    print(write_table(output, options.table, rows, digits=1))
    path = write_results(output, "comparison", config, {"rows": rows}, problems)
    tables = [output / f"{options.table}.{suffix}" for suffix in ("md", "csv", "tex")]
    print(
        "Numbers in %; gap: ours − the paper's, which are of 5,000 images of COCO val2017 and 1,449 of VOC2012 val."
    )
    say_written([path, *tables], problems)
    raise_failures(failures, output)


def main(argv: list[str] | None = None) -> int:
    """Run as the command line says; returns the exit status."""
    parser = evaluation_parser(
        "comparison", "Models in one table beside the paper's numbers.", data=False, image_size=480
    )
    parser.add_argument("--limit", type=positive, help="take the first so many images of each set; all when absent")
    parser.add_argument("--table", choices=sorted(NEEDS), required=True, help="which of the paper's")
    parser.add_argument("--coco", help="images for MaskCut, at --image-size, such as coco:PATH")
    parser.add_argument("--voc", help="images for coarse segmentation, such as voc:PATH")
    parser.add_argument("--voc-size", type=positive, help="their side in pixels; default the model's own")
    parser.add_argument("--layer", type=int, help="of every model; each one's own default when absent")
    parser.add_argument("--threshold", choices=("topk", "mass"), default="topk", help="of coarse segmentation")
    return run_command(lambda: _command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
