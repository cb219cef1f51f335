"""Whole models as peers: the released form, ours, and a ViT of the same sizes, each with all that a step needs.

Compiled peers are `torch.compile(model, dynamic=False)` in its default mode; loss and optimiser stay outside. In a
smoke run the backend is "aot_eager", which traces as they do and generates no code. A graphed peer is eager, and a
CUDA graph replays all of its step; copying the batch to where the graph reads it is part of its time.
"""

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
from crate_fast.train.cuda_graphs import GraphedCall

__all__ = [
    "COMPILED",
    "GRAPHED",
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
    "build_model",
    "fastest_sdpa",
    "kind_of",
]

RELEASED, OURS, VIT = "released", "ours", "ViT (timm)"
VISIBLE = "ours, visible only"  # MAE's own form, whose encoder sees a quarter of the patches: something else
UNFUSED = "ours, PyTorch"  # `backend="torch"`: stands in for the released form where that runs out of memory
COMPILED, GRAPHED = ", compiled", ", CUDA graph"  # behind a peer's name
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


def kind_of(peer: str) -> str:
    """The model behind a peer's name, compiled or graphed or not."""
    return peer.removesuffix(COMPILED).removesuffix(GRAPHED)


def build_model(peer: str, size: Size) -> nn.Module:
    """A peer's model, weights drawn by PyTorch's generator; compiling is the caller's."""
    kind = kind_of(peer)
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


def _make_inputs(size: Size, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [B, 3, S, S], and labels [B] or, for an autoencoder, the noise [B, patches] that hides patches."""
    options = {"generator": torch.Generator(device).manual_seed(1), "device": device}
    images = torch.randn(batch, 3, size.image, size.image, **options)
    if size.masked:
        return images, torch.rand(batch, size.n_patches, **options)
    return images, torch.randint(size.classes, (batch,), **options)


class Trial:
    """A peer with its batch and optimiser, whose step size 0 keeps the weights.

    Args:
        peer: Its name.
        size, batch: The model and its images.
        device: Where.
        what: TRAINING (forward, loss, backward, optimiser) or INFERENCE (forward alone).
        cast: Autocast's dtype, or None.
        state: Weights, for peers that share them; drawn from a seed when None.
        sdpa: The backend for scaled_dot_product_attention, or None for PyTorch's choice.
        compiler: torch.compile's backend.
    """

    def __init__(
        self,
        peer: str,
        size: Size,
        batch: int,
        device: torch.device,
        what: str,
        cast: torch.dtype | None,
        state: dict[str, Tensor] | None = None,
        sdpa: SDPBackend | None = None,
        compiler: str = "inductor",
    ):
        self.cast, self.sdpa, self.graphed = cast, sdpa, peer.endswith(GRAPHED)
        torch.manual_seed(0)
        with device:
            self.model = build_model(peer, size)
        if state is not None:
            self.model.load_state_dict(state)
        self.model.train(what == TRAINING)
        compiled = peer.endswith(COMPILED)
        self.function = torch.compile(self.model, dynamic=False, backend=compiler) if compiled else self.model
        self.inputs, self.optimizer = _make_inputs(size, batch, device), None
        if what == TRAINING:
            on_gpu = {"fused": True, "capturable": self.graphed} if device.type == "cuda" else {}
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, **on_gpu)
        call = self._infer if self.optimizer is None else self._train
        self._call = GraphedCall(call) if self.graphed else call

    def step(self) -> Tensor:
        """What is timed; returns the output."""
        return self._call(*self.inputs)

    def _forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, logits [B, classes]), or an autoencoder's (loss, pixels [B, patches, p·p·3])."""
        cast = nullcontext() if self.cast is None else torch.autocast(images.device.type, self.cast)
        with cast, nullcontext() if self.sdpa is None else sdpa_kernel(self.sdpa):
            if isinstance(self.model, CRATEMAE | ReleasedCRATEMAE):
                return self.function(images, MASK_RATIO, noise=targets)[:2]
            logits = self.function(images)
            return F.cross_entropy(logits, targets), logits

    def _train(self, images: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss, output = self._forward(images, targets)
        loss.backward()
        self.optimizer.step()
        return output.detach()

    @torch.inference_mode()
    def _infer(self, images: Tensor, _targets: Tensor) -> Tensor:
        cast = nullcontext() if self.cast is None else torch.autocast(images.device.type, self.cast)
        with cast, nullcontext() if self.sdpa is None else sdpa_kernel(self.sdpa):
            return self.function(images)

    def outcome(self, chunk: int) -> dict[str, Tensor]:
        """The whole batch's output, and each parameter's gradient after a training step, by name.

        Args:
            chunk: Images computed at once: what a batch of them keeps is all that must fit. A graph has its own.
        """
        outputs = [self.step()] if self.graphed else self._in_chunks(chunk)
        found = {"output": torch.cat(outputs).float()}
        named = self.model.named_parameters()
        return found | {name: p.grad.clone() for name, p in named if p.grad is not None}

    def _in_chunks(self, chunk: int) -> list[Tensor]:
        outputs, batch = [], len(self.inputs[0])
        self.model.zero_grad(set_to_none=True)
        for images, targets in zip(*(tensor.split(chunk) for tensor in self.inputs), strict=True):
            if self.optimizer is None:
                outputs.append(self._infer(images, targets))
                continue
            loss, output = self._forward(images, targets)
            (loss * (len(images) / batch)).backward()
            outputs.append(output.detach())
        return outputs


def fastest_sdpa(size: Size, batch: int, timer: Timer, device: torch.device, dtype: torch.dtype) -> SDPBackend | None:
    """The backend whose attention is fastest on a ViT's tensors, forward and backward; None where none runs."""
    shape = (batch, size.n_tokens, 3, size.heads, size.width // size.heads)
    qkv, times = torch.randn(shape, device=device).to(dtype).requires_grad_(), {}
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
