"""Training objectives: classification with batch augmentation, and reconstruction of hidden patches.

An objective computes the loss of a micro-batch and, in evaluation, sums of scores.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from crate_fast import CRATEMAE
from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data.loader import Batch
from crate_fast.train.data.transforms import drawing_from, mixed_seed
from crate_fast.train.distributed import Processes
from crate_fast.train.reconstruction import image_noise

_BATCH_KEY = 2**40  # keeps these seeds apart from those of samples, (seed, epoch, index, …)


class Objective:
    """Loss and scores of a model, chosen by `objective_for`. `dtype` is autocast's dtype, or None for plain fp32.

    * `inputs(images, labels, step, part)` draws a micro-batch's random numbers and returns the arguments of
      `training`, on the device. `images` are normalised, [B, 3, S, S]; `labels` [B]; `part` counts micro-batches.
    * `training(runner, *inputs)` returns the `measures` of a micro-batch, [n]; the first is the loss, with gradient.
    * `evaluation(model, images, batch)` returns the `scores` summed over a batch, fp64 [n]; the first selects the
      best checkpoint.
    * `outputs(model, images)` returns the outputs of the model as a tuple.
    """

    measures: tuple[str, ...]
    scores: tuple[str, ...]
    larger_is_better: bool

    def __init__(self, config: TrainConfig, processes: Processes):
        self.config, self.processes = config, processes
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        if config.precision == "auto" and processes.device.type == "cuda":  # emulated bf16 is slower than fp32
            self.dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None

    def autocast(self, device: torch.device):
        """Return the autocast context of the run."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)

    def forward(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """Return `outputs` under the run's autocast."""
        with self.autocast(images.device):
            return self.outputs(model, images)


class Classification(Objective):
    """Classification by cross-entropy, with timm's random erasing, mixup and CutMix on the device."""

    measures = ("loss", "accuracy")
    scores = ("accuracy", "loss", "top5")
    larger_is_better = True

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes):
        super().__init__(config, processes)
        self.erase = self.mix = None
        if config.random_erasing:
            self.erase = RandomErasing(config.random_erasing, mode="pixel", device=processes.device)
        if config.mixup or config.cutmix:
            share = config.batch_size // (config.accumulate * processes.world_size)
            if share % 2:
                raise UserError(
                    f"mixup and cutmix need an even number of images per process and micro-batch, not {share}: make "
                    "batch_size an even multiple of processes × accumulate"
                )
            smoothing = {"label_smoothing": config.label_smoothing, "num_classes": model.num_classes}
            self.mix = Mixup(config.mixup, config.cutmix, **smoothing)

    def inputs(self, images, labels, step, part):
        """Return images and targets: labels, or a smoothed mixture of them, [B, classes]."""
        targets = labels
        if self.erase is not None or self.mix is not None:
            part = part * self.processes.world_size + self.processes.rank
            # equal draws in a resumed run
            with drawing_from(self.config.seed, step, _BATCH_KEY + part, on_devices=True):
                if self.erase is not None:
                    images = self.erase(images)
                if self.mix is not None:
                    images, targets = self.mix(images, labels)
        return images, targets

    def training(self, runner, images, targets):
        smoothing = self.config.label_smoothing if targets.dim() == 1 else 0.0  # mixed targets are already smoothed
        labels = targets if targets.dim() == 1 else targets.argmax(dim=1)  # the larger part of a mixture
        logits = self.forward(runner, images)[0].float()
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return torch.stack([loss, (logits.detach().argmax(dim=1) == labels).float().mean()])

    def evaluation(self, model, images, batch):
        logits, labels = self.forward(model, images)[0].float(), batch.labels.to(images.device)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([value.double() for value in (ranked[:, 0].sum(), loss, ranked.sum())])

    def outputs(self, model, images):
        return (model(images),)


class Reconstruction(Objective):
    """Reconstruction of hidden patches by squared error.

    Training masks depend on the step and the image's position in the global batch, for any number of processes and
    accumulation steps. Evaluation masks depend on the image only, so that every evaluation hides the same patches.
    """

    measures = scores = ("loss",)
    larger_is_better = False

    def __init__(self, model: CRATEMAE, config: TrainConfig, processes: Processes):
        super().__init__(config, processes)
        self.n_patches = model.grid_size[0] * model.grid_size[1]
        self.model = model
        model.kept(config.mask_ratio)  # raises if the grid does not allow this ratio
        self._drawn: tuple[int, Tensor] = (-1, torch.empty(0))

    def inputs(self, images, labels, step, part):
        if self._drawn[0] != step:
            generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, step))
            self._drawn = (step, torch.rand(self.config.batch_size, self.n_patches, generator=generator))
        size = self.config.batch_size // self.config.accumulate
        mine = self._drawn[1][part * size : (part + 1) * size][self.processes.rank :: self.processes.world_size]
        return images, mine.to(images.device, non_blocking=True)

    def training(self, runner, images, noise):
        with self.autocast(images.device):
            loss, _, _ = runner(images, self.config.mask_ratio, noise=noise)
        return loss.float().unsqueeze(0)

    def evaluation(self, model, images, batch):
        with self.autocast(images.device):
            loss, _, _ = model(images, self.config.mask_ratio, noise=self.noise(batch).to(images.device))
        return loss.double().unsqueeze(0) * len(images)

    def noise(self, batch: Batch) -> Tensor:
        """Return the noise [B, N] that selects hidden patches in evaluation, from the seed and the image's key."""
        return image_noise(self.model, [(self.config.seed, *key) for key in batch.keys])

    def outputs(self, model, images):
        return model(images, self.config.mask_ratio)[:2]


def objective_for(model: nn.Module, config: TrainConfig, processes: Processes) -> Objective:
    """Return the objective of a model: reconstruction for CRATE-MAE, classification for others."""
    if not isinstance(model, CRATEMAE):
        return Classification(model, config, processes)
    unused = [name for name in ("mixup", "cutmix", "random_erasing") if getattr(config, name)]
    if unused:
        raise UserError(f"{', '.join(unused)}: masked autoencoding does not use these settings; leave them out")
    return Reconstruction(model, config, processes)
