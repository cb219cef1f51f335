"""From settings to a finished run: what pretrain, pretrain_mae, finetune and linear_probe share."""

import argparse
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from crate_fast.errors import run_command
from crate_fast.train.command_line import build_config
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import DataSplits, build_splits
from crate_fast.train.distributed import Processes, process_group
from crate_fast.train.dry_run import dry_run
from crate_fast.train.engine import check_settings
from crate_fast.train.interruption import Interruption
from crate_fast.train.session import Session

__all__ = ["launch", "train_command"]


def train_command(
    argv: list[str] | None,
    description: str,
    recipe: str,
    adjust: Callable[[dict, dict], dict] = lambda values, chosen: values | chosen,
) -> int:
    """Read a command line and train; what the user can correct is one line.

    Args:
        argv: Arguments; those of the process when None.
        description: For `--help`.
        recipe: The default recipe.
        adjust: See `build_config`.

    Returns:
        The exit status.
    """
    return run_command(lambda: launch(*build_config(argv, description, recipe, adjust=adjust)))


def launch(config: TrainConfig, options: argparse.Namespace) -> int:
    """Train as the settings say, from the start or from the newest checkpoint, to the end or until asked to stop.

    Args:
        config: The run's.
        options: `recipe`, `output`, `resume` and `dry_run` of the command line.

    Returns:
        The exit status.
    """
    began = time.perf_counter()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    # before the processes have met there is nothing to save: a signal then ends them, as torchrun expects
    with process_group(config.device, config.threads) as processes, Interruption() as interruption:
        name = f"runs/{Path(options.recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = Path(options.output or processes.agree(name))
        check_settings(config, processes)  # before the data, whose files may take minutes to list
        data = _open_data(config, processes)
        if options.dry_run:
            dry_run(config, folder, data, processes)
            return 0
        session = Session(config, folder, data, processes, interruption)
        try:
            session.begin(options.resume, restarted)
            if processes.first:
                print(session.describe())
            finished = session.train()
            if finished:
                session.finish(time.perf_counter() - began)
            elif processes.first:
                print(
                    f"\n{interruption.name or 'a signal to another process'}: saved step {session.trainer.step} of "
                    f"{session.trainer.total_steps}; the same command with --output {folder} --resume continues"
                )
        finally:
            session.close()
        processes.wait()
    return 0


def _open_data(config: TrainConfig, processes: Processes) -> DataSplits:
    """The data; where it is to be downloaded a host's first process does so, and the others wait."""
    if config.download and processes.local_rank != 0:
        processes.wait()
    data = build_splits(config)
    if config.download and processes.local_rank == 0:
        processes.wait()
    return data
