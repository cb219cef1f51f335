"""Time and memory of a call on a GPU, and the two ceilings that a time is held against.

A call is timed on the device, with events around it and the L2 cache overwritten before it, as
`triton.testing.do_bench` does. Overwriting takes longer than the host takes to enqueue the call, so that a slow host
is not in the number; `Plan.host_us` says what the host took. On a CPU there is a wall clock, for smoke runs.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Ceilings", "Plan", "Step", "Timer", "measure_ceilings"]

CACHE_BYTES = 256 * 2**20  # overwritten before each call: more than any L2 cache
MEASUREMENT_MS = 100.0  # of one measurement, the overwriting counted, as do_bench counts
MAX_CALLS = 1000  # of one measurement


@dataclass(frozen=True)
class Step:
    """A timed call, and what makes its argument, untimed, before each."""

    call: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Plan:
    """How one measurement of a step goes."""

    calls: int
    flushes: int  # of the L2 cache before each call
    host_us: float  # of one call
    seconds: float  # of a whole measurement


class Timer:
    """Milliseconds per call on a GPU; on a CPU by the wall clock."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.cache = torch.empty(CACHE_BYTES // 4, dtype=torch.int32, device=device)
            flush = Step(lambda _: self.cache.zero_())
            self.flush_ms = statistics.median(self.sample(flush, 300, 1)[200:])  # clocks up

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def free_memory(self) -> None:
        """Hand back what nothing refers to any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def sample(self, step: Step, calls: int, flushes: int) -> list[float]:
        """Milliseconds of each call, the L2 cache overwritten `flushes` times before it."""
        if not self.on_gpu:
            return [self._wall_ms(step) for _ in range(calls)]
        starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2))
        for start, end in zip(starts, ends, strict=True):
            argument = step.prepare()
            for _ in range(flushes):
                self.cache.zero_()
            start.record()
            step.call(argument)
            end.record()
            del argument  # before the next is made
        self.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]

    def _wall_ms(self, step: Step) -> float:
        """Milliseconds that the host spends in one call; on a GPU without waiting for the device."""
        argument = step.prepare()
        self.synchronize()
        start = time.perf_counter()
        step.call(argument)
        return (time.perf_counter() - start) * 1e3

    def plan(self, step: Step, hides_host: bool = True) -> Plan:
        """How often to call a step, after calling it: five to eight times on a GPU, once on a CPU.

        Args:
            step: What to call.
            hides_host: Overwrite the cache for long enough that a slow host is not in the time of a call. Without it
                calls follow each other as in a program: what the host takes longer than the device is in their time.
        """
        if not self.on_gpu:
            host_ms = self._wall_ms(step)
            calls = min(MAX_CALLS, max(1, math.ceil(MEASUREMENT_MS / host_ms)))
            return Plan(calls, 0, host_ms * 1e3, calls * host_ms / 1e3)
        host_ms = statistics.median([self._wall_ms(step) for _ in range(5)][2:])
        flushes = max(1, math.ceil(1.5 * host_ms / self.flush_ms)) if hides_host else 0
        self.synchronize()
        start = time.perf_counter()
        call_ms = statistics.median(self.sample(step, 3, flushes))
        seconds = (time.perf_counter() - start) / 3
        calls = min(MAX_CALLS, max(3, math.ceil(MEASUREMENT_MS / (call_ms + flushes * self.flush_ms))))
        return Plan(calls, flushes, host_ms * 1e3, calls * seconds)

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """How far a call raises the allocated memory above where it was, its results included; None on a CPU."""
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


@dataclass(frozen=True)
class Ceilings:
    """What this GPU did in this run: matrix rate in TFLOP/s, copy bandwidth in GB/s (read + written)."""

    tflops_per_s: float
    gb_per_s: float

    def floor_ms(self, flops: float, moved_bytes: float) -> float:
        """The time below which no version goes far: arithmetic or bytes, whichever takes longer."""
        return 1e3 * max(flops / (self.tflops_per_s * 1e12), moved_bytes / (self.gb_per_s * 1e9))


def measure_ceilings(timer: Timer, device: torch.device, dtype: torch.dtype, smoke: bool) -> Ceilings:
    """A large product of random matrices in `dtype`, a large copy of random numbers: the best medians of three."""
    side = 256 if smoke else 2048 if not timer.on_gpu else 4096 if dtype == torch.float32 else 8192
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(2**20 if smoke else 2**28 if timer.on_gpu else 2**26, device=device)  # 4, 1024 or 256 MiB
    target = torch.empty_like(source)

    def best_ms(step: Step) -> float:
        calls = 30 if timer.on_gpu and not smoke else 3
        timer.sample(step, 3, 1)
        return min(statistics.median(timer.sample(step, calls, 1)) for _ in range(3))

    product_ms = best_ms(Step(lambda _: torch.matmul(left, right, out=product)))
    copy_ms = best_ms(Step(lambda _: target.copy_(source)))
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(2 * side**3 / product_ms / 1e9, moved / copy_ms / 1e6)
