"""The CRATE model: the released constructor, timm's model API, and the model sizes of the papers."""

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
    check_not_negative,
    check_positive,
    check_rates,
    head_width,
    patch_grid,
    rename_arguments,
    size_pair,
    takes_timm_names,
)
from crate_fast.backends import BACKENDS, being_exported, without_tracer_warnings
from crate_fast.errors import UserError
from crate_fast.functional import RESIDUALS, THRESHOLDS
from crate_fast.layers import ISTA, MHSA, MLP, MSSA, ODL, EmbeddingNorm, Layer, Linear, Patches, PreNorm, Transformer
from crate_fast.weight_files import rename_released

ALPHA_OPTIONS = {"sparsifier": "odl", "embed_norm": False, "output_bias": False, "layer_eps": 1e-6}  # of CRATE-α
_POOLS = ("cls", "mean", "avg", "")


def _specific_rate(name: str, rate: float | None, dropout: float) -> float:
    """Return the value of a rate that `dropout` also sets."""
    if rate is not None and dropout and rate != dropout:
        raise UserError(
            f"dropout={dropout} and {name}={rate}: dropout sets attn_drop_rate and proj_drop_rate; pass those instead"
        )
    return dropout if rate is None else rate


def _plain_size(size: tuple[int, int]) -> list[int]:
    # torch.compile cannot differentiate bicubic resampling to a symbolic size: `index` makes the size concrete
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript skips a branch with this condition only)
        if torch.is_grad_enabled() and not being_exported():
            return [operator.index(side) for side in size]
    return [size[0], size[1]]


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample positions [1, 1 + rows·columns, C] from grid `old` to `new` (bicubic); the CLS position is kept."""
    prefix, patches = positions[:, :1], positions[:, 1:]
    patches = patches if patches.dtype == torch.float64 else patches.float()
    patches = patches.transpose(1, 2).unflatten(-1, old)
    patches = F.interpolate(patches, size=_plain_size(new), mode="bicubic", antialias=True)
    return torch.cat([prefix, patches.to(prefix.dtype).flatten(2).transpose(1, 2)], dim=1)


def pool_tokens(tokens: Tensor, pool: str) -> Tensor:
    """Pool tokens [B, N, C], CLS first, to [B, C] for the head.

    `pool` is "cls", "mean" over all tokens with CLS, "avg" over the patches as in timm, or "" for unchanged tokens.
    """
    if pool == "cls":
        return tokens[:, 0]
    if pool == "mean":
        return tokens.mean(dim=1)
    return tokens[:, 1:].mean(dim=1) if pool == "avg" else tokens


# Code that depends on the image size is in wrapped functions: `torch.fx` records each call as one node.


@torch.fx.wrap
def check_images(
    images: Tensor, channels: int, patch_size: tuple[int, int], image_size: tuple[int, int], any_size: bool
) -> None:
    """Raise a UserError unless the model accepts these images. TorchScript skips the check."""
    if not torch.jit.is_scripting():
        with without_tracer_warnings():
            if not isinstance(images, Tensor) or not images.is_floating_point():
                kind = images.dtype if isinstance(images, Tensor) else f"a {type(images).__name__}"
                raise UserError(
                    f"images are {kind}: pass a floating-point tensor; normalise bytes as in training, by "
                    "(images.float() / 255 - mean) / std"
                )
            if images.dim() != 4 or images.shape[1] != channels:
                raise UserError(f"images have shape {tuple(images.shape)}: pass [B, {channels}, height, width]")
            size = (images.shape[2], images.shape[3])
            if any_size:
                patch_grid(size, patch_size)
            elif size != image_size:
                fits = size[0] % patch_size[0] == size[1] % patch_size[1] == 0
                other = f", or build the model for them (CRATE: set_input_size({size}) or dynamic_img_size=True)"
                raise UserError(
                    f"images are {size[0]}×{size[1]} and the model expects {image_size[0]}×{image_size[1]}: resize "
                    f"them{other if fits else ''}"
                )


@torch.fx.wrap
def positions_for(
    images: Tensor, positions: Tensor, patch_size: tuple[int, int], native_grid: tuple[int, int]
) -> Tensor:
    """Return positions [1, 1 + rows·columns, C] for images of any size, resampled from `native_grid`.

    Traced and exported graphs resample at every size, because they cannot branch on the size.
    """
    grid = (images.shape[2] // patch_size[0], images.shape[3] // patch_size[1])
    if not being_exported() and grid == native_grid:
        return positions
    return resample_positions(positions, native_grid, grid)


class CRATE(nn.Module):
    """White-box vision transformer. Each layer compresses the tokens against subspaces, then sparsifies them.

    x₀ = [CLS; patches] + positions; x_{l+1} = ISTA(LN(h)), h = x_l + MSSA(LN(x_l)); logits = head(pool(x_L)).

    Keyword arguments, parameter names and outputs are those of the released code, and its state dicts load strictly
    (`crate_fast.checkpoints` unwraps files). Differences: `mlp_dim` is optional, positions are interpolated for other
    image sizes without a change of the parameter, and the arguments after `ista` are new. timm's names are accepted
    too: `img_size`, `in_chans`, `embed_dim`, `num_heads`, `global_pool` ("token", "avg" or "") and `pos_drop_rate`.

    Args:
        image_size: Height and width of the input in pixels, as one number or two.
        patch_size: Height and width of a patch in pixels, as one number or two; must divide `image_size`.
        num_classes: Number of classes; 0 for no classifier.
        dim: Token width C.
        depth: Number of layers.
        heads: Number of heads H.
        mlp_dim: Hidden width of the MLP of `sparsifier="mlp"`; 4·dim if None.
        pool: "cls", "mean" (over all tokens with CLS), "avg" (over the patches, as in timm) or "" (no pooling: the
            head is applied to each token).
        channels: Number of image channels.
        dim_head: Subspace dimension D of a head.
        dropout: Value of both `attn_drop_rate` and `proj_drop_rate`, as in the released code.
        emb_dropout: Dropout rate of the embedded tokens.
        ista: Step size η.
        sparsity: Sparsity weight λ; the released code fixes 0.1.
        residual: "released" or "paper" (see `layers.Layer`).
        attention: "mssa", or "mhsa" for the ablation CRATE-MHSA.
        sparsifier: "ista", "odl" (CRATE-α) or "mlp" (ablation CRATE-MLP). MHSA with MLP is the layer of a ViT.
        threshold: "relu", or "soft" for the variant with soft thresholding.
        head_hidden: Add a Linear(dim, dim) before the classifier, as in the emergence paper's demo checkpoint.
        embed_norm: Use LayerNorms before and after the patch projection; the encoders of CRATE-MAE have none.
        norm_eps: ε of the head's LayerNorm; 1e-6 in the encoders of CRATE-MAE.
        layer_eps: ε of the layers' LayerNorms; 1e-6 in CRATE-α.
        output_bias: Add a bias to the output projection of attention; CRATE-α has none.
        odl_ratio: Number of atoms of ODL's dictionary, as a multiple of `dim`.
        odl_steps: Number of ISTA steps of ODL, 1 or 2.
        odl_tied: Decode with the dictionary itself instead of a second one.
        odl_residual: Compute h + ODL(LN h) instead of ODL(LN h).
        dynamic_img_size: Accept all image sizes that are multiples of the patch size; else only `image_size`.
        drop_rate: Dropout rate before the classifier.
        attn_drop_rate: Dropout rate of attention weights.
        proj_drop_rate: Dropout rate of attention outputs and inside the MLP; ISTA has no dropout.
        drop_path_rate: Stochastic depth rate of the last layer; the rate grows linearly from 0 at the first layer. A
            dropped step leaves the tokens of a sample unchanged (see `layers.Layer`).
        backend: "auto", "triton" or "torch" for the fused operators (`crate_fast.backends`).
        device, dtype: Device and dtype of the parameters.

    Raises:
        UserError: An argument is out of range or not a valid choice, or belongs to another sparsifier; the message
            names the remedy.

    >>> model = CRATE(image_size=32, patch_size=4, num_classes=10, dim=48, depth=2, heads=3, dim_head=16)
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    num_prefix_tokens = 1
    __jit_unused_properties__ = ("grid_size",)  # TorchScript must not compile it

    @takes_timm_names
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
        check_positive(mlp_dim=1 if mlp_dim is None else mlp_dim)
        check_not_negative(ista=ista, sparsity=sparsity)
        check_choice("residual", residual, RESIDUALS)
        check_choice("attention", attention, ("mssa", "mhsa"))
        check_choice("sparsifier", sparsifier, ("ista", "odl", "mlp"))
        check_choice("threshold", threshold, THRESHOLDS)
        for name, value, default, own in (
            ("threshold", threshold, "relu", "ista"),
            ("odl_ratio", odl_ratio, 4, "odl"),
            ("odl_steps", odl_steps, 2, "odl"),
            ("odl_tied", odl_tied, False, "odl"),
            ("odl_residual", odl_residual, True, "odl"),
        ):
            if value != default and sparsifier != own:
                raise UserError(
                    f"{name}={value!r} has no effect with sparsifier={sparsifier!r}: leave it out, or pass "
                    f"sparsifier={own!r}"
                )
        if odl_steps not in (1, 2):
            raise UserError(f"odl_steps={odl_steps!r}: give 1 or 2")
        check_choice("backend", backend, BACKENDS)
        attn_drop_rate = _specific_rate("attn_drop_rate", attn_drop_rate, dropout)
        mlp_drop_rate = _specific_rate("proj_drop_rate", proj_drop_rate, dropout)
        check_rates(dropout=dropout, emb_dropout=emb_dropout, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_rates(attn_drop_rate=attn_drop_rate, proj_drop_rate=mlp_drop_rate)
        self.patch_size = size_pair("patch_size", patch_size)
        self.image_size = size_pair("image_size", image_size)
        self.native_grid = patch_grid(self.image_size, self.patch_size)  # grid of pos_embedding
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
            rates = {"dropout": attn_drop_rate, "proj_dropout": proj_drop_rate if dropout else mlp_drop_rate}
            sparsify = sparse()  # first, to keep the order of random draws
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

    def reset_parameters(self) -> None:
        """Draw positions and CLS again, such as after `to_empty` of a model from the meta device."""
        nn.init.normal_(self.pos_embedding)
        nn.init.normal_(self.cls_token)

    # --- images and positions ---------------------------------------------------------------------------------

    @property
    def grid_size(self) -> tuple[int, int]:
        """Return the rows and columns of patches at the current image size."""
        return patch_grid(self.image_size, self.patch_size)

    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size=None) -> None:
        """Set the image size (height and width in pixels) that the model expects; None leaves it unchanged.

        Unlike in timm, the position embedding keeps its own grid and is interpolated in every forward pass. A change
        to 480 pixels and back loses nothing, and checkpoints keep their shapes. `patch_size` must be the current one
        or None: the patch embedding cannot be resampled.

        Raises:
            UserError: `img_size` is not a multiple of the patch size, or `patch_size` is not the current one.
        """
        if patch_size is not None and size_pair("patch_size", patch_size) != self.patch_size:
            raise UserError(
                f"patch_size={patch_size}: this model has {self.patch_size}; build a new model for another patch size"
            )
        if img_size is not None:
            size = size_pair("img_size", img_size)
            patch_grid(size, self.patch_size)
            self.image_size = size

    def embed(self, images: Tensor) -> Tensor:
        """Embed images [B, channels, height, width] as tokens [B, 1 + patches, C], CLS first."""
        check_images(images, self.channels, self.patch_size, self.image_size, self.dynamic_img_size)
        patches = self.to_patch_embedding(images)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1).to(patches.dtype), patches], dim=1)
        if self.dynamic_img_size:
            positions = positions_for(images, self.pos_embedding, self.patch_size, self.native_grid)
        else:
            (height, width), (rows, columns) = self.image_size, self.patch_size
            grid, positions = (height // rows, width // columns), self.pos_embedding
            if grid != self.native_grid:
                positions = resample_positions(positions, self.native_grid, grid)
        return self.dropout(tokens + positions)

    # --- state dicts ------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        # timm's checkpoint_path passes the weights of a file to load_state_dict without a filter
        mine = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        own_names = {"head", "conv1"} & self._modules.keys()  # of a subclass: not the released ones
        renamed = mine if own_names else rename_released(mine)
        if renamed is not mine:
            for key in mine:
                del state_dict[prefix + key]
            state_dict.update({prefix + key: value for key, value in renamed.items()})
            mine = renamed
        if not self.head_hidden and {"mlp_head.1.weight", "mlp_head.2.weight"} <= mine.keys():
            errors.append(
                "the classifier of these weights has a hidden layer: build the model with head_hidden=True (and "
                "heads=6 for the emergence paper's demo checkpoint)"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    # --- timm's model API -------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, channels, height, width]; features [B, C] if num_classes=0.

        Without pooling the shapes are [B, 1 + patches, num_classes] and [B, 1 + patches, C].
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last layer's tokens [B, 1 + patches, C], before pooling and the head's LayerNorm."""
        return self.transformer(self.embed(images))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of tokens [B, N, C], or with `pre_logits` the input of the classifier."""
        features, last = pool_tokens(tokens, self.pool), len(self.mlp_head) - 1
        for index, part in enumerate(self.mlp_head):  # a head of the user's own may have more parts
            if index < last:
                features = part(features)
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
        """Return the outputs of chosen layers (timm's API).

        Args:
            x: Images [B, channels, height, width].
            indices: An integer n for the last n layers, a sequence of layers, or None for all; in layer order.
            return_prefix_tokens: Pair each intermediate with its CLS token [B, 1, C].
            norm: Apply the head's LayerNorm to each intermediate.
            stop_early: Skip the layers after the last requested one.
            output_fmt: "NCHW" for [B, C, rows, columns] or "NLC" for [B, patches, C].
            intermediates_only: Return only the list.
            output_dict: Return a dictionary with "image_intermediates" and, if requested,
                "image_intermediates_prefix" and "image_features".

        Returns:
            (tokens of the last layer run, list of intermediates), only the list, or the dictionary.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(self.transformer.depth, indices)
        take = sorted(set(take))  # in layer order, as in timm and DINO
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
        """Return the last n or the listed layers as [B, patches, C] (DINO's name for `forward_intermediates`)."""
        options = {"return_prefix_tokens": return_prefix_tokens, "norm": norm, "intermediates_only": True}
        return self.forward_intermediates(x, n, output_fmt="NCHW" if reshape else "NLC", **options)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers after the last requested one, and the head; return the requested indices."""
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
            num_classes: Number of classes; 0 for no classifier.
            global_pool: "cls" (timm's "token"), "mean", "avg" or "" (see `pool` of `CRATE`); unchanged if None.
        """
        if not isinstance(num_classes, int) or num_classes < 0:
            raise UserError(f"num_classes={num_classes!r}: give a positive integer, or 0 for no classifier")
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
        """Return the parameters, in addition to one-dimensional ones, without weight decay in timm's optimizers."""
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
