"""The released CRATE's behaviour, rebuilt from its description: the peer of benchmarks and parity tests.

Eager PyTorch exactly as the released code computes: three products in ISTA, logits and attention written to memory,
the tied tensor copied per head. Same parameter names and initial distributions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ReleasedCRATE"]


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
                [
                    _Norm(dim, _Attention(dim, heads, dim_head)),
                    _Norm(dim, _Sparsify(dim, step_size, sparsity)),
                ]
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
    """Images [B, channels, S, S] → logits, as the released code computes them.

    Args:
        image_size, patch_size: S and the side of a patch, in pixels.
        num_classes, dim, depth, heads, dim_head, channels, pool: As `crate_fast.CRATE`'s.
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
