"""Print the cost of a training run before it starts: `crate-fast plan --recipe in21k_paper --gpus 8`.

The command accepts the settings of training and needs neither data nor a GPU. Operations are those of products.
Memory excludes operator workspaces, communication buffers, image batches, fragmentation and the CUDA context (about
half a GiB). Hours follow from `--images-per-s`, which every run logs, and exclude evaluations.
"""

import argparse

from crate_fast.errors import UserError, run_command
from crate_fast.options import positive, rate
from crate_fast.train.config import build_config
from crate_fast.train.finetune import inheriting, is_gone


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the plan").add_argument
    add("--gpus", type=positive, default=1, help="number of processes, one per device (default 1)")
    add("--images", type=positive, help="number of training images, for data that are not on this machine")
    add("--classes", type=positive, help="number of classes, for data that are not on this machine")
    add("--images-per-s", type=rate, help="measured training images per second of all devices, for the hours")


def _with_placeholders(values: dict, chosen: dict) -> dict:
    """Merge settings, with placeholders for a missing data folder and initial weights that are not given."""
    init = (values | chosen).get("init", "")
    if init and is_gone(init):
        raise UserError(f"--init {init} does not exist: name a run or a weights file, or leave it out")
    missing = {name: "(not given)" for name in ("data_dir", "init") if not values.get(name)}
    return inheriting(values, missing | chosen)


def _run(argv: list[str] | None) -> None:
    how = {"prog": "crate-fast plan", "add_options": _add_options, "adjust": _with_placeholders}
    config, options = build_config(argv, __doc__.partition(":")[0], "shape_scenes", **how)
    from crate_fast.train.cost import make_plan  # imports torch, which is slow: after command-line errors

    device = "cuda" if config.device == "auto" else config.device
    print(f"{config.model} on {options.gpus} × {device} ({config.parallel}); memory is an estimate per device")
    for name, value in make_plan(config, options).items():
        print(f"  {name:<28}{value:,}" if isinstance(value, int) else f"  {name:<28}{value:,.5g}")
    if not options.images_per_s:
        print("  hours                       unknown: pass --images-per-s, which runs log")


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` and print the plan; return the exit status."""
    return run_command(_run, argv)
