"""CRATE against the released module and the reference; compilation, precision, bad arguments."""

import copy

import pytest
import timm
import torch
from oracle import model_gradients
from released import ReleasedCRATE
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crate_fast import CRATE, CRATEMAE, CRATE_base, CRATE_large, CRATE_small, CRATE_tiny
from crate_fast.errors import UserError
from crate_fast.layers import ISTA, MSSA, ODL, Linear
from crate_fast.reference import layer_reference, mssa_reference

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 48, "depth": 3, "heads": 3, "dim_head": 16}
CHANGES = [{}, {"pool": "mean"}, {"ista": 0.3}, {"channels": 1}]
CHANGES += [{"heads": 1, "dim_head": 48}]  # no output map
CHANGES += [{"image_size": 16}]  # five tokens: the two-product ISTA
CHANGES += [{"dim": 8, "dim_head": 4}]  # more tokens than width: the folded ISTA


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_logits_and_all_gradients_equal_the_released_module_in_float64(changes):
    arguments = SMALL | changes
    theirs, ours = ReleasedCRATE(**arguments).double(), CRATE(**arguments).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(3, arguments.get("channels", 3), arguments["image_size"], arguments["image_size"]).double()
    found, released = model_gradients(ours, images), model_gradients(theirs, images)
    torch.testing.assert_close(found.pop("output"), released.pop("output"), rtol=0, atol=1e-10)
    torch.testing.assert_close(found, released, rtol=1e-10, atol=1e-10)


def test_the_fast_fp32_path_agrees_with_the_released_module():
    arguments = SMALL | {"image_size": 64, "patch_size": 4}  # 257 tokens: the row-blocked attention and folded ISTA
    theirs, ours = ReleasedCRATE(**arguments), CRATE(**arguments)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    found, released = model_gradients(ours, images), model_gradients(theirs, images)
    torch.testing.assert_close(found.pop("output"), released.pop("output"), rtol=1e-4, atol=1e-5)
    for name, gradient in found.items():
        assert (gradient - released[name]).abs().max() < 1e-4 * released[name].abs().max(), name


def test_initial_distributions_are_the_released_ones():
    sizes = {"image_size": 224, "patch_size": 16, "num_classes": 1000, "dim": 384, "depth": 1, "heads": 6}
    model, released = CRATE(**sizes), ReleasedCRATE(**sizes)
    for (name, ours), theirs in zip(model.named_parameters(), released.parameters(), strict=True):
        if ours.numel() > 2000:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05), name
            assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.3), name


SIZES = {  # width, depth, heads, patch, classes, and the papers' millions of parameters
    "crate_tiny_patch16_224": (384, 12, 6, 16, 1000, "6.09"),
    "crate_small_patch16_224": (576, 12, 12, 16, 1000, "13.12"),
    "crate_base_patch16_224": (768, 12, 12, 16, 1000, "22.80"),
    "crate_large_patch16_224": (1024, 24, 16, 16, 1000, "77.64"),
    "crate_tiny_patch8_224": (192, 12, 3, 8, 21842, "5.74"),
    "crate_small_patch8_224": (384, 12, 6, 8, 21842, "14.12"),
    "crate_base_patch8_224": (768, 12, 12, 8, 21842, "38.83"),
}
FACTORIES = {"tiny": CRATE_tiny, "small": CRATE_small, "base": CRATE_base, "large": CRATE_large}


@pytest.mark.parametrize("name", SIZES)
def test_registered_names_and_released_factories_build_the_papers_sizes(name):
    width, depth, heads, patch, classes, printed = SIZES[name]
    sizes = {"dim": width, "depth": depth, "heads": heads, "dim_head": width // heads}
    with torch.device("meta"):
        models = [timm.create_model(name), *([FACTORIES[name.split("_")[1]]()] if patch == 16 else [])]
        released = ReleasedCRATE(image_size=224, patch_size=patch, num_classes=classes, **sizes)
    for model in models:
        shapes = [{k: v.shape for k, v in one.state_dict().items()} for one in (model, released)]
        assert shapes[0] == shapes[1]
        assert {step.fn.heads for step, _ in model.transformer.layers} == {heads}
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == printed
        assert model.num_classes == classes


@pytest.mark.parametrize("threshold", ["relu", "soft"])
@pytest.mark.parametrize("residual", ["released", "paper"])
def test_every_layer_equals_the_reference(residual, threshold):
    model = CRATE(**SMALL, residual=residual, threshold=threshold, ista=0.2, sparsity=0.3).double()
    x = torch.randn(2, 60, 48, dtype=torch.float64)
    for layer in model.transformer.layers:
        weights, options = dict(layer.named_parameters()), {"residual": residual, "threshold": threshold}
        expected = layer_reference(x, weights, heads=3, step_size=0.2, sparsity=0.3, **options)
        torch.testing.assert_close(x := layer(x), expected, rtol=0, atol=1e-12)


def test_intermediates_are_the_outputs_of_the_layers():
    model, images, outputs = CRATE(**SMALL).eval(), torch.randn(2, 3, 32, 32), []
    for layer in model.transformer.layers:
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    final, maps = model.forward_intermediates(images)
    assert len(outputs) == 3
    for taken, output in zip(maps, outputs, strict=True):
        torch.testing.assert_close(taken.flatten(2).transpose(1, 2), output[:, 1:])
    torch.testing.assert_close(final, outputs[-1])
    (last,) = model.get_intermediate_layers(images, n=1, norm=True)
    torch.testing.assert_close(last, model.mlp_head[0](outputs[2][:, 1:]))
    pairs = model.get_intermediate_layers(images, n=[0, 2], reshape=True, return_prefix_tokens=True)
    assert [(a.shape, b.shape) for a, b in pairs] == [((2, 48, 4, 4), (2, 1, 48))] * 2
    outputs.clear()
    (early,) = model.forward_intermediates(images, [0], stop_early=True, output_fmt="NLC", intermediates_only=True)
    assert len(outputs) == 1
    torch.testing.assert_close(early, outputs[0][:, 1:])


def test_the_input_size_can_be_changed_and_changed_back():
    model, images = CRATE(**SMALL).eval(), torch.randn(1, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(images)
    model.set_input_size(64)
    assert model.grid_size == (8, 8)
    logits = model(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 7)
    logits.sum().backward()
    assert model.pos_embedding.grad.abs().sum() > 0  # through the interpolation
    model.set_input_size((32, 64))
    assert model.forward_intermediates(torch.randn(1, 3, 32, 64))[1][0].shape == (1, 48, 4, 8)
    model.set_input_size(32)
    assert torch.equal(model(images), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_compiles_with_inductor(monkeypatch):
    monkeypatch.setenv("TORCH_WARM_POOL", "0")  # no processes that wait to compile Triton
    model, images = CRATE(**(SMALL | {"depth": 1})), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision_stay_near_fp32(dtype):
    model, images = CRATE(**SMALL).eval(), torch.randn(2, 3, 32, 32)
    exact = model(images)
    with torch.autocast("cpu", dtype):
        autocast = model(images)
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(autocast.float(), exact, rtol=tolerance, atol=tolerance)
    low = model.to(dtype)(images.to(dtype))
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), exact, rtol=4 * tolerance, atol=4 * tolerance)


def test_parameters_have_the_given_device_and_dtype():
    model = CRATE(**SMALL, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert model(torch.empty(2, 3, 32, 32, device="meta", dtype=torch.bfloat16)).shape == (2, 7)


def test_bad_arguments_are_errors():
    bad = {"residual": "pre", "sparsifier": "relu", "threshold": "hard", "backend": "cuda"}
    for name, value in (
        bad | {"patch_size": 0, "depth": 0, "heads": 2.5, "num_classes": -1, "image_size": 32.0}
    ).items():
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            CRATE(**(SMALL | {name: value}))
    with pytest.raises(ValueError, match="attention='msa'.*'mssa', 'mhsa'"):
        CRATE(**SMALL, attention="msa")
    with pytest.raises(ValueError, match=r"image size \(30, 30\) is not a multiple of the patch size \(8, 8\)"):
        CRATE(**(SMALL | {"image_size": 30}))


def test_bad_images_are_errors():
    model, images = CRATE(**SMALL), torch.zeros(1, 3, 32, 32)
    for message, call in {
        "images are 64×64 and the model expects 32×32.*set_input_size": lambda: model(torch.zeros(1, 3, 64, 64)),
        "images are 60×64 and the model expects 32×32: resize them$": lambda: model(torch.zeros(1, 3, 60, 64)),
        r"images have shape \(1, 1, 32, 32\): pass \[B, 3": lambda: model(images[:, :1]),
        r"\(65, 65\) is not a multiple": lambda: model.set_input_size(65),
        "patch_size=4": lambda: model.set_input_size(32, patch_size=4),
        "output_fmt='NHWC'": lambda: model.forward_intermediates(images, output_fmt="NHWC"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    autoencoder = CRATEMAE(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    for network in (model, CRATE(**SMALL, dynamic_img_size=True), autoencoder):
        for wrong in (images.byte(), images.bool(), images.numpy()):
            with pytest.raises(UserError, match=r"images are .*: pass a floating-point tensor; .*float\(\) / 255"):
                network(wrong)


@pytest.mark.parametrize("onednn", ["0", "1"])
def test_pytorchs_counter_counts_the_operations_of_the_cpu_operators(onednn, monkeypatch):
    monkeypatch.setenv("CRATE_FAST_ONEDNN", onednn)
    model, images = CRATE(**SMALL, sparsifier="mlp"), torch.zeros(8, 3, 32, 32)  # meta: another form of ISTA
    with FlopCounterMode(display=False) as counter:
        logits = model(images)
        forward = counter.get_total_flops()
        logits.sum().backward()
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        model(images)
    with FlopCounterMode(display=False) as plain, sdpa_kernel(SDPBackend.MATH):
        model.to("meta")(images.to("meta"))
    assert forward == inference.get_total_flops() == plain.get_total_flops() > 0
    assert 3 * forward <= counter.get_total_flops() < 3.1 * forward  # backward recomputes the weights of attention


def test_a_replaced_projection_trains():
    model = CRATE(**SMALL)
    for attention, _ in model.transformer.layers:
        for parent, name in ((attention.fn, "qkv"), (attention.fn.to_out, "0")):
            setattr(parent, name, nn.Sequential(getattr(parent, name).requires_grad_(False), nn.Linear(48, 48)))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_part_beside_the_output_projection_is_not_skipped_by_the_kernels(training, device):
    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    model, images = CRATE(**SMALL).to(device).train(training), torch.randn(2, 3, 32, 32, device=device)
    for change in (
        lambda fn: fn.to_out.append(nn.Linear(48, 48)),
        lambda fn: setattr(fn.to_out, "1", nn.LayerNorm(48)),
        lambda fn: setattr(fn, "to_out", Doubled(*fn.to_out[:2])),
        lambda fn: setattr(fn, "qkv", Linear(48, 48)),  # with a bias
    ):
        for attention, _ in model.transformer.layers:
            change(attention.fn.to(device))
        outputs = []
        for backend in ("triton", "torch"):
            for attention, _ in model.transformer.layers:
                attention.fn.backend = backend
            outputs.append(model.to(device)(images))
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


def test_all_parts_of_a_head_of_the_users_own_run():
    model, images = CRATE(**SMALL), torch.randn(2, 3, 32, 32)
    model.mlp_head = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 4))
    logits = model(images)
    torch.testing.assert_close(logits, model.mlp_head(model.forward_features(images)[:, 0]))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.mlp_head.parameters())


def test_dropout_in_training_mode_alone_is_not_skipped_by_the_kernels(device):
    """As in Monte Carlo dropout, where the rest of the model is in evaluation mode."""
    model = CRATE(**SMALL, proj_drop_rate=0.5, backend="triton").to(device).eval()
    images = torch.randn(1, 3, 32, 32, device=device)
    assert torch.equal(model(images), model(images))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize(("kind", "options"), [(ISTA, {}), (ODL, {"sparsifier": "odl"}), (MSSA, {})])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_another_forward_of_a_class_is_called(kind, options, backend, device, monkeypatch):
    model = CRATE(**SMALL, **options, backend=backend).to(device)
    images, calls = torch.randn(1, 3, 32, 32, device=device), []
    monkeypatch.setattr(kind, "forward", lambda module, x: calls.append(module) or torch.zeros_like(x))
    model(images)
    assert len(calls) == SMALL["depth"]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_heads_can_be_removed(backend, device):
    """The head width stays, so the remaining subspaces do too."""
    layer = CRATE(**SMALL, backend=backend).to(device).transformer.layers[0]
    attention, x = layer[0].fn, torch.randn(2, 17, 48, device=device)
    kept = Linear(48, 32, bias=False), Linear(32, 48)
    kept[0].weight.data, kept[1].weight.data = attention.qkv.weight[:32], attention.to_out[0].weight[:, :32]
    kept[1].bias.data = attention.to_out[0].bias
    attention.qkv, attention.to_out[0] = kept[0], kept[1]
    w = layer[0].norm(x)
    expected = mssa_reference(w, kept[0].weight, kept[1].weight, kept[1].bias, 2)
    torch.testing.assert_close(layer[0](x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer._compress(x), x + expected, rtol=1e-3, atol=1e-4)


def test_a_model_from_the_meta_device_is_initialised_by_its_modules():
    with torch.device("meta"):
        model = CRATE(**SMALL)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_subclass_may_have_a_part_with_a_released_name():
    class Segmenter(CRATE):
        def __init__(self):
            super().__init__(**SMALL)
            self.head, self.conv1 = nn.Linear(48, 2), nn.Conv2d(3, 48, 8)

    model, other = Segmenter(), Segmenter()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other.head.weight, model.head.weight)
    assert torch.equal(other.conv1.weight, model.conv1.weight)
