"""The first launch of a kernel variant is checked: wrong kernels are errors, right ones are looked at once.

Operators' bodies run in Triton's interpreter; a fault is put into what a launch has written.
"""

import inspect
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crate_fast import self_check, triton_ops
from crate_fast.errors import UserError
from crate_fast.kernels.launch import Launch
from crate_fast.self_check import alike, self_checked

OPERATORS = {name: getattr(triton_ops, name) for name in self_check._REFERENCES}


def _body(name: str):
    return inspect.unwrap(OPERATORS[name]._init_fn)


def _arguments(name: str, device, dtype=torch.float16, rows: int = 40, width: int = 64, product=None) -> tuple:
    """What an operator is called with: attention 40 tokens in two heads, the others 40 rows."""
    product = product or dtype

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype)

    x, square, channel, ones = (
        normal(rows, width),
        normal(width, width),
        normal(width),
        torch.ones(rows, device=device),
    )
    folded, w = square.to(product), normal(3, rows, 2, width // 2)
    low, heads = normal(rows, width, dtype=product), normal(1, rows, 2, width // 2, dtype=product)
    mean, given = (None, low) if dtype == product else (ones, x)
    return {
        "subspace_attention_fwd": (w, 0.2),
        "subspace_attention_bwd": (w, w, w, torch.zeros(3, 2, rows, device=device), 0.2),
        "fold": (square, 0.1, product),
        "ista_fwd": (x, channel, channel, square, folded, 0.1, 0.1, 1e-5, False, True),
        "ista_bwd": (
            *(x, torch.ones_like(x, dtype=torch.int8), given, mean, ones, channel, channel, square, folded),
            *(0.1, 1e-5, dtype, [True] * 4),
        ),
        "compression_fwd": (x[None], channel, channel, square, square, channel, 2, 0.2, 1e-5, product, False),
        "compression_bwd": (
            *(x[None], channel, channel, square, square, low, ones, heads, heads),
            *(torch.zeros(1, 2, rows, device=device), None, None, 0.2, False, dtype, dtype, [True] * 6),
        ),
    }[name]


@pytest.fixture(autouse=True)
def wanted(monkeypatch):
    """The self-check is on, and has seen nothing."""
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "1")
    monkeypatch.setenv("CRATE_FAST_FUSED_PRODUCTS", "1")
    monkeypatch.setattr(self_check, "_right", set())


@pytest.fixture
def launches(monkeypatch):
    """The launches so far; entries of `launches.faults` change what a kernel has written."""

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


# --- right and wrong ----------------------------------------------------------------------------------------------


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
        ("subspace_attention_fwd", "fwd", "out_ptr", _scale),
        ("subspace_attention_fwd", "fwd", "out_ptr", _forget_a_row),
        ("subspace_attention_fwd", "fwd", "lse_ptr", _scale),
        ("subspace_attention_bwd", "bwd", "dw_ptr", _scale),
        ("subspace_attention_bwd", "bwd", "dw_ptr", _forget_a_row),
        ("ista_fwd", "product", "out_ptr", _scale),
        ("ista_fwd", "product", "out_ptr", _forget_a_corner),
        ("ista_fwd", "product", "nonzero_ptr", _flip),
        ("ista_fwd", "normalize", "normed_ptr", _scale),
        ("ista_fwd", "normalize", "rstd_ptr", _scale),
        ("fold", "fold", "folded_ptr", _scale),
        ("fold", "fold", "folded_ptr", _forget_a_corner),
        ("ista_bwd", "masked", "masked_ptr", _forget_a_corner),
        ("ista_bwd", "masked", "partial_ptr", _scale),
        ("ista_bwd", "product", "out_ptr", _scale),
        ("ista_bwd", "product", "out_ptr", _forget_a_corner),
        ("ista_bwd", "weight_gradient", "partial_ptr", _scale),
        ("ista_bwd", "weight_gradient", "partial_ptr", _forget_a_corner),
        ("ista_bwd", "layer_norm", "dx_ptr", _scale),
        ("ista_bwd", "layer_norm", "partial_ptr", _scale),
        ("ista_bwd", "fold", "out_ptr", _scale),
        ("compression_fwd", "product", "out_ptr", _scale),
        ("compression_fwd", "scale", "offset_ptr", _scale),
        ("compression_fwd", "fwd", "out_ptr", _forget_a_row),
        ("compression_bwd", "attention_bwd", "dw_ptr", _scale),
        ("compression_bwd", "unscale", "dweight_ptr", _forget_a_corner),
        ("compression_bwd", "unscale", "dgamma_ptr", _scale),
        ("compression_bwd", "unscale", "dbeta_ptr", _scale),
        ("compression_bwd", "layer_norm", "dx_ptr", _scale),
        ("compression_bwd", "layer_norm", "partial_ptr", _scale),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.strip("_"),
)
def test_a_wrong_kernel_is_an_error_at_its_first_launch(name, kernel, argument, fault, launches, device):
    arguments = _arguments(name, device)
    launches.faults = [(kernel, argument, fault)]
    with pytest.raises(UserError) as error:
        self_checked(_body(name))(*arguments)
    message = str(error.value)
    assert message.startswith(f"the kernel crate_fast::{name} is wrong: ")
    for word in ("torch ", "triton ", "TRITON_PTXAS_PATH", "backend='torch'", "CRATE_FAST_SELF_CHECK=0"):
        assert word in message
    assert "\n" not in message
    with pytest.raises(UserError, match="is wrong"):  # and at every later one
        self_checked(_body(name))(*arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_right_kernel_is_checked_once(name, launches, device):
    arguments = _arguments(name, device)
    body = _body(name)
    expected = body(*arguments)
    alone, checked = len(launches), self_checked(body)
    launches.clear()
    for total in (2 * alone, 3 * alone):
        found = checked(*arguments)
        assert len(launches) == total
    expected, found = ((results,) if isinstance(results, Tensor) else results for results in (expected, found))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def _forget_the_first(tensor):
    tensor[0] = 0


@pytest.mark.parametrize("fault", [None, _forget_a_row, _forget_the_first])
@pytest.mark.parametrize("name", ["ista_fwd", "compression_fwd"])
def test_of_many_rows_the_first_and_the_last_are_compared(name, fault, launches, device, monkeypatch):
    """A row at either end, of an image for a whole layer's half."""
    monkeypatch.setitem(self_check._REFERENCES, name, replace(self_check._REFERENCES[name], ends=1))
    arguments = _arguments(name, device)
    if name == "compression_fwd":
        arguments = (torch.randn(5, 8, 64, device=device).half(), *arguments[1:])
    launches.faults = [] if fault is None else [("product", "out_ptr", fault)]
    with nullcontext() if fault is None else pytest.raises(UserError, match="is wrong"):
        self_checked(_body(name))(*arguments)


SHAPES = [(1, 64), (16, 32), (50, 96), (129, 64)]


@pytest.mark.parametrize(
    ("dtype", "product"), [("float16", "float16"), ("float32", "float32"), ("float32", "float16")]
)
@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=str)
def test_right_kernels_stay_clear_of_the_limit(rows, width, dtype, product, device):
    dtype, product = getattr(torch, dtype), getattr(torch, product)
    for name, reference in self_check._REFERENCES.items():
        arguments = _arguments(name, device, dtype, rows, width, product)
        small = reference.draw(self_check._Draw(device), *arguments)
        shares = self_check._worst(_body(name), reference, small)
        assert max(shares.values()) <= 0.8, (name, shares)


def test_other_forms_of_the_operators(device):
    """No LayerNorm, the soft threshold, some gradients alone, the paper's residual."""
    x, nothing = torch.randn(40, 64, device=device).half(), torch.empty(0, device=device)
    square, sign = _arguments("fold", device)[0], torch.ones_like(x, dtype=torch.int8)
    for keep, soft in ((True, False), (False, True)):
        self_checked(_body("ista_fwd"))(x, None, None, square, square, 0.1, 0.1, 0.0, soft, keep)
    for wanted in ([True, False, False, True], [True, False, False, False], [False, False, False, True]):
        more = (0.1, 0.0, torch.float16, wanted)
        self_checked(_body("ista_bwd"))(x, sign, x, nothing, nothing, None, None, square, square, *more)
    for product in (torch.float16, torch.float32):
        forward = _arguments("compression_fwd", device, torch.float32, product=product)
        self_checked(_body("compression_fwd"))(*forward[:-1], True)
        backward = list(_arguments("compression_bwd", device, torch.float32, product=product))
        backward[13] = True
        if product == torch.float16:
            backward[10:12] = forward[0], torch.zeros(40, device=device)
        self_checked(_body("compression_bwd"))(*backward)
    for wanted in ([False, True, False, False, True, False], [False, False, False, True, False, True]):
        self_checked(_body("compression_bwd"))(*backward[:-1], wanted)
    assert len(self_check._right) == 11


def test_a_launch_that_fails_is_an_error_with_a_remedy(monkeypatch, device):
    def broken(launch):
        raise ValueError("out of resource: shared memory,\nRequired: 300000")

    monkeypatch.setattr(Launch, "run", broken)
    arguments = _arguments("fold", device)
    message = "fold does not run: ValueError: out of resource: shared memory, Required: 300000 .*torch='?"
    with pytest.raises(UserError, match=message.removesuffix(".*torch='?")) as error:
        self_checked(_body("fold"))(*arguments)
    assert isinstance(error.value.__cause__, ValueError)
    assert "backend='torch'" in str(error.value)


def test_where_memory_is_short_the_check_waits(launches, monkeypatch, device):
    arguments, body = _arguments("fold", device), _body("fold")
    draws = iter([True, False])
    normal = self_check._Draw.normal

    def short(draw, *arguments):
        if next(draws, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return normal(draw, *arguments)

    monkeypatch.setattr(self_check._Draw, "normal", short)
    checked = self_checked(body)
    for total in (1, 3, 4):  # unchecked; checked; known
        checked(*arguments)
        assert len(launches) == total


# --- when ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", None])
def test_it_can_be_off_and_is_in_the_interpreter(value, launches, monkeypatch):
    if value is None:
        monkeypatch.delenv("CRATE_FAST_SELF_CHECK")
    else:
        monkeypatch.setenv("CRATE_FAST_SELF_CHECK", value)
    launches.faults = [("fold", "folded_ptr", _scale)]
    self_checked(_body("fold"))(*_arguments("fold", "cpu"))
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
    ],
    ids=str,
)
def test_another_compiled_kernel_is_checked_again(change, again, device):
    checked = self_checked(_body("ista_fwd"))
    checked(*_arguments("ista_fwd", device))
    checked(*_arguments("ista_fwd", device, **change))
    assert len(self_check._right) == 1 + again


def test_alignment_and_strides_select_a_kernel_too(launches, device):
    checked = self_checked(_body("subspace_attention_fwd"))
    room = torch.randn(2 * 41 * 64 + 1, device=device).half()
    aligned, shifted = (room[start : start + 2 * 40 * 64].view(2, 40, 2, 32) for start in (0, 1))
    more = _arguments("subspace_attention_fwd", device)[1:]
    strided = torch.randn(2, 2, 40, 32, device=device).half().transpose(1, 2)
    for w in (aligned, shifted, strided):
        checked(w, *more)
    assert len(launches) == 6
    for w in (aligned * 2, shifted, strided):
        checked(w, *more)
    assert len(launches) == 9


def test_it_draws_nothing_from_the_global_generators(device):
    arguments = [_arguments(name, device) for name in OPERATORS]
    before = torch.get_rng_state()
    for name, given in zip(OPERATORS, arguments, strict=True):
        self_checked(_body(name))(*given)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_check_once_together(monkeypatch):
    """With a check that takes its time, since Triton's interpreter serves one thread only."""
    checks = []

    def slow(*arguments):
        checks.append(arguments)
        time.sleep(0.1)
        return True

    monkeypatch.setattr(self_check, "_is_right", slow)
    arguments = _arguments("fold", "cpu")

    def fold(*arguments):
        assert len(checks) == 1  # nobody is ahead of the check

    checked = self_checked(fold)
    barrier = threading.Barrier(4)

    def launch():
        barrier.wait()
        checked(*arguments)

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 1


def test_autocast_and_inference_mode_do_not_disturb_it(device):
    for name in OPERATORS:
        with torch.inference_mode(), torch.autocast(device.type, torch.float16):
            self_checked(_body(name))(*_arguments(name, device, torch.float32, product=torch.float16))
    assert len(self_check._right) == len(OPERATORS)


# --- the same binary ----------------------------------------------------------------------------------------------


def _specialised(launch: Launch) -> tuple:
    """What Triton compiles for: constants, options, and of each argument what it specialises on."""

    def kind(value):
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, int):
            return value == 1, value % 16 == 0, abs(value) < 2**31
        return type(value)

    arguments = {name: kind(value) for name, value in launch.arguments.items()}
    return launch.kernel, arguments, launch.constants, launch.options


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("rows", [1, 16, 40, 197, 785, 800])
def test_the_small_problem_has_the_launchs_binary(name, rows, monkeypatch, device):
    """Also with every size below its limits, so that all are made smaller."""
    seen = []
    monkeypatch.setattr(Launch, "run", lambda launch: seen.append(launch))
    monkeypatch.setattr(self_check, "LONGEST", 96 if rows > 320 else 320)  # whole heads have their length built in
    monkeypatch.setattr(self_check, "ELEMENTS", 2**12)
    arguments = list(_arguments(name, device, rows=rows))
    variants = [arguments]
    if name == "compression_fwd":
        variants.append([t.t() if t is arguments[3] else t for t in arguments])  # a projection with other strides
    if "attention" in name:
        strided = [torch.randn(3, 2, rows, 32, device=device).half().transpose(1, 2), *arguments[1:]]
        variants.append(strided if name.endswith("fwd") else [strided[0], strided[0], *arguments[2:]])
    for given in variants:
        reference, body = self_check._REFERENCES[name], _body(name)
        small = reference.draw(self_check._Draw(device), *given)
        sizes = [sum(t.numel() for t in tensors if isinstance(t, Tensor)) for tensors in (small, given)]
        assert sizes[0] <= sizes[1]
        results = []
        for call in (given, small):
            seen.clear()
            body(*call)
            results.append([_specialised(launch) for launch in seen])
        assert results[0] == results[1]
        assert results[0] != []


@pytest.mark.parametrize(("images", "n_tokens"), [(4, 4), (3, 4), (16, 17), (24, 50), (5, 16), (100, 197), (64, 197)])
def test_a_batch_is_made_smaller_without_another_binary(images, n_tokens, monkeypatch):
    monkeypatch.setattr(self_check, "ELEMENTS", 2**10)
    arguments = list(_arguments("compression_fwd", torch.device("cpu")))
    arguments[0] = torch.randn(images, n_tokens, 64).half()
    small, *_ = self_check._REFERENCES["compression_fwd"].draw(self_check._Draw(torch.device("cpu")), *arguments)
    rows = len(small) * small.shape[1]
    assert (rows == 1, rows % 16 == 0) == (images * n_tokens == 1, images * n_tokens % 16 == 0)
    assert 1 <= len(small) <= images


def test_alike_keeps_what_triton_specialises_on():
    for size in range(1, 2000):
        small = alike(size, 320)
        assert small <= 320
        assert (small == 1, small % 16) == (size == 1, size % 16)


# --- operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_self_checked(name, launches, device):
    """Through PyTorch's dispatcher, as a model calls it."""
    written = ("out_ptr", "dw_ptr", "folded_ptr", "partial_ptr", "dx_ptr")
    launches.faults = [("", argument, _scale) for argument in written]
    with pytest.raises(UserError, match=f"the kernel crate_fast::{name} is wrong"):
        OPERATORS[name](*_arguments(name, device))


@pytest.mark.gpu
def test_a_capture_is_not_checked(launches):
    arguments, checked = _arguments("fold", "cuda"), self_checked(_body("fold"))
    _body("fold")(*arguments)  # compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        checked(*arguments)
    assert self_check._right == set()
    checked(*arguments)
    assert len(self_check._right) == 1
