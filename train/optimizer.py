"""timm's optimisers, the learning rate of each step, and gradient clipping."""

import math
import re

import timm.optim.muon
import torch
from timm.optim import Lars, create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crate_fast.errors import UserError, nearest
from crate_fast.train.config import TrainConfig

_MOMENTUM = 0.9  # of LARS, as in MAE's linear probe
_REFUSED = {
    "adahessian": "needs second derivatives, which the layers do not support",
    **dict.fromkeys(
        ("madgrad", "madgradw", "adafactorbv", "adafactorbvc", "cadafactorbv", "cadafactorbvc", "kron", "kronw"),
        "keeps state that a checkpoint cannot store, so a run could not be resumed",
    ),
}
_NEEDS_WHOLE_WEIGHTS = re.compile("c.+|adafactor|adamp|mars|n?adamuon|novograd.*|sgdp")  # fail or hang in FSDP
_orthogonalize = timm.optim.muon.zeropower_via_newtonschulz


def _orthogonalize_in_fp32_on_a_cpu(matrix: Tensor, *arguments, **options) -> Tensor:
    """Run timm's function in fp32 on a CPU: bf16 takes 50 times as long on processors without bf16 instructions."""
    dtype = {"dtype": torch.float32} if matrix.device.type == "cpu" else {}
    return _orthogonalize(matrix, *arguments, **options, **dtype)


timm.optim.muon.zeropower_via_newtonschulz = _orthogonalize_in_fp32_on_a_cpu


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the configured optimiser for the trained parameters.

    "lars" follows MAE: the trust ratio applies to matrices, not to biases. (timm decides by the weight decay, which a
    probe does not use.) All other optimisers are timm's, by name.

    Raises:
        UserError: timm has no such optimiser, or it cannot be used here.
    """
    name = config.optimizer
    known = list_optimizers()
    if name not in known:
        raise UserError(f"optimizer={name!r}{nearest(name, known) or ': timm has no such optimiser'}")
    if name in _REFUSED:
        raise UserError(f"optimizer={name!r} {_REFUSED[name]}: choose another, such as adamw")
    if config.parallel == "fsdp" and _NEEDS_WHOLE_WEIGHTS.fullmatch(name):
        raise UserError(f"optimizer={name!r} needs whole weights: pass --parallel ddp, or another, such as adamw")
    betas = {} if config.beta2 is None else {"betas": (0.9, config.beta2)}
    info = get_optimizer_info(name)
    if betas and not (info.has_betas and info.num_betas == 2):  # timm would ignore them
        raise UserError(f"beta2={config.beta2}: optimizer={name!r} has no such setting; leave it out")
    if name == "lars" and (config.layer_decay < 1 or config.decay_all):
        raise UserError("optimizer='lars' has neither layer_decay nor decay_all: leave them out")
    trained = model.get_classifier() if config.frozen else model
    if name == "lars":
        matrices = [p for p in trained.parameters() if p.ndim > 1]
        others = [p for p in trained.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "always_adapt": True}, {"params": others, "weight_decay": 0.0}]
        return Lars(groups, lr=config.peak_lr, momentum=_MOMENTUM, weight_decay=config.weight_decay)
    try:
        optimizer = create_optimizer_v2(
            trained,
            opt=name,
            lr=config.peak_lr,
            weight_decay=config.weight_decay,
            filter_bias_and_bn=not config.decay_all,
            layer_decay=config.layer_decay if config.layer_decay < 1 else None,
            **betas,
        )
    except (AssertionError, ImportError) as error:  # from APEX and bitsandbytes
        raise UserError(f"optimizer={name!r} cannot be used here ({error}): choose another, such as adamw") from error
    if config.decay_all:  # with layer_decay timm still exempts positions and CLS
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay
    return optimizer


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of an optimiser step, counted from 0.

    "cosine": linear warm-up, then a half cosine to `min_lr`, updated every step. "released": the minimum of warm-up
    and cosine, updated every epoch, as in the released recipe.
    """
    total = config.epochs * steps_per_epoch
    warmup = config.warmup_epochs * steps_per_epoch
    if config.schedule == "released":
        step = step // steps_per_epoch * steps_per_epoch
        rising = min(1.0, (step + steps_per_epoch) / warmup) if warmup else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * step / total))
        return max(config.min_lr, config.peak_lr * min(rising, falling))
    if step < warmup:
        return config.peak_lr * (step + 1) / math.ceil(warmup)
    progress = (step - warmup) / max(1.0, total - warmup)
    return config.min_lr + (config.peak_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the Euclidean norm of the whole gradient, over all shards; a scalar on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(model: nn.Module, limit: float, mode: str, norm: Tensor) -> None:
    """Clip the gradients in place by `mode`, "norm" or "value". 0 turns it off; `norm` is `gradient_norm(model)`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if limit and mode == "norm":
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif limit:
        torch.nn.utils.clip_grad_value_(parameters, limit)
