"""On a GPU: kernels in every dtype against float64, determinism, compile, CUDA graphs, and training beside the eager
released form. `benchmarks/gpu_check.sh` runs this file, the kernels' own tests and then the benchmarks."""

import copy
import itertools
import json
import math
import shutil
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    agrees,
    all_within_twice_eager,
    philox_uniform,
    spread_tokens,
    token_scale,
    within_twice_eager,
)
from released import ReleasedCRATE
from runs import losses

from crate_fast import CRATE, CRATEMAE
from crate_fast.backends import explain_backend
from crate_fast.functional import compress, ista, norm_ista, subspace_attention
from crate_fast.kernels import subspace_attention as attention_kernels
from crate_fast.reference import ista_reference, mssa_reference, subspace_attention_reference
from crate_fast.train import pretrain, pretrain_mae

pytestmark = pytest.mark.gpu
PRECISIONS = ["ieee", "tf32", "float16", "bfloat16"]
ATTENTION = [  # every precision at two shapes, the one that trains at the others: a compilation each
    *itertools.product([(2, 197, 6, 64), (2, 197, 12, 48)], PRECISIONS),
    *itertools.product(
        [(2, 785, 6, 64), (1, 197, 3, 80), (1, 196, 2, 128), (2, 65, 2, 32), (1, 1, 1, 64)], ["bfloat16"]
    ),
]
ISTA = [
    *itertools.product([384], PRECISIONS, ["relu"]),
    *itertools.product([192, 576, 768, 1024], ["bfloat16"], ["relu"]),
    (384, "bfloat16", "soft"),
]
NETWORK = {"image_size": 32, "patch_size": 4, "num_classes": 10, "dim": 96, "depth": 3, "heads": 3, "dim_head": 32}


@contextmanager
def _precision(name: str):
    """The dtype, with fp32 products as named while the context lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield torch.float32 if name in ("ieee", "tf32") else getattr(torch, name)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_kernels_are_what_runs():
    assert explain_backend("cuda") == ("triton", "the device runs the fused kernels")


@pytest.mark.parametrize(("shape", "precision"), ATTENTION, ids=str)
def test_subspace_attention(shape, precision):
    with _precision(precision) as dtype:
        w = (torch.randn(shape, device="cuda") * token_scale(shape[1], shape[3])).to(dtype)
        assert agrees(subspace_attention, subspace_attention_reference, [w], "O dW")


@pytest.mark.parametrize("head_dim", [48, 64])
@pytest.mark.parametrize("n_tokens", [64, 65, 128, 180, 196, 209, 226, 256, 257])
def test_whole_heads(n_tokens, head_dim):
    """One to three blocks with and without a rest, and the first length that is too long."""
    w = (torch.randn(2, n_tokens, 6, head_dim, device="cuda") * token_scale(n_tokens, head_dim)).bfloat16()
    assert agrees(subspace_attention, subspace_attention_reference, [w], "O dW")


@pytest.mark.parametrize("n_tokens", [197, 785])
@pytest.mark.parametrize("spread", [3.0, 17.0, 30.0, 100.0, 1e4])
def test_norms_that_spread_across_the_switches(spread, n_tokens):
    w, grad = spread_tokens((2, n_tokens, 3, 64), spread, torch.bfloat16, "cuda")
    assert agrees(subspace_attention, subspace_attention_reference, [w], "O dW", grad)


@pytest.mark.parametrize("factor", [0.3, 1.5, 3.0])
def test_from_uniform_to_saturated_attention(factor):
    w = (factor * torch.randn(2, 197, 3, 64, device="cuda") * token_scale(197, 64)).bfloat16()
    assert agrees(subspace_attention, subspace_attention_reference, [w], "O dW")


@pytest.mark.parametrize("offset", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_offsets(dtype, offset):
    w = (torch.randn(4, 197, 6, 64, device="cuda") * token_scale(197, 64) + offset).to(dtype)
    assert agrees(subspace_attention, subspace_attention_reference, [w], "O dW")


def test_dropout_has_the_documented_mask():
    w = torch.randn(2, 197, 3, 64, device="cuda", dtype=torch.bfloat16)
    seed = torch.tensor(2**40 + 7, device="cuda")
    keep = (philox_uniform(seed.item(), 197, 6).view(2, 3, 197, 197) >= 0.2).cuda()

    def reference(tokens):
        heads = tokens.transpose(1, 2)
        weights = (0.125 * heads @ heads.transpose(-1, -2)).softmax(-1) * keep / 0.8
        return (weights @ heads).transpose(1, 2)

    out, _ = attention_kernels.forward(w, 0.125, 0.2, seed)
    assert within_twice_eager(out, reference(w), reference(w.double()), "O")


def _clear_of_the_threshold(x, dictionary, precision: str) -> torch.Tensor:
    """A gradient that is zero where rounding decides whether ISTA's output is."""
    tokens, wide = x.double(), dictionary.double()
    u = tokens + 0.1 * (tokens @ wide - tokens @ wide.t() @ wide)
    margin = 32 * (2**-11 if precision == "tf32" else torch.finfo(x.dtype).eps)
    return torch.where((u.abs() - 0.01).abs() > margin, torch.randn_like(u), 0).to(x.dtype)


@pytest.mark.parametrize(("width", "precision", "threshold"), ISTA)
def test_ista(width, precision, threshold):
    with _precision(precision) as dtype:
        x = torch.randn(4, 197, width, device="cuda").to(dtype)
        dictionary = (torch.randn(width, width, device="cuda") / width**0.5).to(dtype)
        ours, reference = (partial(f, threshold=threshold) for f in (ista, ista_reference))
        assert agrees(ours, reference, [x, dictionary], "y dx dD", _clear_of_the_threshold(x, dictionary, precision))


@pytest.mark.parametrize(("width", "precision"), [*itertools.product([384], PRECISIONS), (768, "bfloat16")])
def test_ista_behind_a_layer_norm(width, precision):
    with _precision(precision) as dtype:
        x = (torch.randn(4, 197, width, device="cuda") * 2 + 1).to(dtype)
        dictionary = (torch.randn(width, width, device="cuda") / width**0.5).to(dtype)
        weight = (1 + 0.3 * torch.randn(width, device="cuda")).to(dtype)
        bias = (0.3 * torch.randn(width, device="cuda")).to(dtype)

        def reference(x, weight, bias, dictionary):
            return ista_reference(F.layer_norm(x, x.shape[-1:], weight, bias), dictionary)

        cotangent = _clear_of_the_threshold(F.layer_norm(x, x.shape[-1:], weight, bias), dictionary, precision)
        assert agrees(norm_ista, reference, [x, weight, bias, dictionary], "y dx dγ dβ dD", cotangent)


@pytest.mark.parametrize("fused_map", ["0", "1"], ids=["PyTorch's output map", "fused output map"])
@pytest.mark.parametrize(("width", "precision"), [*itertools.product([384], PRECISIONS), (768, "bfloat16")])
def test_the_first_half_of_a_layer(width, precision, fused_map, monkeypatch):
    """197 tokens by whole heads; a second and third wave of persistent programs at 64 images."""
    monkeypatch.setenv("CRATE_FAST_FUSED_PRODUCTS", fused_map)
    heads = width // 64
    with _precision(precision) as dtype:
        shapes = [(64, 197, width), (width,), (width,), (width, width), (width, width), (width,)]
        spreads = (2.0, 0.3, 0.3, 0.8 / width**0.5, width**-0.5, 0.3)
        offsets = (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
        inputs = [
            (torch.randn(shape, device="cuda") * spread + offset).to(dtype)
            for shape, spread, offset in zip(shapes, spreads, offsets, strict=True)
        ]

        def reference(x, weight, bias, projection, output, output_bias):
            normed = F.layer_norm(x, x.shape[-1:], weight, bias)
            return x + mssa_reference(normed, projection, output, output_bias, heads)

        assert agrees(partial(compress, heads=heads), reference, inputs, "h dx dγ dβ dU dV db")


def test_a_layer_under_autocast():
    """fp32 tokens, bf16 products: output and gradients as close to float64 as the released form's, by their norms."""
    sizes = {"image_size": 224, "patch_size": 16, "num_classes": 10, "dim": 384, "depth": 2, "heads": 6}
    torch.manual_seed(0)
    ours, eager = CRATE(**sizes).cuda(), ReleasedCRATE(**sizes).cuda()
    eager.load_state_dict(ours.state_dict())
    exact = ReleasedCRATE(**sizes).cuda().double()
    exact.load_state_dict(ours.state_dict())
    images = torch.randn(16, 3, 224, 224, device="cuda")
    results = []
    for model, autocast in ((ours, True), (eager, True), (exact, False)):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = model(images.to(next(model.parameters()).dtype))
        out.float().square().mean().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    names = ["out", *(name for name, _ in ours.named_parameters())]
    for name, actual, theirs, truth in zip(names, *results, strict=True):
        error, allowed = ((found - truth).norm().item() for found in (actual, theirs))
        assert error <= 2 * allowed + 1e-3 * truth.norm().item(), name


def test_ista_under_autocast():
    """fp32 tokens and dictionary, bf16 product: as close as the three bf16 products of the eager form."""
    x = torch.randn(4, 197, 768, device="cuda")
    dictionary = torch.randn(768, 768, device="cuda") / 768**0.5
    cotangent = _clear_of_the_threshold(x, dictionary.bfloat16(), "bfloat16")
    results = []
    for function, autocast in ((ista, True), (ista_reference, True), (ista_reference, False)):
        dtype = torch.float32 if autocast else torch.float64
        tensors = [t.to(dtype).requires_grad_() for t in (x, dictionary)]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = function(*tensors)
        results.append([out, *torch.autograd.grad(out, tensors, cotangent.to(out.dtype))])
    assert all_within_twice_eager(*results, "y dx dD")


def test_a_rerun_is_bit_equal():
    w = torch.randn(16, 785, 6, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(64, 197, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dictionary = (torch.randn(768, 768, device="cuda") / 768**0.5).bfloat16().requires_grad_()
    ones = torch.ones(768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for function, inputs in ((subspace_attention, [w]), (norm_ista, [x, ones, ones, dictionary])):
        grad = torch.randn_like(function(*inputs))
        runs = []
        for _ in range(3):
            out = function(*inputs)
            runs.append([out, *torch.autograd.grad(out, dict.fromkeys(inputs), grad)])
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_more_elements_than_32_bits_count():
    images = 2**31 // (785 * 12 * 64) + 2
    if torch.cuda.mem_get_info()[0] < 8 * images * 785 * 12 * 64:
        pytest.skip("needs 17 GB of free GPU memory")
    w = torch.randn(785, 12, 64, device="cuda", dtype=torch.bfloat16).expand(images, -1, -1, -1).contiguous()
    with torch.no_grad():
        out = subspace_attention(w)
        assert torch.equal(out[-1], out[0])
        assert torch.equal(out[0], subspace_attention(w[:1])[0])


def _network(backend: str = "auto", **options) -> CRATE:
    torch.manual_seed(1)
    return CRATE(**NETWORK, backend=backend, **options).cuda()


def test_the_model_agrees_with_the_cpu():
    model = _network().eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        actual = model(images.cuda())
        with torch.autocast("cuda", torch.bfloat16):
            low = model(images.cuda())
        expected = model.cpu()(images)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(low.float().cpu(), expected, rtol=0.1, atol=0.1)


def test_compiled_whole_under_autocast():
    images = torch.randn(8, 3, 32, 32, device="cuda")
    results = []
    for compiled in (False, True):
        model = _network()
        runner = torch.compile(model, fullgraph=True) if compiled else model
        with torch.autocast("cuda", torch.bfloat16):
            out = runner(images)
        out.float().square().sum().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.05, atol=0.05)
    for eager, whole in zip(results[0][1], results[1][1], strict=True):
        assert (whole - eager).norm() <= 0.05 * eager.norm()


def test_cuda_graphs_draw_a_new_mask_every_time():
    w = torch.randn(2, 65, 3, 32, device="cuda", dtype=torch.bfloat16)
    subspace_attention(w, dropout_p=0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = subspace_attention(w, dropout_p=0.3)
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(out.clone())
    assert not torch.equal(*drawn)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensor_counts():
    w = torch.randn(2, 65, 3, 32, device="cuda:1", dtype=torch.bfloat16)
    torch.testing.assert_close(subspace_attention(w).cpu(), subspace_attention(w.to("cuda:0")).cpu())


def _loss_curve(model: torch.nn.Module, seed: int, steps: int = 200) -> list[float]:
    """Training losses on ten noisy prototypes, the same images for every model with this seed."""
    generator = torch.Generator("cuda").manual_seed(seed)
    prototypes = torch.randn(10, 3, 32, 32, device="cuda", generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(steps):
        labels = torch.randint(10, (64,), device="cuda", generator=generator)
        noise = torch.randn(64, 3, 32, 32, device="cuda", generator=generator)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(prototypes[labels] + 3 * noise)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu().tolist()


def test_training_follows_the_eager_released_form():
    """Mean loss by quarters: the kernels' distance from eager is within the distance between eager's own seeds."""
    curves = {"eager": [], "kernels": []}
    for seed in range(3):
        torch.manual_seed(seed)
        eager = ReleasedCRATE(**NETWORK).cuda()
        ours = CRATE(**NETWORK, backend="triton").cuda()
        ours.load_state_dict(eager.state_dict())
        curves["kernels"].append(_loss_curve(ours, seed))
        curves["eager"].append(_loss_curve(eager, seed))
    eager, kernels = (torch.tensor(curves[name]).view(3, 4, -1).mean(-1) for name in ("eager", "kernels"))
    print(f"mean loss by quarters: eager {eager.tolist()}, kernels {kernels.tolist()}")
    spread = (eager[:, None] - eager[None]).abs().amax((0, 1))
    assert ((kernels - eager).abs().amax(0) <= spread + 0.01).all()
    assert (eager[:, -1] < 0.8 * eager[:, 0]).all()  # it learns at all


def test_a_training_run(tmp_path):
    sizes = ["--train-samples", "256", "--val-samples", "64", "--epochs", "1", "--batch-size", "64", "--dim", "64"]
    assert pretrain.main([*sizes, "--device", "cuda", "--compile", "--output", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert math.isfinite(summary["val_loss"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_training_run_with_everything_on_and_resumed(tmp_path, precision):
    words = "--train-samples 256 --val-samples 64 --epochs 2 --batch-size 64 --dim 64 --device cuda --mixup 0.5 "
    words += "--cutmix 1 --random-erasing 0.5 --hflip 0.5 --repeats 2 --accumulate 2 --channels-last "
    words += f"--precision {precision} --ema-decay 0.9 --checkpoint-every 1 --keep-checkpoints 9 --log-every 1"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        assert pretrain.main([*words.split(), "--output", str(folder)]) == 0
    for step in range(4, 9):
        shutil.rmtree(broken / "checkpoints" / f"step_{step:08d}")
    (broken / "checkpoints" / "best.json").unlink()
    assert pretrain.main([*words.split(), "--output", str(broken), "--resume"]) == 0
    assert losses(broken).keys() == losses(whole).keys() == set(range(1, 9))
    for step, loss in losses(whole).items():  # the attention of PyTorch's own layers may differ from run to run
        assert losses(broken)[step] == pytest.approx(loss, rel=1e-2)
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["skipped_steps"], summary["throughput"]["precision"]) == (0, precision)


@pytest.mark.parametrize("visible_only", [False, True])
def test_the_autoencoder_agrees_with_the_cpu(visible_only):
    model = CRATEMAE(img_size=64, patch_size=8, embed_dim=128, depth=2, num_heads=2, visible_only=visible_only)
    images, noise = torch.randn(8, 3, 64, 64), torch.rand(8, 64)
    loss, pred, mask = model(images, noise=noise)
    on_gpu = copy.deepcopy(model).cuda()
    found, found_pred, found_mask = on_gpu(images.cuda(), noise=noise.cuda())
    assert torch.equal(found_mask.cpu(), mask)
    assert found.item() == pytest.approx(loss.item(), rel=1e-3)
    torch.testing.assert_close(found_pred.cpu(), pred, rtol=1e-2, atol=1e-2)
    loss.backward()
    with torch.autocast("cuda", torch.bfloat16):
        lower, _, _ = on_gpu(images.cuda(), noise=noise.cuda())
    lower.backward()
    assert lower.item() == pytest.approx(loss.item(), rel=2e-2)
    for (name, ours), expected in zip(on_gpu.named_parameters(), model.parameters(), strict=True):
        if expected.grad is not None:
            assert (ours.grad.cpu() - expected.grad).norm() < 0.1 * expected.grad.norm() + 1e-6, name


def test_an_autoencoders_training_run(tmp_path):
    words = "--train-samples 256 --val-samples 64 --epochs 1 --batch-size 64 --dim 64 --device cuda --compile"
    assert pretrain_mae.main([*words.split(), "--output", str(tmp_path / "run")]) == 0
    assert math.isfinite(json.loads((tmp_path / "run" / "summary.json").read_text())["val_loss"])


def test_maskcut_gives_the_cpus_masks():
    pytest.importorskip("scipy")
    from crate_fast.eval.maskcut import maskcut

    features = torch.zeros(6, 30, 30, 64)
    features[..., 0] = 1.0
    for image in range(6):
        for k in range(1, 4):
            top, left = (5 * image + 9 * k) % 22, (7 * image + 11 * k) % 22
            features[image, top : top + 7, left : left + 7] = torch.eye(64)[k]
    features = (features + 0.1 * torch.randn(features.shape)).flatten(1, 2)
    expected, (masks, residuals, _) = maskcut(features), maskcut(features.cuda())
    assert torch.equal(masks, expected.masks)
    assert residuals.nan_to_num().max() < 3e-6
