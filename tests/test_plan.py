"""`crate-fast plan`: operations and bytes against values by hand and a real forward pass, and the command."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from image_data import write_tree

from crate_fast import CRATEMAE
from crate_fast.registry import create_model
from crate_fast.train import plan
from crate_fast.train.config import TrainConfig, recipe_names
from crate_fast.train.cost import Flops, activation_bytes, count_flops, meta_model, optimizer_bytes
from crate_fast.train.distributed import layers_of
from crate_fast.train.runs import build_model

N, PATCHES, PATCH_DIM, C, HEADS, DEPTH, K = 65, 64, 48, 32, 2, 3, 10  # of TINY
TINY = TrainConfig(
    image_size=32, patch_size=4, dim=C, depth=DEPTH, heads=HEADS, label_smoothing=0.0, batch_size=8, device="cpu"
)
VIT = {"model": "vit_tiny_patch16_224", "dim": None, "heads": None}
TINY_MAE = dataclasses.replace(TINY, model="crate_mae_tiny_patch16_224", decoder_depth=1)


def _changed(**changes) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


@pytest.fixture
def planned(capsys):
    """A function that returns the printed numbers of a plan."""

    def numbers(*words: str) -> dict[str, float]:
        assert plan.main(list(words)) == 0
        lines = [line.rpartition("  ") for line in capsys.readouterr().out.splitlines()[1:] if "unknown" not in line]
        return {name.strip(): float(value.replace(",", "")) for name, _, value in lines}

    return numbers


EMBED, HEAD = 2 * PATCHES * PATCH_DIM * C, 2 * C * K  # operations: two per multiply-add
LINEAR, ATTENTION = 2 * N * C**2, 2 * 2 * N**2 * C  # a map C → C of all tokens; logits and weighted sum


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ({}, 3 * LINEAR + ATTENTION),
        ({"heads": 1}, 2 * LINEAR + ATTENTION),  # one head needs no output map
        ({"grad_checkpointing": True}, 3 * LINEAR + ATTENTION),
        ({"attention": "mhsa", "sparsifier": "mlp"}, 4 * LINEAR + ATTENTION + 8 * LINEAR),
    ],
)
def test_operations_of_a_step(changes, layer):
    forward = EMBED + HEAD + DEPTH * layer
    assert count_flops(meta_model(_changed(**changes), K), 32) == Flops(forward, 3 * forward)
    assert count_flops(meta_model(_changed(**changes, frozen=True), K), 32) == Flops(forward, forward + HEAD)


def test_operations_of_a_timm_model():
    model = meta_model(_changed(**VIT), K)
    width, embed = 192, 2 * PATCHES * PATCH_DIM * 192
    forward = embed + DEPTH * (12 * 2 * N * width**2 + 2 * 2 * N**2 * width) + 2 * width * K
    assert count_flops(model, 32) == Flops(forward, 3 * forward - embed)  # pixels need no gradient


def test_operations_of_an_autoencoder():
    for visible_only, n in ((False, N), (True, 1 + PATCHES // 4)):
        encoder = DEPTH * (3 * 2 * n * C**2 + 2 * 2 * n**2 * C) + (2 * n * C**2 if visible_only else 0)
        forward = EMBED + encoder + 3 * LINEAR + ATTENTION + 2 * N * C * PATCH_DIM
        model = meta_model(dataclasses.replace(TINY_MAE, visible_only=visible_only), 0)
        assert count_flops(model, 32) == Flops(forward, 3 * forward - EMBED)  # pixels need no gradient


def _kept(config: TrainConfig, device: str, dtype: torch.dtype | None, images: int = 4) -> int:
    return activation_bytes(meta_model(config, K), config, images, device, dtype)


def test_activations_equal_those_of_a_real_forward_pass():
    for config in (TINY, TINY_MAE, dataclasses.replace(TINY_MAE, visible_only=True)):
        assert _kept(config, "cpu", None) == _really_saved(config, None), config
    for config in (TINY, _changed(attention="mhsa", sparsifier="mlp")):
        # The two statistics of a LayerNorm of bf16 rows (the patches) are in fp32, those of its fake in bf16.
        found = _kept(config, "cpu", torch.bfloat16) + 4 * PATCHES * 2 * 2
        assert found == _really_saved(config, torch.bfloat16), config


def _really_saved(config: TrainConfig, dtype: torch.dtype | None) -> int:
    model, saved = build_model(config, K).train(), {}
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            output = model(torch.randn(4, 3, 32, 32))
        if not isinstance(model, CRATEMAE):
            F.cross_entropy(output.float(), torch.zeros(4, dtype=torch.long))
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


@pytest.mark.parametrize("changes", [{}, VIT], ids=["crate", "timm"])
def test_checkpointing_keeps_the_layers_inputs_and_one_layer(changes):
    config, checkpointed = _changed(**changes), _changed(**changes, grad_checkpointing=True)
    inputs, whole = _really_saved(checkpointed, None), _really_saved(config, None)
    assert _kept(checkpointed, "cpu", None) == inputs + (whole - inputs) // DEPTH


def test_activations_in_bf16_by_the_kernels_by_hand():
    embedding = (4 + 2) * PATCHES * PATCH_DIM + 4 * PATCHES * C + 4 * 4 * PATCHES
    layer = (2 + 2 + 2 + 4 + 1) * N * C  # normalised rows, W, O in bf16; h in fp32; where y is not zero
    layer += 4 * (3 + HEADS) * N  # LN1's rstd, LN2's mean and rstd, log-sum-exp
    image = embedding + DEPTH * layer + 4 * N * C + 4 * 2 + 2 * C + 4 * K + 8  # the last y in fp32; the head
    weights = 2 * (PATCH_DIM * C + C * K + DEPTH * C**2)  # copies in bf16, G
    assert _kept(TINY, "cuda", torch.bfloat16) == 4 * image + weights + 4  # the labels' weight


def test_ordinary_attention_keeps_what_fused_kernels_of_a_gpu_keep():
    configs = (TINY, _changed(attention="mhsa"))
    tied, ordinary = (_kept(c, "cuda", torch.bfloat16, 8) - _kept(c, "cuda", torch.bfloat16, 4) for c in configs)
    # key, value and the fp32 input of LayerNorm, but nothing of size N²
    assert ordinary - tied == 4 * DEPTH * ((2 + 2 + 4) * N * C + 4 * N)


def test_a_frozen_model_keeps_only_activations_of_the_classifier():
    config = _changed(frozen=True)
    assert _kept(config, "cpu", None, 8) - _kept(config, "cpu", None, 4) == 4 * (4 * (C + K) + 8)


def test_bytes_of_optimiser_states():
    model = meta_model(TINY, K)
    parameters, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    for optimizer, states in (("adamw", 2), ("lion", 1), ("sgd", 1), ("lamb", 2)):
        found = optimizer_bytes(model, _changed(optimizer=optimizer))
        assert 0 <= found - 4 * states * parameters <= 4 * tensors  # some count the steps of each tensor


def test_sharding_divides_all_but_the_activations(planned):
    words = ["--recipe", "in1k_released", "--ema-decay", "0.99", "--depth", "1", "--gpus", "8"]
    whole, shared = planned(*words), planned(*words, "--parallel", "fsdp")
    weights = 4 * whole["parameters"] / 2**30
    for name in ("weights", "gradients", "optimizer", "EMA"):
        assert whole[f"{name}, GiB"] == pytest.approx(weights, rel=1e-4)
        assert shared[f"{name}, GiB"] == pytest.approx(weights / 8, rel=1e-4)
    activations = whole["activations in bf16, GiB"]
    assert shared["activations in bf16, GiB"] == activations
    assert shared["memory in all, GiB"] == pytest.approx(activations + weights / 2, rel=1e-4)


def test_the_numbers_of_a_plan_by_hand(planned):
    words = ["--recipe", "cifar10", "--gpus", "4", "--accumulate", "2", "--epochs", "3", "--images-per-s", "100"]
    found = planned(*words)
    names = ("images", "classes", "steps per epoch", "steps", "images per pass and device", "parameters")
    assert [found[name] for name in names] == [50_000, 10, 390, 1_170, 16, 694_186]
    assert found["hours"] == pytest.approx(1_170 * 128 / 100 / 3600, rel=1e-4)
    words = ["--recipe", "cifar10", "--dataset", "shape_scenes", "--depth", "1", "--images-per-s", "1,234.5"]
    found = planned(*words)
    assert (found["images"], found["classes"]) == (20_000, 12)
    assert found["hours"] == pytest.approx(found["steps"] * 128 / 1234.5 / 3600, rel=1e-4)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_can_be_planned_without_its_data(recipe, capsys):
    assert plan.main(["--recipe", recipe, "--gpus", "2", "--depth", "1"]) == 0
    assert "unknown: pass --images-per-s" in capsys.readouterr().out


def test_images_of_an_existing_folder_are_counted(tmp_path, planned):
    names = ["a/inside/1.jpg", "a/2.PNG", "b/3.webp", "b/notes.txt", ".ipynb_checkpoints/1.jpg"]
    for split in ("train", "val"):
        write_tree(tmp_path / split, dict.fromkeys(names, b""))
    words = ["--recipe", "in1k_released", "--data-dir", str(tmp_path), "--depth", "1", "--batch-size", "1"]
    for given, sizes in (([], (3, 2)), (["--images", "77"], (77, 2))):
        found = planned(*words, *given)
        assert (found["images"], found["classes"]) == sizes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--recipe finetune_pets --dataset folder --images 500", "train does not exist .*--images N and --classes N"),
        ("--gpus 3", "batch_size=128 cannot be divided among 3 processes × 1 accumulation steps: make it a multiple"),
        ("--optimizer lyon", "lyon"),
        ("--model vit_tiny_patch16_224 --image-size 50", r"image size \(50, 50\) is not a multiple of the patch"),
        ("--model twins_svt_small --grad-checkpointing", "model='twins_svt_small' has none; leave it out"),
        ("--optimizer novograd --depth 1", "optimizer='novograd' cannot be planned"),
        ("--dataset folder --data-dir EMPTY", "it holds no images"),
        ("--recipe finetune_in1k --init runs/typo@3", "--init runs/typo@3 does not exist"),
    ],
)
def test_bad_plans_are_errors(words, message, tmp_path, refuses):
    write_tree(tmp_path, {"EMPTY/train/notes.txt": b""})
    refuses(message, plan.main, [str(tmp_path / word) if word.isupper() else word for word in words.split()])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("swin_tiny_patch4_window7_224", ["SwinTransformerBlock"]),
        ("volo_d1_224", ["Outlooker", "Transformer"]),
        ("mvitv2_tiny", ["MultiScaleBlock"]),
        ("cait_xxs24_224", ["LayerScaleBlock"]),
        ("resnet18", ["BasicBlock"]),
        ("crate_mae_tiny_patch16_224", ["DecoderLayer", "Layer"]),
    ],
)
def test_layers_are_found_in_models_of_every_structure(name, kinds):
    with torch.device("meta"):
        layers = layers_of(create_model(name))
    assert sorted({type(getattr(layer, "layers", [layer])[0]).__name__ for layer in layers}) == kinds
