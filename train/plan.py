"""Print what a training run will cost before it starts: `crate-fast plan --recipe in21k_paper --gpus 8`.

The command takes every setting of training and needs neither data nor a GPU: it counts on PyTorch's "meta" device and
with fake tensors. Hours need a measured rate (`--throughput`), that of a finished run. A rate of another model is
refused, and other conditions are printed.
"""

import argparse
import json
import textwrap
from pathlib import Path

from crate_fast.errors import run_command
from crate_fast.options import positive
from crate_fast.train.config import build_config
from crate_fast.train.finetune import inheriting

NO_FOLDER = "(not given)"
NOT_IN_MEMORY = (
    "buffers of operators, gradient buckets (ddp), gathered layers (fsdp, hsdp), batches of images, the allocator's "
    "fragments and the CUDA context (about half a GiB); torch.compile may keep less"
)


def _print(plan: dict) -> None:
    """Print the plan under the names that `--json` writes; what there is none of is left out."""
    hosts = f" on {plan['hosts']} hosts" if plan["hosts"] > 1 else ""
    print(f"{plan['recipe']} on {plan['devices']} × {plan['device']}{hosts}, {plan['parallel']}, {plan['precision']}")
    operations = {name: f"{value:.3e} FLOP" for name, value in plan["flops"].items()}
    memory = {name: f"{value / 2**30:.3f} GiB" for name, value in plan["memory_bytes"].items() if value}
    for title, values in (
        ("model", plan["model"]),
        ("schedule", plan["schedule"]),
        ("operations of an image and of the run, the matrix products of the formula", operations),
        (f"memory of a device, an estimate without {NOT_IN_MEMORY}", memory),
        ("data", plan["data"]),
        ("measured rate", plan["throughput"] or {"hours": "not measured: pass --throughput with a finished run"}),
        ("training steps alone at that rate", plan["rate"]),
        ("but", dict(enumerate(plan["remarks"], start=1))),
    ):
        if values:
            print(f"\n{textwrap.fill(title, 118)}")
        for name, value in values.items():
            text = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
            if value is not None:
                print(f"  {str(name).replace('_', ' '):<24}{text}")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the plan").add_argument
    add("--gpus", type=positive, default=1, help="processes, one a device (default 1)")
    add("--hosts", type=positive, default=1, help="machines they are on; parallel=hsdp shards within one (default 1)")
    add("--images", type=positive, help="training images, for data that is not on this machine")
    add("--classes", type=positive, help="classes, for data that is not on this machine")
    add("--throughput", type=Path, metavar="RUN", help="the folder of a finished run of this model, for its rate")
    add("--image-kb", type=positive, help="average size of an image file in kB (110 as in ImageNet; 3 in CIFAR)")
    add("--json", type=Path, metavar="FILE", help="write the plan there as well")


def _without_files(values: dict, chosen: dict) -> dict:
    """Merge settings, with stand-ins for data and first weights that a recipe needs and nobody has named."""
    settings = {"data_dir": NO_FOLDER} | values | chosen
    if settings.get("init"):
        return settings | inheriting(values, chosen)
    return settings | ({"init": NO_FOLDER} if settings.get("head") == "new" else {})


def _run(argv: list[str] | None) -> None:
    description = "Parameters, operations, steps, memory, reads and hours of a training run, without starting it."
    how = {"prog": "crate-fast plan", "add_options": _add_options, "adjust": _without_files}
    config, options = build_config(argv, description, "shape_scenes", **how)
    from crate_fast.train.cost import make_plan  # torch takes seconds: errors of the command line come first

    plan = make_plan(config, options)
    _print(plan)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(plan, indent=2) + "\n")
        print(f"\nwritten: {options.json}")


def main(argv: list[str] | None = None) -> int:
    """Print what a run would cost; returns the exit status."""
    return run_command(_run, argv)
