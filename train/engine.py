"""The training loop: thin, and the same for one process or many."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from crate_fast.functional import cached_dictionaries
from crate_fast.train.batch_augmentation import BatchAugmentation
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import Batch, Normalize, mirrored
from crate_fast.train.distributed import Processes

__all__ = ["Trainer", "clipped_parameters", "evaluate", "learning_rate"]


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimiser step `step` (from 0).

    "cosine": linear warm-up, then half a cosine to `min_lr`, both by the step. "released": the smaller of warm-up and
    cosine, both by the epoch, as the released recipe steps them.
    """
    total = config.epochs * steps_per_epoch
    warmup = config.warmup_epochs * steps_per_epoch
    if config.schedule == "released":
        step = step // steps_per_epoch * steps_per_epoch
        rising = min(1.0, (step + steps_per_epoch) / warmup) if warmup else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * step / total))
        return max(config.min_lr, config.lr * min(rising, falling))
    if step < warmup:
        return config.lr * (step + 1) / math.ceil(warmup)
    progress = (step - warmup) / max(1.0, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for plain fp32."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if config.precision == "bf16" else None


def autocast(device: torch.device, dtype: torch.dtype | None):
    """`torch.autocast` in `dtype`, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@torch.inference_mode()
@cached_dictionaries()
def evaluate(
    model: nn.Module, loader: DataLoader, normalize: Normalize, processes: Processes, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Classification on a split that is shared out over the processes; every image counts once.

    Args:
        model: In any mode; left in evaluation mode.
        loader: `eval_loader` of this process.
        normalize: uint8 → fp32 on the device.
        processes: Whose counts are added up.
        dtype: Of autocast.

    Returns:
        "loss" (cross-entropy in nats), "accuracy" and "top5" in [0, 1].
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=processes.device)
    for batch in loader:
        if not len(batch.labels):  # none of them could be read
            continue
        images, labels = batch.images.to(processes.device), batch.labels.to(processes.device)
        with autocast(processes.device, dtype):
            logits = model(normalize(images))
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = [loss, ranked[:, 0].sum(), ranked.sum(), torch.tensor(len(labels), device=labels.device)]
        totals += torch.stack([count.double() for count in counts])
    loss, top1, top5, count = processes.sum(totals).tolist()
    return {"loss": loss / count, "accuracy": top1 / count, "top5": top5 / count}


def clipped_parameters(model: nn.Module, mode: str) -> list[nn.Parameter]:
    """The parameters whose gradients are clipped: all, but with "agc" not the classifier's.

    Args:
        model: With timm's `get_classifier`.
        mode: "norm", "value" or "agc".
    """
    spared = {id(p) for p in model.get_classifier().parameters()} if mode == "agc" else set()
    return [p for p in model.parameters() if id(p) not in spared]


class Trainer:
    """A model, its optimiser and the optimiser steps done.

    Args:
        model: On the device.
        config: The run's.
        processes: See `distributed.process_group`.
        steps_per_epoch: Optimiser steps in an epoch.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes, steps_per_epoch: int):
        self.model, self.config, self.processes = model, config, processes
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.dtype = autocast_dtype(config, processes.device)
        self.normalize = Normalize(config.mean).to(processes.device)
        self.optimizer = create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            filter_bias_and_bn=not config.decay_all,
            layer_decay=config.layer_decay if config.layer_decay < 1 else None,
        )
        if config.decay_all:  # with layer_decay timm spares positions and CLS even so
            for group in self.optimizer.param_groups:
                group["weight_decay"] = config.weight_decay
        share = config.batch_size // (config.accumulate * processes.world_size)
        self.augment = BatchAugmentation(config, model.num_classes, processes.device, share)
        runner = torch.compile(model) if config.compile else model
        self.runner = DistributedDataParallel(runner) if processes.world_size > 1 else runner

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def train_steps(self, loader: DataLoader) -> Iterator[Tensor]:
        """Run every step in `loader`; after each yield its loss and accuracy, means over this process's images, [2].

        They stay on the device: a caller who does not read them does not make the processor wait for the GPU.
        """
        config, processes = self.config, self.processes
        batches = iter(loader)
        while self.step < self.total_steps:
            self.runner.train()
            for group in self.optimizer.param_groups:
                scale = group.get("lr_scale", 1.0)  # of layer_decay
                group["lr"] = scale * learning_rate(config, self.step, self.steps_per_epoch)
            totals = torch.zeros(2, device=processes.device)
            draw = np.random.SeedSequence((config.seed, self.step, processes.rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(draw[0]))  # dropout's masks depend on the step alone: nothing to save for a resume
            with cached_dictionaries():
                for part in range(config.accumulate):
                    batch = next(batches)
                    last = part == config.accumulate - 1
                    hold = nullcontext() if last or processes.world_size == 1 else self.runner.no_sync()
                    with hold:
                        totals += self._forward_backward(batch, part)
            if config.clip_grad:
                dispatch_clip_grad(
                    clipped_parameters(self.model, config.clip_mode), config.clip_grad, config.clip_mode
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            yield totals

    def _forward_backward(self, batch: Batch, part: int) -> Tensor:
        """Add one micro-batch's gradient; return its share of the step's loss and accuracy, [2]."""
        device = self.processes.device
        images, labels, flips = (values.to(device, non_blocking=True) for values in batch[:3])
        part = part * self.processes.world_size + self.processes.rank
        images, targets = self.augment(self.normalize(mirrored(images, flips)), labels, self.step, part)
        with autocast(device, self.dtype):
            logits = self.runner(images)
        smoothing = self.config.label_smoothing if targets.dim() == 1 else 0.0  # a mixture has it in it
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        (loss / self.config.accumulate).backward()
        accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
        return torch.stack([loss.detach(), accuracy]) / self.config.accumulate

    def state(self) -> dict:
        """What `restore` needs beside the weights: tensors and plain values."""
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def restore(self, weights: dict[str, Tensor], state: dict) -> None:
        """Continue exactly where `state` and the weights were taken."""
        self.model.load_state_dict(weights, strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
