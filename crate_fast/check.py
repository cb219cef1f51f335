"""Verifies the kernels on this machine's GPU in about a minute: `crate-fast check`.

Each probe of `crate_fast.probes` runs in a process of its own with a time limit; then those that are right are timed,
one after the other, against PyTorch. The table is printed, and written as JSON with the versions of everything, which
can be attached to a report. The exit status is 1 if anything is wrong, 2 if there is nothing to check.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from crate_fast import env
from crate_fast.backends import explain_backend
from crate_fast.env import provenance
from crate_fast.errors import CommandParser, UserError, run_command
from crate_fast.probes import CHECKED, PROBES, find_probe

__all__ = ["Outcome", "isolated_probe", "main", "run_isolated"]

JOBS = 4  # probes at once, at most
PROBE_BYTES = 3 * 2**30  # of GPU memory for each of them
LIMIT_SECONDS = 120.0  # of a probe, and of all timings

TAIL = 4000  # characters of a process's output that are kept
UNKILLABLE_SECONDS = 10.0  # a process that hangs in the driver does not end


# --- processes of their own ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    returncode: int | None  # −n after signal n; None where even SIGKILL did not end it
    timed_out: bool
    seconds: float
    tail: str  # the end of what it printed, stdout and stderr together

    @property
    def failure(self) -> str | None:
        """Why it failed in a line; None for exit status 0."""
        if self.timed_out:
            return f"over its limit of {self.seconds:.0f} s"
        if self.returncode == 0:
            return None
        if self.returncode is not None and self.returncode < 0:
            return f"ended by {signal.Signals(-self.returncode).name}"
        last = (self.tail.strip().splitlines() or ["no output"])[-1]
        return f"exit status {self.returncode}: {last[:500]}"


def run_isolated(
    command: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None, cwd: Path | str | None = None
) -> Outcome:
    """Run a command as a process group of its own, which is killed at the time limit.

    Args:
        command: Program and arguments.
        timeout_s: Limit in seconds.
        env: The whole environment; this process's when None.
        cwd: Working folder; this process's when None.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:  # not a pipe, which a surviving grandchild would keep open
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd, start_new_session=True
        )
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.returncode is None:
                _kill_group(process)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - 4 * TAIL))
        tail = output.read().decode(errors="replace")[-TAIL:]
    return Outcome(process.returncode, timed_out, time.perf_counter() - start, tail)


def _kill_group(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(UNKILLABLE_SECONDS)
    except subprocess.TimeoutExpired:
        return  # returncode stays None


def isolated_probe(
    name: str,
    timeout_s: float,
    *,
    device: str = "cuda",
    reruns: int = 20,
    env: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """Run a probe in a process of its own; its row, also where that process crashes or hangs.

    Args:
        name: As `probes.find_probe` takes it.
        timeout_s: Limit in seconds.
        device, reruns: As `probes.run_probe`'s.
        env: The whole environment; this process's when None.

    Returns:
        The row of `probes.run_probe`. Where there is none, name, kernel, dtype, shape, seconds and status alone. In
        every row that is not "right", "output" is the end of what the process printed.
    """
    probe = find_probe(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        words = ["--probe", name, "--json", str(file), "--device", device, "--reruns", str(reruns)]
        outcome = run_isolated(
            [sys.executable, "-X", "faulthandler", "-m", "crate_fast.probes", *words], timeout_s, env
        )
        if outcome.failure is None:
            row = json.loads(file.read_text())
        else:
            row = {"name": name, "kernel": probe.kernel, "dtype": probe.precision, "shape": list(probe.sizes)}
            row |= {"seconds": round(outcome.seconds, 3), "status": f"failed: {outcome.failure}"}
    return row if row["status"] == "right" else row | {"output": outcome.tail}


# --- the command --------------------------------------------------------------------------------------------------


def _jobs(interpreter: bool) -> int:
    cores = os.cpu_count() or 1
    fitting = cores if interpreter else torch.cuda.mem_get_info()[0] // PROBE_BYTES
    return max(1, min(JOBS, cores, fitting))


def _environment(interpreter: bool) -> dict[str, str]:
    return os.environ | {"TRITON_INTERPRET": str(int(interpreter))}


def _run(names: Sequence[str], interpreter: bool) -> list[dict]:
    """The probes' rows; each is told as it ends."""
    device, reruns = ("cpu", 2) if interpreter else ("cuda", 20)
    env_of_probes = _environment(interpreter)

    def run(name: str) -> dict:
        row = isolated_probe(name, LIMIT_SECONDS, device=device, reruns=reruns, env=env_of_probes)
        print(f"{name}: {row['status']} after {row['seconds']:.0f} s", file=sys.stderr, flush=True)
        return row

    with ThreadPoolExecutor(_jobs(interpreter)) as pool:
        return list(pool.map(run, names))


def _add_times(rows: list[dict]) -> None:
    """Time what is right, in one more process; what that did not reach has no time."""
    right = {row["name"]: row for row in rows if row["status"] == "right"}
    if not right:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        command = [sys.executable, "-m", "crate_fast.probes", "--time", *right, "--json", str(file)]
        outcome = run_isolated(command, LIMIT_SECONDS, _environment(interpreter=False))
        if outcome.failure is not None:
            print(f"timing: {outcome.failure}\n{outcome.tail}", file=sys.stderr)
        times = json.loads(file.read_text()) if file.exists() else {}
    for name, found in times.items():
        right[name] |= found


def _table(rows: list[dict]) -> str:
    from crate_fast.eval.results import markdown_table

    return markdown_table([_cells(row) for row in rows])


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
    names = options.probes or (list(PROBES) if options.all else list(CHECKED))
    for name in names:
        find_probe(name)
    if not options.interpreter:
        backend, reason = explain_backend("cuda")
        if backend != "triton":
            raise UserError(f"nothing to check: {reason} (--interpreter checks without a GPU)")
    rows = _run(names, options.interpreter)
    if not options.interpreter:
        _add_times(rows)
    bad = [row["name"] for row in rows if row["status"] != "right"]
    report = {"environment": env.describe() | provenance(), "interpreter": options.interpreter, "rows": rows}
    print(_table(rows), end="")
    try:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--json {options.json} cannot be written ({error.strerror}): name another file") from error
    print(f"{len(rows) - len(bad)} of {len(rows)} right; written to {options.json}")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    """Check, print the table, write the JSON."""
    parser = CommandParser(
        prog="crate-fast check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, default=Path("crate_fast_check.json"), metavar="FILE")
    parser.add_argument(
        "--interpreter", action="store_true", help="tiny probes in Triton's interpreter, without a GPU"
    )
    parser.add_argument("--all", action="store_true", help=f"all {len(PROBES)} probes instead of {len(CHECKED)}")
    parser.add_argument(
        "--probes", nargs="+", metavar="NAME", help="these alone (python -m crate_fast.probes --list)"
    )
    return run_command(lambda: _check(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
