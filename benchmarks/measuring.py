"""Problems, their peers, and the measurement of peers in turn: gate, first call, memory, times.

A peer that fails or is wrong has rows with the reason. A smoke run does the same on a CPU, with Triton's interpreter
and a wall clock.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import ClassVar

from harness import Run

import numpy as np
import torch
from torch import Tensor

from crate_fast import probes
from crate_fast.accuracy import gradients, judge

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


@dataclass(frozen=True)
class Peer:
    """An implementation to measure."""

    name: str  # begins with "ours" for forms of this package
    build: Callable[[], Callable[..., Tensor]]  # called once per problem, so that each has its own compiled code
    compiles: bool = False  # its first call takes seconds; not part of a smoke run

    @property
    def ours(self) -> bool:
        """A form of this package, which must be right."""
        return self.name.startswith("ours")


@dataclass(frozen=True)
class Problem:
    """An operator's inputs, its output's gradient, and the cost of each pass.

    Forward builds the graph and keeps the activations for backward, as in training.
    """

    graphed: ClassVar[bool] = True  # timed in CUDA graphs

    label: str
    fields: dict[str, object]  # sizes and dtype, for its rows
    drawn: probes.Problem  # inputs, in the peers' order; the output's gradient; the reference
    cost: dict[str, Cost]  # by pass: "forward" and "forward + backward"
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor  # selects the checked part of a tensor [B, …]

    @property
    def timed(self) -> tuple[str, ...]:
        """The passes."""
        return tuple(self.cost)

    def results(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """Return the output and the gradient of every input."""
        return gradients(function, self.drawn.inputs, self.drawn.grad)

    def passes(self, function: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
        """Return the calls to time."""
        inputs = [tensor.detach().requires_grad_() for tensor in self.drawn.inputs]

        def both() -> object:
            return torch.autograd.grad(function(*inputs), inputs, self.drawn.grad)

        return {"forward": lambda: function(*inputs), "forward + backward": both}

    @cached_property
    def expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """The reference's results on the checked part, in the problem's dtype and in float64."""
        inputs = [self.part(tensor) for tensor in self.drawn.inputs]
        checked = replace(self.drawn, inputs=inputs, grad=self.part(self.drawn.grad))
        return checked.results(checked.reference), checked.truth()

    def gate(self, run: Run) -> None:
        """Prepare `check`. An error here counts as an error of the first peer."""

    def check(self, peer: Peer, found: list[Tensor], again: Callable[[], list[Tensor]]) -> float:
        """Return the largest difference from float64, as a relative norm.

        Raises:
            WrongResult: Ours breaks the tests' rule or has other bits in a second run; a peer is far from float64.
        """
        eager, truth = self.expected
        differences = []
        for name, result, rounded, true in zip(self.drawn.names.split(), found, eager, truth, strict=True):
            part = self.part(result)
            differences.append(relative_difference(part.double(), true))
            if peer.ours:
                judged = judge(part, rounded, true)
                print(f"{self.label}, {name}: {judged.share:.2f} of the error that is allowed")
                if not judged.right:
                    raise WrongResult(f"the error of {name} is {judged.share:.2g}× what is allowed")
            elif not differences[-1] <= PEER_TOLERANCE:
                raise WrongResult(f"its {name} differs from float64 by {differences[-1]:.0%} of the norm")
        if peer.ours and not all(torch.equal(*pair) for pair in zip(found, again(), strict=True)):
            raise WrongResult("a second run gave other bits")
        return max(differences)

    def peak_mib(self, peer: Peer, function: Callable[..., Tensor], run: Run) -> float | None:
        """Measure the memory of all passes together."""
        return run.peak_mib(lambda: self.results(function))

    def cost_of(self, peer: Peer, what: str) -> Cost:
        """Return the cost of a pass, the same for every peer."""
        return self.cost[what]


# --- measuring ----------------------------------------------------------------------------------------------------


def error_in_a_line(error: Exception, caught: Sequence[warnings.WarningMessage] = ()) -> str:
    """Format an error in one line, with the warnings in which SDPA explains why a backend cannot run."""
    hints = dict.fromkeys(str(warning.message).split("\n")[0].split(" (Triggered")[0] for warning in caught)
    text = " ".join([f"{type(error).__name__}: {str(error).strip()}", *hints])
    return " ".join(text.split())[:600]


def measure_peers(problem: Problem, peers: list[Peer], run: Run) -> list[dict]:
    """Measure every pass and peer of a problem; if the first peer is ours, compare the others with it.

    The peers are measured in turn, several times, so that a slow phase of the machine affects all.

    Returns:
        A row for each pass and peer. If the peer did not run, "latency_ms" is None and "reason" is set; "red" is True
        if a form of ours was wrong or failed.

    Raises:
        RuntimeError: The GPU no longer responds to this process, which can measure nothing more.
    """
    torch.compiler.reset()  # code of other problems counts against the limit of recompilations
    reasons: dict[str, str] = {}  # why a peer has no times

    def attempt(peer: Peer, action: Callable[[], object]) -> object:
        if peer.name in reasons:
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return action()
            except Exception as error:  # a peer may raise any error; its rows have it
                reasons[peer.name] = error_in_a_line(error, caught)
        word = "red" if peer.ours else "n/a"
        print(f"{problem.label}, {peer.name}: {word}, {reasons[peer.name]}", file=sys.stderr, flush=True)
        run.free_memory()  # outside the handler, where the error no longer keeps tensors alive
        run.synchronize()
        return None

    attempt(peers[0], partial(problem.gate, run))
    functions, facts, calls = {}, {}, {}
    for peer in peers:
        if run.smoke and peer.compiles:
            reasons[peer.name] = "not part of a smoke run"
        functions[peer.name], facts[peer.name] = attempt(peer, partial(_first_call, problem, peer, run)) or (None, {})
    for what, peer in product(problem.timed, peers):
        if peer.name not in reasons:
            calls[what, peer] = problem.passes(functions[peer.name])[what]
    samples: dict[tuple, list[float]] = {key: [] for key in calls}
    for _ in range(run.rounds):
        for (what, peer), call in calls.items():
            before = run.uncaptured
            samples[what, peer] += attempt(peer, partial(run.sample_ms, call, problem.graphed)) or []
            if run.uncaptured > before:
                facts[peer.name]["captured"] = False  # the host's time counts
    rows = []
    for what, peer in product(problem.timed, peers):
        cost, reason = problem.cost_of(peer, what), reasons.get(peer.name)
        row = {"problem": problem.label, **problem.fields, "pass": what, "peer": peer.name, "latency_ms": None}
        row |= {"flops": cost.flops, "bytes": cost.moved_bytes}
        row |= {"floor_ms": run.floor_ms(cost.flops, cost.moved_bytes), "reason": reason, **run.facts}
        if reason is not None:
            rows.append(row | {"red": peer.ours})
            continue
        low_ms, latency_ms, high_ms = np.quantile(samples[what, peer], (0.2, 0.5, 0.8)).tolist()
        row |= {"latency_ms": latency_ms, "low_ms": low_ms, "high_ms": high_ms, "calls": len(samples[what, peer])}
        row |= {"tflops_per_s": cost.flops / latency_ms / 1e9, "of_floor": row["floor_ms"] / latency_ms}
        compared = peers[0].ours and peers[0].name not in reasons
        row["ours_faster"] = latency_ms / statistics.median(samples[what, peers[0]]) if compared else None
        rows.append(row | facts[peer.name])
    return rows


def _first_call(problem: Problem, peer: Peer, run: Run) -> tuple[Callable, dict]:
    """Build a peer, call it, check its results and measure its memory; return it and these facts."""
    start = time.perf_counter()
    function = peer.build()
    results = problem.results(function)
    run.synchronize()
    facts = {"first_call_s": time.perf_counter() - start}
    facts["error"] = problem.check(peer, results, partial(problem.results, function))
    del results
    return function, facts | {"peak_mib": problem.peak_mib(peer, function, run)}
