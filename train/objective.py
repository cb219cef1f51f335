"""What a model is trained for, and how well it does it: classes of images, or their hidden patches.

The loop knows neither: it asks the model's objective for a loss to go down, and for the sums of an evaluation.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_fast import CRATEMAE
from crate_fast.errors import UserError
from crate_fast.train.batch_augmentation import BatchAugmentation
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import Batch
from crate_fast.train.distributed import Processes
from crate_fast.train.reconstruction import image_noise

__all__ = ["Classification", "Objective", "Reconstruction", "autocast", "autocast_dtype", "objective_for"]


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for plain fp32."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]


def autocast(device: torch.device, dtype: torch.dtype | None):
    """`torch.autocast` in `dtype`, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Objective(ABC):
    """See `objective_for`.

    Attributes:
        measures: Names of what a training step gives beside its gradient, the loss first.
        scores: Names of what an evaluation gives, the one that chooses the best checkpoint first.
        larger_is_better: Of that one.
    """

    measures: tuple[str, ...]
    scores: tuple[str, ...]
    larger_is_better: bool

    def __init__(self, config: TrainConfig, processes: Processes):
        self.config, self.processes = config, processes
        self.dtype = autocast_dtype(config, processes.device)

    @abstractmethod
    def inputs(self, images: Tensor, labels: Tensor, step: int, part: int) -> tuple[Tensor, ...]:
        """What `training` takes of a micro-batch, on the device: all that the host draws is drawn here.

        Args:
            images: Normalised, [B, 3, S, S].
            labels: Classes [B].
            step: Optimiser step, from 0.
            part: Number of the micro-batch in this process's step, from 0.
        """

    @abstractmethod
    def training(self, runner: nn.Module, *inputs: Tensor) -> Tensor:
        """A micro-batch's measures, [len(measures)]; the first, the loss, has a gradient.

        Args:
            runner: The model, as it runs a training step.
            *inputs: From `inputs`.
        """

    @abstractmethod
    def evaluation(self, model: nn.Module, images: Tensor, batch: Batch) -> Tensor:
        """Sums of the scores over a batch's images, fp64 [len(scores)].

        Args:
            model: In evaluation mode.
            images: The batch's, normalised, on the device.
            batch: As loaded.
        """

    @abstractmethod
    def outputs(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """All that the model gives for any images."""

    def forward(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """`outputs` under the run's autocast."""
        with autocast(images.device, self.dtype):
            return self.outputs(model, images)


class Classification(Objective):
    """Classes, by cross-entropy, on images erased and mixed as the settings say."""

    measures = ("loss", "accuracy")
    scores = ("accuracy", "loss", "top5")
    larger_is_better = True

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes):
        super().__init__(config, processes)
        share = config.batch_size // (config.accumulate * processes.world_size)
        self.augment = BatchAugmentation(config, model.num_classes, processes.device, share)

    def inputs(self, images, labels, step, part):
        """See `Objective`: images, targets and labels."""
        part = part * self.processes.world_size + self.processes.rank
        return *self.augment(images, labels, step, part), labels

    def training(self, runner, images, targets, labels):
        """See `Objective`."""
        smoothing = self.config.label_smoothing if targets.dim() == 1 else 0.0  # a mixture has it in it
        logits = self.forward(runner, images)[0].float()
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return torch.stack([loss, (logits.detach().argmax(dim=1) == labels).float().mean()])

    def evaluation(self, model, images, batch):
        """See `Objective`."""
        logits, labels = self.forward(model, images)[0].float(), batch.labels.to(images.device)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([value.double() for value in (ranked[:, 0].sum(), loss, ranked.sum())])

    def outputs(self, model, images):
        """See `Objective`."""
        return (model(images),)


class Reconstruction(Objective):
    """Hidden patches, by squared error.

    What is hidden is drawn by the step and an image's place in its batch, the same for any number of processes and
    accumulation steps; in evaluation by the image, the same in every evaluation.
    """

    measures = scores = ("loss",)
    larger_is_better = False

    def __init__(self, model: CRATEMAE, config: TrainConfig, processes: Processes):
        super().__init__(config, processes)
        self.n_patches = model.grid_size[0] * model.grid_size[1]
        self.model = model
        model.kept(config.mask_ratio)
        self._drawn: tuple[int, Tensor] = (-1, torch.empty(0))

    def inputs(self, images, labels, step, part):
        """See `Objective`: images, and the noise that hides their patches."""
        if self._drawn[0] != step:
            seed = np.random.SeedSequence((self.config.seed, step)).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(seed))
            self._drawn = (step, torch.rand(self.config.batch_size, self.n_patches, generator=generator))
        size = self.config.batch_size // self.config.accumulate
        mine = self._drawn[1][part * size : (part + 1) * size][self.processes.rank :: self.processes.world_size]
        return images, mine.to(images.device, non_blocking=True)

    def training(self, runner, images, noise):
        """See `Objective`."""
        with autocast(images.device, self.dtype):
            loss, _, _ = runner(images, self.config.mask_ratio, noise=noise)
        return loss.float().unsqueeze(0)

    def evaluation(self, model, images, batch):
        """See `Objective`."""
        with autocast(images.device, self.dtype):
            loss, _, _ = model(images, self.config.mask_ratio, noise=self.noise(batch).to(images.device))
        return loss.double().unsqueeze(0) * len(images)

    def noise(self, batch: Batch) -> Tensor:
        """What hides the patches of a batch's images in evaluation, [B, N]: by seed and number of the image."""
        return image_noise(self.model, [(self.config.seed, *key) for key in batch.keys])

    def outputs(self, model, images):
        """See `Objective`: (loss, predicted patches)."""
        return model(images, self.config.mask_ratio)[:2]


def objective_for(model: nn.Module, config: TrainConfig, processes: Processes) -> Objective:
    """What the model is for.

    Raises:
        UserError: The settings do not fit it.
    """
    if not isinstance(model, CRATEMAE):
        return Classification(model, config, processes)
    unused = [name for name in ("mixup", "cutmix", "random_erasing") if getattr(config, name)]
    if unused:
        raise UserError(f"{', '.join(unused)}: masked autoencoding has no use for these; leave them out")
    return Reconstruction(model, config, processes)
