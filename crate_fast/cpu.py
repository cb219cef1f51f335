"""The CPU path: oneDNN's matrix products in fp32, and tied attention a block of logits at a time.

PyTorch sends fp32 products to MKL; oneDNN, in the same wheel, was twice as fast on the two-core AMD EPYC measured
(470 against 220 GFLOP/s, docs/results/cpu.md). Both operators are opaque to `torch.compile`. The gradient of the
attention's gradient is an error; SDPA, which has one, runs with `CRATE_FAST_ONEDNN=0` or in float64.

That variable turns this file off.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_fast.double_backward import refuse_double_backward
from crate_fast.settings import onednn_wanted

__all__ = ["cpu_linear", "cpu_subspace_attention", "linear", "serves", "serves_attention"]

_ONEDNN_BUILT = torch.backends.mkldnn.is_available()
ROW_BLOCK_ELEMENTS = 2**20  # logits of one head kept at once, 4 MiB: they stay in the last-level cache
GROUP_ELEMENTS = 2**18  # logits of several heads kept at once, 1 MiB in fp32
MIN_ROWWISE_TOKENS = 256  # below, batched products over several heads are faster
MAX_HALF_TOKENS = 1024  # beyond, SDPA is as fast in bf16, and does not keep an image's logits whole


def _serves_one(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `cpu_linear` takes these: fp32 on the CPU, and no autocast under way."""
    suitable = _serves_one(x) and _serves_one(weight) and (bias is None or _serves_one(bias))
    return suitable and onednn_wanted() and _ONEDNN_BUILT and not torch.is_autocast_enabled("cpu")


def serves_attention(w: Tensor) -> bool:
    """Whether `cpu_subspace_attention` takes w [B, N, H, D]: fp32, or bf16 of moderate length, on the CPU."""
    if w.device.type != "cpu" or not onednn_wanted() or not _ONEDNN_BUILT:
        return False
    return w.dtype == torch.float32 or (w.dtype == torch.bfloat16 and w.shape[1] <= MAX_HALF_TOKENS)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias through oneDNN; x [M, K], weight [N, K], each dense or the transpose of a dense one."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """`matrix` itself where it or its transpose is contiguous, else a copy: other strides run a slow reference."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


@torch.library.custom_op("crate_fast::cpu_linear", mutates_args=(), device_types="cpu")
def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """y = x Wᵀ + b, behind max(·, 0) if `relu`; NaN stays NaN (oneDNN's own ReLU makes it 0).

    Args:
        x: [M, K].
        weight: W [N, K].
        bias: b [N] or None.
        relu: Whether to apply the ReLU.

    Returns:
        y [M, N], contiguous.
    """
    if x.numel() == 0 or weight.numel() == 0:
        y = F.linear(x, weight, bias)
        return y.relu_() if relu else y
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were
    y = _product(_dense(x), _dense(weight), bias)
    return y.relu_() if relu else y


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, through oneDNN for fp32 on the CPU.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        x weightᵀ + bias [..., N].
    """
    if serves(x, weight, bias) and x.dim() >= 1:
        return cpu_linear(x.reshape(-1, x.shape[-1]), weight, bias, False).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _by_rows(w: Tensor) -> bool:
    """Whether a head is large enough to be worth oneDNN's calls, which take one matrix at a time."""
    return w.dtype == torch.float32 and w.shape[1] >= MIN_ROWWISE_TOKENS


def _row_blocks(n_tokens: int) -> list[slice]:
    rows = max(64, ROW_BLOCK_ELEMENTS // n_tokens)
    return [slice(start, min(start + rows, n_tokens)) for start in range(0, n_tokens, rows)]


def _image_groups(tokens: Tensor) -> tuple[Tensor, ...]:
    """[B, N, H, D] → groups of images whose logits fit in a block."""
    _, n_tokens, n_heads, _ = tokens.shape
    return tokens.split(max(1, GROUP_ELEMENTS // (n_heads * n_tokens**2)))


def _heads(images: Tensor) -> Tensor:
    """[b, N, H, D] → [b·H, N, D], contiguous."""
    return images.transpose(1, 2).flatten(0, 1)


def _store(heads: Tensor, images: Tensor) -> None:
    """[b·H, N, D] into [b, N, H, D]."""
    images.transpose(1, 2).copy_(heads.unflatten(0, (images.shape[0], images.shape[2])))


@torch.library.custom_op("crate_fast::cpu_subspace_attention", mutates_args=(), device_types="cpu")
def cpu_subspace_attention(w: Tensor, scale: float) -> Tensor:
    """O = softmax(s·W Wᵀ) W for w [B, N, H, D], a block of logits at a time; w is all that backward needs.

    Short sequences: all heads of a few images at once, as batched products. Long ones: one head and a block of rows.
    """
    out = w.new_empty(w.shape)
    with torch.autocast("cpu", enabled=False):
        if _by_rows(w):
            for image, head in itertools.product(range(w.shape[0]), range(w.shape[2])):
                _rowwise_forward(w[image, :, head].contiguous(), scale, out[image, :, head])
        else:
            logits = _logits_buffer(w)
            for images, out_images in zip(_image_groups(w), _image_groups(out), strict=True):
                tokens = _heads(images)
                attention = _attention(tokens, scale, logits[: len(tokens)])
                _store(torch.bmm(attention, tokens), out_images)
    return out


@cpu_subspace_attention.register_fake
def _(w: Tensor, scale: float) -> Tensor:
    return w.new_empty(w.shape)


@torch.library.custom_op("crate_fast::cpu_subspace_attention_backward", mutates_args=(), device_types="cpu")
def cpu_subspace_attention_backward(grad: Tensor, w: Tensor, scale: float) -> Tensor:
    """dW = Pᵀ dO + s·(dL + dLᵀ) W with dL = P∘(dO Wᵀ − rowsum(P∘dO Wᵀ)); shapes as w [B, N, H, D].

    P is computed again, a block of logits at a time, so what is kept between the passes does not grow with N².
    """
    out = w.new_empty(w.shape)
    with torch.autocast("cpu", enabled=False):
        if _by_rows(w):
            for image, head in itertools.product(range(w.shape[0]), range(w.shape[2])):
                tokens, grads = w[image, :, head].contiguous(), grad[image, :, head].contiguous()
                out[image, :, head] = _rowwise_backward(tokens, grads, scale)
        else:
            buffers = [_logits_buffer(w) for _ in range(3)]
            for images, grad_images, out_images in zip(*map(_image_groups, (w, grad, out)), strict=True):
                _store(_batched_backward(_heads(images), _heads(grad_images), scale, buffers), out_images)
    return out


def _rowwise_forward(tokens: Tensor, scale: float, out: Tensor) -> None:
    """One head's O [N, D] into `out`."""
    for rows in _row_blocks(len(tokens)):
        attention = _product(tokens[rows] * scale, tokens).softmax(-1)
        out[rows] = _product(attention, tokens.t())


def _rowwise_backward(tokens: Tensor, grads: Tensor, scale: float) -> Tensor:
    """One head's dW [N, D]. What a block of rows gives to all tokens is summed transposed, [D, N]: oneDNN takes the
    blocks of P and dL as they lie that way."""
    out = torch.empty_like(tokens)
    from_rows = tokens.new_zeros(tokens.shape[1], tokens.shape[0])
    for rows in _row_blocks(len(tokens)):
        scaled, grad_rows = tokens[rows] * scale, grads[rows]
        attention = _product(scaled, tokens).softmax(-1)
        grad_attention = _product(grad_rows, tokens)
        grad_logits = torch._softmax_backward_data(grad_attention, attention, -1, torch.float32)
        from_rows += _product(scaled.t().contiguous(), grad_logits.t())
        from_rows += _product(grad_rows.t().contiguous(), attention.t())
        out[rows] = _product(grad_logits, tokens.t())
    return out.mul_(scale).add_(from_rows.t())


def _logits_buffer(w: Tensor) -> Tensor:
    """Room for a group's logits, written again for every group: fresh memory would cost more than the arithmetic."""
    largest = _image_groups(w)[0]
    return w.new_empty(largest.shape[0] * w.shape[2], w.shape[1], w.shape[1])


def _attention(tokens: Tensor, scale: float, buffer: Tensor) -> Tensor:
    """P [b·H, N, N] of several heads, in `buffer`."""
    torch.bmm(tokens * scale, tokens.transpose(1, 2), out=buffer)
    return torch.softmax(buffer, -1, out=buffer)


def _batched_backward(tokens: Tensor, grads: Tensor, scale: float, buffers: list[Tensor]) -> Tensor:
    """Several heads' dW [b·H, N, D], in four products: dL and its transpose are added before they meet W."""
    first, second, third = (buffer[: len(tokens)] for buffer in buffers)
    attention = _attention(tokens, scale, first)
    grad_attention = torch.bmm(grads, tokens.transpose(1, 2), out=second)
    grad_logits = torch._softmax_backward_data(grad_attention, attention, -1, attention.dtype, grad_input=second)
    symmetric = torch.add(grad_logits, grad_logits.transpose(1, 2), out=third)
    through_values = torch.bmm(attention.transpose(1, 2), grads)
    return torch.baddbmm(through_values, symmetric, tokens, alpha=scale)


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
refuse_double_backward(
    cpu_subspace_attention_backward, "use float64, or turn this path off (README, environment variables)"
)
