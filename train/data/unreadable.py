"""Images that cannot be read: named once, counted by the epoch, and too many of them stop the run."""

from collections.abc import Sequence

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig

__all__ = ["Unreadable", "UnreadableTally"]

_SHOWN = 5


class Unreadable(OSError):
    """An image that cannot be read; the message is "path: error: what it says"."""


class UnreadableTally:
    """Counts a split's unreadable images, each once an epoch however often it is met.

    Every process can keep one, if all are given the problems of all.

    Args:
        config: The run's; `max_unreadable` decides.
        n_images: Of the split.

    Example:
        >>> tally = UnreadableTally(TrainConfig(max_unreadable=0.5), n_images=2)
        >>> tally.add(["a.jpg: OSError: broken"], epoch=0)
        ['a.jpg: OSError: broken']
        >>> tally.add(["a.jpg: OSError: broken"], epoch=1)
        []
    """

    def __init__(self, config: TrainConfig, n_images: int):
        self.share, self.n_images = config.max_unreadable, n_images
        self._epoch_of: dict[str, int] = {}  # line → last epoch it was met in

    def add(self, problems: Sequence[str], epoch: int) -> list[str]:
        """Count the `problems` of batches of this epoch; return those never met before, in order."""
        new = [line for line in dict.fromkeys(problems) if line not in self._epoch_of]
        self._epoch_of.update(dict.fromkeys(problems, epoch))
        return new

    def check(self, epoch: int) -> None:
        """Stop a run that misses too much.

        Raises:
            UserError: More than `max_unreadable` of the split's images could not be read in this epoch.
        """
        count = self.count(epoch)
        if count > self.share * self.n_images:
            present = [line for line, last in self._epoch_of.items() if last == epoch]
            listed = "; ".join(present[:_SHOWN])
            raise UserError(
                f"{count} of {self.n_images} images ({count / self.n_images:.2%}) could not be read in epoch {epoch},"
                f" more than max_unreadable={self.share} allows: repair or remove them, or raise --max-unreadable. "
                f"The first: {listed}"
            )

    def count(self, epoch: int) -> int:
        """Different images that could not be read in this epoch so far."""
        return sum(last == epoch for last in self._epoch_of.values())

    @property
    def total(self) -> int:
        """Different images that could not be read in the run so far."""
        return len(self._epoch_of)

    def state(self) -> dict[str, int]:
        """What `restore` needs, plain values."""
        return dict(self._epoch_of)

    def restore(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken."""
        self._epoch_of = dict(state)
