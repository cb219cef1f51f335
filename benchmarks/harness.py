"""What every benchmark shares: interleaved timing, peak memory of a fresh process, provenance, tables."""

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crate_fast.env import provenance
from crate_fast.eval.common import results

__all__ = ["Timing", "interleaved", "markdown_table", "number", "peak_mib", "publish", "write_results"]

RESULTS = Path(__file__).parent / "results"
MIN_SECONDS = 0.1  # of one measurement


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the 20 % and 80 % quantiles over rounds."""

    median: float
    low: float
    high: float


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time the candidates in turn, `rounds` times, so that a slow spell of the machine hits all of them.

    Each is called once before; a measurement lasts at least 0.1 s.
    """
    from torch.utils.benchmark import Timer  # here, since it logs a warning into every process that measures memory

    timers, repeats = {}, {}
    for name, call in candidates.items():
        call()
        timers[name] = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        repeats[name] = max(1, round(MIN_SECONDS / timers[name].timeit(1).median))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(repeats[name]).median)
    return {name: Timing(*np.quantile(values, (0.5, 0.2, 0.8)).tolist()) for name, values in samples.items()}


def _resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process; `getrusage` would report the parent's peak after a spawn."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _measure_peak(prepare: Callable[[], Callable[[], object]], pipe) -> None:
    call = prepare()
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    call()
    pipe.send(_resident_mib("VmHWM") - before)


def peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    """How far two calls raise a fresh process's peak resident memory above where it was, in MiB (Linux).

    Args:
        prepare: A picklable function that builds everything in the fresh process and returns the call to measure.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(prepare, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError("the process that measured memory died; its message is above") from error
    finally:
        process.join()


def number(value: float) -> str:
    """Three significant digits; from 100 on all before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def markdown_table(rows: list[dict], columns: list[str]) -> str:
    """Rows as a Markdown table; floats as `number`, None as –."""

    def cell(value) -> str | None:
        return number(value) if isinstance(value, float) else None if value is None else str(value)

    return results.markdown_table([{column: cell(row[column]) for column in columns} for row in rows])


def write_results(
    name: str, rows: list[dict], table: str, folder: Path = RESULTS, more: dict[str, object] | None = None
) -> list[Path]:
    """Write `name`.json (rows and provenance) and `name`.md (the table and how it was made); returns the paths.

    `more` is added to the provenance, and where both say something it is `more` that counts.
    """
    facts = provenance() | (more or {})
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    keys = dict.fromkeys(("commit", "torch", "python", "device", *(more or {}), "time"))
    made = ", ".join(f"{key} {facts[key]}" for key in keys)
    paths[1].write_text(f"{table}\nMade by `{facts['command']}`: {made}.\n")
    return paths


def publish(name: str, rows: list[dict]) -> None:
    """Print the rows as a table of all their columns, and write both to the results folder."""
    table = markdown_table(rows, list(rows[0]))
    print(table)
    for path in write_results(name, rows, table):
        print(f"written: {path}")
