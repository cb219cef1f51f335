"""Probes: each runs the kernels on a small realistic problem and checks the result.

    python -m crate_fast.probes --list
    python -m crate_fast.probes --probe attention-bfloat16-2x197x6x64 --json FILE
    TRITON_INTERPRET=1 python -m crate_fast.probes --probe … --device cpu --reruns 2  # in Triton's interpreter

The public operators compute the output and every gradient, with uninitialised memory filled with NaN. The results are
compared with float64 by the rule of `crate_fast.accuracy` and must be bit-equal on every rerun. A GPU fault can break
its process, so `crate-fast check` and `benchmarks/gpu_check.py` run each probe in its own process.
"""

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_fast import functional, odl
from crate_fast.accuracy import clear_of_threshold, gradients, judge, token_scale
from crate_fast.errors import CommandParser, UserError, run_command
from crate_fast.reference import (
    compress_reference,
    ista_reference,
    norm_ista_reference,
    odl_reference,
    subspace_attention_reference,
)
from crate_fast.settings import FUSED_PRODUCTS, SELF_CHECK

PRECISIONS = ("bfloat16", "float16", "tf32", "autocast")  # autocast: fp32 tokens, bf16 products
TINY_TOKENS = {197: 70, 196: 64, 256: 128, 785: 261}  # in the interpreter: the same kinds of blocks, less work

TIMED_IMAGES = 128  # of attention, enough to load a GPU


@dataclass(frozen=True)
class Problem:
    """One of our functions, its reference in PyTorch, and the inputs of both."""

    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: list[Tensor]
    grad: Tensor  # gradient of the output
    names: str  # names of the output and of the inputs' gradients
    autocast: torch.dtype | None = None

    def results(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """Return the output and the gradient of every input."""

        def forward(*inputs: Tensor) -> Tensor:
            with torch.autocast(self.grad.device.type, self.autocast, enabled=self.autocast is not None):
                return function(*inputs)

        return gradients(forward, self.inputs, self.grad)

    def truth(self) -> list[Tensor]:
        """Return the output and the gradients of the reference in float64."""
        return gradients(self.reference, [tensor.double() for tensor in self.inputs], self.grad.double())


@dataclass(frozen=True)
class Probe:
    """Named problem that is built when it runs."""

    name: str
    kernel: str  # kernel family
    precision: str  # one of PRECISIONS
    sizes: tuple[int, ...]  # [B, N, H, D] of attention, [B, N, C] of the others
    build: Callable[..., Problem]  # one of PROBLEMS
    environment: dict[str, str] = field(default_factory=dict)  # variables while it runs
    interpreted: str | None = None  # precision in the interpreter, if not the usual one


# --- problems -----------------------------------------------------------------------------------------------------


def _attention(
    sizes, dtype, autocast, device, generator, factor: float = 1.0, offset: float = 0.0, spread: float | None = None
) -> Problem:
    _, n_tokens, _, dim = sizes
    w = _normal(sizes, generator, device, torch.float32, factor * token_scale(n_tokens, dim), offset)
    if spread is not None:  # norms from 1/√spread to √spread times the usual
        order = torch.randperm(n_tokens, generator=generator, device=generator.device)
        lengths = token_scale(n_tokens, dim) * dim**0.5 * torch.logspace(-0.5, 0.5, n_tokens, base=spread)
        w = F.normalize(w, dim=-1) * lengths.to(device)[order.to(device), None, None]
    ours, grad = partial(functional.subspace_attention, backend="triton"), _normal(sizes, generator, device, dtype)
    return Problem(ours, subspace_attention_reference, [w.to(dtype)], grad, "O dW", autocast)


def _ista(sizes, dtype, autocast, device, generator, threshold: str = "relu") -> Problem:
    x = _normal(sizes, generator, device, dtype)
    dictionary = _normal((sizes[-1],) * 2, generator, device, dtype, sizes[-1] ** -0.5)
    grad = clear_of_threshold(_normal(sizes, generator, device, dtype), x, dictionary, autocast)
    ours = partial(functional.ista, threshold=threshold, backend="triton")
    return Problem(ours, partial(ista_reference, threshold=threshold), [x, dictionary], grad, "y dx dD", autocast)


def norm_ista(x: Tensor, weight: Tensor, bias: Tensor, dictionary: Tensor, **options) -> Tensor:
    """Return ISTA of LN(x), with the arguments of `norm_ista_reference`."""
    return functional.ista(x, dictionary, norm=(weight, bias, 1e-5), **options)


def _norm_ista(sizes, dtype, autocast, device, generator) -> Problem:
    width = sizes[-1]
    x = _normal(sizes, generator, device, dtype, 2.0, 1.0)
    gamma = _normal((width,), generator, device, dtype, 0.3, 1.0)
    beta = _normal((width,), generator, device, dtype, 0.3)
    dictionary = _normal((width, width), generator, device, dtype, width**-0.5)

    normed = F.layer_norm(x, (width,), gamma, beta)
    grad = clear_of_threshold(_normal(sizes, generator, device, dtype), normed, dictionary, autocast)
    ours = partial(norm_ista, backend="triton")
    return Problem(ours, norm_ista_reference, [x, gamma, beta, dictionary], grad, "y dx dγ dβ dD", autocast)


def _odl(sizes, dtype, autocast, device, generator) -> Problem:
    width, shape = sizes[-1], (sizes[-1], 4 * sizes[-1])
    inputs = [
        _normal(sizes, generator, device, dtype, 2.0, 1.0),
        _normal(shape, generator, device, dtype, (2 / shape[1]) ** 0.5),
        _normal(shape, generator, device, dtype, width**-0.5),
        _normal((width,), generator, device, dtype, 0.3, 1.0),
        _normal((width,), generator, device, dtype, 0.3),
    ]

    def ours(x, dictionary, decoder, gamma, beta):
        return odl.odl(x, dictionary, decoder, norm=(gamma, beta, 1e-6), backend="triton")

    def reference(x, dictionary, decoder, gamma, beta):
        return odl_reference(F.layer_norm(x, (width,), gamma, beta, 1e-6), dictionary, decoder)

    grad = _normal(sizes, generator, device, dtype)
    return Problem(ours, reference, inputs, grad, "y dx dD dD₁ dγ dβ", autocast)


def _compress(sizes, dtype, autocast, device, generator, residual: str = "released") -> Problem:
    width = sizes[-1]
    shapes = [sizes, (width,), (width,), (width, width), (width, width), (width,)]
    spreads = (2.0, 0.3, 0.3, 0.8 / width**0.5, width**-0.5, 0.3)
    means = (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    rows = zip(shapes, spreads, means, strict=True)
    inputs = [_normal(shape, generator, device, dtype, spread, mean) for shape, spread, mean in rows]
    options = {"heads": width // 64, "residual": residual}
    ours = partial(functional.compress, **options, backend="triton")
    grad = _normal(sizes, generator, device, dtype)
    return Problem(ours, partial(compress_reference, **options), inputs, grad, "h dx dγ dβ dU dV db", autocast)


def _normal(shape, generator, device, dtype, spread: float = 1.0, mean: float = 0.0) -> Tensor:
    values = torch.randn(shape, generator=generator, device=generator.device) * spread + mean
    return values.to(device).to(dtype)


PROBLEMS = {  # kernel family: (sizes, dtype, autocast, device, generator) → problem
    "attention": _attention,
    "ista": _ista,
    "norm_ista": _norm_ista,
    "odl": _odl,
    "compress": _compress,
}


def _probe(kernel: str, precision: str, sizes: tuple[int, ...], suffix: str = "", drawn=None, **options) -> Probe:
    name = "-".join([kernel, precision, "x".join(map(str, sizes))]) + suffix
    return Probe(name, kernel, precision, sizes, partial(PROBLEMS[kernel], **(drawn or {})), **options)


def _all_probes() -> Iterator[Probe]:
    for precision, sizes in (
        ("bfloat16", (2, 197, 12, 64)),
        ("bfloat16", (2, 197, 12, 48)),
        ("bfloat16", (2, 196, 6, 64)),
        ("bfloat16", (2, 256, 6, 64)),
        ("bfloat16", (2, 272, 6, 64)),
        ("bfloat16", (2, 785, 6, 64)),
        ("bfloat16", (2, 785, 6, 48)),
        ("bfloat16", (2, 197, 3, 80)),
        ("bfloat16", (2, 197, 2, 128)),
        ("bfloat16", (2, 785, 2, 128)),
        ("float16", (2, 197, 6, 64)),
        ("float16", (2, 785, 6, 64)),
        ("float16", (2, 197, 2, 128)),
        ("tf32", (2, 197, 6, 64)),
        ("tf32", (2, 785, 6, 64)),
        ("tf32", (2, 197, 2, 128)),
    ):
        yield _probe("attention", precision, sizes)
    for factor in (0.3, 1.5, 3.0):
        yield _probe("attention", "bfloat16", (2, 197, 6, 64), f"-factor{factor:g}", {"factor": factor})
    for n_tokens in (197, 785):
        for spread in (30.0, 1e4):
            wide = {"interpreted": "tf32"} if spread == 1e4 else {}  # exceeds float16's range
            sizes = (2, n_tokens, 3, 64)
            yield _probe("attention", "bfloat16", sizes, f"-spread{spread:g}", {"spread": spread}, **wide)
    for width, images in ((384, 64), (768, 32)):  # enough rows for a second tile per persistent program
        sizes = (images, 197, width)
        for precision in PRECISIONS:
            for kernel in ("ista", "norm_ista", "odl"):
                yield _probe(kernel, precision, sizes)
            for name, fused in (("torch", "0"), ("fused", "1")):
                yield _probe("compress", precision, sizes, f"-{name}-map", environment={FUSED_PRODUCTS: fused})
    yield _probe("ista", "bfloat16", (64, 197, 384), "-soft", {"threshold": "soft"})
    for precision in ("bfloat16", "autocast"):
        yield _probe("compress", precision, (64, 197, 384), "-paper", {"residual": "paper"})


PROBES = {probe.name: probe for probe in _all_probes()}
CHECKED = (  # by `crate-fast check`
    "attention-bfloat16-2x197x12x64",
    "attention-bfloat16-2x197x6x64-factor3",
    "attention-bfloat16-2x197x12x48",
    "attention-bfloat16-2x197x2x128",
    "attention-bfloat16-2x785x6x64",
    "attention-float16-2x197x6x64",
    "attention-tf32-2x197x6x64",
    "ista-bfloat16-64x197x384",
    "norm_ista-bfloat16-32x197x768",
    "norm_ista-float16-64x197x384",
    "norm_ista-autocast-64x197x384",
    "odl-bfloat16-32x197x768",
    "odl-autocast-64x197x384",
    "compress-bfloat16-64x197x384-fused-map",
    "compress-autocast-64x197x384-torch-map",
)


# --- faults, for tests of the programs that run probes ------------------------------------------------------------


def _crash(*_) -> Problem:
    os.abort()


def _hang(*_) -> Problem:
    while True:
        time.sleep(60)


def _wrong(sizes, dtype, autocast, device, generator) -> Problem:
    right = _attention(sizes, dtype, autocast, device, generator)
    return Problem(lambda w: 1.1 * right.reference(w), right.reference, right.inputs, right.grad, right.names)


FAULTS = {
    f"fault:{name}": Probe(f"fault:{name}", "fault", "float16", (1, 17, 1, 32), build)
    for name, build in (("crash", _crash), ("hang", _hang), ("wrong", _wrong))
}


def find_probe(name: str) -> Probe:
    """Return the probe of this name; "fault:crash", "fault:hang" and "fault:wrong" are not listed."""
    known = PROBES | FAULTS
    if name not in known:
        raise UserError(f"no probe {name!r}: choose one of {', '.join(PROBES)}")
    return known[name]


# --- running ------------------------------------------------------------------------------------------------------


def run_probe(probe: Probe, device: torch.device | str, reruns: int = 20) -> dict[str, object]:
    """Run a probe in this process, and rerun it; the reruns must be bit-equal.

    On the CPU it runs in Triton's interpreter. There the sizes are tiny, float16 (or fp32, if the range is too small)
    replaces bfloat16, and fp32 products are exact.

    Returns:
        name, kernel, launched (names of the kernels), dtype, shape; outputs (by name: rms, max, allowed_rms,
        allowed_max, share); share of the worst output; reruns and reruns_equal; seconds; status:
        "right", "wrong", or "failed: " and the error in one line.
    """
    device = torch.device(device)
    start = time.perf_counter()
    precision, sizes = (probe.precision, probe.sizes) if device.type == "cuda" else _tiny(probe)
    row = {"name": probe.name, "kernel": probe.kernel, "dtype": precision, "shape": list(sizes)}
    row |= {"reruns": reruns, "status": "right"}
    try:
        with _built(probe, precision, sizes, device) as problem, _poisoned(device):
            row |= _judged(problem, reruns)
        if row["share"] is None or row["share"] > 1.0 or not row["reruns_equal"]:
            row["status"] = "wrong"
    except Exception as error:  # recorded in the row, so that the next probe can run
        traceback.print_exc()
        row["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return row | {"seconds": round(time.perf_counter() - start, 3)}


@contextmanager
def _built(probe: Probe, precision: str, sizes: tuple[int, ...], device: torch.device) -> Iterator[Problem]:
    """Yield the problem, with its settings active."""
    environment = {SELF_CHECK: "0"} | probe.environment  # the self-check would stop a wrong kernel
    with mock.patch.dict(os.environ, environment), _precision(precision, device) as (dtype, autocast):
        yield probe.build(sizes, dtype, autocast, device, torch.Generator().manual_seed(0))


def _judged(problem: Problem, reruns: int) -> dict[str, object]:
    """Run the kernels and compare their results with float64 and with their reruns."""
    with _recorded_launches() as launched:
        actual = problem.results(problem.ours)
    same = torch.ones((), dtype=torch.bool, device=problem.grad.device)
    for _ in range(reruns):
        again = problem.results(problem.ours)
        for first, second in zip(actual, again, strict=True):
            same &= (_bits(first) == _bits(second)).all()
    eager, truth = problem.results(problem.reference), problem.truth()
    rows = zip(problem.names.split(), actual, eager, truth, strict=True)
    judged = {name: judge(*tensors) for name, *tensors in rows}
    worst = max(judged.values(), key=lambda judgement: judgement.share)
    return {
        "launched": sorted(launched),
        "outputs": {name: _numbers(judgement) for name, judgement in judged.items()},
        "share": _numbers(worst)["share"],
        "reruns_equal": bool(same),
    }


def _numbers(judgement) -> dict[str, float | None]:
    """Return the numbers for JSON; None if a number is not finite."""
    keys = ("rms", "max", "allowed_rms", "allowed_max", "share")
    return {key: value if math.isfinite(value := getattr(judgement, key)) else None for key in keys}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _tiny(probe: Probe) -> tuple[str, tuple[int, ...]]:
    """Return precision and sizes for the interpreter."""
    precision = probe.interpreted or {"bfloat16": "float16"}.get(probe.precision, probe.precision)
    if len(probe.sizes) == 4:
        _, n_tokens, heads, dim = probe.sizes
        return precision, (1, TINY_TOKENS.get(n_tokens, n_tokens), 2 if heads > 1 and n_tokens < 256 else 1, dim)
    return precision, (2, 70, probe.sizes[-1] // 6)


@contextmanager
def _precision(name: str, device: torch.device) -> Iterator[tuple[torch.dtype, torch.dtype | None]]:
    """Yield the dtypes of the tensors and of autocast, with the precision of fp32 products set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        if name == "autocast":
            yield torch.float32, torch.bfloat16 if device.type == "cuda" else torch.float16
        else:
            yield torch.float32 if name == "tf32" else getattr(torch, name), None
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _poisoned(device: torch.device) -> Iterator[None]:
    """Fill uninitialised memory with NaN, which shows elements that a kernel does not write."""
    if device.type == "cuda":  # without this PyTorch warns at every product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if not torch.empty(64, device=device).isnan().all():
            raise RuntimeError("PyTorch does not fill uninitialised memory: unwritten elements would go unnoticed")
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _recorded_launches() -> Iterator[set[str]]:
    """Yield the set of the names of kernels that are launched inside."""
    from crate_fast.kernels.launch import Launch

    names: set[str] = set()
    run = Launch.run

    def recorded(launch) -> None:
        names.add(launch.kernel.__name__)
        run(launch)

    with mock.patch.object(Launch, "run", recorded):
        yield names


def time_probe(probe: Probe, device: torch.device | str) -> dict[str, object]:
    """Time forward and backward in a CUDA graph on a GPU, with the kernels and with PyTorch.

    Returns:
        timed_shape (more images for attention), ours_ms, peer ("SDPA" or "eager"), peer_ms.
    """
    from triton.testing import do_bench_cudagraph

    device = torch.device(device)
    sizes = (TIMED_IMAGES, *probe.sizes[1:]) if len(probe.sizes) == 4 else probe.sizes
    with _built(probe, probe.precision, sizes, device) as problem:
        peer = _sdpa if probe.kernel == "attention" else problem.reference
        times = [
            do_bench_cudagraph(partial(problem.results, function), rep=50, return_mode="median")
            for function in (problem.ours, peer)
        ]
    name = "SDPA" if peer is _sdpa else "eager"
    return {"timed_shape": list(sizes), "ours_ms": times[0], "peer": name, "peer_ms": times[1]}


def _sdpa(w: Tensor) -> Tensor:
    tokens = w.transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2)


def _command(options: argparse.Namespace) -> None:
    if options.list:
        print("\n".join(PROBES))
        return
    probes = [find_probe(name) for name in options.time or [options.probe]]
    if options.probe:
        _write(run_probe(probes[0], options.device, options.reruns), options.json)
    times = {}
    for probe in probes if options.time else ():
        times[probe.name] = time_probe(probe, options.device)
        _write(times, options.json)  # after each, in case the next one hangs


def main(argv: list[str] | None = None) -> int:
    """Run a probe and write its row, or time probes; the exit status does not depend on the results."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the names")
    what.add_argument("--probe", metavar="NAME")
    what.add_argument("--time", nargs="+", metavar="NAME", help="time these probes, on a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the result, which is also printed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--reruns", type=int, default=20, help="reruns that must be bit-equal (default 20)")
    return run_command(lambda: _command(parser.parse_args(argv)))


def _write(result: dict, file: Path | None) -> None:
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    print(text, end="", flush=True)
    if file is not None:
        file.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
