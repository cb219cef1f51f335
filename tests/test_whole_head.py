"""The whole-head kernels, which a sequence of up to 256 tokens goes to: on a GPU, or through Triton's interpreter.

By the rule of two times eager PyTorch in float16. They do not run in float32; there the interpreter shows the
algebra: what is wrong by a term is wrong by far more than 1e-4.
"""

import pytest
import torch
from oracle import gradients, is_right, mutant, spread_tokens, tokens_and_gradient

from crate_fast.kernels import attention, whole_head
from crate_fast.kernels.launch import Tile
from crate_fast.reference import subspace_attention_reference

FORWARD, BACKWARD = Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)
LENGTHS = [(n, 64) for n in (64, 65, 101, 128, 130, 180, 192, 196, 197, 209, 226, 256)] + [
    (65, 48),
    (197, 48),
    (240, 48),
]


def _attention(w, grad, module=whole_head, scale=None):
    scale = w.shape[-1] ** -0.5 if scale is None else scale
    w, grad = attention.addressable(w), grad.contiguous()
    out, dw = (torch.full(w.shape, torch.nan, dtype=w.dtype, device=w.device) for _ in range(2))
    lse = torch.full((w.shape[0], w.shape[2], w.shape[1]), torch.nan, device=w.device)
    module.forward(w, out, lse, scale, FORWARD)
    module.backward(grad, w, out, lse, dw, scale, BACKWARD)
    return [out, dw]


def _is_right(w, grad, module=whole_head, scale=None) -> bool:
    def reference(tokens):
        return subspace_attention_reference(tokens, scale)

    truth = gradients(reference, [w.double()], grad.double())
    return is_right(_attention(w, grad, module, scale), gradients(reference, [w], grad), truth, "O dW")


@pytest.mark.parametrize(("n_tokens", "head_dim"), LENGTHS)
def test_whole_heads(n_tokens, head_dim, device, poisoned):
    assert _is_right(*tokens_and_gradient((1, n_tokens, 2, head_dim), torch.float16, device))
    assert _is_right(*tokens_and_gradient((1, n_tokens, 1, head_dim), torch.float32, device))


@pytest.mark.parametrize("factor", [0.3, 1.5, 2.0, 3.0])
def test_from_uniform_to_saturated_attention(factor, device, poisoned):
    w, grad = tokens_and_gradient((1, 197, 2, 64), torch.float16, device)
    assert _is_right(factor * w, grad)


def test_a_large_offset(device, poisoned):
    w, grad = tokens_and_gradient((1, 197, 2, 64), torch.float16, device)
    assert _is_right(w + 1, grad)


@pytest.mark.parametrize("scale", [0.0, 0.02])
def test_the_scale(scale, device, poisoned):
    w, grad = tokens_and_gradient((1, 197, 2, 64), torch.float16, device)
    assert _is_right(w, grad, scale=scale)


def test_log_sum_exp(device, poisoned):
    """Compare weights as they are multiplied, rounded to float16: each is off by at most 2⁻¹¹."""
    w, _ = tokens_and_gradient((1, 197, 3, 64), torch.float16, device)
    out, lse = torch.empty_like(w), torch.empty(1, 3, 197, device=device)
    whole_head.forward(w, out, lse, 0.125, FORWARD)
    heads = w.double().transpose(1, 2)
    truth = (0.125 * heads @ heads.transpose(-1, -2)).logsumexp(-1) / torch.tensor(2.0).double().log()
    torch.testing.assert_close(lse.double(), truth, rtol=0, atol=2**-11 / 0.69 + 1e-5)


# --- which heads are refused, and what becomes of them ------------------------------------------------------------


def _refused(w, grad) -> tuple[int, int]:
    """Count the heads that the first launches of forward and backward leave to the second."""
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
        (1.0, torch.float16, (0, 0)),
        (3.0, torch.float16, (0, 0)),
        (30.0, torch.float16, (2, 2)),
        (300.0, torch.float16, (2, 2)),
        (17.0, torch.float32, (0, 2)),
        (100.0, torch.float32, (2, 2)),
        (1e4, torch.float32, (2, 2)),
    ],
)
def test_the_spread_decides(spread, dtype, heads, device, poisoned):
    w, grad = spread_tokens((1, 197, 2, 64), spread, dtype, device)
    w = w * 0.8 if spread == 3.0 else w
    assert _refused(w, grad) == heads
    assert _is_right(w, grad)


def test_one_head_of_several_is_refused(device, poisoned):
    w, grad = tokens_and_gradient((1, 197, 3, 64), torch.float16, device)
    w[:, 5, 1] *= 8
    assert _refused(w, grad) == (1, 1)
    assert _is_right(w, grad)


def test_a_nan_token_is_not_hidden(device):
    w, grad = tokens_and_gradient((1, 197, 2, 64), torch.float32, device)
    w[0, 3, 0, 0] = torch.nan
    out, dw = _attention(w, grad)
    assert out[0, :, 0].isnan().any(-1).all()
    assert dw[0, :, 0].isnan().any(-1).all()
    assert out[0, :, 1].isfinite().all()
    assert dw[0, :, 1].isfinite().all()


# --- memory ------------------------------------------------------------------------------------------------------


def test_strided_tokens_and_gradients(device, poisoned):
    base, grad = tokens_and_gradient((2, 130, 4, 64), torch.float16, device)
    views = (
        base[:, :, ::2],
        base.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :2],
        base[:1, :, :2].expand(2, -1, -1, -1),
    )
    for w in views:
        assert _is_right(w, grad[:, :, ::2])
    assert _is_right(base[:, :, :2], grad[:1, :, :2].expand(2, -1, -1, -1))


# --- when they are used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "backward"),
    [
        ((1, 197, 1, 64), torch.bfloat16, True, True),
        ((1, 256, 1, 64), torch.bfloat16, True, True),
        ((1, 257, 1, 64), torch.bfloat16, False, False),
        ((1, 180, 1, 64), torch.bfloat16, True, True),
        ((1, 63, 1, 64), torch.bfloat16, False, False),
        ((1, 785, 1, 64), torch.bfloat16, False, False),
        ((1, 197, 1, 64), torch.float16, True, False),
        ((1, 197, 1, 48), torch.bfloat16, True, True),
        ((1, 240, 1, 48), torch.bfloat16, True, True),
        ((1, 241, 1, 48), torch.bfloat16, True, False),
        ((1, 197, 1, 40), torch.bfloat16, True, False),
        ((1, 197, 1, 32), torch.bfloat16, False, False),
        ((1, 197, 1, 80), torch.bfloat16, False, False),
        ((1, 197, 1, 128), torch.bfloat16, False, False),
        ((1, 197, 1, 64), torch.float32, False, False),
    ],
)
def test_where_they_run(shape, dtype, forward, backward):
    w = torch.empty(shape, dtype=dtype)
    found = [attention._whole_head_tile(f"whole_head_{way}", w, None) is not None for way in ("forward", "backward")]
    assert found == [forward, backward]


def test_dispatch(device, monkeypatch):
    called = []
    for way in ("forward", "backward"):
        monkeypatch.setattr(whole_head, way, lambda *args, way=way: called.append(way))
    w = torch.zeros(1, 197, 1, 64, dtype=torch.float16, device=device)
    attention.forward(w, 0.125)
    assert called == ["forward"]
    attention.forward(w, 0.125, FORWARD)  # a tile for blocks of rows
    attention.backward(w, w, w, torch.zeros(1, 1, 197, device=device), 0.125)  # float16
    assert called == ["forward"]


# --- mutants -----------------------------------------------------------------------------------------------------

MUTANTS = {
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
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, device, tmp_path, poisoned):
    n_tokens = 226 if "keys of the rest" in name else 197
    w, grad = tokens_and_gradient((1, n_tokens, 1, 64), torch.float32, device)
    assert not _is_right(w, grad, mutant(whole_head, MUTANTS[name], tmp_path))


def test_a_refusal_that_is_ignored_fails(device, tmp_path, poisoned):
    ignoring = mutant(
        whole_head, ("fits = largest - smallest <= LARGEST_SPREAD", "fits = largest >= smallest"), tmp_path
    )
    w, grad = spread_tokens((1, 197, 1, 64), 300.0, torch.float32, device)
    assert not _is_right(w, grad, ignoring)
