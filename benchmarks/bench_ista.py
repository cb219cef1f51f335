"""The ISTA step y = relu(x + xG − ηλ), G = η(D − DᵀD), forward and backward, alone and after a LayerNorm.

    python benchmarks/bench_ista.py                       # every shape; --smoke: a tiny one

Without a GPU the CPU path is measured in fp32 at smaller sizes, in about two minutes; in a smoke run under
TRITON_INTERPRET=1 the kernels.

Every call folds G from D, as a training step does, and computes the gradients of x and D (and of γ and β). Ours is
checked on the same tensors first: output and gradients against the float64 reference by the tests' rule, and equal
bits in a second run. A wrong peer has no times, but rows with the reason; if it is ours, the exit status is 1.
Compiled peers run in mode "max-autotune-no-cudagraphs", on a CPU in the default mode. Nominal FLOPs of every peer are
those of the form with one product: 2·M·C² + 2·C³ forward, 4·M·C² + 2·C³ backward. The time of backward is the
difference.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from harness import Run, run_benchmark

import torch
import torch.nn.functional as F
from measuring import Cost, Peer, Problem, measure_peers
from torch import Tensor

from crate_fast.functional import ista
from crate_fast.probes import PROBLEMS, norm_ista
from crate_fast.reference import ista_reference, norm_ista_reference

STEP_SIZE, SHIFT = 0.1, 0.1 * 0.1  # the operators' defaults: η, ηλ


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


def peers(operator: str, backend: str = "triton") -> list[Peer]:
    """Return ours and the forms with three products and with one, eager and compiled. Each folds G itself."""
    one, added = (_with_norm(function, operator) for function in (_one_product, _one_product_added))
    ours, released = (ista, ista_reference) if operator == "ista" else (norm_ista, norm_ista_reference)
    return [
        Peer("ours", lambda: partial(ours, backend=backend)),
        Peer("three products, compiled", partial(_compiled, released), compiles=True),
        Peer("one product, compiled", partial(_compiled, one), compiles=True),
        Peer("one product, PyTorch's", lambda: added),
        Peer("three products, as released", lambda: released),
    ]


# --- the problem --------------------------------------------------------------------------------------------------


def make_problem(name: str, shape: Shape, operator: str, run: Run) -> Problem:
    """Draw the problem of the probes: the gradient is 0 where rounding decides whether the output is zero."""
    generator = torch.Generator(run.device).manual_seed(0)
    drawn = PROBLEMS[operator]((shape.rows, shape.width), run.dtype, None, run.device, generator)
    fields = {"operator": operator, **asdict(shape), "dtype": str(run.dtype).removeprefix("torch.")}
    return Problem(f"{name} {operator}", fields, drawn, _cost(shape, drawn.inputs))


def _cost(shape: Shape, inputs: list[Tensor]) -> dict[str, Cost]:
    """Count FLOPs and bytes: forward reads x and D, writes y; backward reads x, y, dy and D, writes dx and dD."""
    x, dictionary = inputs[0], inputs[-1]
    product, fold = 2.0 * shape.rows * shape.width**2, 2.0 * shape.width**3
    tokens, square = x.numel() * x.element_size(), dictionary.numel() * dictionary.element_size()
    forward = Cost(product + fold, 2 * tokens + square)
    return {"forward": forward, "forward + backward": Cost(3 * product + 2 * fold, 6 * tokens + 3 * square)}


def measure(_table: str, name: str, shape: Shape, run: Run) -> list[dict]:
    """Measure one shape, for both operators."""
    backend, rows = "triton" if run.runs_kernels else "auto", []
    for operator in OPERATORS:
        rows += measure_peers(make_problem(name, shape, operator, run), peers(operator, backend), run)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure every shape and write benchmarks/results/ista.{json,md} or ista_cpu; return 1 if a row is red."""
    return run_benchmark([{"ista": shapes} for shapes in (SHAPES, CPU_SHAPES, SMOKE)], measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
