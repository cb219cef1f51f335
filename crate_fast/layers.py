"""The layers of CRATE and of its ablations, with the released code's module tree, names and hook points."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from crate_fast import functional
from crate_fast.backends import resolve_backend

__all__ = ["ISTA", "MHSA", "MLP", "MSSA", "DecoderLayer", "Dictionary", "Layer", "Linear", "PreNorm", "Transformer"]


class Linear(nn.Linear):
    """`torch.nn.Linear` through `functional.linear`; same parameters, same values to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class MSSA(nn.Module):
    """Multi-head subspace self-attention (paper, Eq. 5): one projection per head is query, key and value.

    Args:
        dim: Token width C.
        heads: H.
        dim_head: Subspace dimension D.
        dropout: Probability of dropping attention weights in training.
        backend: See `functional.subspace_attention`.
        proj_dropout: Probability of dropping outputs in training; `dropout` when None, as in the released code.
        device, dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        backend: str = "auto",
        *,
        proj_dropout: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.heads, self.dropout_p, self.backend = heads, dropout, backend
        self.scale = dim_head**-0.5
        inner = heads * dim_head
        self.qkv = Linear(dim, inner, bias=False, device=device, dtype=dtype)
        self.to_out = _output_map(inner, dim, heads, dropout, proj_dropout, device, dtype)

    def fuses(self, x: Tensor) -> bool:
        """Whether `compress` runs on the kernels for x: nothing is dropped, and nobody waits for a part's call."""
        if resolve_backend(x, self.backend, self.qkv.out_features // self.heads) != "triton":
            return False
        if not isinstance(self.to_out, nn.Sequential):
            return False
        if self.training and (self.dropout_p > 0 or self.to_out[1].p > 0):
            return False
        parts = (self.qkv, self.to_out, *self.to_out)
        return type(self.qkv) is type(self.to_out[0]) is Linear and not any(map(_observed, parts))

    def compress(self, x: Tensor, norm: nn.LayerNorm, residual: str = "released", sign: int = 1) -> Tensor:
        """x ± MSSA(norm(x)) [B, N, C] as one operator; see `functional.compress`."""
        output, bias = self.to_out[0].weight, self.to_out[0].bias
        if sign < 0:
            output, bias = -output, -bias
        return functional.compress(
            x,
            norm.weight,
            norm.bias,
            self.qkv.weight,
            output,
            bias,
            self.heads,
            self.scale,
            eps=norm.eps,
            residual=residual,
            backend=self.backend,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C], normalised → MSSA(x) [B, N, C]."""
        w = self.qkv(x).unflatten(-1, (self.heads, -1))
        dropout_p = self.dropout_p if self.training else 0.0
        out = functional.subspace_attention(w, self.scale, dropout_p=dropout_p, backend=self.backend)
        return self.to_out(out.flatten(-2))


class MHSA(nn.Module):
    """Multi-head self-attention with its own query, key and value, as in ViT: the ablation CRATE-MHSA.

    Same arguments as `MSSA`; `qkv` is [3·H·D, C] with a bias, ordered query, key, value, as timm's.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        backend: str = "auto",
        *,
        proj_dropout: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.heads, self.dropout_p = heads, dropout
        self.scale = dim_head**-0.5
        inner = heads * dim_head
        self.qkv = Linear(dim, 3 * inner, bias=True, device=device, dtype=dtype)
        self.to_out = _output_map(inner, dim, heads, dropout, proj_dropout, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C], normalised → MHSA(x) [B, N, C]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout_p = self.dropout_p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=self.scale)
        return self.to_out(out.transpose(1, 2).flatten(-2))


def _output_map(
    inner: int, dim: int, heads: int, dropout: float, proj_dropout: float | None, device, dtype
) -> nn.Module:
    if heads == 1 and inner == dim:  # the released code has no map here, and no dropout
        return nn.Dropout(proj_dropout) if proj_dropout else nn.Identity()
    dropout = dropout if proj_dropout is None else proj_dropout
    return nn.Sequential(Linear(inner, dim, device=device, dtype=dtype), nn.Dropout(dropout))


class ISTA(nn.Module):
    """One sparse-coding step against a learned dictionary (paper, Eq. 7); includes its own skip connection.

    Args:
        dim: Token width C; the dictionary `weight` is [C, C], Kaiming-uniform.
        step_size: η.
        sparsity: λ (`lambd` in the released code).
        threshold: "relu" or "soft".
        backend: See `functional.ista`.
        device, dtype: Of the dictionary.
    """

    def __init__(
        self,
        dim: int,
        step_size: float = 0.1,
        sparsity: float = 0.1,
        threshold: str = "relu",
        backend: str = "auto",
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        self.step_size, self.lambd, self.threshold, self.backend = step_size, sparsity, threshold, backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the dictionary anew."""
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C], normalised → sparse tokens [..., C]."""
        return functional.ista(
            x, self.weight, self.step_size, self.lambd, threshold=self.threshold, backend=self.backend
        )

    def fuses(self, x: Tensor) -> bool:
        """Whether `after_norm` runs on the kernels for x."""
        return resolve_backend(x, self.backend) == "triton"

    def after_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The step on norm(x), x [..., C], as one operator; what it keeps for backward: `functional.norm_ista`."""
        return functional.norm_ista(
            x,
            norm.weight,
            norm.bias,
            self.weight,
            self.step_size,
            self.lambd,
            eps=norm.eps,
            threshold=self.threshold,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The step's constants, for `print(model)`."""
        return f"dim={self.weight.shape[0]}, step_size={self.step_size}, sparsity={self.lambd}, {self.threshold}"


class Dictionary(nn.Module):
    """x · Dᵀ with a square dictionary D, Kaiming-uniform: what a CRATE-MAE decoder layer begins with."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] → [..., C]."""
        return functional.linear(x, self.weight)


class MLP(nn.Sequential):
    """ViT's MLP (Linear, GELU, Linear): the ablation CRATE-MLP. The layer adds the skip connection."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0, *, device=None, dtype=None):
        super().__init__(
            Linear(dim, hidden_dim, device=device, dtype=dtype),
            nn.GELU(),
            nn.Dropout(dropout),
            Linear(hidden_dim, dim, device=device, dtype=dtype),
            nn.Dropout(dropout),
        )


def _observed(module: nn.Module) -> bool:
    """Whether somebody waits for this module to be called: a hook, or a `forward` in place of its class's."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or _has_any_global_hook()


def _fusible(norm: nn.Module, fn: nn.Module, x: Tensor) -> bool:
    """Whether a LayerNorm and the MSSA or ISTA behind it run as one on x."""
    if type(norm) is not nn.LayerNorm or type(fn) not in (MSSA, ISTA) or norm.weight is None or norm.bias is None:
        return False
    return not _observed(norm) and not _observed(fn) and fn.fuses(x)


class PreNorm(nn.Module):
    """fn(LayerNorm(x)), with the released names `norm` and `fn`.

    A LayerNorm in front of ISTA is part of ISTA's operator where the kernels run and no hook waits for either module.
    `drop_path` holds the rate of stochastic depth; `Layer` applies it, since it knows what a dropped step leaves.
    """

    def __init__(self, dim: int, fn: nn.Module, drop_path: float = 0.0, *, device=None, dtype=None):
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.fn = fn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] → [..., C]."""
        norm, fn = self.norm, self.fn
        if type(fn) is ISTA and _fusible(norm, fn, x):
            return fn.after_norm(x, norm)
        return fn(norm(x))


def _where_kept(drop_path: nn.Module, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` for the samples whose path is kept, `old` for the others.

    A step that replaces its input has no residual update to scale by 1 / (1 − rate): scaled, ISTA's zeros would not
    stay zeros.
    """
    kept = drop_path(torch.ones_like(old[:, :1, :1])) > 0
    return torch.where(kept, new, old)


class Layer(nn.Sequential):
    """One step of the optimisation: compress (`layer[0]`), then sparsify (`layer[1]`).

    residual="released": h = x + attention(LN₁ x), as the released code.
    residual="paper":    h = LN₁ x + attention(LN₁ x), as the paper's Algorithms 1 and 3; here `layer[0].norm` and
    `layer[0].fn` are called one by one, so a hook on `layer[0]` itself does not fire.
    Then ISTA(LN₂ h), or h + MLP(LN₂ h) in the ablation.

    Stochastic depth (`drop_path` of the two parts) skips a step for a sample: its tokens pass unchanged. As in timm,
    each step draws for itself, and a residual update that is kept (attention in the released form, MLP) is scaled by
    1 / (1 − rate). ISTA, and attention in the paper's form, replace the tokens and are not scaled.

    Args:
        attention: `PreNorm` around `MSSA` or `MHSA`.
        sparsifier: `PreNorm` around `ISTA` or `MLP`.
        residual: "released" or "paper".
    """

    def __init__(self, attention: PreNorm, sparsifier: PreNorm, residual: str = "released"):
        super().__init__(attention, sparsifier)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] → the next layer's tokens [B, N, C]."""
        attention, sparsifier = self
        if self.training and isinstance(attention.drop_path, DropPath):
            return self._with_dropped_paths(x)
        if not _observed(attention) and _fusible(attention.norm, attention.fn, x):
            h = attention.fn.compress(x, attention.norm, self.residual)
        elif self.residual == "released":
            h = x + attention(x)
        else:
            normed = attention.norm(x)
            h = normed + attention.fn(normed)
        return h + sparsifier(h) if isinstance(sparsifier.fn, MLP) else sparsifier(h)

    def _with_dropped_paths(self, x: Tensor) -> Tensor:
        attention, sparsifier = self
        if self.residual == "released":
            h = x + attention.drop_path(attention(x))
        else:
            normed = attention.norm(x)
            h = _where_kept(attention.drop_path, normed + attention.fn(normed), x)
        if isinstance(sparsifier.fn, MLP):
            return h + sparsifier.drop_path(sparsifier(h))
        return _where_kept(sparsifier.drop_path, sparsifier(h), h)


class DecoderLayer(nn.Sequential):
    """A layer of the CRATE-MAE decoder: y = LN(x) · Dᵀ, then y − MSSA(LN y), against the encoder's compression.

    Args:
        decode: `PreNorm` around `Dictionary`.
        attention: `PreNorm` around `MSSA`.
    """

    def __init__(self, decode: PreNorm, attention: PreNorm):
        super().__init__(decode, attention)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] → [B, N, C]."""
        decode, attention = self
        y = decode(x)
        if not _observed(attention) and _fusible(attention.norm, attention.fn, y):
            return attention.fn.compress(y, attention.norm, sign=-1)
        return y - attention(y)


class Transformer(nn.Module):
    """The stack of layers, with the released attributes `layers`, `heads`, `depth` and `dim`."""

    def __init__(self, layers: list[Layer], dim: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dim, self.heads = dim, heads
        self.grad_checkpointing = False

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def forward(self, x: Tensor, taps: dict[int, Tensor] | None = None, last: int | None = None) -> Tensor:
        """Run the layers.

        Args:
            x: Tokens [B, N, C].
            taps: Filled with the output of each layer whose index is a key.
            last: Index of the last layer to run; all when None.

        Returns:
            Tokens [B, N, C] after the last layer run.
        """
        for index, layer in enumerate(self.layers):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
            if taps is not None and index in taps:
                taps[index] = x
            if index == last:
                break
        return x
