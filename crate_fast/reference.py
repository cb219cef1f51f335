"""The paper's equations in plain PyTorch: the oracle for all faster implementations.

Tokens are rows (the paper writes them as columns): x is [..., N, C]. No fusion, no algebra, any dtype and device;
autograd comes from PyTorch. "Paper" is *Emergence of Segmentation with Minimalistic White-Box Transformers*.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def subspace_attention_reference(w: Tensor, scale: float | None = None) -> Tensor:
    """Compute tied attention in each subspace: O = softmax(s·W Wᵀ) W, per head (paper, Eq. 5 and Algorithm 2).

    w and O are [B, N, H, D]; s is D^-1/2 if None, as in `functional.subspace_attention`.
    """
    scale = w.shape[-1] ** -0.5 if scale is None else scale
    w = w.transpose(1, 2)
    logits = scale * (w @ w.transpose(-1, -2))
    return (logits.softmax(dim=-1) @ w).transpose(1, 2)


def mssa_reference(
    x: Tensor, projection: Tensor, out_weight: Tensor | None, out_bias: Tensor | None, heads: int
) -> Tensor:
    """Compute subspace self-attention of normalised tokens x [B, N, C] in the released form (paper, Algorithm 2).

    `projection` holds the bases of the subspaces as a Linear weight [H·D, C] (head h has the rows h·D … (h+1)·D).
    The output projection has a weight [C, H·D] and a bias [C] or None; it is the identity if `out_weight` is None.
    """
    w = F.linear(x, projection).unflatten(-1, (heads, -1))
    out = subspace_attention_reference(w).flatten(-2)
    return out if out_weight is None else F.linear(out, out_weight, out_bias)


def ista_reference(
    x: Tensor, dictionary: Tensor, step_size: float = 0.1, sparsity: float = 0.1, threshold: str = "relu"
) -> Tensor:
    """Compute one proximal gradient step on ½|x − z Dᵀ|² + λ|z|₁ from z = x (paper, Eq. 7 and Algorithm 2).

    u = x + η(x − x Dᵀ) D, then relu(u − ηλ) ("relu": non-negative codes) or sign(u)·max(|u| − ηλ, 0) ("soft").
    Arguments and result are those of `functional.ista`.
    """
    decoded = F.linear(x, dictionary)
    u = x + step_size * (F.linear(x, dictionary.t()) - F.linear(decoded, dictionary.t()))
    if threshold == "relu":
        return F.relu(u - step_size * sparsity)
    return u.sign() * F.relu(u.abs() - step_size * sparsity)


def norm_ista_reference(
    x: Tensor, weight: Tensor, bias: Tensor, dictionary: Tensor, *ista, eps: float = 1e-5, **options
) -> Tensor:
    """Compute ISTA(LN(x)) of tokens x [..., C]: `functional.ista` with `norm` = (weight, bias, eps)."""
    return ista_reference(F.layer_norm(x, x.shape[-1:], weight, bias, eps), dictionary, *ista, **options)


def odl_reference(
    x: Tensor, dictionary: Tensor, decoder: Tensor, step_size: float = 0.1, sparsity: float = 0.1, steps: int = 2
) -> Tensor:
    """Compute the sparse-coding block of CRATE-α without its LayerNorm and residual.

    `steps` proximal gradient steps on ½|x − z Dᵀ|² + λ|z|₁ over z ≥ 0, from z = 0, then z D₁ᵀ (Yang et al., *Scaling
    White-Box Transformers for Vision*, 2024). Arguments and result are those of `odl.odl`.
    """
    z = x.new_zeros(*x.shape[:-1], dictionary.shape[1])
    for _ in range(steps):
        z = F.relu(z + step_size * ((x - z @ dictionary.t()) @ dictionary) - step_size * sparsity)
    return z @ decoder.t()


def compress_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    heads: int,
    *,
    residual: str = "released",
    eps: float = 1e-5,
) -> Tensor:
    """Compute a layer's first half: h = x + MSSA(LN x), or for "paper" h = LN x + MSSA(LN x) (Algorithms 1 and 3).

    Arguments and result are those of `functional.compress`; without an output projection if `out_weight` is None.
    """
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    attended = mssa_reference(normed, projection, out_weight, out_bias, heads)
    return attended + (x if residual == "released" else normed)


def layer_reference(
    x: Tensor, weights: dict[str, Tensor], heads: int, *, residual: str = "released", eps: float = 1e-5, **ista
) -> Tensor:
    """Run one CRATE layer on tokens x [B, N, C]: `compress_reference`, then `norm_ista_reference` with **ista.

    `weights` are the layer's tensors under their released names (`0.norm.weight`, `0.fn.qkv.weight`,
    `0.fn.to_out.0.weight`, …, `1.fn.weight`).
    """
    names = ("0.norm.weight", "0.norm.bias", "0.fn.qkv.weight", "0.fn.to_out.0.weight", "0.fn.to_out.0.bias")
    h = compress_reference(x, *map(weights.get, names), heads, residual=residual, eps=eps)
    return norm_ista_reference(
        h, weights["1.norm.weight"], weights["1.norm.bias"], weights["1.fn.weight"], eps=eps, **ista
    )


def coding_rate_reference(w: Tensor, epsilon: float = 0.01) -> Tensor:
    """Return R^c of the tokens per image [B], in nats, in the N×N form: Σ_h ½·logdet(I + D/(Nε)·Ŵ_h Ŵ_hᵀ).

    Ŵ are the subspace tokens w [B, N, H, D], each scaled to unit length; ε is the quantisation precision.
    """
    n_tokens, dim = w.shape[1], w.shape[-1]
    unit = F.normalize(w, dim=-1).transpose(1, 2)
    gram = unit @ unit.transpose(-1, -2)
    eye = torch.eye(n_tokens, dtype=w.dtype, device=w.device)
    return 0.5 * torch.logdet(eye + dim / (n_tokens * epsilon) * gram).sum(dim=1)
