"""A window of steps under PyTorch's profiler; each process writes a trace for chrome://tracing or Perfetto."""

import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from crate_fast.train.distributed import Processes

__all__ = ["profiler"]

_BEFORE = 10  # steps: compilation, caches and clocks settle


def profiler(folder: Path, steps: int, left: int, processes: Processes) -> profile:
    """Profile `steps` optimiser steps after the first ten; `step()` is to be called after each.

    Args:
        folder: Gets rank0.json, rank1.json, …
        steps: To record.
        left: Steps that the run still has; a warning if they are too few.
        processes: This process and its fellows.
    """

    if left < _BEFORE + steps:
        warnings.warn(
            f"profile={steps} records steps {_BEFORE + 1} to {_BEFORE + steps} of a session, and {left} are left to "
            f"run: the trace will be {'short' if left > _BEFORE else 'missing'}",
            stacklevel=2,
        )

    def write(finished: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / f"rank{processes.rank}.json"))

    activities = [ProfilerActivity.CPU]
    if processes.device.type == "cuda" and torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(
        activities=activities,
        schedule=schedule(wait=_BEFORE - 2, warmup=2, active=steps, repeat=1),
        on_trace_ready=write,
    )
