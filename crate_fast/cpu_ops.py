"""CPU operators: fp32 products with bias and ReLU, and tied attention on blocks of logits.

A PyTorch wheel contains MKL and oneDNN, and uses MKL for fp32 products. On some AMD processors MKL runs at half the
speed; on Intel it is the faster one (times are in docs/results/cpu.md). Unless `CRATE_FAST_ONEDNN` is set:

    processor                      forward, gradient of x   gradient of a weight, attention
    Intel, AMD before AVX-512      MKL                      MKL
    AMD Zen 4                      oneDNN                   MKL
    any other                      oneDNN                   oneDNN

Attention saves only w for backward:

* Forward is PyTorch's SDPA in fp32 with MKL. SDPA's backward pass is not used: it computes rowsum(P∘dP) as
  rowsum(O∘dO), whose rounding does not cancel against dP's. Its fp32 error was up to 2.9 times that of eager PyTorch.
* Up to 255 tokens, and in bf16: batched products over the heads of a few images.
* 256 to 1,024 tokens with MKL: one head at a time, with all its logits, in four products.
* Otherwise blocks of rows: of one head by oneDNN (on Zen 4 too), of all heads of an image by MKL.

ODL's gradients of weights use oneDNN wherever forward does.
"""

import functools
import platform
from collections.abc import Callable, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from crate_fast.backends import own_operators_fit, refuse_double_backward, without_autocast
from crate_fast.settings import onednn_wanted

_ONEDNN_BUILT = torch.backends.mkldnn.is_available()
ROW_BLOCK_ELEMENTS = 2**20  # logits of one head in memory, 4 MiB: they stay in the last-level cache
GROUP_ELEMENTS = {torch.float32: 2**18, torch.bfloat16: 2**20}  # logits of several heads in memory: 1, 2 MiB
MIN_ROWWISE_TOKENS = 256  # below, batched products over several whole heads are faster
MAX_WHOLE_TOKENS = 1024  # with MKL: all logits of one head, 4 MiB
MAX_HALF_TOKENS = 1024  # above, SDPA is as fast in bf16 and needs less memory


# --- which library ---


def _cpuinfo(field: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo; "" if there is none."""
    try:
        with open("/proc/cpuinfo") as lines:
            stated = (line.partition(":") for line in lines)
            return next((value.strip() for name, _, value in stated if name.strip() == field), "")
    except OSError:
        return ""


@functools.cache
def processor_vendor() -> str:
    """Return the processor's vendor ("GenuineIntel", "AuthenticAMD"); "" if unknown."""
    # Windows: "Intel64 Family 6 Model 85, GenuineIntel"
    return _cpuinfo("vendor_id") or platform.processor().rpartition(", ")[2]


def processor_family() -> int:
    """Return the processor's family (25: AMD's Zen 3 and 4); 0 if unknown."""
    found = _cpuinfo("cpu family") or platform.processor().partition("Family ")[2].partition(" ")[0]
    return int(found) if found.isdigit() else 0


def processor_name() -> str:
    """Return the processor's name, such as "AMD EPYC (family 25, model 1)"; else its architecture."""
    name, family = _cpuinfo("model name") or platform.processor() or platform.machine(), _cpuinfo("cpu family")
    return f"{name} (family {family}, model {_cpuinfo('model')})" if family else name


def multiplies_bf16() -> bool:
    """Return False if the processor is known to have no bf16 multiplication, so that fp32 is faster."""
    listed = f"{_cpuinfo('flags')} {_cpuinfo('Features')}".split()
    return not listed or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(listed)


@torch.compiler.assume_constant_result
def onednn_suits_processor() -> bool:
    """Return True if there is no MKL, or the processor is neither from Intel nor an AMD without AVX-512."""
    before_avx512 = torch.backends.cpu.get_cpu_capability() != "AVX512"
    suits_mkl = {"GenuineIntel": True, "AuthenticAMD": before_avx512}.get(processor_vendor(), False)
    return not (suits_mkl and torch.backends.mkl.is_available())


def uses_onednn() -> bool:
    """Return True if fp32 products use oneDNN, by `CRATE_FAST_ONEDNN` or else by `onednn_suits_processor`."""
    wanted = onednn_wanted()
    return _ONEDNN_BUILT and (onednn_suits_processor() if wanted is None else wanted)


@functools.cache
def mkl_is_slow() -> bool:
    """Return True if MKL takes twice oneDNN's time: on all processors except Intel's and AMD's before Zen 5.

    On AMD, MKL uses 256-bit vectors; Zen 5 (family 26) has 512-bit units. The choice is not measured, so that a
    resumed run sums in the same order.
    """
    fast = {"GenuineIntel": True, "AuthenticAMD": 0 < processor_family() < 26}
    return not (torch.backends.mkl.is_available() and fast.get(processor_vendor(), False))


def uses_onednn_alone() -> bool:
    """Return True if gradients of weights and attention use oneDNN too: if requested, or if MKL is slow."""
    return uses_onednn() and (onednn_wanted() or mkl_is_slow())


def _serves_one(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return True if `cpu_linear` supports these: fp32 on the CPU, without autocast and transforms."""
    suitable = _serves_one(x) and _serves_one(weight) and (bias is None or _serves_one(bias))
    return suitable and not torch.is_autocast_enabled("cpu") and own_operators_fit()


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weightᵀ + bias by oneDNN; x [M, K], weight [N, K], each contiguous or transposed contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """Copy `matrix` unless it or its transpose is contiguous: for other strides oneDNN runs a slow reference."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """Return x @ weightᵀ + bias + `add` by oneDNN or MKL; a transposed x means the gradient of a weight."""
    suits = uses_onednn() and (x.is_contiguous() or uses_onednn_alone())
    if suits and x.numel() > 0 and weight.numel() > 0:
        bias = None if bias is None else bias.contiguous()  # oneDNN ignores its strides
        if add is None:
            return onednn_product(_dense(x), _dense(weight), bias)
        return torch.ops.mkldnn._linear_pointwise.binary(_dense(x), add, _dense(weight), bias, "add")
    y = torch.mm(x, weight.t()) if add is None else torch.addmm(add, x, weight.t())
    return y if bias is None else y.add_(bias)  # addmm would write the bias to every row and read it again


def _needs_operator(*inputs: Tensor | None) -> bool:
    """Return True if a call must be a custom operator, which costs 0.1 ms: for autograd, compilation and modes.

    A dispatch mode, such as `FlopCounterMode`, does not know all operators inside ours.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, residual: bool = False) -> Tensor:
    """Compute `cpu_linear`; call the operator only if autograd, compilation or a dispatch mode needs it."""
    return (cpu_linear if _needs_operator(x, weight, bias) else _affine)(x, weight, bias, relu, residual)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, residual: bool = False) -> Tensor:
    """Compute y = x Wᵀ + b [M, N], contiguous, of x [M, K], W [N, K] and b [N] or None.

    With `residual` x is added (N = K); adding the identity to W instead has seven times the rounding error in ISTA.
    With `relu` negative values become 0, and NaN stays NaN (oneDNN's own ReLU returns 0).
    """
    y = product(x, weight, bias)
    if residual:
        y.add_(x)
    return y.relu_() if relu else y


cpu_linear = torch.library.custom_op("crate_fast::cpu_linear", _affine, mutates_args=(), device_types="cpu")


@cpu_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, residual: bool = False) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.crate_fast.cpu_linear)
def _linear_flops(x: torch.Size, weight: torch.Size, *_, **__) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _linear_setup(ctx, inputs, output):
    x, weight, _, relu, ctx.residual = inputs
    ctx.save_for_backward(x, weight, output if relu else None)


def _linear_backward(ctx, grad):
    x, weight, y = ctx.saved_tensors
    grad = grad.contiguous()
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_x = affine(grad, weight.t(), None, residual=ctx.residual) if needs_x else None
    grad_weight = affine(grad.t(), x.t(), None) if needs_weight else None
    grad_bias = grad.sum(0) if needs_bias else None
    return grad_x, grad_weight, grad_bias, None, None


cpu_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.fx.wrap
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear`; fp32 on the CPU uses oneDNN where it is faster.

    It is a leaf in `torch.fx` graphs. TorchScript runs PyTorch's function.
    """
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    else:
        served = x.dim() >= 1 and serves(x, weight, bias) and uses_onednn()
        if served and x.shape[-1] == weight.shape[-1]:  # else PyTorch's error names the shapes
            return affine(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
        return F.linear(x, weight, bias)


# --- attention ---


def serves_attention(w: Tensor) -> bool:
    """Return True if `cpu_subspace_attention` supports w [B, N, H, D]: fp32, or bf16 of limited N, on the CPU."""
    if w.device.type != "cpu" or not own_operators_fit():
        return False
    return w.dtype == torch.float32 or products_suit(w.transpose(1, 2))


def products_suit(tokens: Tensor) -> bool:
    """Return True if single products are faster than SDPA for tokens [B, H, N, D]: bf16 on the CPU."""
    return tokens.device.type == "cpu" and tokens.dtype == torch.bfloat16 and tokens.shape[2] <= MAX_HALF_TOKENS


def _is_long(w: Tensor) -> bool:
    """Return True if each head is so large that it is computed separately, or in blocks of rows."""
    return w.dtype == torch.float32 and w.shape[1] >= MIN_ROWWISE_TOKENS


def attention(w: Tensor, scale: float) -> Tensor:
    """Compute `cpu_subspace_attention`, as `affine` does."""
    return (cpu_subspace_attention if _needs_operator(w) else _attention_forward)(w, scale)


def _attention_forward(w: Tensor, scale: float) -> Tensor:
    """Return O = softmax(s·W Wᵀ) W for w [B, N, H, D]."""
    with without_autocast("cpu"):
        if w.dtype == torch.float32 and not uses_onednn_alone():
            tokens = w.transpose(1, 2)
            out = F.scaled_dot_product_attention(tokens, tokens, tokens, scale=scale)
            return out.transpose(1, 2).contiguous()
        if _is_long(w):
            return _in_parts(_one_head_forward, True, scale, w)
        return _in_parts(_whole_heads_forward, False, scale, w)


cpu_subspace_attention = torch.library.custom_op(
    "crate_fast::cpu_subspace_attention", _attention_forward, mutates_args=(), device_types="cpu"
)


@cpu_subspace_attention.register_fake
def _(w: Tensor, scale: float) -> Tensor:
    return w.new_empty(w.shape)


@torch.library.custom_op("crate_fast::cpu_subspace_attention_backward", mutates_args=(), device_types="cpu")
def cpu_subspace_attention_backward(grad: Tensor, w: Tensor, scale: float) -> Tensor:
    """Return dW = Pᵀ dO + s·(dL + dLᵀ) W with dL = P∘(dO Wᵀ − rowsum(P∘dO Wᵀ)); shapes as w [B, N, H, D].

    P is recomputed in blocks of logits, so the memory between the passes does not grow with N².
    """
    with without_autocast("cpu"):
        if not _is_long(w):
            return _in_parts(_whole_heads_backward, False, scale, w, grad)
        if w.shape[1] <= MAX_WHOLE_TOKENS and not uses_onednn_alone():
            return _in_parts(_whole_heads_backward, True, scale, w, grad)
        if uses_onednn():
            return _in_parts(_one_head_backward, True, scale, w, grad)
        return _in_parts(_row_blocks_backward, False, scale, w, grad)


@cpu_subspace_attention_backward.register_fake
def _(grad: Tensor, w: Tensor, scale: float) -> Tensor:
    return w.new_empty(w.shape)


@register_flop_formula(torch.ops.crate_fast.cpu_subspace_attention)
def _attention_flops(w: torch.Size, *_, **__) -> int:
    batch, n_tokens, n_heads, width = w
    return 4 * batch * n_heads * n_tokens**2 * width  # two products


@register_flop_formula(torch.ops.crate_fast.cpu_subspace_attention_backward)
def _attention_backward_flops(grad: torch.Size, w: torch.Size, *_, **__) -> int:
    return 5 * _attention_flops(w) // 2  # five products, one recomputed, as PyTorch counts its own backward pass


def _attention_setup(ctx, inputs, output):
    w, ctx.scale = inputs
    ctx.save_for_backward(w)


def _attention_backward(ctx, grad):
    (w,) = ctx.saved_tensors
    return cpu_subspace_attention_backward(grad, w, ctx.scale), None


cpu_subspace_attention.register_autograd(_attention_backward, setup_context=_attention_setup)
refuse_double_backward(
    cpu_subspace_attention_backward, "use torch.func.grad or torch.func.hessian, which run PyTorch's operators"
)


# --- several heads at a time --------------------------------------------------------------------------------------


def _parts(tokens: Tensor, one_head: bool) -> Sequence[Tensor]:
    """Split [B, N, H, D] into heads, or into groups of images whose logits fit in a block."""
    n_images, n_tokens, n_heads, _ = tokens.shape
    if one_head:
        return [tokens[i : i + 1, :, h : h + 1] for i in range(n_images) for h in range(n_heads)]
    return tokens.split(max(1, GROUP_ELEMENTS[tokens.dtype] // (n_heads * n_tokens**2)))


def _in_parts(function: Callable[..., Tensor], one_head: bool, scale: float, *inputs: Tensor) -> Tensor:
    """Apply `function` to the heads [b·H, N, D] of each part of the inputs, and return the results [B, N, H, D].

    The buffers hold blocks of logits. All parts reuse them, because new memory would cost more than the arithmetic.
    """
    out, buffers = inputs[0].new_empty(inputs[0].shape), {}
    for out_part, *parts in zip(*(_parts(tensor, one_head) for tensor in (out, *inputs)), strict=True):
        heads = map(_heads, parts)
        found = function(*(head.contiguous() for head in heads) if one_head else heads, scale, buffers)
        out_part.transpose(1, 2).copy_(found.unflatten(0, (len(out_part), out_part.shape[2])))
    return out


def _block(buffers: dict[str, Tensor], name: str, rows: Tensor, tokens: Tensor) -> Tensor:
    """Return a buffer as [b·H, rows, N], contiguous: softmax with `out` can be wrong for other strides."""
    shape = torch.Size((len(rows), rows.shape[1], tokens.shape[1]))
    if name not in buffers:  # no later block is larger than the first
        buffers[name] = tokens.new_empty(shape.numel())
    return buffers[name][: shape.numel()].view(shape)


def _heads(images: Tensor) -> Tensor:
    """Convert [b, N, H, D] to [b·H, N, D]."""
    return images.transpose(1, 2).flatten(0, 1)


def _attention(rows: Tensor, tokens: Tensor, scale: float, buffers: dict[str, Tensor]) -> Tensor:
    """Return rows of P [b·H, rows, N] of several heads."""
    block = _block(buffers, "P", rows, tokens)
    block.baddbmm_(rows, tokens.transpose(1, 2), beta=0, alpha=scale)
    return torch.softmax(block, -1, out=block)


def _grad_logits(attention: Tensor, grads: Tensor, tokens: Tensor, buffers: dict[str, Tensor]) -> Tensor:
    """Return dL [b·H, rows, N] for the rows of `attention` and `grads`."""
    block = _block(buffers, "dL", grads, tokens)
    torch.bmm(grads, tokens.transpose(1, 2), out=block)
    return torch._softmax_backward_data(block, attention, -1, attention.dtype, grad_input=block)


def _whole_heads_forward(tokens: Tensor, scale: float, buffers: dict[str, Tensor]) -> Tensor:
    """Return O [b·H, N, D] of several heads."""
    return torch.bmm(_attention(tokens, tokens, scale, buffers), tokens)


def _whole_heads_backward(tokens: Tensor, grads: Tensor, scale: float, buffers: dict[str, Tensor]) -> Tensor:
    """Return dW [b·H, N, D] of several heads, in four products: dL + dLᵀ is computed before the product with W.

    In bf16 a fifth product replaces this sum, which takes longer (three times as long for 785 tokens).
    """
    attention = _attention(tokens, tokens, scale, buffers)
    grad_logits = _grad_logits(attention, grads, tokens, buffers)
    out = torch.bmm(attention.transpose(1, 2), grads)
    if tokens.dtype == torch.bfloat16:
        return out.baddbmm_(grad_logits, tokens, alpha=scale).baddbmm_(grad_logits.mT, tokens, alpha=scale)
    symmetric = _block(buffers, "dL + dLᵀ", tokens, tokens)
    torch.add(grad_logits, grad_logits.mT, out=symmetric)
    return out.baddbmm_(symmetric, tokens, alpha=scale)


def _row_blocks_backward(tokens: Tensor, grads: Tensor, scale: float, buffers: dict[str, Tensor]) -> Tensor:
    """Return dW [b·H, N, D] of several heads in five products, in blocks of rows; each adds to dW in place."""
    out = torch.zeros_like(tokens)
    n_rows = max(64, GROUP_ELEMENTS[tokens.dtype] // (len(tokens) * tokens.shape[1]))
    blocks = (heads.split(n_rows, dim=1) for heads in (tokens, grads, out))
    for rows, grad_rows, out_rows in zip(*blocks, strict=True):
        attention = _attention(rows, tokens, scale, buffers)
        grad_logits = _grad_logits(attention, grad_rows, tokens, buffers)
        out.baddbmm_(attention.transpose(1, 2), grad_rows)
        out.baddbmm_(grad_logits.transpose(1, 2), rows, alpha=scale)
        out_rows.baddbmm_(grad_logits, tokens, alpha=scale)
    return out


# --- one head at a time -------------------------------------------------------------------------------------------


def _row_blocks(n_tokens: int) -> list[slice]:
    rows = max(64, ROW_BLOCK_ELEMENTS // n_tokens)
    return [slice(start, min(start + rows, n_tokens)) for start in range(0, n_tokens, rows)]


def _one_head_forward(heads: Tensor, scale: float, _buffers: dict) -> Tensor:
    """Return O [1, N, D] of one head."""
    (tokens,), out = heads, torch.empty_like(heads)
    for rows in _row_blocks(len(tokens)):
        attention = onednn_product(tokens[rows] * scale, tokens).softmax(-1)
        out[0, rows] = onednn_product(attention, tokens.t())
    return out


def _one_head_backward(heads: Tensor, grad_heads: Tensor, scale: float, _buffers: dict) -> Tensor:
    """Return dW [1, N, D] of one head.

    Contributions of a row block to all tokens are summed transposed, [D, N]: oneDNN then reads P and dL in place.
    """
    (tokens,), (grads,) = heads, grad_heads
    out = torch.empty_like(tokens)
    from_rows = tokens.new_zeros(tokens.shape[1], tokens.shape[0])
    for rows in _row_blocks(len(tokens)):
        scaled, grad_rows = tokens[rows] * scale, grads[rows]
        attention = onednn_product(scaled, tokens).softmax(-1)
        grad_attention = onednn_product(grad_rows, tokens)
        grad_logits = torch._softmax_backward_data(grad_attention, attention, -1, torch.float32)
        from_rows += onednn_product(scaled.t().contiguous(), grad_logits.t())
        from_rows += onednn_product(grad_rows.t().contiguous(), attention.t())
        out[rows] = onednn_product(grad_logits, tokens.t())
    return out.mul_(scale).add_(from_rows.t())[None]
