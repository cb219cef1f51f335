"""fp32 products on the CPU: which library multiplies, and the operator with bias and ReLU behind the product.

PyTorch has two libraries in one wheel and sends fp32 products to MKL. On AMD's processors oneDNN was twice as fast;
on Intel's MKL is up to 1.7 times as fast, where the matrices have to be turned first (docs/results/cpu.md has both).
So the processor decides, unless `CRATE_FAST_ONEDNN` does: `uses_onednn`.
"""

import functools
import platform

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_fast.settings import onednn_wanted
from crate_fast.tracing import own_operators_fit

__all__ = [
    "cpu_linear",
    "linear",
    "onednn_product",
    "onednn_suits_processor",
    "processor_name",
    "processor_vendor",
    "serves",
    "uses_onednn",
]

_ONEDNN_BUILT = torch.backends.mkldnn.is_available()


@functools.cache
def processor_vendor() -> str:
    """What the processor calls its maker ("GenuineIntel", "AuthenticAMD"); "" where nothing says so."""
    try:
        return _cpuinfo("vendor_id")
    except OSError:
        return platform.processor().rpartition(", ")[2]  # Windows: "Intel64 Family 6 Model 85, GenuineIntel"


def processor_name() -> str:
    """The processor's name as far as the system tells it, such as "AMD EPYC 9654"; else its architecture."""
    try:
        return _cpuinfo("model name") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith(field)), "")


@torch.compiler.assume_constant_result
def onednn_suits_processor() -> bool:
    """Whether this is the processor for oneDNN: any but Intel's, where PyTorch has MKL."""
    return not (processor_vendor() == "GenuineIntel" and torch.backends.mkl.is_available())


def uses_onednn() -> bool:
    """Whether fp32 products go to oneDNN: as `CRATE_FAST_ONEDNN` says; unset, on every processor but Intel's."""
    wanted = onednn_wanted()
    return _ONEDNN_BUILT and (onednn_suits_processor() if wanted is None else wanted)


def _serves_one(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `cpu_linear` takes these: fp32 on the CPU, and neither autocast nor a transform under way."""
    suitable = _serves_one(x) and _serves_one(weight) and (bias is None or _serves_one(bias))
    return suitable and not torch.is_autocast_enabled("cpu") and own_operators_fit()


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias through oneDNN; x [M, K], weight [N, K], each dense or the transpose of a dense one."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """`matrix` itself where it or its transpose is contiguous, else a copy: other strides run a slow reference."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weightᵀ + bias by the library of the processor."""
    if uses_onednn() and x.numel() > 0 and weight.numel() > 0:
        bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were
        return onednn_product(_dense(x), _dense(weight), bias)
    y = torch.mm(x, weight.t())
    return y if bias is None else y.add_(bias)  # addmm would write the bias to every row and read it again


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
    y = _product(x, weight, bias)
    return y.relu_() if relu else y


@cpu_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.crate_fast.cpu_linear)
def _linear_flops(x: torch.Size, weight: torch.Size, *_, **__) -> int:
    return 2 * x[0] * x[1] * weight[0]


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


@torch.fx.wrap
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, through oneDNN for fp32 on the CPU where that is faster.

    A leaf of `torch.fx`'s graphs; in TorchScript PyTorch's.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        x weightᵀ + bias [..., N].
    """
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    else:
        if x.dim() >= 1 and serves(x, weight, bias) and uses_onednn():
            return cpu_linear(x.reshape(-1, x.shape[-1]), weight, bias, False).view(*x.shape[:-1], weight.shape[0])
        return F.linear(x, weight, bias)
