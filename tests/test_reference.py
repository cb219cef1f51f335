"""The reference against the equations written out in index notation, in float64."""

import math

import pytest
import torch
from torch import Tensor

from crate_fast.reference import (
    coding_rate_reference,
    ista_reference,
    layer_reference,
    mssa_reference,
    subspace_attention_reference,
)


def _attention_by_loops(w: Tensor, scale: float) -> Tensor:
    out = torch.zeros_like(w)
    for b in range(w.shape[0]):
        for h in range(w.shape[2]):
            for i in range(w.shape[1]):
                logits = [scale * float(w[b, i, h] @ w[b, j, h]) for j in range(w.shape[1])]
                weights = [math.exp(v - max(logits)) for v in logits]
                for j, weight in enumerate(weights):
                    out[b, i, h] += weight / sum(weights) * w[b, j, h]
    return out


def test_subspace_attention_is_eq_5_in_loops():
    w = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(subspace_attention_reference(w, 0.7), _attention_by_loops(w, 0.7), rtol=0, atol=1e-14)
    torch.testing.assert_close(subspace_attention_reference(w), _attention_by_loops(w, 0.5), rtol=0, atol=1e-14)


def test_mssa_projects_attends_and_maps_back():
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    bases = torch.randn(3, 4, 6, dtype=torch.float64)  # head, D, C
    out_weight, out_bias = torch.randn(6, 12, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    w = torch.einsum("bnc,hdc->bnhd", x, bases)
    attended = _attention_by_loops(w, 0.5).reshape(2, 5, 12)
    expected = torch.einsum("bnk,ck->bnc", attended, out_weight) + out_bias
    actual = mssa_reference(x, bases.reshape(12, 6), out_weight, out_bias, heads=3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        mssa_reference(x, bases.reshape(12, 6), None, None, heads=3), attended, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("threshold", ["relu", "soft"])
def test_ista_is_eq_7_column_by_column(threshold):
    x, dictionary = torch.randn(7, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    step_size, sparsity = 0.3, 0.2
    expected = torch.empty_like(x)
    for i, z in enumerate(x):  # z is the paper's column vector
        u = z + step_size * dictionary.T @ (z - dictionary @ z)
        shrunk = (u - step_size * sparsity).clamp(min=0)
        if threshold == "soft":
            shrunk = shrunk - (-u - step_size * sparsity).clamp(min=0)
        expected[i] = shrunk
    actual = ista_reference(x, dictionary, step_size, sparsity, threshold)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_ista_with_the_identity_dictionary_only_shrinks():
    x = torch.tensor([[0.5, 0.005, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(
        ista_reference(x, torch.eye(3, dtype=torch.float64)), torch.tensor([[0.49, 0.0, 0.0]], dtype=torch.float64)
    )


def test_the_two_residual_forms_differ_by_what_they_add():
    width, heads = 8, 2
    weights = {
        "0.norm.weight": torch.rand(width, dtype=torch.float64) + 0.5,
        "0.norm.bias": torch.randn(width, dtype=torch.float64),
        "0.fn.qkv.weight": torch.randn(width, width, dtype=torch.float64),
        "0.fn.to_out.0.weight": torch.zeros(width, width, dtype=torch.float64),  # MSSA gives nothing
        "0.fn.to_out.0.bias": torch.zeros(width, dtype=torch.float64),
        "1.norm.weight": torch.ones(width, dtype=torch.float64),
        "1.norm.bias": torch.zeros(width, dtype=torch.float64),
        "1.fn.weight": torch.eye(width, dtype=torch.float64),
    }
    x = torch.randn(2, 3, width, dtype=torch.float64)
    norm = torch.nn.functional.layer_norm
    for residual in ("released", "paper"):
        h = x if residual == "released" else norm(x, (width,), weights["0.norm.weight"], weights["0.norm.bias"])
        expected = (norm(h, (width,)) - 0.01).clamp(min=0)
        actual = layer_reference(x, weights, heads, residual=residual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_coding_rate_of_orthonormal_and_of_equal_tokens_is_known():
    n, d, epsilon = 4, 4, 0.01
    orthonormal = torch.eye(n, dtype=torch.float64).reshape(1, n, 1, d)
    expected = 0.5 * n * math.log(1 + d / (n * epsilon))
    assert coding_rate_reference(orthonormal, epsilon).item() == pytest.approx(expected, rel=1e-12)
    equal = torch.ones(1, n, 1, d, dtype=torch.float64)
    assert coding_rate_reference(equal, epsilon).item() == pytest.approx(0.5 * math.log(1 + d / epsilon), rel=1e-12)
