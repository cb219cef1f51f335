"""Verify the kernels on this machine's GPU in about a minute: `crate-fast check`.

Each probe of `crate_fast.probes` runs in its own process with a time limit. Probes with right results are then timed
against PyTorch, one after the other. The table is printed and written as JSON with all versions, to be attached to a
report. The exit status is 1 if anything is wrong, 2 if there is nothing to check.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from crate_fast import env
from crate_fast.backends import explain_backend
from crate_fast.errors import UserError
from crate_fast.isolation import Job, Process, run_jobs, tail
from crate_fast.options import main_of
from crate_fast.probes import CHECKED, PROBES, find_probe
from crate_fast.settings import usable_cores

JOBS = 4  # maximum number of parallel probes
PROBE_BYTES = 3 * 2**30  # GPU memory for each of them
LIMIT_SECONDS = 120.0  # limit of a probe, and of all timings
LOG_LINES = 60  # lines of a process's output in a report


def _job(name: str, words: Sequence[str], interpreter: bool, limit_s: float) -> Job:
    command = [sys.executable, "-X", "faulthandler", "-m", "crate_fast.probes", *words]
    return Job(name, command, limit_s, {"TRITON_INTERPRET": str(int(interpreter))})


def _run_jobs(jobs: Sequence[Job], folder: Path, done, parallel: int = 1) -> None:
    def start(job: Job) -> Process:
        return Process(job, Path.cwd(), folder, dict(os.environ), hard=float("inf"))

    run_jobs(jobs, start, done, parallel, soft=float("inf"))


def run_probes(names: Sequence[str], interpreter: bool, limit_s: float = LIMIT_SECONDS) -> list[dict]:
    """Run each probe in its own process; print its status as it ends, and return the rows of `probes.run_probe`.

    With `interpreter`, tiny problems run in Triton's interpreter. The row of a process that crashes or hangs has only
    name, kernel, dtype, shape, seconds and status. In every row that is not "right", "output" is the end of the
    process's output.
    """
    options = ["--device", "cpu", "--reruns", "2"] if interpreter else ["--device", "cuda", "--reruns", "20"]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{index}.json" for index, name in enumerate(names)}
        jobs = [
            _job(name, ["--probe", name, "--json", str(file), *options], interpreter, limit_s)
            for name, file in files.items()
        ]

        def done(process: Process) -> None:
            name, probe = process.job.name, find_probe(process.job.name)
            if process.reason is None:
                row = json.loads(files[name].read_text())
            else:
                row = {"name": name, "kernel": probe.kernel, "dtype": probe.precision, "shape": list(probe.sizes)}
                row |= {"seconds": round(process.seconds, 3), "status": f"failed: {process.reason}"}
            more = {} if row["status"] == "right" else {"output": tail(process.log, LOG_LINES)}
            print(f"{name}: {row['status']} after {row['seconds']:.0f} s", file=sys.stderr, flush=True)
            rows[name] = row | more

        cores = usable_cores()
        fitting = cores if interpreter else torch.cuda.mem_get_info()[0] // PROBE_BYTES
        _run_jobs(jobs, Path(folder), done, max(1, min(JOBS, cores, fitting)))
    return [rows[name] for name in names]


def _add_times(rows: list[dict]) -> None:
    """Time the probes with right results in another process; if it fails, the remaining probes have no time."""
    right = {row["name"]: row for row in rows if row["status"] == "right"}
    if not right:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"

        def done(process: Process) -> None:
            if process.reason is not None:
                print(f"timing: {process.reason}\n{tail(process.log, LOG_LINES)}", file=sys.stderr)

        words = ["--time", *right, "--json", str(file)]
        _run_jobs([_job("timing", words, False, LIMIT_SECONDS)], Path(folder), done)
        times = json.loads(file.read_text()) if file.exists() else {}
    for name, found in times.items():
        right[name] |= found


def _cells(row: dict) -> dict[str, str | None]:
    share, equal, ours = row.get("share"), row.get("reruns_equal"), row.get("ours_ms")
    whole_heads = any("whole_head" in kernel for kernel in row.get("launched", ()))
    return {
        "kernel": row["kernel"] + ", whole heads" * whole_heads,
        "dtype": row["dtype"],
        "shape": "×".join(map(str, row["shape"])),
        "error / allowed": None if share is None else f"{share:.2f}",
        "reruns equal": None if equal is None else f"{row['reruns']} of {row['reruns']}" if equal else "no",
        "forward + backward": None if ours is None else f"{ours:.3g} ms ({row['peer']}: {row['peer_ms']:.3g} ms)",
        "result": row["status"],
    }


def _check(options: argparse.Namespace) -> int:
    from crate_fast.eval.common.results import markdown_table

    names = options.probes or (list(PROBES) if options.all else list(CHECKED))
    for name in names:
        find_probe(name)
    if not options.interpreter:
        backend, reason = explain_backend("cuda")
        if backend != "triton":
            raise UserError(f"nothing to check: {reason}; pass --interpreter to check without a GPU")
    rows = run_probes(names, options.interpreter)
    if not options.interpreter:
        _add_times(rows)
    bad = [row["name"] for row in rows if row["status"] != "right"]
    report = {
        "environment": dict(env.describe()) | env.provenance(),
        "interpreter": options.interpreter,
        "rows": rows,
    }
    print(markdown_table([_cells(row) for row in rows]), end="")
    try:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--json {options.json} cannot be written ({error.strerror}): use another file") from error
    print(f"{len(rows) - len(bad)} of {len(rows)} right; written to {options.json}")
    return 1 if bad else 0


main = main_of("check", _check)
