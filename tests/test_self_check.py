"""The check at the first launch of a kernel variant: wrong kernels are errors, right ones are checked once.

Kernels run in Triton's interpreter; faults change the output of a launch.
"""

import importlib
import threading
import time

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from crate_fast import self_check, triton_ops
from crate_fast.errors import UserError
from crate_fast.kernels.launch import Launch, Tile
from crate_fast.kernels.layer_norm import Norm
from crate_fast.self_check import checked

KERNELS = list(self_check._CHECKS)
NORMED = {"layer_norm.backward", "ista.forward", "ista.masked_gradient", "product.product"}  # with and without a norm


def _function(name: str):
    module, function = name.split(".")
    return getattr(importlib.import_module(f"crate_fast.kernels.{module}"), function)


def _arguments(name: str, device, dtype=torch.float16, rows: int = 40, width: int = 64, product=None, norm=True):
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
    *arguments, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    return call(_function(name), *arguments, **options)


def _shares(name: str, device, arguments: tuple) -> dict[str, float]:
    *arguments, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    small, options = self_check._small(name, device, arguments, options)
    return self_check._shares(name, _function(name), small, options)


@pytest.fixture(autouse=True)
def wanted(monkeypatch):
    """Turn the self-check on and clear its record."""
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "1")
    monkeypatch.setenv("CRATE_FAST_FUSED_PRODUCTS", "1")
    monkeypatch.setattr(self_check, "_right", set())


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
    """The list of launches so far; entries of its `faults` change the output of a kernel."""

    class Launches(list):
        faults = ()

    run, seen = Launch.run, Launches()

    def recorded(launch):
        seen.append(launch)
        run(launch)
        for kernel, argument, fault in seen.faults:
            if kernel in launch.kernel.__name__ and isinstance(launch.arguments.get(argument), Tensor):
                fault(launch.arguments[argument])

    monkeypatch.setattr(Launch, "run", recorded)
    return seen


def _scale(tensor):
    tensor.mul_(1.05)


def _forget_a_row(tensor):
    tensor.view(-1, tensor.shape[-1])[-1] = 0


def _forget_a_corner(tensor):
    tensor[..., -16:, -16:] = 0


def _flip(tensor):
    tensor[0, 0] = 1 - tensor[0, 0]


@pytest.mark.parametrize(
    ("name", "kernel", "argument", "fault"),
    [
        ("attention.forward", "fwd", "out_ptr", _scale),
        ("attention.forward", "fwd", "out_ptr", _forget_a_row),
        ("attention.forward", "fwd", "lse_ptr", _scale),
        ("attention.backward", "bwd", "dw_ptr", _scale),
        ("attention.backward", "bwd", "dw_ptr", _forget_a_row),
        ("layer_norm.normalize", "normalize", "normed_ptr", _forget_a_row),
        ("layer_norm.normalize", "normalize", "rstd_ptr", _scale),
        ("layer_norm.backward", "layer_norm", "dx_ptr", _scale),
        ("layer_norm.backward", "layer_norm", "partial_ptr", _scale),
        ("layer_norm.backward", "layer_norm", "normed_ptr", _forget_a_row),
        ("folding.fold", "fold", "folded_ptr", _scale),
        ("folding.fold", "fold", "folded_ptr", _forget_a_corner),
        ("folding.fold_backward", "fold", "out_ptr", _scale),
        ("folding.scale", "scale", "scaled_ptr", _scale),
        ("folding.scale", "scale", "offset_ptr", _scale),
        ("folding.unscale", "unscale", "dweight_ptr", _forget_a_corner),
        ("folding.unscale", "unscale", "dgamma_ptr", _scale),
        ("folding.unscale", "unscale", "dbeta_ptr", _scale),
        ("ista.forward", "product", "out_ptr", _scale),
        ("ista.forward", "product", "out_ptr", _forget_a_corner),
        ("ista.forward", "product", "nonzero_ptr", _flip),
        ("ista.forward", "scale", "offset_ptr", _scale),
        ("ista.masked_gradient", "masked", "masked_ptr", _forget_a_corner),
        ("ista.masked_gradient", "masked", "partial_ptr", _scale),
        ("ista.backward_input", "product", "out_ptr", _scale),
        ("ista.backward_input", "product", "out_ptr", _forget_a_corner),
        ("product.product", "product", "out_ptr", _forget_a_row),
        ("product.weight_gradient", "weight_gradient", "partial_ptr", _scale),
        ("product.weight_gradient", "weight_gradient", "partial_ptr", _forget_a_corner),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.strip("_"),
)
def test_a_wrong_kernel_is_an_error_at_its_first_launch(name, kernel, argument, fault, launches, device):
    launches.faults = [(kernel, argument, fault)]
    with pytest.raises(UserError) as error:
        _call(name, _arguments(name, device))
    message = str(error.value)
    assert message.startswith(f"the kernel crate_fast::{name} is wrong: ")
    words = ("torch ", "triton ", "TRITON_PTXAS_PATH", "backend='torch'", "CRATE_FAST_SELF_CHECK=0")
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    assert self_check._right == set()  # every later launch is an error, too


@pytest.mark.parametrize("name", KERNELS)
def test_a_right_kernel_is_checked_once(name, launches, device):
    arguments = _arguments(name, device)
    expected = _call(name, arguments, lambda function, *given, **options: function(*given, **options))
    alone, generator = len(launches), torch.get_rng_state()
    launches.clear()
    for total in (2 * alone, 3 * alone):
        found = _call(name, arguments)
        assert len(launches) == total
    assert torch.equal(torch.get_rng_state(), generator)
    expected, found = ((results,) if isinstance(results, Tensor) else results for results in (expected, found))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "product"), [("float16", "float16"), ("float32", "float32"), ("float32", "float16")]
)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (129, 70)], ids=str)
def test_right_kernels_are_well_below_the_limit(rows, width, dtype, product, tf32, device, poisoned):
    dtype, product = getattr(torch, dtype), getattr(torch, product)
    for name in KERNELS:
        for norm in (True, False) if name in NORMED else (True,):
            arguments = _arguments(name, device, dtype, rows, width, product, norm)
            shares = _shares(name, device, arguments)
            assert max(shares.values()) <= 0.8, (name, norm, shares)


def test_right_kernels_are_well_below_the_limit_in_bfloat16(bfloat16, device):
    for dtype in (torch.bfloat16, torch.float32):
        for name in KERNELS:
            if not (name.startswith("attention") and dtype == torch.float32):
                arguments = _arguments(name, device, dtype, 70, 96, torch.bfloat16)
                shares = _shares(name, device, arguments)
                assert max(shares.values()) <= 0.8, (name, dtype, shares)


def test_a_launch_that_fails_is_an_error_with_a_remedy(monkeypatch, device):
    def broken(launch):
        raise ValueError("out of resource: shared memory,\nRequired: 300000")

    monkeypatch.setattr(Launch, "run", broken)
    message = "fold does not run: ValueError: out of resource: shared memory, Required: 300000 .*backend='torch'"
    with pytest.raises(UserError, match=message) as error:
        _call("folding.fold", _arguments("folding.fold", device))
    assert isinstance(error.value.__cause__, ValueError)


def test_without_enough_memory_the_check_is_postponed(launches, monkeypatch, device):
    draws, like = iter([True, False]), self_check._Draw.like

    def short(*arguments):
        if next(draws, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return like(*arguments)

    monkeypatch.setattr(self_check._Draw, "like", short)
    for total in (1, 3, 4):  # postponed; checked; already checked
        _call("folding.fold", _arguments("folding.fold", device))
        assert len(launches) == total


@pytest.mark.parametrize("value", ["0", None])
def test_the_check_is_off_by_choice_and_in_the_interpreter(value, launches, monkeypatch):
    if value is None:
        monkeypatch.delenv("CRATE_FAST_SELF_CHECK")
    else:
        monkeypatch.setenv("CRATE_FAST_SELF_CHECK", value)
    launches.faults = [("fold", "folded_ptr", _scale)]
    _call("folding.fold", _arguments("folding.fold", "cpu"))
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"rows": 56}, False),  # neither 1 nor a multiple of 16, as 40
        ({"rows": 48}, True),
        ({"rows": 1}, True),
        ({"width": 32}, True),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float32, "product": torch.float16}, True),
        ({"norm": False}, True),
    ],
    ids=str,
)
def test_another_variant_of_a_kernel_is_checked(change, again, device):
    function = _function("ista.forward")
    checked(function, *_arguments("ista.forward", device))
    checked(function, *_arguments("ista.forward", device, **change))
    assert len(self_check._right) == 1 + again


def test_another_alignment_or_stride_is_another_variant(launches, device):
    function, room = _function("attention.forward"), torch.randn(2 * 41 * 64 + 1, device=device).half()
    aligned, shifted = (room[start : start + 2 * 40 * 64].view(2, 40, 2, 32) for start in (0, 1))
    strided = torch.randn(2, 2, 40, 32, device=device).half().transpose(1, 2)
    for w in (aligned, shifted, strided):
        checked(function, w, 0.2)
    assert len(launches) == 6
    for w in (aligned * 2, shifted, strided):
        checked(function, w, 0.2)
    assert len(launches) == 9


def test_several_threads_check_a_kernel_once(monkeypatch):
    """The check is a slow stand-in, because Triton's interpreter is not safe for threads."""
    checks, barrier = [], threading.Barrier(4)

    def slow(*arguments):
        checks.append(arguments)
        time.sleep(0.1)
        return True

    def fold(*arguments):
        assert len(checks) == 1  # no launch precedes the check

    def launch():
        barrier.wait()
        checked(fold, *_arguments("folding.fold", "cpu"))

    monkeypatch.setattr(self_check, "_is_right", slow)
    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 1


def test_kernels_are_checked_under_autocast_and_inference_mode(device):
    for name in KERNELS:
        with torch.inference_mode(), torch.autocast(device.type, torch.float16):
            _call(name, _arguments(name, device, torch.float32, product=torch.float16))
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
@pytest.mark.parametrize("rows", [1, 16, 40, 197, 785, 800])
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
    for given in variants:
        *given, more = given if isinstance(given[-1], dict) else (*given, {})
        small, options = self_check._small(name, device, given, more)
        sizes = [sum(t.numel() for t in tensors if isinstance(t, Tensor)) for tensors in (small, given)]
        assert sizes[0] <= sizes[1]
        results = []
        for call, words in ((given, more), (small, options)):
            seen.clear()
            _function(name)(*call, **words)
            results.append([_specialised(launch) for launch in seen])
        assert results[0] == results[1] != []


def _operators(device) -> dict:
    """Return each registered operator with arguments."""

    def of(name, product=torch.float16, norm=True):
        return _arguments(name, device, torch.float32, product=product, norm=norm)

    (x, low, folded, *_, norm, _), w = of("ista.forward"), of("attention.forward", norm=False)[0].half()
    square, sign, channel, wanted = x.new_zeros(64, 64), torch.ones_like(x, dtype=torch.int8), norm.gamma, [True] * 6
    heads, lse = low.view(1, 40, 2, 32), torch.zeros(1, 2, 40, device=device)
    mean, rstd, half, single = norm.mean, norm.rstd, torch.float16, torch.float32
    kept = (x, sign, x, mean, rstd)
    weights = (channel, channel, square + torch.eye(64, device=device), square)
    forward = (x[None], *weights, channel, 2, 0.2, 1e-5, half)
    backward = (x[None], *weights, low, rstd, heads, heads, lse)
    return {
        "attention_fwd": (triton_ops.subspace_attention_fwd, (w, 0.2)),
        "attention_bwd": (triton_ops.subspace_attention_bwd, (w, w, w, torch.zeros(3, 2, 40, device=device), 0.2)),
        "fold": (triton_ops.fold, (square, 0.1, half)),
        "ista_fwd": (triton_ops.ista_fwd, (x, channel, channel, square, folded, 0.1, 0.1, 1e-5, False, True)),
        "ista_bwd": (triton_ops.ista_bwd, (*kept, channel, channel, square, folded, 0.1, 1e-5, single, [True] * 4)),
        "compression_fwd": (triton_ops.compression_fwd, (*forward, False)),
        "compression_fwd, paper": (triton_ops.compression_fwd, (*forward, True)),
        "compression_bwd": (triton_ops.compression_bwd, (*backward, None, None, 0.2, False, single, single, wanted)),
        "compression_bwd, paper": (
            triton_ops.compression_bwd,
            (*backward, x[None], mean, 0.2, True, single, single, wanted),
        ),
    }


@pytest.mark.parametrize("name", _operators("cpu"))
def test_every_launch_of_an_operator_is_checked(name, launches, monkeypatch, device):
    operator, arguments = _operators(device)[name]
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "0")
    operator(*arguments)
    alone = sorted(launch.kernel.__name__ for launch in launches)
    launches.clear()
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "1")
    operator(*arguments)
    again = sorted(launch.kernel.__name__ for launch in launches)
    assert set(again) == set(alone)
    assert len(again) == 2 * len(alone)


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
