"""What a training step costs, counted without doing it: operations, and bytes held by one device.

Nothing here allocates a batch. Models are built on PyTorch's "meta" device, and what autograd keeps is read off a
forward pass over fake tensors, which have a shape, a dtype and a device but no data: a plan for a GPU needs none.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from crate_fast import CRATE, CRATEMAE
from crate_fast.kernels import assuming_gpu
from crate_fast.layers import ISTA, MHSA
from crate_fast.train.config import TrainConfig
from crate_fast.train.distributed import layers_of
from crate_fast.train.optimizer import check_optimizer
from crate_fast.train.runs import build_model

__all__ = [
    "Flops",
    "Kept",
    "count_flops",
    "kept_for_backward",
    "meta_model",
    "optimizer_bytes",
    "patch_size_of",
    "share_of",
    "tokens_per_image",
]


def meta_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The model of a run, with shapes and no data; parameters that the run does not train need no gradient."""
    with torch.device("meta"):
        model = build_model(config, num_classes)
    return model.train(not config.frozen)


def patch_size_of(model: nn.Module) -> int | None:
    """Side of a patch in pixels; None where a model has no patches."""
    sizes = getattr(model, "patch_size", None) or getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return sizes[0] if isinstance(sizes, tuple | list) else sizes


def tokens_per_image(model: nn.Module) -> int | None:
    """Tokens of an image, CLS among them; None where a model has none."""
    if isinstance(model, CRATE | CRATEMAE):
        return math.prod(model.grid_size) + 1
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    return None if patches is None else patches + getattr(model, "num_prefix_tokens", 0)


# --- operations


@dataclass(frozen=True)
class Flops:
    """Nominal floating-point operations for one image; see `count_flops`.

    Attributes:
        forward: Of the forward pass.
        step: Of a training step, forward and backward.
    """

    forward: int
    step: int

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.step + other.step)


def _linear(rows: int, weight: Tensor) -> Flops:
    """x Wᵀ, and its gradients of x and of W."""
    forward = 2 * rows * weight.numel()
    return Flops(forward, 3 * forward)


def _attention(attention: nn.Module, n_tokens: int) -> Flops:
    """MSSA or MHSA."""
    width = attention.qkv.weight.shape[0] // (3 if isinstance(attention, MHSA) else 1)
    product = 2 * n_tokens**2 * width  # all heads' W Wᵀ
    total = _linear(n_tokens, attention.qkv.weight) + Flops(2 * product, 6 * product)
    if isinstance(attention.to_out, nn.Sequential):
        total += _linear(n_tokens, attention.to_out[0].weight)
    return total


def _crate_layer(layer: nn.Module, n_tokens: int) -> Flops:
    total, sparsifier = _attention(layer[0].fn, n_tokens), layer[1].fn
    if isinstance(sparsifier, ISTA):
        return total + _linear(n_tokens, sparsifier.weight)
    return total + _linear(n_tokens, sparsifier[0].weight) + _linear(n_tokens, sparsifier[3].weight)


def _sum(parts: Iterable[Flops]) -> Flops:
    return sum(parts, Flops(0, 0))


def _mae_flops(model: CRATEMAE, mask_ratio: float) -> Flops:
    n_tokens = tokens_per_image(model)
    encoded = 1 + model.kept(mask_ratio) if model.visible_only else n_tokens
    layers = _sum(_crate_layer(block.layers[0], encoded) for block in model.blocks)
    for block in model.decoder_blocks:
        decode, attention = (part.fn for part in block.layers[0])
        layers += _linear(n_tokens, decode.weight) + _attention(attention, n_tokens)
    embed = _linear(n_tokens - 1, model.patch_embed.proj.weight).forward
    ends = Flops(embed, 2 * embed) + _linear(n_tokens, model.decoder_pred.weight)  # pixels need no gradient
    if model.visible_only:
        ends += _linear(encoded, model.decoder_embed.weight)
    return layers + ends


def _crate_flops(model: CRATE) -> Flops:
    n_tokens = tokens_per_image(model)
    layers = _sum(_crate_layer(layer, n_tokens) for layer in model.transformer.layers)
    embed = _linear(n_tokens - 1, model.to_patch_embedding[2].weight)
    total = layers + (embed if model.embed_norm else Flops(embed.forward, 2 * embed.forward))  # pixels: no gradient
    for module in model.mlp_head.modules():
        if isinstance(module, nn.Linear):
            total += _linear(1, module.weight)
    if any(not p.requires_grad for p in model.parameters()):  # the classifier alone: the gradient of its weight
        classifier = sum(p.numel() for p in model.get_classifier().parameters() if p.dim() == 2)
        total = Flops(total.forward, total.forward + 2 * classifier)
    return total


def _measured_flops(model: nn.Module, image_size: int) -> Flops:
    """PyTorch's own count, of any model on the meta device, with attention as plain products."""
    images = torch.empty(2, 3, image_size, image_size, device="meta")  # two: BatchNorm refuses one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(images)
        forward = counter.get_total_flops()
        logits.sum().backward()
        step = counter.get_total_flops()
    model.zero_grad(set_to_none=True)
    return Flops(forward // len(images), step // len(images))


def count_flops(model: nn.Module, image_size: int, mask_ratio: float = 0.75) -> Flops:
    """Count the nominal operations for one image: the matrix products that the formula needs, and nothing else.

    Two FLOPs a multiplication with its addition; backward has two products for each of the forward pass, but one for
    the map of the pixels. ISTA has one product, y = relu(x + xG − ηλ); folding G and what a backward pass or gradient
    checkpointing computes again are not counted.

    Args:
        model: From `meta_model`.
        image_size: In pixels.
        mask_ratio: Of a CRATE-MAE, whose loss is not counted.
    """
    if isinstance(model, CRATEMAE):
        return _mae_flops(model, mask_ratio)
    if isinstance(model, CRATE):
        return _crate_flops(model)
    with _without_checkpointing(model):
        return _measured_flops(model, image_size)


@contextmanager
def _without_checkpointing(model: nn.Module):
    switched = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    for module in switched:
        module.grad_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.grad_checkpointing = True


# --- memory


def share_of(tensor: Tensor, shards: int) -> int:
    """Elements of a parameter that one of `shards` processes holds: FSDP2 cuts along the first dimension, padded."""
    if tensor.dim() == 0:
        return 1
    return math.ceil(tensor.shape[0] / shards) * (tensor.numel() // max(1, tensor.shape[0]))


def optimizer_bytes(model: nn.Module, config: TrainConfig, shards: int = 1) -> int:
    """Bytes of the optimiser's states on one device, found by taking a step with the optimiser itself.

    The step is over one parameter of each shape, on the CPU: exact for any optimiser, also for those whose states are
    factored or differ between matrices and vectors, without the memory of the whole model. Sharded states are counted
    as their parameter's share of the whole.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    count = Counter((tuple(p.shape), share_of(p, shards)) for p in trained)
    total = 0
    for (shape, share), times in count.items():
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.ones(shape)
        check_optimizer(config.optimizer)
        optimizer = create_optimizer_v2([parameter], opt=config.optimizer, lr=1e-3, weight_decay=config.weight_decay)
        optimizer.step()
        states = optimizer.state_dict()["state"].values()
        tensors = [t for state in states for t in state.values() if isinstance(t, Tensor) and t.dim()]
        held = sum(t.numel() * t.element_size() for t in tensors)
        total += times * math.ceil(held * share / max(1, parameter.numel()))
    return total


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps between forward and backward pass on one device.

    Attributes:
        total: Of a micro-batch; the layer that checkpointing recomputes included.
        per_image: Of each further image.
        constant: What does not grow with images: low-precision copies of weights, folded dictionaries.
        recomputed_per_image: With gradient checkpointing, one layer's, which are there again while it is recomputed.
    """

    total: int
    per_image: int
    constant: int
    recomputed_per_image: int = 0


def kept_for_backward(
    model: nn.Module,
    config: TrainConfig,
    images: int,
    device_type: str,
    dtype: torch.dtype | None,
    num_classes: int,
) -> Kept:
    """What autograd keeps of a micro-batch: every storage saved for the backward pass once, parameters excepted.

    Read off the forward pass and loss that training runs, over fake tensors; a second one of twice as many images
    tells the constant part apart. Nothing is scaled between dtypes: autocast is on as in the run, so what is kept in
    fp32 counts four bytes and what is kept in bf16 two. The path is that of the device asked for: on "cuda" the
    kernels' (attention keeps its normalised rows, W and O in the products' dtype and the rows' log-sum-exp; ISTA its
    normalised rows, or its input where that is wider, and a byte an element), on "cpu" the folded PyTorch path's.

    Args:
        model: From `meta_model`.
        config: The run's.
        images: In a micro-batch.
        device_type: "cuda" or "cpu"; need not be there.
        dtype: Of autocast; None for fp32.
        num_classes: Of the loss.
    """

    def saved(count: int) -> int:
        return _saved_bytes(model, config, count, device_type, dtype, num_classes)

    once, twice = saved(images), saved(2 * images)
    per_image, constant = (twice - once) // images, 2 * once - twice
    layers = len(layers_of(model))
    if not config.grad_checkpointing or not layers:
        return Kept(once, per_image, constant)
    with _without_checkpointing(model):
        recomputed = max(0, saved(images) - once) // layers
    return Kept(once + recomputed, per_image, constant, recomputed // images)


class _FlashAttention(TorchFunctionMode):
    """Attention as a GPU's fused kernels keep it: without a GPU PyTorch would choose plain products, and keep N²."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or len(args) > 3 or kwargs.get("attn_mask") is not None:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        query, key, value = (*args, *(kwargs[name] for name in names[len(args) :]))
        dropout, causal = kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout, causal, scale=kwargs.get("scale"))[0]


@contextmanager
def _autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast`, which would do nothing on a machine without the device."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, dtype is not None)
    torch.set_autocast_dtype(device_type, dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])
        torch.clear_autocast_cache()


def _saved_bytes(
    model: nn.Module, config: TrainConfig, batch: int, device_type: str, dtype: torch.dtype | None, num_classes: int
) -> int:
    """Bytes saved for the backward pass of `batch` images."""
    saved: dict[int, torch.UntypedStorage] = {}  # the storages themselves: a freed one's address may come back

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device_type)

    attention = _FlashAttention() if device_type == "cuda" else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), assuming_gpu():
        state = {name: nn.Parameter(fake(p), p.requires_grad) for name, p in model.named_parameters()}
        state |= {name: fake(b) for name, b in model.named_buffers()}
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        images = torch.empty(batch, 3, config.image_size, config.image_size, device=device_type)
        if config.mixup or config.cutmix:
            labels = torch.empty(batch, num_classes, device=device_type)
        else:
            labels = torch.empty(batch, dtype=torch.long, device=device_type)
        inputs = (images, config.mask_ratio) if isinstance(model, CRATEMAE) else (images,)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), attention:
            with _autocast(device_type, dtype):
                output = torch.func.functional_call(model, state, inputs)
            if not isinstance(model, CRATEMAE):  # whose output has the loss in it
                smoothing = 0.0 if labels.dim() == 2 else config.label_smoothing
                F.cross_entropy(output.float(), labels, label_smoothing=smoothing)
        return sum(storage.nbytes() for address, storage in saved.items() if address not in own)
