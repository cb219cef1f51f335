"""The CPU path in fp32: oneDNN's matrix products, and tied attention a block of rows at a time.

PyTorch sends fp32 products to MKL, which holds back its widest vectors on processors that are not Intel's; oneDNN,
in the same wheel, does not (measured on a two-core AMD EPYC: 470 against 220 GFLOP/s, docs/results/cpu.md). Both
operators are opaque to `torch.compile` and differentiable any number of times.

`CRATE_FAST_ONEDNN=0` turns this file off.
"""

import torch
from torch import Tensor

from crate_fast.settings import onednn_wanted

__all__ = ["cpu_linear", "cpu_subspace_attention", "serves", "serves_attention"]

ROW_BLOCK_ELEMENTS = 2**20  # logits kept at once per head, 4 MiB: they stay in the last-level cache
MIN_ATTENTION_TOKENS = 512  # below, SDPA is as fast (measured at N = 65, 197, 401, 785, 3601)


def serves(*tensors: Tensor | None) -> bool:
    """Whether every tensor given is one these operators take: fp32, strided, on the CPU, no autocast under way."""
    return (
        onednn_wanted()
        and all(
            t is None or (t.device.type == "cpu" and t.dtype == torch.float32 and t.layout == torch.strided)
            for t in tensors
        )
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def serves_attention(w: Tensor) -> bool:
    """Whether `cpu_subspace_attention` is the faster choice for w [B, N, H, D]."""
    return serves(w) and w.shape[1] >= MIN_ATTENTION_TOKENS


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """act(x @ weightᵀ + bias) through oneDNN; x [M, K], weight [N, K], each dense or the transpose of a dense one."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def _dense(matrix: Tensor) -> Tensor:
    """`matrix` itself where it or its transpose is contiguous, else a copy: other strides run a slow reference."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


@torch.library.custom_op("crate_fast::cpu_linear", mutates_args=(), device_types="cpu")
def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """y = x Wᵀ + b, with max(·, 0) in the same pass over memory if `relu`.

    Args:
        x: [M, K].
        weight: W [N, K].
        bias: b [N] or None.
        relu: Whether to apply the ReLU.

    Returns:
        y [M, N], contiguous.
    """
    if x.numel() == 0 or weight.numel() == 0:
        y = torch.nn.functional.linear(x, weight, bias)
        return y.relu_() if relu else y
    return _product(_dense(x), _dense(weight), bias, "relu" if relu else "none")


@cpu_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear_setup(ctx, inputs, output):
    x, weight, _, relu = inputs
    ctx.save_for_backward(x, weight, output if relu else None)


def _linear_backward(ctx, grad):
    x, weight, y = ctx.saved_tensors
    grad = grad.contiguous()
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_x = cpu_linear(grad, weight.t(), None, False) if needs_x else None
    grad_weight = cpu_linear(grad.t(), x.t(), None, False) if needs_weight else None
    grad_bias = grad.sum(0) if needs_bias else None
    return grad_x, grad_weight, grad_bias, None


cpu_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


def _heads(tokens: Tensor) -> Tensor:
    """[B, N, H, D] → [B·H, N, D], contiguous."""
    return tokens.transpose(1, 2).flatten(0, 1).contiguous()


def _row_blocks(n_tokens: int) -> list[slice]:
    rows = max(64, ROW_BLOCK_ELEMENTS // n_tokens)
    return [slice(start, min(start + rows, n_tokens)) for start in range(0, n_tokens, rows)]


@torch.library.custom_op("crate_fast::cpu_subspace_attention", mutates_args=(), device_types="cpu")
def cpu_subspace_attention(w: Tensor, scale: float) -> Tensor:
    """O = softmax(s·W Wᵀ) W for w [B, N, H, D], one head and one block of rows at a time; saves nothing but w."""
    batch, n_tokens, n_heads, dim = w.shape
    tokens = _heads(w)
    out = torch.empty_like(tokens)
    for head, out_head in zip(tokens, out, strict=True):
        for rows in _row_blocks(n_tokens):
            attention = _product(head[rows] * scale, head).softmax(-1)
            out_head[rows] = _product(attention, head.t())
    return out.view(batch, n_heads, n_tokens, dim).transpose(1, 2).contiguous()


@cpu_subspace_attention.register_fake
def _(w: Tensor, scale: float) -> Tensor:
    return w.new_empty(w.shape)


@torch.library.custom_op("crate_fast::cpu_subspace_attention_backward", mutates_args=(), device_types="cpu")
def cpu_subspace_attention_backward(grad: Tensor, w: Tensor, scale: float) -> Tensor:
    """dW = Pᵀ dO + s·(dL + dLᵀ) W with dL = P∘(dO Wᵀ − rowsum(P∘dO Wᵀ)); shapes as w [B, N, H, D].

    P is computed again, so memory does not grow with N². What a block of rows gives to all tokens is summed
    transposed, [D, N]: oneDNN takes the blocks P and dL as they lie that way.
    """
    batch, n_tokens, n_heads, dim = w.shape
    tokens, grads = _heads(w), _heads(grad)
    out = torch.empty_like(tokens)
    for head, grad_head, out_head in zip(tokens, grads, out, strict=True):
        from_rows = torch.zeros(dim, n_tokens)
        for rows in _row_blocks(n_tokens):
            scaled, grad_rows = head[rows] * scale, grad_head[rows]
            attention = _product(scaled, head).softmax(-1)
            grad_attention = _product(grad_rows, head)
            grad_logits = torch._softmax_backward_data(grad_attention, attention, -1, torch.float32)
            from_rows += _product(scaled.t().contiguous(), grad_logits.t())
            from_rows += _product(grad_rows.t().contiguous(), attention.t())
            out_head[rows] = _product(grad_logits, head.t())
        out_head.mul_(scale).add_(from_rows.t())
    return out.view(batch, n_heads, n_tokens, dim).transpose(1, 2).contiguous()


@cpu_subspace_attention_backward.register_fake
def _(grad: Tensor, w: Tensor, scale: float) -> Tensor:
    return w.new_empty(w.shape)


def _attention_setup(ctx, inputs, output):
    w, ctx.scale = inputs
    ctx.save_for_backward(w)


def _attention_backward(ctx, grad):
    (w,) = ctx.saved_tensors
    return cpu_subspace_attention_backward(grad, w, ctx.scale), None


cpu_subspace_attention.register_autograd(_attention_backward, setup_context=_attention_setup)
