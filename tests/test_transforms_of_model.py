"""Models under torch.fx, TorchScript, torch.export, torch.func and torch.compile, as timm's ViT supports them."""

import io
import itertools
import pickle
import warnings

import pytest
import torch
from timm.models import create_feature_extractor, get_graph_node_names
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

from crate_fast import CRATE, CRATEMAE
from crate_fast.errors import UserError
from crate_fast.functional import ista, subspace_attention
from crate_fast.model import ALPHA_OPTIONS

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2, "heads": 2, "dim_head": 32}
VIT = {"attention": "mhsa", "sparsifier": "mlp", "residual": "paper", "pool": "mean", "num_classes": 0}
NARROW = {"dim": 16, "heads": 1, "dim_head": 16}  # no output map, and more tokens than width: ISTA by one product
NARROW |= {"threshold": "soft", "head_hidden": True, "ista": 1, "dropout": 0, "emb_dropout": 0, "embed_norm": False}
OPTIONS = [{}, VIT, NARROW, ALPHA_OPTIONS]
every_kind = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def _onednn(monkeypatch):
    """Use oneDNN, with which a CPU runs all of our operators; with MKL it runs fewer."""
    monkeypatch.setenv("CRATE_FAST_ONEDNN", "1")


def _model(**options) -> CRATE:
    return CRATE(**(SMALL | options)).eval()


def _images(batch: int = 5, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width)


def _close(actual, expected, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@every_kind
def test_timms_feature_extractors_train_every_parameter(options):
    model, images = _model(**options), _images()
    names, _ = get_graph_node_names(model)
    extractor = create_feature_extractor(model, {"transformer.layers.0": "first", names[-1]: "last"})
    _close(torch.jit.script(extractor)(images)["last"], model(images))
    with torch.autocast("cpu", torch.bfloat16):
        _close(extractor(images)["last"], model(images))
    found = extractor.train()(images)
    _close(found["last"], model.train()(images))
    first = model.forward_intermediates(images, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
    _close(found["first"][:, 1:], first)
    found["last"].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    _close(extractor.half()(images.half())["last"], model(images.half()))


def test_traces_check_images_as_the_model_does():
    model = _model(dynamic_img_size=True)
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))
    for size in ((32, 32), (48, 40)):
        images = _images(2, *size)
        _close(traced(images), model(images))
    with pytest.raises(UserError, match=r"image size \(36, 32\) is not a multiple of the patch size \(8, 8\)"):
        traced(_images(2, 36, 32))
    with pytest.raises(UserError, match="images are 48×48 and the model expects 32×32"):
        torch.fx.symbolic_trace(_model())(_images(2, 48, 48))


@every_kind
def test_scripted_traced_and_exported_models_take_any_batch_and_have_no_operator_of_this_package(options):
    model = _model(depth=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, _images(2))
    program = torch.export.export(model, (_images(2),), dynamic_shapes=({0: Dim("batch")},))
    assert "crate_fast" not in str(program.graph)
    loaded = [program.module()]
    for module in (torch.jit.script(model), traced):
        file = io.BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        loaded.append(torch.jit.load(file))
        assert "crate_fast::" not in str(loaded[-1].inlined_graph)
    for batch in (1, 5, 40):
        images = _images(batch)
        for module in loaded:
            _close(module(images), model(images))


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"residual": "paper"}, {"attention": "mhsa", "sparsifier": "mlp"}]
)
def test_a_scripted_model_in_training_has_dropout_and_gradients(options):
    skipped = 0.0 if "dropout" in options else 0.25  # both steps, each with a draw of its own
    model = _model(drop_path_rate=2 * skipped, **options).train()
    scripted, images = torch.jit.script(model), _images(16)
    assert not torch.equal(scripted(images), scripted(images))
    scripted(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    tokens, layer = torch.randn(2000, 2, 64), torch.jit.script(model.transformer.layers[1])
    with torch.no_grad():
        layer(tokens)  # TorchScript optimises from the second call on
        unchanged = (layer(tokens) == tokens).flatten(1).all(1).float().mean()
    assert unchanged.item() == pytest.approx(skipped, abs=0.05)
    _close(scripted.eval()(images), model.eval()(images))


def test_torch_export_has_dynamic_image_sizes():
    model = _model(depth=1, dynamic_img_size=True)
    sizes = {0: Dim("batch"), 2: 8 * Dim("rows", min=2, max=64), 3: 8 * Dim("columns", min=2, max=64)}
    program = torch.export.export(model, (_images(2, 48, 64),), dynamic_shapes=(sizes,))
    for shape in ((3, 40, 56), (1, 32, 32), (2, 24, 16)):  # the second is the native one
        images = _images(*shape)
        _close(program.module()(images), model(images))


@every_kind
def test_gradients_of_an_ensemble_and_single_images_by_vmap_equal_those_of_a_loop(options):
    members, images = [_model(depth=1, **options).train() for _ in range(2)], _images(2)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(members[0], parameters, (image[None],)).float().square().sum()

    of_each = vmap(vmap(grad(loss), in_dims=(None, 0)), in_dims=(0, None))
    stacked = {name: value.detach() for name, value in stack_module_state(members)[0].items()}
    gradients = of_each(stacked, images)
    with torch.autocast("cpu", torch.bfloat16):
        low = of_each(stacked, images)
    for place in itertools.product(range(2), range(2)):
        parameters = dict(members[place[0]].named_parameters())
        expected = torch.autograd.grad(loss(parameters, images[place[1]]), list(parameters.values()))
        largest = max(value.abs().max() for value in expected)  # the gradient of a key's bias is zero
        for name, wanted in zip(parameters, expected, strict=True):
            torch.testing.assert_close(gradients[name][place] / largest, wanted / largest, rtol=0, atol=1e-4)
            assert (low[name][place] - wanted).norm() <= 0.2 * wanted.norm() + 1e-3


@every_kind
def test_forward_mode_and_second_derivatives(options):
    """jvp was once silently zero through the operators of the CPU."""
    model = _model(depth=1, **options).double()
    images, direction, step = _images(2).double(), _images(2).double(), 1e-6
    difference = (model(images + step * direction) - model(images - step * direction)) / (2 * step)
    model.float()
    images, direction = images.float(), direction.float()
    _, tangent = jvp(model, (images,), (direction,))
    _close(tangent.double(), difference, rtol=1e-3, atol=1e-3)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(images, direction))
        _close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    pixel = images[:1, :, :1, :1]
    curvature = hessian(lambda x: model(x + images[:1]).square().sum())(pixel)
    assert curvature.shape == (*pixel.shape, *pixel.shape)
    _close(curvature.flatten().view(3, 3), curvature.flatten().view(3, 3).t(), rtol=1e-3, atol=1e-3)


def test_transforms_of_kernels_are_an_error():
    w, x = torch.randn(1, 5, 1, 16), torch.randn(5, 16)
    with pytest.raises(UserError, match="no rules for torch.func"):
        grad(lambda t: subspace_attention(t, backend="triton").sum())(w)
    with pytest.raises(UserError, match="no rules for torch.func"):
        jvp(lambda t: ista(t, x.t() @ x, backend="triton"), (x,), (x,))


def test_compiles_for_any_batch_and_trains_at_any_size():
    model = _model(depth=1, dynamic_img_size=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # opcheck traces our operators' gradients
    for shape in ((2, 32, 32), (4, 40, 56), (3, 40, 56)):  # the second makes the batch dynamic
        with torch.compiler.set_stance("fail_on_recompile" if shape[0] == 3 else "default"):
            images = _images(*shape)
            _close(out := compiled(images), model(images))
            out.sum().backward()


@pytest.mark.parametrize("visible_only", [False, True])
def test_autoencoders_are_compiled_traced_exported_and_differentiated(visible_only):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model, images, noise = CRATEMAE(**sizes, visible_only=visible_only).eval(), _images(4), torch.rand(4, 16)
    expected = model(images, noise=noise)

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.model(images, noise=noise)

    example, batch = (images[:2], noise[:2]), {0: Dim("batch")}
    exported = torch.export.export(Fixed(), example, dynamic_shapes=(batch, batch)).module()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # its operators are the classifier's
    _close(compiled(images, noise=noise), expected)
    for module in (torch.jit.trace(Fixed(), example), exported):
        _close(module(images, noise), expected)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], image: Tensor, noise: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],), {"noise": noise[None]})[0]

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, noise)
    wanted = torch.autograd.grad(loss(parameters, images[1], noise[1]), list(parameters.values()))
    _close([values[1] for values in gradients.values()], list(wanted), rtol=1e-3)
    with pytest.raises(UserError, match=r"torch\.jit\.trace or torch\.export"):
        torch.jit.script(model)
    with pytest.raises(UserError, match=r"image size \(36, 36\) is not a multiple of the patch size \(8, 8\)"):
        model.patchify(_images(1, 36, 36))
