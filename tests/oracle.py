"""Checks of kernels by `crate_fast.accuracy`, against the float64 reference on the rounded inputs."""

import importlib.util
import itertools
import sys
import unittest.mock
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crate_fast.accuracy import judge
from crate_fast.probes import PROBLEMS, Problem


def tokens_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, device, **drawn) -> tuple[Tensor, Tensor]:
    """Return the subspace tokens [B, N, H, D] and the gradient of a probe; `drawn`: factor, offset, spread."""
    skip_tf32(dtype, device)
    problem = PROBLEMS["attention"](shape, dtype, None, device, torch.default_generator, **drawn)
    return problem.inputs[0], problem.grad


def skip_tf32(dtype: torch.dtype, device) -> None:
    """Skip a test of exact fp32 products on a GPU, where kernels multiply fp32 as TF32."""
    if dtype == torch.float32 and torch.device(device).type == "cuda":
        pytest.skip("fp32 shows the algebra in Triton's interpreter; on a GPU its products are TF32")


def all_within_twice_eager(actual: Iterable, eager: Iterable, truth: Iterable, names: str) -> bool:
    """Return True if rms and max error of all tensors are within the rule of `crate_fast.accuracy`; print them."""
    rows = zip(names.split(), actual, eager, truth, strict=True)
    found = {name: judge(*tensors) for name, *tensors in rows}
    print(found)
    return all(judgement.right for judgement in found.values())


def is_right(actual: Sequence[Tensor], eager: Iterable, truth: Sequence, names: str) -> bool:
    """Judge by `all_within_twice_eager`, but fp32 by relative errors of at most twice eager's and 1e-4."""
    if actual[0].dtype != torch.float32:
        return all_within_twice_eager(actual, eager, truth, names)
    errors = [
        [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(results, truth, strict=True)]
        for results in (actual, eager)
    ]
    print(errors)
    return all(error <= 2 * allowed + 1e-4 for error, allowed in zip(*errors, strict=True))


def agrees(ours: Callable, reference: Callable, inputs: Sequence[Tensor], names: str, grad=None) -> bool:
    """Return True if our output and gradients are within twice the error of the reference in the same dtype."""
    grad = torch.randn_like(reference(*inputs)) if grad is None else grad
    return problem_is_right(Problem(ours, reference, inputs, grad, names))


def problem_is_right(problem: Problem) -> bool:
    """Return True if ours is within twice the error of the reference in the same dtype or under autocast."""
    actual, eager = (problem.results(function) for function in (problem.ours, problem.reference))
    return all_within_twice_eager(actual, eager, problem.truth(), problem.names)


def model_gradients(model: torch.nn.Module, images: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return a model's "output" and its parameters' gradients by name; the loss is the sum of squared outputs."""
    model.zero_grad()
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        output = model(images)
    (output if output.dtype == torch.float64 else output.float()).square().sum().backward()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach()} | found


_numbers = itertools.count()


def mutant(module, mutation: Sequence[str], folder: Path, user=None):
    """Return a copy of a module with one passage replaced, which must occur once; its operators have their own names.

    With `user`, return a copy of that module which imports the changed one.
    """
    source, name = Path(module.__file__).read_text(), f"mutant_{next(_numbers)}"
    assert source.count(mutation[0]) == 1, f"{mutation[0]!r} is not in {module.__file__} once"
    path = folder / f"{name}.py"
    text = source.replace(*mutation).replace("crate_fast::", f"{name}::")
    path.write_text(text.replace("torch.ops.crate_fast.", f"torch.ops.{name}."))
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


def opcheck_tests(wanted: list[bool]) -> str | tuple[str, ...]:
    """Return opcheck's tests of an operator that returns the wanted results; one with all results is traced too."""
    return "ALL" if all(wanted) else ("test_schema", "test_faketensor")
