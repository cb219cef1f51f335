"""On a GPU: the operators in every dtype, the model against the CPU, and a training run with autocast."""

import json
import math

import pytest
import torch
from oracle import token_scale, within_twice_eager

from crate_fast import CRATE
from crate_fast.functional import ista, subspace_attention
from crate_fast.reference import ista_reference, subspace_attention_reference
from crate_fast.train import pretrain

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 197, 6, 64), (2, 197, 12, 48), (1, 785, 6, 64)], ids=str)
def test_subspace_attention(shape, dtype):
    w = (torch.randn(shape, device="cuda") * token_scale(shape[1], shape[3])).to(dtype).requires_grad_()
    grad = torch.randn(shape, device="cuda").to(dtype)
    results = []
    for function, tokens in (
        (subspace_attention, w),
        (subspace_attention_reference, w),
        (subspace_attention_reference, w.double()),
    ):
        out = function(tokens)
        results.append((out, *torch.autograd.grad(out, w, grad.to(out.dtype))))
    for actual, eager, truth, name in zip(*results, ("O", "dW"), strict=True):
        assert within_twice_eager(actual, eager, truth, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ista(dtype):
    x = torch.randn(4, 197, 384, device="cuda").to(dtype)
    dictionary = (torch.randn(384, 384, device="cuda") / 384**0.5).to(dtype)
    truth = ista_reference(x.double(), dictionary.double())
    assert within_twice_eager(ista(x, dictionary), ista_reference(x, dictionary), truth, "y")


def test_the_model_agrees_with_the_cpu():
    model = CRATE(image_size=32, patch_size=4, num_classes=7, dim=96, depth=3, heads=3, dim_head=32).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        actual = model.cuda()(images.cuda())
        with torch.autocast("cuda", torch.bfloat16):
            low = model(images.cuda())
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(low.float().cpu(), expected, rtol=0.1, atol=0.1)


def test_a_training_run(tmp_path):
    sizes = ["--train-samples", "256", "--val-samples", "64", "--epochs", "1", "--batch-size", "64", "--dim", "64"]
    assert pretrain.main([*sizes, "--device", "cuda", "--compile", "--output", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert math.isfinite(summary["val_loss"])
