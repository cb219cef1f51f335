"""Corrupt images: skipped, named once, counted by the epoch; too many of them stop the run."""

from collections.abc import Sequence

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig

_SHOWN = 5


class Unreadable(OSError):
    """An image that cannot be read; the message is that of `describe`."""


def describe(image: str, error: Exception) -> str:
    """Return the line that names a corrupt image in logs: "path: error: reason"."""
    return f"{image}: {type(error).__name__}: {error}"


class UnreadableTally:
    """The corrupt images of a split of `n_images`, each counted once an epoch however often it is met.

    Each process has a tally and adds the problems of all processes, so that all stop together.
    """

    def __init__(self, config: TrainConfig, n_images: int):
        self.share, self.n_images = config.max_unreadable, n_images
        self.met: dict[str, int] = {}  # problem → last epoch in which it was met

    def add(self, problems: Sequence[str], epoch: int) -> list[str]:
        """Count the `problems` of this epoch's batches; return the new ones, in order."""
        new = [line for line in dict.fromkeys(problems) if line not in self.met]
        self.met.update(dict.fromkeys(problems, epoch))
        return new

    def check(self, epoch: int) -> None:
        """Stop a run that loses more than `max_unreadable` of the split's images in this epoch."""
        met = [line for line, last in self.met.items() if last == epoch]
        if len(met) > self.share * self.n_images:
            raise UserError(
                f"{len(met)} of {self.n_images} images ({len(met) / self.n_images:.2%}) could not be read in epoch "
                f"{epoch}, more than max_unreadable={self.share} allows: repair or remove them, or raise "
                f"--max-unreadable. The first: {'; '.join(met[:_SHOWN])}"
            )
