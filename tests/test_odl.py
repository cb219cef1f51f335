"""ODL and CRATE-α against the float64 reference and the released module, on a CPU and by the kernels."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import agrees, mutant
from released import ReleasedCRATEAlpha
from runs import same
from torch._subclasses import FakeTensorMode

import crate_fast
from crate_fast import CRATE, odl
from crate_fast.checkpoints import load_weights, released_state_dict
from crate_fast.errors import UserError
from crate_fast.kernels import product
from crate_fast.model import ALPHA_OPTIONS
from crate_fast.reference import odl_reference
from crate_fast.train.config import TrainConfig
from crate_fast.train.runs import build_model
from crate_fast.whitebox import layer_measures, trace

SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 48, "depth": 2, "heads": 3}
NAMES = "y dx dD dD₁"
KERNELS = partial(odl.odl, backend="triton")


def _inputs(shape=(2, 17, 48), atoms=192, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    width = shape[-1]
    drawn = torch.randn(shape), torch.randn(width, atoms) * (2 / atoms) ** 0.5, torch.randn(width, atoms) / width**0.5
    return [tensor.to(dtype).to(device).requires_grad_() for tensor in drawn]


def _alpha(**options) -> CRATE:
    return CRATE(**(SIZES | {"dim_head": 16} | ALPHA_OPTIONS | options))


def test_the_kernels_take_half_precision_parameters_under_autocast(device):
    """PyTorch's LayerNorm of a GPU takes one dtype, and autocast's rows are fp32."""
    x, dictionary, decoder = _inputs(dtype=torch.float16, device=device)
    gamma, beta = (torch.ones(48, dtype=torch.float16, device=device, requires_grad=True) for _ in range(2))
    layer_norm, dtypes = torch.native_layer_norm, []

    def of_a_gpu(x, shape, *weights):
        dtypes.append([x.dtype, *(weight.dtype for weight in weights[:2])])
        return layer_norm(x, shape, *weights)

    with pytest.MonkeyPatch.context() as patch, torch.autocast(device.type, torch.float16):
        patch.setattr(torch, "native_layer_norm", of_a_gpu)
        KERNELS(x, dictionary, decoder, norm=(gamma, beta, 1e-6)).float().sum().backward()
    assert dtypes == [[torch.float32] * 3]
    assert (gamma.grad.dtype, x.grad.dtype) == (torch.float16, torch.float16)


@pytest.fixture
def released() -> ReleasedCRATEAlpha:
    return ReleasedCRATEAlpha(**SIZES)


@pytest.fixture(params=["MKL", "oneDNN", "kernels"])
def backend(request, monkeypatch) -> str:
    """The kernels, or PyTorch with one of the CPU's libraries."""
    monkeypatch.setenv("CRATE_FAST_ONEDNN", str(int(request.param == "oneDNN")))
    return "triton" if request.param == "kernels" else "torch"


@pytest.mark.parametrize(  # in half precision neither of the CPU's libraries serves
    ("backend", "dtype"),
    [
        *((name, torch.float32) for name in ("MKL", "oneDNN", "kernels")),
        ("MKL", torch.float16),
        ("kernels", torch.float16),
    ],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize(
    ("shape", "atoms", "with_norm", "steps"),
    [
        *(((2, 17, 48), 192, True, steps) for steps in (1, 2)),
        ((130, 16), 64, False, 2),
        ((33, 48), 16, False, 2),
        *(((1, 80), 320, False, steps) for steps in (1, 2)),
    ],
    ids=str,
)
def test_odl_agrees_with_the_reference(shape, atoms, with_norm, dtype, backend, steps, device, poisoned):
    def ours(x, dictionary, decoder, *channels):
        norm = (*channels, 1e-6) if channels else None
        return odl.odl(x, dictionary, decoder, steps=steps, norm=norm, backend=backend)

    def reference(x, dictionary, decoder, *channels):
        x = F.layer_norm(x, x.shape[-1:], *channels, 1e-6) if channels else x
        return odl_reference(x, dictionary, decoder, steps=steps)

    inputs, names = _inputs(shape, atoms, dtype, device), NAMES
    if with_norm:
        inputs += [(1 + 0.3 * torch.randn(48)).to(inputs[0]), torch.randn(48).to(inputs[0])]
        names += " dγ dβ"
    assert agrees(ours, reference, inputs, names)


def test_tied_dictionaries_and_single_gradients_agree_with_the_reference(backend, device):
    x, dictionary, decoder = _inputs(device=device)
    tied = partial(odl.odl, backend=backend)
    assert agrees(lambda x, d: tied(x, d, d), lambda x, d: odl_reference(x, d, d), [x, dictionary], "y dx dD")
    for wanted in ([x], [dictionary], [decoder]):
        losses = (f(x, dictionary, decoder).square().sum() for f in (tied, odl_reference))
        ours, whole = (torch.autograd.grad(loss, wanted)[0] for loss in losses)
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize(
    "mutation",
    [
        ("acc = acc * alpha", "acc = acc * 1.0"),
        ("y = x + acc", "y = acc"),
        ("y = tl.where(y <= shift, 0.0, y - shift)", "y = tl.where(y <= shift, 0.0, y)"),
        ("y = tl.where(_load_tile(mask_ptr, offs_m, offs_n, n_rows, WIDTH, BLOCK) != 0.0, y, 0.0)", "y = y + 0.0"),
    ],
)
def test_mutants_of_the_kernel_fail(mutation, device, tmp_path, monkeypatch):
    monkeypatch.setattr(product, "product", mutant(product, mutation, tmp_path).product)
    assert not agrees(KERNELS, odl_reference, _inputs(device=device), NAMES)


def test_only_mutants_of_the_algebra_fail(tmp_path):
    for mutation in (
        ("add, first, -1.0, total)", "add, first, -1.0, total)"),  # the control
        ("add, first, -1.0, total)", "add, first, 0.0, total)"),
        ("step_size, add=first, shift=shift)", "step_size, shift=shift)"),
        ("-1.0, add=masked, mask=first)", "-1.0, add=masked)"),
        ("masked, step_size, total)", "masked, 1.0, total)"),
        ("step_size, add=add, dtype=x.dtype)", "step_size, dtype=x.dtype)"),
    ):
        right = agrees(mutant(odl, mutation, tmp_path).odl, odl_reference, _inputs(), NAMES)
        assert right == (mutation[0] == mutation[1]), mutation


def test_a_nan_is_not_hidden_and_an_empty_batch_has_zero_gradients():
    x, dictionary, decoder = (tensor.detach() for tensor in _inputs())
    for changed in (x, dictionary):
        kept, changed[..., 0, 0] = changed[..., 0, 0].clone(), torch.nan
        assert odl.odl(x, dictionary, decoder).isnan().any()
        changed[..., 0, 0] = kept
    weights = [w.requires_grad_() for w in (dictionary, decoder)]
    y = odl.odl(x[:0], *weights)
    assert y.shape == (0, 17, 48)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(y.sum(), weights))


def test_second_derivatives_by_torch_func_are_the_references():
    x, dictionary, decoder = (tensor.detach() for tensor in _inputs((3, 8), 32))
    ours, expected = (
        torch.func.hessian(lambda x, step=step: step(x, dictionary, decoder).square().sum())(x)
        for step in (odl.odl, odl_reference)
    )
    torch.testing.assert_close(ours, expected)


def test_backward_keeps_the_codes_and_two_rows_per_token():
    kept, (x, dictionary, decoder) = [], _inputs((1, 100, 64), 256)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        odl.odl(x[0], dictionary, decoder)
    assert sum(t.numel() for t in kept if t.shape[0] == 100) == 100 * (64 + 64 + 2 * 256)  # x, v, z₁, z₂


def test_released_weights_load_and_give_the_released_outputs_and_gradients(released, tmp_path):
    torch.save(released.state_dict(), tmp_path / "alpha.pth")
    ours, direct = load_weights(_alpha(), tmp_path / "alpha.pth").double(), _alpha()
    direct.load_state_dict(released.state_dict())
    assert same(direct.double().state_dict(), ours.state_dict())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    logits, expected = ours(images), released.double()(images)
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()
    grad = torch.randn_like(logits)
    logits.backward(grad)
    expected.backward(grad)
    with torch.no_grad():  # gives the gradients their released names
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    found = released_state_dict(ours)
    assert found.keys() == released.state_dict().keys()
    for name, parameter in released.named_parameters():
        assert (found[name] - parameter.grad).abs().max() <= 1e-10 * parameter.grad.abs().max(), name


VARIANTS = [{"odl_tied": True}, {"odl_steps": 1}, {"odl_residual": False}]


def test_variants_are_not_exported():
    for option in [*VARIANTS, {"layer_eps": 1e-5}]:
        with pytest.raises(UserError, match=f"the released code has no such model.*{next(iter(option))}"):
            released_state_dict(_alpha(**option))


@pytest.mark.parametrize("options", [*VARIANTS, {"odl_ratio": 1, "drop_path_rate": 0.3}], ids=str)
def test_every_variant_trains_and_has_a_script_and_a_trace(options):
    model, images = _alpha(**options), torch.randn(2, 3, 32, 32)
    model(images).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.eval()
    torch.testing.assert_close(torch.jit.script(model)(images), model(images), rtol=1e-4, atol=1e-4)
    (layer,) = trace(model, images, [1])
    codes = layer.code()
    assert codes.shape == (2, 17, 48 * options.get("odl_ratio", 4))
    decoder = model.transformer.layers[1][1].fn
    y = F.linear(codes, decoder.D if decoder.D1 is None else decoder.D1)
    y = layer.after_mssa + y if options.get("odl_residual", True) else y
    torch.testing.assert_close(y, layer.after_ista, rtol=1e-4, atol=1e-4)
    sparsity = layer_measures(model, images)["sparsity"]
    assert sparsity.shape == (2, 2)
    torch.testing.assert_close(sparsity[:, 1], (codes != 0).flatten(1).float().mean(1))


def test_bad_input_of_the_operator_is_an_error():
    given = dict(zip(("x", "dictionary", "decoder"), _inputs(), strict=True))
    for message, change in {
        "steps=3: give 1 or 2": {"steps": 3},
        "step_size=-1.0": {"step_size": -1.0},
        r"dictionary has shape \(47, 192\): pass \[C, K\] = \[48, K\]": {"dictionary": torch.zeros(47, 192)},
        r"decoder has shape \(48, 96\): pass \[48, 192\]": {"decoder": torch.zeros(48, 96)},
        "decoder is torch.float64 and x torch.float32": {"decoder": torch.zeros(48, 192).double()},
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            odl.odl(**(given | change))


def test_bad_arguments_of_the_model_are_errors():
    for name, value, remedy in (("odl_steps", 3, ": give 1 or 2"), ("odl_ratio", 0, "")):
        with pytest.raises(UserError, match=f"{name}={value!r}{remedy}"):
            _alpha(**{name: value})


def test_arguments_of_another_sparsifier_are_errors():
    refused = [({"threshold": "soft"}, ("odl", "mlp"), "ista")]
    refused += [(option, ("ista", "mlp"), "odl") for option in (*VARIANTS, {"odl_ratio": 2})]
    for option, others, own in refused:
        ((name, value),) = option.items()
        for other in others:
            message = f"{name}={value!r} has no effect with sparsifier='{other}': .* pass sparsifier='{own}'"
            with pytest.raises(UserError, match=message):
                build_model(TrainConfig(sparsifier=other, **option), 3)


def test_variants_are_settings_of_training():
    settings = {"odl_ratio": 2, "odl_steps": 1, "odl_tied": True, "odl_residual": False}
    (layer,) = build_model(TrainConfig(sparsifier="odl", dim=48, depth=1, **settings), 3).transformer.layers
    assert (layer[1].fn.D.shape, layer[1].fn.D1, layer[1].fn.steps) == ((48, 96), None, 1)
    assert not layer.skips_sparsifier


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fake_operator_has_layer_norms_dtypes_on_a_gpu(dtype):
    with FakeTensorMode():
        x, norm, matrix = (torch.empty(size, dtype=dtype, device="cuda") for size in ((4, 8), (8,), (8, 32)))
        _, mean, rstd, *_ = odl.odl_fwd(x, norm, norm, matrix, matrix, 0.1, 0.01, 1e-6, 2, dtype, True)
        expected = torch.native_layer_norm(x, (8,), norm, norm, 1e-6)[1:]
        assert [(t.dtype, t.shape) for t in (mean, rstd)] == [(t.dtype, t.shape) for t in expected]


def test_the_model_compiles_without_graph_breaks():
    model, images = _alpha(depth=1).eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits := compiled(images), model(images), rtol=1e-4, atol=1e-4)
    logits.sum().backward()


def test_models_have_the_papers_numbers_of_parameters():
    for build, millions in ((crate_fast.CRATE_alpha_base, 72.33), (crate_fast.CRATE_alpha_large, 253.65)):
        assert sum(p.numel() for p in build(device="meta").parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_without_a_network_pretrained_weights_are_an_error(monkeypatch):
    def offline(*_, **__):
        raise FileNotFoundError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(UserError, match=r"cannot download .* crate_alpha_large_patch14_224 .*CRATE-alpha/tree/main"):
        timm.create_model("crate_alpha_large_patch14_224", pretrained=True, depth=1)
