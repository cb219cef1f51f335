"""Training, from settings to a finished run. `Trainer.train` is the loop.

Files of a run: config.yaml metrics.jsonl summary.json attention.png curves.png reconstruction.png unreadable.txt
checkpoints/ tensorboard/
"""

import argparse
import itertools
import math
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

import crate_fast
from crate_fast.cpu_ops import multiplies_bf16
from crate_fast.errors import UserError
from crate_fast.functional import cached_dictionaries
from crate_fast.train import checkpoint, distributed
from crate_fast.train.checkpoint import RunFolder
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.loader import (
    Batch,
    DataSplits,
    build_splits,
    check_batch,
    eval_loader,
    files_checksum,
    train_loader,
)
from crate_fast.train.data.transforms import Normalize, mixed_seed
from crate_fast.train.distributed import Processes, process_group
from crate_fast.train.faults import Interruption, NonFinite, UnreadableTally, diagnosis
from crate_fast.train.objective import objective_for
from crate_fast.train.optimizer import build_optimizer, clip_gradients, gradient_norm, learning_rate
from crate_fast.train.report import log_layers, print_summary, scores_line, write_report
from crate_fast.train.runs import build_model, load_initial

DRY_RUN_STEPS = 2
_SMALLEST_SCALE = 1.0  # fp16 loss scale; an overflow at this or a smaller scale counts as a non-finite step


# --- from settings to a run


def launch(config: TrainConfig, options: argparse.Namespace) -> int:
    """Start or resume a run and train it to the end or until a signal arrives; return the exit status."""
    began = time.perf_counter()
    # Until the run begins there is nothing to save: a signal ends the process, as torchrun expects.
    with process_group(config.device, config.threads) as processes:
        name = f"runs/{Path(options.recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = Path(options.output or processes.agree(name))
        alone = config.download or config.dataset in ("tar", "shards")  # one process writes the data, or their index
        if alone and processes.local_rank != 0:
            processes.wait()
        data = build_splits(config)
        if alone and processes.local_rank == 0:
            processes.wait()
        if options.dry_run:
            dry_run(config, folder, data, processes)
            return 0
        keyboard = [] if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else [signal.SIGINT]
        with (
            Interruption(*keyboard) as interruption,
            closing(Trainer(config, folder, data, processes, interruption)) as trainer,
        ):
            trainer.begin(options.resume)
            if trainer.train():
                trainer.finish(time.perf_counter() - began)
            elif processes.first:
                print(
                    f"\n{interruption.name or 'a signal to another process'}: saved step {trainer.step} of "
                    f"{trainer.total_steps}; the same command with --output {folder} --resume continues"
                )
        processes.wait()
    return 0


# --- the loop


class StepResult(NamedTuple):
    """Outcome of one optimiser step."""

    measures: dict[str, float]  # of the objective, averaged over the images of all processes
    stop: bool  # True if any process was asked to stop


class Trainer:
    """Training run on this process: model, EMA, optimiser, data and folder.

    Nothing is written to `folder` before `begin`. The run stops early when `interruption` has recorded a signal.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, data: DataSplits, processes: Processes, interruption: Interruption
    ):
        check_batch(config, len(data.train), processes.world_size)
        facts = {"train_images": len(data.train), "val_images": len(data.val), "classes": list(data.classes)}
        own = ("data_dir", "download", "device", "workers", "threads")  # may differ between hosts
        settings = {name: value for name, value in vars(config).items() if name not in own}
        processes.check_equal(settings | facts | {"checksum of the files": files_checksum(data.train)})
        self.config, self.data, self.processes, self.interruption = config, data, processes, interruption
        self.device = processes.device
        self.step, self.steps_per_epoch = 0, len(data.train) // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch

        torch.manual_seed(config.seed)
        model = self._build()
        self.started_from = "random weights"
        if config.init and checkpoint.newest(folder / "checkpoints") is None:
            self.started_from = load_initial(model, config, data.classes)
        sharded = processes.world_size > 1 and config.parallel == "fsdp"
        self.model = model.to(self.device)
        self.objective = objective_for(self.model, config, processes)
        self.normalize = Normalize(config.mean).to(self.device)
        self.ema: ModelEmaV3 | None = None
        self.score = f"val_{self.objective.scores[0]}"  # selects the best checkpoint
        if config.ema_decay:
            self.score = f"ema_{self.score}"
            self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True, foreach=not sharded)
        for whole in self._models() if sharded else ():
            distributed.shard(whole, processes)
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.objective.dtype is torch.float16)
        self.runner = distributed.parallelize(self.model, config, processes)

        self.run = RunFolder(folder, config, facts, processes)
        self.shares = {"rank": processes.rank, "world_size": processes.world_size}
        self.val_loader = eval_loader(config, data.val, **self.shares)
        self.nonfinite = NonFinite()
        self.tally, self.val_tally = (
            UnreadableTally(config.max_unreadable, len(split), folder / "unreadable.txt", processes)
            for split in (data.train, data.val)
        )
        # since the last log entry: sums over the steps taken (saved in checkpoints), and the duration of each step
        self.sums, self.taken, self.seconds = Counter(), 0, []
        self.speeds: list[float] = []  # images/s of all processes, one per log entry

    def begin(self, resume: bool) -> None:
        """Start a new run or continue from the newest checkpoint (see `RunFolder.begin`); print which."""
        saved = self.run.begin(resume)
        if saved is not None:
            self.restore(*saved[:3])
        if self.processes.first:
            if best := self.best():  # a run killed right after an evaluation has not recorded it
                checkpoint.record_best(self.run.checkpoints, best)
            how = f" ({self.config.parallel})" if self.processes.world_size > 1 else ""
            parameters = sum(p.numel() for p in self.model.parameters())
            where = f"from step {self.step}" if self.step else f"from {self.started_from}"
            print(
                f"crate_fast {crate_fast.__version__}: {self.config.model}, {parameters / 1e6:.2f} M "
                f"parameters, {len(self.data.train)} images, {self.total_steps} steps {where} on "
                f"{self.processes.world_size} × {self.device}{how} → {self.run.folder}"
            )
            if self.objective.dtype is torch.bfloat16 and self.device.type == "cpu" and not multiplies_bf16():
                print("precision=bf16: this processor has no bf16 instructions, and fp32 is several times as fast")

    def train(self) -> bool:
        """Train to the last step. If a signal arrives, save and return False."""
        config = self.config
        loader = train_loader(config, self.data.train, first_step=self.step, **self.shares)
        # before the first step: this draws from the generator that each step seeds
        batches = iter(loader if self.step < self.total_steps else ())
        with self._progress_bar() as bar:
            while True:
                # evaluate() saves before it scores, so in a resumed run the evaluation may still be due
                if self.evaluation_due() and not self.run.evaluated(self.step) and not self.evaluate():
                    return False
                if self.step == self.total_steps:
                    return True

                result = self.train_step(batches)
                bar.update(config.batch_size)
                if self.step % config.log_every == 0 or self.evaluation_due():
                    bar.set_postfix(self.log())
                if result.stop or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self.save()
                if result.stop:
                    return False

    def train_step(self, batches: Iterator[Batch]) -> StepResult:
        """Take one optimiser step; all processes skip it if loss or gradient is not finite on any.

        Raises:
            NonFiniteError: Too many steps in a row were skipped.
        """
        began, config = time.perf_counter(), self.config
        self._prepare_step()

        # forward and backward pass of each micro-batch
        totals = torch.zeros(len(self.objective.measures), device=self.device)
        with cached_dictionaries():
            for part in range(config.accumulate):
                batch = next(batches)
                self.tally.pending += batch.problems
                images = self.prepare_images(batch.images)
                labels = batch.labels.to(self.device, non_blocking=True)
                inputs = self.objective.inputs(images, labels, self.step, part)
                with distributed.gradient_sync(self.runner, part == config.accumulate - 1):
                    measures = self.objective.training(self.runner, *inputs) / config.accumulate
                    self.scaler.scale(measures[0]).backward()
                    totals += measures.detach()

        # average over all processes; skip or stop if any process has a non-finite value or a signal
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model)
        stopping = torch.full((), self.interruption.requested(), device=self.device)
        flags = torch.stack([~totals[0].isfinite(), ~norm.isfinite(), stopping])
        shared = self.processes.sum(torch.cat([totals.double() / self.processes.world_size, flags.double()]))
        *means, bad_loss, bad_gradient, stop = shared.tolist()  # the only device synchronisation in a step
        measures, taken = dict(zip(self.objective.measures, means, strict=True)), not (bad_loss or bad_gradient)

        # clip and step
        if taken:
            clip_gradients(self.model, config.clip_grad, config.clip_mode, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.nonfinite.passed()
            self.sums.update(measures)
            self.taken += 1
        else:
            self._skip_step(means[0], float(norm), bool(bad_loss), batch)
        self.optimizer.zero_grad()
        self.step += 1
        if taken and self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.seconds.append(time.perf_counter() - began)
        return StepResult(measures, bool(stop))

    # --- parts of a step

    def _prepare_step(self) -> None:
        self.runner.train()
        if distributed.is_sharded(self.model):  # DDP does so by itself
            distributed.share_buffers(self.model, self.processes)
        if self.config.frozen:
            self.model.eval()
            self.model.get_classifier().train()
        for group in self.optimizer.param_groups:
            scale = group.get("lr_scale", 1.0)  # set by layer_decay
            group["lr"] = scale * learning_rate(self.config, self.step, self.steps_per_epoch)
        seed = mixed_seed(self.config.seed, self.step, self.processes.rank)
        torch.manual_seed(seed)  # for dropout: a checkpoint needs no generator state

    def prepare_images(self, images: Tensor) -> Tensor:
        """Move uint8 images to the device and normalise them."""
        return self.normalize(images.to(self.device, non_blocking=True))

    def _skip_step(self, loss: float, norm: float, bad_loss: bool, batch: Batch) -> None:
        """Count a non-finite step. An fp16 overflow only lowers the loss scale."""
        if self.scaler.is_enabled():
            scale = self.scaler.get_scale()
            self.scaler.update(scale * self.scaler.get_backoff_factor())
            self.scaler.load_state_dict(self.scaler.state_dict() | {"_growth_tracker": 0})  # as in its backoff
            if scale > _SMALLEST_SCALE and not bad_loss:
                self.nonfinite.overflows += 1
                return
        self.nonfinite.failed(self.step, loss, norm)
        if self.nonfinite.in_a_row >= self.config.nonfinite_limit:
            images = self.prepare_images(batch.images)
            raise self.nonfinite.error(diagnosis(self.model, images, self.objective.outputs))

    # --- log, evaluate, save

    def log(self) -> dict[str, str]:
        """Log means since the last entry, with rates and counts; return the means for the progress bar."""
        means = {name: total / self.taken for name, total in self.sums.items()}
        self.speeds.append(len(self.seconds) * self.config.batch_size / sum(self.seconds))
        self.sums, self.taken, self.seconds = Counter(), 0, []
        lr = max(group["lr"] for group in self.optimizer.param_groups)  # the top layer's
        values = means | {"lr": lr, "images_per_s": self.speeds[-1]}
        if self.nonfinite.total:
            values["skipped_steps"] = self.nonfinite.total
        if self.scaler.is_enabled():
            values |= {"loss_scale": self.scaler.get_scale(), "overflows": self.nonfinite.overflows}
        self.tally.count(self.epoch)
        if self.tally.met:
            values["unreadable"] = len(self.tally.met)
        self.run.log(self.step, values)
        return {name: f"{value:.3f}" for name, value in means.items()}

    @property
    def epoch(self) -> int:
        """The epoch of the last step, counted from 0."""
        return max(0, self.step - 1) // self.steps_per_epoch

    def evaluation_due(self) -> bool:
        """Return True at the end of every `eval_every` epochs and of the run."""
        last = self.step == self.total_steps
        return self.step > 0 and (last or self.step % (self.config.eval_every * self.steps_per_epoch) == 0)

    def evaluate(self) -> bool:
        """Save, then score the model and its EMA, and log the scores; return False if a signal arrived."""
        if self.run.saved != self.step:  # before the evaluation, which may fail
            self.save()
        values: dict[str, float] = {}
        for model, prefix in zip(self._models(), ("val_", "ema_val_"), strict=False):
            distributed.share_buffers(model, self.processes)  # as in a checkpoint
            scores = self.scores(model)
            if scores is None:
                return False
            values |= {prefix + name: value for name, value in scores.items()}
        self.run.log(self.step, values)
        self.run.mark_best(self.best())
        whole = distributed.unsharded(self.model, self._build, self.processes)
        if self.processes.first:
            log_layers(self, whole)
            found = scores_line(values, self.objective.scores)
            tqdm.write(f"epoch {self.step / self.steps_per_epoch:g}: {found}")
        return True

    @torch.no_grad()
    @cached_dictionaries()
    def scores(self, model: nn.Module) -> dict[str, float] | None:
        """Return the objective's scores on the validation split, each image counted once; None if a signal arrived.

        All processes must run a sharded model equally often: a process without images left runs a blank image, which
        is not counted.
        """
        model.eval()
        sharded = distributed.is_sharded(model)
        totals = torch.zeros(len(self.objective.scores) + 2, dtype=torch.float64, device=self.device)
        batches = iter(self.val_loader)
        for _ in range(max(self.processes.gather(len(self.val_loader)))):
            if self.interruption.requested():
                totals[-1] = 1
                if not sharded:  # otherwise the others wait for the shard of this process
                    break
            batch = next(batches, None)
            if batch is not None:
                self.val_tally.pending += batch.problems
            if batch is not None and len(batch.labels):
                totals[:-2] += self.objective.evaluation(model, self.prepare_images(batch.images), batch)
                totals[-2] += len(batch.labels)
            elif sharded:
                empty = torch.zeros(1, 3, self.config.image_size, self.config.image_size, dtype=torch.uint8)
                self.objective.forward(model, self.prepare_images(empty))
        *sums, count, stopped = self.processes.sum(totals).tolist()
        if stopped:
            return None
        unreadable = self.val_tally.count(self.epoch)
        if not count:
            raise UserError("no image of the validation split could be read: repair those listed in unreadable.txt")
        means = {name: total / count for name, total in zip(self.objective.scores, sums, strict=True)}
        return means | ({"unreadable": unreadable} if unreadable else {})

    def best(self) -> dict | None:
        """Return the entry of the best evaluation so far, by `score`."""
        evaluations = [entry for entry in self.run.history if self.score in entry]
        if self.objective.larger_is_better:
            return max(evaluations, key=itemgetter(self.score), default=None)
        # of NaN and a number, `min` would choose the first
        return min(evaluations, key=lambda entry: (math.isnan(entry[self.score]), entry[self.score]), default=None)

    def save(self) -> None:
        """Write a checkpoint."""
        self.tally.count(self.epoch)
        self.run.save(self.step, self.step / self.steps_per_epoch, *self.state())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict]:
        """Return weights, EMA weights and training state for `restore`, on rank 0. All processes must call it."""
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, optimizer = get_state_dict(self.model, self.optimizer, options=full)
        ema = None if self.ema is None else get_state_dict(self.ema.module, (), options=full)[0]
        training = {"step": self.step, "optimizer": optimizer, "scaler": self.scaler.state_dict()}
        training |= {"nonfinite": asdict(self.nonfinite), "unreadable": dict(self.tally.met)}
        return weights, ema, training | {"sums": dict(self.sums), "taken": self.taken}

    def restore(self, weights: dict[str, Tensor], ema: dict[str, Tensor] | None, training: dict) -> None:
        """Restore a `state`, also with another number of processes. All processes must call it."""
        options = StateDictOptions(full_state_dict=True)  # each process has the full state and takes its shard
        states = {"model_state_dict": weights, "optim_state_dict": training["optimizer"]}
        set_state_dict(self.model, self.optimizer, **states, options=options)
        if self.ema is not None:
            set_state_dict(self.ema.module, (), model_state_dict=ema, optim_state_dict={}, options=options)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(training["scaler"])
        self.nonfinite = NonFinite(**training["nonfinite"])
        self.step = training["step"]
        self.tally.met = dict(training["unreadable"])
        self.sums, self.taken = Counter(training["sums"]), training["taken"]

    # --- the rest

    def _progress_bar(self) -> tqdm:
        counts = {"total": self.total_steps * self.config.batch_size, "initial": self.step * self.config.batch_size}
        often = {"mininterval": 0.2 if sys.stderr.isatty() else 10, "disable": not self.processes.first}
        return tqdm(**counts, **often, unit="img", unit_scale=True, desc="training")

    def _build(self) -> nn.Module:
        return build_model(self.config, len(self.data.classes))

    def _models(self) -> list[nn.Module]:
        return [self.model, *([] if self.ema is None else [self.ema.module])]

    def finish(self, seconds: float) -> None:
        """Write the report of a finished run and print its summary; `seconds` is the duration of this session."""
        whole = distributed.unsharded(self._models()[-1], self._build, self.processes)
        if self.processes.first:
            print_summary(write_report(self, whole, seconds), self.run.folder)

    def close(self) -> None:
        """Stop the data workers, close the logs, and release the folder."""
        # workers ignore SIGTERM: at exit Python would wait forever for those that the frames of an error still hold
        traceback.clear_frames(sys.exc_info()[2])
        self.val_loader = None
        self.run.close()


def dry_run(config: TrainConfig, output: Path, data: DataSplits, processes: Processes) -> None:
    """Train two steps, evaluate two batches, save and load in a temporary folder; print speed and memory."""
    parent = next(path for path in output.absolute().parents if path.exists())  # on the same disk as the run
    folder = Path(processes.agree(tempfile.mkdtemp(prefix=".dry-run-", dir=parent) if processes.first else ""))
    try:
        with closing(
            Trainer(replace(config, log_every=1), folder / "run", data, processes, Interruption())
        ) as trainer:
            trainer.total_steps = min(DRY_RUN_STEPS, trainer.total_steps)
            trainer.val_loader = list(itertools.islice(trainer.val_loader, 2))
            trainer.begin(resume=False)
            trainer.train()
            trainer.restore(*checkpoint.load(trainer.run.checkpoints, trainer.step)[:3])
        processes.wait()
    finally:
        if processes.first:
            shutil.rmtree(folder)
    if processes.first:
        on_gpu = processes.device.type == "cuda"
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
        rss = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = torch.cuda.max_memory_allocated() if on_gpu else rss
        rate = trainer.speeds[-1]
        loading = " without loading" * (trainer.config.workers != 0 and on_gpu)
        print(f"dry run: {trainer.step} steps, the last at {rate:,.1f} images/s{loading}; saved and read back")
        print(f"peak memory of this process{' on the GPU' if on_gpu else ''}: {peak / 2**20:,.0f} MiB")
