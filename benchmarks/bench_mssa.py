"""Subspace attention O = softmax(s·W Wᵀ) W, forward and backward, against PyTorch's implementations.

    python benchmarks/bench_mssa.py                       # every shape; --smoke: tiny ones
    python benchmarks/bench_mssa.py --shapes B16 S8

Without a GPU the CPU path is measured in fp32 at smaller sizes, in about two minutes; in a smoke run under
TRITON_INTERPRET=1 the kernels.

Ours is checked on the same tensors first: O and dW against the float64 reference by the tests' rule, and equal bits
in a second run. A wrong peer has no times, but rows with the reason; if it is ours, the exit status is 1. Peers get W
as query, key and value; autograd adds the three gradients. Compiled peers run in `torch.compile`'s default mode.
Nominal FLOPs of every peer: 4·N²·D·H·B forward, 10·N²·D·H·B backward. The time of backward is the difference.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

from harness import Run, run_benchmark

import torch
import torch.nn.functional as F
from measuring import Cost, Peer, Problem, measure_peers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from crate_fast.functional import subspace_attention
from crate_fast.probes import PROBLEMS
from crate_fast.reference import subspace_attention_reference


@dataclass(frozen=True)
class Shape:
    """B images of N tokens, H heads of width D."""

    batch: int
    heads: int
    n_tokens: int
    head_dim: int


SHAPES = {
    "T16": Shape(256, 6, 197, 64),  # CRATE-T/16 at 224 pixels
    "S16": Shape(256, 12, 197, 48),  # the released CRATE-S
    "B16": Shape(256, 12, 197, 64),
    "L16": Shape(128, 16, 197, 64),
    "S8": Shape(64, 6, 785, 64),  # the emergence paper's
    "B8": Shape(64, 12, 785, 64),
    "B8-480": Shape(8, 12, 3601, 64),  # MaskCut at 480 pixels
    "long": Shape(1, 12, 16385, 64),  # growth with N
}
CPU_SHAPES = {"T16": Shape(8, 6, 197, 64), "S8": Shape(4, 6, 785, 64), "S8-480": Shape(1, 6, 3601, 64)}
SMOKE = {"tiny": Shape(1, 2, 70, 32), "padded": Shape(1, 3, 33, 48)}
CHECKED_LOGITS = 2**20  # per head; with more, only the first and the last head are checked


# --- the peers ----------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend | None = None) -> Callable:
    def attend(w: Tensor) -> Tensor:
        tokens = w.transpose(1, 2)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2)

    return attend


def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(w: Tensor) -> Tensor:
        tokens = w.transpose(1, 2)
        return flex_attention(tokens, tokens, tokens).transpose(1, 2)

    return torch.compile(attend, fullgraph=True, dynamic=False)  # an error instead of the unfused form


_COMPILED = Peer(
    "torch.compile of the eager form",
    partial(torch.compile, subspace_attention_reference, fullgraph=True, dynamic=False),
    compiles=True,
)
_EAGER = Peer("eager, as released", lambda: subspace_attention_reference)
PEERS = [
    Peer("ours", lambda: partial(subspace_attention, backend="triton")),
    Peer("SDPA, cuDNN", partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    Peer("SDPA, flash", partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    Peer("SDPA, efficient", partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
    Peer("FlexAttention", _flex, compiles=True),
    _COMPILED,
    _EAGER,
]
CPU_PEERS = [Peer("ours", lambda: subspace_attention), Peer("SDPA", _sdpa), _COMPILED, _EAGER]


# --- the problem --------------------------------------------------------------------------------------------------


def make_problem(name: str, shape: Shape, run: Run) -> Problem:
    """Draw W [B, N, H, D] at the scale where attention is neither uniform nor the identity."""
    sizes = (shape.batch, shape.n_tokens, shape.heads, shape.head_dim)
    generator = torch.Generator(run.device).manual_seed(0)
    drawn = PROBLEMS["attention"](sizes, run.dtype, None, run.device, generator)
    fields = asdict(shape) | {"dtype": str(run.dtype).removeprefix("torch.")}
    return Problem(name, fields, drawn, _cost(shape, drawn.inputs[0]), partial(_checked, shape))


def _cost(shape: Shape, w: Tensor) -> dict[str, Cost]:
    """Count FLOPs and bytes: forward reads W and writes O; backward reads W, O and dO and writes dW."""
    product = 2.0 * shape.batch * shape.heads * shape.n_tokens**2 * shape.head_dim
    tokens = w.numel() * w.element_size()
    return {"forward": Cost(2 * product, 2 * tokens), "forward + backward": Cost(7 * product, 6 * tokens)}


def _checked(shape: Shape, tensor: Tensor) -> Tensor:
    """Select the first and last image, and all heads, or the first and last if the logits are large."""
    images = sorted({0, shape.batch - 1})
    heads = list(range(shape.heads)) if shape.n_tokens**2 <= CHECKED_LOGITS else sorted({0, shape.heads - 1})
    return tensor[images][:, :, heads]


def measure(_table: str, name: str, shape: Shape, run: Run) -> list[dict]:
    """Measure one shape and its peers."""
    return measure_peers(make_problem(name, shape, run), PEERS if run.runs_kernels else CPU_PEERS, run)


def main(argv: list[str] | None = None) -> int:
    """Measure every shape and write benchmarks/results/mssa.{json,md} or mssa_cpu; return 1 if a row is red."""
    return run_benchmark([{"mssa": shapes} for shapes in (SHAPES, CPU_SHAPES, SMOKE)], measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
