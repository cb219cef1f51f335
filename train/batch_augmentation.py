"""Augmentation of whole batches on their device: random erasing, mixup and cutmix (timm's), drawn from a seed of the
step.

Nothing needs to be saved for a resume: step and process decide what is drawn, as for dropout.
"""

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.data import drawing_from

__all__ = ["BatchAugmentation"]

_APART = 2**40  # from the numbers of samples, whose augmentation draws by (seed, epoch, number)


class BatchAugmentation:
    """Erases, then mixes a micro-batch of normalised images.

    Args:
        config: The run's; `random_erasing`, `mixup`, `cutmix`, `mixup_prob` and `label_smoothing` decide.
        num_classes: Outputs of the model.
        device: Of the images.
        share: Images of a micro-batch.

    Raises:
        UserError: Images are to be mixed and a micro-batch has an odd number of them.
    """

    def __init__(self, config: TrainConfig, num_classes: int, device: torch.device, share: int):
        self.seed = config.seed
        self.erase = self.mix = None
        if config.random_erasing:
            self.erase = RandomErasing(config.random_erasing, mode="pixel", device=device)
        if config.mixup or config.cutmix:
            if share % 2:
                raise UserError(
                    f"mixup and cutmix mix pairs, and a process has {share} images in a micro-batch: make batch_size "
                    "an even multiple of processes × accumulate"
                )
            self.mix = Mixup(
                config.mixup,
                config.cutmix,
                prob=config.mixup_prob,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor, step: int, part: int) -> tuple[Tensor, Tensor]:
        """Augment a batch in place.

        Args:
            images: Normalised, [B, 3, S, S].
            labels: Classes [B].
            step: Optimiser step, from 0.
            part: Number that tells micro-batches and processes of a step apart.

        Returns:
            (images, targets): labels [B] as they came, or their mixture [B, classes] with label smoothing in it.
        """
        if self.erase is None and self.mix is None:
            return images, labels
        with drawing_from(self.seed, step, _APART + part, on_devices=True):
            if self.erase is not None:
                images = self.erase(images)
            return (images, labels) if self.mix is None else self.mix(images, labels)
