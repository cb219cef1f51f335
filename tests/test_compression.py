"""The first half of a layer on kernels: the products around attention, LayerNorm's passes, autograd, layers, hooks.

On a GPU, or on the CPU through Triton's interpreter, where half precision means float16.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import agrees, all_within_twice_eager, mutant, token_scale
from torch import Tensor

from crate_fast import CRATE, functional, fused_compression
from crate_fast.functional import compress, norm_ista
from crate_fast.kernels import layer_norm, product_common, projections, weight_gradient
from crate_fast.kernels.tiles import TABLE, Tile
from crate_fast.reference import mssa_reference

EPS = 1e-5
SMALL = Tile(32, 32, 4, 1, 32)
SIZES = [(1, 32, 32), (15, 48, 64), (197, 96, 80), (130, 100, 48), (64, 33, 70)]  # (M, C, J)
TILES = sorted({(t.block_m, t.block_n, t.block_k) for (kernel, *_), t in TABLE.items() if "product" in kernel})
DTYPES = [torch.float32, torch.float16]


def _problem(size, dtype, device) -> dict[str, Tensor]:
    rows, width, inner = size
    drawn = {
        "x": torch.randn(rows, width) * 2 + 1,
        "gamma": 1 + 0.3 * torch.randn(width),
        "beta": 0.3 * torch.randn(width),
        "projection": torch.randn(inner, width) / width**0.5,
        "tokens": torch.randn(rows, inner),
        "output": torch.randn(width, inner) / inner**0.5,
        "bias": torch.randn(width),
        "grad": torch.randn(rows, inner),
    }
    return {name: tensor.to(dtype).to(device) for name, tensor in drawn.items()}


def _normed(p: dict[str, Tensor]) -> Tensor:
    return F.layer_norm(p["x"], p["x"].shape[-1:], p["gamma"], p["beta"], EPS)


def _products(p: dict[str, Tensor], tile=SMALL, front=projections, behind=projections, back=weight_gradient) -> list:
    norm = layer_norm.Norm(*layer_norm.row_statistics(p["x"], EPS), p["gamma"], p["beta"])
    w = front.norm_product(p["x"], norm, p["projection"], tile)
    gradient = back.weight_gradient(p["x"], p["grad"], None, p["grad"].dtype, norm, tile).to(w.dtype)
    h, mean, rstd = behind.product_residual(p["tokens"], p["output"], p["bias"], p["x"], EPS, tile)
    return [w, gradient, h, mean, rstd]


def _eager(p: dict[str, Tensor]) -> list:
    h = p["x"] + F.linear(p["tokens"], p["output"], p["bias"])
    return [F.linear(_normed(p), p["projection"]), _normed(p).t() @ p["grad"], h]


def _are_right(p: dict[str, Tensor], **options) -> bool:
    """Products and h by the rule of two; the statistics against those of h as it was written."""
    *found, mean, rstd = _products(p, **options)
    truth = _eager({name: tensor.double() for name, tensor in p.items()})
    right = all_within_twice_eager(found, _eager(p), truth, "W dUᵀ h")
    h = found[-1].double()
    wanted = h.mean(1), (h.var(1, correction=0) + EPS).rsqrt()
    size = h.square().mean(1).sqrt()
    errors = (mean - wanted[0]).abs() / size, (rstd / wanted[1] - 1).abs()
    print("mean, rstd:", *(error.max().item() for error in errors))
    return right and all(bool((error < 1e-5).all()) for error in errors)


# --- the kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, dtype, device, poisoned):
    assert _are_right(_problem(size, dtype, device))


@pytest.mark.parametrize("blocks", TILES, ids=str)
def test_every_tile_of_the_table(blocks, device, poisoned):
    tile = Tile(*blocks[:2], num_warps=8, num_stages=1, block_k=blocks[2])
    assert _are_right(_problem((197, 192, 160), torch.float16, device), tile=tile)


def test_half_precision_products_of_fp32_tokens(device, poisoned):
    """As under autocast: what is multiplied is fp16, the residual, the bias and h stay fp32."""
    p = _problem((197, 96, 80), torch.float32, device)
    low = p | {name: p[name].half() for name in ("projection", "tokens", "output", "grad")}
    w, gradient, h, mean, rstd = _products(low)
    assert (w.dtype, h.dtype) == (torch.float16, torch.float32)
    exact = {name: tensor.double() for name, tensor in low.items()}
    for found, truth, bound in zip((w, gradient, h), _eager(exact), (1e-3, 1e-3, 1e-6), strict=False):
        assert (found - truth).norm() <= bound * truth.norm()
    wanted = layer_norm.row_statistics(h, EPS)
    torch.testing.assert_close((mean, rstd), wanted, rtol=1e-5, atol=1e-6)


def test_without_a_layer_norm_behind(device):
    p = _problem((65, 48, 32), torch.float32, device)
    h, mean, rstd = projections.product_residual(p["tokens"], p["output"], p["bias"], p["x"], None, SMALL)
    assert torch.equal(h, _products(p)[2])
    assert mean.numel() == rstd.numel() == 0


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_statistics_of_large_offsets(offset, device, poisoned):
    """Sums of squares about zero would have lost the variance."""
    p = _problem((64, 96, 32), torch.float32, device)
    assert _are_right(p | {"bias": p["bias"] + offset})


def test_products_are_bit_equal_on_a_rerun(device, poisoned):
    p = _problem((300, 96, 64), torch.float16, device)
    for first, second in zip(_products(p), _products(p), strict=True):
        assert torch.equal(first, second)


def test_strided_matrices(device, poisoned):
    p = _problem((64, 96, 48), torch.float32, device)
    assert _are_right({name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in p.items()})


def test_a_nan_row_is_not_hidden(device):
    p = _problem((64, 48, 32), torch.float32, device)
    p["x"][5, 0] = torch.nan
    w, gradient, h, _, rstd = _products(p)
    assert w[5].isnan().all()
    assert gradient.isnan().any()
    assert h[5, 0].isnan()
    assert rstd[5].isnan()
    assert rstd[4].isfinite()


def test_no_rows(device):
    p = _problem((3, 32, 48), torch.float32, device)
    w, gradient, h, mean, rstd = _products(p | {name: p[name][:0] for name in ("x", "tokens", "grad")})
    assert (w.shape, h.shape, mean.shape, rstd.shape) == ((0, 48), (0, 32), (0,), (0,))
    assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_normalize(size, dtype, device, poisoned):
    p = _problem(size, dtype, device)
    normed, mean, rstd = layer_norm.normalize(p["x"], p["gamma"], p["beta"], EPS, dtype)
    truth = _normed({name: tensor.double() for name, tensor in p.items()})
    assert all_within_twice_eager([normed], [_normed(p)], [truth], "LN")
    for found, expected in zip((mean, rstd), layer_norm.row_statistics(p["x"], EPS), strict=True):
        assert torch.equal(found, expected)


MUTANTS = {  # (module, the caller that imports it or None, what the kernel says, what the mutant says)
    "no residual": ("behind", "acc += load_tile(x_ptr", "acc += 0.0 * load_tile(x_ptr"),
    "no bias": ("behind", "acc += load_channels(bias_ptr", "acc += 0.0 * load_channels(bias_ptr"),
    "the weights not transposed": (
        "front",
        "weight = load_tile(weight_ptr, offs_n, offs_k, OUT_WIDTH, WIDTH, BLOCK_K)\n        acc = tl.dot(x.to(",
        "weight = load_tile(weight_ptr, offs_k, offs_n, OUT_WIDTH, WIDTH, BLOCK_K)\n        acc = tl.dot(x.to(",
    ),
    "not normalised": ("front", "n_rows, WIDTH, BLOCK_K, True)", "n_rows, WIDTH, BLOCK_K, False)"),
    "the padding in the mean": ("behind", "count = tl.minimum(BLOCK_N, WIDTH - start_n)", "count = BLOCK_N"),
    "the padding in the squares": (
        "behind",
        "centred = tl.where(mask_n[None, :], values - mean[:, None], 0.0)",
        "centred = values - mean[:, None]",
    ),
    "statistics of the product alone": (
        "behind",
        "values = tl.where(mask_n[None, :], h.to(tl.float32), 0.0)",
        "values = tl.where(mask_n[None, :], h.to(tl.float32) * 0.5, 0.0)",
    ),
    "only the first share's mean": (
        "shares",
        "offs_m, mask=mask, other=0.0) * count / WIDTH",
        "offs_m, mask=mask & (share == 0), other=0.0) * count / WIDTH",
    ),
    "what the shares' means differ by": (
        "shares",
        "squares += offset * offset * count",
        "squares += 0.0 * offset * offset * count",
    ),
    "the last rows of a split": (
        "back",
        "start + rows_per_split, n_rows)",
        "start + rows_per_split, n_rows) - BLOCK_K",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, device, tmp_path):
    part, *mutation = MUTANTS[name]
    modules = {"front": projections, "behind": projections, "back": weight_gradient, "shares": layer_norm}
    changed = mutant(modules[part], mutation, tmp_path, user=projections if part == "shares" else None)
    part = "behind" if part == "shares" else part
    assert not _are_right(_problem((197, 80, 48), torch.float32, device), **{part: changed})


def test_the_skip_connections_gradient(device):
    p = _problem((197, 96, 96), torch.float32, device)
    norm = layer_norm.Norm(*layer_norm.row_statistics(p["x"], EPS), p["gamma"], p["beta"])
    alone, *_ = layer_norm.backward(p["grad"], p["x"], norm)
    together, *_ = layer_norm.backward(p["grad"], p["x"], norm, p["tokens"])
    torch.testing.assert_close(together, alone + p["tokens"])


# --- the operator -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["0", "1"], ids=["PyTorch's products", "fused products"])
def products(request, monkeypatch):
    """Both ways through the products; their own kernels have rows for half precision alone."""
    monkeypatch.setenv("CRATE_FAST_FUSED_PRODUCTS", request.param)
    return request.param == "1"


def _inputs(device, dtype=torch.float32, shape=(2, 17), width=48, heads=3, head_dim=16) -> list[Tensor]:
    """x, γ, β, U, V, b."""
    inner = heads * head_dim
    projection = torch.randn(inner, width) * token_scale(shape[1], head_dim) / width**0.5
    drawn = (
        torch.randn(*shape, width) + 0.5, 1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width), projection,
        torch.randn(width, inner) / inner**0.5, 0.3 * torch.randn(width),
    )  # fmt: skip
    return [tensor.to(dtype).to(device).requires_grad_() for tensor in drawn]


def _reference(x, weight, bias, projection, output, output_bias, heads=3) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return x + mssa_reference(normed, projection, output, output_bias, heads)


def _ours(*inputs, heads=3, **options) -> Tensor:
    return compress(*inputs, heads, backend="triton", **options)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17), (1, 1), (3, 65)], ids=str)
def test_the_function_is_the_reference(shape, dtype, products, device, poisoned):
    assert agrees(_ours, _reference, _inputs(device, dtype, shape), "h dx dγ dβ dU dV db")


def test_the_fused_products_run_where_they_are_asked_for(products, device, monkeypatch):
    calls = []
    for name in ("norm_product", "product_residual"):
        plain = getattr(projections, name)
        monkeypatch.setattr(projections, name, lambda *a, f=plain, n=name: calls.append(n) or f(*a))
    plain_gradient = weight_gradient.weight_gradient
    monkeypatch.setattr(weight_gradient, "weight_gradient", lambda *a: calls.append("gradient") or plain_gradient(*a))
    _ours(*_inputs(device, torch.float16)).sum().backward()
    assert calls == (["norm_product", "product_residual", "gradient"] if products else [])


def test_the_table_chooses(device, monkeypatch):
    monkeypatch.delenv("CRATE_FAST_FUSED_PRODUCTS", raising=False)
    x = torch.zeros(4, 48, device=device)
    for kernel in ("norm_product", "norm_product_gradient", "product_residual"):
        (chosen,) = {tile.chosen for (name, *_), tile in TABLE.items() if name == kernel}
        found = fused_compression._tile(kernel, x, torch.float16, 48)
        assert found == (None if not chosen else product_common.fitted(found, 48))
    assert fused_compression._tile("product_residual", x, torch.float32, 48) is None


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_statistics_for_the_next_layer_norm(backend, products, device):
    inputs = _inputs(device, torch.float16)
    h, statistics = compress(*inputs, 3, next_eps=EPS, backend=backend)
    if backend == "torch":
        assert statistics is None
        return
    torch.testing.assert_close(statistics, layer_norm.row_statistics(h.flatten(0, 1), EPS), rtol=1e-5, atol=1e-5)
    assert compress(*inputs, 3, backend=backend)[1] is None
    dictionary = torch.randn(48, 48, dtype=h.dtype, device=device) / 7
    given, found = (
        norm_ista(h, inputs[1], inputs[2], dictionary, backend=backend, statistics=known)
        for known in (statistics, None)
    )
    torch.testing.assert_close(given, found, rtol=2e-3, atol=2e-3)


def test_opcheck(products, device):
    inputs = _inputs(device, torch.float16)
    torch.library.opcheck(fused_compression.compression_fwd, (*inputs, 3, 0.25, EPS, 1e-6))
    x, gamma, beta, *_ = inputs = [tensor.detach() for tensor in inputs]
    outputs = fused_compression.compression_fwd(*inputs, 3, 0.25, EPS, None)
    assert outputs[1].numel() == outputs[2].numel() == 0
    _, _, _, mean, rstd, w, *_ = outputs
    rows = x.flatten(0, 1)
    torch.library.opcheck(
        fused_compression.projection_bwd, (w.flatten(2).flatten(0, 1), rows, mean, rstd, gamma, beta, EPS)
    )


def test_only_the_gradients_asked_for(device, monkeypatch):
    inputs = _inputs(device)
    refuse = lambda *_: pytest.fail("not asked for")  # noqa: E731
    frozen = [tensor.detach() for tensor in inputs]
    for name in ("projection_bwd", "layer_norm_bwd", "subspace_attention_bwd"):
        monkeypatch.setattr(fused_compression, name, refuse)
    for index in (4, 5):  # V and b need none of these
        wanted = [*frozen[:index], inputs[index], *frozen[index + 1 :]]
        _ours(*wanted).sum().backward()
        assert inputs[index].grad is not None
    assert all(inputs[index].grad is None for index in range(4))


def test_activations_that_backward_keeps(products, device):
    """x, W, O, the log-sum-exp, two numbers a row, and the weights: nothing normalised, no logits."""
    inputs = _inputs(device, torch.float16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        h = _ours(*inputs)
    tokens, inner, rows = inputs[0].numel(), 48 * 34, 34
    weights = sum(inputs[index].numel() for index in (1, 2, 3, 4))
    assert sum(t.numel() for t in kept) == weights + tokens + 2 * inner + 3 * rows + 2 * rows
    assert h.requires_grad


def test_second_derivatives_are_refused(device):
    x, *rest = _inputs(device)
    (grad,) = torch.autograd.grad(_ours(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, lambda t: t[0], ValueError, "x has shape"),
        (1, lambda t: t[1:], ValueError, "weight has shape"),
        (2, lambda t: None, TypeError, "bias is a NoneType"),
        (3, lambda t: t[1:], ValueError, "projection has shape"),
        (4, lambda t: t.t()[1:], ValueError, "output has shape"),
        (5, lambda t: t[1:], ValueError, "output_bias has shape"),
    ],
)
def test_clear_errors(index, change, error, message, device):
    inputs = _inputs(device)
    inputs[index] = change(inputs[index])
    for backend in ("triton", "torch"):
        with pytest.raises(error, match=message):
            compress(*inputs, 3, backend=backend)


# --- in a layer ---------------------------------------------------------------------------------------------------

MODEL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 48, "depth": 2, "heads": 3, "dim_head": 16}


def _model(device, backend="triton", **options) -> CRATE:
    torch.manual_seed(1)
    return CRATE(**MODEL, backend=backend, **options).to(device)


def _count(monkeypatch, name: str) -> list:
    calls, plain = [], getattr(functional, name)
    monkeypatch.setattr(functional, name, lambda *a, **k: calls.append(k) or plain(*a, **k))
    return calls


def test_a_layer_runs_as_one_until_somebody_hooks(device, monkeypatch):
    model = _model(device)
    images = torch.randn(2, 3, 16, 16, device=device)
    calls, steps = _count(monkeypatch, "compress"), _count(monkeypatch, "norm_ista")
    expected = model(images)
    assert len(calls) == MODEL["depth"]
    assert all(step["statistics"] is not None for step in steps)
    attention, sparsifier = model.transformer.layers[0]
    for module in (attention, attention.norm, attention.fn, attention.fn.qkv, *attention.fn.to_out):
        calls.clear()
        fired = []
        handle = module.register_forward_hook(lambda *_, fired=fired: fired.append(1))
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        handle.remove()
        assert fired == [1]
        assert len(calls) == MODEL["depth"] - 1
    steps.clear()
    doubled = sparsifier.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    model(images)
    doubled.remove()
    assert steps[0]["statistics"] is None  # what the hook returns has others


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 2),
        ({"dropout": 0.1}, 0),
        ({"residual": "paper"}, 0),
        ({"attention": "mhsa"}, 0),
        ({"sparsifier": "mlp"}, 2),
        ({"heads": 1, "dim_head": 48}, 0),  # no output map
    ],
    ids=str,
)
def test_which_layers_run_as_one(options, calls, device, monkeypatch):
    found = _count(monkeypatch, "compress")
    torch.manual_seed(1)
    model = CRATE(**(MODEL | options), backend="triton").to(device)
    model(torch.randn(1, 3, 16, 16, device=device))
    assert len(found) == calls
    found.clear()
    model.eval()(torch.randn(1, 3, 16, 16, device=device))
    assert len(found) == (2 if "dropout" in options else calls)


def test_a_layer_under_autocast(products, device):
    model, plain = _model(device), _model(device, "torch")
    images = torch.randn(2, 3, 16, 16, device=device)
    with torch.autocast(device.type, torch.float16):
        out = model(images)
    out.float().square().sum().backward()
    expected = plain(images)
    expected.square().sum().backward()
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() <= 2e-2 * q.grad.norm() + 1e-6, name


def test_compiled(products, device):
    inputs = _inputs(device, torch.float16)
    function = partial(_ours, next_eps=EPS)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for call in (function, compiled):
        for tensor in inputs:
            tensor.grad = None
        call(*inputs).sum().backward()
        found = [tensor.grad.clone() for tensor in inputs]
        if call is function:
            expected = found
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
