"""Count FLOPs, memory and steps of a training run without data or a GPU, for `crate-fast plan`.

Model and activations are tensors without data: PyTorch's "meta" device and fake tensors.
"""

import argparse
import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from crate_fast import CRATEMAE
from crate_fast.errors import UserError
from crate_fast.kernels import assuming_gpu
from crate_fast.train.config import FORM, SIZES, TrainConfig
from crate_fast.train.data.image_files import find_images
from crate_fast.train.data.loader import check_batch
from crate_fast.train.data.shape_scenes import CLASSES
from crate_fast.train.distributed import layers_of
from crate_fast.train.optimizer import build_optimizer
from crate_fast.train.runs import build_model, run_config

KNOWN_SIZES = {  # training images, classes
    "in1k": (1_281_167, 1_000),
    "in21k": (14_197_122, 21_841),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "flowers102": (1_020, 102),
    "pets": (3_680, 37),
}
_MEASURED = ("model", "image_size", *SIZES, "visible_only", "mask_ratio", *FORM)  # settings that decide the speed


def find_data_size(config: TrainConfig, recipe: str, images: int | None, classes: int | None) -> tuple[int, int, str]:
    """Return the numbers of training images and classes and their source; raise a UserError if one is unknown."""
    split = Path(config.data_dir) / config.train_split
    known = next((word for word in (config.dataset, *Path(recipe).stem.split("_")) if word in KNOWN_SIZES), None)
    found, source = KNOWN_SIZES.get(known, (None, None)), f"the known size of {known}"
    if config.dataset == "shape_scenes":
        found, source = (config.train_samples, len(CLASSES)), "train_samples"
    elif None in (images, classes) and config.dataset == "folder" and split.is_dir():
        names, labels = find_images(split).labelled(str(split))
        found, source = (len(labels), len(names)), f"counted in {split}"
    sizes, sources = [], []
    for option, given, size in zip(("--images", "--classes"), (images, classes), found, strict=True):
        sizes.append(given or size)
        sources.append(option if given else source)
        if sizes[-1] is None:
            raise UserError(
                f"the number of {option[2:]} in dataset={config.dataset!r} is unknown: pass {option} N, or the "
                "--data-dir and --train-split of a folder on this machine"
            )
    return *sizes, ", ".join(dict.fromkeys(sources))


def read_throughput(folder: Path, config: TrainConfig) -> dict:
    """Return the throughput that a finished run of the same model measured, with its conditions."""
    run = run_config(folder)
    try:
        rate = json.loads((folder / "summary.json").read_text())["throughput"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--throughput {folder} has no throughput in summary.json: pass a finished run") from error
    pairs = [(name, getattr(run, name), getattr(config, name)) for name in _MEASURED]
    differing = [f"{name} {before!r} measured, {now!r} planned" for name, before, now in pairs if before != now]
    if differing:
        raise UserError(f"--throughput {folder} has another model ({'; '.join(differing)}): pass a run of this model")
    return rate | {"parallel": run.parallel, "micro_batch": run.batch_size // (run.accumulate * rate["devices"])}


# --- operations and memory


def meta_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """Build a run's model on the meta device, without gradient checkpointing; with `frozen` it is in eval mode."""
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config, grad_checkpointing=False), num_classes)
    return model.train(not config.frozen)


class Flops(NamedTuple):
    """Floating-point operations per image of the forward pass, and of a training step (forward and backward)."""

    forward: int
    step: int


def count_flops(model: nn.Module, image_size: int, mask_ratio: float = 0.75) -> Flops:
    """Count the FLOPs of the matrix products of a `meta_model` per image. A multiply-add counts as two.

    The difference between two batch sizes excludes the cost per batch, such as folding ISTA's dictionaries.
    """
    counts = []
    for batch in (1024, 2048):  # large enough that dictionaries are folded
        images = torch.empty(batch, 3, image_size, image_size, device="meta")
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = model(images, mask_ratio)[0] if isinstance(model, CRATEMAE) else model(images)
            forward = counter.get_total_flops()
            output.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    model.zero_grad(set_to_none=True)
    return Flops(*((more - fewer) // 1024 for fewer, more in zip(*counts, strict=True)))


def _local_elements(parameter: Tensor, shards: int) -> int:
    rows = parameter.shape[0] if parameter.dim() else 1  # FSDP2 splits the first dimension, with padding
    return math.ceil(rows / shards) * (parameter.numel() // rows)


def optimizer_bytes(model: nn.Module, config: TrainConfig, shards: int = 1) -> int:
    """Return the bytes of the optimiser state on one device, found by a step with one parameter of each shape."""
    trained = [p for p in model.parameters() if p.requires_grad]
    stand_ins = {p.shape: nn.Parameter(torch.zeros(p.shape)) for p in trained}
    alone = dataclasses.replace(config, frozen=False, layer_decay=1.0)
    optimizer = build_optimizer(nn.ParameterList(stand_ins.values()), alone)
    for parameter in stand_ins.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    total = 0
    for p in trained:
        states = optimizer.state[stand_ins[p.shape]].values()
        size = sum(value.nbytes for value in states if isinstance(value, Tensor) and value.dim())
        total += math.ceil(size * _local_elements(p, shards) / p.numel())
    return total


def activation_bytes(
    model: nn.Module, config: TrainConfig, images: int, num_classes: int, device: str, dtype: torch.dtype | None
) -> int:
    """Return the bytes that autograd saves for the backward pass of a micro-batch of `images` on one device.

    Each storage that the device's kernels save counts once; parameters do not count. With gradient checkpointing the
    activations of one recomputed layer are added. `device` is "cuda" or "cpu"; this machine need not have it.
    """
    kept, layers = _saved_bytes(model, config, images, num_classes, device, dtype), len(layers_of(model))
    if not config.grad_checkpointing or not layers:
        return kept
    model.set_grad_checkpointing(True)
    checkpointed = _saved_bytes(model, config, images, num_classes, device, dtype)
    model.set_grad_checkpointing(False)
    return checkpointed + max(0, kept - checkpointed) // layers


class _FlashAttention(TorchFunctionMode):
    """Mode that calls the GPU's fused attention; without a GPU PyTorch would choose products that save N² values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        options = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention or len(args) != 3 or options.pop("attn_mask", None) is not None:
            return func(*args, **(kwargs or {}))
        dropout, causal = options.get("dropout_p", 0.0), options.get("is_causal", False)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(*args, dropout, causal, scale=options.get("scale"))[0]


def _saved_bytes(model, config: TrainConfig, batch: int, num_classes: int, device: str, dtype) -> int:
    saved: dict[int, torch.UntypedStorage] = {}  # holds storages so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    def fake(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    autocast.device = device  # set afterwards: the constructor disables autocast for a missing device
    attention = _FlashAttention() if device == "cuda" else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), assuming_gpu():
        state = {name: nn.Parameter(fake(*p.shape), p.requires_grad) for name, p in model.named_parameters()}
        state |= {name: fake(*b.shape, kind=b.dtype) for name, b in model.named_buffers()}
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        inputs = [fake(batch, 3, config.image_size, config.image_size)]
        inputs += [config.mask_ratio] if isinstance(model, CRATEMAE) else []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), attention:
            with autocast:
                output = torch.func.functional_call(model, state, tuple(inputs))
            if not isinstance(model, CRATEMAE):  # its output includes the loss
                F.cross_entropy(output.float(), fake(batch, kind=torch.int64))
        return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


# --- the plan


def make_plan(config: TrainConfig, options: argparse.Namespace) -> dict:
    """Return the plan that `crate-fast plan --json` writes; `options` are the options of that command."""
    gpus, hosts = options.gpus, options.hosts
    if gpus % hosts:
        raise UserError(f"--gpus {gpus} is not a multiple of --hosts {hosts}: change one of them")
    images, classes, source = find_data_size(config, options.recipe, options.images, options.classes)
    check_batch(config, images, gpus)
    model = meta_model(config, classes)
    measured = read_throughput(options.throughput, config) if options.throughput else None
    device = "cpu" if config.device == "cpu" else "cuda"  # "auto" is planned for a GPU
    precision = {"cpu": "fp32", "cuda": "bf16"}[device] if config.precision == "auto" else config.precision
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": gpus // hosts}[config.parallel]
    conditions = {"precision": precision, "parallel": config.parallel, "devices": gpus}

    per_epoch, micro_batch = images // config.batch_size, config.batch_size // (config.accumulate * gpus)
    steps = per_epoch * config.epochs
    seen = steps * config.batch_size
    schedule = {"images": images, "images_from": source, "epochs": config.epochs, "batch_size": config.batch_size}
    schedule |= {"micro_batch": micro_batch, "steps_per_epoch": per_epoch, "steps": steps, "images_seen": seen}
    schedule |= {"warmup_steps": math.ceil(config.warmup_epochs * per_epoch), "peak_lr": config.peak_lr}

    held = {p: _local_elements(p, shards) * p.element_size() for p in model.parameters()}
    trained = [p for p in held if p.requires_grad]
    memory = {"weights": sum(held.values()), "gradients": sum(held[p] for p in trained)}
    memory["optimizer"] = optimizer_bytes(model, config, shards)
    memory["ema"] = memory["weights"] if config.ema_decay else 0
    memory["activations"] = activation_bytes(model, config, micro_batch, classes, device, dtype)
    flops = count_flops(model, config.image_size, config.mask_ratio)
    kb = options.image_kb or {"shape_scenes": 0.0, "cifar10": 3.0, "cifar100": 3.0}.get(config.dataset, 110.0)
    rate, remarks = {}, []
    if measured:
        speed = measured["images_per_s_per_device"] * gpus
        hours = seen / speed / 3600
        rate = {"images_per_s": speed, "hours": hours, "gpu_hours": gpus * hours, "mb_per_s": speed * kb / 1e3}
        planned = (conditions | {"micro_batch": micro_batch}).items()
        found = [(name, measured[name], value) for name, value in planned if measured[name] != value]
        remarks = [f"measured with {name} {before}, planned with {now}" for name, before, now in found]
    shown = {"name": config.model, "image_size": config.image_size}
    shown |= {"classes": None if isinstance(model, CRATEMAE) else classes}
    shown |= {"parameters": sum(p.numel() for p in held), "parameters_trained": sum(p.numel() for p in trained)}
    data = {"dataset": config.dataset, "image_kb": kb, "gb_per_epoch": per_epoch * config.batch_size * kb / 1e6}
    plan = {"recipe": options.recipe, "hosts": hosts, "device": device, "shards": shards, **conditions}
    plan |= {"model": shown, "schedule": schedule, "flops": flops._asdict() | {"run": flops.step * seen}}
    plan |= {"memory_bytes": memory | {"total": sum(memory.values())}, "data": data, "throughput": measured}
    return plan | {"rate": rate, "remarks": remarks, "settings": dataclasses.asdict(config)}
