"""Time and memory of calls, options and facts of a run, and files of results.

This module imports crate_fast before PyTorch, so that OpenMP uses the package's GOMP_SPINCOUNT. Every benchmark must
import it first; the isort section "harness" in pyproject.toml keeps it first.

GPU times are measured with events, and the L2 cache is overwritten before each call (not of whole models), as
`triton.testing.do_bench` does. There are two differences. An untimed forward builds the graph of each timed backward,
because a compiled peer's graph runs only once. Overwriting takes longer than the host needs to enqueue the call, so a
slow host does not count. CPU times are wall-clock times.
"""

import crate_fast  # noqa: F401

# isort: split
import argparse
import gc
import json
import math
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gpu_report import times

from crate_fast.cpu_ops import onednn_product
from crate_fast.env import driver_version, provenance, ptxas_version, version_of
from crate_fast.kernels.launch import INTERPRETED

gc.freeze()  # so that `free_memory` skips imported objects, which would take a second

RESULTS = Path(__file__).parent / "results"
CARRIED_COMMIT = Path(__file__).parent.parent / ".gpu" / "commit"  # written by `gpu_check.py prepare`
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CACHE_BYTES = 256 * 2**20  # overwritten before each call; larger than any L2 cache
MEASUREMENT_MS = 100.0  # length of a measurement, with overwriting the cache
SMOKE_MS = 2.0
MAX_CALLS = 1000  # in one measurement
_LONG_MS = 1000.0


# --- time and memory ----------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Median, 20 % and 80 % quantiles of a call's time."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Return the quantiles of the samples."""
        return cls(*np.quantile(samples, (0.5, 0.2, 0.8)).tolist())


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


class Step(NamedTuple):
    """A timed call and the untimed function that makes its argument."""

    call: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None


class Timer:
    """Timer of calls in milliseconds: by events on a GPU, by the wall clock on a CPU."""

    def __init__(self, device: torch.device, measurement_ms: float = MEASUREMENT_MS):
        self.on_gpu, self.measurement_ms = device.type == "cuda", measurement_ms
        if self.on_gpu:
            self.cache = torch.empty(CACHE_BYTES // 4, dtype=torch.int32, device=device)
            flush = Step(lambda _: self.cache.zero_())
            self.flush_ms = statistics.median(self.sample(flush, 300, 1)[200:])  # when the clocks are up

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def free_memory(self) -> None:
        """Return unreferenced memory to the device."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def sample(self, step: Step, calls: int, flushes: int) -> list[float]:
        """Return the milliseconds of each call; the L2 cache is overwritten `flushes` times before each.

        On a CPU the first call is not counted, unless it is long: threads of the previous peer may still spin.
        """
        if not self.on_gpu:
            first = self._wall_ms(step)
            counted = [first] if first > _LONG_MS else []
            return counted + [self._wall_ms(step) for _ in range(calls - len(counted))]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            argument = step.prepare()
            for _ in range(flushes):
                self.cache.zero_()
            start.record()
            step.call(argument)
            end.record()
            del argument  # before the next is allocated
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _wall_ms(self, step: Step) -> float:
        """Time one call on the host, without waiting for a GPU."""
        argument = step.prepare()
        self.synchronize()
        start = time.perf_counter()
        step.call(argument)
        return (time.perf_counter() - start) * 1e3

    def plan(self, step: Step, hides_host: bool = True) -> tuple[int, int]:
        """Choose the calls of a measurement and the cache overwrites before each, from up to eight trial calls.

        With `hides_host`, the cache is overwritten long enough to hide a slow host. Otherwise calls follow each other
        as in a program, and the host's delay counts.
        """
        if not self.on_gpu:
            host_ms = self._wall_ms(step)
            return min(MAX_CALLS, math.ceil(self.measurement_ms / host_ms)), 0
        host_ms = statistics.median([self._wall_ms(step) for _ in range(5)][2:])
        flushes = max(1, math.ceil(1.5 * host_ms / self.flush_ms)) if hides_host else 0
        self.synchronize()
        call_ms = statistics.median(self.sample(step, 3, flushes))
        calls = math.ceil(self.measurement_ms / (call_ms + flushes * self.flush_ms))
        return min(MAX_CALLS, max(3, calls)), flushes

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


def in_turn(
    timer: Timer,
    steps: dict,
    rounds: int,
    hides_host: bool = True,
    attempt: Callable[[object, Callable], object] = lambda _, action: action(),
) -> dict[object, list[float]]:
    """Measure steps in turn, so that a slow phase of the machine affects all; return the milliseconds of their calls.

    `attempt` runs an action for a key and returns None if it fails or has failed.
    """
    plans = {key: attempt(key, partial(timer.plan, step, hides_host)) for key, step in steps.items()}
    samples: dict[object, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            if (plan := plans[key]) is not None:
                samples[key] += attempt(key, partial(timer.sample, step, *plan)) or []
    return samples


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time calls on the CPU in turn; return seconds per call."""
    for call in candidates.values():
        call()  # the first call may take longer
    steps = {name: Step(lambda _, call=call: call()) for name, call in candidates.items()}
    measured = in_turn(Timer(torch.device("cpu")), steps, rounds)
    return {name: Timing.of([ms / 1e3 for ms in samples]) for name, samples in measured.items()}


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
    timer: Timer = field(repr=False)
    rows: list[dict] = field(default_factory=list)

    @property
    def runs_kernels(self) -> bool:
        """Triton's kernels run, on a GPU or in its interpreter."""
        return self.timer.on_gpu or INTERPRETED

    def name(self, stem: str) -> str:
        """Return the name of the results, with _cpu without a GPU, and with a dtype that is not the default."""
        default = torch.bfloat16 if self.timer.on_gpu else torch.float32
        dtype = "" if self.dtype == default else f"_{str(self.dtype).removeprefix('torch.')}"
        return stem + ("" if self.timer.on_gpu else "_cpu") + dtype

    def floor_ms(self, flops: float, moved_bytes: float) -> float:
        """Return the longer of the minimal times for arithmetic and for memory traffic at the measured rates."""
        flops_per_ms, bytes_per_ms = 1e9 * self.facts["matrix_tflops_per_s"], 1e6 * self.facts["copy_gb_per_s"]
        return max(flops / flops_per_ms, moved_bytes / bytes_per_ms)

    def measure_ceilings(self) -> None:
        """Measure the rates of a large product (TFLOP/s) and of a large copy (GB/s, read + written) of this run.

        They are the best medians of three, and facts of the rows.
        """
        timer = self.timer
        side = 256 if self.smoke else 2048 if not timer.on_gpu else 4096 if self.dtype == torch.float32 else 8192
        left, right = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        product = torch.empty_like(left)
        numbers = 2**20 if self.smoke else 2**28 if timer.on_gpu else 2**26  # 4, 1024 or 256 MiB
        source = torch.randn(numbers, device=self.device)
        target = torch.empty_like(source)

        def best_ms(step: Step) -> float:
            calls = 30 if timer.on_gpu and not self.smoke else 3
            timer.sample(step, 3, 1)
            return min(statistics.median(timer.sample(step, calls, 1)) for _ in range(3))

        product_ms = best_ms(Step(lambda _: torch.matmul(left, right, out=product)))
        if not timer.on_gpu:  # the faster of PyTorch's two libraries
            product_ms = min(product_ms, best_ms(Step(lambda _: onednn_product(left, right))))
        copy_ms = best_ms(Step(lambda _: target.copy_(source)))
        moved = 2 * source.numel() * source.element_size()
        rates = {"matrix_tflops_per_s": 2 * side**3 / product_ms / 1e9, "copy_gb_per_s": moved / copy_ms / 1e6}
        rates = {name: float(f"{rate:.4g}") for name, rate in rates.items()}
        self.facts |= rates
        print(f"measured ceilings: {rates}", flush=True)

    def report(self, name: str, quiet: bool = False) -> None:
        """Write the rows so far to `name`.{json,md}, except in a smoke run; print the table unless quiet."""
        text = times(self.rows)
        paths = [] if self.smoke else write_results(name, self.rows, text, self.output, self.facts)
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
        timer=Timer(device, SMOKE_MS if options.smoke else MEASUREMENT_MS),
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


def run_shapes(
    stem: str,
    tables: Sequence[dict],
    measure: Callable[[str, object, Run], list[dict]],
    description: str,
    argv: list[str] | None,
) -> int:
    """Measure the shapes of --shapes and write the rows after each; return 1 if a row is red.

    `tables` are the shapes of a GPU, a CPU and a smoke run; the results are named `stem`.
    """
    on_gpu, on_cpu, smoke = tables
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"{', '.join(on_gpu)}; on a CPU {', '.join(on_cpu)}"
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"default: all of {names}")
    add_options(parser)
    options = parser.parse_args(argv)
    run = open_run(options)
    shapes = smoke if options.smoke else on_gpu if run.timer.on_gpu else on_cpu
    chosen = shapes if options.smoke else options.shapes or shapes
    for unknown in set(chosen) - set(shapes):
        parser.error(f"--shapes {unknown}: on this device there are {', '.join(shapes)}")
    run.measure_ceilings()
    for label in chosen:
        run.rows += measure(label, shapes[label], run)
        run.report(run.name(stem), quiet=True)  # in case the run is interrupted
    run.report(run.name(stem))
    return int(any(row.get("red") for row in run.rows))


# --- results ------------------------------------------------------------------------------------------------------


def earlier_rows(path: Path, measured: Iterable[dict], keys: Sequence[str], facts: dict | None = None) -> list[dict]:
    """Read the rows of a file that are not in `measured` by their keys.

    With `facts`, drop rows of other facts, such as another device.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    new = {tuple(row[key] for key in keys) for row in measured}
    rows = [row for row in content["rows"] if tuple(row[key] for key in keys) not in new]
    same = [row for row in rows if (facts or {}).items() <= (content | row).items()]
    if len(same) < len(rows):
        print(f"{path}: {len(rows) - len(same)} rows of another {' or '.join(facts)} are dropped")
    return same


def write_results(
    name: str, rows: list[dict], table: str, folder: Path = RESULTS, more: dict[str, object] | None = None
) -> list[Path]:
    """Write `name`.json (rows and provenance) and `name`.md (table and command); return the paths.

    `more` is added to the provenance and replaces facts of the same name.
    """
    facts = provenance() | (more or {})
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    keys = dict.fromkeys(("commit", "torch", "python", "device", *(more or {}), "time"))
    made = ", ".join(f"{key} {facts[key]}" for key in keys)
    paths[1].write_text(f"{table}\nMade by `{facts['command']}`: {made}.\n")
    return paths
