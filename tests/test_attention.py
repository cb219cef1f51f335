"""Tied attention by blocks of rows and by whole heads against the float64 reference: on a GPU, or on a CPU through
Triton's interpreter.

Half precision by the rule of two times eager PyTorch. fp32 is multiplied as TF32 on a GPU and exactly here: there
the interpreter shows the algebra, also of whole heads, which do not run in it. bfloat16 is test_bfloat16.py's; what
the compiler makes of the kernels, test_compiler.py's.
"""

import itertools

import pytest
import torch
from oracle import gradients, is_right, mutant, spread_tokens, token_scale, tokens_and_gradient
from torch import Tensor

from crate_fast.kernels import attention, whole_head
from crate_fast.kernels.launch import TABLE, Tile, lookup, precision
from crate_fast.reference import subspace_attention_reference

FORWARD, BACKWARD = Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)  # of whole heads
HALF, SINGLE = torch.float16, torch.float32
ROW_TILES = sorted({(t.block_m, t.block_n) for (kernel, *_), t in TABLE.items() if kernel.startswith("attention")})


def by_rows(w: Tensor, grad: Tensor, scale: float | None = None, module=attention, tile: Tile | None = None) -> list:
    """O and dW by blocks of rows."""
    scale = w.shape[-1] ** -0.5 if scale is None else scale
    size = (w.device, precision(w.dtype), attention.block_d(w))
    out, lse = module.forward(w, scale, tile or lookup("attention_forward", *size))
    return [out, module.backward(grad, w, out, lse, scale, tile or lookup("attention_backward", *size))]


def whole_heads(w: Tensor, grad: Tensor, scale: float | None = None, module=whole_head) -> list:
    """O and dW by whole heads."""
    scale = w.shape[-1] ** -0.5 if scale is None else scale
    w, grad = attention.addressable(w), grad.contiguous()
    out, dw = (torch.full(w.shape, torch.nan, dtype=w.dtype, device=w.device) for _ in range(2))
    lse = torch.full((w.shape[0], w.shape[2], w.shape[1]), torch.nan, device=w.device)
    module.forward(w, out, lse, scale, FORWARD)
    module.backward(grad, w, out, lse, dw, scale, BACKWARD)
    return [out, dw]


both_schedules = pytest.mark.parametrize("attend", [by_rows, whole_heads])


def _is_right(attend, w: Tensor, grad: Tensor, scale: float | None = None, **options) -> bool:
    def reference(tokens: Tensor) -> Tensor:
        return subspace_attention_reference(tokens, scale)

    actual = attend(w, grad, scale=scale, **options)
    truth = gradients(reference, [w.double()], grad.double())
    return is_right(actual, gradients(reference, [w], grad), truth, "O dW")


# --- sizes ---------------------------------------------------------------------------------------------------------

ROW_SHAPES = [  # [B, N, H, D]
    *itertools.product([(2, 1, 2, 8), (1, 15, 6, 32), (1, 16, 12, 48), (2, 17, 1, 80)], [SINGLE, HALF]),
    *itertools.product([(1, 64, 1, 128), (1, 65, 2, 64), (2, 197, 1, 64)], [SINGLE, HALF]),
    ((1, 196, 1, 48), HALF),
    ((1, 785, 1, 64), HALF),
]
WHOLE_SHAPES = [  # one to three blocks; no rest, one key, several blocks of keys, the last one full or not
    *[((1, n, 1, 64), SINGLE) for n in (64, 65, 101, 130, 180, 192, 197, 207, 209, 226, 256)],
    *[((1, n, 1, 48), SINGLE) for n in (65, 240)],
    *[((1, n, 2, 64), HALF) for n in (65, 197, 226)],
    ((1, 197, 2, 48), HALF),
]


@pytest.mark.parametrize(
    ("attend", "shape", "dtype"),
    [(by_rows, *case) for case in ROW_SHAPES] + [(whole_heads, *case) for case in WHOLE_SHAPES],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sizes(attend, shape, dtype, device, poisoned):
    assert _is_right(attend, *tokens_and_gradient(shape, dtype, device))


@pytest.mark.parametrize("blocks", ROW_TILES, ids=str)
@pytest.mark.parametrize("n_tokens", [16, 150])
def test_every_tile_of_the_table(n_tokens, blocks, device, poisoned):
    w, grad = tokens_and_gradient((1, n_tokens, 1, 32), SINGLE, device)
    assert _is_right(by_rows, w, grad, tile=Tile(*blocks, num_warps=8, num_stages=1))


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attend", "dtype", "factor", "offset"),
    [
        *itertools.product([by_rows], [SINGLE, HALF], [1.0], [1.0, 10.0]),
        (by_rows, SINGLE, 3.0, 0.0),
        *itertools.product([whole_heads], [HALF], [0.3, 1.5, 2.0, 3.0], [0.0]),
        (whole_heads, HALF, 1.0, 1.0),
    ],
)
def test_uniform_saturated_and_shifted_attention(attend, dtype, factor, offset, device, poisoned):
    """Where every token attends to itself alone, dO·W − δ is zero, and has to come out so."""
    w, grad = tokens_and_gradient((4, 65, 1, 64) if attend is by_rows else (1, 197, 2, 64), dtype, device)
    assert _is_right(attend, factor * w + offset, grad)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_logits_that_overflow_half_precision(dtype, device, poisoned):
    """|w|² of 6·10⁵. Logits of 8·10⁴ round to 0.01, so nearly equal ones are a matter of luck in fp32."""
    w, grad = tokens_and_gradient((4, 65, 1, 64), dtype, device)
    out, dw = by_rows(w + 100, grad)
    truth = subspace_attention_reference((w + 100).double())
    assert (out - truth).abs().max() <= 0.05 + 100 * torch.finfo(dtype).eps
    assert dw.isfinite().all()


@pytest.mark.parametrize(("attend", "dtype"), [(by_rows, SINGLE), (whole_heads, HALF)])
@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0])
def test_the_scale(scale, attend, dtype, device, poisoned):
    w, grad = tokens_and_gradient((1, 130, 2, 32), dtype, device)
    w = w * token_scale(130, 32, max(scale, 0.02)) / token_scale(130, 32)
    assert _is_right(attend, w, grad, scale)


@pytest.mark.parametrize(
    ("attend", "dtype", "tolerance"),
    [
        (by_rows, SINGLE, 1e-5),
        (by_rows, HALF, 1e-5),
        (whole_heads, HALF, 2**-11 / 0.69),  # sums of weights as they are multiplied, rounded to float16
    ],
)
def test_log_sum_exp(attend, dtype, tolerance, device, poisoned):
    w, _ = tokens_and_gradient((1, 197, 2, 64), dtype, device)
    out, lse = torch.empty_like(w), torch.empty(1, 2, 197, device=device)
    if attend is by_rows:
        out, lse = attention.forward(w, 0.125, Tile(128, 64, 8, 1))
    else:
        whole_head.forward(w, out, lse, 0.125, FORWARD)
    heads = w.double().transpose(1, 2)
    truth = (0.125 * heads @ heads.transpose(-1, -2)).logsumexp(-1) / torch.tensor(2.0).double().log()
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), truth, rtol=1e-5, atol=tolerance + 1e-5)


@both_schedules
def test_a_nan_token_is_not_hidden(attend, device):
    w, grad = tokens_and_gradient((1, 130, 2, 32), SINGLE, device)
    w[0, 3, 0, 0] = torch.nan
    for result in attend(w, grad):
        assert result[0, :, 0].isnan().any(-1).all()
        assert result[0, :, 1].isfinite().all()


@pytest.mark.parametrize("spread", [1.0, 30.0, 100.0, 300.0])
def test_norms_that_spread_across_the_switches(spread, device, poisoned):
    """From rows whose own logit does for a maximum, and an exponential for two weights, to where neither does."""
    w, grad = spread_tokens((1, 197, 1, 64), spread, HALF, device)
    assert _is_right(by_rows, w, grad)


def test_norms_a_factor_of_ten_thousand_apart(device, poisoned):
    """Eager float16 overflows here, so its error is no measure: float64 rounded to float16 is."""
    w, grad = spread_tokens((1, 197, 1, 64), 1e4, SINGLE, device)
    assert _is_right(by_rows, w, grad)
    out, dw = by_rows(w.half(), grad.half())
    truth = subspace_attention_reference(w.half().double())
    assert (out.double() - truth).norm() <= 1e-3 * truth.norm()
    assert dw.isfinite().all()


def _refused(w: Tensor, grad: Tensor) -> tuple[int, int]:
    """Count the heads that the first launches of whole heads leave to the second, forward and backward."""
    out, lse = attention.forward(w, 0.125, FORWARD)
    dw, d = torch.empty_like(w), torch.empty_like(lse)
    counts = []
    for plan in (
        lambda refused: whole_head.plan_forward(w, out, lse, refused, 0.125, FORWARD),
        lambda refused: whole_head.plan_backward(grad, w, out, lse, dw, d, refused, 0.125, BACKWARD),
    ):
        refused = torch.full((w.shape[0] * w.shape[2],), 9, dtype=torch.int32, device=w.device)
        plan(refused).run()
        assert set(refused.tolist()) <= {0, 1}
        counts.append(int(refused.sum()))
    return counts[0], counts[1]


@pytest.mark.parametrize(
    ("spread", "dtype", "heads"),
    [
        (1.0, HALF, (0, 0)),
        (3.0, HALF, (0, 0)),
        (30.0, HALF, (2, 2)),
        (300.0, HALF, (2, 2)),
        (17.0, SINGLE, (0, 2)),
        (100.0, SINGLE, (2, 2)),
        (1e4, SINGLE, (2, 2)),
    ],
)
def test_the_spread_decides_which_heads_are_refused(spread, dtype, heads, device, poisoned):
    w, grad = spread_tokens((1, 197, 2, 64), spread, dtype, device)
    w = w * 0.8 if spread == 3.0 else w
    assert _refused(w, grad) == heads
    assert _is_right(whole_heads, w, grad)


def test_one_head_of_several_is_refused(device, poisoned):
    w, grad = tokens_and_gradient((1, 197, 3, 64), HALF, device)
    w[:, 5, 1] *= 8
    assert _refused(w, grad) == (1, 1)
    assert _is_right(whole_heads, w, grad)


# --- memory --------------------------------------------------------------------------------------------------------


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
def test_strided_and_expanded_tokens(view, attend, device, poisoned):
    w = _views(tokens_and_gradient((2, 65, 4, 32), SINGLE, device)[0])[view]
    assert _is_right(attend, w, torch.randn(w.shape, device=device))


@both_schedules
def test_strided_and_expanded_gradients(attend, device, poisoned):
    w, grad = tokens_and_gradient((2, 65, 2, 32), SINGLE, device)
    assert _is_right(attend, w, torch.ones((), device=device).expand(w.shape))
    assert _is_right(attend, w, grad.transpose(1, 2).contiguous().transpose(1, 2))
    assert _is_right(attend, w, grad[:1, :, :1].expand(w.shape))


def test_an_image_too_large_to_address(device):
    w = torch.empty(1, 1, 1, 1, device="meta").expand(1, 2**20, 64, 64)
    with pytest.raises(ValueError, match="N·H·D must be under 2³¹"):
        attention.forward(w, 0.125)


# --- which schedule runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_tokens", "head_dim", "dtype", "forward", "backward"),
    [
        (63, 64, torch.bfloat16, False, False),
        (180, 64, torch.bfloat16, True, True),
        (256, 64, torch.bfloat16, True, True),
        (257, 64, torch.bfloat16, False, False),
        (197, 64, HALF, True, False),
        (197, 48, torch.bfloat16, True, True),
        (240, 48, torch.bfloat16, True, True),
        (241, 48, torch.bfloat16, True, False),
        (197, 40, torch.bfloat16, True, False),
        (197, 32, torch.bfloat16, False, False),
        (197, 80, torch.bfloat16, False, False),
        (197, 64, SINGLE, False, False),
    ],
)
def test_where_whole_heads_run(n_tokens, head_dim, dtype, forward, backward):
    w = torch.empty(1, n_tokens, 1, head_dim, dtype=dtype)
    found = [attention._whole_head_tile(f"whole_head_{way}", w, None) is not None for way in ("forward", "backward")]
    assert found == [forward, backward]


def test_dispatch(device, monkeypatch):
    called = []
    for way in ("forward", "backward"):
        monkeypatch.setattr(whole_head, way, lambda *args, way=way: called.append(way))
    w = torch.zeros(1, 197, 1, 64, dtype=HALF, device=device)
    attention.forward(w, 0.125)
    assert called == ["forward"]
    attention.forward(w, 0.125, FORWARD)  # a tile for blocks of rows
    attention.backward(w, w, w, torch.zeros(1, 1, 197, device=device), 0.125)  # float16
    assert called == ["forward"]


# --- mutants -------------------------------------------------------------------------------------------------------

ROW_MUTANTS = {  # (what the kernel says, what the mutant says)
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
SWITCH_MUTANTS = {  # (largest norm over smallest, what the kernel says, what the mutant says), in float16
    "never a running maximum": (100.0, "row_sum <= LARGEST_SUM)", "row_sum > -1.0)"),
    "always one exponential": (100.0, "spread <= LARGEST_SPREAD", "spread >= 0.0"),
    "P_ij with the columns' factor": (1.0, *BOTH_WEIGHTS),
    "P_ji with the rows' factor": (1.0, *reversed(BOTH_WEIGHTS)),
    "δ of the columns forgotten": (1.0, "delta_cols = scale * tl.sum", "delta_cols = 0.0 * tl.sum"),
    "δ of the rows forgotten": (1.0, "delta_rows = head.scale_log2", "delta_rows = 0.0"),
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
    w, grad = tokens_and_gradient((1, 130, 1, 32), SINGLE, device)
    assert not _is_right(by_rows, w, grad, module=mutant(attention, ROW_MUTANTS[name], tmp_path))


@pytest.mark.parametrize("name", SWITCH_MUTANTS)
def test_mutants_of_the_switches_fail(name, device, tmp_path):
    spread, *mutation = SWITCH_MUTANTS[name]
    w, grad = spread_tokens((1, 197, 1, 32), spread, HALF, device)
    assert not _is_right(by_rows, w, grad, module=mutant(attention, mutation, tmp_path))


@pytest.mark.parametrize("name", WHOLE_MUTANTS)
def test_mutants_of_whole_heads_fail(name, device, tmp_path, poisoned):
    n_tokens = 226 if "keys of the rest" in name else 197
    spread = 300.0 if "refusal" in name else None
    shape, module = (1, n_tokens, 1, 64), mutant(whole_head, WHOLE_MUTANTS[name], tmp_path)
    w, grad = tokens_and_gradient(shape, SINGLE, device)
    w, grad = (w, grad) if spread is None else spread_tokens(shape, spread, SINGLE, device)
    assert not _is_right(whole_heads, w, grad, module=module)
