"""The optimiser step: thin, and the same for one process or many."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from crate_fast.errors import UserError
from crate_fast.functional import cached_dictionaries
from crate_fast.train import parallel
from crate_fast.train.config import MODES_WITH_GRAPHS, TrainConfig
from crate_fast.train.cuda_graphs import GraphedCall
from crate_fast.train.data import Batch, Normalize, mirrored
from crate_fast.train.distributed import Processes
from crate_fast.train.nonfinite import NonFinite, diagnosis
from crate_fast.train.objective import objective_for
from crate_fast.train.optimizer import build_optimizer, clip_gradients, gradient_norm, learning_rate

__all__ = ["StepResult", "Trainer", "check_settings"]

_SMALLEST_SCALE = 1.0  # of fp16's gradient scaler: below it, overflow is no longer the scale's fault


class StepResult(NamedTuple):
    """What one optimiser step gave: means over the images of all processes.

    Attributes:
        measures: The objective's, by name: "loss", as it was trained on, and for classes "accuracy" in [0, 1].
        taken: Whether the weights were updated.
        stop: Whether any process has been asked to stop.
    """

    measures: dict[str, float]
    taken: bool
    stop: bool

    @property
    def loss(self) -> float:
        """The first measure."""
        return self.measures["loss"]


def check_settings(config: TrainConfig, processes: Processes) -> None:
    """Refuse settings that do not go together on these processes.

    Raises:
        UserError: Says which, and what to change.
    """
    sharded = parallel.shares_out(config, processes)
    if sharded and config.clip_mode == "agc" and config.clip_grad:
        raise UserError(
            f"clip_mode='agc' needs whole weights, and parallel={config.parallel!r} shares them out: clip by "
            "norm or value, or use parallel='ddp'"
        )
    if sharded and config.compile and config.compile_mode in MODES_WITH_GRAPHS:
        raise UserError(
            f"compile_mode={config.compile_mode!r} records the addresses of weights, and parallel="
            f"{config.parallel!r} moves them: use compile_mode='default', or parallel='ddp'"
        )
    if config.cuda_graphs and processes.device.type != "cuda":
        raise UserError(f"cuda_graphs=True needs a CUDA GPU, and this run is on {processes.device}: leave it out")
    if config.cuda_graphs and processes.world_size > 1:
        raise UserError(f"cuda_graphs=True is for one process, and there are {processes.world_size}: leave it out")


class Trainer:
    """A model, its moving average, its optimiser, and the optimiser steps done.

    Args:
        model: On the device; shared out over the processes here, where the configuration says so.
        config: The run's.
        processes: See `distributed.process_group`.
        steps_per_epoch: Optimiser steps in an epoch.

    Raises:
        UserError: The configuration cannot be carried out on these processes.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes, steps_per_epoch: int):
        check_settings(config, processes)
        self.model, self.config, self.processes = model, config, processes
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.device = processes.device
        self.objective = objective_for(model, config, processes)
        self.normalize = Normalize(config.mean).to(self.device)
        sharded = parallel.shares_out(config, processes)
        self.ema: ModelEmaV3 | None = None
        if config.ema_decay:
            warmup = {"use_warmup": config.ema_warmup}
            self.ema = ModelEmaV3(model, decay=config.ema_decay, foreach=not sharded, **warmup)
        if sharded:
            parallel.shard(model, config, processes)
            if self.ema is not None:
                parallel.shard(self.ema.module, config, processes)
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.objective.dtype is torch.float16)
        self.nonfinite = NonFinite(config.nonfinite_limit)
        self.runner = parallel.distribute(model, config, processes)
        self.backward = self._make_backward()
        self.problems: list[str] = []  # images that could not be read; for the caller to take

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def train_steps(self, batches: Iterable[Batch], stopping=lambda: False) -> Iterator[StepResult]:
        """Run every step whose micro-batches are in `batches`, and yield what each gave.

        Args:
            batches: Of this process, as `train_loader` deals them.
            stopping: Whether this process has been asked to stop; the result tells all of them.

        Raises:
            NonFiniteError: Too many steps in a row were not finite.
        """
        batches = iter(batches)
        while self.step < self.total_steps:
            self._prepare()
            totals = torch.zeros(len(self.objective.measures), device=self.device)
            with cached_dictionaries():
                for part in range(self.config.accumulate):
                    batch = next(batches)
                    self.problems += batch.problems
                    with parallel.holding_gradients(self.runner, part < self.config.accumulate - 1):
                        labels = batch.labels.to(self.device, non_blocking=True)
                        images = self.prepare_images(batch.images, batch.flips)
                        totals += self.backward(*self.objective.inputs(images, labels, self.step, part))
            yield self._update(totals, stopping(), batch)

    def _prepare(self) -> None:
        """Modes, learning rates and the step's seed."""
        self.runner.train()
        if parallel.is_sharded(self.model):  # DDP does so by itself
            parallel.share_buffers(self.model, self.processes)
        if self.config.frozen:
            self.model.eval()
            self.model.get_classifier().train()
        for group in self.optimizer.param_groups:
            scale = group.get("lr_scale", 1.0)  # of layer_decay
            group["lr"] = scale * learning_rate(self.config, self.step, self.steps_per_epoch)
        seed = np.random.SeedSequence((self.config.seed, self.step, self.processes.rank))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))  # dropout's: nothing to save for a resume

    def prepare_images(self, images: Tensor, flips: Tensor | None = None) -> Tensor:
        """uint8 images from a loader → the model's input, on the device."""
        images = images.to(self.device, non_blocking=True)
        if flips is not None:
            images = mirrored(images, flips.to(self.device, non_blocking=True))
        images = self.normalize(images)
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def _make_backward(self) -> Callable[..., Tensor]:
        return GraphedCall(self._backward, self._recording) if self.config.cuda_graphs else self._backward

    def _backward(self, *inputs: Tensor) -> Tensor:
        """Add one micro-batch's gradient; return its share of the step's measures."""
        measures = self.objective.training(self.runner, *inputs) / self.config.accumulate
        self.scaler.scale(measures[0]).backward()
        return measures.detach()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Undo what recording a graph does to generators, BatchNorm's statistics and gradients."""
        before = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            yield
        self.optimizer.zero_grad(set_to_none=False)
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)

    def _update(self, totals: Tensor, stopping: bool, batch: Batch) -> StepResult:
        """Clip and step, unless loss or gradient is not finite on any process: then all of them skip."""
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model)
        bad = torch.stack([~totals[0].isfinite(), ~norm.isfinite(), torch.tensor(stopping, device=self.device)])
        shared = self.processes.sum(torch.cat([totals.double() / self.processes.world_size, bad.double()]))
        *measures, bad_loss, bad_gradient, stop = shared.tolist()  # the step's one wait for the device
        taken, report = not (bad_loss or bad_gradient), None
        if taken:
            clip_gradients(self.model, self.config.clip_grad, self.config.clip_mode, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.nonfinite.passed()
        else:
            overflow = self._lower_scale() and not bad_loss
            if self.nonfinite.failed(self.step, measures[0], float(norm), overflow):
                images = self.prepare_images(batch.images, batch.flips)
                report = diagnosis(self.model, images, self.objective.outputs)
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graphs)  # a graph adds to them where they are
        self.step += 1
        if report is not None:
            self.nonfinite.stop(report)
        if taken and self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return StepResult(dict(zip(self.objective.measures, measures, strict=True)), taken, bool(stop))

    def _lower_scale(self) -> bool:
        """Halve fp16's scale after an overflow; whether the scale could have been the cause."""
        if not self.scaler.is_enabled():
            return False
        scale = self.scaler.get_scale()
        self.scaler.update(scale * self.scaler.get_backoff_factor())
        self.scaler.load_state_dict(self.scaler.state_dict() | {"_growth_tracker": 0})  # as the scaler's own backoff
        return scale > _SMALLEST_SCALE

    def share_buffers(self) -> None:
        """Give every process the first one's buffers, to evaluate what a checkpoint would hold. A collective call."""
        parallel.share_buffers(self.model, self.processes)
        if self.ema is not None:
            parallel.share_buffers(self.ema.module, self.processes)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict]:
        """(weights, the moving average's, everything else `restore` needs): tensors and plain values, in one piece.

        A collective call; the first process has it.
        """
        weights, optimizer = parallel.gather(self.model, self.optimizer)
        ema = None if self.ema is None else parallel.gather(self.ema.module)[0]
        rest = {"step": self.step, "optimizer": optimizer, "scaler": self.scaler.state_dict()}
        return weights, ema, rest | {"nonfinite": self.nonfinite.state()}

    def restore(self, weights: dict[str, Tensor], ema: dict[str, Tensor] | None, rest: dict) -> None:
        """Continue exactly where `state` was taken, by any number of processes. A collective call."""
        parallel.scatter(self.model, weights, self.optimizer, rest["optimizer"])
        if self.ema is not None:
            parallel.scatter(self.ema.module, ema)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(rest["scaler"])
        self.nonfinite.restore(rest["nonfinite"])
        self.step = rest["step"]
        self.backward = self._make_backward()  # loading an optimiser's state drops the gradients that a graph adds to
