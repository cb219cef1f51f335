"""CRATE: the released constructor, timm's model contract, and the sizes of both papers."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crate_fast.arguments import (
    TIMM_NAMES,
    TIMM_POOLS,
    check_choice,
    check_floating,
    check_positive,
    check_rates,
    head_width,
    patch_grid,
    rename_arguments,
    size_pair,
    takes_names,
)
from crate_fast.backends import BACKENDS, being_written, without_tracer_warnings
from crate_fast.errors import UserError
from crate_fast.functional import RESIDUALS, THRESHOLDS
from crate_fast.layers import ISTA, MHSA, MLP, MSSA, ODL, EmbeddingNorm, Layer, Linear, Patches, PreNorm, Transformer
from crate_fast.weight_files import is_wrapped, unwrap_state_dict

ALPHA_OPTIONS = {"sparsifier": "odl", "embed_norm": False, "output_bias": False, "layer_eps": 1e-6}  # of CRATE-α
_POOLS = ("cls", "mean", "avg", "")


def _specific_rate(name: str, rate: float | None, dropout: float) -> float:
    """Return a rate that `dropout` sets too."""
    if rate is not None and dropout and rate != dropout:
        raise UserError(
            f"dropout={dropout} and {name}={rate}: dropout sets attn_drop_rate and proj_drop_rate; give those alone"
        )
    return dropout if rate is None else rate


def _plain_size(size: tuple[int, int]) -> list[int]:
    # torch.compile cannot differentiate a bicubic resampling of symbolic size: `index` makes it a plain number there
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript leaves out what stands behind this alone
        if torch.is_grad_enabled() and not being_written():
            return [operator.index(side) for side in size]
    return [size[0], size[1]]


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Return positions [1, 1 + rows·columns, C] of one grid for another, bicubically; CLS keeps its own."""
    prefix, patches = positions[:, :1], positions[:, 1:]
    patches = patches if patches.dtype == torch.float64 else patches.float()
    patches = patches.transpose(1, 2).unflatten(-1, old)
    patches = F.interpolate(patches, size=_plain_size(new), mode="bicubic", antialias=True)
    return torch.cat([prefix, patches.to(prefix.dtype).flatten(2).transpose(1, 2)], dim=1)


def pool_tokens(tokens: Tensor, pool: str) -> Tensor:
    """Pool tokens [B, N, C], CLS first, for the head: [B, C], or the tokens themselves for pool="".

    Args:
        tokens: Of the last layer.
        pool: "cls"; "mean" of all tokens, CLS included; "avg" of the patches, as timm's; "" for no pooling.
    """
    if pool == "cls":
        return tokens[:, 0]
    if pool == "mean":
        return tokens.mean(dim=1)
    return tokens[:, 1:].mean(dim=1) if pool == "avg" else tokens


# What depends on the size of the images is a function here: one node of `torch.fx`'s graphs, which knows the size.


@torch.fx.wrap
def check_images(
    images: Tensor, channels: int, patch_size: tuple[int, int], image_size: tuple[int, int], any_size: bool
) -> None:
    """Raise a UserError unless the model takes these images; unchecked in TorchScript."""
    if not torch.jit.is_scripting():
        with without_tracer_warnings():
            check_floating(images)
            if images.dim() != 4 or images.shape[1] != channels:
                raise UserError(f"images have shape {tuple(images.shape)}: pass [B, {channels}, height, width]")
            size = (images.shape[2], images.shape[3])
            if any_size:
                patch_grid(size, patch_size)
            elif size != image_size:
                raise UserError(
                    f"images are {size[0]}×{size[1]} and the model expects {image_size[0]}×{image_size[1]}: "
                    f"resize them, call set_input_size({size}), or build the model with dynamic_img_size=True"
                )


@torch.fx.wrap
def positions_for(
    images: Tensor, positions: Tensor, patch_size: tuple[int, int], native_grid: tuple[int, int]
) -> Tensor:
    """Return positions [1, 1 + rows·columns, C] for images of any size, from those of `native_grid`.

    A graph that is written resamples them at every size: it cannot ask whether this one is the native.
    """
    grid = (images.shape[2] // patch_size[0], images.shape[3] // patch_size[1])
    if not being_written() and grid == native_grid:
        return positions
    return resample_positions(positions, native_grid, grid)


class CRATE(nn.Module):
    """The white-box vision transformer: a layer compresses the tokens against subspaces, then sparsifies them.

    x₀ = [CLS; patches] + positions; x_{l+1} = ISTA(LN(h)), h = x_l + MSSA(LN(x_l)); logits = head(pool(x_L)).

    Keywords, parameter names and values are those of the released code, so released state dicts load strictly
    (`crate_fast.checkpoints` unwraps files). Different from it: `mlp_dim` may be left out, positions are interpolated
    for other image sizes without touching the parameter, and everything below `ista` is new. timm's names are
    accepted too: `img_size`, `in_chans`, `embed_dim`, `num_heads`, `global_pool` ("token", "avg" or "") and
    `pos_drop_rate`.

    Args:
        image_size: Height and width of the input in pixels, one number or two.
        patch_size: Height and width of a patch in pixels, one number or two; divides `image_size`.
        num_classes: Size of the head; 0 for none.
        dim: Token width C.
        depth: Number of layers.
        heads: H.
        mlp_dim: Hidden width of the MLP, 4·dim when None; only `sparsifier="mlp"` has one.
        pool: "cls", "mean" (over all tokens, CLS included), "avg" (over the patches, as timm's) or "" (no pooling:
            the head reads each token).
        channels: Of the image.
        dim_head: Subspace dimension D of a head.
        dropout: On attention weights, attention outputs and inside the MLP: `attn_drop_rate` and `proj_drop_rate`.
        emb_dropout: On the embedded tokens.
        ista: Step size η.
        sparsity: λ; the released code fixes 0.1.
        residual: "released" or "paper" (see `layers.Layer`).
        attention: "mssa", or "mhsa" for the ablation CRATE-MHSA.
        sparsifier: "ista"; "odl", CRATE-α's; "mlp" for the ablation CRATE-MLP. With MHSA and MLP a layer is ViT's.
        threshold: "relu", or "soft" for the variant with soft thresholding.
        head_hidden: A Linear(dim, dim) before the classifier, as the emergence paper's demo checkpoint has.
        embed_norm: LayerNorms before and behind the patch projection; the encoders of CRATE-MAE have none.
        norm_eps: ε of the head's LayerNorm; 1e-6 in the encoders of CRATE-MAE.
        layer_eps: ε of the layers' LayerNorms; 1e-6 in CRATE-α.
        output_bias: Whether attention's output map has a bias; CRATE-α's has none.
        odl_ratio: Atoms of ODL's dictionary over `dim`.
        odl_steps: Its ISTA steps, 1 or 2.
        odl_tied: Decode with the dictionary itself, not with a second one.
        odl_residual: h + ODL(LN h) instead of ODL(LN h).
        dynamic_img_size: Accept any image that the patch size divides; else only `image_size`.
        drop_rate: Dropout in front of the classifier.
        attn_drop_rate: Dropout on attention weights.
        proj_drop_rate: Dropout on attention outputs and inside the MLP; ISTA has none.
        drop_path_rate: Stochastic depth of the last layer; the rates of the layers grow linearly from 0. A dropped
            step leaves a sample's tokens unchanged (see `layers.Layer`).
        backend: "auto", "triton" or "torch" for the fused operators (`crate_fast.backends`).
        device, dtype: Of the parameters.

    Raises:
        UserError: An argument is out of range or misspelt; the message names it and the choices.

    >>> model = CRATE(image_size=32, patch_size=4, num_classes=10, dim=48, depth=2, heads=3, dim_head=16)
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    num_prefix_tokens = 1
    __jit_unused_properties__ = ("grid_size",)  # TorchScript would compile it

    @takes_names(TIMM_NAMES)
    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int | None = None,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        ista: float = 0.1,
        sparsity: float = 0.1,
        residual: str = "released",
        attention: str = "mssa",
        sparsifier: str = "ista",
        threshold: str = "relu",
        head_hidden: bool = False,
        embed_norm: bool = True,
        norm_eps: float = 1e-5,
        layer_eps: float = 1e-5,
        output_bias: bool = True,
        odl_ratio: int = 4,
        odl_steps: int = 2,
        odl_tied: bool = False,
        odl_residual: bool = True,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float | None = None,
        proj_drop_rate: float | None = None,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_positive(dim=dim, depth=depth, heads=heads, dim_head=dim_head, channels=channels, odl_ratio=odl_ratio)
        check_choice("residual", residual, RESIDUALS)
        check_choice("attention", attention, ("mssa", "mhsa"))
        check_choice("sparsifier", sparsifier, ("ista", "odl", "mlp"))
        check_choice("threshold", threshold, THRESHOLDS)
        if sparsifier == "odl" and threshold != "relu":
            raise UserError(f"threshold={threshold!r}: ODL's codes are not negative; leave it at 'relu'")
        if odl_steps not in (1, 2):
            raise UserError(f"odl_steps={odl_steps!r}: give 1 or 2")
        check_choice("backend", backend, BACKENDS)
        attn_drop_rate = _specific_rate("attn_drop_rate", attn_drop_rate, dropout)
        mlp_drop_rate = _specific_rate("proj_drop_rate", proj_drop_rate, dropout)
        check_rates(dropout=dropout, emb_dropout=emb_dropout, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_rates(attn_drop_rate=attn_drop_rate, proj_drop_rate=mlp_drop_rate)
        self.patch_size = size_pair("patch_size", patch_size)
        self.image_size = size_pair("image_size", image_size)
        self.native_grid = patch_grid(self.image_size, self.patch_size)  # the grid that pos_embedding was made for
        self.channels = self.in_chans = channels
        self.head_hidden, self.embed_norm = head_hidden, embed_norm
        self.dynamic_img_size = dynamic_img_size
        self.num_features = self.embed_dim = self.head_hidden_size = dim
        place = {"device": device, "dtype": dtype}

        patch_height, patch_width = self.patch_size
        patch_dim = channels * patch_height * patch_width
        self.to_patch_embedding = nn.Sequential(
            Patches(self.patch_size),
            nn.LayerNorm(patch_dim, **place) if embed_norm else nn.Identity(),
            Linear(patch_dim, dim, **place),
            EmbeddingNorm(dim, **place) if embed_norm else nn.Identity(),
        )
        n_patches = self.native_grid[0] * self.native_grid[1]
        self.pos_embedding = nn.Parameter(torch.randn(1, n_patches + 1, dim, **place))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim, **place))
        self.dropout = nn.Dropout(float(emb_dropout))

        attention_class = MSSA if attention == "mssa" else MHSA

        def sparse() -> nn.Module:
            if sparsifier == "ista":
                return ISTA(dim, ista, sparsity, threshold, backend, **place)
            if sparsifier == "odl":
                return ODL(dim, odl_ratio, ista, sparsity, odl_steps, odl_tied, backend, **place)
            return MLP(dim, 4 * dim if mlp_dim is None else mlp_dim, mlp_drop_rate, **place)

        def layer(index: int) -> Layer:
            rates = {"dropout": attn_drop_rate, "proj_dropout": proj_drop_rate}
            sparsify = sparse()  # drawn before attention's weights
            attend = attention_class(dim, heads, dim_head, backend=backend, output_bias=output_bias, **rates, **place)
            drop_path = drop_path_rate * index / max(1, depth - 1)
            parts = (PreNorm(dim, part, drop_path, eps=layer_eps, **place) for part in (attend, sparsify))
            return Layer(*parts, residual, odl_residual)

        self.transformer = Transformer([layer(index) for index in range(depth)], dim, heads)
        hidden = [Linear(dim, dim, **place)] if head_hidden else []
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim, eps=norm_eps, **place), *hidden, nn.Identity())
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, pool)
        self.feature_info = [
            {"module": f"transformer.layers.{i}", "num_chs": dim, "reduction": self.patch_size[0]}
            for i in range(depth)
        ]

    # --- images and positions ---------------------------------------------------------------------------------

    @property
    def grid_size(self) -> tuple[int, int]:
        """Return rows and columns of patches at the current image size."""
        return patch_grid(self.image_size, self.patch_size)

    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size=None) -> None:
        """Expect images of another size from now on.

        Unlike timm's models the position embedding keeps its own grid and is interpolated in every forward pass, so
        going to 480 pixels and back loses nothing and checkpoints keep their shapes.

        Args:
            img_size: New height and width in pixels; unchanged when None.
            patch_size: Only the present one (or None): the patch embedding cannot be resampled.

        Raises:
            UserError: The patch size does not divide the new size, or is to change.
        """
        if patch_size is not None and size_pair("patch_size", patch_size) != self.patch_size:
            raise UserError(
                f"patch_size={patch_size}: this model's is {self.patch_size}; build a new model for another"
            )
        if img_size is not None:
            size = size_pair("img_size", img_size)
            patch_grid(size, self.patch_size)
            self.image_size = size

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Return positions [1, 1 + rows·columns, C] for a grid of patches: the parameter, resampled where needed."""
        if grid == self.native_grid:
            return self.pos_embedding
        return resample_positions(self.pos_embedding, self.native_grid, grid)

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, channels, height, width] → the first layer's tokens [B, 1 + patches, C], CLS first."""
        check_images(images, self.channels, self.patch_size, self.image_size, self.dynamic_img_size)
        patches = self.to_patch_embedding(images)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1).to(patches.dtype), patches], dim=1)
        if self.dynamic_img_size:
            positions = positions_for(images, self.pos_embedding, self.patch_size, self.native_grid)
        else:
            (height, width), (rows, columns) = self.image_size, self.patch_size
            positions = self.position_embedding((height // rows, width // columns))
        return self.dropout(tokens + positions)

    # --- state dicts ------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # torch.save keeps it: 4×4 and 2×8 positions have one shape
            destination._metadata[prefix[:-1]]["grid"] = self.native_grid

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        # timm's checkpoint_path calls load_state_dict with what the file held, without any filter
        mine = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if is_wrapped(mine):
            for key in mine:
                del state_dict[prefix + key]
            mine = unwrap_state_dict(mine)
            state_dict.update({prefix + key: value for key, value in mine.items()})
            local_metadata = mine._metadata.get("", local_metadata)
        positions, grid = mine.get("pos_embedding"), local_metadata.get("grid", self.native_grid)
        if positions is not None and positions.shape == self.pos_embedding.shape and tuple(grid) != self.native_grid:
            own = self.native_grid
            errors.append(
                f"{prefix}pos_embedding is of a {grid[0]}×{grid[1]} grid and the model's of {own[0]}×{own[1]}: "
                "resample it with crate_fast.checkpoints.adapt_state_dict"
            )
        if not self.head_hidden and {"mlp_head.1.weight", "mlp_head.2.weight"} <= mine.keys():
            errors.append(
                "the classifier of these weights has a hidden layer: build the model with head_hidden=True, and for "
                "the emergence paper's demo checkpoint with heads=6 too"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    # --- timm's model contract --------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, channels, height, width] → logits [B, num_classes]; features [B, C] without a classifier.

        Without pooling these are [B, 1 + patches, num_classes] and [B, 1 + patches, C].
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images → the last layer's tokens [B, 1 + patches, C], before pooling and the head's LayerNorm."""
        return self.transformer(self.embed(images))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, C] → logits, or with `pre_logits` the features that the classifier reads."""
        features = self.mlp_head[0](pool_tokens(tokens, self.pool))
        if self.head_hidden:
            features = self.mlp_head[1](features)
        features = self.head_drop(features)
        return features if pre_logits else self.mlp_head[-1](features)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list | tuple[Tensor, list] | dict:
        """Return the outputs of chosen layers (timm's interface).

        Args:
            x: Images [B, channels, height, width].
            indices: The last n layers if an integer, these layers if a sequence, all if None; in the model's order.
            return_prefix_tokens: Pair each intermediate with its CLS token [B, 1, C].
            norm: Apply the head's LayerNorm to each intermediate.
            stop_early: Do not run the layers after the last one asked for.
            output_fmt: "NCHW" for [B, C, rows, columns] or "NLC" for [B, patches, C].
            intermediates_only: Return only the list.
            output_dict: Return a dictionary with "image_intermediates", and where asked for
                "image_intermediates_prefix" and "image_features".

        Returns:
            (last tokens run, list of intermediates), the list alone, or the dictionary.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(self.transformer.depth, indices)
        take = sorted(set(take))  # as timm's models and DINO return them
        taps: dict[int, Tensor] = dict.fromkeys(take)
        tokens = self.transformer(self.embed(x), taps, last if stop_early else None)
        features = [self.mlp_head[0](taps[i]) if norm else taps[i] for i in take]
        intermediates = [feature[:, 1:] for feature in features]
        if output_fmt == "NCHW":
            grid = patch_grid((x.shape[2], x.shape[3]), self.patch_size)
            intermediates = [y.transpose(1, 2).unflatten(-1, grid).contiguous() for y in intermediates]
        if output_dict:
            found = {"image_intermediates": intermediates}
            if return_prefix_tokens:
                found["image_intermediates_prefix"] = [feature[:, :1] for feature in features]
            return found if intermediates_only else found | {"image_features": tokens}
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, [feature[:, :1] for feature in features], strict=True))
        return intermediates if intermediates_only else (tokens, intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """`forward_intermediates` under DINO's name: the last n layers, or those listed, as [B, patches, C]."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers after the last one asked for, and the head; returns the indices kept."""
        take, last = feature_take_indices(self.transformer.depth, indices)
        self.transformer.layers = self.transformer.layers[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        if prune_norm:
            self.mlp_head[0] = nn.Identity()
        return take

    def get_classifier(self) -> nn.Module:
        """Return the classifier, the last part of the head."""
        return self.mlp_head[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the head's LayerNorm and hidden layer stay.

        Args:
            num_classes: Its outputs; 0 for none.
            global_pool: "cls" (timm's "token"), "mean", "avg" or "" (see `CRATE`'s `pool`); unchanged when None.
        """
        if not isinstance(num_classes, int) or num_classes < 0:
            raise UserError(f"num_classes={num_classes!r}: give 0 for no head, or a positive integer")
        if global_pool is not None:
            pool = TIMM_POOLS.get(global_pool, global_pool)
            check_choice("pool", pool, _POOLS)
            self.pool, self.global_pool = pool, "token" if pool == "cls" else pool
        self.num_classes = num_classes
        place = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        classifier = Linear(self.embed_dim, num_classes, **place) if num_classes else nn.Identity()
        self.mlp_head[-1] = classifier.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides one-dimensional ones, that timm's optimizer factory does not decay."""
        return {"pos_embedding", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return regular expressions that group parameters by depth, for layer-wise learning rates (timm)."""
        return {
            "stem": r"^cls_token|^pos_embedding|^to_patch_embedding",
            "blocks": [(r"^transformer\.layers\.(\d+)", None), (r"^mlp_head\.0", (99999,))],
        }


def _released(num_classes: int, sizes: dict[str, int], arguments: dict[str, Any]) -> CRATE:
    sizes = {"image_size": 224, "patch_size": 16} | sizes | rename_arguments(arguments, TIMM_NAMES)
    if "dim_head" not in sizes:
        sizes["dim_head"] = head_width(sizes["dim"], sizes["heads"])
    return CRATE(num_classes=num_classes, **sizes)


def CRATE_tiny(num_classes: int = 1000, **kwargs) -> CRATE:
    """Build CRATE-T: width 384, 12 layers, 6 heads of 64, patch 16 at 224 px; 6.09 M parameters."""
    return _released(num_classes, {"dim": 384, "depth": 12, "heads": 6}, kwargs)


def CRATE_small(num_classes: int = 1000, **kwargs) -> CRATE:
    """Build CRATE-S: width 576, 12 layers, 12 heads of 48, patch 16 at 224 px; 13.12 M parameters."""
    return _released(num_classes, {"dim": 576, "depth": 12, "heads": 12}, kwargs)


def CRATE_base(num_classes: int = 1000, **kwargs) -> CRATE:
    """Build CRATE-B: width 768, 12 layers, 12 heads of 64, patch 16 at 224 px; 22.80 M parameters."""
    return _released(num_classes, {"dim": 768, "depth": 12, "heads": 12}, kwargs)


def CRATE_large(num_classes: int = 1000, **kwargs) -> CRATE:
    """Build CRATE-L: width 1024, 24 layers, 16 heads of 64, patch 16 at 224 px; 77.64 M parameters."""
    return _released(num_classes, {"dim": 1024, "depth": 24, "heads": 16}, kwargs)


def CRATE_alpha_base(num_classes: int = 1000, **kwargs) -> CRATE:
    """Build CRATE-α-B: width 768, 12 layers, 12 heads of 64, patch 16 at 224 px; 72.33 M parameters."""
    return _released(num_classes, {"dim": 768, "depth": 12, "heads": 12, **ALPHA_OPTIONS}, kwargs)


def CRATE_alpha_large(num_classes: int = 1000, **kwargs) -> CRATE:
    """Build CRATE-α-L: width 1024, 24 layers, 16 heads of 64, patch 14 at 224 px; 253.65 M parameters."""
    sizes = {"dim": 1024, "depth": 24, "heads": 16, "patch_size": 14}
    return _released(num_classes, sizes | ALPHA_OPTIONS, kwargs)
