"""The released CRATE, rebuilt from its description, as a peer in benchmarks and parity tests.

It computes in eager PyTorch exactly as the released code: three products in ISTA, logits and attention weights in
memory, the tied tensor copied per head. Parameter names and initial distributions are the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ReleasedCRATE", "ReleasedCRATEAlpha", "ReleasedCRATEMAE"]


class _Norm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.qkv = nn.Linear(dim, heads * dim_head, bias=False)
        tied = heads == 1 and dim_head == dim
        self.to_out = nn.Identity() if tied else nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        batch, n_tokens, _ = x.shape
        w = self.qkv(x).reshape(batch, n_tokens, self.heads, -1).permute(0, 2, 1, 3)
        attention = (torch.matmul(w, w.transpose(-1, -2)) * self.scale).softmax(dim=-1)
        attention = F.dropout(attention, 0.0, self.training)
        return self.to_out(torch.matmul(attention, w).permute(0, 2, 1, 3).reshape(batch, n_tokens, -1))


class _Sparsify(nn.Module):
    def __init__(self, dim: int, step_size: float, sparsity: float):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, dim)))
        self.step_size, self.sparsity = step_size, sparsity

    def forward(self, x: Tensor) -> Tensor:
        decoded = F.linear(x, self.weight)
        correlation = F.linear(x, self.weight.t())
        gradient = self.step_size * (correlation - F.linear(decoded, self.weight.t()))
        return F.relu(x + (gradient - self.step_size * self.sparsity))


class _Stack(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, step_size: float, sparsity: float):
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [_Norm(dim, _Attention(dim, heads, dim_head)), _Norm(dim, _Sparsify(dim, step_size, sparsity))]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attend, sparsify in self.layers:
            x = sparsify(attend(x) + x)
        return x


class _Patchify(nn.Module):
    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def forward(self, images: Tensor) -> Tensor:
        columns = F.unfold(images, self.patch, stride=self.patch)  # [B, channel·row·column, patches]
        channels = images.shape[1]
        return columns.unflatten(1, (channels, -1)).permute(0, 3, 2, 1).flatten(2)  # (row, column, channel)


class ReleasedCRATE(nn.Module):
    """The released classifier of images [B, channels, S, S].

    Args:
        image_size, patch_size: S and the side of a patch, in pixels.
        num_classes, dim, depth, heads, dim_head, channels, pool: As in `crate_fast.CRATE`.
        ista: Step size η. sparsity: λ.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int = 64,
        channels: int = 3,
        pool: str = "cls",
        ista: float = 0.1,
        sparsity: float = 0.1,
    ):
        super().__init__()
        pixels = channels * patch_size**2
        self.to_patch_embedding = nn.Sequential(
            _Patchify(patch_size), nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim)
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.transformer = _Stack(dim, depth, heads, dim_head, ista, sparsity)
        self.pool = pool
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.to_patch_embedding(images)
        tokens = torch.cat([self.cls_token.repeat(len(images), 1, 1), patches], dim=1) + self.pos_embedding
        tokens = self.transformer(tokens)
        return self.mlp_head(tokens.mean(dim=1) if self.pool == "mean" else tokens[:, 0])


class _OvercompleteSparsify(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.D, self.D1 = (nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, 4 * dim))) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        codes = F.relu(0.1 * torch.einsum("ck,bnc->bnk", self.D, x) - 0.01)
        error = torch.einsum("ck,bnk->bnc", self.D, codes) - x
        codes = F.relu(codes - 0.1 * torch.einsum("ck,bnc->bnk", self.D, error) - 0.01)
        return torch.einsum("ck,bnk->bnc", self.D1, codes)


class ReleasedCRATEAlpha(nn.Module):
    """CRATE-α as in the released inference code. Arguments as in `ReleasedCRATE`."""

    def __init__(self, *, image_size: int, patch_size: int, num_classes: int, dim: int, depth: int, heads: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.pos_embedding = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList()
        for _ in range(depth):
            attention = _Attention(dim, heads, dim // heads)
            attention.to_out[0] = nn.Linear(dim, dim, bias=False)
            pair = nn.ModuleList([_Norm(dim, attention), _Norm(dim, _OvercompleteSparsify(dim))])
            pair[0].norm.eps = pair[1].norm.eps = 1e-6
            self.transformer.layers.append(pair)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embedding
        for attend, sparsify in self.transformer.layers:
            tokens = attend(tokens) + tokens
            tokens = sparsify(tokens) + tokens
        return self.mlp_head(tokens[:, 0])


class _Expand(nn.Module):
    """A decoder layer: y = LN(x) Dᵀ, y − MSSA(LN y)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        decode = nn.Linear(dim, dim, bias=False)
        nn.init.kaiming_uniform_(decode.weight)
        parts = [_Norm(dim, decode), _Norm(dim, _Attention(dim, heads, dim // heads))]
        self.layers = nn.ModuleList([nn.ModuleList(parts)])

    def forward(self, x: Tensor) -> Tensor:
        decode, attend = self.layers[0]
        y = decode(x)
        return y - attend(y)


class _Projection(nn.Module):
    def __init__(self, patch: int, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ReleasedCRATEMAE(nn.Module):
    """The released CRATE-MAE, which encodes all tokens with mask tokens among them. Images must be square.

    The random draw is an argument: `noise` [B, N] chooses the visible patches.

    Args:
        img_size, patch_size: Sides in pixels.
        embed_dim, depth, num_heads: Sizes of the encoder. decoder_depth: `depth` if None.
        norm_pix_loss: Normalise the targets by patch.
    """

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_depth: int | None = None,
        norm_pix_loss: bool = False,
    ):
        super().__init__()
        self.patches, self.norm_pix_loss = _Patchify(patch_size), norm_pix_loss
        table = torch.zeros(1, (img_size // patch_size) ** 2 + 1, embed_dim)
        self.patch_embed = _Projection(patch_size, 3, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(table.clone(), requires_grad=False)
        self.blocks = nn.ModuleList(
            _Stack(embed_dim, 1, num_heads, embed_dim // num_heads, 0.1, 0.5) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.decoder_pos_embed = nn.Parameter(table.clone(), requires_grad=False)
        n_decoders = depth if decoder_depth is None else decoder_depth
        self.decoder_blocks = nn.ModuleList(_Expand(embed_dim, num_heads) for _ in range(n_decoders))
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(embed_dim, 3 * patch_size**2)

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(images)
        batch, n_patches, _ = x.shape
        kept = int(n_patches * (1 - mask_ratio))
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        mask = torch.ones(batch, n_patches, dtype=images.dtype, device=images.device)
        mask[:, :kept] = 0
        mask = mask.gather(1, restore)
        rows = torch.arange(batch, device=images.device)[:, None]
        hidden = self.mask_token.expand(batch, n_patches - kept, -1)
        x = torch.cat([x[rows, shuffle[:, :kept]], hidden], dim=1)[rows, restore]
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1) + self.decoder_pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = self.patches(images)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (pred - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum(), pred, mask
