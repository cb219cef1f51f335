"""Count operations, memory and steps of a training run without data or a GPU, for `crate-fast plan`.

Model and activations are tensors without data: PyTorch's "meta" device and fake tensors.
"""

import argparse
import dataclasses
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
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.loader import build_splits, check_batch
from crate_fast.train.data.sources import TORCHVISION
from crate_fast.train.distributed import layers_of
from crate_fast.train.optimizer import build_optimizer
from crate_fast.train.runs import build_model

KNOWN_SIZES = {  # training images, classes
    "in1k": (1_281_167, 1_000),
    "in21k": (14_197_122, 21_841),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "flowers102": (1_020, 102),
    "pets": (3_680, 37),
}


def meta_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """Build a run's model on the meta device, without gradient checkpointing; with `frozen` it is in eval mode."""
    with torch.device("meta"):
        model = build_model(config, num_classes)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(False)
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


def optimizer_bytes(model: nn.Module, config: TrainConfig) -> int:
    """Return the bytes of the optimiser state after a step of a `meta_model`."""
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    try:
        optimizer.step()
    except RuntimeError as error:  # adamp, sgdp and novograd read values
        raise UserError(f"optimizer={config.optimizer!r} cannot be planned: plan with adamw instead") from error
    model.zero_grad(set_to_none=True)
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, Tensor))


def activation_bytes(
    model: nn.Module, config: TrainConfig, images: int, device: str, dtype: torch.dtype | None
) -> int:
    """Return the bytes that autograd saves for the backward pass of a micro-batch of `images` on one device.

    Each storage that the device's kernels save counts once; parameters do not count. With gradient checkpointing the
    activations of one recomputed layer (the mean over the layers) are added. `device` is "cuda" or "cpu"; this
    machine need not have it.
    """
    kept = _saved_bytes(model, config, images, device, dtype)
    if not config.grad_checkpointing:
        return kept
    model.set_grad_checkpointing(True)
    checkpointed = _saved_bytes(model, config, images, device, dtype)
    model.set_grad_checkpointing(False)
    return checkpointed + (kept - checkpointed) // max(1, len(layers_of(model)))


class _FlashAttention(TorchFunctionMode):
    """Mode that calls the GPU's fused attention; without a GPU PyTorch would choose products that save N² values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        dropout, scale = kwargs.get("dropout_p", 0.0), kwargs.get("scale")
        return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], dropout, scale=scale)[0]


def _saved_bytes(model: nn.Module, config: TrainConfig, batch: int, device: str, dtype: torch.dtype | None) -> int:
    saved: dict[int, torch.UntypedStorage] = {}  # holds storages so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    autocast.device = device  # set afterwards: the constructor disables autocast for a missing device
    attention = _FlashAttention() if device == "cuda" else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), assuming_gpu():
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        state = {n: torch.empty_like(t, device=device).requires_grad_(t.requires_grad) for n, t in tensors.items()}
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        inputs = [torch.empty(batch, 3, config.image_size, config.image_size, device=device)]
        inputs += [config.mask_ratio] if isinstance(model, CRATEMAE) else []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), attention:
            with autocast:
                output = torch.func.functional_call(model, state, tuple(inputs))
            if not isinstance(model, CRATEMAE):  # its output includes the loss
                F.cross_entropy(output.float(), torch.empty(batch, dtype=torch.int64, device=device))
        return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


def make_plan(config: TrainConfig, options: argparse.Namespace) -> dict[str, float]:
    """Return the lines that `crate-fast plan` prints; `options` are the options of that command."""
    images, classes = options.images, options.classes
    of_recipe = {*Path(options.recipe).stem.split("_")} - TORCHVISION.keys()  # these only by config.dataset
    known = [name for name in (config.dataset, *of_recipe) if name in KNOWN_SIZES]
    if config.dataset == "shape_scenes" or (config.dataset not in KNOWN_SIZES and Path(config.data_dir).is_dir()):
        known = []  # the data are here
    if known:
        images, classes = images or KNOWN_SIZES[known[0]][0], classes or KNOWN_SIZES[known[0]][1]
    elif not images or not classes:
        try:
            data = build_splits(dataclasses.replace(config, download=False))
        except UserError as error:
            raise UserError(f"{error}; or plan without the data: pass --images N and --classes N") from error
        images, classes = images or len(data.train), classes or len(data.classes)
    check_batch(config, images, options.gpus)
    model = meta_model(config, classes)
    flops = count_flops(model, config.image_size, config.mask_ratio)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_epoch = images // config.batch_size
    steps, micro_batch = config.epochs * per_epoch, config.batch_size // (config.accumulate * options.gpus)

    device = "cpu" if config.device == "cpu" else "cuda"  # "auto" is planned for a GPU
    precision = {"cpu": "fp32", "cuda": "bf16"}[device] if config.precision == "auto" else config.precision
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    shards = options.gpus if config.parallel == "fsdp" else 1
    memory = {
        "weights": 4 * parameters / shards,
        "gradients": 4 * trained / shards,
        "optimizer": optimizer_bytes(model, config) / shards,
        "EMA": (4 * parameters if config.ema_decay else 0) / shards,
        f"activations in {precision}": activation_bytes(model, config, micro_batch, device, dtype),
    }
    memory["memory in all"] = sum(memory.values())
    plan = {
        "parameters": parameters,
        "trained parameters": trained,
        "GFLOP per image, forward": flops.forward / 1e9,
        "GFLOP per image, step": flops.step / 1e9,
        "images": images,
        "classes": classes,
        "steps per epoch": per_epoch,
        "steps": steps,
        "images per pass and device": micro_batch,
    }
    plan |= {f"{name}, GiB": size / 2**30 for name, size in memory.items()}
    if options.images_per_s:
        plan["hours"] = steps * config.batch_size / options.images_per_s / 3600
    return plan
