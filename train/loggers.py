"""Where measurements go: metrics.jsonl, summary.csv, TensorBoard, and Weights & Biases if asked."""

import csv
import io
import json
import secrets
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from crate_fast.errors import UserError
from crate_fast.train.checkpoint import write_text, writing

__all__ = ["Loggers"]


class Loggers:
    """The open logs of a run, on its first process.

    Args:
        folder: Of the run.
        history: Entries up to here: metrics.jsonl is rewritten to hold them and no others.
        step: Optimiser steps done; later points of an interrupted session are dropped from TensorBoard.
        project: Of Weights & Biases; none when empty.
        config: Of the run, for Weights & Biases.

    Raises:
        UserError: Weights & Biases is asked for and not installed.
        DiskError: A file could not be written.
    """

    def __init__(self, folder: Path, history: list[dict], step: int, project: str, config: dict):
        self.folder = folder
        with writing(folder):
            write_text(folder / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.online = _wandb_run(folder, project, config) if project else None

    def add(self, entry: dict) -> None:
        """One entry of the history: "step" and numbers."""
        with writing(self.folder):
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.add_scalars(entry["step"], {name: value for name, value in entry.items() if name != "step"})

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers for the curves alone."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.online is not None:
            self.online.log(values, step=step)

    def add_image(self, step: int, name: str, image: Tensor) -> None:
        """A picture for TensorBoard, uint8 [height, width, 3]."""
        self.board.add_image(name, image, step, dataformats="HWC")

    def write_summary_csv(self, history: list[dict]) -> None:
        """summary.csv: a line an evaluation, with the last training measurements before it."""
        rows, training = [], {}
        for entry in history:
            training |= entry
            if "val_loss" in entry:
                rows.append(dict(training))
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        table = csv.DictWriter(text, columns)
        table.writeheader()
        table.writerows(rows)
        with writing(self.folder):
            write_text(self.folder / "summary.csv", text.getvalue())

    def close(self) -> None:
        """Flush and close."""
        with writing(self.folder):
            self.board.close()
        if self.online is not None:
            self.online.finish()


def _wandb_run(folder: Path, project: str, config: dict):
    """The run's page; a resumed run goes on with its own."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError(
            f"wandb={project!r} needs Weights & Biases: pip install wandb, or leave --wandb out"
        ) from error
    note = folder / "wandb_id"
    if not note.is_file():
        write_text(note, secrets.token_hex(8))
    return wandb.init(
        project=project, name=folder.name, id=note.read_text(), resume="allow", dir=str(folder), config=config
    )
