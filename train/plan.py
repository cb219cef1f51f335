"""What a run will cost, before it is paid for: `crate-fast plan --recipe in21k_paper --gpus 8`.

It takes every setting of training, needs neither data nor a GPU, and prints parameters, operations, steps, memory and
reads. Hours come from a measured rate alone (`--throughput`): the summary of a finished run, however short, or a JSON
object, bare or under the key "throughput", with

    images_per_s_per_device   images a second in training, over the number of devices
    device                    its name, such as "NVIDIA H200"
    model, image_size, patch_size   as in a run's settings; patch_size in pixels, null for a model without patches
    precision, parallel, devices, batch_size   optional: what it was measured with; batch_size on one device, one pass

A rate of another model is refused; other circumstances are named beside the hours.
"""

import argparse
import dataclasses
import json
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from crate_fast import CRATE, CRATEMAE
from crate_fast.errors import UserError, run_command
from crate_fast.train import cost
from crate_fast.train.command_line import build_config, load_recipe
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import train_loader
from crate_fast.train.data.image_files import find_images
from crate_fast.train.data.shape_scenes import CLASSES
from crate_fast.train.finetune import inheriting

__all__ = ["DataSize", "Throughput", "find_data_size", "main", "make_plan", "read_throughput"]

KNOWN_SIZES = {  # training images, classes
    "in1k": (1_281_167, 1_000),
    "in21k": (14_197_122, 21_841),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "flowers102": (1_020, 102),
    "pets": (3_680, 37),
}
ARCHITECTURE = (
    *("dim", "depth", "heads", "residual", "attention", "sparsifier", "threshold"),
    *("decoder_depth", "visible_only", "mask_ratio"),
)
NO_FOLDER = "(not given)"
NOT_IN_MEMORY = (
    "not in it: buffers of single operators, gradient buckets (ddp), gathered layers (fsdp, hsdp), batches of "
    "images, the allocator's fragments, the CUDA context (about half a GiB); torch.compile may keep less"
)


# --- what is known of the data and of the speed


@dataclass(frozen=True)
class DataSize:
    """Training images and classes, and who says so."""

    images: int
    classes: int
    source: str


def _count_folder(split: Path) -> tuple[int, int]:
    """Return the images and classes of a folder, as training reads them."""
    tree = find_images(split)
    return (len(tree.names), len(tree.labelled(str(split))[0])) if tree.names else (0, 0)


def find_data_size(config: TrainConfig, recipe: str, images: int | None, classes: int | None) -> DataSize:
    """How large the training split is: as told, else counted, else known.

    Args:
        config: The run's.
        recipe: Its recipe; one that names a known data set (in1k_…, …_in21k) is taken to train on it.
        images, classes: What the command line says, or None.

    Raises:
        UserError: One of them is not known, or the folder is no data set.
    """
    split = Path(config.data_dir) / config.train_split
    known = next((word for word in Path(recipe).stem.split("_") if word in KNOWN_SIZES), "")
    if config.dataset == "shape_scenes":
        found, source = (config.train_samples, len(CLASSES)), "train_samples"
    elif config.dataset in KNOWN_SIZES:
        found, source = KNOWN_SIZES[config.dataset], f"the known size of {config.dataset}"
    elif None in (images, classes) and config.dataset == "folder" and split.is_dir():
        found, source = _count_folder(split), f"counted in {split}"
    elif known in KNOWN_SIZES:
        found, source = KNOWN_SIZES[known], f"the known size of {known}"
    else:
        found, source = (None, None), ""
    told = [option for option, value in (("--images", images), ("--classes", classes)) if value is not None]
    size = found[0] if images is None else images, found[1] if classes is None else classes
    for option, value in zip(("--images", "--classes"), size, strict=True):
        if not value:
            counted = f", and {source.removeprefix('counted in ')} holds none" if value == 0 else ""
            raise UserError(
                f"how many {option[2:]} dataset={config.dataset!r} has is not known{counted}: pass {option} N, or, "
                "for a folder on this machine, --data-dir and --train-split"
            )
    return DataSize(*size, ", ".join([*told, *([source] if len(told) < 2 else [])]))


@dataclass(frozen=True)
class Throughput:
    """A measured rate; see the head of this file for the fields of its file."""

    images_per_s_per_device: float
    device: str
    model: str
    image_size: int
    patch_size: int | None
    precision: str | None = None
    parallel: str | None = None
    devices: int | None = None
    batch_size: int | None = None


def read_throughput(path: Path, config: TrainConfig, patch_size: int | None) -> Throughput:
    """A measured rate from a JSON file, a run's summary.json or a run's folder.

    A run's own config.yaml, where it lies beside, says which architecture was measured; a bare file may have those
    settings (dim, depth, …) too.

    Args:
        path: Of the file or folder.
        config: The planned run's.
        patch_size: Of the planned model.

    Raises:
        UserError: There is no such file, it holds no rate, or the rate is of another model.
    """
    file = path / "summary.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--throughput {path}: no such file; give a finished run's folder or a JSON file")
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"--throughput {file} is not JSON: {error}") from error
    values = values.get("throughput", values) if isinstance(values, dict) else {}
    fields = {field.name: field for field in dataclasses.fields(Throughput)}
    missing = [f for f, field in fields.items() if field.default is dataclasses.MISSING and f not in values]
    if missing:
        raise UserError(f"--throughput {file} lacks {', '.join(missing)}: {Throughput.__doc__}")
    rate = values["images_per_s_per_device"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise UserError(f"--throughput {file}: images_per_s_per_device={rate!r} is not a positive number")
    settings = file.parent / "config.yaml"
    defaults = {name: getattr(TrainConfig, name) for name in ARCHITECTURE}
    measured = (defaults | load_recipe(str(settings)) if settings.is_file() else {}) | values
    planned = {"model": config.model, "image_size": config.image_size, "patch_size": patch_size}
    planned |= {name: getattr(config, name) for name in ARCHITECTURE if name in measured}
    if values["patch_size"] is None:  # the model's own
        planned["patch_size"] = config.patch_size
    differing = [
        f"{name} {measured[name]!r} measured, {value!r} planned"
        for name, value in planned.items()
        if measured[name] != value
    ]
    if differing:
        raise UserError(f"--throughput {file} is of another model ({'; '.join(differing)}): measure this one")
    return Throughput(**{name: values[name] for name in fields if name in values})


def _remarks(throughput: Throughput, planned: dict) -> list[str]:
    """What the measurement and the plan do not have in common, in words."""
    remarks = []
    for name in ("precision", "parallel", "batch_size"):
        measured = getattr(throughput, name)
        if measured is not None and measured != planned[name]:
            remarks.append(f"measured with {name} {measured}, planned with {planned[name]}")
    if throughput.devices != planned["devices"]:
        start = "an unknown number of" if throughput.devices is None else str(throughput.devices)
        remarks.append(f"assumes that the rate grows in proportion from {start} to {planned['devices']} devices")
    return remarks


# --- the plan


class _Sized(torch.utils.data.Dataset):
    """So many images, none of which can be looked at."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length


def _shards(config: TrainConfig, gpus: int, hosts: int) -> int:
    """Processes that hold one copy of the weights between them."""
    if gpus % hosts:
        raise UserError(f"--gpus {gpus} cannot be shared out to --hosts {hosts}: make it a multiple")
    return {"ddp": 1, "fsdp": gpus, "hsdp": gpus // hosts}[config.parallel]


def _device_and_dtype(config: TrainConfig) -> tuple[str, str, torch.dtype | None]:
    """(device type, precision, dtype of autocast) of the planned run; device="auto" is planned for a GPU."""
    device = "cpu" if config.device == "cpu" else "cuda"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    return device, precision, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _memory(model: nn.Module, config: TrainConfig, classes: int, shards: int, micro_batch: int) -> dict[str, int]:
    """Bytes on one device by what they are for."""
    parameters = list(model.parameters())
    share = {id(p): cost.share_of(p, shards) * p.element_size() for p in parameters}
    weights = sum(share.values())
    device, _, dtype = _device_and_dtype(config)
    kept = cost.kept_for_backward(model, config, micro_batch, device, dtype, classes)
    memory = {
        "weights": weights,
        "gradients": sum(share[id(p)] for p in parameters if p.requires_grad),
        "optimizer": cost.optimizer_bytes(model, config, shards),
        "ema": weights if config.ema_decay else 0,
        "activations": kept.total,
    }
    return memory | {
        "total": sum(memory.values()),
        "activations_per_image": kept.per_image,
        "activations_constant": kept.constant,
        "activations_recomputed_per_image": kept.recomputed_per_image,
    }


def _flops(model: nn.Module, config: TrainConfig, schedule: dict) -> dict:
    """Nominal operations of an image's forward pass and training step, and of the run."""
    flops = cost.count_flops(model, config.image_size, config.mask_ratio)
    return dataclasses.asdict(flops) | {"run": flops.step * schedule["images_seen"]}


def _rates(images_seen: int, gpus: int, throughput: Throughput | None, hours: float | None) -> dict:
    """By name: images a second of all devices, hours and GPU-hours."""
    seconds = {}
    if throughput is not None:
        seconds["measured"] = images_seen / (throughput.images_per_s_per_device * gpus)
    if hours is not None:
        seconds["for_hours"] = hours * 3600
    return {
        name: {"images_per_s": images_seen / s, "hours": s / 3600, "gpu_hours": gpus * s / 3600}
        for name, s in seconds.items()
    }


def _model_facts(model: nn.Module, config: TrainConfig, classes: int) -> dict:
    return {
        "name": config.model,
        "crate": isinstance(model, CRATE | CRATEMAE),
        "image_size": config.image_size,
        "patch_size": cost.patch_size_of(model),
        "tokens_per_image": cost.tokens_per_image(model),
        "classes": None if isinstance(model, CRATEMAE) else classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _schedule(config: TrainConfig, size: DataSize, gpus: int) -> dict:
    """Steps and images, as the trainer has them.

    Raises:
        UserError: The batch cannot be dealt out, or is larger than the data set.
    """
    train_loader(dataclasses.replace(config, workers=0), _Sized(size.images), world_size=gpus)  # for its errors
    steps_per_epoch = size.images // config.batch_size
    return {
        "images": size.images,
        "images_from": size.source,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "micro_batch": config.batch_size // (config.accumulate * gpus),
        "steps_per_epoch": steps_per_epoch,
        "steps": steps_per_epoch * config.epochs,
        "images_seen": steps_per_epoch * config.epochs * config.batch_size,
        "optimizer": config.optimizer,
        "peak_lr": config.peak_lr,
        "warmup_steps": math.ceil(config.warmup_epochs * steps_per_epoch),
    }


def make_plan(config: TrainConfig, options: argparse.Namespace) -> dict:
    """Everything that `crate-fast plan` prints, as plain values.

    Args:
        config: The run's.
        options: recipe, gpus, hosts, images, classes, throughput, hours and image_kb, as the command line has them.

    Raises:
        UserError: The run is impossible, or something about it is not known; the message says what to pass.
    """
    for name in ("gpus", "hosts", "images", "classes", "hours", "image_kb"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be above 0")
    gpus, shards = options.gpus, _shards(config, options.gpus, options.hosts)
    size = find_data_size(config, options.recipe, options.images, options.classes)
    schedule = _schedule(config, size, gpus)
    model = cost.meta_model(config, size.classes)
    facts = _model_facts(model, config, size.classes)
    throughput = read_throughput(options.throughput, config, facts["patch_size"]) if options.throughput else None
    device, precision, _ = _device_and_dtype(config)
    planned = {"precision": precision, "parallel": config.parallel, "devices": gpus}
    kb = options.image_kb or (3.0 if config.dataset.startswith("cifar") else 110.0)
    rates = _rates(schedule["images_seen"], gpus, throughput, options.hours)
    for rate in rates.values():
        rate["mb_per_s"] = rate["images_per_s"] * kb / 1e3
    return {
        "recipe": options.recipe,
        "hosts": options.hosts,
        "device": device,
        "shards": shards,
        **planned,
        "model": facts,
        "schedule": schedule,
        "flops": _flops(model, config, schedule),
        "memory_bytes": _memory(model, config, size.classes, shards, schedule["micro_batch"]),
        "data": {
            "dataset": config.dataset,
            "image_kb": kb,
            "gb_per_epoch": schedule["steps_per_epoch"] * config.batch_size * kb / 1e6,
        },
        "throughput": dataclasses.asdict(throughput) if throughput else None,
        "rates": rates,
        "remarks": _remarks(throughput, planned | {"batch_size": schedule["micro_batch"]}) if throughput else [],
        "settings": dataclasses.asdict(config),
    }


# --- what is printed


def _number(value: float, unit: str) -> str:
    """Three significant digits with a prefix from thousand up: "25.4 GFLOP"."""
    power = 0
    while value >= 999.5 and power < 6:
        value, power = value / 1000, power + 1
    digits = max(0, 2 - math.floor(math.log10(value))) if value >= 1 and power else 0
    return f"{value:.{digits}f} {' kMGTPE'[power].strip()}{unit}"


def _bytes(value: int) -> str:
    """Eleven characters: "  25.98 GiB"."""
    power = 3 if value >= 2**30 else 2 if value >= 2**20 else 1
    return f"{value / 1024**power:7.2f} {' KMG'[power]}iB"


def _count(number: int, noun: str) -> str:
    """A number of things."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _model_rows(plan: dict) -> list[tuple[str, str]]:
    model, trained = plan["model"], plan["model"]["parameters_trained"]
    patch = f", patches of {model['patch_size']} px" if model["patch_size"] else ""
    classes = f", {model['classes']:,} classes" if model["classes"] is not None else ""
    part = "all trained" if trained == model["parameters"] else f"{trained:,} of them trained"
    rows = [
        ("model", f"{model['name']}, {model['image_size']} px{patch}{classes}"),
        ("parameters", f"{model['parameters']:,} ({part})"),
    ]
    return rows + ([("tokens an image", f"{model['tokens_per_image']:,}")] if model["tokens_per_image"] else [])


def _schedule_rows(plan: dict) -> list[tuple[str, str]]:
    s = plan["schedule"]
    shares = [_count(plan["devices"], "device"), _count(s["micro_batch"], "image")]
    if s["accumulate"] > 1:
        shares.insert(1, _count(s["accumulate"], "pass"))
    warmup = _count(s["warmup_steps"], "warm-up step")
    return [
        ("training images", f"{s['images']:,} ({s['images_from']})"),
        ("batch", f"{s['batch_size']:,} = {' × '.join(shares)}"),
        ("steps", f"{s['steps']:,} = {_count(s['epochs'], 'epoch')} × {s['steps_per_epoch']:,}"),
        ("images seen", f"{s['images_seen']:,}"),
        ("learning rate", f"{s['peak_lr']:.3g} at its peak ({s['optimizer']}), {warmup}"),
    ]


def _flop_rows(plan: dict) -> list[tuple[str, str]]:
    names = {"forward pass": "forward", "training step": "step", "whole run": "run"}
    return [(name, _number(plan["flops"][key], "FLOP")) for name, key in names.items()]


def _memory_rows(plan: dict) -> list[tuple[str, str]]:
    m, images = plan["memory_bytes"], _count(plan["schedule"]["micro_batch"], "image")
    held = "each device holds all" if plan["parallel"] == "ddp" else f"sharded over {plan['shards']} devices"
    each, constant = _bytes(m["activations_per_image"]).strip(), _bytes(m["activations_constant"]).strip()
    rows = [
        ("weights", f"{_bytes(m['weights'])}  fp32, {held}"),
        ("gradients", _bytes(m["gradients"])),
        ("optimiser", f"{_bytes(m['optimizer'])}  {plan['schedule']['optimizer']}"),
        ("moving average", _bytes(m["ema"])),
        ("activations", f"{_bytes(m['activations'])}  kept for backward: {images} × {each} + {constant}"),
    ]
    if not m["ema"]:
        del rows[3]
    if m["activations_recomputed_per_image"]:
        again = _bytes(m["activations_recomputed_per_image"]).strip()
        rows.append(("", f"{'':11}  and {images} × {again} of the layer being recomputed"))
    missing = textwrap.wrap(NOT_IN_MEMORY, 92)
    return [*rows, ("sum", _bytes(m["total"])), *(("", line) for line in missing)]


def _time_rows(plan: dict) -> list[tuple[str, str]]:
    measured, rates = plan["throughput"], plan["rates"]
    rows = []
    if measured:
        rate = rates["measured"]
        rows = [
            ("measured", f"{measured['images_per_s_per_device']:,.1f} images/s on one {measured['device']}"),
            ("hours", f"{rate['hours']:,.2f} h, {rate['gpu_hours']:,.1f} device-hours: training steps alone,"),
            ("", "without evaluation, checkpoints and starting up"),
            *(("but", remark) for remark in plan["remarks"]),
        ]
    else:
        rows = [("hours", "not measured: pass --throughput with a finished run's folder, or a JSON file")]
    if "for_hours" in rates:
        rate = rates["for_hours"]
        each = rate["images_per_s"] / plan["devices"]
        rows.append((f"for {rate['hours']:g} h", f"{each:,.1f} images/s on each device, training steps alone"))
    return rows


def _data_rows(plan: dict) -> list[tuple[str, str]]:
    data = plan["data"]
    if data["dataset"] == "shape_scenes":
        return [("reads", "none: shape_scenes is made on the fly")]
    rows = [("an epoch", f"{data['gb_per_epoch']:,.1f} GB at {data['image_kb']:g} kB an image")]
    for name, rate in plan["rates"].items():
        sort = "as measured" if name == "measured" else f"for {rate['hours']:g} h"
        rows.append((sort, f"{rate['images_per_s']:,.0f} images/s from storage, {rate['mb_per_s']:,.1f} MB/s"))
    return rows


def _print_plan(plan: dict) -> None:
    devices = _count(plan["devices"], "GPU" if plan["device"] == "cuda" else "CPU process")
    hosts = f" on {plan['hosts']} hosts" if plan["hosts"] > 1 else ""
    print(f"{plan['recipe']} on {devices}{hosts}, {plan['parallel']}, {plan['precision']}")
    sections = {
        "model": _model_rows,
        "schedule": _schedule_rows,
        "operations of an image, the matrix products of the formula": _flop_rows,
        "memory, a device (an estimate)": _memory_rows,
        "time": _time_rows,
        "data": _data_rows,
    }
    for title, rows in sections.items():
        print(f"\n{title}")
        for name, text in rows(plan):
            print(f"  {name:<16}{text}")


# --- the command


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("of the plan").add_argument
    add("--gpus", type=int, default=1, help="processes, one a device (default 1)")
    add("--hosts", type=int, default=1, help="machines they are on; parallel=hsdp shards within one (default 1)")
    add("--images", type=int, help="training images, for data that is not on this machine")
    add("--classes", type=int, help="classes, for data that is not on this machine")
    add("--throughput", type=Path, metavar="PATH", help="a measured rate: a finished run's folder, or a JSON file")
    add("--hours", type=float, help="say which rate would finish the run in so many hours")
    add("--image-kb", type=float, help="average size of an image file in kB (110, as ImageNet's JPEGs; CIFAR's 3)")
    add("--json", type=Path, metavar="FILE", help="write the plan there as well")


def _without_files(values: dict, chosen: dict) -> dict:
    """The settings, with stand-ins for data and first weights that a recipe needs and nobody has named."""
    settings = {"data_dir": NO_FOLDER} | values | chosen
    if settings.get("init"):
        return settings | inheriting(values, chosen)
    return settings | ({"init": NO_FOLDER} if settings.get("head") == "new" else {})


def _print_cost(argv: list[str] | None) -> None:
    config, options = build_config(
        argv,
        "Parameters, operations, steps, memory, reads and hours of a training run, without starting it.",
        "shape_scenes",
        add_options=_add_options,
        adjust=_without_files,
    )
    plan = make_plan(config, options)
    _print_plan(plan)
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(plan, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {options.json} cannot be written: {error.strerror}") from error
        print(f"\nwritten: {options.json}")


def main(argv: list[str] | None = None) -> int:
    """Print what a run would cost; returns the exit status."""
    return run_command(_print_cost, argv)


if __name__ == "__main__":
    sys.exit(main())
