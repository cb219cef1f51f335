"""Whole models as problems: the released form, ours and a ViT of the same sizes, their gate and their cost.

Compiled peers are `torch.compile(model, dynamic=False)` in its default mode, or with CUDA graphs in its mode
"reduce-overhead"; loss and optimiser stay outside. A smoke run uses the backend "eager": it traces the model and
generates no code.

The gate. In fp32 ours must agree with the released form within `TIGHT` (each parameter's gradient of an autoencoder
within 5 %). Under autocast every peer of the same function is compared on the whole batch with the released form in
fp32. It may differ by twice the difference of the released form under autocast, plus `SLACK`: this finds broken
models; the operators' tests judge rounding. If the released form runs out of memory, ours with `backend="torch"`
replaces it.
"""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

from harness import Run, peak_mib

import torch
import torch.nn.functional as F
from measuring import Cost, Peer, WrongResult, relative_difference
from released import ReleasedCRATE, ReleasedCRATEAlpha, ReleasedCRATEMAE
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crate_fast import CRATE, CRATEMAE
from crate_fast.checkpoints import released_state_dict, unwrap_state_dict
from crate_fast.export import export_model, open_exported
from crate_fast.model import ALPHA_OPTIONS
from crate_fast.train.cost import Flops, count_flops

# The gate is in fp32. cuDNN convolves in TF32 by default: the released CRATE-α embeds by a convolution, ours not.
torch.backends.cudnn.allow_tf32 = False

RELEASED, OURS, VIT = "released", "ours", "ViT (timm)"
VISIBLE = "ours, visible only"  # MAE's own form, another function: the encoder gets a quarter of the patches
UNFUSED = "ours, PyTorch"  # `backend="torch"`: replaces the released form if that runs out of memory
ONNX = "ours, onnxruntime"  # on a CPU: the file of `crate-fast export`
COMPILED, GRAPHS = ", compiled", ", CUDA graphs"  # behind a peer's name
TRAINING, INFERENCE = "training step", "inference"
MASK_RATIO = 0.75

OUTPUT, GRADIENT, WORST = "output", "gradient", "a parameter's gradient"
# Rounding that moves a ReLU's argument across zero changes one parameter's gradient by up to a few 1e-3 of its norm.
# A scale that is 2 % wrong, or a missing term, changes the gradient of some parameter by more than 1e-2.
TIGHT = {OUTPUT: 1e-4, GRADIENT: 1e-3, WORST: 1e-2}  # in fp32
# In bf16 there are many such ReLUs. On a few images the gradient of either form differed from fp32's by 1 to 6 %, one
# parameter's by 6 to 25 %, and the closer form changed with the images. So these are added to twice the difference.
SLACK = {OUTPUT: 0.01, GRADIENT: 0.1, WORST: 0.3}


@dataclass(frozen=True)
class Size:
    """A model and the images per batch."""

    width: int  # C
    depth: int  # layers; an autoencoder has twice as many
    heads: int  # H, each C/H wide
    patch: int  # side in pixels
    batch: int
    image: int = 224
    masked: bool = False  # a CRATE-MAE
    alpha: bool = False  # a CRATE-α
    classes: int = 1000

    @property
    def n_patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2

    @property
    def n_tokens(self) -> int:
        """N, with CLS."""
        return self.n_patches + 1


def build_model(peer: str, size: Size) -> nn.Module:
    """Build a peer's model, not compiled, with random weights."""
    kind = peer.removesuffix(COMPILED).removesuffix(GRAPHS)
    backend = {"backend": "torch"} if kind == UNFUSED else {}
    if size.masked or kind == VIT:
        options = {"img_size": size.image, "patch_size": size.patch, "embed_dim": size.width, "depth": size.depth}
        options["num_heads"] = size.heads
        if kind == VIT:
            return VisionTransformer(**options, num_classes=size.classes)
        if kind == RELEASED:
            return ReleasedCRATEMAE(**options, norm_pix_loss=True)
        return CRATEMAE(**options, norm_pix_loss=True, visible_only=kind == VISIBLE, **backend)
    options = {"image_size": size.image, "patch_size": size.patch, "num_classes": size.classes, "dim": size.width}
    options |= {"depth": size.depth, "heads": size.heads}
    if size.alpha and kind == RELEASED:
        return ReleasedCRATEAlpha(**options)
    options |= {"dim_head": size.width // size.heads} | (ALPHA_OPTIONS if size.alpha else {})
    return ReleasedCRATE(**options) if kind == RELEASED else CRATE(**options, **backend)


def _make_inputs(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw images [B, 3, S, S], and labels [B], or for an autoencoder the noise [B, patches] of the mask."""
    options = {"generator": torch.Generator(device).manual_seed(1), "device": device}
    images = torch.randn(size.batch, 3, size.image, size.image, **options)
    if size.masked:
        return images, torch.rand(size.batch, size.n_patches, **options)
    return images, torch.randint(size.classes, (size.batch,), **options)


class Trial:
    """A peer with its batch and optimiser; the learning rate is 0, so the weights stay."""

    def __init__(
        self,
        problem: "ModelProblem",
        peer: str,
        cast: torch.dtype | None,  # dtype of autocast
        compiler: str = "inductor",  # torch.compile's backend
    ):
        size, device, what, self.cast = problem.size, problem.device, problem.what, cast
        torch.manual_seed(0)
        with device:
            self.model = build_model(peer, size)
        state = None if peer.startswith(VIT) else problem.state
        if state is not None and isinstance(self.model, ReleasedCRATEAlpha):
            ours = build_model(OURS, size)
            ours.load_state_dict(state)
            state = released_state_dict(ours)
        if state is not None:
            self.model.load_state_dict(state)
        self.model.train(what == TRAINING)
        self.function = self.model
        self.warm_ups = 2 if peer.endswith(GRAPHS) else 0  # with CUDA graphs only the third call is a replay
        if peer.endswith((COMPILED, GRAPHS)):
            mode = "reduce-overhead" if peer.endswith(GRAPHS) and compiler == "inductor" else None
            self.function = torch.compile(self.model, dynamic=False, backend=compiler, mode=mode)
        if peer == ONNX:
            self.function = _exported(self.model)
        self.inputs, self.optimizer = _make_inputs(size, device), None
        if what == TRAINING:
            fused = {"fused": True} if device.type == "cuda" else {}
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, **fused)

    def step(self) -> Tensor:
        """Do the timed work and return the output."""
        return (self._infer if self.optimizer is None else self._train)(*self.inputs)

    def _forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, logits [B, classes]), or an autoencoder's (loss, pixels [B, patches, p·p·3])."""
        with torch.autocast(images.device.type, self.cast, enabled=self.cast is not None):
            if isinstance(self.model, CRATEMAE | ReleasedCRATEMAE):
                return self.function(images, MASK_RATIO, noise=targets)[:2]
            logits = self.function(images)
            return F.cross_entropy(logits, targets), logits

    def _train(self, images: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss, output = self._forward(images, targets)
        loss.backward()
        self.optimizer.step()
        return output.detach()

    @torch.inference_mode()
    def _infer(self, images: Tensor, _targets: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.cast, enabled=self.cast is not None):
            return self.function(images)

    def outcome(self) -> dict[str, Tensor]:
        """Return the output, and each parameter's gradient after a training step, by name."""
        if self.optimizer is None:
            return {OUTPUT: self._infer(*self.inputs).float()}
        self.model.zero_grad(set_to_none=True)
        loss, output = self._forward(*self.inputs)
        loss.backward()
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        if isinstance(self.model, ReleasedCRATEAlpha):
            found = dict(unwrap_state_dict(found))
        return {OUTPUT: output.detach().to(torch.float32, copy=True)} | found  # the next CUDA graph overwrites it


def _exported(model: nn.Module) -> Callable[[Tensor], Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        export_model(model, folder, formats=["onnx"])
        run = open_exported(Path(folder) / "model.onnx")
    return lambda images: run(images)["logits"]


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return relative norms of the differences: of the output, the whole gradient, and the worst parameter gradient.

    Both dictionaries have "output" and any gradients by parameter name.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"gradients of other parameters: {sorted(found.keys() ^ expected.keys())}")
    result = {OUTPUT: relative_difference(found[OUTPUT], expected[OUTPUT])}
    names = [name for name in expected if name != OUTPUT]
    if names:
        whole = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (found, expected))
        result[GRADIENT] = relative_difference(*whole)
        result[WORST] = max(relative_difference(found[name], expected[name]) for name in names)
    return result


# --- the problem --------------------------------------------------------------------------------------------------


@cache
def meta_model(kind: str, size: Size) -> nn.Module:
    """Build a model on the meta device."""
    with torch.device("meta"):
        return build_model(kind, size)


@cache
def _flops(kind: str, size: Size) -> Flops:
    return count_flops(meta_model(kind, size), size.image, MASK_RATIO)


def cost(peer: str, size: Size, what: str, dtype: torch.dtype) -> Cost:
    """Count the FLOPs (by `count_flops`, equal for all forms of a model) and bytes of one pass of a batch.

    The images are read. Each weight is read in fp32 by forward and by backward, and its gradient is written; AdamW
    reads weight, gradient and two moments and writes all but the gradient. Each layer's output is written and read
    once, in `dtype`; in training it is read once more, and its gradient is written and read.
    """
    kind = peer.removesuffix(COMPILED) if peer.startswith((VIT, VISIBLE)) else OURS
    model = meta_model(kind, size)
    flops = _flops(kind, size)
    tokens = size.depth * size.n_tokens * (2 if size.masked else 1)  # with the decoder's layers
    if kind == VISIBLE:
        tokens -= size.depth * (size.n_patches - model.kept(MASK_RATIO))
    images, weights = 4 * size.batch * 3 * size.image**2, 4 * sum(p.numel() for p in model.parameters())
    outputs = dtype.itemsize * size.batch * tokens * size.width
    if what == TRAINING:
        return Cost(float(size.batch * flops.step), float(images + 10 * weights + 5 * outputs))
    return Cost(float(size.batch * flops.forward), float(images + weights + 2 * outputs))


@dataclass
class ModelProblem:
    """A model, its batch and one pass."""

    graphed: ClassVar[bool] = False  # a slow host counts

    label: str  # name in messages
    size: Size
    what: str  # TRAINING or INFERENCE
    device: torch.device
    cast: torch.dtype | None  # autocast's dtype
    state: dict[str, Tensor] | None = field(repr=False)  # weights of all peers but the ViT; None: random ones
    fields: dict[str, object]  # for its rows
    # output and gradients that peers are compared with; from the gate
    truth: dict[str, Tensor] = field(default_factory=dict, repr=False)
    allowed: dict[str, float] = field(default_factory=dict)  # how far they may be from it

    @property
    def timed(self) -> tuple[str]:
        """The passes."""
        return (self.what,)

    def results(self, trial: Trial) -> dict[str, Tensor]:
        """Return output and gradients of the batch."""
        for _ in range(trial.warm_ups):
            trial.outcome()
        return trial.outcome()

    def passes(self, trial: Trial) -> dict[str, Callable[[], object]]:
        """Return the call to time."""
        return {self.what: trial.step}

    def check(self, peer: Peer, results: dict[str, Tensor], _ours: object) -> None:
        """Raise WrongResult if a peer differs from the truth, or is not finite."""
        if not all(bool(tensor.isfinite().all()) for tensor in results.values()):
            raise WrongResult("not finite")
        if self.truth and not peer.name.startswith((VIT, VISIBLE)):
            self.judge(peer.name, differences(results, self.truth), self.allowed)

    def judge(self, peer: str, found: dict[str, float], allowed: dict[str, float]) -> None:
        """Print the differences of a peer; raise WrongResult if one is too large."""
        shown = ", ".join(f"{name} {value:.1e} (≤ {allowed[name]:.1e})" for name, value in found.items())
        print(f"{self.label}, {peer}: differs from {self.fields['compared_with']!r} in fp32 by {shown}", flush=True)
        if wrong := [name for name, value in found.items() if not value <= allowed[name]]:
            raise WrongResult(f"the peers disagree: {', '.join(wrong)} of {peer!r}")

    def peak_mib(self, peer: Peer, trial: Trial, run: Run) -> float | None:
        """Measure the peak extra memory of a step on a GPU, or of two steps in a fresh process on a CPU.

        Gradients count, weights do not, the optimiser's moments on a CPU alone. None in a smoke run, on a CPU for
        peers that are compiled or exported there, and with CUDA graphs, whose memory was allocated before.
        """
        trial.step()  # the optimiser's moments are there from now on
        trial.model.zero_grad(set_to_none=True)
        if peer.name.endswith(GRAPHS):
            return None
        if run.on_gpu:
            return run.peak_mib(trial.step)
        if peer.compiles or run.smoke or peer.name == ONNX:
            return None
        return peak_mib(partial(_fresh_step, replace(self, state=None, truth={}), peer.name))

    def cost_of(self, peer: Peer, what: str) -> Cost:
        """Return the cost of a pass."""
        return cost(peer.name, self.size, what, self.cast or torch.float32)

    # --- the gate -------------------------------------------------------------------------------------------------

    def _outcome(self, peer: str, cast: torch.dtype | None, run: Run) -> dict[str, Tensor]:
        outcome = Trial(self, peer, cast).outcome()
        run.free_memory()
        return outcome

    def gate(self, run: Run) -> None:
        """Compute the truth and the allowed differences under autocast; raise WrongResult if ours differs in fp32."""
        reference, truth = RELEASED, None
        with suppress(torch.OutOfMemoryError):
            truth = self._outcome(RELEASED, None, run)
        if truth is None:
            run.free_memory()
            reference, truth = UNFUSED, self._outcome(UNFUSED, None, run)
        self.truth, self.fields["compared_with"] = truth, reference
        tight = self.allowed = TIGHT | ({WORST: 0.05} if self.size.masked else {})
        if self.cast is None:
            return  # ours is compared when it is built
        rounding = differences(self._outcome(reference, self.cast, run), self.truth)
        self.allowed = {name: 2 * value + SLACK[name] for name, value in rounding.items()}
        self.judge(OURS, differences(self._outcome(OURS, None, run), self.truth), tight)


def _fresh_step(problem: ModelProblem, peer: str) -> Callable[[], Tensor]:
    return Trial(problem, peer, problem.cast).step


def make_problem(name: str, size: Size, what: str, run: Run) -> ModelProblem:
    """Make the problem, with weights from a seed."""
    cast = None if run.dtype == torch.float32 else run.dtype
    dtype = str(run.dtype).removeprefix("torch.")
    fields = {"model": name, "batch": size.batch, "n_tokens": size.n_tokens, "width": size.width, "depth": size.depth}
    fields |= {"heads": size.heads, "patch": size.patch, "image": size.image}
    fields["dtype"] = dtype if cast is None else f"autocast {dtype}"
    torch.manual_seed(0)
    with run.device:
        state = build_model(OURS, size).state_dict()  # with an autoencoder's fixed positions, which are parameters
    return ModelProblem(f"{name}, {what}", size, what, run.device, cast, state, fields)


def peers(problem: ModelProblem, names: list[str], run: Run) -> list[Peer]:
    """Make the named peers, in order; the others are compared with the first."""
    compiler = "eager" if run.smoke else "inductor"
    return [
        Peer(
            name,
            partial(Trial, problem, name, problem.cast, compiler),
            compiles=name.endswith((COMPILED, GRAPHS)) and not run.smoke,
        )
        for name in names
    ]
