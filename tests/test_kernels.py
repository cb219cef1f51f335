"""The kernels of ISTA, LayerNorm and the weights against the float64 reference: on a GPU, or on the CPU through
Triton's interpreter. Attention's are test_attention.py's.

Half precision by the rule of two times eager PyTorch. fp32 is multiplied as TF32 on a GPU and exactly here: there
the interpreter shows the algebra. bfloat16 is test_bfloat16.py's; what the compiler makes of the kernels,
test_compiler.py's.
"""

import pytest
import torch
import torch.nn.functional as F
from oracle import all_within_twice_eager, clear_of_threshold, gradients, is_right, mutant
from torch import Tensor

from crate_fast import kernels
from crate_fast.functional import norm_ista
from crate_fast.kernels import folding, ista, layer_norm, product
from crate_fast.kernels.launch import TABLE, Tile
from crate_fast.reference import ista_reference, norm_ista_reference

DTYPES = [torch.float32, torch.float16]
PRODUCT_TILES = sorted({(t.block_m, t.block_n, t.block_k) for t in TABLE.values() if t.block_k})


def _double(tensors) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


# --- ISTA --------------------------------------------------------------------------------------------------------

SIZES = [
    ((1, 32), "relu"),
    ((15, 48), "soft"),
    ((197, 96), "relu"),
    ((197, 96), "soft"),
    ((130, 33), "relu"),
]  # (M, C)
STEP, SPARSITY, EPS = 0.1, 0.1, 1e-5


def _ista_inputs(size, dtype, device) -> list[Tensor]:
    """x, D, γ, β, and a gradient; every other gradient is zero where the ReLU cuts, as in a network."""
    rows, width = size
    x = torch.randn(rows, width) * 2 + 1
    dictionary = torch.randn(width, width) / width**0.5
    gamma, beta = 1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width)
    return [t.to(dtype).to(device) for t in (x, dictionary, gamma, beta, torch.randn(rows, width))]


def _ista(
    inputs, threshold: str, with_norm: bool, module=ista, norms=layer_norm, gradients=product, **options
) -> list:
    x, dictionary, gamma, beta, grad = inputs
    wide = dictionary.float()
    folded = (STEP * (wide - wide.t() @ wide)).to(dictionary.dtype)
    operand, norm = x, None
    if with_norm:
        operand, mean, rstd = norms.normalize(x, EPS, folded.dtype)
        norm = norms.Norm(mean, rstd, gamma, beta)
    y, nonzero = module.forward(x, operand, folded, STEP * SPARSITY, threshold == "soft", norm, **options)
    masked, total = module.masked_gradient(grad, nonzero, folded.dtype, with_norm)
    grad_x = module.backward_input(grad, masked, folded, **options)
    grad_folded = gradients.weight_gradient(operand, masked, **options)
    if with_norm:
        grad_folded = gamma.float()[:, None] * grad_folded + beta.float()[:, None] * total
    symmetric = grad_folded + grad_folded.t()
    grad_dictionary = (STEP * (grad_folded - wide @ symmetric)).to(dictionary.dtype)
    if not with_norm:
        return [y, grad_x, grad_dictionary]
    grad_x, (grad_gamma, grad_beta), _ = norms.backward(grad_x, operand, None, rstd, x.dtype, gamma)
    return [y, grad_x, grad_dictionary, grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype)]


def _clear_gradient(inputs: list[Tensor], with_norm: bool, dtype: torch.dtype) -> Tensor:
    """The gradient, zero where rounding decides whether ISTA's output is."""
    x, dictionary, gamma, beta, _ = _double(inputs)
    tokens = F.layer_norm(x, x.shape[-1:], gamma, beta, EPS) if with_norm else x
    limits = {"step_size": STEP, "shift": STEP * SPARSITY, "margin": 16 * torch.finfo(dtype).eps}
    return clear_of_threshold(inputs[-1], tokens, dictionary, **limits)


def _ista_is_right(inputs, threshold: str = "relu", with_norm: bool = False, **options) -> bool:
    def plain(x, dictionary):
        return ista_reference(x, dictionary, STEP, SPARSITY, threshold)

    def normed(x, dictionary, gamma, beta):
        return norm_ista_reference(x, gamma, beta, dictionary, STEP, SPARSITY, threshold)

    reference, tensors = (normed, inputs[:-1]) if with_norm else (plain, inputs[:2])
    grad = _clear_gradient(inputs, with_norm, inputs[0].dtype)
    actual = _ista([*inputs[:-1], grad], threshold, with_norm, **options)
    eager = gradients(reference, tensors, grad)
    truth = gradients(reference, _double(tensors), grad.double())
    return is_right(actual, eager, truth, "y dx dD dγ dβ" if with_norm else "y dx dD")


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "threshold"), SIZES, ids=str)
def test_ista(size, dtype, threshold, with_norm, device, poisoned):
    assert _ista_is_right(_ista_inputs(size, dtype, device), threshold, with_norm)


@pytest.mark.parametrize("soft", [False, True])
def test_what_rounds_to_zero_passes_no_gradient(soft, device, poisoned):
    x = torch.full((16, 32), 0.01, dtype=torch.float16, device=device)
    y, nonzero = ista.forward(x, x, torch.zeros(32, 32, dtype=x.dtype, device=device), x[0, 0].item() - 1e-8, soft)
    assert y.count_nonzero() == nonzero.count_nonzero() == 0


@pytest.mark.parametrize("persistent", [False, True], ids=["a tile a program", "persistent"])
@pytest.mark.parametrize("blocks", PRODUCT_TILES, ids=str)
def test_every_product_tile_of_the_table(blocks, persistent, device, poisoned):
    """On three ragged rows of tiles and two columns, one of a wide tile; persistent ones behind a LayerNorm."""
    tile = Tile(*blocks[:2], num_warps=8, num_stages=1, block_k=blocks[2], persistent=persistent)
    size = (2 * tile.block_m + 5, min(192, 3 * tile.block_n // 2))
    assert _ista_is_right(_ista_inputs(size, torch.float16, device), with_norm=persistent, tile=tile)


def _norm_ista_is_right_under_autocast(size, threshold, device) -> bool:
    """Eager there: LayerNorm, residual and shrinkage in fp32, the products in float16."""
    inputs = _ista_inputs(size, torch.float32, device)
    tensors, grad = inputs[:-1], _clear_gradient(inputs, True, torch.float16)

    def eager(x, dictionary, gamma, beta):
        return norm_ista_reference(x, gamma, beta, dictionary, STEP, SPARSITY, threshold)

    def ours(x, dictionary, gamma, beta):
        options = {"eps": EPS, "threshold": threshold, "backend": "triton"}
        return norm_ista(x, gamma, beta, dictionary, STEP, SPARSITY, **options)

    truth = gradients(eager, _double(tensors), grad.double())
    with torch.autocast(device.type, torch.float16):
        actual, allowed = (gradients(function, tensors, grad) for function in (ours, eager))
    return all_within_twice_eager(actual, allowed, truth, "y dx dD dγ dβ")


@pytest.mark.parametrize(("size", "threshold"), [((70, 48), "soft"), ((197, 96), "relu")], ids=str)
def test_norm_ista_under_autocast(size, threshold, device, poisoned):
    assert _norm_ista_is_right_under_autocast(size, threshold, device)


def test_a_mutant_with_half_precision_products_of_fp32_tokens_fails(device, tmp_path, monkeypatch):
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "0")
    monkeypatch.setattr(kernels, "ista", mutant(product, ("if MASKED:", "if False:"), tmp_path, user=ista))
    assert not _norm_ista_is_right_under_autocast((197, 96), "relu", device)


def test_strided_and_expanded_matrices(device, poisoned):
    x, dictionary, gamma, beta, grad = _ista_inputs((64, 96), torch.float32, device)
    strided = [x.t().contiguous().t(), dictionary.t().contiguous().t(), gamma, beta, grad[:1].expand(64, -1)]
    assert _ista_is_right(strided)
    assert _ista_is_right(strided, with_norm=True)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_layer_norm_of_large_offsets(offset, device, poisoned):
    x, *rest = _ista_inputs((64, 96), torch.float32, device)
    assert _ista_is_right([x + offset, *rest], with_norm=True)


def test_constant_rows_are_finite(device):
    x, *rest = _ista_inputs((16, 64), torch.float32, device)
    assert all(result.isfinite().all() for result in _ista([x * 0 + 3, *rest], "relu", True))


def test_a_nan_row_is_not_hidden(device):
    x, *rest = _ista_inputs((64, 96), torch.float32, device)
    x[5, 0] = torch.nan
    for with_norm in (False, True):
        y, grad_x, grad_dictionary, *_ = _ista([x, *rest], "relu", with_norm)
        assert y[5].isnan().all()
        assert y[4].isfinite().all()
        assert grad_dictionary.isnan().any()
        assert grad_x[4].isfinite().all()


RELU = "y = tl.where(y <= shift, 0.0, y - shift)"
MASKED = "return product(masked, folded, masked, tile)"
ISTA_MUTANTS = {  # the module, what the kernel says, what the mutant says
    "no residual": (product, "y = x + acc", "y = acc"),
    "the threshold doubled": (product, RELU, "y = tl.where(y <= shift, 0.0, y - 2 * shift)"),
    "no threshold": (product, RELU, "y = tl.where(y <= 0.0, 0.0, y)"),
    "no ReLU": (product, RELU, "y = y - shift"),
    "the residual's mean left": (product, "x = (x - mean[:, None])", "x = (x - 0.0 * mean[:, None])"),
    "LayerNorm's bias dropped": (product, "gamma[None, :] + beta[None, :]", "gamma[None, :] + 0.0 * beta[None, :]"),
    "the left half finished twice": (
        product,
        "            right, start_n + half,",
        "            left, start_n + half,",
    ),
    "one tile a program": (product, "tiles, tl.num_programs(0), flatten", "tiles, tiles, flatten"),
    "the gradient not masked": (ista, "tl.where(nonzero != 0, grad, 0.0)", "grad"),
    "a block's sums alone": (ista, "total += tl.sum(", "total = tl.sum("),
    "all of y not zero": (product, "(y != 0.0).to(tl.int8)", "(y == y).to(tl.int8)"),
    "γ not on G": (folding, "weight * gamma[None, :], offs_n", "weight, offs_n"),
    "β not on G": (folding, "weight * beta[None, :], 1)", "weight * 0.0, 1)"),
    "no gradient through the residual": (ista, MASKED, "return product(masked, folded, 0 * masked, tile)"),
    "G not transposed in backward": (ista, MASKED, "return product(masked, folded.t(), masked, tile)"),
    "G transposed in forward": (ista, "weight = folded.t()", "weight = folded"),
    "the last rows of a split dropped": (
        product,
        "start + rows_per_split, n_rows)",
        "start + rows_per_split, n_rows) - BLOCK_K",
    ),
}
LAYER_NORM_MUTANTS = {
    "no ε": ("/ WIDTH + eps)", "/ WIDTH + 1000 * eps)"),
    "the mean's gradient dropped": ("scaled - average[:, None]", "scaled - 0.0 * average[:, None]"),
    "the deviation's gradient dropped": ("- normed * along[:, None]", "- 0.0 * normed * along[:, None]"),
    "dγ without the rows": ("first += tl.sum(grad * normed, 0)", "first += tl.sum(grad, 0)"),
    "only the first block of rows": ("step = tl.num_programs(0) * BLOCK_M", "step = n_rows"),
}


@pytest.mark.parametrize("name", ISTA_MUTANTS)
def test_ista_mutants_fail(name, device, tmp_path, monkeypatch, poisoned):
    """Columns finished in two halves, the last one ragged, and more tiles or rows than there are programs."""
    monkeypatch.setattr(layer_norm, "MAX_PROGRAMS", 2)
    module, *mutation = ISTA_MUTANTS[name]
    changed = mutant(module, mutation, tmp_path, user=None if module is ista else ista)
    options = {"module": changed}
    if "split" in name:
        options = {"gradients": mutant(module, mutation, tmp_path)}
    tile = Tile(64, 128, 4, 1, 32, persistent=True)
    inputs = _ista_inputs((300, 96), torch.float16, device)
    assert not _ista_is_right(inputs, with_norm=True, tile=tile, **options)


@pytest.mark.parametrize("name", LAYER_NORM_MUTANTS)
def test_layer_norm_mutants_fail(name, device, tmp_path, monkeypatch):
    changed = mutant(layer_norm, LAYER_NORM_MUTANTS[name], tmp_path)
    monkeypatch.setattr(changed, "MAX_PROGRAMS", 2)
    assert not _ista_is_right(_ista_inputs((150, 96), torch.float32, device), with_norm=True, norms=changed)


def test_more_rows_than_programs(device, monkeypatch, poisoned):
    monkeypatch.setattr(layer_norm, "MAX_PROGRAMS", 2)
    assert _ista_is_right(_ista_inputs((197, 96), torch.float32, device), with_norm=True)


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 100])
def test_folding_a_dictionary(width, dtype, device, poisoned):
    dictionary = (torch.randn(width, width) / width**0.5).to(dtype).to(device)
    wide, grad = dictionary.double(), torch.randn(width, width, device=device)
    truth = STEP * (wide - wide.t() @ wide)
    folded = folding.fold(dictionary, STEP, dtype)
    assert (folded - truth).abs().max() <= (torch.finfo(dtype).eps + 2e-6) * truth.abs().max()
    truth = STEP * (grad.double() - wide @ (grad + grad.t()).double())
    found = folding.fold_backward(grad, dictionary, STEP)
    assert found.dtype == dtype
    assert (found - truth).abs().max() <= (torch.finfo(dtype).eps + 2e-6) * truth.abs().max()


@pytest.mark.parametrize("size", [(32, 32), (48, 100), (192, 33)], ids=str)
def test_a_layer_norm_folded_into_a_weight(size, device, poisoned):
    """Any strides; and the gradients are autograd's."""
    weight, gamma, beta = (
        torch.randn(shape, device=device, requires_grad=True) for shape in (size, size[1:], size[1:])
    )
    base, grads = (
        torch.randn(size[0], device=device),
        [torch.randn(shape, device=device) for shape in (size, size[:1])],
    )
    expected = [weight * gamma, weight @ beta]
    for given in (weight.detach(), weight.detach().t().contiguous().t()):
        scaled, offset = folding.scale(given, gamma.detach(), beta.detach(), torch.float32, base)
        torch.testing.assert_close([scaled, offset - base], [t.detach() for t in expected], rtol=1e-5, atol=1e-5)
    found = folding.unscale(*grads, *(t.detach() for t in (weight, gamma, beta)))
    truth = torch.autograd.grad(expected, [weight, gamma, beta], grads)
    torch.testing.assert_close(list(found), list(truth), rtol=1e-5, atol=1e-4)


WEIGHT_MUTANTS = {
    "G without D": ("step_size * (dictionary - acc)", "step_size * (-acc)"),
    "dG not symmetric": (
        "both += _load(grad_ptr, offs_k, offs_n, 1, WIDTH",
        "both += _load(grad_ptr, offs_k, offs_n, WIDTH, 1",
    ),
    "r without β": ("offset_grad * beta[None, :]", "offset_grad * 0.0 * beta[None, :]"),
    "dγ of the last rows": ("dgamma += tl.sum", "dgamma = tl.sum"),
    "dβ without the weight": ("offset_grad * weight, 0)", "offset_grad + 0.0 * weight, 0)"),
    "no base": ("total += tl.load(base_ptr", "total += 0.0 * tl.load(base_ptr"),
}


@pytest.mark.parametrize("name", WEIGHT_MUTANTS)
def test_weight_mutants_fail(name, device, tmp_path, monkeypatch):
    changed = mutant(folding, WEIGHT_MUTANTS[name], tmp_path)
    for function in ("fold", "fold_backward", "scale", "unscale"):
        monkeypatch.setattr(folding, function, getattr(changed, function))

    def both():
        test_folding_a_dictionary(100, torch.float32, device, None)
        test_a_layer_norm_folded_into_a_weight((192, 33), device, None)

    with pytest.raises(AssertionError):
        both()
