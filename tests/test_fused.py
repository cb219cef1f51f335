"""The kernels inside PyTorch: dispatch, autograd, compile, checkpointing, FSDP2, folded dictionaries, errors."""

import functools
import gc
import os
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from oracle import model_gradients, opcheck_tests
from runs import free_port
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from crate_fast import CRATE, functional, kernels, triton_ops
from crate_fast.backends import explain_backend
from crate_fast.errors import UserError
from crate_fast.functional import cached_dictionaries, compress, fold_dictionary, ista, subspace_attention
from crate_fast.kernels import folding as folding_kernels
from crate_fast.kernels import ista as ista_kernels
from crate_fast.kernels import launch
from crate_fast.model import ALPHA_OPTIONS
from crate_fast.odl import odl
from crate_fast.probes import PROBLEMS, norm_ista
from crate_fast.reference import ista_reference

SIZES = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 48, "depth": 2, "heads": 3, "dim_head": 16}


def _model(device, backend: str = "triton", **options) -> CRATE:
    torch.manual_seed(1)
    return CRATE(**(SIZES | options), backend=backend).to(device)


def _ista_inputs(device, rows=(2, 17), width=32) -> tuple[Tensor, ...]:
    x, dictionary = torch.randn(*rows, width) + 0.5, torch.randn(width, width) / width**0.5
    weight, bias = 1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width)
    return tuple(t.to(device).requires_grad_() for t in (x, weight, bias, dictionary))


def _ista_parameter(device) -> tuple[Tensor, torch.nn.Parameter]:
    x, *_, dictionary = _ista_inputs(device)
    return x, torch.nn.Parameter(dictionary.detach())


def test_opcheck_of_attention(device):
    w = torch.randn(2, 17, 3, 32, device=device, requires_grad=True)
    strided = torch.randn(2, 17, 6, 32, device=device)[:, :, ::2].detach().requires_grad_()
    for tokens in (w, strided):
        torch.library.opcheck(triton_ops.subspace_attention_fwd, (tokens, 0.2))
    out, lse = triton_ops.subspace_attention_fwd(w.detach(), 0.2)
    torch.library.opcheck(triton_ops.subspace_attention_bwd, (out, w.detach(), out, lse, 0.2))


@pytest.mark.parametrize("with_norm", [False, True])
def test_opcheck_of_ista(with_norm, device):
    x, weight, bias, dictionary = _ista_inputs(device, rows=(17,))
    folded = fold_dictionary(dictionary.detach())
    if with_norm:
        torch.library.opcheck(triton_ops.fold, (dictionary.detach(), 0.1, torch.float16))
    norm = (weight, bias) if with_norm else (None, None)
    for keep in (False, True):
        arguments = (x, *norm, dictionary, folded, 0.1, 0.1, 1e-5, False, keep)
        if keep:
            torch.library.opcheck(triton_ops.ista_fwd, arguments)
        else:
            with pytest.raises(RuntimeError, match="keep=False"):
                triton_ops.ista_fwd(*arguments)[0].sum().backward()
        with torch.no_grad():
            y, nonzero, normed, mean, rstd = triton_ops.ista_fwd(*arguments)
        assert nonzero.numel() == (y.numel() if keep else 0)
    x, dictionary, *norm = (None if t is None else t.detach() for t in (x, dictionary, *norm))
    kept = [(normed, None, folded), (x, mean, folded.half())] if with_norm else [(x, None, folded)]
    for rows, means, matrix in kept:
        for wanted in ([True] * 4, [True, *[False] * 3], [False] * 3 + [True]):
            others = (rstd, *norm, dictionary, matrix, 0.1, 1e-5, torch.float32, wanted)
            arguments = (y, nonzero, rows, means, *others)
            torch.library.opcheck(triton_ops.ista_bwd, arguments, test_utils=opcheck_tests(wanted))


_norm_ista = partial(norm_ista, backend="triton")


def test_only_requested_gradients_are_computed(device, monkeypatch):
    x, weight, bias, dictionary = _ista_inputs(device)
    refuse = lambda *_: pytest.fail("not requested")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(folding_kernels, "fold_backward", refuse)
        assert _norm_ista(x, weight, bias, dictionary.detach()).sum().backward() is None
    monkeypatch.setattr(ista_kernels, "backward_input", refuse)
    _norm_ista(x.detach(), weight.detach(), bias.detach(), dictionary).sum().backward()
    assert dictionary.grad is not None


@pytest.mark.parametrize("fused_map", ["0", "1"])
@pytest.mark.parametrize(
    ("kernel", "options"), [("norm_ista", {}), ("odl", {}), ("compress", {}), ("compress", {"residual": "paper"})]
)
def test_an_empty_batch_has_zero_gradients(kernel, options, fused_map, device, monkeypatch):
    monkeypatch.setenv("CRATE_FAST_FUSED_PRODUCTS", fused_map)
    problem = PROBLEMS[kernel]((2, 17, 64), torch.float16, None, device, torch.default_generator, **options)
    x, *weights = (tensor.requires_grad_() for tensor in problem.inputs)
    y = problem.ours(x[:0], *weights)
    assert y.shape == (0, 17, 64)
    assert not any(gradient.any() for gradient in torch.autograd.grad(y.sum(), weights))


def test_a_layer_norm_that_cannot_be_fused_is_called(device):
    layer, x = _model(device).transformer.layers[0][1], torch.randn(2, 5, SIZES["dim"], device=device)
    expected = layer(x)
    calls, plain = [], layer.norm.forward
    layer.norm.forward = lambda tokens: calls.append(1) or plain(tokens)  # as offloading libraries do
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert calls == [1]
    layer.norm = torch.nn.LayerNorm(SIZES["dim"], bias=False, device=device)
    assert layer(x).isfinite().all()


def test_dropout_runs_in_pytorch(device):
    w = torch.randn(1, 33, 2, 16, device=device)
    heads = w.transpose(1, 2)
    torch.manual_seed(3)
    dropped = subspace_attention(w, dropout_p=0.3)
    torch.manual_seed(3)
    expected = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(dropped, expected)
    with pytest.raises(UserError, match=r"with dropout_p=0.3: the kernels have no dropout. Use backend='auto'"):
        subspace_attention(w, dropout_p=0.3, backend="triton")


OPTIONS = [{}, {"threshold": "soft"}, {"residual": "paper"}, {"attention": "mhsa"}, {"sparsifier": "mlp"}]
OPTIONS += [ALPHA_OPTIONS]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_model_on_kernels_agrees_with_pytorch(options, device):
    models = [_model(device, backend, **options, depth=1) for backend in ("triton", "torch")]
    images = torch.randn(1, 3, 16, 16, device=device)
    ours, plain = (model_gradients(model, images) for model in models)
    torch.testing.assert_close(ours.pop("output"), plain.pop("output"), rtol=1e-4, atol=1e-4)
    for name, grad in plain.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name


def test_the_compiled_model_agrees_with_eager(device):
    model = _model(device, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    images = torch.randn(1, 3, 16, 16, device=device)
    eager, whole = (model_gradients(runner, images, torch.float16) for runner in (model, compiled))
    for name, expected in eager.items():
        assert name == "output" or whole[name].dtype == torch.float32
        assert (whole[name] - expected).norm() <= 2e-2 * expected.norm() + 1e-6


def test_checkpointing_gives_the_same_bits(device):
    model, images = _model(device).train(), torch.randn(1, 3, 16, 16, device=device)
    plain = model_gradients(model, images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model_gradients(model, images), plain, rtol=0, atol=0)


def _sharded(rank: int, port: int, images: Tensor, expected: list[Tensor]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model, mesh = _model("cpu", depth=1), dist.init_device_mesh("cpu", (2,))
        for layer in model.transformer.layers:
            fully_shard(layer, mesh=mesh)
        runner = fully_shard(model, mesh=mesh)
        for _ in range(2):  # the second pass must not depend on the first
            model.zero_grad()
            runner(images[rank::2]).square().mean().backward()
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), grad, rtol=1e-4, atol=1e-6)
        dist.barrier()  # otherwise the process that ends first aborts the other
    finally:
        dist.destroy_process_group()
    os._exit(0)  # Python's teardown sometimes aborts beside gloo's threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would need two GPUs")
def test_the_kernels_under_fsdp_have_the_gradients_of_one_process():  # DDP gives them plain parameters
    images, model = torch.randn(2, 3, 16, 16), _model("cpu", depth=1)
    (sum(model(images[rank::2]).square().mean() for rank in range(2)) / 2).backward()
    arguments = (free_port(), images, [p.grad for p in model.parameters()])
    mp.start_processes(_sharded, arguments, nprocs=2, start_method="forkserver")  # preloaded by runs.py


@pytest.fixture
def folds(monkeypatch) -> list:
    calls = []
    for module, name in ((functional, "fold_dictionary"), (triton_ops, "fold")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, plain=plain: calls.append(1) or plain(*args))
    return calls


def test_a_dictionary_is_folded_once_per_scope(device, folds):
    model, images, found = _model(device), torch.randn(1, 3, 16, 16, device=device), []
    for scope, count in ((nullcontext, 2 * SIZES["depth"]), (cached_dictionaries, SIZES["depth"])):
        model.zero_grad()
        folds.clear()
        with scope():
            for _ in range(2):
                model(images).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        assert len(folds) == count
    assert all(map(torch.equal, *found))
    model(images)
    assert len(folds) == 2 * SIZES["depth"]  # nothing is kept after the scope


class _Silent(torch.optim.SGD):
    """An optimizer that does not change the version of its parameters, as FSDP2."""

    def step(self):
        for group in self.param_groups:
            group["params"][0].data += 1


def test_a_dictionary_that_changes_inside_the_scope_is_folded_again(device, monkeypatch):
    x, dictionary = _ista_parameter(device)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))  # its values are not read, as on a GPU
    base = dictionary.data.clone()

    def replaced(by: float) -> None:
        """As by an EMA or a search over weights: the memory of the last replacement is free again."""
        dictionary.data = base
        dictionary.data = base + by

    changes = [lambda: None, lambda: dictionary.add_(1), _Silent([dictionary]).step]
    changes += [functools.partial(replaced, by) for by in (0.1, 0.2, 0.3, 0.4)]
    with cached_dictionaries(), torch.no_grad():
        for change in changes:
            change()
            actual = ista(x, dictionary, backend="triton")
            torch.testing.assert_close(actual, ista_reference(x, dictionary), rtol=1e-4, atol=1e-4)


def test_a_dictionary_keeps_one_fold_for_all_step_sizes(device):
    x, dictionary = _ista_parameter(device)
    with cached_dictionaries(), torch.no_grad():
        for step_size in (0.1, 0.2, 0.3):
            actual = ista(x, dictionary, step_size, backend="triton")
            torch.testing.assert_close(actual, ista_reference(x, dictionary, step_size), rtol=1e-4, atol=1e-4)
        assert len(functional._cache.folds[dictionary]) == 1


def test_training_can_use_a_fold_made_in_inference_mode(device, folds):
    x, dictionary = _ista_parameter(device)
    with cached_dictionaries():
        with torch.inference_mode():
            expected = ista(x, dictionary, backend="triton")
        out = ista(x, dictionary, backend="triton")
        out.sum().backward()
    assert len(folds) == 1
    assert torch.equal(out, expected)


def test_scopes_can_be_nested_and_overlap_in_two_threads_with_the_torch_backend(folds):
    """Two threads enter A, enter B, leave A, leave B."""
    model, images = _model("cpu", "torch").eval(), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        with cached_dictionaries():
            expected = model(images)
            with cached_dictionaries():
                assert torch.equal(model(images), expected)
            assert torch.equal(model(images), expected)
        assert len(folds) == SIZES["depth"]
        first, second = cached_dictionaries(), cached_dictionaries()
        first.__enter__()
        thread = threading.Thread(target=second.__enter__)
        thread.start()
        thread.join()
        first.__exit__(None, None, None)
        model(images)
        assert functional._cache.folds
    second.__exit__(None, None, None)
    assert not functional._cache.folds
    assert functional._cache.scopes == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_uses_every_change_of_a_dictionary(mode, dtype):
    x, dictionary = torch.randn(5, 16, dtype=dtype), torch.nn.Parameter(torch.randn(16, 16, dtype=dtype) / 4)
    dictionary.grad = torch.ones_like(dictionary)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for change in (
        lambda: None,
        lambda: dictionary.data[3, 5].add_(1e-9),  # in float64, as by finite differences
        lambda: dictionary.data.add_(0.5),
        lambda: setattr(dictionary, "data", dictionary.data.flip(0)),
        lambda: dictionary.data.copy_(dictionary.data.flip(0).flip(1)),  # the same sum
        lambda: dictionary.data.neg_(),
        torch.optim.SGD([dictionary], lr=0.5).step,  # from here, PyTorch's version counter changes too
        lambda: dictionary.detach().copy_(torch.eye(16)),
    ):
        change()
        with mode():
            actual = ista(x, dictionary)
        expected = ista_reference(x, dictionary.detach())
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    with mode():
        actual = ista(x, dictionary, 0.3)
    torch.testing.assert_close(actual, ista_reference(x, dictionary.detach(), 0.3), rtol=1e-5, atol=1e-5)


def test_inference_folds_a_dictionary_once_and_frees_it(folds):
    gc.collect()  # dictionaries of other tests
    kept = len(functional._cache.folds)
    x, dictionary = torch.randn(5, 16), torch.nn.Parameter(torch.randn(16, 16))
    with torch.inference_mode():
        outputs = [ista(x, dictionary) for _ in range(3)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    torch.autograd.grad(ista(x, dictionary).sum(), dictionary)  # training uses two products instead
    torch.autograd.grad(ista(x.requires_grad_(), dictionary.requires_grad_(False)).sum(), x)
    assert len(folds) == 1
    del dictionary
    gc.collect()
    assert len(functional._cache.folds) == kept


def test_the_kernels_keep_no_fold_of_a_temporary_dictionary_nor_for_inference(device, folds):
    x, dictionary = _ista_parameter(device)
    with torch.no_grad():
        for _ in range(2):
            ista(x, dictionary, backend="triton")
        assert dictionary not in functional._cache.folds
        with cached_dictionaries():
            for _ in range(3):
                ista(x, dictionary * 1.0, backend="triton")
            assert not functional._cache.folds
    assert len(folds) == 5


def test_fp32_runs_on_the_kernels_if_tf32_is_allowed():
    matmul = torch.backends.cuda.matmul
    for change in (
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(matmul, "allow_tf32", True),
        lambda: setattr(matmul, "fp32_precision", "tf32"),
    ):
        with kernels.assuming_gpu():
            name, reason = explain_backend("cuda", dtype=torch.float32)
            assert (name, "does not allow" in reason) == ("torch", True)
            try:
                change()
                assert explain_backend("cuda", dtype=torch.float32)[0] == "triton"
            finally:
                matmul.fp32_precision = "ieee"
                torch.set_float32_matmul_precision("highest")
            assert explain_backend("cuda", dtype=torch.float32)[0] == "torch"
            assert explain_backend("cuda", dtype=torch.bfloat16)[0] == "triton"


def test_second_derivatives_are_an_error(device):
    x, weight, bias, dictionary = _ista_inputs(device)
    w, square = torch.randn(1, 5, 1, 16, device=device, requires_grad=True), torch.eye(32, device=device)
    for out, tensor in (
        (compress(x, weight, bias, square, square, weight, 2, backend="triton"), x),
        (subspace_attention(w, backend="triton"), w),
        (_norm_ista(x, weight, bias, dictionary), x),
        (ista(x, dictionary, backend="triton"), dictionary),
        (subspace_attention(w.cpu()), w),
        (odl(x.cpu(), dictionary.cpu(), dictionary.cpu()), x),
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), tensor, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            grad.sum().backward()


def test_inputs_that_the_kernels_do_not_support_run_in_pytorch(device):
    name, reason = explain_backend(device, dtype=torch.float64)
    assert (name, "float64" in reason) == ("torch", True)
    with pytest.raises(UserError, match="heads up to 128 wide.*129"):
        explain_backend(device, "triton", dtype=torch.float16, head_dim=129)
    assert subspace_attention(torch.randn(1, 5, 1, 160, device=device)).shape == (1, 5, 1, 160)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_the_reason_is_given(monkeypatch):
    assert explain_backend("cuda") == ("torch", "PyTorch finds no CUDA device on this machine")
    assert explain_backend("cpu") == ("torch", "Triton's interpreter runs only with backend='triton'")
    assert explain_backend("cpu", "triton") == ("triton", "requested")
    with pytest.raises(UserError, match="interpreter computes bfloat16 wrongly"):
        explain_backend("cpu", "triton", dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(UserError, match="backend='triton' cannot run: Triton kernels need a CUDA device"):
        ista(torch.ones(2, 4), torch.eye(4), backend="triton")
