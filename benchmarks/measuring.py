"""Problems, their peers, and the measurement of peers in turn: gate, first call, memory, times.

A peer that fails or is wrong has rows with the reason. A smoke run does the same on a CPU, with Triton's interpreter
and a wall clock.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import ClassVar

from harness import Plan, Run, Step, Timing, in_turn

import torch
from torch import Tensor

from crate_fast.accuracy import judge

MAX_LOGITS_FRACTION = 0.1  # of the GPU's memory; a peer that writes more logits is left out
MAX_LOGITS_FRACTION_CPU = 0.5  # of the machine's memory; with more, the system may kill the process
PEER_TOLERANCE = 0.05  # limit of the relative norm of a peer's difference from float64


class WrongResult(ValueError):
    """A wrong result. Its peer has no times."""


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`."""
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@dataclass(frozen=True)
class Cost:
    """FLOPs of a pass, and its memory traffic if each tensor is moved once."""

    flops: float
    moved_bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.moved_bytes + other.moved_bytes)


@dataclass(frozen=True)
class Peer:
    """An implementation to measure."""

    name: str
    build: Callable[[], Callable[..., Tensor]]  # called once per problem, so that each has its own compiled code
    ours: bool = False  # this package's default, judged by the tests' rule
    compiles: bool = False  # its first call takes seconds
    quadratic: bool = False  # it writes all logits to memory
    smoke: bool = False  # included in a smoke run


@dataclass(frozen=True)
class Problem:
    """Inputs, the output's gradient, and the cost of each pass.

    Passes are timed in training mode: forward builds the graph and keeps the activations for backward.
    """

    hides_host: ClassVar[bool] = True

    label: str
    fields: dict[str, object]  # sizes and dtype, for its rows
    inputs: tuple[Tensor, ...]  # leaves of the graph, in the peers' order
    grad: Tensor  # of the output
    cost: dict[str, Cost]  # by pass
    reference: Callable[..., Tensor]  # eager PyTorch, for `check`
    names: str  # of the output and the gradients, separated by spaces
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor  # selects the checked part of a tensor [B, …]
    training: bool = True  # else "inference" only, without gradients and check
    autocast: torch.dtype | None = None  # the forward's dtype under autocast
    logits_bytes: float = 0.0  # of all logits, written once

    def forward(self, function: Callable[..., Tensor]) -> Tensor:
        """Apply the function to the inputs, under autocast if the problem has it."""
        cast = nullcontext() if self.autocast is None else torch.autocast(self.grad.device.type, self.autocast)
        with cast:
            return function(*self.inputs)

    def results(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """Return the output and, in training, the gradient of every input."""
        out = self.forward(function)
        return [out.detach(), *(torch.autograd.grad(out, self.inputs, self.grad) if self.training else ())]

    def passes(self, function: Callable[..., Tensor]) -> dict[str, Step]:
        """Return the steps to time."""
        forward = partial(self.forward, function)
        if not self.training:
            return {"inference": Step(lambda _: forward())}

        def backward(out: Tensor) -> object:
            return torch.autograd.grad(out, self.inputs, self.grad)

        return {
            "forward": Step(lambda _: forward()),
            "backward": Step(backward, forward),
            "forward + backward": Step(lambda _: backward(forward())),
        }

    @cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """The reference's results on the checked part, in the problem's dtype and in float64."""
        inputs = tuple(self.part(tensor.detach()).requires_grad_() for tensor in self.inputs)
        grad = self.part(self.grad)
        eager = replace(self, inputs=inputs, grad=grad).results(self.reference)
        exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
        return eager, replace(self, inputs=exact, grad=grad.double(), autocast=None).results(self.reference)

    def gate(self, run: "Run") -> None:
        """Prepare `check`. An error here counts as an error of ours."""

    def check(self, peer: Peer, found: list[Tensor], again: Callable[[], list[Tensor]]) -> float | None:
        """Return the largest difference from float64, as a relative norm.

        Raises:
            WrongResult: Ours breaks the tests' rule or has other bits in a second run; a peer is far from float64.
        """
        if not self.training:
            return None
        eager, truth = self.expected
        names, parts = self.names.split(), [self.part(tensor.detach()) for tensor in found]
        differences = [relative_difference(part.double(), true) for part, true in zip(parts, truth, strict=True)]
        if not peer.ours:
            for name, difference in zip(names, differences, strict=True):
                if not difference <= PEER_TOLERANCE:
                    raise WrongResult(f"its {name} differs from float64 by {difference:.0%} of the norm")
            return max(differences)
        for name, *tensors in zip(names, parts, eager, truth, strict=True):
            judged = judge(*tensors)
            print(f"{self.label}, {name}: {judged.share:.2f} of the error that is allowed")
            if not judged.right:
                raise WrongResult(f"the error of {name} is {judged.share:.2g}× what is allowed")
        if not all(torch.equal(*pair) for pair in zip(found, again(), strict=True)):
            raise WrongResult("a second run gave other bits")
        return max(differences)

    def peak_mib(self, peer: Peer, function: Callable[..., Tensor], run: "Run") -> float | None:
        """Measure the memory of all passes together."""
        return run.timer.peak_mib(lambda: self.results(function))

    def cost_of(self, peer: Peer, what: str) -> Cost:
        """Return the cost of a pass, the same for every peer."""
        return self.cost[what]


# --- measuring ----------------------------------------------------------------------------------------------------


def error_in_a_line(error: Exception, caught: Sequence[warnings.WarningMessage] = ()) -> str:
    """Format an error in one line, with the warnings in which SDPA explains why a backend cannot run."""
    hints = dict.fromkeys(str(warning.message).split("\n")[0].split(" (Triggered")[0] for warning in caught)
    text = " ".join([f"{type(error).__name__}: {str(error).strip()}", *hints])
    return " ".join(text.split())[:600]


def too_many_logits(logits_bytes: float, device: torch.device) -> str | None:
    """Return why logits of this size are left out on a device, or None if they are not."""
    if device.type == "cuda":
        owner, limit = "GPU", MAX_LOGITS_FRACTION
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        owner, limit = "machine", MAX_LOGITS_FRACTION_CPU
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if logits_bytes <= limit * memory:
        return None
    sizes = f"{logits_bytes / 2**30:.0f} of {memory / 2**30:.0f} GiB"
    return f"its logits alone take {sizes}, more than {limit:.0%} of the {owner}'s memory"


class _Measurement:
    """The peers of a problem: those that are ready, and the reasons of the others. Red: ours is wrong or failed."""

    def __init__(self, problem: Problem, peers: list[Peer], run: Run):
        self.problem, self.peers, self.run = problem, peers, run
        self.ready: dict[str, tuple[Callable, dict]] = {}  # by name: its function, and the facts of its first call
        self.reasons: dict[str, str] = {}
        self.red: set[str] = set()

    def leave_out(self, peer: Peer, reason: str) -> None:
        self.reasons[peer.name] = reason
        word = "red" if peer.name in self.red else "n/a"
        print(f"{self.problem.label}, {peer.name}: {word}, {reason}", file=sys.stderr, flush=True)

    def attempt(self, peer: Peer, action: Callable[[], object]) -> object:
        """Return the action's result, or None if the peer fails, or was left out before.

        Raises:
            RuntimeError: The GPU no longer responds to this process, which can measure nothing more.
        """
        if peer.name in self.reasons:
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return action()
            except Exception as error:  # a peer may raise any error; its rows have it
                reason, wrong = error_in_a_line(error, caught), isinstance(error, WrongResult)
        if peer.ours or (peer.name.startswith("ours") and (wrong or self.run.timer.on_gpu)):
            self.red.add(peer.name)
        self.leave_out(peer, reason)
        self.run.timer.free_memory()  # outside the handler, where the error no longer keeps tensors alive
        self.run.timer.synchronize()
        return None

    def start(self) -> None:
        """Run the problem's gate and every peer's first call."""
        self.attempt(self.peers[0], partial(self.problem.gate, self.run))
        for peer in self.peers:
            if self.run.smoke and not (peer.smoke or peer.ours):
                self.leave_out(peer, "not part of a smoke run")
            elif peer.quadratic and (reason := too_many_logits(self.problem.logits_bytes, self.run.device)):
                self.leave_out(peer, reason)
            ready = self.attempt(peer, partial(self._first_call, peer))
            if ready is not None:
                self.ready[peer.name] = ready

    def _first_call(self, peer: Peer) -> tuple[Callable, dict]:
        start = time.perf_counter()
        function = peer.build()
        results = self.problem.results(function)
        self.run.timer.synchronize()
        facts = {"first_call_s": time.perf_counter() - start}
        facts["error"] = self.problem.check(peer, results, partial(self.problem.results, function))
        del results
        return function, facts | {"peak_mib": self.problem.peak_mib(peer, function, self.run)}

    def times(self) -> dict[tuple[str, Peer], tuple[Plan, list[float]]]:
        """Measure every pass and peer in turn; return the milliseconds of every call."""
        steps = {}
        for what, peer in product(self.problem.cost, self.peers):
            if peer.name in self.ready:
                steps[what, peer] = self.problem.passes(self.ready[peer.name][0])[what]
        attempt = lambda key, action: self.attempt(key[1], action)  # noqa: E731
        return in_turn(self.run.timer, steps, self.run.rounds, self.problem.hides_host, attempt)


def measure_peers(problem: Problem, peers: list[Peer], run: Run) -> list[dict]:
    """Measure every pass and peer of a problem; if the first peer is ours, compare the others with it.

    Returns:
        A row for each pass and peer. If the peer did not run, "latency_ms" is None and "reason" is set; "red" is True
        if a form of ours was wrong or failed.

    Raises:
        RuntimeError: The GPU no longer responds to this process.
    """
    torch.compiler.reset()  # code of other problems counts against the limit of recompilations
    measurement = _Measurement(problem, peers, run)
    measurement.start()
    measured, reasons, rows = measurement.times(), measurement.reasons, []
    compared = peers[0].ours and peers[0].name not in reasons
    for what, peer in product(problem.cost, peers):
        cost = problem.cost_of(peer, what)
        row = {"problem": problem.label, **problem.fields, "pass": what, "peer": peer.name, "latency_ms": None}
        row |= {"flops": cost.flops, "bytes": cost.moved_bytes}
        row |= {"floor_ms": run.ceilings.floor_ms(cost.flops, cost.moved_bytes), "reason": None, **run.facts}
        if peer.name in reasons:
            rows.append(row | {"reason": reasons[peer.name], "red": peer.name in measurement.red})
            continue
        plan, samples = measured[what, peer]
        timing = Timing.of(samples)
        row |= {"latency_ms": timing.median, "low_ms": timing.low, "high_ms": timing.high, "calls": len(samples)}
        row |= {"host_us": plan.host_us, "tflops_per_s": cost.flops / timing.median / 1e9}
        row["of_floor"] = row["floor_ms"] / timing.median
        ours_ms = Timing.of(measured[what, peers[0]][1]).median if compared else None
        row["ours_faster"] = timing.median / ours_ms if compared else None
        rows.append(row | measurement.ready[peer.name][1])
    return rows
