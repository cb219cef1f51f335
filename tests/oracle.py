"""How close is close enough: STYLE's rule, against the float64 reference on the rounded inputs."""

import importlib.util
import math
import sys
import unittest.mock
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def token_scale(n_tokens: int, dim: int, scale: float | None = None) -> float:
    """Standard deviation at which tied attention is neither uniform nor the identity: sqrt(ln N / (s·D)).

    With s = D^-1/2, the default, that is sqrt(ln N / sqrt(D)).
    """
    scale = dim**-0.5 if scale is None else scale
    return math.sqrt(max(math.log(n_tokens), 0.5) / (scale * dim))


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


def all_within_twice_eager(actual: Iterable, eager: Iterable, truth: Iterable, names: str) -> bool:
    """`within_twice_eager` for each of several tensors; all are judged, so that every error is printed."""
    rows = zip(actual, eager, truth, names.split(), strict=True)
    verdicts = [within_twice_eager(*row) for row in rows]
    return all(verdicts)


def gradients(function: Callable[..., Tensor], inputs: Iterable[Tensor], grad: Tensor) -> list[Tensor]:
    """The function's output and its gradient with respect to every input."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def agrees(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    names: str,
    grad: Tensor | None = None,
) -> bool:
    """Whether our output and gradients are within twice the error of the reference in the same dtype."""
    grad = torch.randn_like(reference(*inputs)) if grad is None else grad
    actual, eager = (gradients(function, inputs, grad) for function in (ours, reference))
    truth = gradients(reference, [tensor.double() for tensor in inputs], grad.double())
    return all_within_twice_eager(actual, eager, truth, names)


def philox_uniform(seed: int, n_tokens: int, n_heads: int) -> Tensor:
    """The uniform numbers behind attention dropout, [n_heads, N, N]: Philox4x32-10 with counter (i, j, head, 0).

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011); the first of the four words, to [0, 1) as
    Triton does it.
    """
    head, row, col = np.meshgrid(np.arange(n_heads), np.arange(n_tokens), np.arange(n_tokens), indexing="ij")
    word0, word1, word2 = (index.astype(np.uint64) for index in (row, col, head))
    word3 = np.zeros_like(word0)
    low = np.uint64(0xFFFFFFFF)
    key0, key1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        product0, product2 = np.uint64(0xD2511F53) * word0, np.uint64(0xCD9E8D57) * word2
        word0, word1, word2, word3 = (
            (product2 >> np.uint64(32)) ^ word1 ^ key0,
            product2 & low,
            (product0 >> np.uint64(32)) ^ word3 ^ key1,
            product0 & low,
        )
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & low, (key1 + np.uint64(0xBB67AE85)) & low
    signed = torch.from_numpy(word0.astype(np.uint32).view(np.int32).copy())
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10


def spread_tokens(shape: tuple[int, ...], spread: float, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """Subspace tokens [B, N, H, D] whose norms reach from 1/√spread to √spread times the usual, and a gradient."""
    w = torch.randn(shape)
    norm = token_scale(shape[1], shape[3]) * math.sqrt(shape[3])
    lengths = torch.logspace(-0.5, 0.5, shape[1], base=spread)[torch.randperm(shape[1])]
    w = w / w.norm(dim=-1, keepdim=True) * norm * lengths[:, None, None]
    return w.to(dtype).to(device), torch.randn(shape).to(dtype).to(device)


def mutant(module, mutation: Sequence[str], folder: Path, user=None):
    """A copy of a module in which one passage says something else; an error where it is not there just once.

    With `user`, a copy of that module which imports from the changed one instead.
    """
    source = Path(module.__file__).read_text()
    assert source.count(mutation[0]) == 1, f"{mutation[0]!r} is not in {module.__file__} once"
    path = folder / "mutant.py"
    path.write_text(source.replace(*mutation))
    changed = _load(path)
    if user is None:
        return changed
    path = folder / "user.py"
    path.write_text(Path(user.__file__).read_text())
    with unittest.mock.patch.dict(sys.modules, {module.__name__: changed}):
        return _load(path)


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
