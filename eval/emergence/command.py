"""The command `crate-fast reproduce emergence`."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

from crate_fast.errors import UserError, require
from crate_fast.eval.common.results import claim
from crate_fast.eval.emergence.data import prepare_photographs
from crate_fast.eval.emergence.protocol import SIZES, Protocol
from crate_fast.eval.emergence.report import write_report
from crate_fast.eval.emergence.runs import Folders, Resources, run_experiment
from crate_fast.options import main_of


def _command(options: argparse.Namespace) -> None:
    require("pycocotools", "scipy")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes {options.minutes}: give a finite number above 0, or leave it out for no limit")
    data, _, source = options.data.partition(":")
    if data not in SIZES or (source and data != "photographs"):
        raise UserError(f"--data {options.data}: write shape_scenes, or photographs:DIR")
    protocol = SIZES[data][options.size]
    name = f"photographs-{options.size}" if protocol.photographs else options.size
    output = options.output or Path("runs/emergence") / name
    folders = Folders(output, options.report or output / "report", options.cifar10)
    if options.report_only:
        path = folders.report / "protocol.json"
        if not path.is_file():
            raise UserError(f"{folders.report} holds no protocol.json: name a folder with results by --report")
        settings = json.loads(path.read_text())
        size = settings["size"]
        if size != options.size:
            raise UserError(
                f"{folders.report} holds results of another --size than {options.size}: pass --size {size}"
            )
        print(f"written:\n  {write_report(folders.report, Protocol.of_settings(settings), options.size)}")
        return
    if protocol.photographs:
        protocol = _with_photographs(options, source, protocol, folders)
    elif options.boxes or options.masks:
        raise UserError("--boxes and --masks belong to --data photographs:DIR: leave them out")
    cifar10 = folders.cifar10
    if cifar10 and not (cifar10 / "train").is_dir() and not (cifar10 / "cifar-10-batches-py").is_dir():
        raise UserError(
            f"--cifar10 {cifar10} holds neither train/ and test/ with one folder of images per class, nor "
            "torchvision's cifar-10-batches-py: name another folder, or leave the option out"
        )
    resources = Resources(options.device, options.jobs)
    settings = {"size": options.size} | protocol.settings()
    claim(folders.report, "protocol.json", settings, "--report")
    claim(folders.output, "protocol.json", settings)
    if not run_experiment(protocol, folders, resources, options.minutes):
        print("stopped; the same command continues")
        return
    print(f"written:\n  {write_report(folders.report, protocol, options.size)}")


def _with_photographs(options: argparse.Namespace, source: str, protocol: Protocol, folders: Folders) -> Protocol:
    """Prepare the photographs, and return the protocol with the number of training images."""
    if not source or not Path(source).is_dir():
        raise UserError(f"--data {options.data}: write photographs:DIR, a folder with train and val")
    if folders.cifar10:
        raise UserError("--cifar10 belongs to --data shape_scenes: leave it out")
    require("skimage")
    images = prepare_photographs(Path(source), options.boxes, options.masks, folders.photographs)
    needed = protocol.stages[0].batch_size
    if images < needed:
        raise UserError(f"{source} holds {images} training images, fewer than a batch of {needed}: use more images")
    stages = tuple(dataclasses.replace(stage, images=images) for stage in protocol.stages)
    return dataclasses.replace(protocol, stages=stages)


main = main_of("reproduce emergence", _command)
