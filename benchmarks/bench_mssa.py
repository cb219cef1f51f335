"""Subspace attention O = softmax(s·W Wᵀ) W on a GPU, forward and backward, against what PyTorch has for it.

    python benchmarks/bench_mssa.py                       # every shape; --smoke runs tiny ones on a CPU
    python benchmarks/bench_mssa.py --shapes B16 S8 --budget 120

First the gate: O and dW of every shape, on the tensors that are timed, against the float64 reference by the tests'
rule, and twice bit for bit. Where it fails there are no numbers and the exit status is 1. Peers get the same W as
query, key and value; autograd adds their three gradients. Compiled peers run in `torch.compile`'s default mode.
Nominal FLOPs: 4·N²·D·H·B forward, 10·N²·D·H·B backward, for every peer.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import gpu
import torch
import torch.nn.functional as F
from gpu import Peer, Problem, Run, Work, token_scale, within_twice_eager
from tile_work import attention_executed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from crate_fast.functional import subspace_attention
from crate_fast.kernels import row_blocks
from crate_fast.reference import subspace_attention_reference

__all__ = ["PEERS", "SHAPES", "attention_is_right", "main", "make_problem"]


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
SMOKE = {"tiny": Shape(2, 2, 70, 32), "padded": Shape(1, 3, 33, 48)}
CHECKED_LOGITS = 2**20  # of one head, beyond which the gate takes the first and the last head only


# --- ours and the peers -------------------------------------------------------------------------------------------


def _ours() -> Callable:
    return partial(subspace_attention, backend="triton")


class _ByRows(torch.autograd.Function):
    """Ours without the whole-head kernels, to see what they are worth; the same as ours where they do not run."""

    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        out, lse = row_blocks.forward(w, w.shape[-1] ** -0.5)
        ctx.save_for_backward(w, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        w, out, lse = ctx.saved_tensors
        return row_blocks.backward(grad, w, out, lse, w.shape[-1] ** -0.5)


def _by_rows() -> Callable:
    return _ByRows.apply


def _sdpa(backend: SDPBackend) -> Callable:
    def attend(w: Tensor) -> Tensor:
        tokens = w.transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2)

    return attend


def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(w: Tensor) -> Tensor:
        tokens = w.transpose(1, 2)
        return flex_attention(tokens, tokens, tokens).transpose(1, 2)

    return torch.compile(attend, fullgraph=True, dynamic=False)  # fullgraph: an error rather than the unfused form


PEERS = [
    Peer("ours", _ours, ours=True),
    Peer("ours, blocks of rows", _by_rows, smoke=True),
    Peer("SDPA, cuDNN", partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    Peer("SDPA, flash", partial(_sdpa, SDPBackend.FLASH_ATTENTION), smoke=True),
    Peer("SDPA, efficient", partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
    Peer("FlexAttention", _flex, compiles=True),
    Peer(
        "torch.compile of the eager form",
        partial(torch.compile, subspace_attention_reference, fullgraph=True, dynamic=False),
        compiles=True,
        quadratic=True,
    ),
    Peer("eager, as released", lambda: subspace_attention_reference, quadratic=True, smoke=True),
]


# --- the problem --------------------------------------------------------------------------------------------------


def make_problem(name: str, shape: Shape, run: Run) -> Problem:
    """W [B, N, H, D] as a projection gives it, at the scale where attention is neither uniform nor the identity."""
    sizes = (shape.batch, shape.n_tokens, shape.heads, shape.head_dim)
    generator = torch.Generator(run.device).manual_seed(0)
    w = torch.randn(sizes, generator=generator, device=run.device) * token_scale(shape.n_tokens, shape.head_dim)
    w = w.to(run.dtype).requires_grad_()
    grad = torch.randn(sizes, generator=generator, device=run.device).to(run.dtype)
    fields = {
        "batch": shape.batch,
        "heads": shape.heads,
        "n_tokens": shape.n_tokens,
        "head_dim": shape.head_dim,
        "dtype": str(run.dtype).removeprefix("torch."),
    }
    logits = shape.batch * shape.heads * shape.n_tokens**2
    return Problem(name, fields, (w,), grad, _work(shape, w), logits_bytes=logits * w.element_size())


def _work(shape: Shape, w: Tensor) -> dict[str, Work]:
    """Products, exponentials and bytes of each pass; what is executed is counted from the tile table.

    Forward reads W and writes O; backward reads W, O and dO and writes dW.
    """
    n_heads = shape.batch * shape.heads
    executed = attention_executed(n_heads, shape.n_tokens, shape.head_dim, w.device, w.dtype)
    nominal = n_heads * shape.n_tokens**2
    work = {
        name: Work(
            flops=2 * products * nominal * shape.head_dim,
            moved_bytes=tensors * w.numel() * w.element_size(),
            executed_flops=executed[name].flops,
            exps=exps * nominal,
            executed_exps=executed[name].exps,
        )
        for name, products, exps, tensors in (("forward", 2, 1, 2), ("backward", 5, 2, 4))
    }
    return work | {"forward + backward": work["forward"] + work["backward"]}


# --- the gate -----------------------------------------------------------------------------------------------------


def _truth(w: Tensor, grad: Tensor) -> list[Tensor]:
    """O and dW of the reference in float64, one head of one image at a time: its logits are all that must fit."""
    out, dw = (torch.empty(w.shape, dtype=torch.float64, device=w.device) for _ in range(2))
    for image in range(w.shape[0]):
        for head in range(w.shape[2]):
            index = (slice(image, image + 1), slice(None), slice(head, head + 1))
            tokens = w[index].double().requires_grad_()
            result = subspace_attention_reference(tokens)
            (dw[index],) = torch.autograd.grad(result, tokens, grad[index].double())
            out[index] = result.detach()
    return [out, dw]


def attention_is_right(problem: Problem, actual: list[Tensor]) -> bool:
    """Whether O and dW of the whole problem are right in its first and last image.

    All heads are judged, or the first and the last where a head's float64 logits are large.
    """
    w = problem.inputs[0]
    images = sorted({0, w.shape[0] - 1})
    heads = list(range(w.shape[2])) if w.shape[1] ** 2 <= CHECKED_LOGITS else sorted({0, w.shape[2] - 1})

    def part(tensor: Tensor) -> Tensor:
        return tensor.detach()[images][:, :, heads]

    tokens, grad = part(w).requires_grad_(), part(problem.grad)
    out = subspace_attention_reference(tokens)
    eager = [out.detach(), *torch.autograd.grad(out, tokens, grad)]
    del out
    truth = _truth(tokens.detach(), grad)
    judged = [
        within_twice_eager(part(mine), theirs, true, f"{problem.label}, {name}")
        for mine, theirs, true, name in zip(actual, eager, truth, ("O", "dW"), strict=True)
    ]
    return all(judged)


def main(argv: list[str] | None = None) -> int:
    """Check every shape, measure, and write benchmarks/results/mssa.{json,md}; 1 where the gate fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    gpu.add_options(parser)
    options = parser.parse_args(argv)
    if options.smoke and (status := gpu.rerun_interpreted(__file__, argv)) is not None:
        return status
    run = gpu.open_run(options)
    shapes = SMOKE if options.smoke else {name: SHAPES[name] for name in options.shapes}
    red = [
        name
        for name, shape in shapes.items()
        if not gpu.passes_gate(make_problem(name, shape, run), _ours(), attention_is_right, run)
    ]
    if red:
        print(f"wrong results at {', '.join(red)}: no numbers", file=sys.stderr)
        return 1
    run.measure_ceilings()
    name = "mssa" if run.dtype == torch.bfloat16 else f"mssa_{str(run.dtype).removeprefix('torch.')}"
    for index, (label, shape) in enumerate(shapes.items()):
        run.rows += gpu.measure(make_problem(label, shape, run), PEERS, run, len(shapes) - index)
        gpu.report(name, run, quiet=True)  # what is measured stays, should the rest be cut short
    gpu.report(name, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
