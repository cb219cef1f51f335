"""CRATE-MAE: a masked autoencoder whose decoder inverts the encoder's layers.

    encoder layer   h = x + MSSA(LN x),   x ← ISTA(LN h)        CRATE's, with λ = 0.5
    decoder layer   y = LN(x) · Dᵀ,       x ← y − MSSA(LN y)    `layers.DecoderLayer`

Parameter names and outputs are those of the released code, and state dicts load strictly in both directions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crate_fast.arguments import (
    TIMM_NAMES,
    check_choice,
    check_not_negative,
    check_positive,
    patch_grid,
    rename_arguments,
    size_pair,
)
from crate_fast.backends import BACKENDS, without_tracer_warnings
from crate_fast.errors import UserError
from crate_fast.layers import ISTA, MSSA, DecoderLayer, Dictionary, Layer, Linear, PreNorm, patches_of
from crate_fast.model import CRATE, check_images

_NORM_EPS = 1e-6  # of the last LayerNorm of encoder and decoder
ENCODER_OPTIONS = {"embed_norm": False, "norm_eps": _NORM_EPS, "sparsity": 0.5}  # of the encoder as a CRATE
_ENCODER_CHOICES = {
    *("pool", "dropout", "emb_dropout", "drop_rate", "attn_drop_rate", "proj_drop_rate", "drop_path_rate"),
    *("head_hidden", "dynamic_img_size", "backend"),
}
_PIXEL_EPS = 1e-6  # added to a patch's variance


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed positions of a grid of patches, CLS first: [1, 1 + rows·columns, dim], fp32.

    The first half of a position encodes the patch's column, the second its row, each as sines, then cosines of
    pos / 10000^(2k/half), k = 0 … dim/4 − 1. The CLS position is zero (as in MAE, He et al., 2022).

    Raises:
        UserError: `dim` is not a multiple of four.
    """
    if dim % 4:
        raise UserError(f"width {dim}: sine-cosine positions in two dimensions need a multiple of 4")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(1, dim), table]).float().unsqueeze(0)


class _PatchEmbed(nn.Module):
    """Linear projection of each patch, as the convolution `proj` (timm's name)."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, channels, height, width] as [B, patches, C]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class _Block(nn.Module):
    """Layer under the parameter names of the released code."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class CRATEMAE(nn.Module):
    """Masked autoencoder with CRATE layers: predicts the pixels of masked patches.

    As in the released code, mask tokens replace the masked patches before the encoder, which processes all N + 1
    tokens. `decoder_pos_embed` is added to them; `pos_embed` and `decoder_embed` are unused, and `decoder_embed` is
    frozen because DDP would wait for its gradient. With `visible_only` both are used, as in MAE: the encoder runs on
    CLS and the visible patches (a quarter of the work at ratio 0.75), and mask tokens are added before the decoder.

    Args:
        img_size: Height and width of the images in pixels, as one number or two.
        patch_size: Height and width of a patch in pixels, as one number or two; must divide `img_size`.
        in_chans: Number of image channels.
        embed_dim: Token width C; a multiple of 4 and of `num_heads`.
        depth: Number of encoder layers.
        num_heads: Number of heads H.
        decoder_depth: Number of decoder layers; `depth` if None.
        norm_pix_loss: Predict pixels normalised by the mean and standard deviation of their patch.
        visible_only: See above.
        ista: Step size η.
        sparsity: Sparsity weight λ; the released code fixes 0.5.
        backend: "auto", "triton" or "torch" (`crate_fast.backends`).
        device, dtype: Device and dtype of the parameters.

    Raises:
        UserError: An argument is out of range or does not fit the others.

    >>> model = CRATEMAE(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    >>> loss, pred, mask = model(torch.zeros(2, 3, 32, 32))
    >>> pred.shape, mask.sum(dim=1)  # 12 of 16 patches masked
    (torch.Size([2, 16, 192]), tensor([12., 12.]))
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_depth: int | None = None,
        norm_pix_loss: bool = False,
        visible_only: bool = False,
        ista: float = 0.1,
        sparsity: float = 0.5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        decoder_depth = depth if decoder_depth is None else decoder_depth
        check_positive(in_chans=in_chans, embed_dim=embed_dim, num_heads=num_heads)
        check_positive(depth=depth, decoder_depth=decoder_depth)
        check_not_negative(ista=ista, sparsity=sparsity)
        check_choice("backend", backend, BACKENDS)
        if embed_dim % num_heads:
            raise UserError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}: change one of them")
        self.image_size, self.patch_size = size_pair("img_size", img_size), size_pair("patch_size", patch_size)
        self.grid_size = patch_grid(self.image_size, self.patch_size)
        self.channels = self.in_chans = in_chans
        self.embed_dim, self.depth, self.heads = embed_dim, depth, num_heads
        self.num_classes, self.num_features = 0, embed_dim
        self.norm_pix_loss, self.visible_only = norm_pix_loss, visible_only
        self.grad_checkpointing = False
        place = {"device": device, "dtype": dtype}

        def attention() -> PreNorm:
            mssa = MSSA(embed_dim, num_heads, embed_dim // num_heads, backend=backend, **place)
            return PreNorm(embed_dim, mssa, **place)

        def encoder_layer() -> Layer:
            sparsify = ISTA(embed_dim, ista, sparsity, backend=backend, **place)
            return Layer(attention(), PreNorm(embed_dim, sparsify, **place))

        def decoder_layer() -> DecoderLayer:
            decode = PreNorm(embed_dim, Dictionary(embed_dim, **place), **place)
            return DecoderLayer(decode, attention())

        n_tokens = 1 + self.grid_size[0] * self.grid_size[1]
        self.patch_embed = _PatchEmbed(self.patch_size, in_chans, embed_dim, **place)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **place))
        self.pos_embed = nn.Parameter(torch.empty(1, n_tokens, embed_dim, **place), requires_grad=False)
        self.blocks = nn.ModuleList([_Block(encoder_layer()) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=_NORM_EPS, **place)
        self.decoder_embed = Linear(embed_dim, embed_dim, **place).requires_grad_(visible_only)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim, **place))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, n_tokens, embed_dim, **place), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([_Block(decoder_layer()) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=_NORM_EPS, **place)
        self.decoder_pred = Linear(embed_dim, in_chans * self.patch_size[0] * self.patch_size[1], **place)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise linear maps Xavier-uniform with zero biases, positions, and tokens normal with std 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        kernel = self.patch_embed.proj.weight  # may have any memory format
        kernel.copy_(nn.init.xavier_uniform_(torch.empty_like(kernel.flatten(1))).view(kernel.shape))
        for positions in (self.pos_embed, self.decoder_pos_embed):
            positions.copy_(sincos_positions(positions.shape[-1], self.grid_size))
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def __prepare_scriptable__(self):
        raise UserError(
            "torch.jit.script does not support CRATEMAE: use torch.jit.trace or torch.export, or script its encoder()"
        )

    # --- patches ------------------------------------------------------------------------------------------------

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut images [B, channels, height, width] into patches [B, N, p·p·channels]; channels vary fastest."""
        check_images(imgs, self.channels, self.patch_size, self.image_size, any_size=True)
        return patches_of(imgs, self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Assemble images from patches, the inverse of `patchify`."""
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        pixels = patches.unflatten(2, (height, width, self.channels)).unflatten(1, (rows, columns))
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def kept(self, mask_ratio: float) -> int:
        """Return the number of visible patches, int(N·(1 − mask_ratio)).

        As in the released code, rounding in floating point gives 9 of 100 at ratio 0.9.

        Raises:
            UserError: No patch, or every patch, would be visible.
        """
        n_patches = self.grid_size[0] * self.grid_size[1]
        if not 0 < mask_ratio < 1:
            raise UserError(f"mask_ratio={mask_ratio}: it must be above 0 and below 1, such as 0.75")
        count = int(n_patches * (1 - mask_ratio))
        if not 0 < count < n_patches:
            raise UserError(
                f"mask_ratio={mask_ratio} leaves {count} of {n_patches} patches visible: choose a ratio that leaves "
                "at least one patch visible and one masked, such as 0.75"
            )
        return count

    def reconstruction(self, imgs: Tensor, pred: Tensor) -> Tensor:
        """Return the predicted pixels as images [B, channels, height, width].

        With `norm_pix_loss` the mean and deviation come from the true patches, as in the figures of the MAE paper,
        because a prediction does not contain them.

        Args:
            imgs: Images passed to `forward`.
            pred: Predictions that `forward` returned.
        """
        pred = pred.to(imgs.dtype)
        if self.norm_pix_loss:
            mean, deviation = _patch_statistics(self.patchify(imgs))
            pred = pred * deviation + mean
        return self.unpatchify(pred)

    def mask_image(self, mask: Tensor) -> Tensor:
        """Expand a mask [B, N] to pixels [B, 1, height, width], constant on each patch."""
        height, width = self.patch_size
        grid = mask.unflatten(1, self.grid_size).unsqueeze(1)
        return grid.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)

    # --- encoder and decoder ------------------------------------------------------------------------------------

    def _run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward_encoder(self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mask and encode images.

        Args:
            imgs, mask_ratio, noise: See `forward`.

        Returns:
            (tokens, order). Tokens after the last LayerNorm, CLS first: [B, N + 1, C], or with `visible_only` only
            the visible patches, in the order of `order`. Order [B, N]: patch indices, visible patches first.
        """
        check_images(imgs, self.channels, self.patch_size, self.image_size, any_size=False)
        shape = (imgs.shape[0], self.grid_size[0] * self.grid_size[1])
        if noise is None:
            noise = imgs.new_empty(shape, dtype=torch.get_default_dtype()).uniform_()
        with without_tracer_warnings():
            if tuple(noise.shape) != shape:
                raise UserError(f"noise has shape {tuple(noise.shape)}: pass one number per patch, {list(shape)}")
        kept, order = self.kept(mask_ratio), noise.argsort(dim=1, stable=True)
        patches, cls = self.patch_embed(imgs), self.cls_token.expand(imgs.shape[0], -1, -1)
        if self.visible_only:
            patches, cls = patches + self.pos_embed[:, 1:], cls + self.pos_embed[:, :1]
            visible = patches.gather(1, _rows(order[:, :kept], patches))
            tokens = torch.cat([cls.to(visible.dtype), visible], dim=1)
        else:
            masked = _mask(order, kept).unsqueeze(-1)
            patches = torch.where(masked, self.mask_token, patches)
            tokens = torch.cat([cls.to(patches.dtype), patches], dim=1) + self.decoder_pos_embed
        return self.norm(self._run(self.blocks, tokens)), order

    def forward_decoder(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Decode the results of `forward_encoder`; return predictions for all patches [B, N, p·p·channels]."""
        if self.visible_only:
            tokens = self.decoder_embed(tokens)
            cls, visible = tokens.split([1, tokens.shape[1] - 1], dim=1)
            patches = self.mask_token.to(visible.dtype).expand(order.shape[0], order.shape[1], -1)
            patches = patches.scatter(1, _rows(order[:, : visible.shape[1]], visible), visible)
            tokens = torch.cat([cls, patches], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self._run(self.decoder_blocks, tokens)))[:, 1:]

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error per pixel over the masked patches, a scalar in fp32 or float64.

        Args:
            imgs: [B, channels, height, width].
            pred: [B, N, p·p·channels].
            mask: [B, N], 1 where masked.
        """
        target = self.patchify(imgs)
        target = target if target.dtype == torch.float64 else target.float()
        if self.norm_pix_loss:
            mean, deviation = _patch_statistics(target)
            target = (target - mean) / deviation
        error = (pred.to(target.dtype) - target).square().mean(dim=-1)
        mask = mask.to(target.dtype)
        return (error * mask).sum() / mask.sum()

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode and decode images; return the loss, the predictions and the mask.

        Args:
            imgs: [B, channels, height, width], of size `img_size`.
            mask_ratio: Share of the patches to mask, above 0 and below 1.
            noise: [B, N]; the `kept` patches with the smallest values stay visible (the first of equal ones). Drawn
                uniformly if None.

        Returns:
            (loss, a scalar; pred [B, N, p·p·channels] for all patches; mask [B, N], 1 where masked, else 0).

        Raises:
            UserError: Images or noise have a wrong shape, or the ratio leaves no patch visible or none masked.
        """
        tokens, order = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(tokens, order)
        mask = _mask(order, self.kept(mask_ratio)).to(imgs.dtype)
        return self.forward_loss(imgs, pred, mask), pred, mask

    # --- the encoder as a CRATE, and the methods that training calls ------------------------------------------------

    def encoder(self, num_classes: int = 0, **options) -> CRATE:
        """Return the encoder as a `CRATE`, for fine-tuning, probing, segmentation and the white-box view.

        Args:
            num_classes: Number of classes of a new classifier with random weights; 0 for no classifier.
            **options: Arguments of `CRATE`, also under timm's names: `pool`, `dropout`, `emb_dropout`, timm's drop
                rates, `head_hidden`, `dynamic_img_size` or `backend`. For another image size, call `set_input_size`
                on the result.

        Returns:
            A CRATE with copies of the weights, on the same device and in the same mode.

        Raises:
            UserError: An option would change the architecture.
        """
        options = rename_arguments(options, TIMM_NAMES)
        unknown = options.keys() - _ENCODER_CHOICES
        if unknown:
            raise UserError(
                f"{', '.join(sorted(unknown))}: encoder() keeps the architecture of this model; leave this out, and "
                "for another image size call set_input_size on the result"
            )
        first = self.blocks[0].layers[0]
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size, "channels": self.channels}
        sizes |= {"dim": self.embed_dim, "depth": self.depth, "heads": self.heads}
        sizes |= {"dim_head": self.embed_dim // self.heads, **ENCODER_OPTIONS}
        sizes |= {"ista": first[1].fn.step_size, "sparsity": first[1].fn.lambd, "backend": first[1].fn.backend}
        place = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        model = CRATE(num_classes=num_classes, **(sizes | place | options))
        weights = encoder_state_dict(self.state_dict(), self.visible_only)
        head = {name: value for name, value in model.state_dict().items() if name not in weights}  # new classifier
        model.load_state_dict(weights | head)
        return model.train(self.training)

    def get_classifier(self) -> nn.Module:
        """Return the last linear map, which predicts pixels; timm's tools treat it as the head."""
        return self.decoder_pred

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return an empty set: as in MAE the tokens have weight decay, and the positions are fixed."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return regular expressions that group parameters by depth, for layer-wise learning rates (timm)."""
        return {
            "stem": r"^cls_token|^mask_token|^pos_embed|^decoder_pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^decoder_embed", (99998,)), (r"^decoder", (99999,))],
        }


def _rows(indices: Tensor, like: Tensor) -> Tensor:
    """Expand token indices [B, K] to [B, K, C], for `gather` and `scatter` on tokens [B, N, C]."""
    return indices.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def _mask(order: Tensor, kept: int) -> Tensor:
    """Return a mask [B, N] that is False for the first `kept` patches of `order`."""
    return torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :kept], 0)  # torch.jit.trace rejects False


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each patch's values, [B, N, 1] each."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + _PIXEL_EPS).sqrt()


def encoder_state_dict(state_dict: dict[str, Tensor], visible_only: bool = False) -> dict[str, Tensor]:
    """Return the encoder's weights in a CRATE-MAE state dict, under the names of a `CRATE` with `embed_norm=False`.

    Args:
        state_dict: State dict of a `CRATEMAE` or of a released model.
        visible_only: True if the model was trained with `visible_only`: its positions are in another table.

    Raises:
        UserError: This is not the state dict of a CRATE-MAE; the message names a missing key.
    """
    positions = "pos_embed" if visible_only else "decoder_pos_embed"
    names = {"cls_token": "cls_token", positions: "pos_embedding"}
    names |= {"patch_embed.proj.bias": "to_patch_embedding.2.bias"}
    names |= {"norm.weight": "mlp_head.0.weight", "norm.bias": "mlp_head.0.bias"}
    absent = sorted({*names, "patch_embed.proj.weight"} - state_dict.keys())
    if absent:
        raise UserError(f"not a state dict of CRATE-MAE: {absent[0]} is missing; pass the weights of a CRATE-MAE")
    kernel = state_dict["patch_embed.proj.weight"]
    found = {"to_patch_embedding.2.weight": kernel.permute(0, 2, 3, 1).flatten(1)}
    for key, value in state_dict.items():
        if key in names:
            found[names[key]] = value
        elif key.startswith("blocks."):
            found["transformer.layers." + key.removeprefix("blocks.").replace(".layers.0.", ".", 1)] = value
    return found
