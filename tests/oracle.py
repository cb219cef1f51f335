"""Judges kernels by the rule of `crate_fast.accuracy`, against the float64 reference on the rounded inputs."""

import importlib.util
import sys
import unittest.mock
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from crate_fast.accuracy import clear_of_threshold, gradients, judge, spread_tokens, token_scale

__all__ = [
    "agrees",
    "all_within_twice_eager",
    "clear_of_threshold",
    "gradients",
    "is_right",
    "model_gradients",
    "mutant",
    "spread_tokens",
    "token_scale",
    "tokens_and_gradient",
    "within_twice_eager",
]


def within_twice_eager(actual: Tensor, eager: Tensor, truth: Tensor, label: str) -> bool:
    """Return True if rms and max error are within the rule of `crate_fast.accuracy`; print both."""
    found = judge(actual, eager, truth)
    print(f"{label}: rms {found.rms:.2e} of {found.allowed_rms:.2e}, max {found.max:.2e} of {found.allowed_max:.2e}")
    return found.right


def all_within_twice_eager(actual: Iterable, eager: Iterable, truth: Iterable, names: str) -> bool:
    """`within_twice_eager` for each of several tensors; all are judged, so that every error is printed."""
    rows = zip(actual, eager, truth, names.split(), strict=True)
    verdicts = [within_twice_eager(*row) for row in rows]
    return all(verdicts)


def tokens_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    """Return subspace tokens [B, N, H, D] of the usual scale, and a gradient."""
    w = (torch.randn(shape) * token_scale(shape[1], shape[3])).to(dtype)
    return w.to(device), torch.randn(shape).to(dtype).to(device)


def algebra_is_right(actual: Iterable, eager: Iterable, truth: Iterable) -> bool:
    """Return True if each fp32 result's relative error is at most twice eager's and 1e-4."""
    errors = [
        [
            ((result - true).norm() / true.norm().clamp_min(1e-30)).item()
            for result, true in zip(results, truth, strict=True)
        ]
        for results in (actual, eager)
    ]
    print(errors)
    return all(error <= 2 * allowed + 1e-4 for error, allowed in zip(*errors, strict=True))


def is_right(actual: Sequence[Tensor], eager: Iterable, truth: Iterable, names: str) -> bool:
    """Return `algebra_is_right` of fp32 results, which the interpreter shows, else `all_within_twice_eager`."""
    if actual[0].dtype == torch.float32:
        return algebra_is_right(actual, eager, truth)
    return all_within_twice_eager(actual, eager, truth, names)


def agrees(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    names: str,
    grad: Tensor | None = None,
) -> bool:
    """Return True if our output and gradients are within twice the error of the reference in the same dtype."""
    grad = torch.randn_like(reference(*inputs)) if grad is None else grad
    actual, eager = (gradients(function, inputs, grad) for function in (ours, reference))
    truth = gradients(reference, [tensor.double() for tensor in inputs], grad.double())
    return all_within_twice_eager(actual, eager, truth, names)


def model_gradients(model: torch.nn.Module, images: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return a model's "output", and by name the gradients of the sum of its squares, added up in fp32 at least."""
    model.zero_grad()
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        output = model(images)
    (output if output.dtype == torch.float64 else output.float()).square().sum().backward()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach()} | found


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
