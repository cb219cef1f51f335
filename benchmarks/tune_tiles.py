"""Measure tiles on the GPU at hand and write the best into the table: offline, never at run time.

    python benchmarks/tune_tiles.py --kernels attention_forward attention_backward --head-dims 64
    python benchmarks/tune_tiles.py --kernels ista_forward --write        # replaces rows of kernels/tiles.py

Each candidate must first agree with the present row's result. Without --write the rows are printed. The output map is
also timed as PyTorch does it, with bias and residual by themselves; the row says which is faster.
"""

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from crate_fast.kernels import tiles
from crate_fast.kernels.launch import Launch
from crate_fast.kernels.support import architecture
from crate_fast.kernels.tiles import TABLE, Tile

LONG_SHAPE = (64, 785, 6)  # B, N, H: S/8 at 224 px
SHORT_SHAPE = (256, 197, 6)  # T/16 at 224 px
ROWS, WIDTH = 64 * 785, 768
BLOCKS = (32, 64, 128, 256)
TOLERANCE = 2e-2  # of a candidate against the present row, relative to the largest entry; bf16 rounds to 4e-3


@dataclass(frozen=True)
class Problem:
    """What a candidate is run on: `plan(tile)` makes the launch, which writes `output`; `result` is read off that.

    `alternative` does the same work without the kernel.
    """

    plan: Callable[[Tile], Launch]
    output: torch.Tensor
    result: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    alternative: Callable[[], object] | None = None


def candidates(kernel: str) -> list[Tile]:
    """Every tile worth measuring for a kernel, hopeless ones included: a compiler's refusal costs a second."""
    warps, stages = (4, 8), (1, 2, 3, 4)
    if kernel.startswith("attention"):
        blocks = itertools.product((32, 64, 128), (32, 64, 128))
        loops = (False, True) if kernel in ("attention_forward", "attention_backward") else (False,)
        return [
            Tile(m, n, w, s, two_loops=two)
            for (m, n), w, s, two in itertools.product(blocks, warps, stages[:3], loops)
        ]
    blocks = itertools.product((64, 128, 256), BLOCKS[1:], (32, 64))
    loops = (False,) if kernel == "weight_gradient" else (False, True)
    return [
        Tile(m, n, w, s, k, persistent=one)
        for (m, n, k), w, s, one in itertools.product(blocks, warps, stages[1:], loops)
    ]


def problems(kernel: str, head_dim: int, device: torch.device, precision: str) -> list[Problem]:
    """The kernel's launches on tensors like those of training.

    Args:
        kernel: As in the table.
        head_dim: D, for attention.
        device: Where to run.
        precision: The table's: "half", "mixed" (products alone), "tf32" or "ieee".
    """
    stored = torch.bfloat16 if precision == "half" and device.type == "cuda" else torch.float32
    multiplied = stored if precision != "mixed" else torch.bfloat16 if device.type == "cuda" else torch.float16
    if kernel.startswith("attention"):
        shapes = [(*shape, head_dim) for shape in (SHORT_SHAPE, LONG_SHAPE)]
        return [_attention_problem(kernel, shape, device, stored) for shape in shapes]
    return [_product_problem(kernel, device, stored, multiplied)]


def _attention_problem(kernel: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Problem:
    from crate_fast.kernels import row_blocks

    w, grad = (torch.randn(shape, device=device).mul(0.8).to(dtype) for _ in range(2))
    scale, dropout_p = shape[-1] ** -0.5, 0.1 if kernel.endswith("dropout") else 0.0
    seed = torch.tensor(1, device=device) if dropout_p else None
    out, lse = row_blocks.forward(w, scale, dropout_p, seed)
    output = torch.empty_like(out)
    if kernel.startswith("attention_forward"):
        return Problem(lambda tile: row_blocks.plan_forward(w, output, lse, scale, dropout_p, seed, tile), output)
    if kernel.startswith("attention_delta"):
        delta, own_lse = torch.empty_like(lse), torch.empty_like(lse)
        return Problem(
            lambda tile: row_blocks.plan_delta(grad, w, lse, delta, own_lse, scale, dropout_p, seed, tile),
            delta,
        )
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    delta = delta if row_blocks.needs_delta(dtype) else None
    return Problem(
        lambda tile: row_blocks.plan_backward(grad, w, out, lse, output, delta, scale, dropout_p, seed, tile),
        output,
    )


def _product_problem(kernel: str, device: torch.device, stored: torch.dtype, multiplied: torch.dtype) -> Problem:
    from crate_fast.kernels import layer_norm, product, weight_gradient

    x, a = (torch.randn(ROWS, WIDTH, device=device) for _ in range(2))
    x, a, out = x.to(stored), a.to(multiplied), torch.empty(ROWS, WIDTH, device=device, dtype=stored)
    weight = (torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5 * 0.1).to(multiplied)
    ones = torch.ones(WIDTH, device=device)
    if kernel == "weight_gradient":
        shares = torch.zeros(min(ROWS // 64 + 1, 64), WIDTH, WIDTH, device=device)

        def plan(tile: Tile) -> Launch:
            splits, rows = weight_gradient.splits(ROWS, WIDTH, WIDTH, device, tile)
            shares[splits:].zero_()  # as many as this tile gets in training; the others add nothing
            return weight_gradient.plan(a, a, shares[:splits], rows, tile)

        return Problem(plan, shares, lambda written: written.sum(0))
    options, alternative = {"masked": multiplied != stored}, None
    if kernel == "ista_forward":
        norm = layer_norm.Norm(*layer_norm.normalize(x, 1e-5, multiplied)[1:], ones, ones)
        nonzero = torch.empty(x.shape, dtype=torch.int8, device=device)
        options = {"finish": "relu", "shift": 0.01, "norm": norm, "nonzero": nonzero}
    if kernel == "output_map":
        options, bias = {"bias": ones}, ones.to(multiplied)
        alternative = lambda: x + torch.addmm(bias, a, weight.t())  # noqa: E731
    return Problem(lambda tile: product.plan(a, weight, x, out, tile, **options), out, alternative=alternative)


def _gpu_milliseconds(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=25, rep=100, return_mode="median")


def tune(
    kernel: str, present: Tile, wanted: list[Problem], measure: Callable = _gpu_milliseconds
) -> tuple[Tile, dict]:
    """The candidate with the least geometric mean of its times on these problems.

    Returns:
        The best tile, chosen unless the alternative is faster, and {tile: milliseconds, or the reason it was left
        out}, with "alternative" where there is one.
    """
    truths = []
    for problem in wanted:
        problem.plan(present).run()
        truths.append(problem.result(problem.output))
    measured: dict[Tile | str, float | str] = {}
    present = replace(present, chosen=True)
    for tile in dict.fromkeys([present, *candidates(kernel)]):
        try:
            times = [_time(p, truth, tile, measure) for p, truth in zip(wanted, truths, strict=True)]
            measured[tile] = math.prod(times) ** (1 / len(times))
        except Exception as error:  # what a compiler raises, and a result that differs: both rule the tile out
            measured[tile] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    times = {tile: value for tile, value in measured.items() if isinstance(value, float)}
    if present not in times:
        raise RuntimeError(f"{kernel}: the present row {present} does not run: {measured[present]}")
    best = min(times, key=times.get)
    if all(problem.alternative for problem in wanted):
        others = [measure(problem.alternative) for problem in wanted]
        measured["alternative"] = math.prod(others) ** (1 / len(others))
        best = replace(best, chosen=measured[best] < measured["alternative"])
    return best, measured


def _time(problem: Problem, truth: torch.Tensor, tile: Tile, measure: Callable) -> float:
    problem.output.fill_(torch.nan)
    launch = problem.plan(tile)
    launch.run()
    error = (problem.result(problem.output).float() - truth.float()).abs().max() / truth.float().abs().max()
    if not error <= TOLERANCE:
        raise ValueError(f"its result differs by {error.item():.2g} of the largest entry")
    return measure(launch.run)


def row_source(key: tuple[str, str, str, int], tile: Tile) -> str:
    """A row of the table as it stands in kernels/tiles.py."""
    kernel, architecture, precision, block_d = key
    numbers = [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages] + [tile.block_k] * (tile.block_k > 0)
    words = [*map(str, numbers), *["two_loops=True"] * tile.two_loops, *["persistent=True"] * tile.persistent]
    words += ["chosen=False"] * (not tile.chosen)
    return f'    ("{kernel}", "{architecture}", "{precision}", {block_d}): Tile({", ".join(words)}),'


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
    parser.add_argument("--precision", choices=("half", "mixed", "tf32", "ieee"), default="half")
    parser.add_argument("--write", action="store_true", help="replace the rows of kernels/tiles.py")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("tuning measures on a GPU, and PyTorch finds none here")

    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    device = torch.device("cuda")
    for kernel, head_dim in itertools.product(args.kernels, args.head_dims):
        attention = kernel.startswith("attention")
        block_d = max(32, 1 << (head_dim - 1).bit_length()) if attention else 0
        key = (kernel, architecture(device), args.precision, block_d)
        if key not in TABLE or (not attention and head_dim != args.head_dims[0]):
            continue  # no such row, or a product again, which knows nothing of heads
        best, measured = tune(kernel, TABLE[key], problems(kernel, head_dim, device, args.precision))
        for tile, value in sorted(measured.items(), key=lambda item: (isinstance(item[1], str), str(item[1]))):
            print(f"  {tile}: {value if isinstance(value, str) else f'{value:.4f} ms'}")
        now, before = (measured[replace(tile, chosen=True)] for tile in (best, TABLE[key]))
        print(f"{row_source(key, best)}  # {now:.4f} ms, was {before:.4f}", flush=True)
        if args.write and best != TABLE[key]:
            write_row(key, best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
