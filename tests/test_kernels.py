"""The kernels against the float64 reference: attention by rows and by whole heads, ISTA, LayerNorm and the weights.

fp32 products are exact in Triton's interpreter, which thus tests the algebra, also of whole heads, which a GPU runs
in half precision only. A GPU skips fp32: its products are TF32, which `crate-fast check` judges.
"""

import itertools
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import all_within_twice_eager, is_right, mutant, skip_tf32, tokens_and_gradient
from torch import Tensor

from crate_fast import functional, kernels
from crate_fast.accuracy import clear_of_threshold, gradients
from crate_fast.kernels import attention, folding, ista, layer_norm, product, whole_head
from crate_fast.kernels.launch import TABLE, Tile, cdiv, lookup, precision
from crate_fast.probes import norm_ista
from crate_fast.reference import ista_reference, norm_ista_reference, subspace_attention_reference

HALF, SINGLE = torch.float16, torch.float32
FORWARD, BACKWARD = Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)  # tiles of whole heads
ROW_TILES = sorted({(t.block_m, t.block_n) for (kernel, *_), t in TABLE.items() if kernel.startswith("attention")})
PRODUCT_TILES = sorted(  # of each block of results, that with the largest block_k
    {t[:2]: t for t in sorted((t.block_m, t.block_n, t.block_k) for t in TABLE.values() if t.block_k)}.values()
)


def by_rows(w: Tensor, grad: Tensor, scale: float | None = None, module=attention, tile: Tile | None = None) -> list:
    scale = w.shape[-1] ** -0.5 if scale is None else scale
    size = (w.device, precision(w.dtype), attention.block_d(w))
    out, lse = module.forward(w, scale, tile or lookup("attention_forward", *size))
    return [out, module.backward(grad, w, out, lse, scale, tile or lookup("attention_backward", *size))]


def whole_heads(w: Tensor, grad: Tensor, scale: float | None = None, module=whole_head) -> list:
    scale = w.shape[-1] ** -0.5 if scale is None else scale
    w, grad = attention.addressable(w), grad.contiguous()
    out, dw = (torch.full(w.shape, torch.nan, dtype=w.dtype, device=w.device) for _ in range(2))
    lse = torch.full((w.shape[0], w.shape[2], w.shape[1]), torch.nan, device=w.device)
    module.forward(w, out, lse, scale, FORWARD)
    module.backward(grad, w, out, lse, dw, scale, BACKWARD)
    return [out, dw]


both_schedules = pytest.mark.parametrize("attend", [by_rows, whole_heads])


def _attention_is_right(attend, w: Tensor, grad: Tensor, scale: float | None = None, **options) -> bool:
    reference = partial(subspace_attention_reference, scale=scale)
    truth = gradients(reference, [w.double()], grad.double())
    return is_right(attend(w, grad, scale=scale, **options), gradients(reference, [w], grad), truth, "O dW")


ATTENTION = [  # schedule, [B, N, H, D], dtype, options of `tokens_and_gradient`
    *((by_rows, shape, SINGLE, {}) for shape in ((1, 15, 6, 32), (1, 16, 12, 48), (1, 64, 1, 128))),
    *itertools.product([by_rows], [(2, 1, 2, 8), (2, 17, 1, 80), (2, 197, 1, 64)], [SINGLE, HALF], [{}]),
    *((by_rows, shape, HALF, {}) for shape in ((1, 196, 1, 48), (1, 785, 1, 64))),
    # one to three blocks; a remainder of no key, one key, or several blocks of keys, full or not
    *((whole_heads, (1, n, 1, 64), SINGLE, {}) for n in (64, 65, 130, 180, 192, 197, 209, 226, 256)),
    *((whole_heads, (1, n, 1, 48), SINGLE, {}) for n in (65, 240)),
    *((whole_heads, (1, n, 2, d), HALF, {}) for n, d in ((65, 64), (197, 64), (226, 64), (197, 48))),
    # uniform, saturated and shifted: if every token attends only to itself, dO·W − δ must be zero
    *itertools.product([by_rows], [(4, 65, 1, 64)], [SINGLE, HALF], [{"offset": 1.0}, {"offset": 10.0}]),
    (by_rows, (4, 65, 1, 64), SINGLE, {"factor": 3.0}),
    *((whole_heads, (1, 197, 2, 64), HALF, {"factor": factor}) for factor in (0.3, 1.5, 2.0, 3.0)),
    (whole_heads, (1, 197, 2, 64), HALF, {"offset": 1.0}),
    # a row's own logit replaces the maximum, and one exponential gives two weights, only for small spreads of norms
    *((by_rows, (1, 197, 1, 64), HALF, {"spread": spread}) for spread in (1.0, 30.0, 100.0, 300.0)),
    (by_rows, (1, 197, 1, 64), SINGLE, {"spread": 1e4}),
    # the first launches of whole heads leave heads of a large spread to the second
    *((whole_heads, (1, 197, 2, 64), HALF, {"spread": spread}) for spread in (1.0, 3.0, 30.0, 300.0)),
    *((whole_heads, (1, 197, 2, 64), SINGLE, {"spread": spread}) for spread in (17.0, 100.0, 1e4)),
]


@pytest.mark.parametrize(
    ("attend", "shape", "dtype", "drawn"), ATTENTION, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_attention_of_every_size_and_spread_is_right(attend, shape, dtype, drawn, device, poisoned):
    assert _attention_is_right(attend, *tokens_and_gradient(shape, dtype, device, **drawn))


@pytest.mark.parametrize("blocks", ROW_TILES, ids=str)
@pytest.mark.parametrize("n_tokens", [16, 150])
def test_attention_with_every_tile_of_the_table_is_right(n_tokens, blocks, device, poisoned):
    w, grad = tokens_and_gradient((1, n_tokens, 1, 32), SINGLE, device)
    assert _attention_is_right(by_rows, w, grad, tile=Tile(*blocks, num_warps=8, num_stages=1))


@pytest.mark.parametrize(("attend", "dtype"), [(by_rows, SINGLE), (whole_heads, HALF)])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_attention_with_every_scale_is_right(scale, attend, dtype, device, poisoned):
    w, grad = tokens_and_gradient((1, 130, 2, 32), dtype, device, factor=32**-0.25)
    assert _attention_is_right(attend, w, grad, scale)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_logits_that_overflow_half_precision_give_accurate_outputs(dtype, device, poisoned):
    """|w|² is 6·10⁵. Logits of 8·10⁴ are rounded to 0.01, so that fp32 cannot order nearly equal ones."""
    w, grad = tokens_and_gradient((4, 65, 1, 64), dtype, device, offset=100.0)
    out, dw = by_rows(w, grad)
    assert (out - subspace_attention_reference(w.double())).abs().max() <= 0.05 + 100 * torch.finfo(dtype).eps
    assert dw.isfinite().all()


@both_schedules
def test_a_nan_token_is_not_hidden(attend, device):
    w, grad = tokens_and_gradient((1, 130, 2, 32), SINGLE, device)
    w[0, 3, 0, 0] = torch.nan
    for result in attend(w, grad):
        assert result[0, :, 0].isnan().any(-1).all()
        assert result[0, :, 1].isfinite().all()


def _views(base: Tensor) -> dict[str, Tensor]:
    """Strided and expanded tokens of a contiguous [2, N, 4, D]."""
    return {
        "every other head": base[:, :, ::2],
        "heads before tokens in memory": base.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :2],
        "batch last in memory": base.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)[:, :, :2],
        "every other channel": base[:, :, :2, ::2],
        "one image expanded": base[:1, :, :2].expand(2, -1, -1, -1),
        "not aligned": base.new_empty(base.numel() + 1)[1:].view_as(base).copy_(base)[:, :, :2],
        "one head expanded": base[:, :, :1].expand(-1, -1, 2, -1),
    }


@both_schedules
@pytest.mark.parametrize("view", _views(torch.empty(2, 1, 4, 2)))
def test_strided_and_expanded_tokens_give_right_results(view, attend, device, poisoned):
    w = _views(tokens_and_gradient((2, 65, 4, 32), SINGLE, device)[0])[view]
    assert _attention_is_right(attend, w, torch.randn(w.shape, device=device))


def test_strided_and_expanded_gradients_give_right_results(device, poisoned):
    w, grad = tokens_and_gradient((2, 65, 2, 32), SINGLE, device)
    assert _attention_is_right(by_rows, w, torch.ones((), device=device).expand(w.shape))
    assert _attention_is_right(by_rows, w, grad.transpose(1, 2).contiguous().transpose(1, 2))
    assert _attention_is_right(by_rows, w, grad[:1, :, :1].expand(w.shape))


def test_an_image_too_large_to_address_is_an_error(device):
    w = torch.empty(1, 1, 1, 1, device="meta").expand(1, 2**20, 64, 64)
    with pytest.raises(ValueError, match="N·H·D must be under 2³¹"):
        attention.forward(w, 0.125)


BF16, WAYS = torch.bfloat16, ["forward", "backward"]


@pytest.mark.parametrize(
    ("sizes", "dtype", "ways"),
    [
        ([(180, 64), (256, 64), (197, 48), (240, 48)], BF16, WAYS),
        ([(241, 48), (197, 40)], BF16, ["forward"]),
        ([(63, 64), (257, 64), (197, 32), (197, 80)], BF16, []),
        ([(197, 64)], HALF, ["forward"]),
        ([(197, 64)], SINGLE, []),
    ],
    ids=str,
)
def test_which_shapes_run_by_whole_heads(sizes, dtype, ways, monkeypatch):
    called = []
    for way in WAYS:
        monkeypatch.setattr(whole_head, way, lambda *args, way=way: called.append(way))
        monkeypatch.setattr(attention, f"plan_{way}", lambda *args: Namespace(run=lambda: None))
    for n_tokens, head_dim in sizes:
        called.clear()
        w = torch.empty(1, n_tokens, 1, head_dim, dtype=dtype)
        for tile in (None, FORWARD):  # a given tile is for blocks of rows
            attention.forward(w, 0.125, tile)
            attention.backward(w, w, w, torch.empty(1, 1, n_tokens), 0.125, tile)
        assert called == ways


ROW_MUTANTS = {  # (code of the kernel, its replacement)
    "the last key dropped": (
        "weights = tl.where(inside[None, :], weights",
        "weights = tl.where((tl.cumsum(inside.to(tl.int32), 0) < tl.sum(inside.to(tl.int32), 0))[None, :], weights",
    ),
    "a padding key counted": ("weights = tl.where(inside[None, :], weights, 0.0)", "weights = weights"),
    "the scale 2 % off": ("logits * scale_log2 - shift[:", "logits * (scale_log2 * 1.02) - shift[:"),
    "uniform weights": ("weights = tl.exp2(logits * scale_log2 - shift[:, None])", "weights = tl.exp2(logits * 0.0)"),
    "the identity": ("out = (acc / row_sum[:, None]).to(", "out = w_rows.to("),
    "no rescaling": ("acc = acc * rescale[:, None]", "acc = acc * 1.0"),
    "no gradient through the values": ("tl.dot(weights_ji.to(", "tl.dot((weights_ji * 0.0).to("),
    "no gradient through the queries": ("grad_logits = weights_ij * (", "grad_logits = 0.0 * weights_ij * ("),
    "no gradient through the keys": ("grad_logits += weights_ji * (", "grad_logits += 0.0 * weights_ji * ("),
    "the gradient's scale 2 % off": ("(scale * grad_ij", "(1.02 * scale * grad_ij"),
    "the rows' normalisation for the columns": ("scale_log2 - lse_cols[None, :]", "scale_log2 - lse_rows[:, None]"),
    "dO·W the wrong way round": (
        'grad_ji = tl.dot(w_rows, tl.trans(grad_cols), input_precision="tf32")',
        "grad_ji = grad_ij",
    ),
}
BOTH_WEIGHTS = "both * factor_rows[:, None]", "both * tl.exp2(shift - lse_cols)[None, :]"
ROW_MUTANTS |= {  # of the switches, in float16: also the largest norm over the smallest
    "never a running maximum": ("row_sum <= LARGEST_SUM)", "row_sum > -1.0)", 100.0),
    "always one exponential": ("spread <= LARGEST_SPREAD", "spread >= 0.0", 100.0),
    "P_ij with the columns' factor": (*BOTH_WEIGHTS, 1.0),
    "P_ji with the rows' factor": (*reversed(BOTH_WEIGHTS), 1.0),
    "δ of the columns forgotten": ("delta_cols = scale * tl.sum", "delta_cols = 0.0 * tl.sum", 1.0),
    "δ of the rows forgotten": ("delta_rows = head.scale_log2", "delta_rows = 0.0", 1.0),
}
WHOLE_MUTANTS = {
    "a padding key counted": ("tl.arange(0, KEYS) < N_TOKENS)[", "tl.arange(0, KEYS) < 999)["),
    "the last key dropped": ("tl.arange(0, KEYS) < N_TOKENS)[", "tl.arange(0, KEYS) < N_TOKENS - 1)["),
    "no transposed tile": ("tl.dot(tl.trans(w[i]), e, accs[j])", "tl.dot(tl.trans(w[i]), e * 0.0, accs[j])"),
    "columns left out of the sums": ("sums[j] + tl.sum(e.to", "sums[j] + 0.0 * tl.sum(e.to"),
    "the rest not attended to": ("acc = tl.dot(e, w_rest[r], acc)", "acc = acc * 1.0"),
    "the transposed values dropped": ("tl.dot(tl.trans(g_i), low, acc_t)", "tl.dot(tl.trans(g_i), low * 0.0, acc_t)"),
    "the columns' δ twice": ("- d_j[None, :])", "- 2.0 * d_j[None, :])"),
    "no δ of the columns": ("- d_j[None, :])", "- 0.0 * d_j[None, :])"),
    "no δ of the rows": ("-d_i[:, None] - d_j", "-0.0 * d_i[:, None] - d_j"),
    "half of T": ("t = tl.dot(g_i, tl.trans(w_j), t)", "t = t + t"),
    "the scale 2 % off": ("(scale_log2 * LN_2)", "(scale_log2 * LN_2 * 1.02)"),
    "λ of another token": ("tl.exp2(shift - lse)[:, None]).to", "tl.exp2(shift - lse * 1.01)[:, None]).to"),
    "the rest's rows left out": ("if REST > 0:\n            rest", "if REST > 999:\n            rest"),
    "only the first keys of the rest, forward": ("range(len(w_rest))", "range(1)"),
    "always the first keys of the rest, forward": ("tl.trans(w_rest[r])", "tl.trans(w_rest[0])"),
    "only the first keys of the rest, backward": (
        "range(FIRST, N_TOKENS, KEYS):\n        w_j",
        "range(FIRST, FIRST + KEYS, KEYS):\n        w_j",
    ),
    "a refusal that is ignored": ("fits = largest - smallest <= LARGEST_SPREAD", "fits = largest >= smallest"),
}


@pytest.mark.parametrize("name", ROW_MUTANTS)
def test_mutants_of_blocks_of_rows_fail(name, device, tmp_path):
    *mutation, spread = ROW_MUTANTS[name] if len(ROW_MUTANTS[name]) == 3 else (*ROW_MUTANTS[name], None)
    shape, dtype = ((1, 130, 1, 32), SINGLE) if spread is None else ((1, 197, 1, 32), HALF)
    w, grad = tokens_and_gradient(shape, dtype, device, spread=spread)
    assert not _attention_is_right(by_rows, w, grad, module=mutant(attention, mutation, tmp_path))


@pytest.mark.parametrize("name", WHOLE_MUTANTS)
def test_mutants_of_whole_heads_fail(name, device, tmp_path, poisoned):
    shape = (1, 226 if "keys of the rest" in name else 197, 1, 64)
    w, grad = tokens_and_gradient(shape, SINGLE, device, spread=300.0 if "refusal" in name else None)
    module = mutant(whole_head, WHOLE_MUTANTS[name], tmp_path)
    assert not _attention_is_right(whole_heads, w, grad, module=module)


SIZES = [((1, 32), "relu"), ((15, 48), "soft"), ((197, 96), "relu"), ((130, 33), "relu")]  # M, C


def _inputs(size, dtype, device, norm: bool = True) -> list[Tensor]:
    """x, γ, β and D, or x and D."""
    rows, width = size
    x, dictionary = torch.randn(rows, width) * 2 + 1, torch.randn(width, width) / width**0.5
    gamma, beta = 1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width)
    return [t.to(dtype).to(device) for t in ((x, gamma, beta, dictionary) if norm else (x, dictionary))]


def _results(inputs: list[Tensor], grad: Tensor, ours: bool = True, **options) -> list[Tensor]:
    functions = (ista_reference, functional.ista) if len(inputs) == 2 else (norm_ista_reference, norm_ista)
    options |= {"backend": "triton"} if ours else {}
    return gradients(partial(functions[ours], **options), inputs, grad)


def _ista_is_right(inputs: list[Tensor], threshold="relu", autocast=False, grad: Tensor | None = None) -> bool:
    """Return True if the results are right. Under autocast, eager has float16 products and fp32 for the rest."""
    x, *norm, dictionary = wide = [tensor.double() for tensor in inputs]
    if grad is None:  # zero where rounding decides whether ISTA's output is zero
        tokens = F.layer_norm(x, x.shape[-1:], *norm) if norm else x
        margin = 16 * torch.finfo(HALF if autocast else inputs[0].dtype).eps
        grad = torch.randn(x.shape, device=x.device).to(inputs[0].dtype)
        grad = clear_of_threshold(grad, tokens, dictionary, margin=margin)
    truth = _results(wide, grad.double(), ours=False, threshold=threshold)
    with torch.autocast(x.device.type, HALF, enabled=autocast):
        actual, eager = (_results(inputs, grad, ours, threshold=threshold) for ours in (True, False))
    judge = all_within_twice_eager if autocast else is_right
    return judge(actual, eager, truth, "y dx dγ dβ dD" if norm else "y dx dD")


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize(("size", "threshold"), SIZES, ids=str)
def test_ista_agrees_with_the_reference(size, dtype, threshold, with_norm, device, poisoned):
    assert _ista_is_right(_inputs(size, dtype, device, with_norm), threshold)


@pytest.mark.parametrize("soft", [False, True])
def test_values_that_round_to_zero_pass_no_gradient(soft, device, poisoned):
    x = torch.full((16, 32), 0.01, dtype=HALF, device=device)
    y, nonzero = ista.forward(x, x, torch.zeros(32, 32, dtype=HALF, device=device), x[0, 0].item() - 1e-8, soft)
    assert y.count_nonzero() == nonzero.count_nonzero() == 0


def _use_tile(tile: Tile, monkeypatch) -> None:
    monkeypatch.setattr(kernels.ista, "tile_for", lambda *_: tile)
    monkeypatch.setattr(kernels.product, "fitted", lambda *_: tile)  # of the weight's gradient


@pytest.mark.parametrize("persistent", [False, True], ids=["a tile a program", "persistent"])
@pytest.mark.parametrize("blocks", PRODUCT_TILES, ids=str)
def test_every_product_tile_of_the_table_is_right(blocks, persistent, device, poisoned, monkeypatch):
    """Three ragged rows of tiles and two columns, or one column of a wide tile; persistent tiles have a LayerNorm."""
    _use_tile(Tile(*blocks[:2], num_warps=8, num_stages=1, block_k=blocks[2], persistent=persistent), monkeypatch)
    size = (2 * blocks[0] + 5, min(192, 3 * blocks[1] // 2))
    assert _ista_is_right(_inputs(size, HALF, device, norm=persistent))


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
def test_strided_and_expanded_matrices_give_right_results(with_norm, device, poisoned):
    inputs = _inputs((64, 96), SINGLE, device, with_norm)
    strided = [tensor.t().contiguous().t() for tensor in inputs]
    assert _ista_is_right(strided, grad=torch.randn(1, 96, device=device).expand(64, -1))


def test_layer_norm_of_large_offsets_and_with_more_rows_than_programs_is_right(device, monkeypatch, poisoned):
    for offset in (10.0, 1000.0):
        x, *rest = _inputs((64, 96), SINGLE, device)
        assert _ista_is_right([x + offset, *rest])
    monkeypatch.setattr(layer_norm, "MAX_PROGRAMS", 2)
    assert _ista_is_right(_inputs((197, 96), SINGLE, device))


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
def test_a_nan_row_is_not_hidden_and_results_of_constant_rows_are_finite(with_norm, device):
    x, *rest = _inputs((64, 96), SINGLE, device, with_norm)
    assert all(result.isfinite().all() for result in _results([x * 0 + 3, *rest], torch.randn_like(x)))
    x[5, 0] = torch.nan
    y, grad_x, *_, grad_dictionary = _results([x, *rest], torch.randn_like(x))
    assert y[5].isnan().all()
    assert y[4].isfinite().all()
    assert grad_dictionary.isnan().any()
    assert grad_x[4].isfinite().all()


RELU = "y = tl.where(y <= shift, 0.0, y - shift)"
MASKED = "return product(masked, folded, masked, tile)"
MUTANTS = {  # (module, code of the kernel, its replacement)
    "none": (product, "y = x + acc", "y = x + acc"),
    "no residual": (product, "y = x + acc", "y = acc"),
    "the threshold doubled": (product, RELU, "y = tl.where(y <= shift, 0.0, y - 2 * shift)"),
    "no threshold": (product, RELU, "y = tl.where(y <= 0.0, 0.0, y)"),
    "no ReLU": (product, RELU, "y = y - shift"),
    "the residual's mean left": (product, "x = (x - mean[:, None])", "x = (x - 0.0 * mean[:, None])"),
    "LayerNorm's bias dropped": (product, "gamma[None, :] + beta[None, :]", "gamma[None, :] + 0.0 * beta[None, :]"),
    "the left half finished twice": (product, "      right, start_n + half,", "      left, start_n + half,"),
    "one tile a program": (product, "tiles, tl.num_programs(0), flatten", "tiles, tiles, flatten"),
    "the gradient not masked": (ista, "tl.where(nonzero != 0, grad, 0.0)", "grad"),
    "a block's sums alone": (ista, "total += tl.sum(", "total = tl.sum("),
    "all of y not zero": (product, "(y != 0.0).to(tl.int8)", "(y == y).to(tl.int8)"),
    "γ not on G": (folding, "weight * gamma[None, :], offs_n", "weight, offs_n"),
    "β not on G": (folding, "weight * beta[None, :], 1)", "weight * 0.0, 1)"),
    "no gradient through the residual": (ista, MASKED, "return product(masked, folded, 0 * masked, tile)"),
    "G not transposed in backward": (ista, MASKED, "return product(masked, folded.t(), masked, tile)"),
    "G transposed in forward": (ista, "weight = folded.t()", "weight = folded"),
    "the last rows of a split dropped": (
        product,
        "start + rows_per_split, n_rows)",
        "start + rows_per_split, n_rows) - BLOCK_K",
    ),
    "no ε": (layer_norm, "/ WIDTH + eps)", "/ WIDTH + 1000 * eps)"),
    "the mean's gradient dropped": (layer_norm, "scaled - average[:, None]", "scaled - 0.0 * average[:, None]"),
    "the deviation's gradient dropped": (layer_norm, "- normed * along[:, None]", "- 0.0 * normed * along[:, None]"),
    "dγ without the rows": (layer_norm, "first += tl.sum(grad * normed, 0)", "first += tl.sum(grad, 0)"),
    "only the first block of rows": (layer_norm, "step = tl.num_programs(0) * BLOCK_M", "step = n_rows"),
    "fp32 tokens in half precision": (product, "if MASKED:", "if False:"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_only_mutants_of_ista_fail(name, device, tmp_path, monkeypatch, poisoned):
    """The columns end in two halves, the last one ragged; there are more tiles and rows than programs."""
    module, *mutation = MUTANTS[name]
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "0")
    monkeypatch.setattr(kernels, module.__name__.rpartition(".")[2], mutant(module, mutation, tmp_path))
    if module is not ista:
        monkeypatch.setattr(kernels, "ista", mutant(module, mutation, tmp_path, user=ista))
    monkeypatch.setattr(kernels.layer_norm, "MAX_PROGRAMS", 2)
    _use_tile(Tile(64, 128, 4, 1, 32, persistent=True), monkeypatch)
    autocast = "fp32" in name
    inputs = _inputs((260, 96), SINGLE if module is layer_norm or autocast else HALF, device)
    assert _ista_is_right(inputs, autocast=autocast) == (name == "none")


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("width", [32, 100])
def test_a_folded_dictionary_and_its_gradient_are_right(width, dtype, device, poisoned):
    skip_tf32(dtype, device)
    dictionary = (torch.randn(width, width) / width**0.5).to(dtype).to(device)
    wide, grad = dictionary.double(), torch.randn(width, width, device=device)
    truth = 0.1 * (wide - wide.t() @ wide)
    folded = folding.fold(dictionary, 0.1, dtype)
    assert (folded - truth).abs().max() <= (torch.finfo(dtype).eps + 2e-6) * truth.abs().max()
    truth = 0.1 * (grad.double() - wide @ (grad + grad.t()).double())
    found = folding.fold_backward(grad, dictionary, 0.1)
    assert found.dtype == dtype
    assert (found - truth).abs().max() <= (torch.finfo(dtype).eps + 2e-6) * truth.abs().max()


@pytest.mark.parametrize("size", [(32, 32), (48, 100), (192, 33)], ids=str)
def test_a_layer_norm_folded_into_a_weight_is_right(size, device, poisoned):
    weight, gamma, beta = (torch.randn(s, device=device, requires_grad=True) for s in (size, size[1:], size[1:]))
    base, *grads = (torch.randn(shape, device=device) for shape in (size[:1], size, size[:1]))
    expected = [weight * gamma, weight @ beta]
    for given in (weight.detach(), weight.detach().t().contiguous().t()):
        scaled, offset = folding.scale(given, gamma.detach(), beta.detach(), torch.float32, base)
        torch.testing.assert_close([scaled, offset - base], [t.detach() for t in expected], rtol=1e-5, atol=1e-5)
    found = folding.unscale(*grads, *(t.detach() for t in (weight, gamma, beta)))
    truth = torch.autograd.grad(expected, [weight, gamma, beta], grads)
    torch.testing.assert_close(list(found), list(truth), rtol=1e-5, atol=1e-4)


WEIGHT_MUTANTS = {
    "G without D": ("step_size * (dictionary - acc)", "step_size * (-acc)"),
    "dG not symmetric": (
        "both += _load(grad_ptr, offs_k, offs_n, 1, WIDTH",
        "both += _load(grad_ptr, offs_k, offs_n, WIDTH, 1",
    ),
    "r without β": ("offset_grad * beta[None, :]", "offset_grad * 0.0 * beta[None, :]"),
    "dγ of the last rows": ("dgamma += tl.sum", "dgamma = tl.sum"),
    "dβ without the weight": ("offset_grad * weight, 0)", "offset_grad + 0.0 * weight, 0)"),
    "no base": ("total += tl.load(base_ptr", "total += 0.0 * tl.load(base_ptr"),
}


@pytest.mark.parametrize("name", WEIGHT_MUTANTS)
def test_weight_mutants_fail(name, device, tmp_path, monkeypatch):
    changed = mutant(folding, WEIGHT_MUTANTS[name], tmp_path)
    for function in ("fold", "fold_backward", "scale", "unscale"):
        monkeypatch.setattr(folding, function, getattr(changed, function))
    with pytest.raises(AssertionError):  # noqa: PT012  (one of the two fails)
        test_a_folded_dictionary_and_its_gradient_are_right(100, SINGLE, device, None)
        test_a_layer_norm_folded_into_a_weight_is_right((192, 33), device, None)


@pytest.mark.parametrize("tiles", [3, 6, 18, 24, 32, 45, 72, 96, 128, 144])
def test_a_weight_gradient_keeps_most_multiprocessors_busy(tiles):
    """132 programs run at once; with one share for 72 or 144 tiles nearly half would wait."""
    shares = product._best_shares(tiles, 132, most=99)
    assert tiles * shares / (132 * cdiv(tiles * shares, 132)) > 0.9
    assert product._best_shares(tiles, 132, most=1) == 1
