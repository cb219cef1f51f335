"""The command `crate-fast reproduce emergence`."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

from crate_fast.errors import UserError, require
from crate_fast.eval.common.results import reserve_folder
from crate_fast.eval.emergence.data import prepare_photographs
from crate_fast.eval.emergence.protocol import SIZES, Protocol
from crate_fast.eval.emergence.report import write_report
from crate_fast.eval.emergence.results import Results
from crate_fast.eval.emergence.runs import Folders, Resources, run_experiment
from crate_fast.options import main_of


def _command(options: argparse.Namespace) -> None:
    require("pycocotools", "scipy")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes {options.minutes}: give a finite number above 0, or leave it out for no limit")
    output = options.output or Path(f"runs/emergence/photographs-{options.size}")
    folders = Folders(output, options.report or output / "report")
    if options.report_only:
        protocol = _saved_protocol(folders.report, options.size)
        if protocol is None:
            raise UserError(f"{folders.report} holds no protocol.json: name a folder with results by --report")
    else:
        protocol = _prepared(options, folders)
        for folder, option in ((folders.report, "--report"), (folders.output, "--output")):
            if _saved_protocol(folder, options.size) != protocol:
                reserve_folder(folder, "protocol.json", {"size": options.size} | protocol.settings(), option)
        runs = protocol.planned_runs(options.models, options.seeds)
        if not run_experiment(runs, protocol, folders, Resources(options.device, options.jobs), options.minutes):
            print("stopped; the same command continues")
            return
        if not Results.load(folders.report, protocol).seeds:
            print(
                f"written:\n  {folders.report / 'results'}\nthe report follows when CRATE and ViT have a common seed"
            )
            return
    print(f"written:\n  {write_report(folders.report, protocol, options.size)}")


def _saved_protocol(folder: Path, size: str) -> Protocol | None:
    """Return the protocol whose results are in a folder, or None if it has none."""
    path = folder / "protocol.json"
    if not path.is_file():
        return None
    settings = json.loads(path.read_text())
    if settings["size"] != size:
        raise UserError(f"{folder} holds results of another --size than {size}: pass --size {settings['size']}")
    return Protocol.of_settings(settings)


def _prepared(options: argparse.Namespace, folders: Folders) -> Protocol:
    """Prepare the photographs, and return the protocol with the number of training images."""
    source = Path((options.data or "").removeprefix("photographs:"))
    if not options.data or not source.is_dir():
        raise UserError(f"--data {options.data or ''}: name a folder of photographs, with train and val")
    require("skimage")
    images = prepare_photographs(source, options.boxes, options.masks, folders.photographs)
    protocol = SIZES[options.size]
    if images < protocol.batch_size:
        raise UserError(
            f"{source} holds {images} training images, fewer than a batch of {protocol.batch_size}: use more images"
        )
    return dataclasses.replace(protocol, images=images)


main = main_of("reproduce emergence", _command)
