"""Print the cost of a training run before it starts: `crate-fast plan --recipe in21k_paper --gpus 8`.

The command accepts every training setting and needs neither data nor a GPU. To estimate hours it needs the throughput
of a finished run of the same model (`--throughput`). Conditions that differ from that run are printed.
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
    "workspaces of operators, gradient buckets (ddp), gathered layers (fsdp, hsdp), image batches, allocator "
    "fragmentation and the CUDA context (about half a GiB); torch.compile may save less"
)


def _print(plan: dict) -> None:
    """Print the plan under its `--json` names, without empty values."""
    hosts = f" on {plan['hosts']} hosts" if plan["hosts"] > 1 else ""
    print(f"{plan['recipe']} on {plan['devices']} × {plan['device']}{hosts}, {plan['parallel']}, {plan['precision']}")
    operations = {name: f"{value:.3e} FLOP" for name, value in plan["flops"].items()}
    memory = {name: f"{value / 2**30:.3f} GiB" for name, value in plan["memory_bytes"].items() if value}
    for title, values in (
        ("model", plan["model"]),
        ("schedule", plan["schedule"]),
        ("operations per image and of the run (matrix products only)", operations),
        (f"estimated memory per device, without {NOT_IN_MEMORY}", memory),
        ("data", plan["data"]),
        ("measured throughput", plan["throughput"] or {"hours": "not measured: pass --throughput FINISHED_RUN"}),
        ("training at that throughput, without evaluations", plan["rate"]),
        ("differences from the measured run", dict(enumerate(plan["remarks"], start=1))),
    ):
        if values:
            print(f"\n{textwrap.fill(title, 118)}")
        for name, value in values.items():
            text = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
            if value is not None:
                print(f"  {str(name).replace('_', ' '):<24}{text}")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the plan").add_argument
    add("--gpus", type=positive, default=1, help="number of processes, one per device (default 1)")
    add("--hosts", type=positive, default=1, help="number of hosts; parallel=hsdp shards within each (default 1)")
    add("--images", type=positive, help="number of training images, for data that are not on this machine")
    add("--classes", type=positive, help="number of classes, for data that are not on this machine")
    add("--throughput", type=Path, metavar="RUN", help="folder of a finished run of this model, to estimate hours")
    add("--image-kb", type=positive, help="average image file size in kB (default: ImageNet's 110, CIFAR's 3)")
    add("--json", type=Path, metavar="FILE", help="also write the plan to FILE")


def _with_placeholders(values: dict, chosen: dict) -> dict:
    """Merge settings, with placeholders for a missing data folder and missing initial weights."""
    settings = {"data_dir": NO_FOLDER} | values | chosen
    if settings.get("init"):
        return settings | inheriting(values, chosen)
    return settings | ({"init": NO_FOLDER} if settings.get("head") == "new" else {})


def _run(argv: list[str] | None) -> None:
    description = "Parameters, operations, steps, memory, data volume and hours of a run, without starting it."
    how = {"prog": "crate-fast plan", "add_options": _add_options, "adjust": _with_placeholders}
    config, options = build_config(argv, description, "shape_scenes", **how)
    from crate_fast.train.cost import make_plan  # imports torch, which is slow: after command-line errors

    plan = make_plan(config, options)
    _print(plan)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(plan, indent=2) + "\n")
        print(f"\nwritten: {options.json}")


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` and print the plan; return the exit status."""
    return run_command(_run, argv)
