"""Handling of signals, full disks, corrupt images and non-finite steps in a run."""

import errno
import itertools
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crate_fast.errors import UserError
from crate_fast.train.distributed import Processes, is_sharded


class Interruption:
    """Context that records SIGTERM, SIGUSR1 and the signals `more`; the training loop then saves and exits.

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
        """Return True if a signal has arrived."""
        return self.name is not None


@contextmanager
def writing(folder: Path):
    """Convert a failure to write below `folder` into a `UserError` with a remedy."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        number = error.errno if isinstance(error, OSError) else None
        cut = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)  # torch.save's reports
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or cut or free < 2**20
        if (isinstance(error, RuntimeError) and not full) or number in (errno.EEXIST, errno.ENOTDIR):
            raise  # `run_command` has a remedy for the last two
        remedy = "free some space" if full else "check its permissions and its disk"
        raise UserError(
            f"{folder} could not be written ({error}; {free / 2**20:,.0f} MiB are free there). What was saved "
            f"before is intact: {remedy}, then continue (in training with --resume)"
        ) from error


class UnreadableTally:
    """Counter of the corrupt images of a split of `n_images`; each image counts at most once per epoch.

    Each process appends its problems to `pending`; `count` gathers them, so that all processes stop together. `limit`
    is the largest fraction of corrupt images. Rank 0 lists new ones in `file`.
    """

    def __init__(self, limit: float, n_images: int, file: Path, processes: Processes):
        self.limit, self.n_images, self.file, self.processes = limit, n_images, file, processes
        self.pending: list[str] = []
        self.met: dict[str, int] = {}  # problem → last epoch in which it occurred

    def count(self, epoch: int) -> int:
        """Count the pending problems of all processes in this epoch; return their number.

        Raises:
            UserError: More than `limit` of the split's images are corrupt.
        """
        problems = list(itertools.chain(*self.processes.gather(self.pending)))
        self.pending = []
        new = [line for line in dict.fromkeys(problems) if line not in self.met]
        self.met.update(dict.fromkeys(problems, epoch))
        if new and self.processes.first:
            with writing(self.file.parent), self.file.open("a+") as file:
                file.seek(0)
                listed = file.read().splitlines()  # also by an interrupted session
                file.writelines(f"{line}\n" for line in new if line not in listed)
        met = [line for line, last in self.met.items() if last == epoch]
        if len(met) > self.limit * self.n_images:
            raise UserError(
                f"{len(met)} of {self.n_images} images ({len(met) / self.n_images:.2%}) could not be read in epoch "
                f"{epoch}, more than max_unreadable={self.limit} allows: repair or remove them, or raise "
                f"--max-unreadable. The first: {'; '.join(met[:5])}"
            )
        return len(problems)


class NonFiniteError(UserError):
    """Error for a loss, gradients or weights that are not finite."""


@dataclass
class NonFinite:
    """Counter of the steps skipped because of a non-finite loss or gradient.

    `overflows` counts steps in which fp16's loss scale was too large, which is normal. `last` has (step, loss,
    gradient norm).
    """

    total: int = 0
    in_a_row: int = 0
    overflows: int = 0
    last: list[tuple[int, float, float]] = field(default_factory=list)

    def passed(self) -> None:
        """Record a finite step."""
        self.in_a_row, self.last = 0, []

    def failed(self, step: int, loss: float, norm: float) -> None:
        """Record a skipped step."""
        self.total += 1
        self.in_a_row += 1
        self.last.append((step, loss, norm))

    def error(self, explanation: str) -> NonFiniteError:
        """Return the error for too many skipped steps in a row; `explanation` is the text of `diagnosis`."""
        lines = [f"step {step}: loss {loss:g}, gradient norm {norm:g}" for step, loss, norm in self.last[-5:]]
        return NonFiniteError(
            f"{self.in_a_row} steps in a row were skipped as not finite ({'; '.join(lines)}). {explanation}. Start a "
            "new run from an earlier checkpoint (--init) with a lower lr or clip_grad, a longer warm-up or "
            "--precision fp32; or raise nonfinite_limit if single batches are known to be bad"
        )


def poisoned(weights: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors in a state dict that contain NaN or infinity."""
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in weights.items()}
    return [name for name, tensor in local.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


@torch.no_grad()
def diagnosis(model: nn.Module, images: Tensor, outputs: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]) -> str:
    """Describe where values become non-finite: in images, weights, gradients, or the first such module output.

    Unless the model is sharded, it runs again in fp32 on the normalised `images`. Gradients are those of the step.
    """
    if not images.isfinite().all():
        return "The images are not finite"
    bad = poisoned(dict(model.named_parameters()))
    if bad:
        return f"Weights are not finite: {', '.join(bad[:5])}"
    gradients = poisoned({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    names = ", ".join(gradients[:5])
    state = f"the gradients of {names} are not finite" if names else "the gradients of this process are finite"
    if is_sharded(model):  # a process cannot run it alone
        return f"The weights of this process are finite; {state}"

    found: list[str] = []

    def note(name: str, _module: nn.Module | None, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
        for output in outputs(model, images):
            note("the model", None, None, output)
    if found:
        return f"In fp32 the first output that is not finite is that of {found[0]}; {state}"
    return f"In fp32 every output is finite on the last images; {state}"
