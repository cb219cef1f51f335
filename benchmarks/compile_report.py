"""What the compiler makes of every kernel and every row of the tile table, without a GPU.

    python benchmarks/compile_report.py            # all architectures, about twelve minutes on two cores
    python benchmarks/compile_report.py --architectures sm_90 --json out.json
    python benchmarks/compile_report.py --unless-reported       # only what has changed since

Ahead-of-time compilation through Triton's own wheel: registers, spilled bytes, shared memory, matrix and
asynchronous-copy instructions, exponentials, and whether ptxas serialised the asynchronous matrix instructions.
Writes `results/compile.{json,md}`; exits with 1 where a kernel does not compile, spills or does not fit.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context

import torch
from harness import RESULTS, markdown_table, write_results

from crate_fast.kernels.tiles import ARCHITECTURES, LONGEST, SHARED_MEMORY, TABLE, Tile

HEAD_DIMS = {32: (32,), 64: (48, 64), 128: (80, 128)}  # by head width to the next power of two
WHOLE_HEAD_TOKENS = (65, 180, 197, 226, 256)  # one to three blocks, each with a rest; then of more keys
WIDTH, NARROW = 768, 384  # C; at the second a product's tile of 256 columns is turned
ROWWISE = ("normalize", "layer_norm_backward", "normalized_backward", "masked_gradient")  # not in the table
COLUMNS = [
    "kernel", "architecture", "precision", "size", "tile", "registers", "spilled_bytes", "shared_kib",
    "matrix_instructions", "async_copies", "exp2", "serialized",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One compilation: a row of the tile table and a head width (or C, or the length of a sequence)."""

    kernel: str
    architecture: str
    precision: str
    size: int
    tile: Tile


def cases(architectures: tuple[str, ...] = ARCHITECTURES) -> list[Case]:
    """Every row of the table on these architectures; attention also at the head widths it pads."""
    found = []
    for (kernel, architecture, precision, block_d), tile in TABLE.items():
        if architecture not in architectures:
            continue
        if kernel.startswith("whole_head"):
            found += [
                Case(f"{kernel}{part}{width}", architecture, precision, n_tokens, tile)
                for n_tokens in WHOLE_HEAD_TOKENS
                for part in ("", "_rest")
                for width, head_dim in (("", 64), ("_48", 48))
                if kernel == "whole_head_forward" or n_tokens <= LONGEST[head_dim]
            ]
            continue
        sizes = HEAD_DIMS.get(block_d) or ((NARROW, WIDTH) if tile.block_n == 256 else (WIDTH,))
        sizes = sizes[-1:] if kernel.endswith("dropout") or "delta" in kernel else sizes
        found += [Case(kernel, architecture, precision, size, tile) for size in sizes]
        if kernel == "ista_forward":
            found += [Case(f"norm_{kernel}", architecture, precision, size, tile) for size in sizes]
    rows = Tile(0, 0, 4, 1)  # these kernels choose their own
    for architecture in architectures:
        found += [Case(kernel, architecture, "half", WIDTH, rows) for kernel in ROWWISE]
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def plan(case: Case):
    """The launch a case compiles, on meta tensors: the functions the launchers themselves run."""
    from crate_fast.kernels import row_blocks

    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    low = torch.bfloat16 if case.precision in ("half", "mixed") else torch.float32
    stored = torch.bfloat16 if case.precision == "half" else torch.float32
    if case.kernel.startswith("attention"):
        w = _meta(64, 785, 6, case.size, dtype=low)
        lse = _meta(64, 6, 785)
        dropout_p = 0.1 if case.kernel.endswith("dropout") else 0.0
        seed = _meta(dtype=torch.int64) if dropout_p else None
        if case.kernel.startswith("attention_forward"):
            return row_blocks.plan_forward(w, w, lse, 0.125, dropout_p, seed, case.tile)
        if case.kernel.startswith("attention_delta"):
            return row_blocks.plan_delta(w, w, lse, lse, lse, 0.125, dropout_p, seed, case.tile)
        delta = lse if row_blocks.needs_delta(low) else None
        return row_blocks.plan_backward(w, w, w, lse, w, delta, 0.125, dropout_p, seed, case.tile)
    if case.kernel.startswith("whole_head"):
        return _plan_whole_head(case, low)
    x = _meta(64 * 785, case.size, dtype=stored)
    return _plan_rowwise(case.kernel, x) if case.kernel in ROWWISE else _plan_product(case, x, low)


def _norm(x: torch.Tensor):
    from crate_fast.kernels.layer_norm import Norm

    row, channel = _meta(len(x)), _meta(x.shape[1])
    return Norm(row, row, channel, channel)


def _plan_rowwise(kernel: str, x: torch.Tensor):
    """What is made of rows, or of elements, on the way to a product."""
    from crate_fast.kernels import ista, layer_norm

    norm = _norm(x)
    if kernel == "normalize":
        return layer_norm.plan_normalize(x, x, norm.mean, norm.rstd, 1e-5)
    if kernel == "masked_gradient":
        return ista.plan_masked_gradient(x, _meta(*x.shape, dtype=torch.int8), x, _meta(1, 1024, x.shape[1]))
    if kernel == "layer_norm_backward":  # behind ISTA under autocast
        shares = _meta(2, 1024, x.shape[1])
        return layer_norm.plan_backward(x, x, norm.mean, norm.rstd, norm.gamma, None, x, x, shares)
    return layer_norm.plan_backward(x, x, None, norm.rstd, None, x, x, None, None)


def _plan_product(case: Case, x: torch.Tensor, low: torch.dtype):
    """A product as its users launch it; what is multiplied is in `low`."""
    from crate_fast.kernels import product, weight_gradient

    width = case.size
    operand, weight = _meta(*x.shape, dtype=low), _meta(width, width, dtype=low)
    if case.kernel == "weight_gradient":
        return weight_gradient.plan(operand, operand, _meta(4, width, width), 12608, product.fitted(case.tile, width))
    step = {"finish": "relu", "shift": 0.01, "nonzero": _meta(*x.shape, dtype=torch.int8)}
    options = {
        "ista_forward": step,
        "norm_ista_forward": step | {"norm": _norm(x)},
        "ista_backward_input": {"masked": low != x.dtype},
        "output_map": {"bias": _meta(width)},
    }[case.kernel]
    return product.plan(operand, weight, x, x, product.fitted_product(case.tile, width), **options)


def _plan_whole_head(case: Case, dtype: torch.dtype):
    """Whole-head kernels at the case's length of a sequence, `case.size` tokens."""
    from crate_fast.kernels import whole_head

    batch, n_tokens, n_heads, kernel = 64, case.size, 12, case.kernel.removesuffix("_48")
    w = _meta(batch, n_tokens, n_heads, 48 if case.kernel.endswith("_48") else 64, dtype=dtype)
    lse, refused = _meta(batch, n_heads, n_tokens), _meta(batch * n_heads, dtype=torch.int32)
    if kernel == "whole_head_forward":
        return whole_head.plan_forward(w, w, lse, refused, 0.125, case.tile)
    if kernel == "whole_head_backward":
        return whole_head.plan_backward(w, w, w, lse, w, _meta(2, *lse.shape), refused, 0.125, case.tile)
    grad = w if kernel == "whole_head_backward_rest" else None
    return whole_head.plan_remainder(grad, w, w, lse, grad, refused, 0.125, case.tile)


_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}


def _signature(launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes as a real launch would specialise them."""
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
    return signature, constants, attributes


def _target(architecture: str):
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def _source(launch):
    from triton.compiler import ASTSource

    return ASTSource(launch.kernel, *_signature(launch))


def fingerprint(case: Case) -> str:
    """What decides the compiler's output: a kernel's source and all it calls, constants, options, target, version."""
    import triton

    launch = plan(case)
    parts = (_source(launch).hash(), sorted(launch.options.items()), case.architecture, triton.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_launch(launch, architecture: str) -> dict:
    """Compile one launch and read what came out.

    Returns:
        registers, spilled_bytes, shared_kib, matrix_instructions (a count by name), async_copies, exp2, serialized.
    """
    import triton
    from triton import knobs

    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(_source(launch), target=_target(architecture), options=launch.options)
    shared = {"shared_kib": round(compiled.metadata.shared / 1024, 1)}
    if architecture.startswith("gfx"):
        return shared | _read_amdgcn(compiled.asm["amdgcn"])
    return shared | _read_ptxas(log.getvalue()) | _read_sass(compiled.asm["cubin"])


def _read_ptxas(log: str) -> dict:
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    stack = int(re.search(r"(\d+) bytes stack frame", log)[1])
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled_bytes": max(spilled, stack),
        "serialized": "wgmma.mma_async instructions are serialized" in log,
    }


def _read_sass(cubin: bytes) -> dict:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file.name], check=True, capture_output=True, text=True
        ).stdout
    names = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")
    matrix = {name: len(re.findall(rf"\b{name}\b", sass)) for name in names}
    return {
        "matrix_instructions": {name: count for name, count in matrix.items() if count},
        "async_copies": len(re.findall(r"\b(LDGSTS|UTMALDG)\b", sass)),
        "exp2": len(re.findall(r"\bMUFU\.EX2\b", sass)),
    }


def _read_amdgcn(assembly: str) -> dict:
    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1])

    matrix = len(re.findall(r"\bv_mfma_", assembly))
    return {
        "registers": number("vgpr_count"),
        "spilled_bytes": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        "matrix_instructions": {"MFMA": matrix} if matrix else {},
        "async_copies": len(re.findall(r"\b(buffer|global)_load_\w*lds\w*", assembly)),
        "exp2": len(re.findall(r"\bv_exp_f32", assembly)),
        "serialized": False,
    }


def compile_case(case: Case) -> dict:
    """A row of the report; "error" holds the compiler's message where it failed."""
    row = asdict(case) | {"error": None}
    try:
        launch = plan(case)
        row |= {"tile": asdict(launch.tile), "fingerprint": fingerprint(case)}
        return row | compile_launch(launch, case.architecture)
    except Exception as error:  # a compiler raises what it likes; the report shows it and exits with 1
        return row | {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def compile_all(wanted: list[Case], processes: int = 2) -> list[dict]:
    """Compile in several processes; one that a compiler assertion kills becomes a row's error."""
    rows: dict[Case, dict] = {}
    with _pool(processes) as pool:
        futures = {case: pool.submit(compile_case, case) for case in wanted}
        for case, future in futures.items():
            with contextlib.suppress(BrokenProcessPool):
                rows[case] = future.result()
    for case in wanted:
        if case in rows:
            continue
        with _pool(1) as pool:  # alone, to find who kills the process
            try:
                rows[case] = pool.submit(compile_case, case).result()
            except BrokenProcessPool:
                rows[case] = asdict(case) | {"error": "the compiler killed its process"}
    return [rows[case] for case in wanted]


def reported(wanted: list[Case]) -> dict[Case, dict]:
    """The committed report's rows of what the compiler would be given again, but for `samples`."""
    report = {row["fingerprint"]: row for row in json.loads((RESULTS / "compile.json").read_text())["rows"]}
    prints = {case: fingerprint(case) for case in set(wanted) - samples()}
    return {case: report[value] for case, value in prints.items() if value in report}


def samples() -> set[Case]:
    """One case a kernel, the kernels spread over the architectures that have them."""
    by_kernel: dict[str, dict[str, Case]] = {}
    for case in cases():
        by_kernel.setdefault(case.kernel, {}).setdefault(case.architecture, case)
    return {list(found.values())[index % len(found)] for index, found in enumerate(by_kernel.values())}


def _known(row: dict) -> bool:
    """Triton 3.6's compiler spills 40 bytes a thread in this row; 3.9's does not, and no tile tried suits both."""
    import triton

    corner = ("attention_backward_dropout", "sm_100", "ieee", 128)
    before = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    return before and corner == (row["kernel"], row["architecture"], row["precision"], row["size"])


def problems(rows: list[dict]) -> list[str]:
    """What is wrong: errors, spills, shared memory that does not fit, Hopper without its own instructions."""
    found = []
    for row in rows:
        name = f"{row['kernel']} {row['architecture']} {row['precision']} {row['size']}"
        if row["error"]:
            found.append(f"{name}: {row['error']}")
            continue
        limit = SHARED_MEMORY[row["architecture"]] / 1024
        if row["spilled_bytes"] and not _known(row):
            found.append(f"{name}: spills {row['spilled_bytes']} bytes a thread")
        if row["shared_kib"] > limit:
            found.append(f"{name}: {row['shared_kib']} KiB of shared memory of {limit:.0f}")
        if row["architecture"] == "sm_90" and row["precision"] in ("half", "mixed") and row["kernel"] not in ROWWISE:
            if "HGMMA" not in row["matrix_instructions"]:
                found.append(f"{name}: no HGMMA, {row['matrix_instructions']}")
            whole_head = row["kernel"].startswith("whole_head")  # loads once, in no loop to overlap them with
            if not row["async_copies"] and not whole_head:
                found.append(f"{name}: no asynchronous copies")
            if row["serialized"]:
                found.append(f"{name}: ptxas serialises the asynchronous matrix instructions")
    return found


def _display(row: dict) -> dict:
    tile = row["tile"]
    blocks = "×".join(str(tile[key]) for key in ("block_m", "block_n", "block_k") if tile[key])
    shown = row | {
        "tile": f"{blocks}, {tile['num_warps']} warps, {tile['num_stages']} stages",
        "matrix_instructions": " ".join(f"{n} {c}" for n, c in row.get("matrix_instructions", {}).items()) or "none",
        "serialized": "yes" if row.get("serialized") else "",
    }
    return {column: shown.get(column, row["error"]) for column in COLUMNS}


def main(argv: list[str] | None = None) -> int:
    """Compile, print the table, write it; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernels", nargs="+", help="only kernels with these names")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", help="write the rows here and leave benchmarks/results/ alone")
    parser.add_argument(
        "--unless-reported",
        action="store_true",
        help="take what results/compile.json has with the same fingerprint from there, but for one row a kernel",
    )
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Launch asks for; silences a warning of triton 3.9

    wanted = [c for c in cases(tuple(args.architectures)) if not args.kernels or c.kernel in args.kernels]
    known = reported(wanted) if args.unless_reported else {}
    unknown = [case for case in wanted if case not in known]
    compiled = known | dict(zip(unknown, compile_all(unknown, args.processes), strict=True))
    rows = [compiled[case] for case in wanted]
    table = markdown_table([_display(row) for row in rows], COLUMNS)
    print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    elif set(args.architectures) == set(ARCHITECTURES) and not args.kernels:
        write_results("compile", rows, table, RESULTS, {"triton": importlib.metadata.version("triton")})
    found = problems(rows)
    known = "" if not any(map(_known, rows)) else " but the one known corner"
    print("\n".join(found) or f"{len(rows)} kernels compiled; none spills{known}, all fit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
