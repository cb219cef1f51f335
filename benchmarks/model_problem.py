"""One pass of one model as a problem for `gpu.measure`: its peers, what they must agree on, what they take.

The gate. In fp32 ours must be the released form within the limits of `agreement.TIGHT` (one parameter's gradient of
an autoencoder within 5 %). Under autocast every peer that computes the same, compiled or not, is compared on the
whole batch with the released form in fp32 without autocast, and may be at most twice as far from it as the released
form under autocast, and `agreement.SLACK` more: that finds what is broken; rounding is the operators' tests' affair.
Where the released form runs out of memory, ours with `backend="torch"` takes its place.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import ClassVar

import torch
from agreement import SLACK, TIGHT, WORST, differences
from gpu import Peer, Run, Work, Wrong, too_many_logits
from gpu_timing import Step
from harness import peak_mib
from model_peers import (
    COMPILED,
    MASK_RATIO,
    OURS,
    RELEASED,
    TRAINING,
    UNFUSED,
    VISIBLE,
    VIT,
    Size,
    Trial,
    build_model,
    fastest_sdpa,
    kind_of,
)
from torch import Tensor, nn

from crate_fast.train.plan import Flops, count_flops

__all__ = ["ModelProblem", "make_problem", "meta_model", "peers", "work"]

CHUNK_LOGITS = 2**30  # of all layers, computed at once by the gate: 16 GiB or so as the released form keeps them


@cache
def meta_model(kind: str, size: Size) -> nn.Module:
    """A model with shapes and no data."""
    with torch.device("meta"):
        return build_model(kind, size)


@cache
def _flops(kind: str, size: Size) -> Flops:
    return count_flops(meta_model(kind, size), size.image, MASK_RATIO)


def work(peer: str, size: Size, batch: int, what: str, dtype: torch.dtype) -> Work:
    """What one pass of a batch takes at least: the FLOPs of `count_flops`, whatever a peer computes, and bytes.

    The images are read; each weight is read in fp32 by the forward and by the backward pass, its gradient written,
    and AdamW reads weight, gradient and two moments and writes all but the gradient; each layer's output is written
    and read once, and in training read once more, its gradient written and read, all in `dtype`.
    """
    kind = kind_of(peer) if peer.startswith((VIT, VISIBLE)) else OURS
    model = meta_model(kind, size)
    flops = _flops(kind, size)
    tokens = size.n_layers * size.n_tokens
    if kind == VISIBLE:
        tokens -= size.depth * (size.n_patches - model.kept(MASK_RATIO))
    images, weights = 4 * batch * 3 * size.image**2, 4 * sum(p.numel() for p in model.parameters())
    outputs = dtype.itemsize * batch * tokens * size.width
    if what == TRAINING:
        return Work(float(batch * flops.step), float(images + 10 * weights + 5 * outputs))
    return Work(float(batch * flops.forward), float(images + weights + 2 * outputs))


@dataclass
class ModelProblem:
    """A model, its batch and one pass.

    Args:
        label: As messages name it.
        size, batch: The model and its images.
        what: TRAINING or INFERENCE.
        device, cast: Where; autocast's dtype or None.
        state: Weights of the released form and of ours.
        fields: What its rows carry.
        truth: Output and gradients that peers are compared with; from the gate.
        allowed: How far they may be from it.
    """

    hides_host: ClassVar[bool] = False  # images per second count what the host takes longer than the device
    training: ClassVar[bool] = False  # the gate's first call is not the timed pass's: each peer's own counts

    label: str
    size: Size
    batch: int
    what: str
    device: torch.device
    cast: torch.dtype | None
    state: dict[str, Tensor] = field(repr=False)
    fields: dict[str, object]
    truth: dict[str, Tensor] = field(default_factory=dict, repr=False)
    allowed: dict[str, float] = field(init=False)

    def __post_init__(self):
        self.allowed = TIGHT | ({WORST: 0.05} if self.size.masked else {})

    @property
    def work(self) -> tuple[str]:
        """The passes."""
        return (self.what,)

    @property
    def logits_bytes(self) -> float:
        """What the released form writes of logits in fp32: three copies of a layer's, kept of all in training."""
        layers = self.size.n_layers if self.what == TRAINING else 1
        return 12.0 * layers * self.batch * self.size.heads * self.size.n_tokens**2

    def trial(self, peer: str, cast: torch.dtype | None, **options) -> Trial:
        """A peer ready for its steps; those that compute the same have the same weights."""
        state = None if peer.startswith(VIT) else self.state
        return Trial(peer, self.size, self.batch, self.device, self.what, cast, state, **options)

    # --- what gpu.measure asks for --------------------------------------------------------------------------------

    def results(self, trial: Trial) -> dict[str, Tensor]:
        """Output and gradients of the whole batch at once."""
        return trial.outcome(self.batch)

    def passes(self, trial: Trial) -> dict[str, Step]:
        """What is timed."""
        return {self.what: Step(lambda _: trial.step())}

    def check(self, peer: Peer, results: dict[str, Tensor], _ours: object) -> None:
        """Raise an error where a peer differs from the truth; a ViT's numbers must be finite."""
        if not all(bool(tensor.isfinite().all()) for tensor in results.values()):
            raise Wrong("not finite")
        if peer.name.startswith((VIT, VISIBLE)) or not self.truth:
            return
        found = differences(results, self.truth)
        self.judge(peer.name, found, self.allowed)

    def judge(self, peer: str, found: dict[str, float], allowed: dict[str, float]) -> None:
        """Print the differences of a peer; an exception where one is too large."""
        shown = ", ".join(f"{name} {value:.1e} (≤ {allowed[name]:.1e})" for name, value in found.items())
        print(f"{self.label}, {peer}: differs from {self.fields['compared_with']!r} in fp32 by {shown}", flush=True)
        wrong = [name for name, value in found.items() if not value <= allowed[name]]
        if wrong:
            raise Wrong(f"the peers disagree: {', '.join(wrong)} of {peer!r}")

    def peak_mib(self, peer: Peer, trial: Trial, run: Run) -> float | None:
        """How far a step raises what is allocated on a GPU; on a CPU two steps of a fresh process its memory.

        Gradients count, weights do not, the optimiser's moments on a CPU alone. None on a CPU for compiled peers,
        whose compiling would count, and in a smoke run; None of a graph, whose memory is there before it is replayed.
        """
        if trial.graphed:
            return None
        trial.step()  # the optimiser's moments are there from now on
        trial.model.zero_grad(set_to_none=True)
        if run.timer.on_gpu:
            return run.timer.peak_mib(trial.step)
        if peer.compiles or run.smoke:
            return None
        return peak_mib(partial(_fresh_step, peer.name, self.size, self.batch, self.what, self.cast))

    def work_of(self, peer: Peer, what: str) -> Work:
        """See `work`."""
        return work(peer.name, self.size, self.batch, what, self.cast or torch.float32)

    # --- the gate -------------------------------------------------------------------------------------------------

    @property
    def _chunk(self) -> int:
        """Images that the gate computes at once."""
        logits = self.size.n_layers * self.size.heads * self.size.n_tokens**2
        return max(1, min(self.batch, CHUNK_LOGITS // logits))

    def _outcome(self, peer: str, cast: torch.dtype | None, run: Run) -> dict[str, Tensor]:
        outcome = self.trial(peer, cast).outcome(self._chunk)
        run.timer.free_memory()
        return outcome

    def gate(self, run: Run) -> None:
        """Find the truth and what peers under autocast may differ from it by; Wrong where ours differs in fp32."""
        reference, truth = RELEASED, None
        if not (self.device.type == "cpu" and too_many_logits(self.logits_bytes, self.device)):
            with suppress(torch.OutOfMemoryError):
                truth = self._outcome(RELEASED, None, run)
        if truth is None:
            run.timer.free_memory()
            reference, truth = UNFUSED, self._outcome(UNFUSED, None, run)
        self.truth, self.fields["compared_with"] = truth, reference
        if self.cast is None:
            return  # ours is compared when it is built
        rounding = differences(self._outcome(reference, self.cast, run), self.truth)
        tight, self.allowed = self.allowed, {name: 2 * value + SLACK[name] for name, value in rounding.items()}
        self.judge(OURS, differences(self._outcome(OURS, None, run), self.truth), tight)


def _fresh_step(peer: str, size: Size, batch: int, what: str, cast: torch.dtype | None) -> Callable[[], Tensor]:
    """The step to measure, ready in a fresh process."""
    return Trial(peer, size, batch, torch.device("cpu"), what, cast).step


def _weights(size: Size, device: torch.device) -> dict[str, Tensor]:
    """Drawn from a seed; with the fixed positions of an autoencoder, which are parameters."""
    torch.manual_seed(0)
    with device:
        return build_model(OURS, size).state_dict()


def make_problem(name: str, size: Size, what: str, run: Run, fields: dict[str, object]) -> ModelProblem:
    """The problem, its weights drawn from a seed; `fields` are added to those of its rows."""
    batch = size.batch(run.device)
    cast = None if run.dtype == torch.float32 else run.dtype
    dtype = str(run.dtype).removeprefix("torch.")
    sizes = {"model": name, "batch": batch, "n_tokens": size.n_tokens, "width": size.width, "depth": size.depth}
    sizes |= {"heads": size.heads, "dtype": dtype if cast is None else f"autocast {dtype}"}
    state = _weights(size, run.device)
    return ModelProblem(f"{name}, {what}", size, batch, what, run.device, cast, state, sizes | fields)


def peers(problem: ModelProblem, names: list[str], run: Run) -> list[Peer]:
    """Those of these names, in their order; the first is what the others are compared with."""
    sdpa = None
    if any(name.startswith(VIT) for name in names):
        sdpa = fastest_sdpa(problem.size, problem.batch, run.timer, problem.device, problem.cast or torch.float32)
        problem.fields["vit_attention"] = "PyTorch's choice" if sdpa is None else sdpa.name
    made = []
    for name in names:
        compiles = name.endswith(COMPILED)
        options = {"compiler": "aot_eager" if run.smoke else "inductor"}
        options |= {"sdpa": sdpa} if name.startswith(VIT) else {}
        made.append(
            Peer(
                name,
                partial(problem.trial, name, problem.cast, **options),
                compiles=compiles,
                quadratic=name.startswith(RELEASED) and problem.device.type == "cpu",
                ours=name == OURS,
                smoke=True,
            )
        )
    return made
