"""Whole models as peers: the released form, ours, and a ViT of the same sizes, each with all that a step needs.

Compiled peers are `torch.compile(model, dynamic=False)` in its default mode; loss and optimiser stay outside. In a
smoke run the backend is "aot_eager", which traces as they do and generates no code.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_timing import Step, Timer
from released import ReleasedCRATE, ReleasedCRATEMAE
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crate_fast import CRATE, CRATEMAE

__all__ = [
    "COMPILED",
    "INFERENCE",
    "MASK_RATIO",
    "OURS",
    "RELEASED",
    "TRAINING",
    "UNFUSED",
    "VISIBLE",
    "VIT",
    "Size",
    "Trial",
    "best_sdpa",
    "build_model",
    "build_trial",
    "fastest_sdpa",
    "make_inputs",
    "of_ours",
]

RELEASED, OURS, VIT = "released", "ours", "ViT (timm)"
VISIBLE = "ours, visible only"  # MAE's own form, whose encoder sees a quarter of the patches: something else
UNFUSED = "ours, PyTorch"  # `backend="torch"`: stands in for the released form where that runs out of memory
COMPILED = ", compiled"  # behind a peer's name
TRAINING, INFERENCE = "training step", "inference"
MASK_RATIO = 0.75


@dataclass(frozen=True)
class Size:
    """A model and its batch.

    Args:
        width, depth, heads: C, layers (of an autoencoder's encoder, and of its decoder), H; heads are C/H wide.
        patch, image: Sides in pixels.
        on_gpu, on_cpu: Images in a batch.
        masked: Whether it is a CRATE-MAE.
        classes: Of the classifier.
    """

    width: int
    depth: int
    heads: int
    patch: int
    on_gpu: int
    on_cpu: int
    image: int = 224
    masked: bool = False
    classes: int = 1000

    @property
    def n_patches(self) -> int:
        """Of an image."""
        return (self.image // self.patch) ** 2

    @property
    def n_tokens(self) -> int:
        """N, CLS among them."""
        return self.n_patches + 1

    @property
    def n_layers(self) -> int:
        """Layers with attention."""
        return self.depth * (1 + self.masked)

    def batch(self, device: torch.device) -> int:
        """Images in a batch on this kind of device."""
        return self.on_gpu if device.type == "cuda" else self.on_cpu


def of_ours(peer: str) -> bool:
    """Whether a peer is this package computing what the released code does."""
    return peer.removesuffix(COMPILED) in (OURS, UNFUSED)


def build_model(peer: str, size: Size) -> nn.Module:
    """A peer's model, weights drawn by PyTorch's generator; compiling is the caller's."""
    kind = peer.removesuffix(COMPILED)
    backend = {"backend": "torch"} if kind == UNFUSED else {}
    if size.masked:
        options = {"img_size": size.image, "patch_size": size.patch, "embed_dim": size.width, "depth": size.depth}
        options |= {"num_heads": size.heads, "norm_pix_loss": True}
        if kind == RELEASED:
            return ReleasedCRATEMAE(**options)
        return CRATEMAE(**options, visible_only=kind == VISIBLE, **backend)
    if kind == VIT:
        return VisionTransformer(
            img_size=size.image, patch_size=size.patch, embed_dim=size.width, depth=size.depth, num_heads=size.heads,
            num_classes=size.classes,
        )  # fmt: skip
    options = {"image_size": size.image, "patch_size": size.patch, "num_classes": size.classes, "dim": size.width}
    options |= {"depth": size.depth, "heads": size.heads, "dim_head": size.width // size.heads}
    return ReleasedCRATE(**options) if kind == RELEASED else CRATE(**options, **backend)


def make_inputs(size: Size, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [B, 3, S, S], and labels [B] or, for an autoencoder, the noise [B, patches] that hides patches."""
    options = {"generator": torch.Generator(device).manual_seed(1), "device": device}
    images = torch.randn(batch, 3, size.image, size.image, **options)
    if size.masked:
        return images, torch.rand(batch, size.n_patches, **options)
    return images, torch.randint(size.classes, (batch,), **options)


@dataclass
class Trial:
    """A model with its batch and optimiser, whose step size 0 keeps the weights.

    Args:
        model: Whose parameters and mode count.
        function: What is called: the model, or its compiled form.
        inputs: From `make_inputs`.
        what: TRAINING or INFERENCE.
        cast: Autocast's dtype, or None.
        sdpa: The backend for scaled_dot_product_attention, or None for PyTorch's choice.
        optimizer: In training.
    """

    model: nn.Module
    function: Callable
    inputs: tuple[Tensor, Tensor]
    what: str
    cast: torch.dtype | None
    sdpa: SDPBackend | None
    optimizer: torch.optim.Optimizer | None

    def _forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, logits [B, classes]), or an autoencoder's (loss, pixels [B, patches, p·p·3])."""
        cast = nullcontext() if self.cast is None else torch.autocast(images.device.type, self.cast)
        with cast, nullcontext() if self.sdpa is None else sdpa_kernel(self.sdpa):
            if isinstance(self.model, CRATEMAE | ReleasedCRATEMAE):
                loss, pixels, _ = self.function(images, MASK_RATIO, noise=targets)
                return loss, pixels
            logits = self.function(images)
            return F.cross_entropy(logits, targets), logits

    def step(self) -> Tensor:
        """What is timed: forward, loss, backward, optimiser, or forward alone; returns the output."""
        if self.what == INFERENCE:
            return self._infer(self.inputs[0])
        self.optimizer.zero_grad(set_to_none=True)
        loss, output = self._forward(*self.inputs)
        loss.backward()
        self.optimizer.step()
        return output.detach()

    @torch.inference_mode()
    def _infer(self, images: Tensor) -> Tensor:
        cast = nullcontext() if self.cast is None else torch.autocast(images.device.type, self.cast)
        with cast, nullcontext() if self.sdpa is None else sdpa_kernel(self.sdpa):
            return self.function(images)

    def outcome(self, chunk: int) -> dict[str, Tensor]:
        """The whole batch's output, and each parameter's gradient after a training step, by name.

        Args:
            chunk: Images computed at once: what a batch of them keeps is all that must fit.
        """
        batch = len(self.inputs[0])
        outputs = []
        self.model.zero_grad(set_to_none=True)
        for images, targets in zip(*(tensor.split(chunk) for tensor in self.inputs), strict=True):
            if self.what == INFERENCE:
                outputs.append(self._infer(images))
                continue
            loss, output = self._forward(images, targets)
            (loss * (len(images) / batch)).backward()
            outputs.append(output.detach())
        found = {"output": torch.cat(outputs).float()}
        named = self.model.named_parameters()
        return found | {name: p.grad.clone() for name, p in named if p.grad is not None}

    def timed(self) -> Step:
        """The step as a timer takes it."""
        return Step(lambda _: self.step())


def build_trial(
    peer: str,
    size: Size,
    batch: int,
    device: torch.device,
    what: str,
    cast: torch.dtype | None,
    state: dict[str, Tensor] | None = None,
    sdpa: SDPBackend | None = None,
    compiler: str = "inductor",
) -> Trial:
    """A peer ready for its steps.

    Args:
        peer: Its name; behind it COMPILED or not.
        size, batch: The model and its images.
        device, what, cast, sdpa: As the trial's.
        state: Weights, for peers that share them; drawn from a seed when None.
        compiler: torch.compile's backend.
    """
    torch.manual_seed(0)
    with device:
        model = build_model(peer, size)
    if state is not None:
        model.load_state_dict(state)
    model.train(what == TRAINING)
    function = torch.compile(model, dynamic=False, backend=compiler) if peer.endswith(COMPILED) else model
    optimizer = None
    if what == TRAINING:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=device.type == "cuda")
    return Trial(model, function, make_inputs(size, batch, device), what, cast, sdpa, optimizer)


def best_sdpa(size: Size, batch: int, timer: Timer, device: torch.device, dtype: torch.dtype) -> SDPBackend | None:
    """The backend whose attention is fastest on a ViT's query, key and value, forward and backward; None on a CPU."""
    if device.type != "cuda":
        return None
    shape = (batch, size.n_tokens, 3, size.heads, size.width // size.heads)
    return fastest_sdpa(torch.randn(shape, device=device).to(dtype).requires_grad_(), timer)


def fastest_sdpa(qkv: Tensor, timer: Timer) -> SDPBackend | None:
    """The fastest backend for query, key and value in one tensor [B, N, 3, H, D]; None where none runs."""
    times = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def attend(_: object, backend: SDPBackend = backend) -> object:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
            return torch.autograd.grad(out, qkv, torch.ones_like(out))

        try:
            times[backend] = min(timer.sample(Step(attend), 10, 0)[5:])
        except RuntimeError:  # it does not run here
            continue
    return min(times, key=times.get, default=None)
