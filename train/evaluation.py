"""Classification on a split that is shared out over the processes: every image once, however many there are."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from crate_fast.functional import cached_dictionaries
from crate_fast.train.distributed import Processes
from crate_fast.train.engine import autocast
from crate_fast.train.parallel import is_sharded

__all__ = ["evaluate"]


@torch.no_grad()
@cached_dictionaries()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    prepare: Callable[[Tensor], Tensor],
    processes: Processes,
    image_size: int,
    dtype: torch.dtype | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], list[str]] | None:
    """Loss and accuracy, each image counted once, by any number of processes.

    A model that is shared out (FSDP2) computes on all processes together: one that has run out of images goes on with
    an empty one that is not counted.

    Args:
        model: In any mode; left in evaluation mode.
        loader: `eval_loader` of this process.
        prepare: uint8 images → the model's input on the device.
        processes: Whose counts are added up.
        image_size: Of the images, in pixels.
        dtype: Of autocast.
        stopping: Whether this process has been asked to stop. Then nobody has a result.

    Returns:
        ({"loss" (cross-entropy in nats), "accuracy" and "top5" in [0, 1], "images"}, the images of all processes that
        could not be read), or None if a process stopped.

    Raises:
        ValueError: No image could be read.
    """
    model.eval()
    together = is_sharded(model)
    totals = torch.zeros(5, dtype=torch.float64, device=processes.device)
    problems: list[str] = []
    batches = iter(loader)
    for _ in range(processes.largest(len(loader)) if together else len(loader)):
        if stopping():
            totals[4] = 1
            if not together:  # the others of a shared-out model are waiting for this one's parts
                break
        batch = next(batches, None)
        problems += batch.problems if batch is not None else []
        if batch is not None and len(batch.labels):
            totals[:4] += _counts(model, prepare(batch.images), batch.labels.to(processes.device), dtype)
        elif together:
            model(prepare(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)))
    loss, top1, top5, count, stopped = processes.sum(totals).tolist()
    problems = [line for lines in processes.gather(problems) for line in lines]
    if stopped:
        return None
    if not count:
        raise ValueError(f"no image of the validation split could be read: {problems[:3]}")
    return {"loss": loss / count, "accuracy": top1 / count, "top5": top5 / count, "images": int(count)}, problems


def _counts(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Sum of losses, of hits, of hits among five, and images, [4]."""
    with autocast(images.device, dtype):
        logits = model(images)
    logits = logits.float()
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    counts = [loss, ranked[:, 0].sum(), ranked.sum(), torch.tensor(len(labels), device=labels.device)]
    return torch.stack([count.double() for count in counts])
