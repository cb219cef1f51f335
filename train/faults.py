"""Faults that a run survives: a signal that asks it to stop, corrupt images, and steps that are not finite."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crate_fast.errors import UserError
from crate_fast.train.distributed import is_sharded


class Interruption:
    """A note of SIGTERM, SIGUSR1 or one of `more`; the loop reads it after each step, saves and leaves.

    >>> with Interruption() as interruption:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     interruption.requested()
    True
    """

    def __init__(self, *more: signal.Signals):
        self.signals = (signal.SIGTERM, signal.SIGUSR1, *more)
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
        """Return True once a signal has come."""
        return self.name is not None


class UnreadableTally:
    """The corrupt images of a split of `n_images`, each counted once an epoch however often it is met.

    Each process has a tally and adds the problems of all processes, so that all stop together. `limit` is the largest
    fraction that may be corrupt.
    """

    def __init__(self, limit: float, n_images: int):
        self.limit, self.n_images = limit, n_images
        self.met: dict[str, int] = {}  # problem → last epoch in which it was met

    def add(self, problems: Sequence[str], epoch: int) -> list[str]:
        """Count the `problems` of this epoch's batches; return the new ones, in order."""
        new = [line for line in dict.fromkeys(problems) if line not in self.met]
        self.met.update(dict.fromkeys(problems, epoch))
        return new

    def check(self, epoch: int) -> None:
        """Stop a run that loses more than `max_unreadable` of the split's images in this epoch."""
        met = [line for line, last in self.met.items() if last == epoch]
        if len(met) > self.limit * self.n_images:
            raise UserError(
                f"{len(met)} of {self.n_images} images ({len(met) / self.n_images:.2%}) could not be read in epoch "
                f"{epoch}, more than max_unreadable={self.limit} allows: repair or remove them, or raise "
                f"--max-unreadable. The first: {'; '.join(met[:5])}"
            )


class NonFiniteError(UserError):
    """Loss, gradients or weights that are not finite."""


@dataclass
class NonFinite:
    """The count of steps skipped because loss or gradient was not finite.

    `overflows` are steps in which fp16's scale was too large, which is no fault. `last` has (step, loss, gradient
    norm).
    """

    total: int = 0
    in_a_row: int = 0
    overflows: int = 0
    last: list[tuple[int, float, float]] = field(default_factory=list)

    def passed(self) -> None:
        """Note a finite step."""
        self.in_a_row, self.last = 0, []

    def failed(self, step: int, loss: float, norm: float) -> None:
        """Count a skipped step."""
        self.total += 1
        self.in_a_row += 1
        self.last.append((step, loss, norm))

    def error(self, explanation: str) -> NonFiniteError:
        """Return the error that ends a run after too many in a row; `explanation` is that of `diagnosis`."""
        lines = [f"step {step}: loss {loss:g}, gradient norm {norm:g}" for step, loss, norm in self.last[-5:]]
        return NonFiniteError(
            f"{self.in_a_row} steps in a row were not finite, nor taken ({'; '.join(lines)}). {explanation}. "
            "Checkpoints are from before: start a new run from one (--init) with a lower lr or clip_grad, a longer "
            "warm-up or --precision fp32; or raise nonfinite_limit if single batches are known to be bad"
        )


def poisoned(weights: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors in a state dict that hold a NaN or an infinity."""

    def finite(tensor: Tensor) -> bool:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return bool(local.isfinite().all())

    return [name for name, tensor in weights.items() if tensor.is_floating_point() and not finite(tensor)]


@torch.no_grad()
def diagnosis(model: nn.Module, images: Tensor, outputs: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]) -> str:
    """Say where values stop being finite: images, weights, gradients, or the first module whose output does.

    Runs the model once more on `images`, normalised, in fp32, unless it is sharded. Gradients are those of the step.
    """
    if not images.isfinite().all():
        return "The images themselves are not finite"
    bad = poisoned(dict(model.named_parameters()))
    if bad:
        return f"Weights are not finite: {', '.join(bad[:5])}"
    gradients = poisoned({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    names = f"the gradients of {', '.join(gradients[:5])} are not" if gradients else "so are this process's gradients"
    if is_sharded(model):  # a process cannot run it alone
        return f"This process's weights are finite; {names}"

    def bad_output(output: object) -> bool:
        return isinstance(output, Tensor) and not bool(output.isfinite().all())

    found: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: found.extend([name] * bad_output(output)))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        found_outputs = outputs(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"In fp32 the first output that is not finite is that of {found[0]}"
    if any(map(bad_output, found_outputs)):
        return f"In fp32 the output of every layer is finite on the last images, and the model's is not; {names}"
    largest = max(output.abs().max().item() for output in found_outputs)
    return f"In fp32 every output is finite on the last images (the largest is {largest:g}); {names}"
