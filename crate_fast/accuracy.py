"""The allowed error of a kernel against float64, and inputs for which this rule detects wrong kernels.

The rule: rms and max error are at most twice those of eager PyTorch in the same dtype, plus 4 eps of the products.
Tests, probes, the self-check and the benchmarks use it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def token_scale(n_tokens: int, dim: int) -> float:
    """Return the deviation at which tied attention is neither uniform nor the identity: sqrt(ln N / sqrt(D))."""
    return math.sqrt(max(math.log(n_tokens), 0.5) / math.sqrt(dim))


def product_eps(dtype: torch.dtype) -> float:
    """Return the eps of products in a dtype: for fp32, TF32's 2^-10 if `torch.backends.cuda.matmul` allows TF32."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return 2.0**-10
    return torch.finfo(dtype).eps


def clear_of_threshold(
    grad: Tensor,
    x: Tensor,
    dictionary: Tensor,
    product: torch.dtype | None = None,
    step_size: float = 0.1,
    shift: float = 0.01,
    margin: float | None = None,
) -> Tensor:
    """Return `grad` with zeros where ISTA's argument is so near the threshold that rounding decides its output.

    `product` is the dtype of the product with D, x's if None. `margin` is the distance from the threshold that
    rounding may cover, 32 eps of the product if None.
    """
    tokens, wide = x.double(), dictionary.double()
    u = tokens + step_size * (tokens @ wide - tokens @ wide.t() @ wide)
    margin = 32 * product_eps(product or x.dtype) if margin is None else margin
    return torch.where((u.abs() - shift).abs() > margin, grad, 0.0)


def gradients(function: Callable[..., Tensor], inputs: Iterable[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the function's output and its gradient with respect to every input."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@dataclass(frozen=True)
class Judgement:
    """Errors against float64, each with its allowed value."""

    rms: float
    max: float
    allowed_rms: float
    allowed_max: float

    @property
    def share(self) -> float:
        """Return the larger of both errors relative to its allowed value; infinite if a result is not finite."""
        shares = [_share(self.rms, self.allowed_rms), _share(self.max, self.allowed_max)]
        return math.inf if any(math.isnan(share) for share in shares) else max(shares)

    @property
    def right(self) -> bool:
        """Return True if neither error exceeds its allowed value."""
        return self.share <= 1.0


def _share(error: float, allowed: float) -> float:
    if error == 0.0:
        return 0.0
    return error / allowed if allowed else math.inf


def error_numbers(actual: Tensor, eager: Tensor, truth: Tensor, eps: float | None = None) -> Tensor:
    """Return the four numbers of a `Judgement`, in float64 on the tensors' device, without synchronisation.

    `eps` is that of the products; `product_eps` of the result's dtype if None.
    """
    slack = 4 * (product_eps(actual.dtype) if eps is None else eps)
    truth = truth.double()

    def errors(result: Tensor) -> Tensor:
        return _rms_and_max(result.double() - truth)

    return torch.cat([errors(actual), 2 * errors(eager) + slack * _rms_and_max(truth)])


def _rms_and_max(values: Tensor) -> Tensor:
    return torch.stack([values.square().mean().sqrt(), values.abs().max()])


def judge(actual: Tensor, eager: Tensor, truth: Tensor) -> Judgement:
    """Return the errors of a result and of eager PyTorch in the same dtype, both against float64."""
    return Judgement(*error_numbers(actual, eager, truth).tolist())
