"""The reference against the papers' equations, the public operators against the reference, bad input."""

import itertools
import math
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import agrees, tokens_and_gradient
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensorMode

import crate_fast
from crate_fast import SPIN_COUNT, cpu_ops, functional, reference
from crate_fast.accuracy import clear_of_threshold, gradients, judge
from crate_fast.backends import explain_backend
from crate_fast.functional import ista, linear, subspace_attention
from crate_fast.kernels import assuming_gpu
from crate_fast.reference import ista_reference, subspace_attention_reference

wide = partial(torch.randn, dtype=torch.float64)


def _attention_by_loops(w: Tensor, scale: float) -> Tensor:
    out = torch.zeros_like(w)
    for b, i, h in itertools.product(*map(range, w.shape[:3])):
        logits = [scale * float(w[b, i, h] @ key) for key in w[b, :, h]]
        weights = [math.exp(v - max(logits)) for v in logits]
        out[b, i, h] = sum(weight / sum(weights) * value for weight, value in zip(weights, w[b, :, h], strict=True))
    return out


def test_subspace_attention_and_mssa_equal_their_index_notation():
    w = wide(2, 5, 3, 4)
    for scale, expected in ((0.7, _attention_by_loops(w, 0.7)), (None, _attention_by_loops(w, 0.5))):
        torch.testing.assert_close(subspace_attention_reference(w, scale), expected, rtol=0, atol=1e-14)
    x, bases = wide(2, 5, 6), wide(3, 4, 6)  # bases: head, D, C
    output = wide(6, 12), wide(6)
    attended = _attention_by_loops(torch.einsum("bnc,hdc->bnhd", x, bases), 0.5).reshape(2, 5, 12)
    actual = reference.mssa_reference(x, bases.reshape(12, 6), *output, heads=3)
    expected = torch.einsum("bnk,ck->bnc", attended, output[0]) + output[1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    actual = reference.mssa_reference(x, bases.reshape(12, 6), None, None, heads=3)
    torch.testing.assert_close(actual, attended, rtol=0, atol=1e-13)


@pytest.mark.parametrize("threshold", ["relu", "soft"])
def test_ista_is_eq_7_column_by_column(threshold):
    x, dictionary, step_size, sparsity = wide(7, 5), wide(5, 5), 0.3, 0.2
    expected = torch.empty_like(x)
    for i, z in enumerate(x):  # z is the paper's column vector
        u = z + step_size * dictionary.T @ (z - dictionary @ z)
        expected[i] = (u - step_size * sparsity).clamp(min=0)
        if threshold == "soft":
            expected[i] -= (-u - step_size * sparsity).clamp(min=0)
    actual = ista_reference(x, dictionary, step_size, sparsity, threshold)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_the_residual_is_the_input_or_its_layer_norm():
    x, norm, gamma, beta, eye = wide(2, 3, 8), F.layer_norm, 0.5 + wide(8).abs(), wide(8), torch.eye(8).double()
    weights = {"0.norm.weight": gamma, "0.norm.bias": beta, "0.fn.qkv.weight": wide(8, 8)}
    weights |= {"0.fn.to_out.0.weight": 0 * eye, "0.fn.to_out.0.bias": 0 * beta}  # MSSA gives nothing
    weights |= {"1.norm.weight": eye.sum(0), "1.norm.bias": 0 * beta, "1.fn.weight": eye}
    for residual, h in (("released", x), ("paper", norm(x, (8,), gamma, beta))):
        actual = reference.layer_reference(x, weights, 2, residual=residual)
        torch.testing.assert_close(actual, (norm(h, (8,)) - 0.01).clamp(min=0), rtol=0, atol=1e-13)


def test_coding_rates_of_orthonormal_and_of_equal_tokens_by_hand():
    orthonormal, equal = torch.eye(4).double().reshape(1, 4, 1, 4), torch.ones(1, 4, 1, 4).double()
    for w, expected in ((orthonormal, 2 * math.log(1 + 1 / 0.01)), (equal, 0.5 * math.log(1 + 4 / 0.01))):
        assert reference.coding_rate_reference(w, 0.01).item() == pytest.approx(expected, rel=1e-12)


FLOAT32 = torch.float32
CASES = [  # [B, N, H, D], dtype, scale
    *((shape, FLOAT32, None) for shape in ((2, 1, 1, 32), (2, 15, 6, 64), (1, 16, 12, 48), (2, 17, 1, 80))),
    *((shape, FLOAT32, None) for shape in ((1, 65, 6, 128), (2, 197, 3, 64), (3, 197, 6, 64))),
    # by blocks of rows
    *((shape, FLOAT32, None) for shape in ((1, 256, 2, 48), (1, 785, 2, 64), (1, 1500, 1, 32))),
    *((shape, FLOAT32, 0.3) for shape in ((2, 64, 2, 32), (1, 600, 2, 32))),
    *(((2, 65, 3, 64), dtype, None) for dtype in (torch.float16, torch.bfloat16)),
    *(((3, 197, 3, 48), dtype, None) for dtype in (torch.float16, torch.bfloat16)),  # a group and a remainder
]


@pytest.fixture(params=["0", "1"], ids=["MKL", "oneDNN"])
def either_library(request, monkeypatch):
    """Run the test with the products of both libraries, on any processor."""
    monkeypatch.setenv("CRATE_FAST_ONEDNN", request.param)


with_either_library = pytest.mark.usefixtures("either_library")


def _check_attention(candidate, shape, dtype=FLOAT32, scale=None) -> bool:
    w, grad = tokens_and_gradient(shape, dtype, "cpu")
    return agrees(candidate, lambda t: subspace_attention_reference(t, scale), [w], "O dW", grad)


@with_either_library
@pytest.mark.parametrize(("shape", "dtype", "scale"), CASES, ids=str)
def test_subspace_attention_matches_the_reference(shape, dtype, scale, poisoned):
    assert _check_attention(partial(subspace_attention, scale=scale), shape, dtype, scale)


def test_long_attention_with_the_faster_library_for_each_product_is_right(monkeypatch, poisoned):
    """On Zen 4 forward uses MKL and backward oneDNN, above 1,024 tokens."""
    monkeypatch.delenv("CRATE_FAST_ONEDNN", raising=False)
    monkeypatch.setattr(cpu_ops, "onednn_suits_processor", lambda: True)
    monkeypatch.setattr(cpu_ops, "mkl_is_slow", lambda: False)
    assert _check_attention(subspace_attention, (1, 1500, 1, 32))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ordinary_attention_in_bf16_is_two_products(scale, monkeypatch):
    """Their backward pass takes an eighth of SDPA's time."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    inputs = [scale * torch.randn(2, 3, 197, 64).bfloat16() for _ in range(3)]
    grad = torch.randn(2, 3, 197, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # softmax stays in bf16
        candidate = functional.pytorch_attention(*inputs, 0.0, 0.125)
    assert candidate.dtype == torch.bfloat16
    explicit = lambda query, key, value: (0.125 * query @ key.mT).softmax(-1) @ value  # noqa: E731
    assert agrees(lambda *qkv: functional.pytorch_attention(*qkv, 0.0, 0.125), explicit, inputs, "O dQ dK dV", grad)


@with_either_library
def test_long_attention_is_deterministic_and_accurate_with_a_large_offset():
    w = torch.randn(1, 600, 1, 32) + 5.0  # logits near 140, most of which is common to all
    eager, truth = (subspace_attention_reference(tokens) for tokens in (w, w.double()))
    assert judge(subspace_attention(w), eager, truth).right
    w, grad = torch.randn(1, 785, 2, 64), torch.randn(1, 785, 2, 64)
    first, second = (gradients(subspace_attention, [w], grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@with_either_library
@pytest.mark.parametrize("n_tokens", [50, 600])
def test_subspace_attention_takes_any_strides(n_tokens):
    transposed = torch.randn(2, 3, n_tokens, 64).transpose(1, 2)
    sliced = torch.randn(2, n_tokens, 6, 128)[:, :, ::2, ::2]
    for w in (transposed, sliced, torch.randn(1, n_tokens, 1, 64).expand(2, n_tokens, 3, 64)):
        torch.testing.assert_close(subspace_attention(w), subspace_attention_reference(w), rtol=1e-4, atol=1e-5)
        grad = torch.ones(1, 1, 1, 1).expand(w.shape)  # the gradient of .sum()
        ours, theirs = (gradients(f, [w], grad)[1] for f in (subspace_attention, subspace_attention_reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def _check_ista(candidate, leading, width, dtype=torch.float32, threshold="relu") -> bool:
    x = torch.randn(*leading, width).to(dtype)
    dictionary = (torch.randn(width, width) / width**0.5).to(dtype)
    grad = clear_of_threshold(torch.randn_like(x), x, dictionary, shift=0.05, margin=16 * torch.finfo(dtype).eps)
    options = {"step_size": 0.1, "sparsity": 0.5, "threshold": threshold}
    functions = (partial(function, **options) for function in (candidate, ista_reference))
    return agrees(*functions, [x, dictionary], "y dx dD", grad)


@with_either_library
@pytest.mark.parametrize("threshold", ["relu", "soft"])
@pytest.mark.parametrize(
    ("leading", "width", "dtype"),
    [
        *(((2, 197), 96, FLOAT32), ((64,), 64, FLOAT32), ((3, 5), 48, FLOAT32), ((), 16, FLOAT32)),
        ((1000,), 768, FLOAT32),  # with the identity inside the product, the error was twice the allowed one
        *itertools.product([(2, 65), (7,)], [32], [torch.bfloat16, torch.float64]),
    ],
    ids=str,
)
def test_ista_matches_the_reference(leading, width, dtype, threshold):
    assert _check_ista(ista, leading, width, dtype, threshold)


ISTA_MUTANTS = {  # of step size 0.1 and sparsity 0.5
    "no second-order term": lambda x, d, **_: F.relu(x + 0.1 * (x @ d) - 0.05),
    "λ not scaled by η": lambda x, d, **_: ista_reference(x, d, 0.1, 5.0),
    "D for its transpose": lambda x, d, **_: ista_reference(x, d.t(), 0.1, 0.5),
    "step size off by 2 %": lambda x, d, **_: ista_reference(x, d, 0.102, 0.5),
    "no gradient through DᵀD": lambda x, d, **_: F.relu(x + 0.1 * (x @ d - x @ (d.t() @ d).detach()) - 0.05),
}


def test_the_check_rejects_wrong_operators():  # of attention: test_kernels.py
    for name, wrong in ISTA_MUTANTS.items():
        assert not _check_ista(wrong, (2, 197), 96), name


def test_gradients_agree_with_finite_differences():
    x, dictionary, w = (wide(shape, requires_grad=True) for shape in ((9, 4), (4, 4), (1, 5, 2, 3)))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda a, b: ista(a, b, 0.1, 0.1, threshold="soft"), (x, dictionary))
    assert torch.autograd.gradcheck(subspace_attention, (w,))


def test_operators_compile_without_graph_breaks_and_choose_the_same_backend():
    def chained(attend, sparsify):
        return lambda w, dictionary: sparsify(attend(w).flatten(-2), dictionary)

    graphs = []
    kept = lambda graph, example: graphs.append(graph) or aot_eager(graph, example)  # noqa: E731
    compiled = torch.compile(chained(subspace_attention, ista), fullgraph=True, backend=kept)
    inputs = [torch.randn(1, 50, 2, 32), torch.randn(64, 64) / 8]
    reference = chained(subspace_attention_reference, ista_reference)
    assert agrees(compiled, reference, inputs, "y dw dD", torch.randn(1, 50, 64))
    assert "crate_fast.cpu_subspace_attention" in str(graphs[0].graph)  # not PyTorch's

    def chosen(x: Tensor) -> Tensor:
        name, _ = explain_backend("cuda", dtype=torch.bfloat16, head_dim=64)
        return x + 1 if name == "triton" else x

    with assuming_gpu():
        assert torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]


def test_custom_operators_pass_opcheck(monkeypatch):
    monkeypatch.setenv("CRATE_FAST_ONEDNN", "1")
    shapes = (6, 5), (4, 5), (5, 5), 4, (1, 70, 2, 16)
    x, weight, square, bias, w = (torch.randn(shape, requires_grad=True) for shape in shapes)
    for relu in (False, True):
        for arguments in ((weight, bias, relu), (weight, None, relu), (square, None, relu, True)):
            torch.library.opcheck(cpu_ops.cpu_linear, (x, *arguments))
    torch.library.opcheck(cpu_ops.cpu_subspace_attention, (w, 0.25))
    torch.library.opcheck(cpu_ops.cpu_subspace_attention_backward, (torch.randn(w.shape), w.detach(), 0.25))


@with_either_library
@pytest.mark.parametrize("rows", [1, 3, 700, 5000])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_cpu_linear_and_its_gradients_agree_with_pytorch(rows, relu, residual):
    width = 48 if residual else 32
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((rows, 48), (width, 48), width)]
    ours = cpu_ops.cpu_linear(*inputs, relu, residual)
    theirs = F.linear(*inputs) + inputs[0] if residual else F.linear(*inputs)
    theirs = theirs.relu() if relu else theirs
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(theirs)
    found = [torch.autograd.grad(out, inputs, grad) for out in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_default_dtype_and_device_have_no_effect():
    x, dictionary, w = torch.randn(40, 8), torch.randn(8, 8), torch.randn(1, 300, 1, 8)
    expected = ista(x, dictionary), subspace_attention(w)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = ista(x, dictionary), subspace_attention(w)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_inference_under_a_meta_device_or_a_fake_mode_leaves_later_calls_right():
    x, dictionary = torch.randn(40, 12), torch.nn.Parameter(torch.randn(12, 12))  # no other test has this width
    with torch.no_grad(), torch.device("meta"):
        first = ista(x, dictionary)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert ista(x, dictionary).shape == x.shape
    with torch.no_grad():
        torch.testing.assert_close([first, ista(x, dictionary)], [ista_reference(x, dictionary.detach())] * 2)


@with_either_library
def test_linear_takes_any_leading_dimensions_and_a_bias_of_any_strides():
    weight, biases = torch.randn(4, 5), (torch.randn(4), torch.randn(8)[::2], torch.randn(1).expand(4))
    for shape, bias in itertools.product(((5,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5)), biases):
        x = torch.randn(shape)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(3x6 and 5x4\)"):
        linear(torch.randn(3, 6), weight)


INTEL, AMD = "GenuineIntel", "AuthenticAMD"
PROCESSORS = [  # (vendor, family, instructions, MKL available, variable), (uses oneDNN, only oneDNN, MKL is slow)
    ((INTEL, 6, "AVX512", True, None), (False, False, False)),
    ((AMD, 25, "AVX2", True, None), (False, False, False)),
    ((AMD, 25, "AVX512", True, None), (True, False, False)),  # Zen 4
    ((AMD, 26, "AVX512", True, None), (True, True, True)),  # Zen 5
    ((AMD, 0, "AVX512", True, None), (True, True, True)),
    (("", 0, "DEFAULT", True, None), (True, True, True)),
    *(((vendor, 6, "AVX2", False, None), (True, True, True)) for vendor in (INTEL, AMD)),
    *(((vendor, 6, "AVX512", True, "0"), (False, False, False)) for vendor in (INTEL, AMD)),
    *(((vendor, 6, "AVX512", True, "1"), (True, True, False)) for vendor in (INTEL, AMD)),
    ((AMD, 25, "AVX2", True, "1"), (True, True, False)),
    ((AMD, 26, "AVX512", True, "0"), (False, False, True)),
]


@pytest.mark.parametrize(("machine", "expected"), PROCESSORS)
def test_the_variable_or_else_the_processor_chooses_the_library(machine, expected, monkeypatch):
    vendor, family, capability, mkl, choice = machine
    for module, name, value in (
        (cpu_ops, "processor_vendor", vendor),
        (cpu_ops, "processor_family", family),
        (torch.backends.cpu, "get_cpu_capability", capability),
        (torch.backends.mkl, "is_available", mkl),
    ):
        monkeypatch.setattr(module, name, lambda value=value: value)
    monkeypatch.setattr(cpu_ops, "mkl_is_slow", cpu_ops.mkl_is_slow.__wrapped__)  # without its cache
    monkeypatch.delenv("CRATE_FAST_ONEDNN", raising=False)
    if choice is not None:
        monkeypatch.setenv("CRATE_FAST_ONEDNN", choice)
    assert (cpu_ops.uses_onednn(), cpu_ops.uses_onednn_alone(), cpu_ops.mkl_is_slow()) == expected
    monkeypatch.setenv("CRATE_FAST_ONEDNN", "yes")
    with pytest.raises(ValueError, match="CRATE_FAST_ONEDNN='yes'"):
        cpu_ops.uses_onednn()


def test_the_processor_is_recognised_from_the_system(monkeypatch):
    stated = {"model name": "AMD EPYC", "cpu family": "25", "model": "1", "flags": "fpu avx2 avx512f"}
    monkeypatch.setattr(cpu_ops, "_cpuinfo", lambda field: stated.get(field, ""))
    assert (cpu_ops.processor_family(), cpu_ops.processor_name()) == (25, "AMD EPYC (family 25, model 1)")
    assert not cpu_ops.multiplies_bf16()
    for field, flags in (("flags", "fpu avx512_bf16"), ("flags", "amx_bf16 amx_int8"), ("Features", "asimd bf16")):
        stated = {field: flags}
        assert cpu_ops.multiplies_bf16()
    stated = {}  # ARM has none of these fields, Windows no file
    assert cpu_ops.multiplies_bf16()  # assumed where unknown
    assert cpu_ops.processor_name() == (cpu_ops.platform.processor() or cpu_ops.platform.machine())
    monkeypatch.setattr(cpu_ops.platform, "processor", lambda: "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD")
    assert cpu_ops.processor_family() == 26


def test_under_autocast_only_the_product_is_in_bf16():
    x, dictionary = torch.randn(2, 65, 32), torch.randn(32, 32) / 6
    with torch.autocast("cpu", torch.bfloat16):
        y = ista(x, dictionary, 0.1, 0.1)
        attended = subspace_attention(torch.randn(1, 9, 2, 16))
    assert y.dtype == attended.dtype == torch.float32  # as SDPA's: its input is not the result of a product
    truth = ista_reference(x.double(), dictionary.double())
    error = (y - truth).abs().max().item()
    change = (truth - x.double().relu()).abs().max().item()  # the part in bf16, with relative precision 2⁻⁸
    assert 1e-6 < error < 2**-7 * change


W, X = torch.zeros(1, 2, 3, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: subspace_attention(W[0]), ValueError, r"w has shape \(2, 3, 4\): pass \[B, N, H, D\] with"),
        (lambda: subspace_attention([1.0]), TypeError, "w is a list"),
        (lambda: subspace_attention(W.long()), TypeError, "w is torch.int64"),
        (lambda: subspace_attention(W, dropout_p=1.0), ValueError, "dropout_p=1.0"),
        (lambda: subspace_attention(W, backend="cuda"), ValueError, "backend='cuda'.*'triton'"),
        (lambda: subspace_attention(W.double(), backend="triton"), ValueError, "cannot run"),
        (lambda: ista(X, torch.zeros(5, 5)), ValueError, r"\[4, 4\]"),
        (lambda: ista(X, torch.zeros(4, 4).double()), TypeError, "float64 and x torch.float32"),
        (lambda: ista(X, torch.zeros(4, 4), threshold="hard"), ValueError, "threshold='hard'.*'soft'"),
        (lambda: ista(X, torch.zeros(4, 4), sparsity=float("nan")), ValueError, "sparsity=nan"),
        (lambda: ista(X, torch.zeros(4, 4, device="meta")), ValueError, "dictionary is on meta"),
        (lambda: subspace_attention(W, -1.0), ValueError, "scale=-1.0"),
        (lambda: subspace_attention(W, float("inf")), ValueError, "scale=inf: give a finite number"),
        (lambda: ista(X, torch.zeros(4, 4), norm=(torch.zeros(3), torch.zeros(4), 0.0)), ValueError, "weight"),
        (lambda: ista(X, torch.zeros(4, 4), norm=(torch.zeros(4), None, 0.0)), TypeError, "bias"),
    ],
)
def test_bad_input_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


@with_either_library
@pytest.mark.parametrize("threshold", ["relu", "soft"])
@pytest.mark.parametrize("n_tokens", [4, 300])  # the number chooses the form of ISTA
def test_a_nan_is_not_hidden(n_tokens, threshold):
    x = torch.randn(n_tokens, 64)
    x[1, 0] = math.nan
    y = ista(x, torch.randn(64, 64) / 8, threshold=threshold)
    assert y.isnan().nonzero()[:, 0].tolist() == [1] * 64


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "9"}, "9"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_openmps_spinning_is_bounded_unless_the_user_sets_it(chosen, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    first, rest, _ = Path(crate_fast.__file__).read_text().partition("_IS_COMMAND =")
    assert rest
    monkeypatch.delitem(sys.modules, "torch")  # as if this package were imported first
    exec(first, {})
    assert os.environ.get("GOMP_SPINCOUNT", "None") == expected
