"""On a GPU: large tensors, agreement with the CPU, training beside the released form, with all options on."""

import copy
import itertools
import json
import math
import shutil

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from released import ReleasedCRATE
from runs import losses

from crate_fast import CRATE, CRATEMAE
from crate_fast.functional import subspace_attention
from crate_fast.train import pretrain, pretrain_mae

pytestmark = pytest.mark.gpu
NETWORK = {"image_size": 32, "patch_size": 4, "num_classes": 10, "dim": 96, "depth": 3, "heads": 3, "dim_head": 32}


def test_tensors_may_have_more_than_2_to_the_31_elements():
    images = 2**31 // (785 * 12 * 64) + 2
    if torch.cuda.mem_get_info()[0] < 8 * images * 785 * 12 * 64:
        pytest.skip("needs 17 GB of free GPU memory")
    w = torch.randn(785, 12, 64, device="cuda", dtype=torch.bfloat16).expand(images, -1, -1, -1).contiguous()
    with torch.no_grad():
        out = subspace_attention(w)
        assert torch.equal(out[-1], out[0])
        assert torch.equal(out[0], subspace_attention(w[:1])[0])


def test_the_model_agrees_with_the_cpu():
    model = CRATE(**NETWORK).cuda().eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        actual = model(images.cuda())
        with torch.autocast("cuda", torch.bfloat16):
            low = model(images.cuda())
        expected = model.cpu()(images)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(low.float().cpu(), expected, rtol=0.1, atol=0.1)


def _loss_curve(model: torch.nn.Module, seed: int, steps: int = 200) -> list[float]:
    """Return training losses on ten noisy prototypes; the seed determines the images."""
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
    """The mean losses of each quarter differ from eager's by no more than eager's do between seeds."""
    curves = []
    for seed in range(3):
        torch.manual_seed(seed)
        eager, ours = ReleasedCRATE(**NETWORK).cuda(), CRATE(**NETWORK, backend="triton").cuda()
        ours.load_state_dict(eager.state_dict())
        curves.append([_loss_curve(model, seed) for model in (eager, ours)])
    eager, kernels = torch.tensor(curves).view(3, 2, 4, -1).mean(-1).unbind(1)
    print(f"mean loss by quarters: eager {eager.tolist()}, kernels {kernels.tolist()}")
    spread = (eager[:, None] - eager[None]).abs().amax((0, 1))
    assert ((kernels - eager).abs().amax(0) <= spread + 0.01).all()
    assert (eager[:, -1] < 0.8 * eager[:, 0]).all()  # training works


@pytest.mark.parametrize("script", [pretrain, pretrain_mae], ids=["classifier", "autoencoder"])
def test_a_compiled_training_run_ends(script, tmp_path):
    words = "--train-samples 256 --val-samples 64 --epochs 1 --batch-size 64 --dim 64 --device cuda --compile"
    assert script.main([*words.split(), "--output", str(tmp_path / "run")]) == 0
    assert math.isfinite(json.loads((tmp_path / "run" / "summary.json").read_text())["val_loss"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_with_all_options_on_can_be_resumed(tmp_path, precision):
    words = "--train-samples 256 --val-samples 64 --epochs 2 --batch-size 64 --dim 64 --device cuda --mixup 0.5 "
    words += "--cutmix 1 --random-erasing 0.5 --hflip 0.5 --repeats 2 --accumulate 2 "
    words += f"--precision {precision} --ema-decay 0.9 --checkpoint-every 1 --keep-checkpoints 9 --log-every 1"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        assert pretrain.main([*words.split(), "--output", str(folder)]) == 0
    for step in range(4, 9):
        shutil.rmtree(broken / "checkpoints" / f"step_{step:08d}")
    (broken / "checkpoints" / "best.json").unlink()
    assert pretrain.main([*words.split(), "--output", str(broken), "--resume"]) == 0
    assert losses(broken).keys() == losses(whole).keys() == set(range(1, 9))
    for step, loss in losses(whole).items():  # PyTorch's own attention is not deterministic
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


def test_maskcut_gives_the_same_masks_as_on_a_cpu():
    pytest.importorskip("scipy")
    from crate_fast.eval.maskcut import maskcut

    features = torch.zeros(6, 30, 30, 64)
    features[..., 0] = 1.0
    for image, k in itertools.product(range(6), range(1, 4)):
        top, left = (5 * image + 9 * k) % 22, (7 * image + 11 * k) % 22
        features[image, top : top + 7, left : left + 7] = torch.eye(64)[k]
    features = (features + 0.1 * torch.randn(features.shape)).flatten(1, 2)
    expected, (masks, residuals, _) = maskcut(features), maskcut(features.cuda())
    assert torch.equal(masks, expected.masks)
    assert residuals.nan_to_num().max() < 3e-6
