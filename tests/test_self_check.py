"""The check at the first launch of a kernel variant: wrong kernels are errors, right ones are checked once."""

import importlib
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from oracle import mutant
from test_kernels import ROW_MUTANTS, WHOLE_MUTANTS
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from crate_fast import kernels, odl, self_check, triton_ops
from crate_fast.errors import UserError
from crate_fast.kernels import attention, whole_head
from crate_fast.kernels.launch import Launch, Tile
from crate_fast.kernels.layer_norm import Norm
from crate_fast.probes import PROBLEMS
from crate_fast.self_check import checked

HALF, SINGLE = torch.float16, torch.float32
KERNELS = list(self_check._CHECKS)
NORMED = {"layer_norm.backward", "ista.forward", "ista.masked_gradient", "product.product"}  # with and without a norm


def _function(name: str):
    module, function = name.split(".")
    return getattr(importlib.import_module(f"crate_fast.kernels.{module}"), function)


def _arguments(name: str, device, dtype=HALF, rows: int = 40, width: int = 64, product=None, norm=True):
    """Return a kernel's arguments: `rows` tokens in two heads for attention, `rows` rows for the others."""
    product = product or dtype

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype)

    x, square, channel = normal(rows, width), normal(width, width), normal(width)
    low, folded = normal(rows, width, dtype=product), normal(width, width, dtype=product)
    mean, rstd = torch.zeros(rows, device=device), torch.ones(rows, device=device)
    w = normal(3, rows, 2, width // 2)
    sign = torch.ones_like(x, dtype=torch.int8)
    layer_norm = Norm(mean, rstd, channel, channel) if norm else None
    given, tile = (low, None) if product == dtype else (x, mean), Tile(32, 128, 4, 1, 32, persistent=True)
    return {
        "attention.forward": (w, 0.2),
        "attention.backward": (w, w, w, torch.zeros(3, 2, rows, device=device), 0.2),
        "layer_norm.normalize": (x, 1e-5, product),
        "layer_norm.backward": (x, *given, rstd, dtype, channel if norm else None, None if norm else x, product),
        "folding.fold": (square, 0.1, product),
        "folding.fold_backward": (square.float(), square, 0.1),
        "folding.scale": (square, channel, channel, product),
        "folding.unscale": (folded, channel.float(), square, channel, channel),
        "ista.forward": (x, low, folded, 0.01, not norm, layer_norm, norm),
        "ista.masked_gradient": (x, sign, product, norm),
        "ista.backward_input": (x, low, folded),
        "product.product": (low, folded, x, tile, {"bias": channel, "norm": layer_norm}),
        "product.weight_gradient": (low, low),
    }[name]


def _call(name: str, arguments: tuple, call=checked):
    """Call `checked` with a kernel's function and its arguments, of which a last dictionary holds options."""
    arguments, options = _with_options(arguments)
    return call(_function(name), *arguments, **options)


def _with_options(arguments: tuple) -> tuple[tuple, dict]:
    return (arguments[:-1], arguments[-1]) if isinstance(arguments[-1], dict) else (arguments, {})


def _share(name: str, device, *more, spread: float | None = None) -> float:
    """Return the worst error of a kernel relative to the allowed error; `more` are arguments of `_arguments`."""
    arguments, options = _with_options(_arguments(name, device, *more))
    options = options | ({} if spread is None else {"spread": spread})
    small, options = self_check._small(name, device, arguments, options)
    return max(self_check._shares(name, _function(name), small, options).values())


@pytest.fixture(autouse=True)
def wanted(monkeypatch):
    """Turn the self-check on and clear its record."""
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "1")
    monkeypatch.setenv("CRATE_FAST_FUSED_PRODUCTS", "1")
    monkeypatch.setattr(self_check, "_right", set())
    monkeypatch.setattr(self_check, "_seen", set())


@pytest.fixture
def tf32(monkeypatch):
    """Truncate the operands of fp32 products in the interpreter to TF32, as tensor cores do."""
    dot = InterpreterBuilder.create_dot

    def cut(handle):
        if handle.data.dtype != np.float32 or handle.dtype != tl.float32:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return TensorHandle(bits.view(np.float32), handle.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *more: dot(self, cut(a), cut(b), *more))


@pytest.fixture
def launches(monkeypatch):
    """The list of launches so far; its `fault` (kernel, argument, change) changes the output of a kernel."""

    class Launches(list):
        fault = ("none", "", None)

    run, seen = Launch.run, Launches()

    def recorded(launch):
        seen.append(launch)
        run(launch)
        kernel, argument, change = seen.fault
        if kernel in launch.kernel.__name__ and isinstance(launch.arguments.get(argument), Tensor):
            change(launch.arguments[argument])

    monkeypatch.setattr(Launch, "run", recorded)
    return seen


CHANGES = {
    "scaled": lambda tensor: tensor.mul_(1.05),
    "without its last row": lambda tensor: tensor.view(-1, tensor.shape[-1])[-1].zero_(),
    "without a corner": lambda tensor: tensor[..., -16:, -16:].zero_(),
    "flipped": lambda tensor: tensor[0, 0].mul_(-1).add_(1),
}
FAULTS = {  # function and kernel: arguments that are changed after the launch
    "attention.forward fwd": {"scaled": ["out_ptr", "lse_ptr"], "without its last row": ["out_ptr"]},
    "attention.backward bwd": {"scaled": ["dw_ptr"], "without its last row": ["dw_ptr"]},
    "layer_norm.normalize normalize": {"scaled": ["rstd_ptr"], "without its last row": ["normed_ptr"]},
    "layer_norm.backward layer_norm": {"scaled": ["dx_ptr", "partial_ptr"], "without its last row": ["normed_ptr"]},
    "folding.fold fold": {"scaled": ["folded_ptr"], "without a corner": ["folded_ptr"]},
    "folding.fold_backward fold": {"scaled": ["out_ptr"]},
    "folding.scale scale": {"scaled": ["scaled_ptr", "offset_ptr"]},
    "folding.unscale unscale": {"scaled": ["dgamma_ptr", "dbeta_ptr"], "without a corner": ["dweight_ptr"]},
    "ista.forward product": {"scaled": ["out_ptr"], "without a corner": ["out_ptr"], "flipped": ["nonzero_ptr"]},
    "ista.forward scale": {"scaled": ["offset_ptr"]},
    "ista.masked_gradient masked": {"scaled": ["partial_ptr"], "without a corner": ["masked_ptr"]},
    "ista.backward_input product": {"scaled": ["out_ptr"], "without a corner": ["out_ptr"]},
    "product.product product": {"without its last row": ["out_ptr"]},
    "product.weight_gradient weight_gradient": {"scaled": ["partial_ptr"], "without a corner": ["partial_ptr"]},
}


@pytest.mark.parametrize(
    ("launched", "argument", "change"),
    [(one, name, change) for one, faults in FAULTS.items() for change, names in faults.items() for name in names],
)
def test_a_wrong_kernel_is_an_error_at_its_first_launch(launched, argument, change, launches, device):
    name, kernel = launched.split()
    launches.fault = (kernel, argument, CHANGES[change])
    with pytest.raises(UserError) as error:
        _call(name, _arguments(name, device))
    message = str(error.value)
    assert message.startswith(f"the kernel crate_fast::{name} is wrong: ")
    for words in ("triton ", "TRITON_PTXAS_PATH", "backend='torch'", "CRATE_FAST_SELF_CHECK=0"):
        assert words in message
    assert "\n" not in message
    assert self_check._right == set()  # every later launch is an error, too


@pytest.mark.parametrize("name", KERNELS)
def test_a_right_kernel_is_checked_once(name, launches, device):
    arguments = _arguments(name, device)
    expected = _call(name, arguments, lambda function, *given, **options: function(*given, **options))
    alone, generator = len(launches), torch.get_rng_state()
    launches.clear()
    checks = 2 if name.startswith("attention") else 1
    for total in ((1 + checks) * alone, (2 + checks) * alone):
        found = _call(name, arguments)
        assert len(launches) == total
    assert torch.equal(torch.get_rng_state(), generator)
    expected, found = ((results,) if isinstance(results, Tensor) else results for results in (expected, found))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "product"), [(HALF, HALF), (SINGLE, SINGLE), (SINGLE, HALF)])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (129, 70)], ids=str)
def test_right_kernels_are_well_below_the_limit(rows, width, dtype, product, tf32, device, poisoned):
    for name in KERNELS:
        if name.startswith("attention") and product != dtype:
            continue  # its tokens have the products' dtype
        for norm in (True, False) if name in NORMED else (True,):
            assert _share(name, device, dtype, rows, width, product, norm) <= 0.8, (name, norm)
        if name.startswith("attention"):
            assert _share(name, device, dtype, rows, width, spread=100.0) <= 0.8, name


def test_right_kernels_are_well_below_the_limit_in_bfloat16(bfloat16, device):
    for dtype, name in itertools.product((torch.bfloat16, SINGLE), KERNELS):
        if not (name.startswith("attention") and dtype == SINGLE):
            assert _share(name, device, dtype, 70, 96, torch.bfloat16) <= 0.8, (name, dtype)
    for name, rows in itertools.product(("attention.forward", "attention.backward"), (197, 305)):  # whole heads; rows
        assert _share(name, device, torch.bfloat16, rows, 128, spread=1e4) <= 0.8, (name, rows)


@pytest.mark.parametrize(
    ("mutation", "kernel", "name", "rows"),
    [
        (ROW_MUTANTS["never a running maximum"], attention, "forward", 305),
        (ROW_MUTANTS["always one exponential"], attention, "backward", 305),
        (WHOLE_MUTANTS["a refusal that is ignored"], whole_head, "backward", 197),
    ],
)
def test_the_check_reaches_the_branches_for_norms_that_differ(
    mutation, kernel, name, rows, tmp_path, bfloat16, device, monkeypatch
):
    arguments = _arguments(f"attention.{name}", device, torch.bfloat16, rows, 128)  # right kernels: see above
    changed, function = mutant(kernel, mutation[:2], tmp_path), getattr(attention, name)
    if kernel is whole_head:
        monkeypatch.setattr(kernels, "whole_head", changed)
    else:
        function = getattr(changed, name)
        function.__module__ = attention.__name__  # as which it is checked
    with pytest.raises(UserError, match=f"the kernel crate_fast::attention.{name} is wrong"):
        checked(function, *arguments)


def test_a_launch_that_fails_is_an_error_with_a_remedy(monkeypatch, device):
    error = ValueError("out of resource: shared memory,\nRequired: 300000")
    monkeypatch.setattr(Launch, "run", mock.Mock(side_effect=error))
    message = "fold does not run: ValueError: out of resource: shared memory, Required: 300000 .*backend='torch'"
    with pytest.raises(UserError, match=message) as raised:
        _call("folding.fold", _arguments("folding.fold", device))
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
    ],
    ids=repr,
)
def test_without_enough_memory_the_check_is_postponed(error, launches, monkeypatch, device):
    draws, like = iter([True, False]), self_check._Draw.like

    def short(*arguments):
        if next(draws, False):
            raise error
        return like(*arguments)

    monkeypatch.setattr(self_check._Draw, "like", short)
    for total in (1, 3, 4):  # postponed; checked; already checked
        _call("folding.fold", _arguments("folding.fold", device))
        assert len(launches) == total


def test_the_check_is_off_by_choice_and_in_the_interpreter(launches, monkeypatch):
    launches.fault = ("fold", "folded_ptr", CHANGES["scaled"])
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "0")
    for total in (1, 2):
        _call("folding.fold", _arguments("folding.fold", "cpu"))
        assert len(launches) == total
        monkeypatch.delenv("CRATE_FAST_SELF_CHECK", raising=False)


def test_another_variant_of_a_kernel_is_checked(monkeypatch, device):
    monkeypatch.setattr(self_check, "ELEMENTS", 2**12)  # a launch of 72 rows is large, one of 48 is not
    changes = [{}, {"rows": 48}, {"rows": 1}, {"rows": 72}, {"width": 32}, {"norm": False}]
    changes += [{"dtype": SINGLE}, {"dtype": SINGLE, "product": HALF}]
    calls = [("ista.forward", _arguments("ista.forward", device, **change)) for change in changes]
    x, channel = torch.randn(40, 64, device=device).half(), torch.randn(64, device=device).half()
    tile = Tile(32, 32, 4, 1, 32)
    for weight in (torch.randn(height, 64, device=device).half() for height in (64, 96)):
        calls += [("folding.scale", (weight, channel, channel, HALF))]
        calls += [("product.product", (x, weight, None, tile, {"dtype": HALF}))]
    calls += [("product.product", (x, weight, None, tile, {"dtype": HALF, "alpha": 0.5}))]  # 1 needs no code
    for total, (name, arguments) in enumerate(calls, 1):
        _call(name, arguments)
        assert len(self_check._right) == total, (name, total)
    _call("ista.forward", _arguments("ista.forward", device, rows=56))  # neither 1 nor a multiple of 16, as 40
    _call("product.product", (x, weight, None, tile, {"dtype": HALF, "alpha": 0.25}))  # as 0.5
    assert len(self_check._right) == len(calls)


def test_another_alignment_or_stride_is_another_variant(launches, device):
    function, room = _function("attention.forward"), torch.randn(2 * 41 * 64 + 1, device=device).half()
    aligned, shifted = (room[start : start + 2 * 40 * 64].view(2, 40, 2, 32) for start in (0, 1))
    strided = torch.randn(2, 2, 40, 32, device=device).half().transpose(1, 2)
    for factor, total in ((1, 9), (2, 12)):
        for w in (factor * aligned, shifted, strided):
            checked(function, w, 0.2)
        assert len(launches) == total


def test_several_threads_check_a_kernel_once(monkeypatch):
    """The check is a slow stand-in, because Triton's interpreter is not safe for threads."""
    checks, barrier = [], threading.Barrier(4)

    def slow(*arguments):
        checks.append(arguments)
        time.sleep(0.1)
        return True

    def fold(*arguments):
        assert len(checks) == 1  # no launch precedes the check

    def launch(_):
        barrier.wait()
        checked(fold, *_arguments("folding.fold", "cpu"))

    monkeypatch.setattr(self_check, "_is_right", slow)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(launch, range(4)))
    assert len(checks) == 1


def test_kernels_are_checked_under_autocast_and_inference_mode(device):
    for name in KERNELS:
        with torch.inference_mode(), torch.autocast(device.type, HALF):
            _call(name, _arguments(name, device, SINGLE, product=HALF))
    assert len(self_check._right) == len(KERNELS)


def _specialised(launch: Launch) -> tuple:
    """Return what Triton specialises on: constants, options, and properties of each argument."""

    def kind(value):
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, int):
            return value == 1, value % 16 == 0, abs(value) < 2**31
        return type(value)

    arguments = {name: kind(value) for name, value in launch.arguments.items()}
    return launch.kernel, arguments, launch.constants, launch.options


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows", [1, 16, 197, 785, 800])
def test_the_check_has_a_small_problem_with_the_launchs_binary(name, rows, monkeypatch, device):
    seen = []
    monkeypatch.setattr(Launch, "run", lambda launch: seen.append(launch))
    monkeypatch.setattr(self_check, "LONGEST", 96 if rows > 320 else 320)  # whole heads are compiled for a length
    monkeypatch.setattr(self_check, "ELEMENTS", 2**12)
    arguments = _arguments(name, device, rows=rows)
    variants = [arguments]
    if name == "folding.scale":
        variants.append((arguments[0].t(), *arguments[1:]))  # a weight with other strides
    if "attention" in name:
        strided = torch.randn(3, 2, rows, 32, device=device).half().transpose(1, 2)
        variants.append(tuple(strided if t is arguments[0] else t for t in arguments))
    for given in map(_with_options, variants):
        small = self_check._small(name, device, *given)
        sizes = [sum(t.numel() for t in tensors if isinstance(t, Tensor)) for tensors, _ in (small, given)]
        assert sizes[0] <= sizes[1]
        results = []
        for tensors, options in (given, small):
            seen.clear()
            _function(name)(*tensors, **options)
            results.append([_specialised(launch) for launch in seen])
        assert results[0] == results[1] != []


def test_every_launch_of_an_operator_is_checked(launches, monkeypatch, device):
    inside = []  # of `checked`

    def recorded(function, *arguments, **options):
        before = len(launches)
        results = checked(function, *arguments, **options)
        inside.extend(launches[before:])
        return results

    for module in (odl, triton_ops):
        monkeypatch.setattr(module, "checked", recorded)
    for kernel, options in (*((kernel, {}) for kernel in PROBLEMS), ("compress", {"residual": "paper"})):
        sizes = (1, 40, 2, 32) if kernel == "attention" else (1, 40, 64)
        problem = PROBLEMS[kernel](sizes, SINGLE, HALF, device, torch.default_generator, **options)
        problem.results(problem.ours)  # of every operator, forward and backward
    assert len(inside) == len(launches)
    assert {name for name, *_ in self_check._right} == {*KERNELS}


@pytest.mark.gpu
def test_a_captured_launch_is_not_checked(launches):
    arguments, fold = _arguments("folding.fold", "cuda"), _function("folding.fold")
    fold(*arguments)  # compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        checked(fold, *arguments)
    assert self_check._right == set()
    checked(fold, *arguments)
    assert len(self_check._right) == 1
