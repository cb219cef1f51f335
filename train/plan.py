"""Print what a training run will cost before it starts: `crate-fast plan --recipe in21k_paper --gpus 8`.

The command takes every setting of training and needs neither data nor a GPU: it counts on PyTorch's "meta" device and
with fake tensors. Hours need a measured rate (`--throughput`): a finished run's folder or summary.json, or a JSON
object, bare or under the key "throughput", with the entries of RATE in cost.py (patch_size null for a model without
patches) and optionally of CONDITIONS and ARCHITECTURE. A rate of another model is refused, and other conditions are
printed.
"""

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path

from crate_fast.errors import UserError, run_command
from crate_fast.train.config import build_config
from crate_fast.train.finetune import inheriting

NO_FOLDER = "(not given)"
NOT_IN_MEMORY = (
    "not in it: buffers of single operators, gradient buckets (ddp), gathered layers (fsdp, hsdp), batches of "
    "images, the allocator's fragments, the CUDA context (about half a GiB); torch.compile may keep less"
)


def _scaled(value: float, unit: str, base: int) -> str:
    power = int(math.log(value, base)) if value else 0
    prefix = ("", "K" if base == 1024 else "k", *"MGTPE")[power]
    return f"{value / base**power:.3f} {prefix}{unit}"


def _print(plan: dict) -> None:
    """Print the plan under the names that `--json` writes; what there is none of is left out."""
    count, kind = plan["devices"], "GPU" if plan["device"] == "cuda" else "CPU process"
    devices = f"{count} {kind}" + ("" if count == 1 else "es" if kind.endswith("s") else "s")
    hosts = f" on {plan['hosts']} hosts" if plan["hosts"] > 1 else ""
    print(f"{plan['recipe']} on {devices}{hosts}, {plan['parallel']}, {plan['precision']}")
    sections = {title: plan[title] for title in ("model", "schedule")}
    operations = {name: _scaled(value, "FLOP", 1000) for name, value in plan["flops"].items()}
    sections["operations of an image and of the run, the matrix products of the formula"] = operations
    memory = {name: _scaled(value, "iB", 1024) for name, value in plan["memory_bytes"].items() if value}
    sections[f"memory of a device, an estimate; {NOT_IN_MEMORY}"] = memory
    missing = {"hours": "not measured: pass --throughput with a finished run's folder, or a JSON file"}
    sections["measured rate"] = plan["throughput"] or missing
    sections["but"] = dict(enumerate(plan["remarks"], start=1))
    for name, rate in plan["rates"].items():
        asked = "as measured" if name == "measured" else f"for {rate['hours']:g} h"
        sections[f"{asked}: training steps alone, without evaluation, checkpoints and starting up"] = rate
    scenes = plan["data"]["dataset"] == "shape_scenes"
    sections["data"] = {"reads": "none: shape_scenes is made on the fly"} if scenes else plan["data"]
    for title, values in sections.items():
        if values:
            print(f"\n{textwrap.fill(title, 118)}")
        for name, value in values.items():
            text = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
            if value is not None:
                print(f"  {str(name).replace('_', ' '):<24}{text}")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the plan").add_argument
    add("--gpus", type=int, default=1, help="processes, one a device (default 1)")
    add("--hosts", type=int, default=1, help="machines they are on; parallel=hsdp shards within one (default 1)")
    add("--images", type=int, help="training images, for data that is not on this machine")
    add("--classes", type=int, help="classes, for data that is not on this machine")
    add("--throughput", type=Path, metavar="PATH", help="a measured rate: a finished run's folder, or a JSON file")
    add("--hours", type=float, help="print the rate that would finish the run in this many hours")
    add("--image-kb", type=float, help="average size of an image file in kB (110, as ImageNet's JPEGs; CIFAR's 3)")
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
        try:
            options.json.write_text(json.dumps(plan, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {options.json} cannot be written: {error.strerror}") from error
        print(f"\nwritten: {options.json}")


def main(argv: list[str] | None = None) -> int:
    """Print what a run would cost; returns the exit status."""
    return run_command(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
