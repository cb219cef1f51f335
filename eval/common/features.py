"""Patch features and CLS attention of chosen layers, for the segmentation protocols.

extract = extractor_for(model)              # a CRATE, one of its ablations, or a timm ViT such as DINO's
features = extract(images, [extract.default_layer])
features.keys(layer)                        # [B, P, H·D]: subspace tokens (CRATE) or keys (ViT), CLS dropped
features.cls_attention(layer)               # [B, H, P]
features.patch_attention(layer, patch)      # [B, H, P], for a patch instead of CLS
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from crate_fast.errors import UserError
from crate_fast.model import CRATE
from crate_fast.whitebox import LayerTrace, attention_layer, cls_attention, visit_layers


@dataclass(frozen=True)
class LayerTokens:
    """One layer's queries and keys."""

    queries: Tensor  # [B, N, H, D], prefix tokens first
    keys: Tensor  # the same shape; the same tensor if they are one projection (MSSA)
    scale: float  # factor s of the logits s·⟨query, key⟩
    prefix: int = 1  # number of tokens before the patches (CLS and registers)
    has_cls: bool = True  # the first prefix token is a CLS token


@dataclass(frozen=True)
class Features:
    """Queries and keys of one batch of images."""

    grid: tuple[int, int]  # rows and columns of patches
    layers: dict[int, LayerTokens]  # layer index → its tokens

    def _tokens(self, layer: int) -> LayerTokens:
        if layer not in self.layers:
            raise UserError(f"layer {layer} was not extracted: choose one of {list(self.layers)}, or extract it too")
        return self.layers[layer]

    def keys(self, layer: int) -> Tensor:
        """Return the keys of the patches, heads concatenated [B, P, H·D]; with MSSA, these are subspace tokens."""
        tokens = self._tokens(layer)
        return tokens.keys[:, tokens.prefix :].flatten(2)

    def cls_attention(self, layer: int) -> Tensor:
        """Return the attention of CLS to the patches, softmax over patches only: [B, H, P] (paper, Eq. 10 and 11)."""
        tokens = self._tokens(layer)
        if not tokens.has_cls:
            raise UserError("this model has no CLS token, so no CLS attention: choose one with class_token=True")
        return self._attention(tokens, 0)

    def patch_attention(self, layer: int, patch: int) -> Tensor:
        """Return the attention of one patch (its row-major index) to all patches: [B, H, P]."""
        tokens, count = self._tokens(layer), self.grid[0] * self.grid[1]
        if not 0 <= patch < count:
            raise UserError(f"patch {patch}: choose from patches 0 to {count - 1}, row by row")
        return self._attention(tokens, tokens.prefix + patch)

    @staticmethod
    def _attention(tokens: LayerTokens, index: int) -> Tensor:
        query, keys = tokens.queries[:, index].float(), tokens.keys[:, tokens.prefix :].float()
        return cls_attention(query, keys, tokens.scale)


class FeatureExtractor:
    """Extractor of `Features` from a CRATE or one of its ablations; see `extractor_for`.

    `default_layer` is that of `whitebox.attention_layer`.
    """

    def __init__(self, model: CRATE):
        self.model, self.depth, self.heads = model.eval(), model.transformer.depth, model.transformer.heads
        self.default_layer, self.patch_size = attention_layer(model), model.patch_size
        self.channels, self.has_cls = model.channels, True

    @property
    def image_size(self) -> tuple[int, int]:
        """Return the height and width of the model's input, in pixels."""
        return self.model.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Return rows and columns of patches at `image_size`."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    def set_image_size(self, size: int) -> None:
        """Set the model's input to squares of `size` pixels; position embeddings are interpolated."""
        if size <= 0 or any(size % side for side in self.patch_size):
            side = max(self.patch_size)
            near = max(side, round(size / side) * side)
            raise UserError(
                f"image size {size} is not a multiple of this model's patch size {self.patch_size[0]}×"
                f"{self.patch_size[1]}: pass --image-size {near}"
            )
        if (size, size) != self.image_size:
            self.model.set_input_size((size, size))

    def resolve_layer(self, layer: int | None) -> int:
        """Return a layer index from 0: negative values count from the end, and None is the default layer."""
        if layer is None:
            return self.default_layer
        if not -self.depth <= layer < self.depth:
            raise UserError(f"layer {layer}: this model has layers 0 to {self.depth - 1}; choose one of these")
        return layer % self.depth

    def resolve_layers(self, layers: Iterable[int | None] | None) -> list[int]:
        """Return layer indices from 0 as `resolve_layer` does, in the given order; all layers when None."""
        return [self.resolve_layer(layer) for layer in (range(self.depth) if layers is None else layers)]

    @torch.no_grad()
    def __call__(self, images: Tensor, layers: Sequence[int] | None = None) -> Features:
        """Run the model on normalised images [B, 3, H, W]; return features of `layers`, the default one when None."""
        wanted = sorted(set(self.resolve_layers([None] if layers is None else layers)))
        return Features(self.grid, self._tokens(images, wanted))

    def _tokens(self, images: Tensor, layers: Iterable[int]) -> dict[int, LayerTokens]:
        found: dict[int, LayerTokens] = {}

        def keep(layer: LayerTrace) -> None:  # not the other tensors of the trace
            found[layer.index] = LayerTokens(layer.queries, layer.keys, layer.scale)

        visit_layers(self.model, images, keep, layers)
        return found


class _ViTExtractor(FeatureExtractor):
    """Extractor for a timm `VisionTransformer`; queries and keys are read after their norms, if any."""

    def __init__(self, model: VisionTransformer):
        self.model, self.depth, self.heads = model.eval(), len(model.blocks), model.blocks[0].attn.num_heads
        self.default_layer, self.has_cls = self.depth - 1, model.cls_token is not None
        # with the stages of a convolutional network in front of the patches, if any
        self.patch_size = tuple(model.patch_embed.feat_ratio(as_scalar=False))
        self.channels = next(p.in_channels for p in model.patch_embed.modules() if isinstance(p, nn.Conv2d))

    @property
    def image_size(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.img_size)

    def _tokens(self, images: Tensor, layers: Iterable[int]) -> dict[int, LayerTokens]:
        seen: dict[tuple[int, str], Tensor] = {}
        with ExitStack() as hooks:
            for index in layers:
                for name in ("q_norm", "k_norm"):  # identity or norm; attention uses their outputs [B, H, N, D]

                    def keep(_module, _inputs, output, key=(index, name)):
                        seen[key] = output.transpose(1, 2)

                    hooks.callback(getattr(self.model.blocks[index].attn, name).register_forward_hook(keep).remove)
            self.model.forward_features(images)
        scale, prefix = self.model.blocks[0].attn.scale, self.model.num_prefix_tokens
        return {
            index: LayerTokens(seen[index, "q_norm"], seen[index, "k_norm"], scale, prefix, self.has_cls)
            for index in layers
        }


def extractor_for(model: nn.Module) -> FeatureExtractor:
    """Return the extractor that fits a model, and put the model in evaluation mode.

    Args:
        model: A `crate_fast.CRATE` (also an ablation or a CRATE-MAE's encoder) or a timm `VisionTransformer`.

    Raises:
        UserError: The model has another type, no blocks, or blocks of another kind.

    >>> import timm
    >>> extract = extractor_for(timm.create_model("crate_tiny_patch16_224", num_classes=0, depth=3))
    >>> features = extract(torch.zeros(1, 3, 224, 224))
    >>> features.keys(1).shape, features.cls_attention(1).shape
    (torch.Size([1, 196, 384]), torch.Size([1, 6, 196]))
    """
    if isinstance(model, CRATE):
        return FeatureExtractor(model)
    blocks = model.blocks if isinstance(model, VisionTransformer) else ()
    if blocks and isinstance(getattr(blocks[0], "attn", None), Attention):  # not in parallel, nor a difference of two
        return _ViTExtractor(model)
    raise UserError(
        f"no patch features can be read from this {type(model).__name__}: pass a crate_fast.CRATE or one of timm's "
        "VisionTransformer models whose blocks hold one ordinary attention, such as vit_small_patch8_224.dino"
    )
