"""Compile every row of the tile table without a GPU, and report registers, memory and instructions.

    python benchmarks/compile_report.py                   # all architectures, two to four minutes on two cores
    python benchmarks/compile_report.py --architectures sm_90 --kernels ista_forward

Triton compiles ahead of time; reported are registers, spilled bytes, shared memory, and the PTX's matrix instructions
and asynchronous copies. The exit status is 1 if a kernel does not compile, does not fit, or lacks its architecture's
instructions, or, with the Triton versions in `NO_SPILLS`, if it spills.
"""

import argparse
import contextlib
import io
import os
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context

import torch
from gpu_report import markdown_table

from crate_fast.kernels.launch import ARCHITECTURES, SHARED_MEMORY, TABLE, Tile, table_row

NO_SPILLS = ("3.6", "3.8", "3.9")  # Triton versions that the tiles were chosen for; others may spill
HEAD_DIMS = {32: (32,), 64: (48, 64), 128: (80, 128)}  # by head width to the next power of two
WHOLE_HEAD_TOKENS = {64: (197, 256), 48: (197, 240)}  # by head width
WIDTH, NARROW = 768, 384  # C; for 384 the tile 128×256 becomes 256×128
ROWWISE = ("normalize", "layer_norm_backward", "masked_gradient", "fold", "fold_backward", "scale", "unscale")
COLUMNS = [
    "kernel", "architecture", "precision", "size", "tile", "registers", "spilled_bytes", "shared_kib",
    "matrix_instructions", "async_copies",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel, an architecture, and a size (head width, C, or "N×D" of a whole head)."""

    kernel: str
    architecture: str
    precision: str
    size: str
    tile: Tile


def cases(architectures: tuple[str, ...] = ARCHITECTURES) -> list[Case]:
    """List every row of the table for each architecture and head width, and the kernels without a row."""
    found = []
    for architecture in architectures:
        for kernel, precision in dict.fromkeys(key[:2] for key in TABLE):
            for size, block_d in _sizes(kernel, precision, architecture):
                if tile := table_row(kernel, precision, architecture, block_d):
                    found.append(Case(kernel, architecture, precision, size, tile))
        found += [Case(kernel, architecture, "half", str(WIDTH), Tile(0, 0, 4, 1)) for kernel in ROWWISE]
    return found


def _sizes(kernel: str, precision: str, architecture: str) -> list[tuple[str, int]]:
    """List the sizes to compile a kernel for, with the table's head width; on Hopper also padded sizes."""
    padded = architecture == "sm_90" and precision == "half"
    if kernel.startswith("attention"):
        return [
            (str(width), block_d)
            for block_d, widths in HEAD_DIMS.items()
            for width in (widths if padded else widths[-1:])
        ]
    if kernel.startswith("whole_head"):
        widths = WHOLE_HEAD_TOKENS if padded else (64,)
        rows = [f"{n}×{width}" for width in widths for n in WHOLE_HEAD_TOKENS[width]]
        return [(row + part, 64) for row in rows for part in ("", " rest")]
    widths = (NARROW, WIDTH) if padded else (WIDTH,)
    variants = {"ista_forward": ("", " code", " masked", " norm"), "output_map": (" mixed norm",)}
    if precision == "half":  # under autocast the gradient is fp32
        variants["ista_backward_input"] = ("", " mixed")
    return [(f"{width}{variant}", 0) for width in widths for variant in variants.get(kernel, ("",))]


def plan(case: Case):
    """Record the launch of a case on meta tensors, made by the function that launches it."""
    from crate_fast.kernels import attention, folding, ista, layer_norm, product, whole_head
    from crate_fast.kernels.launch import recorded

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    size, *words = case.size.split()
    low, tile = torch.bfloat16 if case.precision == "half" else torch.float32, case.tile
    if case.kernel.startswith(("attention", "whole_head")):
        n_tokens, head_dim = map(int, size.split("×")) if "×" in size else (785, int(size))
        w, lse = meta(64, n_tokens, 12, head_dim, dtype=low), meta(64, 12, n_tokens)
    else:
        width, rows = int(size), 64 * 785
        tile = (product.fitted if case.kernel == "weight_gradient" else product.fitted_product)(tile, width)
        a, weight = meta(rows, width, dtype=low), meta(width, width, dtype=low)
        square, channel = meta(width, width), meta(width)
        x = meta(rows, width, dtype=torch.float32 if "mixed" in words else low)  # as under autocast
        number, codes, encode = meta(rows), meta(rows, 4 * width, dtype=low), meta(4 * width, width, dtype=low)
        norm = layer_norm.Norm(number, number, channel, channel) if "norm" in words else None
    calls = {
        "attention_forward": lambda: attention.forward(w, 0.125, tile),
        "attention_backward": lambda: attention.backward(w, w, w, lse, 0.125, tile),
        "whole_head_forward": lambda: whole_head.forward(w, w, lse, 0.125, tile),
        "whole_head_backward": lambda: whole_head.backward(w, w, w, lse, w, 0.125, tile),
        "ista_forward": lambda: ista.forward(x, a, weight, 0.01, False, norm, True, tile),
        "ista_forward code": lambda: product.product(a, encode, codes, tile, finish="relu", shift=0.01, alpha=0.1),
        "ista_forward masked": lambda: product.product(a, encode, codes, tile, alpha=-1.0, mask=codes),
        "ista_backward_input": lambda: ista.backward_input(x, a, weight, tile),
        "output_map": lambda: product.product(a, weight, x, tile, bias=channel, norm=norm),
        "weight_gradient": lambda: product.weight_gradient(a, a, tile),
        "normalize": lambda: layer_norm.normalize(a, 1e-5, low),
        "layer_norm_backward": lambda: layer_norm.backward(a, a, number, number, low, channel, a, low),
        "masked_gradient": lambda: ista.masked_gradient(a, meta(rows, width, dtype=torch.int8), low, True),
        "fold": lambda: folding.fold(square, 0.1, low),
        "fold_backward": lambda: folding.fold_backward(square, square, 0.1),
        "scale": lambda: folding.scale(weight.t(), channel, channel, low, channel),
        "unscale": lambda: folding.unscale(weight, channel, square, channel, channel),
    }
    with recorded() as launches:
        calls.get(f"{case.kernel} {' '.join(words)}", calls[case.kernel])()
    return launches[0 if case.kernel.startswith("whole_head") and "rest" not in words else -1]


_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_POINTERS |= {torch.int32: "*i32", torch.int8: "*i8"}


def _source(launch):
    """Return the kernel's source with the signature, constants and attributes of a real launch."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch, architecture: str) -> dict:
    """Compile one launch and return its figures; `matrix_instructions` counts by name."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    log, target = io.StringIO(), GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(_source(launch), target=target, options=launch.options)
    log, ptx = log.getvalue(), compiled.asm["ptx"]
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    stack = int(re.search(r"(\d+) bytes stack frame", log)[1])
    return {
        "shared_kib": round(compiled.metadata.shared / 1024, 1),
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled_bytes": max(spilled, stack),
        "serialized": "wgmma.mma_async instructions are serialized" in log,
        "matrix_instructions": dict(Counter(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx))),
        "async_copies": len(re.findall(r"\bcp\.async\.(ca|cg|bulk\.tensor)\b", ptx)),
    }


def compile_case(case: Case) -> dict:
    """Return a row of the report; "error" holds the message of a failure."""
    row = asdict(case) | {"error": None}
    try:
        launch = plan(case)
        return row | {"tile": asdict(launch.tile)} | compile_launch(launch, case.architecture)
    except Exception as error:  # any error of the compiler is reported
        return row | {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def compile_all(wanted: list[Case], processes: int = 2) -> list[dict]:
    """Compile in several processes; a process killed by a compiler assertion is a row's error."""

    def pool(size: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(size, mp_context=get_context("spawn"))

    rows: dict[Case, dict] = {}
    with pool(processes) as workers:
        futures = {case: workers.submit(compile_case, case) for case in wanted}
        for case, future in futures.items():
            with contextlib.suppress(BrokenProcessPool):
                rows[case] = future.result()
    for case in wanted:
        if case not in rows:
            with pool(1) as worker:  # alone, to find the case that kills the process
                try:
                    rows[case] = worker.submit(compile_case, case).result()
                except BrokenProcessPool:
                    rows[case] = asdict(case) | {"error": "the compiler killed its process"}
    return [rows[case] for case in wanted]


def problems(rows: list[dict], spills_count: bool) -> list[str]:
    """List errors, too much shared memory, missing instructions on Hopper, and spills."""
    found = []
    for row in rows:
        name = f"{row['kernel']} {row['architecture']} {row['precision']} {row['size']}"
        if row["error"]:
            found.append(f"{name}: {row['error']}")
            continue
        limit = SHARED_MEMORY[row["architecture"]] / 1024
        if row["shared_kib"] > limit:
            found.append(f"{name}: {row['shared_kib']} KiB of shared memory of {limit:.0f}")
        if row["spilled_bytes"] and spills_count:
            found.append(f"{name}: spills {row['spilled_bytes']} bytes a thread")
        if row["architecture"] == "sm_90" and row["precision"] == "half" and row["kernel"] not in ROWWISE:
            if "wgmma.mma_async" not in row["matrix_instructions"]:
                found.append(f"{name}: no wgmma, {row['matrix_instructions']}")
            if not row["async_copies"] and not row["kernel"].startswith("whole_head"):  # which loads once
                found.append(f"{name}: no asynchronous copies")
            if row["serialized"]:
                found.append(f"{name}: ptxas serialises the asynchronous matrix instructions")
    return found


def main(argv: list[str] | None = None) -> int:
    """Compile and print the table; return 1 if there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    kernels = list(dict.fromkeys([*(kernel for kernel, *_ in TABLE), *ROWWISE]))
    parser.add_argument("--kernels", nargs="+", choices=kernels, help="only these kernels")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Launch asks for; silences a warning of triton 3.9
    import triton

    wanted = [c for c in cases(tuple(args.architectures)) if not args.kernels or c.kernel in args.kernels]
    rows = compile_all(wanted, args.processes)
    for row in rows:
        row["tile"] = " ".join(f"{name}={value}" for name, value in row["tile"].items() if value)
    print(markdown_table([dict.fromkeys(COLUMNS) | row for row in rows], COLUMNS))
    found = problems(rows, triton.__version__.startswith(NO_SPILLS))
    spills = sum(bool(row.get("spilled_bytes")) for row in rows)
    print("\n".join(found) or f"triton {triton.__version__}: {len(rows)} kernels compile and fit; {spills} spill")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
