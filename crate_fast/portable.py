"""A CRATE for inference on images of any size, with other outputs than logits too: what `export.py` writes to a file.

The same weights and the same layers, without a branch on the size of the images. Two things are written differently:

* ISTA is y = shrink(x + xG − ηλ) with G = η(D − DᵀD) stored in place of D.
* Positions are resampled by two matrices, R P Cᵀ, whose entries depend on the number of rows and columns: what
  `resample_positions` (bicubic, antialiased) computes, for a size that is known when the graph runs. At the size of
  training both are the identity.
"""

import copy
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_fast.errors import UserError
from crate_fast.functional import fold_dictionary
from crate_fast.layers import ISTA, MHSA, MSSA
from crate_fast.model import CRATE, pool_tokens
from crate_fast.whitebox import attention_layer, trace

__all__ = ["OUTPUTS", "PortableCRATE", "choose_outputs", "resampling_matrix"]

OUTPUTS = ("logits", "features", "attention", "subspace_tokens")
_CUBIC = -0.5  # the cubic's parameter a, as Pillow's; PyTorch's bicubic without antialiasing has -0.75


def resampling_matrix(new: int, old: int, like: Tensor) -> Tensor:
    """The matrix [new, old] that resamples `old` points to `new`: bicubic and antialiased, as `F.interpolate`.

    Row i holds k((j + ½ − s(i + ½)) / max(s, 1)) for every j, divided by its sum, with s = old / new and k the cubic
    convolution kernel for a = −½. k is 0 from 2 on, so nothing beyond the filter's window counts.

    Args:
        new: Points wanted; may be symbolic.
        old: Points given.
        like: A tensor of the matrix's dtype and device.

    >>> resampling_matrix(2, 2, torch.zeros(()))
    tensor([[1., 0.],
            [0., 1.]])
    """
    index = torch.arange(new, dtype=like.dtype, device=like.device)
    count = torch.ones_like(index).sum()
    scale = torch.full_like(count, old) / count  # a plain number over a tensor would be rounded twice
    centers = (index + 0.5) * scale
    points = torch.arange(old, dtype=like.dtype, device=like.device) + 0.5
    distance = ((points - centers[:, None]) / scale.clamp(min=1.0)).abs()
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * _CUBIC - 4 * _CUBIC
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    return weights / weights.sum(dim=1, keepdim=True)


class _PortableISTA(nn.Module):
    """`ISTA` with its folded dictionary."""

    def __init__(self, ista: ISTA):
        super().__init__()
        with torch.no_grad():
            self.register_buffer("folded", fold_dictionary(ista.weight, ista.step_size))
        self.shift, self.threshold = ista.step_size * ista.lambd, ista.threshold

    def forward(self, x: Tensor) -> Tensor:
        u = x + x @ self.folded
        return F.relu(u - self.shift) if self.threshold == "relu" else F.softshrink(u, self.shift)


def _portable(module: nn.Module) -> nn.Module:
    """`module` with every ISTA replaced, and no attention that asks for the kernels; changes it."""
    for name, child in list(module.named_children()):
        _portable(child)
        if isinstance(child, MSSA):
            child.backend = "torch"
        elif isinstance(child, ISTA):
            setattr(module, name, _PortableISTA(child))
    return module


def choose_outputs(
    model: CRATE, outputs: Sequence[str] | None = None, layers: Iterable[int] | None = None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What a portable model is to return: names in the order of `OUTPUTS`, and layers from the first to the last.

    Args:
        model: The CRATE.
        outputs: Of `OUTPUTS`; when None "logits", or "features" of a model without a classifier.
        layers: Of "attention" and "subspace_tokens", negative ones from the end; when None the one that the paper
            looks at (`whitebox.attention_layer`).

    Raises:
        TypeError: The model is no CRATE.
        UserError: There is no such output, no such layer, or the model has no such thing.
    """
    if not isinstance(model, CRATE):
        raise TypeError(
            f"a {type(model).__name__} cannot be exported: pass a crate_fast.CRATE, or of a CRATE-MAE its encoder()"
        )
    if outputs is None:
        outputs = ["logits" if model.num_classes else "features"]
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        raise UserError(f"outputs={list(outputs)!r}: choose from {', '.join(OUTPUTS)}")
    if "logits" in outputs and not model.num_classes:
        raise UserError("outputs: this model has no classifier, so no logits; ask for features [B, C] instead")
    stack = model.transformer.layers
    layers = [attention_layer(model)] if layers is None else list(layers)
    absent = [layer for layer in layers if not -len(stack) <= layer < len(stack)]
    if absent or not layers:
        wrong = f"layer {absent[0]}" if absent else "layers=[]"
        raise UserError(f"{wrong}: the model has layers 0 to {len(stack) - 1} (or -{len(stack)} to -1)")
    layers = sorted({layer % len(stack) for layer in layers})
    if "subspace_tokens" in outputs and any(isinstance(stack[layer][0].fn, MHSA) for layer in layers):
        raise UserError(
            "outputs: this model's layers have separate query, key and value, so no subspace_tokens; leave them out"
        )
    return tuple(name for name in OUTPUTS if name in outputs), tuple(layers)


class PortableCRATE(nn.Module):
    """A copy of a CRATE, in fp32 on the CPU and in evaluation mode, with one graph for all sizes of images.

    `forward` takes images [B, channels, height, width] whose sides are multiples of the patch size, and returns a
    dict with the chosen entries, of P patches and the L chosen layers:

        logits           [B, num_classes]
        features         [B, C], the pooled and normalised tokens that the classifier reads
        attention        [B, L, H, P], attention of CLS on the patches (`LayerTrace.cls_attention`)
        subspace_tokens  [B, L, 1 + P, H, D], CLS first (`LayerTrace.subspace_tokens`)

    Args:
        model: The CRATE; it stays as it is.
        outputs, layers: See `choose_outputs`.
        statistics: (mean, deviation) of each channel. With them the images are uint8, and are normalised here; else
            they are normalised fp32.

    Raises:
        TypeError, ValueError: See `choose_outputs`; or the statistics are not those of this many channels.

    >>> model = CRATE(image_size=16, patch_size=4, num_classes=5, dim=8, depth=2, heads=2, dim_head=4)
    >>> portable = PortableCRATE(model, ["logits", "attention"])
    >>> {name: tuple(values.shape) for name, values in portable(torch.zeros(3, 3, 8, 24)).items()}
    {'logits': (3, 5), 'attention': (3, 1, 2, 12)}
    """

    def __init__(
        self,
        model: CRATE,
        outputs: Sequence[str] | None = None,
        layers: Iterable[int] | None = None,
        statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    ):
        super().__init__()
        self.outputs, self.layers = choose_outputs(model, outputs, layers)
        self.patch_size, self.native_grid, self.pool = model.patch_size, model.native_grid, model.pool
        self.channels = model.channels
        self.raw = statistics is not None
        if self.raw:
            mean, deviation = (torch.tensor(values, dtype=torch.float32).flatten() for values in statistics)
            if not len(mean) == len(deviation) == model.channels or not (deviation > 0).all():
                raise UserError(
                    f"statistics={statistics}: give mean and positive deviation of {model.channels} channels"
                )
            self.register_buffer("shift", (-mean / deviation).view(1, -1, 1, 1))
            self.register_buffer("scale", (1 / (255 * deviation)).view(1, -1, 1, 1))
        copied = _portable(copy.deepcopy(model).cpu().float().eval()).requires_grad_(False)
        self.pos_embedding, self.cls_token = copied.pos_embedding, copied.cls_token
        self.patch_embedding = copied.to_patch_embedding
        self.transformer, self.head = copied.transformer, copied.mlp_head

    def normalize(self, images: Tensor) -> Tensor:
        """Images as `forward` takes them → (x/255 − mean)/deviation of uint8 images, others as they are."""
        return torch.addcmul(self.shift, images.float(), self.scale) if self.raw else images

    def embed(self, images: Tensor) -> Tensor:
        """Images → the first layer's tokens [B, 1 + P, C], CLS first."""
        images = self.normalize(images)
        patches = self.patch_embedding(images)
        rows, columns = (side // patch for side, patch in zip(images.shape[2:], self.patch_size, strict=True))
        positions = self.pos_embedding[0, 1:].unflatten(0, self.native_grid)
        positions = torch.tensordot(resampling_matrix(rows, self.native_grid[0], patches), positions, 1)
        positions = resampling_matrix(columns, self.native_grid[1], patches) @ positions
        cls = self.cls_token + self.pos_embedding[:, :1]
        return torch.cat([cls.expand(images.shape[0], -1, -1), patches + positions.flatten(0, 1)], dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images → the last layer's tokens [B, 1 + P, C]."""
        return self.transformer(self.embed(images))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images → the chosen outputs, by name."""
        last = self.transformer.depth - 1
        traces = {layer.index: layer for layer in trace(self, images, {*self.layers, last})}
        chosen = [traces[layer] for layer in self.layers]
        tokens = traces[last].after_ista
        features = self.head[:-1](pool_tokens(tokens, self.pool))
        read = {
            "logits": lambda: self.head[-1](features),
            "features": lambda: features,
            "attention": lambda: torch.stack([layer.cls_attention() for layer in chosen], dim=1),
            "subspace_tokens": lambda: torch.stack([layer.subspace_tokens for layer in chosen], dim=1),
        }
        return {name: read[name]() for name in self.outputs}
