"""The ISTA step y = relu(x + xG − ηλ), G = η(D − DᵀD), forward and backward, alone and after a LayerNorm.

    python benchmarks/bench_ista.py                       # every shape; --smoke: a tiny one

Without a GPU the CPU path is measured in fp32 at smaller sizes, in about two minutes; in a smoke run under
TRITON_INTERPRET=1 the kernels.

Every call folds G from D, as a training step does, and computes the gradients of x and D (and of γ and β). Ours is
checked on the same tensors first: output and gradients against the float64 reference by the tests' rule, and equal
bits in a second run. A wrong peer has no times, but rows with the reason; if it is ours, the exit status is 1.
Compiled peers run in mode "max-autotune-no-cudagraphs". Nominal FLOPs of every peer are those of the form with one
product: 2·M·C² + 2·C³ forward, 4·M·C² + 2·C³ backward.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from harness import Run, run_shapes

import torch
import torch.nn.functional as F
from measuring import Cost, Peer, Problem, measure_peers
from torch import Tensor

from crate_fast.functional import ista
from crate_fast.reference import ista_reference

STEP_SIZE, SPARSITY = 0.1, 0.1
SHIFT = STEP_SIZE * SPARSITY


@dataclass(frozen=True)
class Shape:
    """M = B·N rows of C channels."""

    rows: int
    width: int


SHAPES = {
    "B16": Shape(256 * 197, 768),
    "S8": Shape(64 * 785, 384),
    "B8": Shape(64 * 785, 768),
    "L16": Shape(128 * 197, 1024),
}
CPU_SHAPES = {"T16": Shape(8 * 197, 384), "S8": Shape(4 * 785, 384), "B16": Shape(8 * 197, 768)}
SMOKE = {"tiny": Shape(2 * 37, 64)}
OPERATORS = ("ista", "norm_ista")


# --- ours and the peers -------------------------------------------------------------------------------------------


def _with_norm(function: Callable, operator: str) -> Callable:
    """Return the function of (x, D), or for norm_ista one of (x, γ, β, D) with PyTorch's LayerNorm before it."""
    if operator == "ista":
        return function

    def normed(x: Tensor, weight: Tensor, bias: Tensor, dictionary: Tensor) -> Tensor:
        return function(F.layer_norm(x, x.shape[-1:], weight, bias), dictionary)

    return normed


def _released(x: Tensor, dictionary: Tensor) -> Tensor:
    return ista_reference(x, dictionary, STEP_SIZE, SPARSITY)


def _fold(dictionary: Tensor) -> Tensor:
    return STEP_SIZE * (dictionary - dictionary.t() @ dictionary)


def _one_product(x: Tensor, dictionary: Tensor) -> Tensor:
    return F.relu(x + x @ _fold(dictionary) - SHIFT)


def _one_product_added(x: Tensor, dictionary: Tensor) -> Tensor:
    """Add the residual inside cuBLAS's product."""
    return F.relu(torch.addmm(x, x, _fold(dictionary)) - SHIFT)


def _compiled(function: Callable) -> Callable:
    mode = "max-autotune-no-cudagraphs" if torch.cuda.is_available() else "default"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def _ours(operator: str, backend: str) -> Callable:
    options = {"step_size": STEP_SIZE, "sparsity": SPARSITY, "backend": backend}
    if operator == "ista":
        return partial(ista, **options)
    return lambda x, weight, bias, dictionary: ista(x, dictionary, norm=(weight, bias, 1e-5), **options)


def peers(operator: str, backend: str = "triton") -> list[Peer]:
    """Return ours and the forms with three products and with one, eager and compiled. Each folds G itself."""
    forms = _one_product, _one_product_added, _released
    one, added, released = (_with_norm(function, operator) for function in forms)
    return [
        Peer("ours", partial(_ours, operator, backend)),
        Peer("three products, compiled", partial(_compiled, released), compiles=True),
        Peer("one product, compiled", partial(_compiled, one), compiles=True),
        Peer("one product, PyTorch's", lambda: added),
        Peer("three products, as released", lambda: released),
    ]


# --- the problem --------------------------------------------------------------------------------------------------


def make_problem(name: str, shape: Shape, operator: str, run: Run) -> Problem:
    """Draw tokens like a LayerNorm's output (norm_ista: its input), and a dictionary with columns of norm about 1.

    The output's gradient is zero where the float64 argument of the ReLU is within a few roundings of zero: there the
    result depends on rounding in every implementation.
    """
    generator = torch.Generator(run.device).manual_seed(0)

    def random(*sizes: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        numbers = torch.randn(sizes, generator=generator, device=run.device) * std + mean
        return numbers.to(run.dtype).requires_grad_()

    dictionary = random(shape.width, shape.width, std=shape.width**-0.5)
    if operator == "ista":
        inputs = (random(shape.rows, shape.width), dictionary)
    else:
        channels = random(shape.width, std=0.1, mean=1.0), random(shape.width, std=0.1)
        inputs = (random(shape.rows, shape.width, std=2.0, mean=0.5), *channels, dictionary)
    tokens = inputs[0].detach()
    if operator == "norm_ista":
        tokens = F.layer_norm(tokens, (shape.width,), *(tensor.detach() for tensor in channels))
    argument = ista_reference(tokens.double(), dictionary.detach().double(), STEP_SIZE, 0.0, threshold="soft") - SHIFT
    grad = random(shape.rows, shape.width).detach() * (argument.abs() > 4 * torch.finfo(run.dtype).eps)
    fields = {
        "operator": operator,
        "rows": shape.rows,
        "width": shape.width,
        "dtype": str(run.dtype).removeprefix("torch."),
    }
    names, reference = "y dx dD" if operator == "ista" else "y dx dγ dβ dD", _with_norm(_released, operator)
    return Problem(f"{name} {operator}", fields, inputs, grad, _cost(shape, inputs), reference, names)


def _cost(shape: Shape, inputs: tuple[Tensor, ...]) -> dict[str, Cost]:
    """Count FLOPs and bytes: forward reads x and D, writes y; backward reads x, y, dy and D, writes dx and dD."""
    x, dictionary = inputs[0], inputs[-1]
    product, fold = 2.0 * shape.rows * shape.width**2, 2.0 * shape.width**3
    tokens, square = x.numel() * x.element_size(), dictionary.numel() * dictionary.element_size()
    forward, backward = Cost(product + fold, 2 * tokens + square), Cost(2 * product + fold, 4 * tokens + 2 * square)
    return {"forward": forward, "backward": backward}


def measure(name: str, shape: Shape, run: Run) -> list[dict]:
    """Measure one shape, for both operators."""
    backend, rows = "triton" if run.runs_kernels else "auto", []
    for operator in OPERATORS:
        rows += measure_peers(make_problem(name, shape, operator, run), peers(operator, backend), run)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure every shape and write benchmarks/results/ista.{json,md} or ista_cpu; return 1 if a row is red."""
    return run_shapes("ista", (SHAPES, CPU_SHAPES, SMOKE), measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
