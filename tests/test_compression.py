"""The first half of a layer on kernels: the output map, LayerNorm, autograd, layers, hooks."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import opcheck_tests, problem_is_right
from torch import Tensor

from crate_fast import CRATE, functional, triton_ops
from crate_fast.accuracy import token_scale
from crate_fast.functional import compress
from crate_fast.kernels import product
from crate_fast.kernels.launch import TABLE, Tile, architecture, find
from crate_fast.probes import Problem
from crate_fast.reference import compress_reference

EPS, HALF, SINGLE = 1e-5, torch.float16, torch.float32
_ours = partial(compress, heads=3, backend="triton")
_reference = partial(compress_reference, heads=3)
both_residuals = pytest.mark.parametrize("residual", ["released", "paper"])


def test_the_output_map_of_half_precision_tokens_adds_up_in_fp32(device, poisoned):
    tokens, output = torch.randn(197, 80, device=device).half(), torch.randn(96, 80, device=device).half()
    x, bias = torch.randn(197, 96, device=device), torch.randn(96, device=device)
    h = product.product(tokens, output, x, Tile(32, 128, 4, 1, 32, persistent=True), bias=bias)
    assert h.dtype == torch.float32
    truth = x + F.linear(*(tensor.double() for tensor in (tokens, output, bias)))
    assert ((h - truth).norm() / truth.norm()).item() <= 1e-6


@pytest.fixture(params=["0", "1"], ids=["PyTorch's output map", "fused output map"])
def fused_map(request, monkeypatch):
    """Both implementations of the output map; the tile table has rows for half precision only."""
    monkeypatch.setenv("CRATE_FAST_FUSED_PRODUCTS", request.param)
    return request.param == "1"


def _inputs(device, dtype=SINGLE, shape=(2, 17)) -> list[Tensor]:
    """x, γ, β, U, V, b for three heads of 16."""
    shapes = (*shape, 48), (48,), (48,), (48, 48), (48, 48), (48,)
    factors = (1.0, 0.3, 0.3, token_scale(shape[1], 16) / 48**0.5, 48**-0.5, 0.3)
    drawn = zip(shapes, factors, (0.5, 1.0, 0.0, 0.0, 0.0, 0.0), strict=True)
    return [(factor * torch.randn(s) + offset).to(dtype).to(device).requires_grad_() for s, factor, offset in drawn]


CASES = [  # [B, N], dtype, autocast, fused output map, which has no tile in fp32
    *itertools.product([(1, 1), (2, 65)], [SINGLE], [None], "1"),
    *itertools.product([(1, 1), (2, 65)], [HALF], [None], "01"),
    *itertools.product([(8, 33)], [SINGLE], [HALF], "01"),
]


@both_residuals
@pytest.mark.parametrize(("shape", "dtype", "autocast", "fused_map"), CASES, indirect=["fused_map"], ids=str)
def test_compress_agrees_with_the_reference(shape, dtype, autocast, residual, fused_map, device, poisoned):
    functions = (partial(function, residual=residual) for function in (_ours, _reference))
    inputs = _inputs(device, dtype, shape)
    grad = torch.randn_like(inputs[0])
    assert problem_is_right(Problem(*functions, inputs, grad, "h dx dγ dβ dU dV db", autocast))


@both_residuals
def test_transposed_tokens_give_the_same_bits(residual, device):
    x, *weights = _inputs(device)
    found = []
    for tokens in (x.detach(), x.detach().mT.contiguous().mT):
        with torch.autocast(device.type, HALF):
            h = _ours(tokens.requires_grad_(), *weights, residual=residual)
        found.append((h, *torch.autograd.grad(h.sum(), [tokens, *weights])))
    assert all(map(torch.equal, *found))


def test_the_variable_or_else_the_tile_table_chooses_the_output_map(device, monkeypatch):
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "0")  # it knows kernels by name
    monkeypatch.delenv("CRATE_FAST_FUSED_PRODUCTS", raising=False)
    used, plain = [], product.product
    monkeypatch.setattr(product, "product", lambda *a, **k: used.append(a[3]) or plain(*a, **k))
    inputs, key = _inputs(device, HALF), ("output_map", "half", architecture(device))
    tile = find(key[0], device, key[1])
    for variable, chosen, fused in ((None, True, True), (None, False, False), ("1", False, True), ("0", True, False)):
        monkeypatch.setitem(TABLE, key, replace(tile, chosen=chosen))
        if variable is not None:
            monkeypatch.setenv("CRATE_FAST_FUSED_PRODUCTS", variable)
        used.clear()
        _ours(*inputs)
        assert used == [product.fitted_product(TABLE[key], 48)] * fused
    monkeypatch.setenv("CRATE_FAST_FUSED_PRODUCTS", "1")
    _ours(*_inputs(device))
    assert used == []  # fp32 has no row


WANTED = {False: [[True] * 6, [*[False] * 3, True, False, True]]}
WANTED[True] = [[True] * 6, [True, *[False] * 5], [False, True, *[False] * 4]]


@pytest.mark.parametrize("skip_normed", [False, True])
def test_opcheck(skip_normed, device):
    inputs, options = _inputs(device, HALF), (3, 0.25, EPS, HALF, skip_normed)
    traced = opcheck_tests([skip_normed])  # test_fused.py compiles a model of the other form
    torch.library.opcheck(triton_ops.compression_fwd, (*inputs, *options), test_utils=traced)
    x, *weights = (t.detach() for t in inputs)
    h, normed, _, *kept = triton_ops.compression_fwd(x, *weights, *options)
    arguments = (h, *weights[:4], normed, *kept, None, None, 0.25, skip_normed, HALF, HALF)  # all but the bias
    for wanted in WANTED[skip_normed]:
        torch.library.opcheck(triton_ops.compression_bwd, (*arguments, wanted), test_utils=opcheck_tests(wanted))


MODEL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 48, "depth": 2, "heads": 3, "dim_head": 16}


def _count(monkeypatch, name: str) -> list:
    calls, plain = [], getattr(functional, name)

    def counted(*arguments, **options):
        if name == "compress" or "norm" in options:
            calls.append(1)
        return plain(*arguments, **options)

    monkeypatch.setattr(functional, name, counted)
    return calls


WRONG_INPUTS = [
    (0, lambda t: t[0], ValueError, "x has shape"),
    (1, lambda t: t[1:], ValueError, "weight has shape"),
    (2, lambda t: None, TypeError, "bias is a NoneType"),
    (0, lambda t: t[:, :0], ValueError, "x has shape"),
    (3, lambda t: t[1:], ValueError, "projection has shape"),
    (3, lambda t: t[:0], ValueError, "projection has shape"),
    (4, lambda t: t.t()[1:], ValueError, "output has shape"),
    (5, lambda t: t[1:], ValueError, "output_bias has shape"),
    (1, lambda t: t.to("meta"), ValueError, "weight is on meta and x on"),
    (3, lambda t: t.half(), TypeError, "projection is torch.float16 and x torch.float32"),
]


def test_wrong_inputs_are_errors(device):
    for index, change, error, message in WRONG_INPUTS:
        inputs = _inputs(device)
        inputs[index] = change(inputs[index])
        for backend in ("triton", "torch"):
            with pytest.raises(error, match=message):
                compress(*inputs, 3, backend=backend)
    with pytest.raises(ValueError, match="heads=0: give a positive integer"):
        compress(*_inputs(device), 0)


def test_a_layers_halves_are_fused_unless_a_module_has_a_hook(device, monkeypatch):
    model = CRATE(**(MODEL | {"depth": 1}), backend="triton").to(device)
    images = torch.randn(1, 3, 16, 16, device=device)
    calls = {half: _count(monkeypatch, half) for half in ("compress", "ista")}
    expected = model(images)
    assert calls == {"compress": [1], "ista": [1]}
    attention, sparsifier = model.transformer.layers[0]
    parts = (attention, attention.norm, attention.fn, attention.fn.qkv, *attention.fn.to_out)
    hooks = [("compress", module, "forward_hook") for module in parts]
    hooks += [("ista", module, "forward_hook") for module in (sparsifier.norm, sparsifier.fn)]
    hooks += [("ista", sparsifier.fn, "forward_pre_hook"), ("ista", sparsifier.fn, "full_backward_hook")]
    for half, module, kind in hooks:
        calls[half].clear()
        fired = []
        handle = getattr(module, f"register_{kind}")(lambda *_, fired=fired: fired.append(1))
        out = model(images)
        if kind == "full_backward_hook":
            out.sum().backward()
        handle.remove()
        assert fired == [1]
        assert calls[half] == []
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


FUSED = [  # options, fused layers in training and in evaluation
    *((options, 2, 2) for options in ({}, {"residual": "paper"}, {"sparsifier": "mlp"})),
    *((options, 0, 0) for options in ({"attention": "mhsa"}, {"heads": 1, "dim_head": 48})),  # no output map
    ({"proj_drop_rate": 0.1}, 0, 2),
    ({"drop_path_rate": 0.5}, 1, 2),  # the first layer's rate is 0
]


@pytest.mark.parametrize(("options", "training", "evaluation"), FUSED, ids=str)
def test_which_layers_are_fused(options, training, evaluation, device, monkeypatch):
    found = _count(monkeypatch, "compress")
    model, images = CRATE(**(MODEL | options), backend="triton").to(device), torch.randn(1, 3, 16, 16, device=device)
    model(images)
    assert len(found) == training
    model.eval()(images)
    assert len(found) == training + evaluation
