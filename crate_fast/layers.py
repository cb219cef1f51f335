"""Layers of CRATE and its ablations, with the module tree, names and hook points of the released code."""

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from crate_fast import functional
from crate_fast import odl as overcomplete
from crate_fast.backends import being_exported, being_transformed, resolve_backend

# Code that chooses an implementation by the values of its arguments is in wrapped functions: `torch.fx` records each
# call as one node, and TorchScript compiles the branch with PyTorch's own operators.


@torch.fx.wrap
def attend(w: Tensor, scale: float, dropout_p: float, backend: str) -> Tensor:
    """Call `functional.subspace_attention` as one node of a `torch.fx` graph."""
    if torch.jit.is_scripting():
        tokens = w.transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens, None, dropout_p, scale=scale).transpose(1, 2)
    else:
        return functional.subspace_attention(w, scale, dropout_p=dropout_p, backend=backend)


@torch.fx.wrap
def sparsify(
    x: Tensor, dictionary: Tensor, step_size: float, sparsity: float, threshold: str, backend: str
) -> Tensor:
    """Call `functional.ista` as one node of a `torch.fx` graph."""
    if torch.jit.is_scripting():
        u = x + step_size * F.linear(x - F.linear(x, dictionary), dictionary.t())
        shift = step_size * sparsity
        return F.relu(u - shift) if threshold == "relu" else F.softshrink(u, shift)
    else:
        return functional.ista(x, dictionary, step_size, sparsity, threshold=threshold, backend=backend)


@torch.fx.wrap
def sparsify_overcomplete(
    x: Tensor, dictionary: Tensor, decoder: Tensor, step_size: float, sparsity: float, steps: int, backend: str
) -> Tensor:
    """Call `odl.odl` as one node of a `torch.fx` graph."""
    if torch.jit.is_scripting():
        return functional.linear(overcomplete.odl_code(x, dictionary, step_size, sparsity, steps), decoder)
    else:
        return overcomplete.odl(x, dictionary, decoder, step_size, sparsity, steps=steps, backend=backend)


def patches_of(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images [B, channels, height, width] into patches [B, N, p·p·channels], in (row, column, channel) order."""
    patches = images.unflatten(3, (-1, patch_size[1])).unflatten(2, (-1, patch_size[0]))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Patches(nn.Module):
    """`patches_of` as a module."""

    def __init__(self, patch_size: tuple[int, int]):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Cut images into patches; the patch size must divide their sides."""
        return patches_of(images, self.patch_size)

    def extra_repr(self) -> str:
        """Return the patch's height and width, for `print(model)`."""
        return f"{self.patch_size[0]}×{self.patch_size[1]}"


class Linear(nn.Linear):
    """`torch.nn.Linear` computed by `functional.linear`; same parameters, and same values up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@torch.fx.wrap
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return LayerNorm(x) over the last dimension; in a transform, in the weight's dtype.

    PyTorch cannot differentiate a LayerNorm of half-precision input (from autocast) with fp32 weights there.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  (skipped by TorchScript)
        if being_transformed():
            x = x.to(weight.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class EmbeddingNorm(nn.LayerNorm):
    """LayerNorm after the patch projection: by default the only one with half-precision input under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class _Attention(nn.Module):
    _PROJECTIONS = 1

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        backend: str = "auto",
        *,
        proj_dropout: float | None = None,
        output_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.heads, self.dropout_p, self.backend = heads, float(dropout), backend
        self.dim_head, self.scale = dim_head, dim_head**-0.5
        inner, place = heads * dim_head, {"device": device, "dtype": dtype}
        self.qkv = Linear(dim, self._PROJECTIONS * inner, bias=self._PROJECTIONS > 1, **place)
        if heads == 1 and inner == dim:  # the released code has neither projection nor dropout here
            self.to_out = nn.Dropout(proj_dropout) if proj_dropout else nn.Identity()
        else:
            dropout = dropout if proj_dropout is None else proj_dropout
            self.to_out = nn.Sequential(Linear(inner, dim, output_bias, **place), nn.Dropout(float(dropout)))


class MSSA(_Attention):
    """Multi-head subspace self-attention (paper, Eq. 5): one projection per head is query, key and value.

    Args:
        dim: Token width C.
        heads: Number of heads H.
        dim_head: Subspace dimension D.
        dropout: Probability of dropping attention weights in training.
        backend: See `functional.subspace_attention`.
        proj_dropout: Probability of dropping outputs in training; `dropout` if None, as in the released code.
        output_bias: Add a bias to the output projection; CRATE-α has none.
        device, dtype: Device and dtype of the parameters.
    """

    def fuses(self, x: Tensor) -> bool:
        """Return True if `compress` can use the kernels for x: no active dropout, and no hook on a submodule."""
        if type(self.qkv) is not Linear or self.qkv.bias is not None:
            return False  # a replacement need not have a weight or a width
        if type(self.to_out) is not nn.Sequential or len(self.to_out) != 2:
            return False
        output, dropout = self.to_out
        if type(output) is not Linear or type(dropout) is not nn.Dropout:
            return False
        if resolve_backend(x, self.backend, self.dim_head) != "triton":
            return False
        if (self.training and self.dropout_p > 0) or (dropout.training and dropout.p > 0):  # the latter also alone
            return False
        return not any(map(_observed, (self.qkv, self.to_out, output, dropout)))

    def compress(self, x: Tensor, norm: nn.LayerNorm, residual: str = "released", sign: int = 1) -> Tensor:
        """Return x ± MSSA(norm(x)) [B, N, C], computed by one operator (`functional.compress`)."""
        output, bias = self.to_out[0].weight, self.to_out[0].bias
        bias = output.new_zeros(len(output)) if bias is None else bias
        if sign < 0:
            output, bias = -output, -bias
        weights = norm.weight, norm.bias, self.qkv.weight, output, bias
        options = {"eps": norm.eps, "residual": residual, "backend": self.backend}
        heads = len(self.qkv.weight) // self.dim_head  # fewer than `self.heads` if some were removed
        return functional.compress(x, *weights, heads, self.scale, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return MSSA(x) [B, N, C] of normalised x [B, N, C]."""
        w = self.qkv(x).unflatten(-1, (-1, self.dim_head))
        dropout_p = self.dropout_p if self.training else 0.0
        return self.to_out(attend(w, self.scale, dropout_p, self.backend).flatten(-2))


class MHSA(_Attention):
    """Multi-head self-attention with separate query, key and value, as in ViT: the ablation CRATE-MHSA.

    Arguments as `MSSA`; `backend` is ignored. `qkv` is [3·H·D, C] with a bias, in the order query, key, value, as in
    timm.
    """

    _PROJECTIONS = 3

    def forward(self, x: Tensor) -> Tensor:
        """Return MHSA(x) [B, N, C] of normalised x [B, N, C]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.dim_head)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout_p = self.dropout_p if self.training else 0.0
        out = functional.pytorch_attention(query, key, value, dropout_p, self.scale)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class ISTA(nn.Module):
    """Sparse-coding step in a learned dictionary (paper, Eq. 7), including its skip connection.

    Args:
        dim: Token width C; the dictionary `weight` is [C, C], Kaiming-uniform.
        step_size: η.
        sparsity: λ (`lambd` in the released code).
        threshold: "relu" or "soft".
        backend: See `functional.ista`.
        device, dtype: Device and dtype of the dictionary.
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
        self.step_size, self.lambd = float(step_size), float(sparsity)
        self.threshold, self.backend = threshold, backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the dictionary."""
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return sparse tokens [..., C] of normalised x [..., C]."""
        return sparsify(x, self.weight, self.step_size, self.lambd, self.threshold, self.backend)

    def after_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Return ISTA(norm(x)) [..., C], with the kernels by one operator."""
        constants, in_front = (self.step_size, self.lambd), (norm.weight, norm.bias, norm.eps)
        options = {"threshold": self.threshold, "backend": self.backend}
        return functional.ista(x, self.weight, *constants, norm=in_front, **options)

    def extra_repr(self) -> str:
        """Return the step's constants, for `print(model)`."""
        return f"dim={self.weight.shape[0]}, step_size={self.step_size}, sparsity={self.lambd}, {self.threshold}"


class ODL(nn.Module):
    """Sparse coding in an overcomplete dictionary, with a decoder (CRATE-α); see `crate_fast.odl`.

    Args:
        dim: Token width C; the parameters `D` and `D1` are [C, ratio·C], Kaiming-uniform.
        ratio: Number of atoms of the dictionary, as a multiple of C.
        step_size: η.
        sparsity: λ (`lmbda` in the released code).
        steps: Number of ISTA steps, 1 or 2.
        tied: Decode with D; there is no `D1`.
        backend: See `functional.ista`.
        device, dtype: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        ratio: int = 4,
        step_size: float = 0.1,
        sparsity: float = 0.1,
        steps: int = 2,
        tied: bool = False,
        backend: str = "auto",
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.D = nn.Parameter(torch.empty(dim, ratio * dim, device=device, dtype=dtype))
        self.D1 = None if tied else nn.Parameter(torch.empty(dim, ratio * dim, device=device, dtype=dtype))
        self.step_size, self.lambd, self.steps = float(step_size), float(sparsity), steps
        self.backend = backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the dictionaries."""
        for dictionary in self.parameters():
            nn.init.kaiming_uniform_(dictionary)

    def forward(self, x: Tensor) -> Tensor:
        """Return the decoded code [..., C] of normalised x [..., C]."""
        decoder = self.D if self.D1 is None else self.D1
        return sparsify_overcomplete(x, self.D, decoder, self.step_size, self.lambd, self.steps, self.backend)

    def after_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Return ODL(norm(x)) [..., C], computed by one operator."""
        decoder, in_front = self.D if self.D1 is None else self.D1, (norm.weight, norm.bias, norm.eps)
        constants = self.step_size, self.lambd
        return overcomplete.odl(x, self.D, decoder, *constants, steps=self.steps, norm=in_front, backend=self.backend)

    def code(self, x: Tensor) -> Tensor:
        """Return the sparse code [..., ratio·C] of normalised x [..., C]."""
        return overcomplete.odl_code(x, self.D, self.step_size, self.lambd, self.steps)

    def extra_repr(self) -> str:
        """Return sizes and constants, for `print(model)`."""
        dim, atoms = self.D.shape
        return f"dim={dim}, atoms={atoms}, step_size={self.step_size}, sparsity={self.lambd}, steps={self.steps}"


class Dictionary(nn.Module):
    """Product x · Dᵀ with a square dictionary D, Kaiming-uniform: the first step of a CRATE-MAE decoder layer."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the dictionary."""
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class MLP(nn.Sequential):
    """ViT's MLP (Linear, GELU, Linear): the ablation CRATE-MLP. The layer adds the skip connection."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0, *, device=None, dtype=None):
        super().__init__(
            Linear(dim, hidden_dim, device=device, dtype=dtype),
            nn.GELU(),
            nn.Dropout(float(dropout)),
            Linear(hidden_dim, dim, device=device, dtype=dtype),
            nn.Dropout(float(dropout)),
        )


def _observed(module: nn.Module) -> bool:
    """Return True if the module must be called: it has a hook, or its `forward` is replaced."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or _has_any_global_hook()


_FORWARDS = {kind: kind.forward for kind in (MSSA, ISTA, ODL)}  # a class may get another


def _fusible(norm: nn.Module, fn: nn.Module, x: Tensor) -> bool:
    """Return True if a LayerNorm and the module after it can run as one operator; False in `torch.fx` and export."""
    if isinstance(x, torch.fx.Proxy) or being_exported():
        return False
    if type(norm) is not nn.LayerNorm or type(fn) not in (MSSA, ISTA, ODL) or _observed(norm) or _observed(fn):
        return False
    if type(fn).forward is not _FORWARDS[type(fn)]:
        return False
    return norm.bias is not None and (type(fn) is not MSSA or fn.fuses(x))


class PreNorm(nn.Module):
    """LayerNorm followed by `fn`, with the released names `norm` and `fn`.

    Without hooks on the two modules, the kernels run LayerNorm and ISTA or ODL as one operator. `drop_path` holds the
    rate of stochastic depth; `Layer` applies it, because the result of a dropped step depends on the residual.
    """

    def __init__(
        self, dim: int, fn: nn.Module, drop_path: float = 0.0, *, eps: float = 1e-5, device=None, dtype=None
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps, device=device, dtype=dtype)
        self.fn = fn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (skipped by TorchScript)
            if type(self.fn) in (ISTA, ODL) and _fusible(self.norm, self.fn, x):
                return self.fn.after_norm(x, self.norm)
        return self.fn(self.norm(x))


class Layer(nn.Sequential):
    """CRATE layer, one step of the optimisation: compress (`layer[0]`), then sparsify (`layer[1]`).

    residual="released": h = x + attention(LN₁ x), as in the released code.
    residual="paper":    h = LN₁ x + attention(LN₁ x), as in the paper's Algorithms 1 and 3. `layer[0].norm` and
    `layer[0].fn` are then called separately, so a hook on `layer[0]` itself does not fire.
    The output is ISTA(LN₂ h); h + MLP(LN₂ h) in the ablation; h + ODL(LN₂ h) in CRATE-α.

    Stochastic depth (`drop_path` of the two parts) skips a step for a sample, whose tokens stay unchanged. As in
    timm, each step is drawn independently, and kept residual updates (released attention, MLP, ODL) are scaled by
    1 / (1 − rate). ISTA, and attention in the paper's form, replace the tokens and are not scaled.

    Args:
        attention: `PreNorm` around `MSSA` or `MHSA`.
        sparsifier: `PreNorm` around `ISTA`, `MLP` or `ODL`.
        residual: "released" or "paper".
        odl_residual: Add h to ODL's output.
    """

    def __init__(
        self, attention: PreNorm, sparsifier: PreNorm, residual: str = "released", odl_residual: bool = True
    ):
        super().__init__(attention, sparsifier)
        self.residual = residual
        self.skips_sparsifier = isinstance(sparsifier.fn, MLP) or (isinstance(sparsifier.fn, ODL) and odl_residual)
        self.drops_paths = isinstance(attention.drop_path, DropPath)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens [B, N, C] after this layer."""
        if self.training and self.drops_paths:
            return self._with_dropped_paths(x)
        h = self._compress(x)
        return h + self[1](h) if self.skips_sparsifier else self[1](h)

    def _compress(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (skipped by TorchScript)
            if not _observed(self[0]) and _fusible(self[0].norm, self[0].fn, x):
                return self[0].fn.compress(x, self[0].norm, self.residual)
        if self.residual == "released":
            return x + self[0](x)
        normed = self[0].norm(x)
        return normed + self[0].fn(normed)

    def _with_dropped_paths(self, x: Tensor) -> Tensor:
        # A step that replaces its input has no residual update to scale by 1 / (1 − rate), and scaling would make
        # ISTA's zeros non-zero. The draw only chooses between the new and the old tokens.
        if self.residual == "released":
            h = x + self[0].drop_path(self[0](x))
        else:
            new = self._compress(x)
            h = torch.where(self[0].drop_path(torch.ones_like(x[:, :1, :1])) > 0, new, x)
        if self.skips_sparsifier:
            return h + self[1].drop_path(self[1](h))
        sparse = self[1](h)
        return torch.where(self[1].drop_path(torch.ones_like(h[:, :1, :1])) > 0, sparse, h)


class DecoderLayer(nn.Sequential):
    """CRATE-MAE decoder layer: y = LN(x) · Dᵀ, then y − MSSA(LN y), the opposite of the encoder's compression.

    Args:
        decode: `PreNorm` around `Dictionary`.
        attention: `PreNorm` around `MSSA`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens [B, N, C] after this layer."""
        y = self[0](x)
        if not torch.jit.is_scripting():  # noqa: SIM102  (skipped by TorchScript)
            if not _observed(self[1]) and _fusible(self[1].norm, self[1].fn, y):
                return self[1].fn.compress(y, self[1].norm, sign=-1)
        return y - self[1](y)


class Transformer(nn.Module):
    """Stack of layers, with the released attributes `layers`, `heads`, `depth` and `dim`."""

    def __init__(self, layers: list[Layer], dim: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dim, self.heads = dim, heads
        self.grad_checkpointing = False

    @property
    def depth(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def forward(self, x: Tensor, taps: dict[int, Tensor] | None = None, last: int | None = None) -> Tensor:
        """Run the layers.

        Args:
            x: Tokens [B, N, C].
            taps: Its keys are layer indices; its values are set to the outputs of these layers.
            last: Index of the last layer to run; None for all layers.

        Returns:
            Tokens [B, N, C] after the last layer run.
        """
        if torch.jit.is_scripting():
            for layer in self.layers:
                x = layer(x)
            return x
        else:
            return self._run(x, taps, last)

    def _run(self, x: Tensor, taps: dict[int, Tensor] | None, last: int | None) -> Tensor:
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
