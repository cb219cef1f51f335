"""Measure tiles on the GPU at hand and write the best into the table: offline, never at run time.

    python benchmarks/tune_tiles.py --kernels attention_forward attention_backward --head-dims 64
    python benchmarks/tune_tiles.py --kernels ista_forward --write        # replaces rows of kernels/tiles.py

Each candidate must first agree with the present row's result. Without --write the rows are printed.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from crate_fast.kernels import tiles
from crate_fast.kernels.launch import Launch
from crate_fast.kernels.tiles import TABLE, Tile

ATTENTION_SHAPE = (64, 785, 6)  # B, N, H: S/8 at 224 px
SHORT_SHAPE = (256, 197, 6)  # T/16 at 224 px
ROWS, WIDTH = 64 * 785, 768
BLOCKS = (32, 64, 128, 256)
TOLERANCE = 2e-2  # of a candidate against the present row, relative to the largest entry; bf16 rounds to 4e-3


@dataclass(frozen=True)
class Problem:
    """What a candidate is run on: `plan(tile)` makes the launches and `output` is what they write."""

    plan: Callable[[Tile], list[Launch]]
    output: torch.Tensor


def candidates(kernel: str) -> list[Tile]:
    """Every tile worth measuring for a kernel, hopeless ones included: a compiler's refusal costs a second."""
    warps, stages = (4, 8), (1, 2, 3, 4)
    if kernel.startswith("attention"):
        blocks = itertools.product((32, 64, 128), (32, 64, 128))
        return [Tile(m, n, w, s) for (m, n), w, s in itertools.product(blocks, warps, stages[:3])]
    blocks = itertools.product((64, 128), BLOCKS[1:], (32, 64))
    return [Tile(m, n, w, s, k) for (m, n, k), w, s in itertools.product(blocks, warps, stages[1:])]


def problems(kernel: str, head_dim: int, device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """The kernel's launches on tensors like those of training."""
    if kernel.startswith("attention"):
        return [
            _attention_problem(kernel, (*shape, head_dim), device, dtype) for shape in (SHORT_SHAPE, ATTENTION_SHAPE)
        ]
    return [_product_problem(kernel, device, dtype)]


def _attention_problem(kernel: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Problem:
    from crate_fast.kernels import subspace_attention

    w, grad = (torch.randn(shape, device=device).mul(0.8).to(dtype) for _ in range(2))
    scale, dropout_p = shape[-1] ** -0.5, 0.1 if kernel.endswith("dropout") else 0.0
    seed = torch.tensor(1, device=device) if dropout_p else None
    out, lse = subspace_attention.forward(w, scale, dropout_p, seed)
    if kernel.startswith("attention_forward"):
        output = torch.empty_like(out)
        return Problem(
            lambda tile: [subspace_attention.plan_forward(w, output, lse, scale, dropout_p, seed, tile)], output
        )
    output = torch.empty_like(out)
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    delta = delta if subspace_attention.needs_delta(dtype) else None
    return Problem(
        lambda tile: [
            subspace_attention.plan_backward(grad, w, out, lse, output, delta, scale, dropout_p, seed, tile)
        ],
        output,
    )


def _product_problem(kernel: str, device: torch.device, dtype: torch.dtype) -> Problem:
    from crate_fast.kernels import ista, layer_norm

    x, grad = (torch.randn(ROWS, WIDTH, device=device).to(dtype) for _ in range(2))
    folded = (torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5 * 0.1).to(dtype)
    ones = torch.ones(WIDTH, device=device)
    norm = None
    if kernel.startswith("norm"):
        norm = layer_norm.Norm(*layer_norm.row_statistics(x, 1e-5), ones, ones)
    if kernel.endswith("ista_forward"):
        y = torch.empty_like(x)
        return Problem(lambda tile: [ista.plan_forward(x, folded, y, 0.01, False, norm, tile)], y)
    y = ista.forward(x, folded, 0.01)
    if kernel == "ista_backward_input":
        dx = torch.empty_like(x)
        return Problem(lambda tile: [ista.plan_backward_input(grad, y, folded, dx, tile)], dx)
    rows = -(-ROWS // 4 // 64) * 64
    partial = torch.empty(-(-ROWS // rows), WIDTH, WIDTH, device=device)
    return Problem(lambda tile: [ista.plan_backward_folded(x, grad, y, partial, rows, dtype, norm, tile)], partial)


def _gpu_milliseconds(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=25, rep=100, return_mode="median")


def tune(
    kernel: str, present: Tile, wanted: list[Problem], measure: Callable = _gpu_milliseconds
) -> tuple[Tile, dict]:
    """The candidate with the least time in all on these problems.

    Returns:
        The best tile and {tile: milliseconds, or the reason it was left out}.
    """
    truths = []
    for problem in wanted:
        for launch in problem.plan(present):
            launch.run()
        truths.append(problem.output.clone())
    measured: dict[Tile, float | str] = {}
    for tile in dict.fromkeys([present, *candidates(kernel)]):
        try:
            measured[tile] = sum(_time(p, truth, tile, measure) for p, truth in zip(wanted, truths, strict=True))
        except Exception as error:  # what a compiler raises, and a result that differs: both rule the tile out
            measured[tile] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    times = {tile: value for tile, value in measured.items() if isinstance(value, float)}
    if present not in times:
        raise RuntimeError(f"{kernel}: the present row {present} does not run: {measured[present]}")
    return min(times, key=times.get), measured


def _time(problem: Problem, truth: torch.Tensor, tile: Tile, measure: Callable) -> float:
    launches = problem.plan(tile)
    problem.output.fill_(torch.nan)
    for launch in launches:
        launch.run()
    error = (problem.output.float() - truth.float()).abs().max() / truth.float().abs().max()
    if not error <= TOLERANCE:
        raise ValueError(f"its result differs by {error.item():.2g} of the largest entry")
    return measure(lambda: [launch.run() for launch in launches])


def row_source(key: tuple[str, str, str, int], tile: Tile) -> str:
    """A row of the table as it stands in kernels/tiles.py."""
    kernel, architecture, precision, block_d = key
    numbers = [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages] + [tile.block_k] * (tile.block_k > 0)
    return f'    ("{kernel}", "{architecture}", "{precision}", {block_d}): Tile({", ".join(map(str, numbers))}),'


def write_row(key: tuple[str, str, str, int], tile: Tile, path: Path = Path(tiles.__file__)) -> None:
    """Replace one row of the table's source; ValueError where the row is not there once."""
    source = path.read_text()
    start = re.escape(row_source(key, tile).split("Tile(")[0])
    replaced, count = re.subn(rf"^{start}Tile\(.*\),$", row_source(key, tile), source, flags=re.M)
    if count != 1:
        raise ValueError(f"{path} has {count} rows for {key}, not one")
    path.write_text(replaced)


def main(argv: list[str] | None = None) -> int:
    """Tune the chosen rows of this GPU's architecture."""
    kernels = list(dict.fromkeys(kernel for kernel, *_ in TABLE))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--head-dims", nargs="+", type=int, choices=(32, 48, 64, 80, 128), default=[64])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--write", action="store_true", help="replace the rows of kernels/tiles.py")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("tuning measures on a GPU, and PyTorch finds none here")

    device, dtype = torch.device("cuda"), getattr(torch, args.dtype)
    for kernel, head_dim in itertools.product(args.kernels, args.head_dims):
        attention = kernel.startswith("attention")
        if not attention and head_dim != args.head_dims[0]:
            continue  # products do not know of heads
        wanted = problems(kernel, head_dim, device, dtype)
        key = _key(kernel, wanted[0])
        best, measured = tune(kernel, TABLE[key], wanted)
        for tile, value in sorted(measured.items(), key=lambda item: (isinstance(item[1], str), str(item[1]))):
            print(f"  {tile}: {value if isinstance(value, str) else f'{value:.4f} ms'}")
        print(f"{row_source(key, best)}  # {measured[best]:.4f} ms, was {measured[TABLE[key]]:.4f}", flush=True)
        if args.write and best != TABLE[key]:
            write_row(key, best)
    return 0


def _key(kernel: str, problem: Problem) -> tuple[str, str, str, int]:
    """The table's key of what a problem runs: found by asking the launcher for its row."""
    from crate_fast.kernels.launch import matmul_precision
    from crate_fast.kernels.support import architecture

    launch = problem.plan(Tile(64, 64, 4, 1, 64))[0]
    block_d = launch.constants.get("BLOCK_D", 0)
    return kernel, architecture(problem.output.device), matmul_precision(_dtype(launch)).row, block_d


def _dtype(launch: Launch) -> torch.dtype:
    pointer = "w_ptr" if "w_ptr" in launch.arguments else "grad_ptr" if "grad_ptr" in launch.arguments else "x_ptr"
    return launch.arguments[pointer].dtype


if __name__ == "__main__":
    sys.exit(main())
