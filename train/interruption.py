"""A polite end: SIGTERM and SIGUSR1 ask a run to save and leave (preemption, the end of a job's time)."""

import signal
from types import FrameType

__all__ = ["Interruption"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """While open, the two signals only leave a note; the loop reads it after each step.

    Args:
        *more: Further signals to be treated so.

    >>> with Interruption() as interruption:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     interruption.requested()
    True
    """

    def __init__(self, *more: signal.Signals):
        self.signals = SIGNALS + more
        self.name: str | None = None
        self._before: dict = {}

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None
