"""Candidate tiles of each kernel, the problems to measure them on, and the measurement of one candidate.

`gpu_check.py` first compiles every candidate, leaves out those that spill or do not fit, and times the others. It
writes the best to found_tiles.json.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial

from harness import Run

import torch
from torch import Tensor

from crate_fast.accuracy import gradients, token_scale
from crate_fast.kernels.launch import Tile, architecture, find, lookup, recorded
from crate_fast.reference import subspace_attention_reference

TOLERANCE = 2e-2  # relative norm of the difference from float64; bf16 rounds to 4e-3
CHECKED_ROWS = 512  # at each end of a product
REHEARSED = bool(os.environ.get("GPU_CHECK_REHEARSE"))
TIMED = {"short": (256, 197, 12), "long": (64, 785, 12), "rows": 256 * 197}  # B, N, H: B16 and B8
# these compile to the same code and need little memory
WARMED = {"short": (2, 197, 12), "long": (2, 785, 12), "rows": 16 * 197}
WIDTH = 768
if REHEARSED:
    TIMED = WARMED = {"short": (1, 70, 2), "long": (1, 130, 1), "rows": 96}
    WIDTH = 64


def _grid(*rows: tuple, **options) -> list[Tile]:
    return [Tile(*row, **options) for row in rows]


_PRODUCT = [
    *_grid((128, 256, 8, 4, 64), (128, 256, 8, 3, 64), (128, 128, 8, 4, 64), (128, 128, 8, 3, 64), persistent=True),
    *_grid((128, 128, 4, 4, 64), (128, 128, 4, 3, 64), (256, 128, 8, 3, 64), (128, 256, 8, 4, 32), persistent=True),
    *_grid((128, 256, 8, 3, 64), (128, 128, 8, 4, 64), (128, 128, 8, 3, 64), (128, 128, 4, 3, 64)),
]
_GRADIENT = [
    *((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
    *((64, 32, 4, 2), (64, 64, 8, 2)),
]
# The most promising come first, because time may run out. All fit on sm_90 with Triton 3.6; tiles that spilled are
# left out. At 197 tokens the tiles of whole heads differ only by warps and, in the second launch, by stages.
CANDIDATES: dict[str, list[Tile]] = {
    "attention_forward": [
        *_grid((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2)),
        *_grid((64, 128, 4, 3), (128, 32, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (256, 64, 8, 3), (64, 32, 4, 3)),
    ],
    "attention_backward": [*_grid(*_GRADIENT, one_exp=True), *_grid(*_GRADIENT)],
    "whole_head_forward": _grid(
        (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 1), (64, 64, 4, 2), (64, 32, 8, 1), (64, 64, 8, 2)
    ),
    "whole_head_backward": _grid((64, 32, 4, 2), (64, 32, 4, 3), (64, 16, 4, 1)),
    "ista_forward": _PRODUCT,
    "ista_backward_input": _PRODUCT,
    "output_map": _PRODUCT,
    "weight_gradient": [
        *_grid((128, 256, 8, 3, 64), (128, 128, 8, 4, 64), (128, 128, 4, 3, 64), (128, 256, 8, 4, 64)),
        *_grid((256, 128, 8, 3, 64), (128, 128, 8, 3, 64), (128, 128, 4, 4, 64), (128, 128, 8, 3, 128)),
    ],
}
SMALL = {"attention": Tile(32, 32, 4, 1), "whole_head": Tile(64, 32, 4, 1), "other": Tile(32, 32, 4, 1, 32)}


@dataclass(frozen=True)
class Problem:
    """An operator at one shape, to measure a candidate on."""

    name: str  # of the shape
    call: Callable[[Tile], Tensor]  # runs the kernel with a tile
    part: Callable[[Tensor], Tensor]  # selects the checked part of its result
    expected: Tensor  # that part in float64
    alternative: Callable[[], object] | None = None  # another way, which runs if it is faster


def items() -> list[dict]:
    """List every candidate, the table's tile first; kernels alternate, so that a short run has some of each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lists = []
    for kernel, tiles in CANDIDATES.items():
        block_d = 64 if kernel.startswith(("attention", "whole_head")) else 0
        present = find(kernel, device, "half", block_d)
        if present is None and kernel.startswith("whole_head"):
            continue
        if REHEARSED:
            tiles = present, *tiles = [SMALL[next((start for start in SMALL if kernel.startswith(start)), "other")]]
        key = {"kernel": kernel, "architecture": architecture(device), "precision": "half", "block_d": block_d}
        lists.append(
            [
                {"name": f"{kernel} {_words(tile)}", "kind": "tile", **key}
                | {"tile": asdict(tile), "present": tile == present}
                for tile in dict.fromkeys([present, *tiles])
            ]
        )
    return [one[i] for i in range(max(map(len, lists))) for one in lists if i < len(one)]


def _words(tile: Tile) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(tile).items() if value != getattr(Tile, name, None))


# --- problems -----------------------------------------------------------------------------------------------------


@cache
def problems(kernel: str, timed: bool = True) -> tuple[Problem, ...]:
    """Make the kernel's problems on tensors like those of training, bf16 on a GPU; small ones unless `timed`."""
    sizes = TIMED if timed else WARMED
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        low = torch.bfloat16 if device.type == "cuda" else torch.float16
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype or low)

    if kernel.startswith("attention"):
        return tuple(_attention(kernel, (*sizes[name], 64), random) for name in ("long", "short"))
    if kernel.startswith("whole_head"):
        return tuple(_attention(kernel, (*sizes["short"], head_dim), random) for head_dim in (64, 48))
    if kernel == "weight_gradient":
        return (_weight_gradient(sizes["rows"], random),)
    return tuple(_product(kernel, sizes["rows"], stored, random) for stored in (torch.float32, None))


def _attention(kernel: str, shape: tuple[int, ...], random: Callable) -> Problem:
    from crate_fast.kernels import attention, whole_head

    batch, n_tokens, heads, head_dim = shape
    w, grad = random(*shape, std=token_scale(n_tokens, head_dim)), random(*shape)
    scale, ends, backward = head_dim**-0.5, sorted({0, batch - 1}), kernel.endswith("backward")
    truth = gradients(subspace_attention_reference, [w[ends].double()], grad[ends].double())[backward]
    rows = "attention_backward" if backward else "attention_forward"
    present = SMALL["attention"] if REHEARSED else lookup(rows, w.device, "half", 64)
    out, lse = attention.forward(w, scale, present) if backward else (None, None)

    def by_rows(tile: Tile) -> Tensor:
        return (
            attention.backward(grad, w, out, lse, scale, tile) if backward else attention.forward(w, scale, tile)[0]
        )

    def whole(tile: Tile) -> Tensor:
        output = torch.empty_like(w)
        if backward:
            whole_head.backward(grad, w, out, lse, output, scale, tile)
        else:
            whole_head.forward(w, output, w.new_empty(batch, heads, n_tokens, dtype=torch.float32), scale, tile)
        return output

    ways = (by_rows, None) if kernel == rows else (whole, partial(by_rows, present))
    return Problem("×".join(map(str, shape)), ways[0], lambda output: output[ends], truth, ways[1])


def _product(kernel: str, rows: int, stored: torch.dtype | None, random: Callable) -> Problem:
    """Make x + aWᵀ as under autocast (`stored` fp32, LayerNorm before ISTA), or all in half precision."""
    from crate_fast.kernels import product
    from crate_fast.kernels.layer_norm import Norm, normalize

    x, a = random(rows, WIDTH, dtype=stored), random(rows, WIDTH)
    if kernel == "ista_backward_input" and stored is None:
        x = a  # g' is both
    weight = random(WIDTH, WIDTH, std=0.1 / WIDTH**0.5)
    ends = sorted({row % rows for row in range(-CHECKED_ROWS, CHECKED_ROWS)})
    ones, options, added, alternative = torch.ones(WIDTH, device=x.device), {}, x[ends].double(), None
    if kernel == "ista_forward":
        nonzero = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        options = {"finish": "relu", "shift": 0.01, "nonzero": nonzero}
        if stored is not None:
            a, mean, rstd = normalize(x, 1e-5, a.dtype)
            options["norm"] = Norm(mean, rstd, ones, torch.zeros_like(ones))
            added = torch.nn.functional.layer_norm(added, (WIDTH,))
    if kernel == "ista_backward_input" and stored is not None:
        options["masked"] = True
    if kernel == "output_map":
        options, bias = {"bias": ones}, ones.to(a.dtype)
        added = added + 1
        alternative = lambda: x + torch.addmm(bias, a, weight.t())  # noqa: E731
    expected = added + a[ends].double() @ weight.double().t()
    if kernel == "ista_forward":
        expected = (expected - 0.01).relu()

    def call(tile: Tile) -> Tensor:
        return product.product(a, weight, x, product.fitted_product(tile, WIDTH), **options)

    name = "autocast" if stored is not None else "half precision"
    return Problem(f"{rows}×{WIDTH}, {name}", call, lambda output: output[ends], expected, alternative)


def _weight_gradient(n_rows: int, random: Callable) -> Problem:
    from crate_fast.kernels import product

    a, grad = random(n_rows, WIDTH), random(n_rows, WIDTH)
    expected = a.double().t() @ grad.double()
    call = partial(product.weight_gradient, a, grad)
    return Problem(f"{n_rows}×{WIDTH}", call, lambda output: output, expected)


# --- a candidate --------------------------------------------------------------------------------------------------


def warm(item: dict) -> dict:
    """Compile a candidate and check it on each problem; return registers, spills, shared memory and error."""
    compiled, errors, tile = [], [], Tile(**item["tile"])
    for problem in problems(item["kernel"], timed=False):
        errors.append(_check(problem, tile))
        with recorded() as launches:
            problem.call(tile)
        for launch in launches:
            compiled.append(launch.kernel[launch.grid](**launch.arguments, **launch.constants, **launch.options))
    compiled = [kernel for kernel in compiled if kernel is not None]  # None in the interpreter
    return {
        "error": max(errors),
        "registers": max((kernel.n_regs for kernel in compiled), default=0),
        "spills": max((kernel.n_spills for kernel in compiled), default=0),
        "shared_bytes": max((kernel.metadata.shared for kernel in compiled), default=0),
    }


def _check(problem: Problem, tile: Tile) -> float:
    """Return the relative error of a tile; raise ValueError if it is wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    try:
        found = problem.part(problem.call(tile)).double()
    finally:
        torch.use_deterministic_algorithms(False)
    error = ((found - problem.expected).norm() / problem.expected.norm()).item()
    if not error <= TOLERANCE:
        raise ValueError(f"wrong at {problem.name}: differs from float64 by {error:.1%} of the norm")
    return error


def time_tile(item: dict, run: Run) -> dict:
    """Time a candidate and its alternative on each problem; return the geometric means, and the candidate's times."""
    shapes, others, tile = {}, [], Tile(**item["tile"])
    for problem in problems(item["kernel"]):
        _check(problem, tile)
        shapes[problem.name] = statistics.median(run.sample_ms(partial(problem.call, tile), graphed=True))
        if problem.alternative is not None:
            others.append(statistics.median(run.sample_ms(problem.alternative, graphed=True)))
    alternative_ms = statistics.geometric_mean(others) if others else None
    mean_ms = statistics.geometric_mean(shapes.values())
    return {"latency_ms": mean_ms, "shapes": shapes, "alternative_ms": alternative_ms}
