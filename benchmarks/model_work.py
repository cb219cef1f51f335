"""What a training step or an inference of a whole model takes: operations and bytes, nominal and executed.

Nominal FLOPs are the least that the formula needs, two a multiplication with its addition, of matrix products alone;
per token and layer of CRATE, forward, with C channels, H heads of width D and N tokens:

    projection 2·C·HD + attention 4·N·HD + output map 2·HD·C + ISTA 2·C² (one product)

and with them the patch embedding and the classifier. Backward takes twice the forward pass of every product, but
10/4 of attention's (its logits are computed again), for CRATE and for the ViT; the gradient of the pixels is needed
only behind a LayerNorm with parameters. A ViT's layer has 6·C² + 4·N·C + 2·C² + 16·C² instead.

Executed FLOPs are those of a peer: the released form has three products in ISTA and six in its backward pass, and
keeps its logits, so attention's backward pass has four products; ours folds G (2·C³ a layer, as many again in
backward) and on a GPU computes whole tiles (`tile_work.py`). On a CPU ours takes two products in ISTA, and four in
its backward pass, where a batch has fewer tokens than the model is wide; else it is counted as the formula.

Bytes are a lower bound too: the images are read; each weight is read in fp32 by the forward and by the backward pass,
its gradient written, and AdamW reads weight, gradient and two moments and writes all but the gradient; each layer's
output is written and read once, and in training read once more, its gradient written and read, all in the dtype of
the products.
"""

from dataclasses import dataclass
from functools import cache

import torch
from gpu import Work
from model_peers import MASK_RATIO, OURS, RELEASED, TRAINING, VISIBLE, VIT, Size, build_model
from torch import nn

from crate_fast import CRATEMAE
from crate_fast.backends import explain_backend
from crate_fast.layers import ISTA, MSSA
from crate_fast.train.cost import Flops, count_flops, fold_flops

__all__ = ["logits_bytes", "work"]

FLOAT_BYTES = 4


@dataclass(frozen=True)
class _Site:
    """One operator of a model: a module, and the tokens of an image that it sees."""

    module: nn.Module
    n_tokens: int


@cache
def _meta(peer: str, size: Size) -> nn.Module:
    with torch.device("meta"):
        return build_model(peer, size)


def _sites(model: nn.Module, kind: type) -> list[_Site]:
    """Every MSSA or ISTA of a CRATE or CRATE-MAE."""
    if not isinstance(model, CRATEMAE):
        tokens = model.grid_size[0] * model.grid_size[1] + 1
        return [_Site(module, tokens) for module in model.modules() if isinstance(module, kind)]
    tokens = model.grid_size[0] * model.grid_size[1] + 1
    encoded = 1 + model.kept(MASK_RATIO) if model.visible_only else tokens
    parts = ((model.blocks, encoded), (model.decoder_blocks, tokens))
    return [_Site(module, seen) for part, seen in parts for module in part.modules() if isinstance(module, kind)]


@cache
def _nominal(peer: str, size: Size) -> Flops:
    """Of an image."""
    kind = VIT if peer.startswith(VIT) else VISIBLE if peer == VISIBLE else OURS
    model = _meta(kind, size)
    flops = count_flops(model, size.image, executed=True, mask_ratio=MASK_RATIO)
    if kind == VIT:  # counted with four products in attention's backward pass
        flops += Flops(0, 2 * size.depth * size.n_tokens**2 * size.width)
    return flops


def _executed(peer: str, size: Size, batch: int, device: torch.device, dtype: torch.dtype) -> Flops:
    """Of a batch; what has no tiles of ours is counted as it is written."""
    if peer.startswith(VIT):
        flops = _nominal(peer, size)
        return Flops(flops.forward * batch, flops.step * batch)
    model = _meta(VISIBLE if peer == VISIBLE else OURS, size)
    if peer.startswith(RELEASED):
        flops = count_flops(model, size.image, mask_ratio=MASK_RATIO)
        return Flops(flops.forward * batch, flops.step * batch)
    flops = count_flops(model, size.image, executed=True, mask_ratio=MASK_RATIO)
    total = Flops(flops.forward * batch, flops.step * batch)
    fold = fold_flops(model)
    on_kernels = explain_backend(device, dtype=dtype, head_dim=size.width // size.heads)[0] == "triton"
    if on_kernels:
        return total + Flops(fold // 2, fold) + _beyond_the_formula(model, batch, device, dtype)
    for site in _sites(model, ISTA):
        product = 2 * batch * site.n_tokens * site.module.weight.numel()
        if batch * site.n_tokens < size.width:
            total += Flops(product, 3 * product)  # the second product
        else:
            square = 2 * site.module.weight.shape[0] ** 3
            total += Flops(square, 2 * square)
    return total


def _beyond_the_formula(model: nn.Module, batch: int, device: torch.device, dtype: torch.dtype) -> Flops:
    """What the kernels' tiles execute for a batch and the formula does not ask for."""
    from tile_work import attention_executed, ista_executed  # Triton is needed where the kernels run, not elsewhere

    stored = torch.float32  # autocast's LayerNorms and residuals are fp32
    more = Flops(0, 0)
    for site in _sites(model, MSSA):
        heads, width = site.module.heads, site.module.qkv.weight.shape[0]
        found = attention_executed(batch * heads, site.n_tokens, width // heads, device, dtype)
        product = 2 * batch * site.n_tokens**2 * width
        forward, backward = found["forward"].flops - 2 * product, found["backward"].flops - 5 * product
        more += Flops(int(forward), int(forward + backward))
    for site in _sites(model, ISTA):
        width, rows = site.module.weight.shape[0], batch * site.n_tokens
        found = ista_executed(rows, width, device, dtype, stored)
        product = 2 * rows * width**2
        forward, backward = found["forward"].flops - product, found["backward"].flops - 2 * product
        more += Flops(int(forward), int(forward + backward))
    return more


def _moved_bytes(peer: str, size: Size, batch: int, what: str, dtype: torch.dtype) -> float:
    """See above."""
    model = _meta(VIT if peer.startswith(VIT) else OURS, size)
    weights = FLOAT_BYTES * sum(p.numel() for p in model.parameters())
    images = FLOAT_BYTES * batch * 3 * size.image**2
    outputs = dtype.itemsize * batch * size.n_tokens * size.width * size.n_layers
    if peer == VISIBLE:
        outputs = dtype.itemsize * batch * size.width * sum(site.n_tokens for site in _sites(_meta(peer, size), MSSA))
    if what != TRAINING:
        return float(images + weights + 2 * outputs)
    return float(images + (2 + 1 + 4 + 3) * weights + 5 * outputs)


def work(peer: str, size: Size, batch: int, what: str, device: torch.device, dtype: torch.dtype) -> Work:
    """What one pass of a peer takes, for the whole batch.

    Args:
        peer: Its name.
        size, batch: The model and its images.
        what: TRAINING or INFERENCE.
        device, dtype: Where, and what products multiply in.
    """
    nominal, executed = _nominal(peer, size), _executed(peer, size, batch, device, dtype)
    training = what == TRAINING
    return Work(
        flops=float(batch * (nominal.step if training else nominal.forward)),
        moved_bytes=_moved_bytes(peer, size, batch, what, dtype),
        executed_flops=float(executed.step if training else executed.forward),
    )


def logits_bytes(size: Size, batch: int, what: str) -> float:
    """What the released form writes of logits in fp32: three copies of a layer's, kept of all layers in training."""
    layers = size.n_layers if what == TRAINING else 1
    return 3.0 * FLOAT_BYTES * layers * batch * size.heads * size.n_tokens**2
