"""`--dry-run`: everything a run does, twice at most, in a folder that is gone afterwards."""

import dataclasses
import itertools
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch

from crate_fast.train import checkpoint
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import DataSplits, train_loader
from crate_fast.train.distributed import Processes
from crate_fast.train.interruption import Interruption
from crate_fast.train.session import Session

__all__ = ["dry_run"]

_STEPS = 2


def dry_run(config: TrainConfig, output: Path, data: DataSplits, processes: Processes) -> None:
    """Build, train two steps, evaluate two batches, save, load; print what it took.

    Args:
        config: Of the run to be.
        output: Where the run would go; the temporary folder is made beside it, on the same disk.
        data: Its splits.
        processes: This process and its fellows.

    Raises:
        CheckpointError: What was loaded is not what was saved.
    """
    parent = next(path for path in output.absolute().parents if path.exists())
    made = tempfile.mkdtemp(prefix=".dry-run-", dir=parent) if processes.first else ""
    folder = Path(processes.agree(made))
    try:
        session = Session(dataclasses.replace(config, wandb=""), folder / "run", data, processes, Interruption())
        try:
            session.begin(resume=False)
            if processes.first:
                print(session.describe())
            lines = _rehearse(session)
        finally:
            session.close()
        processes.wait()
    finally:
        if processes.first:
            shutil.rmtree(folder)
    if processes.first:
        print("\n".join(lines))


def _rehearse(session: Session) -> list[str]:
    trainer, processes = session.trainer, session.processes
    loader = train_loader(session.config, session.data.train, rank=processes.rank, world_size=processes.world_size)
    steps, times = trainer.train_steps(loader), []
    for _ in range(min(_STEPS, trainer.total_steps)):
        began = time.perf_counter()
        result = next(steps)
        times.append(time.perf_counter() - began)
    session.val_loader = list(itertools.islice(session.val_loader, 2))
    scores = session.scores(trainer.model, "val_")
    session.save()
    saved = checkpoint.load(session.run.checkpoints, trainer.step)
    weights, *_ = trainer.state()
    if any(not torch.equal(weights[name].cpu(), saved.weights[name]) for name in weights):
        raise checkpoint.CheckpointError("the weights read back are not those saved: see to the disk of --output")
    trainer.restore(saved.weights, saved.ema, saved.training["trainer"])
    folder = checkpoint.folder_of(session.run.checkpoints, trainer.step)
    size = sum(path.stat().st_size for path in folder.iterdir())
    on_gpu = processes.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _peak_rss_mib()
    kept = session.config.keep_checkpoints + 2  # the best, and the one being written
    return [
        f"dry run: {len(times)} steps, the last in {times[-1]:.3f} s, loss {result.loss:.4f}; "
        f"validation loss {scores['val_loss']:.4f} on two batches a process",
        f"peak memory of this process {peak:,.0f} MiB{' on the GPU' if on_gpu else ''}; a checkpoint is "
        f"{size / 2**20:,.1f} MiB, and up to {kept} are on the disk at once",
        "saved, read back, and deleted: the same command without --dry-run trains",
    ]


def _peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
