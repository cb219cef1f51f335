"""What the GPU benchmarks share: problems and peers, their interleaved measurement, floors, and where a run was made.

Passes are timed in training mode: forward builds the graph and keeps what backward needs. Backward runs on a graph
that an untimed forward has just built, since a compiled peer's graph can run once only (its backward takes over the
saved tensors' memory). A smoke run goes the same way on a CPU, with Triton's interpreter and a wall clock.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from gpu_report import times, why_missing
from gpu_timing import Ceilings, Plan, Step, Timer, measure_ceilings
from harness import RESULTS, Timing, write_results
from torch import Tensor

from crate_fast.accuracy import judge
from crate_fast.env import provenance
from crate_fast.kernels.launch import INTERPRETED

__all__ = [
    "DTYPES",
    "Peer",
    "Problem",
    "Run",
    "Work",
    "Wrong",
    "add_options",
    "add_shapes",
    "chosen_shapes",
    "error_in_a_line",
    "measure",
    "open_run",
    "report",
    "rerun_interpreted",
    "too_many_logits",
    "why_missing",
]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_LOGITS_FRACTION = 0.1  # of the GPU's memory, beyond which a peer that writes all logits is not tried
MAX_LOGITS_FRACTION_CPU = 0.5  # of the machine's memory: beyond it the system ends a process without a word
SAME = 0.05  # how far a peer's output and gradients may be from ours, as relative norms


# --- what there is to do ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one pass must do at least: each tensor is moved once."""

    flops: float
    moved_bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved_bytes + other.moved_bytes)


@dataclass(frozen=True)
class Problem:
    """Inputs, the output's gradient, and what each pass has to do.

    Args:
        label: As tables name it.
        fields: What its rows carry: sizes and dtype.
        inputs: Leaves of the graph, in the peers' order.
        grad: Of the output.
        work: By pass.
        reference: Eager PyTorch, for `check`; None: nothing is checked.
        names: Of the output and the gradients.
        part: What is checked of a tensor with a batch in front (of the inputs, the output, their gradients).
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
    reference: Callable[..., Tensor] | None = None
    names: str = ""
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor
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

    @cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """The reference's results on the checked part: in the problem's dtype, and in float64."""
        inputs = tuple(self.part(tensor.detach()).requires_grad_() for tensor in self.inputs)
        grad = self.part(self.grad)
        eager = replace(self, inputs=inputs, grad=grad).results(self.reference)
        exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
        return eager, replace(self, inputs=exact, grad=grad.double(), autocast=None).results(self.reference)

    def gate(self, run: "Run") -> None:
        """Prepare `check`; an error here is ours'."""

    def check(self, peer: "Peer", results: list[Tensor], again: Callable[[], list[Tensor]]) -> float | None:
        """The largest difference from float64, as a relative norm.

        Raises:
            Wrong: Ours breaks the tests' rule, or a second run gives other bits; a peer computes something else.
        """
        if self.reference is None:
            return None
        eager, truth = self.expected
        names = self.names.split()
        found = [self.part(tensor.detach()) for tensor in results]
        differences = [
            ((mine.double() - true).norm() / true.norm()).item() for mine, true in zip(found, truth, strict=True)
        ]
        if not peer.ours:
            for name, difference in zip(names, differences, strict=False):
                if not difference <= SAME:
                    raise Wrong(f"its {name} differs from float64 by {difference:.0%} of the norm")
            return max(differences)
        for name, *tensors in zip(names, found, eager, truth, strict=False):
            judged = judge(*tensors)
            print(f"{self.label}, {name}: {judged.share:.2f} of the error that is allowed")
            if not judged.right:
                raise Wrong(f"the error of {name} is {judged.share:.2g}× what is allowed")
        if not all(torch.equal(*pair) for pair in zip(results, again(), strict=True)):
            raise Wrong("a second run gave other bits")
        return max(differences)

    def peak_mib(self, peer: "Peer", function: Callable[..., Tensor], run: "Run") -> float | None:
        """Memory of all passes together."""
        return run.timer.peak_mib(lambda: self.results(function))

    def work_of(self, peer: "Peer", what: str) -> Work:
        """What a pass takes: for every peer the same."""
        return self.work[what]


@dataclass(frozen=True)
class Peer:
    """Something that computes what a problem asks for.

    Args:
        name: As tables name it.
        build: Makes the function; called once a problem, so that compiled code is the problem's own.
        ours: Whether it is this package's default: what `check` is strict with.
        compiles: Whether its first call takes seconds.
        quadratic: Whether it writes all logits to memory.
        smoke: Whether a smoke run includes it.
    """

    name: str
    build: Callable[[], Callable[..., Tensor]]
    ours: bool = False
    compiles: bool = False
    quadratic: bool = False
    smoke: bool = False


class Wrong(ValueError):
    """A peer computes something else: it has no time."""


# --- a run --------------------------------------------------------------------------------------------------------


def add_options(
    parser: argparse.ArgumentParser, dtype: str = "of the tensors; bfloat16, or float16 in a smoke run"
) -> None:
    """The options that every GPU benchmark has; `dtype` explains the one of that name."""
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too; writes nothing")
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each call (default 5)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--commit", help="the commit, where a copy of the tree is not a git checkout")


def add_shapes(parser: argparse.ArgumentParser, on_gpu: dict, on_cpu: dict) -> None:
    """Add --shapes, whose names depend on where the benchmark runs."""
    names = f"{', '.join(on_gpu)}; on a CPU {', '.join(on_cpu)}"
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"default: all of {names}")


def chosen_shapes(
    parser: argparse.ArgumentParser, options: argparse.Namespace, run: "Run", on_gpu: dict, on_cpu: dict
) -> dict:
    """Return the shapes that --shapes names, all of this device by default; another name ends the program."""
    shapes = on_gpu if run.timer.on_gpu else on_cpu
    names = options.shapes or list(shapes)
    unknown = [name for name in names if name not in shapes]
    if unknown:
        parser.error(f"--shapes {unknown[0]}: on this device there are {', '.join(shapes)}")
    return {name: shapes[name] for name in names}


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
    ceilings: Ceilings | None = None
    rows: list[dict] = field(default_factory=list)

    def name(self, stem: str) -> str:
        """Return the name of the results: with _cpu where there is no GPU, and with an unusual dtype."""
        default = torch.bfloat16 if self.timer.on_gpu else torch.float32
        dtype = "" if self.dtype == default else f"_{str(self.dtype).removeprefix('torch.')}"
        return stem + ("" if self.timer.on_gpu else "_cpu") + dtype

    def measure_ceilings(self) -> None:
        """What every row's floor and facts take from this GPU."""
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


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass
class _Ready:
    """A peer whose first call went well."""

    function: Callable[..., Tensor]
    first_call_s: float
    peak_mib: float | None
    error: float | None  # against float64


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


def _unfit(peer: Peer, problem: Problem, run: Run) -> str | None:
    """Why a peer is not tried, or None."""
    if run.smoke and not (peer.smoke or peer.ours):
        return "not part of a smoke run"
    return too_many_logits(problem.logits_bytes, run.device) if peer.quadratic else None


def _first_call(peer: Peer, problem: Problem, run: Run) -> _Ready:
    """Build a peer, time its first call, check what it gives, measure its memory."""
    start = time.perf_counter()
    function = peer.build()
    results = problem.results(function)
    run.timer.synchronize()
    first_call_s = time.perf_counter() - start
    error = problem.check(peer, results, partial(problem.results, function))
    del results
    return _Ready(function, first_call_s, problem.peak_mib(peer, function, run), error)


@dataclass
class _Missing:
    """Why peers have no times; those that are red are forms of ours, and wrong or failed."""

    problem: Problem
    run: Run
    reasons: dict[str, str] = field(default_factory=dict)
    red: set[str] = field(default_factory=set)

    def leave_out(self, peer: Peer, reason: str) -> None:
        """Note the reason, and say it."""
        self.reasons[peer.name] = reason
        word = "red" if peer.name in self.red else "n/a"
        print(f"{self.problem.label}, {peer.name}: {word}, {reason}", file=sys.stderr, flush=True)

    def attempt(self, peer: Peer, action: Callable[[], object]) -> object:
        """What an action returns; where it fails None, and the peer is out.

        Raises:
            RuntimeError: The GPU no longer answers this process, in which nothing more can be measured.
        """
        if peer.name in self.reasons:
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return action()
            except Exception as error:  # a peer may fail as it likes; its rows say how
                reason, wrong = error_in_a_line(error, caught), isinstance(error, Wrong)
        if peer.ours or (peer.name.startswith("ours") and (wrong or self.run.timer.on_gpu)):
            self.red.add(peer.name)
        self.leave_out(peer, reason)
        self.run.timer.free_memory()  # here, where the error no longer holds what it interrupted
        self.run.timer.synchronize()
        return None


def _start(peers: list[Peer], problem: Problem, run: Run) -> tuple[dict[str, _Ready], _Missing]:
    """The peers that run, and why the others do not."""
    ready, missing = {}, _Missing(problem, run)
    missing.attempt(peers[0], partial(problem.gate, run))
    for peer in peers:
        if reason := _unfit(peer, problem, run):
            missing.leave_out(peer, reason)
        first = missing.attempt(peer, partial(_first_call, peer, problem, run))
        if first is not None:
            ready[peer.name] = first
    return ready, missing


def _interleaved(
    steps: dict[tuple[str, Peer], Step], run: Run, missing: _Missing, hides_host: bool
) -> dict[tuple[str, str], tuple[Plan, list[float]]]:
    """Milliseconds of every call of every (pass, peer), measured in turn."""
    plans = {
        (what, peer): missing.attempt(peer, partial(run.timer.plan, step, hides_host))
        for (what, peer), step in steps.items()
    }
    samples: dict[tuple[str, Peer], list[float]] = {key: [] for key in steps}
    for _ in range(run.rounds):
        for (what, peer), step in steps.items():
            plan = plans[what, peer]
            if plan is not None:
                sample = partial(run.timer.sample, step, plan.calls, plan.flushes)
                samples[what, peer] += missing.attempt(peer, sample) or []
    return {(what, peer.name): (plans[what, peer], samples[what, peer]) for what, peer in steps}


def measure(problem: Problem, peers: list[Peer], run: Run) -> list[dict]:
    """One row for every pass and peer of a problem.

    Args:
        problem: What to compute.
        peers: If the first is ours, the others' times are compared with it.
        run: Where.

    Returns:
        Rows; those of a peer that did not run have "latency_ms" None and a "reason", and where a form of ours was
        wrong or failed "red".

    Raises:
        RuntimeError: The GPU no longer answers this process.
    """
    torch.compiler.reset()  # what other problems compiled would count against the limit of recompilations
    ready, missing = _start(peers, problem, run)
    steps = {}
    for peer in peers:
        if peer.name in ready:
            for what, step in problem.passes(ready[peer.name].function).items():
                steps[what, peer] = step
    steps = {key: steps[key] for key in sorted(steps, key=lambda key: list(problem.work).index(key[0]))}
    measured = _interleaved(steps, run, missing, problem.hides_host)
    rows = []
    for what in problem.work:
        ours = peers[0].name if peers[0].ours and peers[0].name not in missing.reasons else None
        ours_ms = None if ours is None else float(np.median(measured[what, ours][1]))
        for peer in peers:
            row = _row(problem, what, peer, run)
            if peer.name in missing.reasons:
                row |= {"reason": missing.reasons[peer.name], "red": peer.name in missing.red}
            else:
                _fill(row, measured[what, peer.name], ours_ms, ready[peer.name])
            rows.append(row)
    return rows


def _row(problem: Problem, what: str, peer: Peer, run: Run) -> dict:
    work = problem.work_of(peer, what)
    return {
        "problem": problem.label,
        **problem.fields,
        "pass": what,
        "peer": peer.name,
        "latency_ms": None,
        "flops": work.flops,
        "bytes": work.moved_bytes,
        "floor_ms": run.ceilings.floor_ms(work.flops, work.moved_bytes),
        "reason": None,
        **run.facts,
    }


def _fill(row: dict, measured: tuple[Plan, list[float]], ours_ms: float | None, ready: _Ready) -> None:
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
        "ours_faster": None if ours_ms is None else timing.median / ours_ms,
        "first_call_s": ready.first_call_s,
        "peak_mib": ready.peak_mib,
        "error": ready.error,
    }


# --- results ------------------------------------------------------------------------------------------------------


def report(name: str, run: Run, quiet: bool = False, make_table: Callable[[list[dict]], str] = times) -> None:
    """Write the rows so far to `name`.{json,md}, except in a smoke run; print the table unless quiet."""
    text = make_table(run.rows)
    if not quiet:
        print("\n" + text)
    if run.smoke:
        return
    for path in write_results(name, run.rows, text, run.output, run.facts):
        if not quiet:
            print(f"written: {path}")
