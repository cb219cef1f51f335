"""Traces of the layers: subspace tokens, attention maps, tokens after both halves, coding rate R^c, sparsity.

    traces = trace(model, images)          # one LayerTrace per layer
    traces[10].cls_attention()             # [B, H, rows·columns]: the paper's Fig. 1
    traces[10].coding_rate()               # [B]

Hooks on the released module tree record the tensors. They work on fused and unfused layers, on the ablations, and
for every image size that the model accepts.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn

from crate_fast.errors import UserError
from crate_fast.layers import ISTA, MHSA, MSSA, ODL


def coding_rate(w: Tensor, epsilon: float = 0.01) -> Tensor:
    """Return R^c = Σ_h ½·logdet(I + D/(Nε)·Ŵ_hᵀ Ŵ_h), where Ŵ are the subspace tokens scaled to unit length.

    This D×D form equals the N×N form. As in the released analysis ε is not squared; the paper's Eq. 5 has ε².

    Args:
        w: Subspace tokens [B, N, H, D]; half precision is converted to fp32.
        epsilon: Quantisation precision ε, above 0.

    Returns:
        R^c per image [B], in nats, at least 0; it decreases as the tokens span fewer directions.

    Raises:
        UserError: w is not four-dimensional, or epsilon is not positive.

    >>> coding_rate(torch.ones(1, 4, 2, 3)).item() < coding_rate(torch.randn(1, 4, 2, 3)).item()
    True
    """
    if w.dim() != 4:
        raise UserError(f"w has shape {tuple(w.shape)}: pass subspace tokens [B, N, H, D]")
    if not epsilon > 0:
        raise UserError(f"epsilon={epsilon}: give a positive precision, such as the default 0.01")
    n_tokens, dim = w.shape[1], w.shape[-1]
    with torch.autocast(w.device.type, enabled=False):
        unit = F.normalize(w if w.dtype == torch.float64 else w.float(), dim=-1).permute(0, 2, 3, 1)
        covariance = unit @ unit.transpose(-1, -2)
        eye = torch.eye(dim, dtype=covariance.dtype, device=w.device)
        return 0.5 * torch.linalg.slogdet(eye + dim / (n_tokens * epsilon) * covariance).logabsdet.sum(dim=1)


def nonzero_fraction(tokens: Tensor) -> Tensor:
    """Return the share of non-zero entries per image, [B] in [0, 1], of tokens [B, N, C]; smaller is sparser.

    >>> nonzero_fraction(torch.tensor([[[0.0, 2.0]]]))
    tensor([0.5000])
    """
    return (tokens != 0).flatten(1).float().mean(dim=1)


def cls_attention(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return softmax of s·⟨query, key⟩ over patches (Eq. 10): CLS query [B, H, D], keys [B, P, H, D] → [B, H, P]."""
    return (scale * torch.einsum("bhd,bmhd->bhm", query, keys)).softmax(dim=-1)


def attention_layer(model: nn.Module) -> int:
    """Return the default layer of attention maps: the last but one with MSSA, else the last.

    The paper shows these layers of CRATE and ViT (Fig. 14); of CRATE-MHSA it shows the last but one (Fig. 13).
    """
    layers = model.transformer.layers
    return max(0, len(layers) - 2) if isinstance(layers[0][0].fn, MSSA) else len(layers) - 1


def layer_numbers(model: nn.Module, layers: Iterable[int]) -> list[int]:
    """Convert layer indices, negative ones counted from the end, to ascending numbers from 0.

    Raises:
        UserError: There is no such layer.
    """
    depth, found = len(model.transformer.layers), set()
    for index in layers:
        if not -depth <= index < depth:
            raise UserError(f"layer {index}: the model has layers 0 to {depth - 1} (or -{depth} to -1)")
        found.add(index % depth)
    return sorted(found)


@dataclass(frozen=True)
class LayerTrace:
    """Tensors that one layer computed for a batch.

    Attributes:
        index: The layer, from 0.
        queries: [B, N, H, D]; with MSSA the subspace tokens.
        keys: [B, N, H, D]; with MSSA the same tensor.
        tied: True if query, key and value are one projection (MSSA).
        scale: s of the logits s·⟨query, key⟩.
        after_mssa: h [B, N, C], the tokens after compression and its residual, before LN₂.
        after_ista: Output of the layer [B, N, C]: after ISTA, or after ODL or MLP and their residual.
        sparsifier: Second half of the layer: LayerNorm, then ISTA, ODL or MLP.
    """

    index: int
    queries: Tensor
    keys: Tensor
    tied: bool
    scale: float
    after_mssa: Tensor
    after_ista: Tensor
    sparsifier: nn.Module

    @property
    def subspace_tokens(self) -> Tensor:
        """Return W [B, N, H, D], CLS first; the layer must have MSSA."""
        if not self.tied:
            raise UserError(f"layer {self.index} has separate query, key and value: it has no subspaces; use `keys`")
        return self.queries

    def attention(self) -> Tensor:
        """Return all attention maps [B, H, N, N], with softmax over all tokens. Memory grows with N²."""
        logits = self.scale * torch.einsum("bnhd,bmhd->bhnm", self.queries, self.keys)
        return logits.softmax(dim=-1)

    def cls_attention(self, scale: float | None = None) -> Tensor:
        """Return the attention of CLS to patches [B, H, N − 1], softmax over patches only (paper, Eq. 10 and 11).

        Args:
            scale: s; the layer's scale (D^-1/2) if None. The paper writes s = 1; the ranking is the same.
        """
        return cls_attention(self.queries[:, 0], self.keys[:, 1:], self.scale if scale is None else scale)

    def coding_rate(self, epsilon: float = 0.01) -> Tensor:
        """Return R^c of the subspace tokens, per image [B]; see `coding_rate`."""
        return coding_rate(self.subspace_tokens, epsilon)

    def code(self) -> Tensor:
        """Return the sparse code: ISTA's output [B, N, C]; ODL's z [B, N, ratio·C], recomputed from `after_mssa`."""
        if not isinstance(self.sparsifier.fn, ISTA | ODL):
            raise UserError(f"layer {self.index} has an MLP and no sparse code: use a model with ISTA or ODL")
        if isinstance(self.sparsifier.fn, ODL):
            return self.sparsifier.fn.code(self.sparsifier.norm(self.after_mssa))
        return self.after_ista

    def sparsity(self) -> Tensor:
        """Return the share of non-zero entries of the code, per image [B]; see `nonzero_fraction`."""
        return nonzero_fraction(self.code())


def visit_layers(
    model: nn.Module, images: Tensor, visit: Callable[[LayerTrace], None], layers: Iterable[int] | None = None
) -> Tensor:
    """Run `model` on `images` and call `visit` with the trace of each chosen layer as soon as the layer has run.

    Tensors that `visit` does not keep are freed before the next layer runs. Gradient checkpointing is off meanwhile.

    Args:
        model: A CRATE or one of its ablations, also in DataParallel, DDP or `torch.compile`, without their effect.
        images: [B, channels, height, width].
        visit: Called once per chosen layer, in the order of the model.
        layers: Indices, negative ones from the end; None for all.

    Returns:
        The tokens of `model.forward_features(images)`, [B, N, C], for `model.forward_head`.
    """
    model = unwrap_model(model)
    if not hasattr(model, "transformer"):
        raise UserError(f"{type(model).__name__} cannot be traced: pass a CRATE, or the encoder() of a CRATE-MAE")
    stack = model.transformer.layers
    chosen = layer_numbers(model, range(len(stack)) if layers is None else layers)
    seen: dict[str, Tensor] = {}
    visited: list[int] = []
    thread = threading.get_ident()  # another one may run the model meanwhile

    def keep_projected(_module, _inputs, output):
        if threading.get_ident() == thread:
            seen["projected"] = output

    def keep_input(_module, inputs):
        if threading.get_ident() == thread:
            seen["after_mssa"] = inputs[0]

    def hand_over(index: int):
        def hook(layer, _inputs, output):
            if threading.get_ident() != thread:
                return
            if len(seen) < 2:  # compiled code ran no hooks inside the layer
                raise _compiled(index)
            visited.append(index)
            attention, projected = layer[0].fn, seen.pop("projected")
            tied = not isinstance(attention, MHSA)
            if tied:
                queries = keys = projected.unflatten(-1, (-1, attention.dim_head))
            else:
                queries, keys, _ = projected.unflatten(-1, (3, -1, attention.dim_head)).unbind(dim=2)
            visit(LayerTrace(index, queries, keys, tied, attention.scale, seen.pop("after_mssa"), output, layer[1]))

        return hook

    with ExitStack() as hooks:
        hooks.callback(model.set_grad_checkpointing, model.transformer.grad_checkpointing)
        model.set_grad_checkpointing(False)  # layers would run again in backward, without the hooks
        for index in chosen:
            attention, sparsifier = stack[index]
            hooks.callback(attention.fn.qkv.register_forward_hook(keep_projected).remove)
            hooks.callback(sparsifier.register_forward_pre_hook(keep_input).remove)
            hooks.callback(stack[index].register_forward_hook(hand_over(index)).remove)
        tokens = model.forward_features(images)
    if visited != chosen:
        raise _compiled(min({*chosen} - {*visited}))
    return tokens


def _compiled(index: int) -> UserError:
    return UserError(
        f"layer {index} cannot be traced, perhaps because it is compiled: trace a model whose layers are not"
    )


def trace(model: nn.Module, images: Tensor, layers: Iterable[int] | None = None) -> list[LayerTrace]:
    """Run `model` on `images` and return a trace of each chosen layer.

    The traces are differentiable; wrap the call in `torch.no_grad()` if you need no gradients.

    Args:
        model, images: See `visit_layers`.
        layers: Indices, negative ones from the end; None for all. A trace holds about (2 + H·D/C)·B·N·C numbers.

    Returns:
        One `LayerTrace` per chosen layer, in the order of the model.

    Raises:
        UserError: There is no such layer.
    """
    traces: list[LayerTrace] = []
    visit_layers(model, images, traces.append, layers)
    return traces


@torch.no_grad()
def layer_measures(
    model: nn.Module, images: Tensor, epsilon: float = 0.01, *, after_mssa: bool = False
) -> dict[str, Tensor]:
    """Return R^c and sparsity of every layer for each image.

    They are computed while the model runs, so only one layer's tokens are in memory.

    Args:
        model: See `visit_layers`. Measures that it does not have (R^c of MHSA, sparsity of MLP) are omitted.
        images: [B, channels, height, width].
        epsilon: ε of R^c.
        after_mssa: Also return R^c of the tokens after compression, LN₁(h), against the same subspaces.

    Returns:
        "coding_rate", "coding_rate_after_mssa" if requested, and "sparsity", each [B, depth].

    >>> from crate_fast import CRATE
    >>> model = CRATE(image_size=16, patch_size=8, num_classes=0, dim=8, depth=3, heads=2, dim_head=4)
    >>> {name: tuple(values.shape) for name, values in layer_measures(model, torch.zeros(2, 3, 16, 16)).items()}
    {'coding_rate': (2, 3), 'sparsity': (2, 3)}
    """
    values: dict[str, list[Tensor]] = {}

    def measure(layer_trace: LayerTrace) -> None:
        attention, sparsifier = unwrap_model(model).transformer.layers[layer_trace.index]
        if layer_trace.tied:
            values.setdefault("coding_rate", []).append(layer_trace.coding_rate(epsilon))
        if layer_trace.tied and after_mssa:
            w = attention.fn.qkv(attention.norm(layer_trace.after_mssa))
            rate = coding_rate(w.unflatten(-1, (-1, attention.fn.dim_head)), epsilon)
            values.setdefault("coding_rate_after_mssa", []).append(rate)
        if isinstance(sparsifier.fn, ISTA | ODL):
            values.setdefault("sparsity", []).append(layer_trace.sparsity())

    visit_layers(model, images, measure)
    return {name: torch.stack(rows, dim=1) for name, rows in values.items()}
