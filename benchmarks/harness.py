"""Time and memory of calls, options and facts of a run, and files of results.

This module imports crate_fast before PyTorch, so that OpenMP uses the package's GOMP_SPINCOUNT. Every benchmark must
import it first; the isort section "harness" in pyproject.toml keeps it first.

GPU times are those of `triton.testing.do_bench`: events, with the L2 cache overwritten before each call. Calls of an
operator are captured in a CUDA graph, so that a slow host does not count. CPU times are those of
`torch.utils.benchmark`.
"""

import crate_fast  # noqa: F401

# isort: split
import argparse
import gc
import json
import multiprocessing
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_report import times

from crate_fast.cpu_ops import onednn_product
from crate_fast.env import driver_version, provenance, ptxas_version, version_of
from crate_fast.kernels.launch import INTERPRETED

gc.freeze()  # so that `free_memory` skips imported objects, which would take a second

RESULTS = Path(__file__).parent / "results"
CARRIED_COMMIT = Path(__file__).parent.parent / ".gpu" / "commit"  # written by `gpu_check.py prepare`
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MEASUREMENT_MS = 100.0  # length of a measurement, without its first calls
SMOKE_MS = 2.0


# --- time and memory ----------------------------------------------------------------------------------------------


def _measure_peak(prepare: Callable[[], Callable[[], object]]) -> float:
    def mib(name: str) -> float:  # getrusage would report the parent's peak after a spawn
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    call = prepare()
    before = mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    call()
    return mib("VmHWM") - before


def peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    """Measure the peak extra resident memory of two calls in a fresh process, in MiB (Linux).

    `prepare` must be picklable; in the fresh process it builds everything and returns the call.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure_peak, prepare).result()


# --- a run --------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every benchmark of operators and models."""
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, also on a CPU; writes nothing")
    dtype = "of the tensors, or in whole models of autocast; bfloat16, on a CPU float32"
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each call (default 5)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")


@dataclass
class Run:
    """Device, options, facts and rows of one run."""

    device: torch.device
    dtype: torch.dtype
    smoke: bool
    rounds: int
    output: Path
    facts: dict[str, object]
    measurement_ms: float
    rows: list[dict] = field(default_factory=list)
    uncaptured: int = 0  # operators that could not be captured in a CUDA graph

    @property
    def on_gpu(self) -> bool:
        """The run is on a GPU."""
        return self.device.type == "cuda"

    @property
    def runs_kernels(self) -> bool:
        """Triton's kernels run, on a GPU or in its interpreter."""
        return self.on_gpu or INTERPRETED

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def free_memory(self) -> None:
        """Return unreferenced memory to the device."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def sample_ms(self, call: Callable[[], object], graphed: bool = False) -> list[float]:
        """Return the milliseconds of a call in a measurement; on a GPU, with `graphed`, of its CUDA graph."""
        if not self.on_gpu:
            from torch.utils.benchmark import Timer

            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            measured = timer.blocked_autorange(min_run_time=self.measurement_ms / 1e3)
            return [1e3 * seconds for seconds in measured.times]
        from triton.testing import do_bench

        if graphed:
            call()  # compiles and loads its kernels, which is not allowed during a capture
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    call()
                call = graph.replay
            except RuntimeError as error:  # such as a synchronisation inside
                print(
                    f"not captured in a CUDA graph, so the host's time counts: {error}", file=sys.stderr, flush=True
                )
                self.uncaptured += 1
        return do_bench(call, rep=self.measurement_ms, return_mode="all")

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """Measure the peak extra GPU memory of a call, with its results; None on a CPU."""
        if not self.on_gpu:
            return None
        self.free_memory()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak / 2**20

    def name(self, stem: str) -> str:
        """Return the name of the results, with _cpu without a GPU, and with a dtype that is not the default."""
        default = torch.bfloat16 if self.on_gpu else torch.float32
        dtype = "" if self.dtype == default else f"_{str(self.dtype).removeprefix('torch.')}"
        return stem + ("" if self.on_gpu else "_cpu") + dtype

    def floor_ms(self, flops: float, moved_bytes: float) -> float:
        """Return the longer of the minimal times for arithmetic and for memory traffic at the measured rates."""
        flops_per_ms, bytes_per_ms = 1e9 * self.facts["matrix_tflops_per_s"], 1e6 * self.facts["copy_gb_per_s"]
        return max(flops / flops_per_ms, moved_bytes / bytes_per_ms)

    def measure_ceilings(self) -> None:
        """Measure the rates of a large product (TFLOP/s) and of a large copy (GB/s, read + written) of this run.

        They are the best medians of three, and facts of the rows.
        """
        side = 256 if self.smoke else 2048 if not self.on_gpu else 4096 if self.dtype == torch.float32 else 8192
        left, right = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        product = torch.empty_like(left)
        numbers = 2**20 if self.smoke else 2**28 if self.on_gpu else 2**26  # 4, 1024 or 256 MiB
        source = torch.randn(numbers, device=self.device)
        target = torch.empty_like(source)

        def best_ms(call: Callable[[], object]) -> float:
            return min(statistics.median(self.sample_ms(call)) for _ in range(3))

        product_ms = best_ms(lambda: torch.matmul(left, right, out=product))
        if not self.on_gpu:  # the faster of PyTorch's two libraries
            product_ms = min(product_ms, best_ms(lambda: onednn_product(left, right)))
        copy_ms = best_ms(lambda: target.copy_(source))
        moved = 2 * source.numel() * source.element_size()
        rates = {"matrix_tflops_per_s": 2 * side**3 / product_ms / 1e9, "copy_gb_per_s": moved / copy_ms / 1e6}
        rates = {name: float(f"{rate:.4g}") for name, rate in rates.items()}
        self.facts |= rates
        print(f"measured ceilings: {rates}", flush=True)

    def report(self, name: str, quiet: bool = False) -> None:
        """Write the rows so far to `name`.{json,md}, except in a smoke run; print the table unless quiet."""
        text = times(self.rows)
        paths = [] if self.smoke else write_results(self.output, name, self.rows, text, self.facts)
        if not quiet:
            print("\n".join(["", text, *(f"written: {path}" for path in paths)]))


def open_run(options: argparse.Namespace, device: torch.device | None = None) -> Run:
    """Find the facts of a run on this device; the default is a GPU if there is one."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if INTERPRETED and (device.type == "cuda" or not options.smoke):
        raise SystemExit("TRITON_INTERPRET is set: unset it, the interpreter is only for smoke runs on a CPU")
    if options.smoke:
        print("smoke run: tiny shapes, as a test. The times below mean nothing.\n")
    return Run(
        device=device,
        dtype=DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")],
        smoke=options.smoke,
        rounds=1 if options.smoke else options.rounds,
        output=options.output,
        facts=_facts(device),
        measurement_ms=SMOKE_MS if options.smoke else MEASUREMENT_MS,
    )


def _facts(device: torch.device) -> dict[str, object]:
    found = provenance()
    if found["commit"].startswith(("installed", "unknown")):  # not a git checkout
        carried = CARRIED_COMMIT.read_text().strip() if CARRIED_COMMIT.exists() else found["commit"]
        found["commit"] = os.environ.get("COMMIT", carried)
    facts = {key: found[key] for key in ("commit", "torch", "timm", "python", "device")} | {"driver": "none"}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "driver": driver_version()}
    return facts | {"triton": version_of("triton"), "ptxas": ptxas_version(device)}


def run_benchmark(
    tables: Sequence[dict[str, dict]],
    measure: Callable[[str, str, object, Run], list[dict]],
    description: str,
    argv: list[str] | None,
) -> int:
    """Measure the sizes of --shapes and write the rows after each; return 1 if a row is red.

    Args:
        tables: For a GPU, a CPU and a smoke run: sizes by name, by name of the results.
        measure: Returns the rows of (name of the results, name of the size, size, run).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = ", ".join(name for sizes in tables[0].values() for name in sizes)
    parser.add_argument("--shapes", "--models", nargs="+", metavar="NAME", help=f"default: all; on a GPU {listed}")
    add_options(parser)
    options = parser.parse_args(argv)
    run = open_run(options)
    on_device = tables[2] if run.smoke else tables[0] if run.on_gpu else tables[1]
    names = [name for sizes in on_device.values() for name in sizes]
    if not names:
        raise SystemExit(
            "PyTorch finds no GPU: benchmarks/bench_cpu.py measures a CPU, --smoke tests with tiny models"
        )
    chosen = names if run.smoke else options.shapes or names
    for unknown in set(chosen) - set(names):
        parser.error(f"--shapes {unknown}: on this device there are {', '.join(names)}")
    run.measure_ceilings()
    red = False
    for table, sizes in on_device.items():
        run.rows = []
        for name in (name for name in sizes if name in chosen):
            run.rows += measure(table, name, sizes[name], run)
            run.free_memory()
            run.report(run.name(table), quiet=True)  # in case the run is interrupted
        if run.rows:
            run.report(run.name(table))
        red |= any(row.get("red") for row in run.rows)
    return int(red)


# --- results ------------------------------------------------------------------------------------------------------


def earlier_rows(path: Path, measured: Iterable[dict], keys: Sequence[str], facts: dict) -> list[dict]:
    """Read the rows of a file that are not in `measured` by their keys; drop those of other facts."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    new = {tuple(row[key] for key in keys) for row in measured}
    rows = [row for row in content["rows"] if tuple(row[key] for key in keys) not in new]
    same = [row for row in rows if facts.items() <= (content | row).items()]
    if len(same) < len(rows):
        print(f"{path}: {len(rows) - len(same)} rows of another {' or '.join(facts)} are dropped")
    return same


def write_results(folder: Path, name: str, rows: list[dict], table: str, more: dict[str, object]) -> list[Path]:
    """Write `name`.json (rows and provenance) and `name`.md (table and command); return the paths.

    `more` is added to the provenance and replaces facts of the same name.
    """
    facts = provenance() | more
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    keys = dict.fromkeys(("commit", "torch", "python", "device", *more, "time"))
    made = ", ".join(f"{key} {facts[key]}" for key in keys)
    paths[1].write_text(f"{table}\nMade by `{facts['command']}`: {made}.\n")
    return paths
