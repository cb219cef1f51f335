"""Supervised pre-training: `torchrun train/pretrain.py`, or plain `python train/pretrain.py`.

Without arguments it trains a small CRATE on `shape_scenes`, a data set made on the fly, and ends with its accuracy
and the segmentation score of its attention maps. Everything of a run is in its folder:

    config.yaml  metrics.jsonl  summary.json  attention.png  curves.png  checkpoints/  tensorboard/
"""

import json
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import crate_fast
from crate_fast import CRATE
from crate_fast.provenance import provenance
from crate_fast.segmentation import score_attention, scores_table
from crate_fast.train import checkpoint
from crate_fast.train.command_line import build_config, dump_config
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import DataSplits, build_splits, eval_loader, readable, train_loader
from crate_fast.train.distributed import Processes, process_group
from crate_fast.train.engine import Trainer, evaluate
from crate_fast.train.report import attention_figure, curves_figure
from crate_fast.train.runs import build_model
from crate_fast.whitebox import attention_layer, layer_statistics

__all__ = ["main"]

# Settings that a resumed run may change: they decide how fast it goes and what is kept, not what is computed.
FREE_SETTINGS = (
    "data_dir",
    "download",
    "workers",
    "threads",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
)
WHITEBOX_IMAGES = 64


class Run:
    """The folder of a run: what was measured, and where it stands. Only the first process writes."""

    def __init__(self, folder: Path, config: TrainConfig, processes: Processes):
        self.folder, self.config, self.processes = folder, config, processes
        self.checkpoints = folder / "checkpoints"
        self.history: list[dict] = []
        self.best: dict = {"step": None, "val_accuracy": -1.0}
        self.board: SummaryWriter | None = None

    def begin(self, trainer: Trainer, resume: bool) -> None:
        """Start afresh, or restore the newest checkpoint into `trainer` if there is one."""
        step = checkpoint.newest(self.checkpoints)
        if self.processes.agree(str(step)) != str(step):
            raise checkpoint.CheckpointError(
                f"process {self.processes.rank} finds the newest checkpoint in {self.folder} at step {step}, the "
                "first process at another: give --output a folder that all hosts share"
            )
        if step is not None and not resume:
            raise FileExistsError(
                f"{self.folder} holds a run at step {step}: pass --resume to continue it, or another --output"
            )
        if step is not None:
            weights, training, manifest = checkpoint.load(self.checkpoints, step)
            self._check_same_run(manifest["config"])
            trainer.restore(weights, training["trainer"])
            self.history, self.best = manifest["history"], manifest["best"]
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.best["step"] is not None:  # it may have been killed between the checkpoint and this note
                checkpoint.record_best(self.checkpoints, self.best)
            checkpoint.write_text(self.folder / "config.yaml", dump_config(self.config))
            lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
            checkpoint.write_text(self.folder / "metrics.jsonl", lines)
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=trainer.step + 1)
        self.processes.wait()

    def _check_same_run(self, saved: dict) -> None:
        present = vars(self.config)
        differing = [name for name in present if name not in FREE_SETTINGS and present[name] != saved.get(name)]
        if differing:
            changes = ", ".join(f"{name}: {saved.get(name)!r} → {present[name]!r}" for name in differing)
            raise checkpoint.CheckpointError(
                f"the checkpoint in {self.folder} was made with other settings ({changes}): resume with its own "
                f"(--recipe {self.folder / 'config.yaml'}), or start a new run in another --output"
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append to metrics.jsonl and TensorBoard."""
        entry = {"step": step, **values}
        self.history.append(entry)
        if self.board is not None:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def log_layers(self, step: int, statistics: dict[str, torch.Tensor]) -> None:
        """R^c and sparsity of every layer, to TensorBoard."""
        if self.board is not None:
            for name, rows in statistics.items():
                for layer, (mean, _) in enumerate(rows.tolist()):
                    self.board.add_scalar(f"{name}/layer_{layer:02d}", mean, step)

    def save(self, trainer: Trainer, accuracy: float | None = None) -> None:
        """Write a checkpoint; with an accuracy it may become the best. Older ones are rotated out."""
        better = accuracy is not None and accuracy > self.best["val_accuracy"]
        if better:
            self.best = {"step": trainer.step, "val_accuracy": accuracy}
        if self.processes.first:
            epoch = trainer.step / trainer.steps_per_epoch
            facts = {"epoch": epoch, "config": vars(self.config), "history": self.history, "best": self.best}
            facts |= provenance()
            training = {"trainer": trainer.state()}
            checkpoint.save(self.checkpoints, trainer.step, trainer.model.state_dict(), training, facts)
            if better:
                checkpoint.record_best(self.checkpoints, self.best)
            checkpoint.rotate(self.checkpoints, self.config.keep_checkpoints)
        self.processes.wait()


def _train(trainer: Trainer, run: Run, data: DataSplits) -> None:
    """From the trainer's step to the last one, with evaluation, logging and checkpoints on the way."""
    config, processes = run.config, run.processes
    shares = {"rank": processes.rank, "world_size": processes.world_size}
    loader = train_loader(config, data.train, first_step=trainer.step, **shares)
    val_loader = eval_loader(config, data.val, **shares)
    probe = torch.stack([sample[0] for sample in readable(data.val, range(min(WHITEBOX_IMAGES, len(data.val))))])
    evaluation_period = config.eval_every * trainer.steps_per_epoch
    slow = not sys.stderr.isatty()
    with tqdm(
        total=trainer.total_steps * config.batch_size,
        initial=trainer.step * config.batch_size,
        unit="img",
        unit_scale=True,
        disable=not processes.first,
        mininterval=10 if slow else 0.2,
        desc="training",
    ) as bar:
        recent: list[torch.Tensor] = []
        began = time.perf_counter()
        for measured in trainer.train_steps(loader):
            recent.append(measured)
            bar.update(config.batch_size)
            done = trainer.step == trainer.total_steps
            if trainer.step % config.log_every == 0 or done:
                totals = processes.sum(torch.stack(recent).mean(dim=0)) / processes.world_size
                loss, accuracy = totals.tolist()
                speed = len(recent) * config.batch_size / (time.perf_counter() - began)
                lr = max(group["lr"] for group in trainer.optimizer.param_groups)  # the top layer's
                run.log(trainer.step, {"loss": loss, "accuracy": accuracy, "lr": lr, "images_per_s": speed})
                bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}")
                recent, began = [], time.perf_counter()
            paused = time.perf_counter()
            if trainer.step % evaluation_period == 0 or done:
                scores = evaluate(trainer.model, val_loader, trainer.normalize, processes, trainer.dtype)
                run.log(trainer.step, {f"val_{name}": value for name, value in scores.items()})
                if isinstance(trainer.model, CRATE) and processes.first:
                    images = trainer.normalize(probe.to(processes.device))
                    run.log_layers(trainer.step, layer_statistics(trainer.model, images))
                run.save(trainer, scores["accuracy"])
                if processes.first:
                    bar.write(
                        f"epoch {trainer.step / trainer.steps_per_epoch:g}: validation accuracy "
                        f"{scores['accuracy']:.4f}, loss {scores['loss']:.4f}"
                    )
            elif config.checkpoint_every and trainer.step % config.checkpoint_every == 0:
                run.save(trainer)
            began += time.perf_counter() - paused  # images/s is of training alone


def _finish(trainer: Trainer, run: Run, data: DataSplits, seconds: float) -> dict:
    """Score, draw and summarise; on the first process only."""
    model, config, folder = trainer.model, run.config, run.folder
    curves_figure(run.history, folder / "curves.png")
    final = next(entry for entry in reversed(run.history) if "val_accuracy" in entry)
    summary = {
        "val_accuracy": final["val_accuracy"],
        "val_loss": final["val_loss"],
        "chance": 1 / len(data.classes),
        "best_val_accuracy": run.best["val_accuracy"],
        "best_checkpoint": str(checkpoint.folder_of(run.checkpoints, run.best["step"])),
        "last_checkpoint": str(checkpoint.folder_of(run.checkpoints, trainer.step)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.step,
        "seconds_this_session": round(seconds, 1),
    }
    if isinstance(model, CRATE):
        layer = attention_layer(model)
        source = data.val if data.masks is None else data.masks
        shown = min(8, len(source))
        spaced = [i * len(source) // shown for i in range(shown)]  # folders are sorted
        samples = readable(source, spaced)
        masks = None if data.masks is None else torch.stack([sample[2] for sample in samples])
        images = torch.stack([sample[0] for sample in samples])
        titles = [data.classes[sample[1]] for sample in samples]
        layers = sorted({layer, model.transformer.depth - 1})
        attention_figure(model, images, masks, titles, trainer.normalize, layers, folder / "attention.png")
        if data.masks is not None:
            summary["attention_layer"] = layer
            batches = ((batch.images, batch.labels, batch.masks) for batch in eval_loader(config, data.masks))
            summary["attention_miou"] = score_attention(model, batches, trainer.normalize)
    checkpoint.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _print_summary(summary: dict, folder: Path) -> None:
    print(
        f"\nvalidation accuracy {summary['val_accuracy']:.4f} (chance {summary['chance']:.4f}), "
        f"best {summary['best_val_accuracy']:.4f}"
    )
    if "attention_miou" in summary:
        print(scores_table(summary["attention_miou"], marked=summary["attention_layer"]))
        print("  (* the layer that the paper looks at)")
    print("written:")
    for name in ("summary.json", "config.yaml", "metrics.jsonl", "curves.png", "attention.png", "tensorboard"):
        if (folder / name).exists():
            print(f"  {folder / name}")
    print(f"  {summary['last_checkpoint']} (last)\n  {summary['best_checkpoint']} (best)")


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    config, options = build_config(argv, "Supervised pre-training of CRATE (or any timm model).", "shape_scenes")
    began = time.perf_counter()
    with process_group(config.device, config.threads) as processes:
        name = f"runs/{Path(options.recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = Path(options.output or processes.agree(name))
        torch.manual_seed(config.seed)
        if config.download and processes.local_rank != 0:
            processes.wait()  # until the host's first process has downloaded
        data = build_splits(config)
        if config.download and processes.local_rank == 0:
            processes.wait()
        model = build_model(config, len(data.classes)).to(processes.device)
        trainer = Trainer(model, config, processes, len(data.train) // config.batch_size)
        run = Run(folder, config, processes)
        run.begin(trainer, options.resume)
        if processes.first:
            print(
                f"crate_fast {crate_fast.__version__}: {config.model}, "
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(data.train)} images, "
                f"{trainer.total_steps} steps on {processes.world_size} × {processes.device} → {folder}"
            )
        _train(trainer, run, data)
        if processes.first:
            summary = _finish(trainer, run, data, time.perf_counter() - began)
            _print_summary(summary, folder)
            run.board.close()
        processes.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
