"""Scores on a split that is shared out over the processes: every image once, however many there are."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from crate_fast.errors import UserError
from crate_fast.functional import cached_dictionaries
from crate_fast.train.distributed import Processes
from crate_fast.train.objective import Objective
from crate_fast.train.parallel import is_sharded

__all__ = ["evaluate"]


@torch.no_grad()
@cached_dictionaries()
def evaluate(
    model: nn.Module,
    objective: Objective,
    loader: DataLoader,
    prepare: Callable[[Tensor], Tensor],
    processes: Processes,
    image_size: int,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], list[str]] | None:
    """Means over a split, each image counted once, by any number of processes.

    A model that is shared out (FSDP2) computes on all processes together: one that has run out of images goes on with
    an empty one that is not counted.

    Args:
        model: In any mode; left in evaluation mode.
        objective: Says what is measured.
        loader: `eval_loader` of this process.
        prepare: uint8 images → the model's input on the device.
        processes: Whose counts are added up.
        image_size: Of the images, in pixels.
        stopping: Whether this process has been asked to stop. Then nobody has a result.

    Returns:
        (the objective's scores by name, the images of all processes that could not be read), or None if a process
        stopped.

    Raises:
        UserError: No image could be read.
    """
    model.eval()
    together = is_sharded(model)
    totals = torch.zeros(len(objective.scores) + 2, dtype=torch.float64, device=processes.device)
    problems: list[str] = []
    batches = iter(loader)
    for _ in range(processes.largest(len(loader)) if together else len(loader)):
        if stopping():
            totals[-1] = 1
            if not together:  # the others of a shared-out model are waiting for this one's parts
                break
        batch = next(batches, None)
        problems += batch.problems if batch is not None else []
        if batch is not None and len(batch.labels):
            totals[:-2] += objective.evaluation(model, prepare(batch.images), batch)
            totals[-2] += len(batch.labels)
        elif together:
            objective.forward(model, prepare(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)))
    *sums, count, stopped = processes.sum(totals).tolist()
    problems = [line for lines in processes.gather(problems) for line in lines]
    if stopped:
        return None
    if not count:
        raise UserError(f"no image of the validation split could be read: {problems[:3]}")
    return {name: total / count for name, total in zip(objective.scores, sums, strict=True)}, problems
