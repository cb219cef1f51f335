"""A session of a run in this process: model, data, folder, and the loop around the optimiser steps.

Everything of a run is in its folder:

    config.yaml  metrics.jsonl  summary.csv  summary.json  attention.png  curves.png  reconstruction.png
    unreadable.txt
    checkpoints/  tensorboard/  profile/
"""

import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import crate_fast
from crate_fast import CRATE, CRATEMAE
from crate_fast.train import checkpoint, parallel
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import DataSplits, eval_loader, readable, train_loader
from crate_fast.train.distributed import Processes
from crate_fast.train.engine import StepResult, Trainer
from crate_fast.train.evaluation import evaluate
from crate_fast.train.interruption import Interruption
from crate_fast.train.profiling import profiler
from crate_fast.train.reconstruction import image_noise, reconstructions, tiled
from crate_fast.train.report import print_summary, scores_line, write_report
from crate_fast.train.run_folder import RunFolder
from crate_fast.train.runs import build_model, load_initial
from crate_fast.train.unreadable import UnreadableTally
from crate_fast.whitebox import layer_statistics

__all__ = ["Session"]

WHITEBOX_IMAGES = 64
SHOWN_IMAGES = 8


class Session:
    """Model, data and folder of a run in this process.

    Args:
        config: The run's.
        folder: Its folder.
        data: Its splits.
        processes: This process and its fellows.
        interruption: Whether to stop early.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, data: DataSplits, processes: Processes, interruption: Interruption
    ):
        self.config, self.data, self.processes, self.interruption = config, data, processes, interruption
        torch.manual_seed(config.seed)
        model = self.build()
        self.started_from = "random weights"
        if config.init and checkpoint.newest(folder / "checkpoints") is None:
            self.started_from = load_initial(model, config)
        self.parameters = sum(p.numel() for p in model.parameters())
        if config.channels_last and not parallel.shares_out(config, processes):  # FSDP wants its weights contiguous
            model = model.to(memory_format=torch.channels_last)
        self.trainer = Trainer(model.to(processes.device), config, processes, len(data.train) // config.batch_size)
        facts = {"train_images": len(data.train), "val_images": len(data.val), "classes": list(data.classes)}
        self.run = RunFolder(folder, config, facts, processes)
        self.tally = UnreadableTally(config, len(data.train))
        self.val_tally = UnreadableTally(config, len(data.val))
        self.val_loader = eval_loader(config, data.val, **self._shares())
        self.interval = _Interval()
        self.speeds: list[float] = []  # images/s of all processes, a log interval each

    def build(self) -> nn.Module:
        """A new model of the run's architecture, on the CPU."""
        return build_model(self.config, len(self.data.classes))

    def begin(self, resume: bool, restarted: bool = False) -> None:
        """Start afresh, or continue from the newest checkpoint (see `RunFolder.begin`)."""
        self.run.begin(self.trainer, resume, restarted)
        if self.run.extra:
            self.tally.restore(self.run.extra["unreadable"])
            self.val_tally.restore(self.run.extra["val_unreadable"])
            self.interval.restore(self.run.extra["interval"])
            note = self.run.folder / "unreadable.txt"
            if self.processes.first and note.exists():  # the interrupted session may have met more than it saved
                lines = [*self.tally.state(), *self.val_tally.state()]
                with checkpoint.writing(self.run.folder):
                    checkpoint.write_text(note, "".join(f"{line}\n" for line in lines))

    def describe(self) -> str:
        """One line on what is about to run."""
        trainer, config, processes = self.trainer, self.config, self.processes
        how = f" ({config.parallel})" if processes.world_size > 1 else ""
        where = f"from step {trainer.step}" if trainer.step else f"from {self.started_from}"
        return (
            f"crate_fast {crate_fast.__version__}: {config.model}, {self.parameters / 1e6:.2f} M parameters, "
            f"{len(self.data.train)} images, {trainer.total_steps} steps {where} on {processes.world_size} × "
            f"{processes.device}{how} → {self.run.folder}"
        )

    def train(self) -> bool:
        """From the trainer's step to the last one, with evaluation, logs and checkpoints on the way.

        Returns:
            Whether the run is finished; False when it was asked to stop, and has saved.
        """
        trainer, config = self.trainer, self.config
        loader = train_loader(config, self.data.train, first_step=trainer.step, **self._shares())
        steps = trainer.train_steps(loader, self.interruption.requested)
        with self._bar() as bar, self._profiler() as profile:
            while True:
                if not self._evaluate_if_due(bar):
                    return False
                if trainer.step == trainer.total_steps:
                    return True
                self.interval.resume()
                result = next(steps)
                self.interval.add(result)
                profile.step()
                bar.update(config.batch_size)
                if trainer.step % config.log_every == 0 or self._evaluation_due():
                    self._log(bar)
                self.interval.pause()
                if result.stop:
                    self.save()
                    return False
                periodic = config.checkpoint_every and trainer.step % config.checkpoint_every == 0
                if periodic and not self._evaluation_due():  # which saves
                    self.save()

    def _shares(self) -> dict[str, int]:
        return {"rank": self.processes.rank, "world_size": self.processes.world_size}

    def _bar(self) -> tqdm:
        trainer, size = self.trainer, self.config.batch_size
        return tqdm(
            total=trainer.total_steps * size,
            initial=trainer.step * size,
            unit="img",
            unit_scale=True,
            disable=not self.processes.first,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            desc="training",
        )

    def _profiler(self):
        if not self.config.profile:
            return nullcontext(_NoProfile())
        left = self.trainer.total_steps - self.trainer.step
        return profiler(self.run.folder / "profile", self.config.profile, left, self.processes)

    def _evaluation_due(self) -> bool:
        trainer = self.trainer
        period = self.config.eval_every * trainer.steps_per_epoch
        return trainer.step > 0 and (trainer.step % period == 0 or trainer.step == trainer.total_steps)

    def _evaluate_if_due(self, bar: tqdm) -> bool:
        """Evaluate, unless that is done (a run may have been stopped before it); False if asked to stop.

        Saves before, since an evaluation may fail, and after, with its scores.
        """
        trainer, run = self.trainer, self.run
        if not self._evaluation_due() or run.evaluated(trainer.step):
            return True
        if run.saved != trainer.step:
            self.save()
        trainer.share_buffers()
        values = self.scores(trainer.model, "val_")
        if values is not None and trainer.ema is not None:
            averaged = self.scores(trainer.ema.module, "ema_val_")
            values = None if averaged is None else values | averaged
        if values is None:
            return False
        run.log(trainer.step, values)
        objective = trainer.objective
        score = values[f"{'' if trainer.ema is None else 'ema_'}val_{objective.scores[0]}"]
        self.save(score if objective.larger_is_better else -score)
        self._log_model()
        if self.processes.first:
            found = scores_line(values, objective.scores)
            bar.write(f"epoch {trainer.step / trainer.steps_per_epoch:g}: {found}")
        return True

    def scores(self, model: nn.Module, prefix: str) -> dict[str, float] | None:
        """The objective's scores on the validation split, under names with `prefix`; None when asked to stop."""
        trainer, config = self.trainer, self.config
        found = evaluate(
            model,
            trainer.objective,
            self.val_loader,
            trainer.prepare_images,
            self.processes,
            config.image_size,
            self.interruption.requested,
        )
        if found is None:
            return None
        scores, problems = found
        epoch = -(-trainer.step // trainer.steps_per_epoch)
        self._note_unreadable(problems, self.val_tally, epoch)  # each evaluation reads every image
        counted = scores | ({"unreadable": len(problems)} if problems else {})
        return {prefix + name: value for name, value in counted.items()}

    def _log_model(self) -> None:
        """R^c and sparsity of every layer, and reconstructions, into the curves."""
        model = parallel.unsharded_copy(self.trainer.model, self.build, self.processes)
        if not isinstance(model, CRATE | CRATEMAE):
            return
        samples = readable(self.data.val, range(min(WHITEBOX_IMAGES, len(self.data.val))))
        if not samples:
            return
        images = torch.stack([sample[0] for sample in samples])
        encoder = model.encoder() if isinstance(model, CRATEMAE) else model
        self.run.log_layers(self.trainer.step, layer_statistics(encoder, self.trainer.prepare_images(images)))
        if isinstance(model, CRATEMAE):
            shown = images[:SHOWN_IMAGES]
            noise = image_noise(model, [(self.config.seed, number) for number in range(len(shown))])
            rows = reconstructions(model, shown, self.trainer.normalize, [self.config.mask_ratio], noise)
            self.run.log_image(self.trainer.step, "reconstruction", tiled(rows))

    def _log(self, bar: tqdm) -> None:
        """One entry of the history: means since the last; and the images that could not be read since then."""
        trainer, interval, self.interval = self.trainer, self.interval, _Interval()
        lr = max(group["lr"] for group in trainer.optimizer.param_groups)  # the top layer's
        values = interval.means() | {"lr": lr}
        values["images_per_s"] = interval.steps_per_s() * self.config.batch_size
        self.speeds.append(values["images_per_s"])
        if trainer.nonfinite.total:
            values["skipped_steps"] = trainer.nonfinite.total
        if trainer.scaler.is_enabled():
            values |= {"loss_scale": trainer.scaler.get_scale(), "overflows": trainer.nonfinite.overflows}
        self._count_unreadable()
        if self.tally.total:
            values["unreadable"] = self.tally.total
        self.run.log(trainer.step, values)
        bar.set_postfix({name: f"{value:.3f}" for name, value in interval.means().items()})

    def _count_unreadable(self) -> None:
        """Add up what every process could not read; raises when it is too much."""
        problems = [line for lines in self.processes.gather(self.trainer.problems) for line in lines]
        self.trainer.problems.clear()
        self._note_unreadable(problems, self.tally, max(0, self.trainer.step - 1) // self.trainer.steps_per_epoch)

    def _note_unreadable(self, problems: list[str], tally: UnreadableTally, epoch: int) -> None:
        """Count them, and name those not met before in unreadable.txt."""
        new = tally.add(problems, epoch)
        if new and self.processes.first:
            with checkpoint.writing(self.run.folder), (self.run.folder / "unreadable.txt").open("a") as file:
                file.writelines(f"{line}\n" for line in new)
        tally.check(epoch)

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint; with a score it may become the best."""
        self._count_unreadable()
        self.run.extra = {"unreadable": self.tally.state(), "val_unreadable": self.val_tally.state()}
        self.run.extra["interval"] = self.interval.state()
        self.run.save(self.trainer, score)

    def finish(self, seconds: float) -> None:
        """Score, draw, summarise and say so."""
        averaged = self.trainer.ema is not None
        model = self.trainer.ema.module if averaged else self.trainer.model
        whole = parallel.unsharded_copy(model, self.build, self.processes)
        if self.processes.first:
            speed = statistics.median(self.speeds) if self.speeds else None
            summary = write_report(self.run, self.trainer, whole, self.data, seconds, speed)
            print_summary(summary, self.run.folder)
        self.processes.wait()

    def close(self) -> None:
        """Close the logs, and let others write the folder."""
        self.run.close()


class _Interval:
    """Means since the last log entry, over resumes too, and the speed of this session in it, evaluation and saving
    apart."""

    def __init__(self):
        self._taken, self._sums = 0, {}
        self._steps, self._seconds = 0, 0.0
        self._since: float | None = None

    def resume(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def add(self, result: StepResult) -> None:
        self._steps += 1
        if result.taken:
            self._taken += 1
            for name, value in result.measures.items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def steps_per_s(self) -> float:
        self.pause()
        return self._steps / self._seconds

    def means(self) -> dict[str, float]:
        """Of the steps taken; nothing if none was."""
        return {name: total / self._taken for name, total in self._sums.items()}

    def state(self) -> dict:
        return {"taken": self._taken, "sums": dict(self._sums)}

    def restore(self, state: dict) -> None:
        self._taken, self._sums = state["taken"], dict(state["sums"])


class _NoProfile:
    def step(self) -> None:
        pass
