"""Steps whose loss or gradient is not finite: skipped and counted; too many in a row end the run, explained."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crate_fast.errors import UserError
from crate_fast.train.parallel import is_sharded

__all__ = ["NonFinite", "NonFiniteError", "diagnosis", "poisoned"]


class NonFiniteError(UserError):
    """Loss, gradients or weights are no longer finite."""


class NonFinite:
    """The count of skipped steps.

    Args:
        limit: So many in a row end the run.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.total = self.in_a_row = self.overflows = 0
        self.last: list[tuple[int, float, float]] = []

    def passed(self) -> None:
        """A step was finite."""
        self.in_a_row, self.last = 0, []

    def failed(self, step: int, loss: float, norm: float, overflow: bool) -> bool:
        """A step was skipped; whether the run must end.

        Args:
            step: From 0.
            loss: Mean over all processes.
            norm: Of the gradient.
            overflow: fp16's scale was too large, and has been lowered: part of the method, and not held against it.
        """
        if overflow:
            self.overflows += 1
            return False
        self.total += 1
        self.in_a_row += 1
        self.last.append((step, loss, norm))
        return self.in_a_row >= self.limit

    def stop(self, report: str) -> None:
        """End the run.

        Raises:
            NonFiniteError: Always; with the steps and `report`.
        """
        lines = [f"step {step}: loss {loss:g}, gradient norm {norm:g}" for step, loss, norm in self.last[-5:]]
        raise NonFiniteError(
            f"{self.in_a_row} steps in a row were not finite, and none was taken ({'; '.join(lines)}). {report}. "
            "Checkpoints are from before: start a new run from one (--init) with a lower lr or clip_grad, a longer "
            "warm-up or --precision fp32; or raise nonfinite_limit if single batches are known to be bad"
        )

    def state(self) -> dict:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row, "overflows": self.overflows, "last": list(self.last)}

    def restore(self, state: dict) -> None:
        """From a checkpoint."""
        self.total, self.in_a_row, self.overflows = state["total"], state["in_a_row"], state["overflows"]
        self.last = [tuple(entry) for entry in state["last"]]


def poisoned(weights: dict[str, Tensor]) -> list[str]:
    """Names of the tensors in a state dict that hold a NaN or an infinity."""
    return [name for name, tensor in weights.items() if tensor.is_floating_point() and not _finite(tensor)]


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.isfinite().all())


@torch.no_grad()
def diagnosis(model: nn.Module, images: Tensor, outputs: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]) -> str:
    """Where values stop being finite, in words: images, weights, gradients, or the first module whose output does.

    Runs the model once more, in fp32, unless it is shared out over processes.

    Args:
        model: After the backward pass of the step, gradients in place.
        images: Of the step's last micro-batch, normalised.
        outputs: Runs the model on images.
    """
    if not images.isfinite().all():
        return "The images themselves are not finite"
    bad = poisoned(dict(model.named_parameters()))
    if bad:
        return f"Weights are not finite: {', '.join(bad[:5])}"
    gradients = poisoned({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    names = f"the gradients of {', '.join(gradients[:5])} are not" if gradients else "so are this process's gradients"
    if is_sharded(model):  # its parts are not run alone
        return f"This process's weights are finite; {names}"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, output, name=name: found.append(name) if _bad_output(output) and not found else None
        )
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
    if any(_bad_output(output) for output in found_outputs):
        return f"In fp32 the output of every layer is finite on the last images, and the model's is not; {names}"
    largest = max(output.abs().max().item() for output in found_outputs)
    return f"In fp32 every output is finite on the last images (the largest is {largest:g}); {names}"


def _bad_output(output: object) -> bool:
    return isinstance(output, Tensor) and not bool(output.isfinite().all())
