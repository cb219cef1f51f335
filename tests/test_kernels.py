"""The kernels of ISTA, LayerNorm and the weights against the float64 reference: on a GPU, or on the CPU through
Triton's interpreter. Attention's are test_attention.py's.

Half precision by the rule of two times eager PyTorch. fp32 is multiplied as TF32 on a GPU and exactly here: there
the interpreter shows the algebra. bfloat16 is test_bfloat16.py's; what the compiler makes of the kernels,
test_compiler.py's.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import all_within_twice_eager, clear_of_threshold, gradients, is_right, mutant
from torch import Tensor

from crate_fast import functional, kernels
from crate_fast.kernels import folding, ista, layer_norm, product
from crate_fast.kernels.launch import TABLE, Tile
from crate_fast.reference import ista_reference, norm_ista_reference

DTYPES = [torch.float32, torch.float16]
PRODUCT_TILES = sorted({(t.block_m, t.block_n, t.block_k) for t in TABLE.values() if t.block_k})


# --- ISTA --------------------------------------------------------------------------------------------------------

SIZES = [  # (M, C)
    ((1, 32), "relu"),
    ((15, 48), "soft"),
    ((197, 96), "relu"),
    ((197, 96), "soft"),
    ((130, 33), "relu"),
]


def _inputs(size, dtype, device) -> list[Tensor]:
    """x, γ, β and D."""
    rows, width = size
    x, dictionary = torch.randn(rows, width) * 2 + 1, torch.randn(width, width) / width**0.5
    gamma, beta = 1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width)
    return [t.to(dtype).to(device) for t in (x, gamma, beta, dictionary)]


def _results(inputs: list[Tensor], with_norm: bool, grad: Tensor, ours: bool = True, **options) -> list[Tensor]:
    """y and its gradients of x, (γ, β) and D: of the kernels, or of the reference."""
    if ours:
        function = partial(functional.norm_ista if with_norm else functional.ista, backend="triton", **options)
    else:
        function = partial(norm_ista_reference if with_norm else ista_reference, **options)
    return gradients(function, inputs if with_norm else inputs[::3], grad)


def _is_right(
    inputs: list[Tensor],
    threshold: str = "relu",
    with_norm: bool = False,
    autocast: bool = False,
    grad: Tensor | None = None,
) -> bool:
    """Return True if the results are; eager under autocast has all but the products, in float16, in fp32."""
    x, gamma, beta, dictionary = (tensor.double() for tensor in inputs)
    if grad is None:  # zero where rounding decides whether ISTA's output is
        tokens = F.layer_norm(x, x.shape[-1:], gamma, beta) if with_norm else x
        margin = 16 * torch.finfo(torch.float16 if autocast else inputs[0].dtype).eps
        grad = torch.randn(x.shape, device=x.device).to(inputs[0].dtype)
        grad = clear_of_threshold(grad, tokens, dictionary, margin=margin)
    options = {"with_norm": with_norm, "threshold": threshold}
    truth = _results([x, gamma, beta, dictionary], grad=grad.double(), ours=False, **options)
    with torch.autocast(x.device.type, torch.float16, enabled=autocast):
        actual, eager = (_results(inputs, grad=grad, ours=ours, **options) for ours in (True, False))
    judge = all_within_twice_eager if autocast else is_right
    return judge(actual, eager, truth, "y dx dγ dβ dD" if with_norm else "y dx dD")


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "threshold"), SIZES, ids=str)
def test_ista(size, dtype, threshold, with_norm, device, poisoned):
    assert _is_right(_inputs(size, dtype, device), threshold, with_norm)


@pytest.mark.parametrize(("size", "threshold"), [((70, 48), "soft"), ((197, 96), "relu")], ids=str)
def test_norm_ista_under_autocast(size, threshold, device, poisoned):
    assert _is_right(_inputs(size, torch.float32, device), threshold, with_norm=True, autocast=True)


@pytest.mark.parametrize("soft", [False, True])
def test_what_rounds_to_zero_passes_no_gradient(soft, device, poisoned):
    x = torch.full((16, 32), 0.01, dtype=torch.float16, device=device)
    y, nonzero = ista.forward(x, x, torch.zeros(32, 32, dtype=x.dtype, device=device), x[0, 0].item() - 1e-8, soft)
    assert y.count_nonzero() == nonzero.count_nonzero() == 0


def _use_tile(tile: Tile, monkeypatch) -> None:
    monkeypatch.setattr(kernels.ista, "tile_for", lambda *_: tile)
    monkeypatch.setattr(kernels.product, "fitted", lambda *_: tile)  # of the weight's gradient


@pytest.mark.parametrize("persistent", [False, True], ids=["a tile a program", "persistent"])
@pytest.mark.parametrize("blocks", PRODUCT_TILES, ids=str)
def test_every_product_tile_of_the_table(blocks, persistent, device, poisoned, monkeypatch):
    """On three ragged rows of tiles and two columns, one of a wide tile; persistent ones behind a LayerNorm."""
    tile = Tile(*blocks[:2], num_warps=8, num_stages=1, block_k=blocks[2], persistent=persistent)
    _use_tile(tile, monkeypatch)
    size = (2 * tile.block_m + 5, min(192, 3 * tile.block_n // 2))
    assert _is_right(_inputs(size, torch.float16, device), with_norm=persistent)


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
def test_strided_and_expanded_matrices(with_norm, device, poisoned):
    x, gamma, beta, dictionary = _inputs((64, 96), torch.float32, device)
    strided = [x.t().contiguous().t(), gamma, beta, dictionary.t().contiguous().t()]
    assert _is_right(strided, with_norm=with_norm, grad=torch.randn(1, 96, device=device).expand(64, -1))


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_layer_norm_of_large_offsets(offset, device, poisoned):
    x, *rest = _inputs((64, 96), torch.float32, device)
    assert _is_right([x + offset, *rest], with_norm=True)


def test_constant_rows_are_finite(device):
    x, *rest = _inputs((16, 64), torch.float32, device)
    assert all(result.isfinite().all() for result in _results([x * 0 + 3, *rest], True, torch.randn_like(x)))


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
def test_a_nan_row_is_not_hidden(with_norm, device):
    x, *rest = _inputs((64, 96), torch.float32, device)
    x[5, 0] = torch.nan
    y, grad_x, *_, grad_dictionary = _results([x, *rest], with_norm, torch.randn_like(x))
    assert y[5].isnan().all()
    assert y[4].isfinite().all()
    assert grad_dictionary.isnan().any()
    assert grad_x[4].isfinite().all()


RELU = "y = tl.where(y <= shift, 0.0, y - shift)"
MASKED = "return product(masked, folded, masked, tile)"
MUTANTS = {  # the module, what the kernel says, what the mutant says
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
    "no ε": (layer_norm, "/ WIDTH + eps)", "/ WIDTH + 1000 * eps)"),
    "the mean's gradient dropped": (layer_norm, "scaled - average[:, None]", "scaled - 0.0 * average[:, None]"),
    "the deviation's gradient dropped": (layer_norm, "- normed * along[:, None]", "- 0.0 * normed * along[:, None]"),
    "dγ without the rows": (layer_norm, "first += tl.sum(grad * normed, 0)", "first += tl.sum(grad, 0)"),
    "only the first block of rows": (layer_norm, "step = tl.num_programs(0) * BLOCK_M", "step = n_rows"),
    "fp32 tokens in half precision": (product, "if MASKED:", "if False:"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, device, tmp_path, monkeypatch, poisoned):
    """Columns finished in two halves, the last one ragged, and more tiles or rows than there are programs."""
    module, *mutation = MUTANTS[name]
    monkeypatch.setenv("CRATE_FAST_SELF_CHECK", "0")
    monkeypatch.setattr(kernels, module.__name__.rpartition(".")[2], mutant(module, mutation, tmp_path))
    if module is not ista:
        monkeypatch.setattr(kernels, "ista", mutant(module, mutation, tmp_path, user=ista))
    monkeypatch.setattr(kernels.layer_norm, "MAX_PROGRAMS", 2)
    _use_tile(Tile(64, 128, 4, 1, 32, persistent=True), monkeypatch)
    autocast = "fp32" in name
    dtype = torch.float32 if module is layer_norm or autocast else torch.float16
    assert not _is_right(_inputs((300, 96), dtype, device), with_norm=True, autocast=autocast)


def test_more_rows_than_programs(device, monkeypatch, poisoned):
    monkeypatch.setattr(layer_norm, "MAX_PROGRAMS", 2)
    assert _is_right(_inputs((197, 96), torch.float32, device), with_norm=True)


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 100])
def test_folding_a_dictionary(width, dtype, device, poisoned):
    dictionary = (torch.randn(width, width) / width**0.5).to(dtype).to(device)
    wide, grad = dictionary.double(), torch.randn(width, width, device=device)
    truth = 0.1 * (wide - wide.t() @ wide)
    folded = folding.fold(dictionary, 0.1, dtype)
    assert (folded - truth).abs().max() <= (torch.finfo(dtype).eps + 2e-6) * truth.abs().max()
    truth = 0.1 * (grad.double() - wide @ (grad + grad.t()).double())
    found = folding.fold_backward(grad, dictionary, 0.1)
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
