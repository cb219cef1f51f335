"""What the GPU benchmarks share: problems and peers, their interleaved measurement, floors, and where a run was made.

Passes are timed in training mode: forward builds the graph and keeps what backward needs. Backward runs on a graph
that an untimed forward has just built, since a compiled peer's graph can run once only (its backward takes over the
saved tensors' memory). A smoke run goes the same way on a CPU, with Triton's interpreter and a wall clock.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from gpu_timing import Ceilings, Plan, Step, Timer, measure_ceilings
from harness import RESULTS, Timing, markdown_table, number, write_results
from torch import Tensor

from crate_fast.kernels.support import INTERPRETED
from crate_fast.provenance import provenance

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from oracle import token_scale, within_twice_eager  # the tests' rule is the benchmarks' gate

__all__ = [
    "DTYPES",
    "Budget",
    "Peer",
    "Problem",
    "Red",
    "Run",
    "Work",
    "add_options",
    "error_in_a_line",
    "measure",
    "missing_rows",
    "open_run",
    "passes_gate",
    "report",
    "rerun_interpreted",
    "token_scale",
    "too_many_logits",
    "why_missing",
    "within_twice_eager",
]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_LOGITS_FRACTION = 0.1  # of the GPU's memory, beyond which a peer that writes all logits is not tried
RESERVED_SECONDS = 8.0  # of a budget, for each problem to come: its peers that need no compiling
MAX_LOGITS_FRACTION_CPU = 0.5  # of the machine's memory: beyond it the system ends a process without a word
SAME = 0.05  # how far a peer's output and gradients may be from ours, as relative norms


# --- what there is to do ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one pass must do at least (each tensor moved once), and what our kernels' tiles do."""

    flops: float
    moved_bytes: float
    executed_flops: float | None  # None: not counted
    exps: float = 0.0
    executed_exps: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Problem:
    """Inputs, the output's gradient, and what each pass has to do.

    Args:
        label: As tables name it.
        fields: What its rows carry: sizes and dtype.
        inputs: Leaves of the graph, in the peers' order.
        grad: Of the output.
        work: By pass.
        training: Passes "forward" (with a graph, as in training), "backward", "forward + backward"; else
            "inference" alone, for a caller who has turned gradients off.
        autocast: The forward's dtype under autocast, or None.
        logits_bytes: What a peer writes that materialises all logits once.
    """

    hides_host: ClassVar[bool] = True  # the host's part of a call is not in its time: that is the caller's affair

    label: str
    fields: dict[str, object]
    inputs: tuple[Tensor, ...]
    grad: Tensor
    work: dict[str, Work]
    training: bool = True
    autocast: torch.dtype | None = None
    logits_bytes: float = 0.0

    def forward(self, function: Callable[..., Tensor]) -> Tensor:
        """The function of the inputs, under autocast where the problem says so."""
        cast = nullcontext() if self.autocast is None else torch.autocast(self.grad.device.type, self.autocast)
        with cast:
            return function(*self.inputs)

    def results(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """Output and, in training, the gradient of every input."""
        out = self.forward(function)
        return [out.detach(), *(torch.autograd.grad(out, self.inputs, self.grad) if self.training else ())]

    def passes(self, function: Callable[..., Tensor]) -> dict[str, Step]:
        """What is timed."""
        if not self.training:
            return {"inference": Step(lambda _: self.forward(function))}
        return {
            "forward": Step(lambda _: self.forward(function)),
            "backward": Step(
                lambda out: torch.autograd.grad(out, self.inputs, self.grad), lambda: self.forward(function)
            ),
            "forward + backward": Step(lambda _: torch.autograd.grad(self.forward(function), self.inputs, self.grad)),
        }

    def check(self, peer: "Peer", results: list[Tensor], ours: list[Tensor]) -> None:
        """A ValueError where a peer's results are not ours."""
        for mine, expected in zip(results, ours, strict=True):
            difference = ((mine.float() - expected.float()).norm() / expected.float().norm()).item()
            if not difference <= SAME:
                raise ValueError(f"its output or a gradient differs from ours by {difference:.0%} of the norm")

    def peak_mib(self, peer: "Peer", function: Callable[..., Tensor], run: "Run") -> float | None:
        """Memory of all passes together."""
        return run.timer.peak_mib(lambda: self.results(function))

    def work_of(self, peer: "Peer", what: str) -> Work:
        """What a pass takes; of the peers it is not known what they execute."""
        return self.work[what] if peer.ours else replace(self.work[what], executed_flops=None)


@dataclass(frozen=True)
class Peer:
    """Something that computes what a problem asks for.

    Args:
        name: As tables name it.
        build: Makes the function; called once a problem, so that compiled code is the problem's own.
        ours: Whether it is this package: its errors end the run instead of becoming an "n/a".
        compiles: Whether its first call takes seconds: left out where the time is up.
        compile_seconds: How many, more or less; of a whole model tens.
        quadratic: Whether it writes all logits to memory.
        smoke: Whether a smoke run includes it.
    """

    name: str
    build: Callable[[], Callable[..., Tensor]]
    ours: bool = False
    compiles: bool = False
    compile_seconds: float = 0.0
    quadratic: bool = False
    smoke: bool = False


class Red(Exception):
    """A result of ours is wrong: there are no numbers."""


# --- a run --------------------------------------------------------------------------------------------------------


class Budget:
    """Seconds for a run; without a limit when None. What is compiled comes first, rounds get what it leaves."""

    def __init__(self, seconds: float | None):
        self.reserved_seconds = RESERVED_SECONDS
        self._end = math.inf if seconds is None else time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.perf_counter())

    def may_compile(self, problems: int, seconds: float = 0.0) -> bool:
        """Whether there is time for it, with `problems` still to measure."""
        return self.left() > problems * self.reserved_seconds + seconds

    def rounds(self, wanted: int, round_seconds: float, problems: int) -> int:
        """How many rounds fit into this problem's equal share, one at least."""
        return int(min(wanted, max(1.0, self.left() / problems / max(round_seconds, 1e-9))))


def add_options(
    parser: argparse.ArgumentParser, dtype: str = "of the tensors; bfloat16, or float16 in a smoke run"
) -> None:
    """The options that every GPU benchmark has; `dtype` explains the one of that name."""
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too; writes nothing")
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each call (default 5)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="fewer rounds, then fewer peers, to end in time"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--commit", help="the commit, where a copy of the tree is not a git checkout")


def rerun_interpreted(script: str, argv: list[str] | None) -> int | None:
    """Where a smoke run needs Triton's interpreter, run it in a process that has it, and return its exit status.

    The flag is read when Triton is imported, which timm does: too late for this process.
    """
    if torch.cuda.is_available() or INTERPRETED:
        return None
    command = [sys.executable, script, *(sys.argv[1:] if argv is None else argv)]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode


@dataclass
class Run:
    """What the parts of one run share."""

    device: torch.device
    dtype: torch.dtype
    smoke: bool
    rounds: int
    output: Path
    facts: dict[str, object]
    timer: Timer = field(repr=False)
    budget: Budget
    ceilings: Ceilings | None = None
    rows: list[dict] = field(default_factory=list)
    first_call_s: dict[str, float] = field(default_factory=dict)  # of ours by problem: the gate makes it

    def measure_ceilings(self) -> None:
        """After the gate, so that a run that is red ends at once."""
        self.ceilings = measure_ceilings(self.timer, self.device, self.dtype, self.smoke)
        self.facts |= {
            "matrix_tflops_per_s": float(f"{self.ceilings.tflops_per_s:.4g}"),
            "copy_gb_per_s": float(f"{self.ceilings.gb_per_s:.4g}"),
        }
        print(f"measured ceilings: {self.ceilings}", flush=True)


def open_run(options: argparse.Namespace, on_cpu: bool = False) -> Run:
    """The device and everything a run needs to know about it; `on_cpu`: a CPU will do, in fp32 and PyTorch alone.

    Raises:
        SystemExit: No GPU and not a smoke run, or Triton's interpreter on a GPU.
    """
    if not (torch.cuda.is_available() or options.smoke or on_cpu):
        raise SystemExit("a CUDA GPU is needed and PyTorch finds none; --smoke runs tiny shapes on a CPU instead")
    if torch.cuda.is_available() and INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set: unset it to measure the kernels on this GPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.smoke:
        print("smoke run: tiny shapes, to see that everything runs. The times below mean nothing.\n")
    dtype = (
        "float32" if on_cpu and device.type == "cpu" else "float16" if options.smoke and not on_cpu else "bfloat16"
    )
    return Run(
        device=device,
        dtype=DTYPES[options.dtype or dtype],
        smoke=options.smoke,
        rounds=2 if options.smoke else options.rounds,
        output=options.output,
        facts=_facts(device, options.commit),
        timer=Timer(device),
        budget=Budget(options.budget),
    )


def _facts(device: torch.device, commit: str | None) -> dict[str, object]:
    """What every row carries of where it was made."""
    found = provenance()
    if commit is not None and re.match("installed|unknown", found["commit"]):
        found["commit"] = commit
    facts = {key: found[key] for key in ("commit", "torch", "device")}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    return facts | {"driver": _driver(device), "triton": metadata.version("triton"), "ptxas": _ptxas(device)}


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def _ptxas(device: torch.device) -> str:
    """The version of the assembler that Triton uses for this GPU; for Hopper where there is none."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
        command = [get_ptxas(10 * major + minor).path, "--version"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.search(r"\bV(\d[\d.]*)", text)[1]
    except Exception as error:  # a Triton without this function, or another vendor's: the rows then say so
        return f"unknown ({type(error).__name__})"


def passes_gate(
    problem: Problem, function: Callable[..., Tensor], judge: Callable[[Problem, list[Tensor]], bool], run: Run
) -> bool:
    """Whether `judge` accepts output and gradients, and a second run gives the same bits."""
    start = time.perf_counter()
    actual = problem.results(function)
    run.timer.synchronize()
    run.first_call_s[problem.label] = time.perf_counter() - start
    again = problem.results(function)
    same = all(torch.equal(first, second) for first, second in zip(actual, again, strict=True))
    if not same:
        print(f"{problem.label}: a second run gave other bits")
    del again
    return judge(problem, actual) and same


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass
class _Ready:
    """A peer whose first call went well."""

    function: Callable[..., Tensor]
    first_call_s: float
    peak_mib: float | None


def error_in_a_line(error: Exception, caught: Sequence[warnings.WarningMessage] = ()) -> str:
    """An error in a line, with the warnings that explain it (SDPA says there why a backend cannot run)."""
    hints = dict.fromkeys(str(warning.message).split("\n")[0].split(" (Triggered")[0] for warning in caught)
    text = " ".join([f"{type(error).__name__}: {str(error).strip()}", *hints])
    return " ".join(text.split())[:600]


def too_many_logits(logits_bytes: float, device: torch.device) -> str | None:
    """Why logits of this size are not tried on a device, or None."""
    if device.type == "cuda":
        memory, limit = torch.cuda.get_device_properties(device).total_memory, MAX_LOGITS_FRACTION
    else:
        memory, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), MAX_LOGITS_FRACTION_CPU
    if logits_bytes <= limit * memory:
        return None
    whose = "GPU" if device.type == "cuda" else "machine"
    sizes = f"{logits_bytes / 2**30:.0f} of {memory / 2**30:.0f} GiB"
    return f"its logits alone take {sizes}, more than {limit:.0%} of the {whose}'s memory"


def _unfit(peer: Peer, problem: Problem, run: Run, problems: int) -> str | None:
    """Why a peer is not tried, or None."""
    if run.smoke and not (peer.smoke or peer.ours):
        return "not part of a smoke run"
    if peer.quadratic and (reason := too_many_logits(problem.logits_bytes, run.device)):
        return reason
    if peer.compiles and not run.budget.may_compile(problems, peer.compile_seconds):
        return "not compiled: --budget was used up"
    return None


def _first_call(peer: Peer, problem: Problem, run: Run, ours: object) -> tuple[_Ready, object]:
    """Build a peer, time its first call, compare what it gives with ours (None: it is ours), measure its memory."""
    start = time.perf_counter()
    function = peer.build()
    results = problem.results(function)
    run.timer.synchronize()
    first_call_s = time.perf_counter() - start
    problem.check(peer, results, results if ours is None else ours)
    return _Ready(function, first_call_s, problem.peak_mib(peer, function, run)), results


def _start(peers: list[Peer], problem: Problem, run: Run, problems: int) -> tuple[dict[str, _Ready], dict[str, str]]:
    """The peers that run, and why the others do not."""
    ready, missing, expected = {}, {}, None
    for peer in peers:
        reason = _unfit(peer, problem, run, problems)
        if reason is None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    ready[peer.name], results = _first_call(peer, problem, run, expected)
                    expected = results if expected is None else expected
                    del results
                except Exception as error:  # a peer may fail as it likes; its rows say how
                    if peer.ours or isinstance(error, Red):
                        raise
                    reason = error_in_a_line(error, caught)
        if reason is not None:
            missing[peer.name] = reason
            print(f"{problem.label}, {peer.name}: n/a, {reason}", flush=True)
            run.timer.free_memory()
    return ready, missing


def _interleaved(
    steps: dict[tuple[str, str], Step], run: Run, problems: int, ours: str, hides_host: bool
) -> tuple[dict[tuple[str, str], tuple[Plan, list[float]]], dict[str, str]]:
    """Milliseconds of every call of every (pass, peer), measured in turn; and the peers that failed on the way."""
    failed: dict[str, str] = {}

    def attempt(peer: str, action: Callable[[], object]) -> object:
        if peer in failed:
            return None
        try:
            return action()
        except Exception as error:  # out of memory, most likely
            if peer == ours:
                raise
            failed[peer] = error_in_a_line(error)
        run.timer.free_memory()  # here, where the error no longer holds what it interrupted
        return None

    plans = {key: attempt(key[1], partial(run.timer.plan, step, hides_host)) for key, step in steps.items()}
    round_seconds = sum(plan.seconds for plan in plans.values() if plan is not None)
    rounds = run.budget.rounds(run.rounds, round_seconds, problems)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            plan = plans[key]
            if plan is not None:
                samples[key] += attempt(key[1], partial(run.timer.sample, step, plan.calls, plan.flushes)) or []
    return {key: (plans[key], samples[key]) for key in steps if key[1] not in failed}, failed


def measure(problem: Problem, peers: list[Peer], run: Run, problems: int) -> list[dict]:
    """One row for every pass and peer of a problem.

    Args:
        problem: What to compute.
        peers: The first is ours: what the others are compared with.
        run: Where.
        problems: How many are still to be measured, this one included: the budget is for all of them.

    Returns:
        Rows; those of a peer that did not run have "latency_ms" None and a "reason".
    """
    torch.compiler.reset()  # what other problems compiled would count against the limit of recompilations
    ours = peers[0].name
    ready, missing = _start(peers, problem, run, problems)
    steps = {}
    for name, peer in ready.items():
        for what, step in problem.passes(peer.function).items():
            steps[what, name] = step
    steps = {key: steps[key] for key in sorted(steps, key=lambda key: list(problem.work).index(key[0]))}
    measured, failed = _interleaved(steps, run, problems, ours, problem.hides_host)
    missing |= failed
    rows = []
    for what in problem.work:
        ours_ms = float(np.median(measured[what, ours][1]))
        for peer in peers:
            row = _row(problem, what, peer, run)
            if peer.name in missing:
                row["reason"] = missing[peer.name]
            else:
                _fill(row, measured[what, peer.name], ours_ms, ready[peer.name])
                if peer.ours and problem.training:
                    row["first_call_s"] = run.first_call_s.get(problem.label, row["first_call_s"])
            rows.append(row)
    return rows


def missing_rows(problem: Problem, peers: list[Peer], run: Run, reason: str) -> list[dict]:
    """The rows of a problem that could not be measured."""
    return [_row(problem, what, peer, run) | {"reason": reason} for what in problem.work for peer in peers]


def _row(problem: Problem, what: str, peer: Peer, run: Run) -> dict:
    work = problem.work_of(peer, what)
    row = {
        "problem": problem.label,
        **problem.fields,
        "pass": what,
        "peer": peer.name,
        "latency_ms": None,
        "flops": work.flops,
        "bytes": work.moved_bytes,
        "exps": work.exps,
        "floor_ms": run.ceilings.floor_ms(work.flops, work.moved_bytes),
        "reason": None,
        **run.facts,
    }
    if work.executed_flops is not None:
        row |= {
            "executed_flops": work.executed_flops,
            "executed_exps": work.executed_exps,
            "executed_floor_ms": run.ceilings.floor_ms(work.executed_flops, work.moved_bytes),
        }
    return row


def _fill(row: dict, measured: tuple[Plan, list[float]], ours_ms: float, ready: _Ready) -> None:
    plan, samples = measured
    timing = Timing(*np.quantile(samples, (0.5, 0.2, 0.8)).tolist())
    row |= {
        "latency_ms": timing.median,
        "low_ms": timing.low,
        "high_ms": timing.high,
        "calls": len(samples),
        "host_us": plan.host_us,
        "tflops_per_s": row["flops"] / timing.median / 1e9,
        "of_floor": row["floor_ms"] / timing.median,
        "ours_faster": timing.median / ours_ms,
        "first_call_s": ready.first_call_s,
        "peak_mib": ready.peak_mib,
    }


# --- results ------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """All rows as a Markdown table, and under it why some are missing."""
    shown = []
    for row in rows:
        measured = row["latency_ms"] is not None
        shown.append(
            {
                "problem": row["problem"],
                "pass": row["pass"],
                "peer": row["peer"],
                "ms": row["latency_ms"] if measured else "n/a",
                "20–80 %": f"{number(row['low_ms'])}–{number(row['high_ms'])}" if measured else "",
                "TFLOP/s": row["tflops_per_s"] if measured else "",
                "floor, ms": row["floor_ms"],
                "of floor": f"{row['of_floor']:.0%}" if measured else "",
                "ours": f"{row['ours_faster']:.2f}×" if measured else "",
                "first call, s": row["first_call_s"] if measured else "",
                "peak MiB": row["peak_mib"] if measured and row["peak_mib"] is not None else "",
            }
        )
    return markdown_table(shown, list(shown[0])) + why_missing(rows)


def why_missing(rows: list[dict]) -> str:
    """A line for each peer that did not run."""
    reasons = dict.fromkeys(
        f"* n/a: {row['problem']}, {row['peer']}: {row['reason']}" for row in rows if row["reason"] is not None
    )
    return "\n".join(["", *reasons, ""]) if reasons else ""


def report(name: str, run: Run, quiet: bool = False, make_table: Callable[[list[dict]], str] = table) -> None:
    """Write the rows so far to `name`.{json,md}, except in a smoke run; print the table unless quiet."""
    text = make_table(run.rows)
    if not quiet:
        print("\n" + text)
    if run.smoke:
        return
    for path in write_results(name, run.rows, text, run.output, run.facts):
        if not quiet:
            print(f"written: {path}")
