"""Times and memory of calls, facts and options of a run, files of results.

This module imports crate_fast before PyTorch, so that OpenMP takes the package's GOMP_SPINCOUNT; therefore each
benchmark imports it first (the isort section "harness" in pyproject.toml keeps it there).

A GPU is timed by events, the L2 cache overwritten before each call, as `triton.testing.do_bench` does. Two things are
added. Backward gets a graph that an untimed forward has just built: a compiled peer's graph runs only once. And the
overwriting takes longer than the host takes to enqueue the call, so that a slow host is not in the time. On a CPU
a wall clock measures.
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
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gpu_report import times

from crate_fast.env import driver_version, provenance, ptxas_version
from crate_fast.kernels.launch import INTERPRETED

gc.freeze()  # `free_memory` need not look through what is imported, which takes a second

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CACHE_BYTES = 256 * 2**20  # overwritten before each call: more than any L2 cache
MEASUREMENT_MS = 100.0  # of one measurement, with the overwriting of the cache
SMOKE_MS = 2.0
MAX_CALLS = 1000  # in one measurement
_LONG_MS = 1000.0


# --- time and memory ----------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Median, 20 % and 80 % quantile of a call's time."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Return the quantiles of the samples."""
        return cls(*np.quantile(samples, (0.5, 0.2, 0.8)).tolist())


def _measure_peak(prepare: Callable[[], Callable[[], object]]) -> float:
    def mib(name: str) -> float:  # not getrusage, which reports the parent's peak after a spawn
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    call = prepare()
    before = mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    call()
    return mib("VmHWM") - before


def peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    """Measure how far two calls raise a fresh process's peak resident memory, in MiB (Linux).

    `prepare` is picklable, builds everything in the fresh process and returns the call.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure_peak, prepare).result()


class Step(NamedTuple):
    """A timed call, and the untimed function that makes its argument before each call."""

    call: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None


class Plan(NamedTuple):
    """Calls in one measurement, overwritings of the L2 cache before each, host time of a call."""

    calls: int
    flushes: int
    host_us: float


class Timer:
    """Milliseconds per call on a GPU; on a CPU by the wall clock."""

    def __init__(self, device: torch.device, measurement_ms: float = MEASUREMENT_MS):
        self.on_gpu, self.measurement_ms = device.type == "cuda", measurement_ms
        if self.on_gpu:
            self.cache = torch.empty(CACHE_BYTES // 4, dtype=torch.int32, device=device)
            flush = Step(lambda _: self.cache.zero_())
            self.flush_ms = statistics.median(self.sample(flush, 300, 1)[200:])  # once the clocks are up

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
        """Return the milliseconds of each call, the L2 cache overwritten `flushes` times before it.

        On a CPU a call that is not counted comes first, unless it is long: threads of the peer before may still spin.
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
            del argument  # before the next is made
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _wall_ms(self, step: Step) -> float:
        """Time one call on the host, without waiting for a GPU."""
        argument = step.prepare()
        self.synchronize()
        start = time.perf_counter()
        step.call(argument)
        return (time.perf_counter() - start) * 1e3

    def plan(self, step: Step, hides_host: bool = True) -> Plan:
        """Choose how often to call a step, after up to eight calls.

        Either the cache is overwritten long enough to hide a slow host, or calls follow each other as in a program,
        and the host's delay counts.
        """
        if not self.on_gpu:
            host_ms = self._wall_ms(step)
            return Plan(min(MAX_CALLS, math.ceil(self.measurement_ms / host_ms)), 0, host_ms * 1e3)
        host_ms = statistics.median([self._wall_ms(step) for _ in range(5)][2:])
        flushes = max(1, math.ceil(1.5 * host_ms / self.flush_ms)) if hides_host else 0
        self.synchronize()
        call_ms = statistics.median(self.sample(step, 3, flushes))
        calls = math.ceil(self.measurement_ms / (call_ms + flushes * self.flush_ms))
        return Plan(min(MAX_CALLS, max(3, calls)), flushes, host_ms * 1e3)

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """Measure how far a call raises the allocated GPU memory, its results included; None on a CPU."""
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
) -> dict[object, tuple[Plan, list[float]]]:
    """Measure steps in turn, so that a slow spell of the machine hits all: plans, and every call's milliseconds.

    `attempt` runs an action for a key, and returns None where it fails or has failed.
    """
    plans = {key: attempt(key, partial(timer.plan, step, hides_host)) for key, step in steps.items()}
    samples: dict[object, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            if (plan := plans[key]) is not None:
                samples[key] += attempt(key, partial(timer.sample, step, plan.calls, plan.flushes)) or []
    return {key: (plans[key], samples[key]) for key in steps}


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time calls on the CPU in turn; seconds a call."""
    for call in candidates.values():
        call()  # the first call may take longer
    steps = {name: Step(lambda _, call=call: call()) for name, call in candidates.items()}
    measured = in_turn(Timer(torch.device("cpu")), steps, rounds)
    return {name: Timing.of([ms / 1e3 for ms in samples]) for name, (_, samples) in measured.items()}


class Ceilings(NamedTuple):
    """Matrix rate in TFLOP/s and copy bandwidth in GB/s (read + written), measured in this run."""

    tflops_per_s: float
    gb_per_s: float

    def floor_ms(self, flops: float, moved_bytes: float) -> float:
        """Return the least time for arithmetic or bytes, whichever is longer."""
        return 1e3 * max(flops / (self.tflops_per_s * 1e12), moved_bytes / (self.gb_per_s * 1e9))


# --- a run --------------------------------------------------------------------------------------------------------


def add_options(
    parser: argparse.ArgumentParser, dtype: str = "of the tensors; bfloat16, or float16 in a smoke run"
) -> None:
    """Add the options that every GPU benchmark has; `dtype` is the help of the option of that name."""
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too; writes nothing")
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
    ceilings: Ceilings | None = None
    rows: list[dict] = field(default_factory=list)

    def name(self, stem: str) -> str:
        """Return the name of the results: with _cpu where there is no GPU, and with an unusual dtype."""
        default = torch.bfloat16 if self.timer.on_gpu else torch.float32
        dtype = "" if self.dtype == default else f"_{str(self.dtype).removeprefix('torch.')}"
        return stem + ("" if self.timer.on_gpu else "_cpu") + dtype

    def measure_ceilings(self) -> None:
        """Time a large product and a large copy, which every row's floor comes from: the best medians of three."""
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
        copy_ms = best_ms(Step(lambda _: target.copy_(source)))
        moved = 2 * source.numel() * source.element_size()
        self.ceilings = Ceilings(2 * side**3 / product_ms / 1e9, moved / copy_ms / 1e6)
        self.facts |= {
            "matrix_tflops_per_s": float(f"{self.ceilings.tflops_per_s:.4g}"),
            "copy_gb_per_s": float(f"{self.ceilings.gb_per_s:.4g}"),
        }
        print(f"measured ceilings: {self.ceilings}", flush=True)

    def report(self, name: str, quiet: bool = False) -> None:
        """Write the rows so far to `name`.{json,md}, except in a smoke run; print the table unless quiet."""
        text = times(self.rows)
        paths = [] if self.smoke else write_results(name, self.rows, text, self.output, self.facts)
        if not quiet:
            print("\n".join(["", text, *(f"written: {path}" for path in paths)]))


def open_run(options: argparse.Namespace, on_cpu: bool = False) -> Run:
    """Find the device and the facts of a run.

    Without a GPU there must be a smoke run or, in fp32 and PyTorch alone, `on_cpu`.
    """
    if not (torch.cuda.is_available() or options.smoke or on_cpu):
        raise SystemExit("a CUDA GPU is needed and PyTorch finds none; --smoke runs tiny shapes on a CPU instead")
    if torch.cuda.is_available() and INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set: unset it to measure the kernels on this GPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.smoke:
        print("smoke run: tiny shapes, to see that everything runs. The times below mean nothing.\n")
    dtype = options.dtype or (
        "float32" if on_cpu and device.type == "cpu" else "float16" if options.smoke and not on_cpu else "bfloat16"
    )
    return Run(
        device=device,
        dtype=DTYPES[dtype],
        smoke=options.smoke,
        rounds=1 if options.smoke else options.rounds,
        output=options.output,
        facts=_facts(device),
        timer=Timer(device, SMOKE_MS if options.smoke else MEASUREMENT_MS),
    )


def _facts(device: torch.device) -> dict[str, object]:
    found = provenance()
    if found["commit"].startswith(("installed", "unknown")):  # a copy of the tree that is not a git checkout
        found["commit"] = os.environ.get("COMMIT", found["commit"])
    facts = {key: found[key] for key in ("commit", "torch", "device")} | {"driver": "none"}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "driver": driver_version()}
    return facts | {"triton": metadata.version("triton"), "ptxas": ptxas_version(device)}


def run_shapes(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    script: str,
    tables: Sequence[dict],
    measure: Callable[[str, object, Run, argparse.Namespace], list[dict]],
    stem: Callable[[argparse.Namespace], str],
) -> int:
    """Measure the shapes that --shapes names, writing the rows after each; 1 where something is red.

    The parser has the benchmark's own options; tables are of a GPU, a CPU and a smoke run; `stem` names the results.
    """
    on_gpu, on_cpu, smoke = tables
    names = f"{', '.join(on_gpu)}; on a CPU {', '.join(on_cpu)}"
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"default: all of {names}")
    add_options(parser)
    options = parser.parse_args(argv)
    if options.smoke and not (torch.cuda.is_available() or INTERPRETED):
        # the flag is read when Triton is imported, which timm does: too late for this process
        command = [sys.executable, script, *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    run = open_run(options, on_cpu=not options.smoke)
    shapes = smoke if options.smoke else on_gpu if run.timer.on_gpu else on_cpu
    chosen = shapes if options.smoke else options.shapes or shapes
    for unknown in set(chosen) - set(shapes):
        parser.error(f"--shapes {unknown}: on this device there are {', '.join(shapes)}")
    run.measure_ceilings()
    name = run.name(stem(options))
    for label in chosen:
        run.rows += measure(label, shapes[label], run, options)
        run.report(name, quiet=True)  # keeps what is measured if the rest is cut short
    run.report(name)
    return int(any(row.get("red") for row in run.rows))


# --- results ------------------------------------------------------------------------------------------------------


def earlier_rows(path: Path, measured: Iterable[dict], keys: Sequence[str], facts: dict | None = None) -> list[dict]:
    """Read a file's rows that are not measured again, which differ from all of `measured` in one of the keys.

    Rows that other facts were true of, where some are given, are dropped.
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
    """Write `name`.json (rows and provenance) and `name`.md (the table and how it was made); return the paths.

    `more` is added to the provenance, and replaces facts of the same name.
    """
    facts = provenance() | (more or {})
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    keys = dict.fromkeys(("commit", "torch", "python", "device", *(more or {}), "time"))
    made = ", ".join(f"{key} {facts[key]}" for key in keys)
    paths[1].write_text(f"{table}\nMade by `{facts['command']}`: {made}.\n")
    return paths
