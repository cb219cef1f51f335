"""How close is close enough: STYLE's rule, against the float64 reference on the rounded inputs."""

import math

import torch
from torch import Tensor


def token_scale(n_tokens: int, dim: int) -> float:
    """Standard deviation at which tied attention is neither uniform nor the identity: sqrt(ln N / sqrt(D))."""
    return math.sqrt(max(math.log(n_tokens), 0.5) / math.sqrt(dim))


def _errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    difference = (actual.double() - truth.double()).abs()
    return difference.square().mean().sqrt().item(), difference.max().item()


def within_twice_eager(actual: Tensor, eager: Tensor, truth: Tensor, label: str) -> bool:
    """Whether rms and max error are at most twice those of same-dtype eager PyTorch, plus a few eps; prints both."""
    eps = torch.finfo(actual.dtype).eps
    slack = 4 * eps * truth.abs().double().square().mean().sqrt().item()
    max_slack = 4 * eps * truth.abs().max().item()
    rms, worst = _errors(actual, truth)
    eager_rms, eager_worst = _errors(eager, truth)
    print(f"{label}: rms {rms:.2e} (eager {eager_rms:.2e}), max {worst:.2e} (eager {eager_worst:.2e})")
    finite = bool(torch.isfinite(actual).all())
    return finite and rms <= 2 * eager_rms + slack and worst <= 2 * eager_worst + max_slack
