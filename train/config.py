"""The settings of a run, and what makes sense of them. `command_line` fills them in."""

import math
import re
from dataclasses import dataclass

from crate_fast.errors import UserError, nearest

__all__ = ["DROP_RATES", "MODES_WITH_GRAPHS", "TrainConfig", "renamed_settings"]

DATASETS = ("shape_scenes", "folder", "tar", "shards", "hf", "cifar10", "cifar100", "flowers102", "pets")
_CHOICES = {
    "dataset": DATASETS,
    "crop": ("none", "pad", "random", "center"),
    "mean": ("imagenet", "cifar10", "half"),
    "head": ("keep", "new"),
    "lr_scaling": ("none", "linear", "sqrt"),
    "schedule": ("cosine", "released"),
    "clip_mode": ("norm", "value", "agc"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "parallel": ("ddp", "fsdp", "hsdp"),
}
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # of torch.compile
_POSITIVE = (
    *("train_samples", "val_samples", "image_size", "repeats", "patch_size", "dim", "depth", "heads", "epochs"),
    *("batch_size", "accumulate", "lr_base_batch", "eval_every", "keep_checkpoints", "log_every"),
    *("segmentation_samples", "nonfinite_limit", "decoder_depth"),
)
_NOT_NEGATIVE = (
    *("mixup", "cutmix", "workers", "weight_decay", "warmup_epochs", "min_lr", "clip_grad", "seed", "threads"),
    *("checkpoint_every", "profile"),
)
_AT_MOST_1024 = ("workers", "threads")  # the system refuses many more, and PyTorch then crashes
_SHARES = ("crop_scale", "hflip", "random_erasing", "mixup_prob", "max_unreadable", "label_smoothing")
DROP_RATES = ("drop_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "drop_path_rate")  # timm's names


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. A recipe names what differs from these defaults."""

    # --- data
    dataset: str = "shape_scenes"
    """shape_scenes (made on the fly); folder or tar (class folders); shards (WebDataset); hf (Hugging Face datasets);
    cifar10, cifar100, flowers102 or pets (torchvision)."""
    data_dir: str = ""
    """Folder of the data set. folder: it holds one folder per split; tar: <split>.tar; shards: <split>*.tar or
    <split>/*.tar; hf: what `datasets.load_dataset` reads."""
    download: bool = False
    """Let torchvision download the data set into data_dir. Nothing is downloaded unless this is set."""
    train_split: str = "train"
    """Name of the split trained on (folder, tar, shards and hf)."""
    val_split: str = "validation"
    """Name of the split evaluated on (folder, tar, shards and hf)."""
    train_samples: int = 20_000
    """Training images of shape_scenes."""
    val_samples: int = 1_000
    """Validation images of shape_scenes."""
    image_size: int = 64
    """Height and width of the images, in pixels."""
    crop: str = "none"
    """Training crop: none, pad (4 pixels in 32 of border, random position), random (scale and shape), center."""
    crop_scale: float = 0.08
    """Smallest share of the image's area that crop=random keeps."""
    hflip: float = 0.0
    """Probability of a horizontal flip in training."""
    auto_augment: str = ""
    """timm's policy string, such as rand-m9-n2-mstd0.5; randaugment-n2-m14 is torchvision's RandAugment(2, 14), whose
    magnitudes go to 30 (timm's to 10); none when empty."""
    repeats: int = 1
    """Copies of an image in a batch, each augmented anew (repeated augmentation); an epoch is as long, and shows so
    many times fewer images."""
    random_erasing: float = 0.0
    """Probability that a rectangle of a training image is replaced by noise."""
    mixup: float = 0.0
    """α of mixup: pairs of training images blended, with their labels; 0 for none."""
    cutmix: float = 0.0
    """α of cutmix: a rectangle of one image put into another; 0 for none. With both on a batch has one of them."""
    mixup_prob: float = 1.0
    """Probability that a micro-batch is mixed, with mixup or cutmix on."""
    mean: str = "imagenet"
    """Pixel normalisation: imagenet, cifar10 or half (mean and deviation 0.5)."""
    max_unreadable: float = 0.01
    """Share of a split's images that may be unreadable in an epoch before the run stops. Those are named in
    unreadable.txt; in training another image takes their place, in evaluation they are left out."""
    workers: int | None = None
    """Data-loading processes per training process; 0: none. Unset: 0 on a CPU, up to 8 beside a GPU."""

    # --- model
    init: str = ""
    """Weights to start from: a run's folder (its best checkpoint), RUN@STEP, or a weights file; random when empty.
    FILE#ENTRY takes that dictionary from a file that holds several, such as state_dict beside state_dict_ema."""
    init_grid: str = ""
    """ROWSxCOLUMNS of patches that the positions in an init file were made for, such as 2x8; what the file tells, or
    a square, when empty."""
    head: str = "keep"
    """With init. keep: its classifier, which must have as many classes as the data; new: a random one."""
    frozen: bool = False
    """Train a linear classifier behind a BatchNorm and nothing else: MAE's linear probe."""
    model: str = "crate_tiny_patch8_224"
    """One of our models, CRATE-MAE among them, or another of timm's that takes img_size, as ViTs; its size can be
    changed below."""
    patch_size: int | None = None
    """Side of a patch in pixels; the model's own when unset, as for the six below."""
    dim: int | None = None
    """Token width."""
    depth: int | None = None
    """Number of layers."""
    heads: int | None = None
    """Number of heads; the head width becomes dim / heads."""
    residual: str | None = None
    """released: x + MSSA(LN(x)); paper: LN(x) + MSSA(LN(x))."""
    attention: str | None = None
    """mssa, or mhsa for the ablation."""
    sparsifier: str | None = None
    """ista, or mlp for the ablation."""
    threshold: str | None = None
    """relu or soft."""
    drop_rate: float = 0.0
    """Dropout in front of the classifier. This rate and the next four are timm's, the same for a CRATE and a ViT."""
    attn_drop_rate: float = 0.0
    """Dropout on attention weights."""
    proj_drop_rate: float = 0.0
    """Dropout on attention outputs and inside the MLP."""
    pos_drop_rate: float = 0.0
    """Dropout on the embedded tokens."""
    drop_path_rate: float = 0.0
    """Stochastic depth: probability that a sample skips a step of the last layer; it grows linearly from 0 at the
    first layer."""

    # --- masked autoencoding, with a model such as crate_mae_tiny_patch16_224
    mask_ratio: float = 0.75
    """Share of the patches that is hidden."""
    norm_pix_loss: bool = False
    """Predict each patch less its mean and over its standard deviation."""
    visible_only: bool = False
    """Encode the visible patches only, as MAE; else all, mask tokens among them, as the released CRATE-MAE."""
    decoder_depth: int | None = None
    """Layers of the decoder; as many as the encoder's when unset."""

    # --- optimisation
    epochs: int = 6
    """Passes over the training images."""
    batch_size: int = 128
    """Images per optimiser step, over all processes and accumulation steps together."""
    accumulate: int = 1
    """Forward-backward passes per optimiser step."""
    optimizer: str = "adamw"
    """timm's name of the optimiser: adamw, lion, lars (as MAE's probe: biases without its scaling), …"""
    beta2: float | None = None
    """Decay of the second moments of adamw and its like, and of lion's update; the optimiser's own when unset."""
    lr: float = 1e-3
    """Peak learning rate, for the whole batch (but see lr_scaling)."""
    lr_scaling: str = "none"
    """linear or sqrt: lr is for lr_base_batch images, and grows with batch_size / lr_base_batch, or with its root."""
    lr_base_batch: int = 256
    """See lr_scaling."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    decay_all: bool = False
    """Decay every parameter, as the released recipe; else not biases, norms, positions and CLS, as timm."""
    layer_decay: float = 1.0
    """Learning rate of a layer over that of the layer above it; below 1 the early layers move less."""
    schedule: str = "cosine"
    """cosine: per step after a linear warm-up; released: min(warm-up, cosine), per epoch."""
    warmup_epochs: float = 0.5
    """Length of the linear warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""
    clip_grad: float = 1.0
    """Limit of gradients, by clip_mode; 0 for no clipping."""
    clip_mode: str = "norm"
    """norm: of the whole gradient; value: of each entry; agc: of each row's norm in proportion to its weights' norm
    (Brock et al., 2021), the classifier excepted; 0.01 to 0.1 are usual limits there."""

    ema_decay: float = 0.0
    """Of a moving average of the weights (EMA), evaluated beside them; a run is then opened with it. 0 for none."""
    ema_warmup: bool = False
    """Let the EMA's decay rise to ema_decay over the first steps (timm's warm-up)."""

    # --- engine
    seed: int = 0
    """Of weights, data order, augmentation and shape_scenes."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    precision: str = "auto"
    """fp32; bf16 or fp16 (autocast; fp16 with a gradient scaler); auto: bf16 on a GPU that has it, fp32 on a CPU."""
    compile: bool = False
    """Run the model through torch.compile."""
    compile_mode: str = "default"
    """torch.compile's: default; reduce-overhead and max-autotune, with CUDA graphs of its own;
    max-autotune-no-cudagraphs."""
    cuda_graphs: bool = False
    """Replay the forward and backward pass of a micro-batch from a CUDA graph: on one GPU, for models and batches so
    small that launching kernels takes longer than running them."""
    channels_last: bool = False
    """Images with channels innermost in memory, which suits patch embedding by convolution."""
    parallel: str = "ddp"
    """Many processes. ddp: each holds the whole model; fsdp: FSDP2, each holds a share; hsdp: FSDP2 within a host,
    copies across hosts."""
    grad_checkpointing: bool = False
    """Recompute layers in the backward pass to save memory."""
    threads: int = 0
    """CPU threads per process; 0 shares the cores out among the processes of this host."""
    eval_every: int = 1
    """Epochs between evaluations (the last epoch is always evaluated)."""
    checkpoint_every: int = 0
    """Optimiser steps between checkpoints; 0 for one at each evaluation."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best."""
    log_every: int = 20
    """Optimiser steps between log entries."""
    segmentation_samples: int = 500
    """Images with known masks scored at the end, if the data set has masks."""
    nonfinite_limit: int = 10
    """Steps in a row with a loss or gradient that is not finite before the run stops; each is skipped, counted."""
    profile: int = 0
    """Steps to profile, after ten of this session; the trace is in profile/. 0 for none."""
    wandb: str = ""
    """Weights & Biases project to log to as well; none when empty."""

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name}={value!r}{nearest(value, choices)}; choose one of {', '.join(choices)}")
        for low, names in ((1, _POSITIVE), (0, _NOT_NEGATIVE)):
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value < math.inf:
                    raise UserError(f"{name}={value}: it must be at least {low}, and finite")
        for name in _AT_MOST_1024:
            if (getattr(self, name) or 0) > 1024:
                raise UserError(f"{name}={getattr(self, name)}: it must be at most 1024; a number of cores is usual")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be between 0 and 1")
        for name in DROP_RATES:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 0, and below 1")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay={self.layer_decay}: it must be above 0, and at most 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr={self.lr}: it must be positive and finite")
        if self.min_lr > self.peak_lr:
            raise UserError(f"min_lr={self.min_lr} is above the peak {self.peak_lr:g} of lr={self.lr}: lower it")
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay}: it must be at least 0, and below 1")
        if self.batch_size % self.repeats:
            raise UserError(f"batch_size={self.batch_size} is not a multiple of repeats={self.repeats}")
        if self.frozen and (self.mixup or self.cutmix or self.layer_decay < 1):
            raise UserError("frozen=True trains a linear classifier alone: leave out mixup, cutmix and layer_decay")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"mask_ratio={self.mask_ratio}: it must be above 0, and below 1; 0.75 is usual")
        if self.beta2 is not None and not 0 < self.beta2 < 1:
            raise UserError(f"beta2={self.beta2}: it must be above 0, and below 1")
        if self.head == "new" and not self.init:
            raise UserError(
                "head='new' replaces the classifier of loaded weights: say which with --init, or leave it out"
            )
        if self.init_grid and not (self.init and re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.init_grid)):
            raise UserError(
                f"init_grid={self.init_grid!r}: give the rows and columns of patches of the file in init, such as 2x8"
            )
        if self.dataset != "shape_scenes" and not self.data_dir:
            raise UserError(f"dataset={self.dataset!r} needs data_dir: pass --data-dir FOLDER")
        self._check_graphs()

    def _check_graphs(self) -> None:
        mode = f"compile_mode={self.compile_mode!r}"
        if self.compile_mode != "default" and not self.compile:
            raise UserError(f"{mode} needs compile=True: pass --compile too")
        graphs = self.compile_mode in MODES_WITH_GRAPHS
        if graphs and self.cuda_graphs:
            raise UserError(f"{mode} has CUDA graphs of its own: leave out cuda_graphs, or the mode")
        if graphs and self.accumulate > 1:  # pytorch/pytorch#169545
            raise UserError(
                f"{mode}: PyTorch's CUDA graphs overwrite gradients with accumulate={self.accumulate}; use "
                "cuda_graphs with compile_mode='default' or 'max-autotune-no-cudagraphs'"
            )
        if self.cuda_graphs and self.grad_checkpointing:  # pytorch/pytorch#162504
            raise UserError(
                "cuda_graphs=True: PyTorch cannot record grad_checkpointing=True, which saves the generator's state; "
                "leave one of them out"
            )

    @property
    def peak_lr(self) -> float:
        """The learning rate at its peak, scaled to the batch as `lr_scaling` says."""
        ratio = self.batch_size / self.lr_base_batch
        return self.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.lr_scaling]


def renamed_settings(values: dict) -> dict:
    """Return settings of an older version under today's names, with the same meaning.

    Earlier, `dropout` was dropout on attention weights and outputs in a CRATE, and in front of the classifier in a
    model of timm's.
    """
    if "dropout" not in values:
        return values
    ours = str(values.get("model", TrainConfig.model)).startswith("crate_")
    affected = ("attn_drop_rate", "proj_drop_rate") if ours else ("drop_rate",)
    rates = {name: values["dropout"] if name in affected else 0.0 for name in DROP_RATES}
    return rates | {name: value for name, value in values.items() if name != "dropout"}
