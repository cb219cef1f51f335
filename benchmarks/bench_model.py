"""A training step of CRATE-MAE (forward, backward, AdamW): the released form against ours, and visible-only apart.

    python benchmarks/bench_model.py            # on a GPU if there is one: bf16 autocast; else fp32 on the CPU
    python benchmarks/bench_model.py --smoke    # tiny, anywhere, writes nothing

Released form and ours have the same weights, images and masks; losses and gradients are compared first, and where
they differ there are no numbers. `visible_only` computes something else, MAE's own form: its encoder sees a quarter
of the patches. Memory: on a GPU how far a step raises what is allocated; on a CPU how far two steps raise a fresh
process's resident memory.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gpu_timing import Step, Timer
from harness import RESULTS, Timing, interleaved, markdown_table, peak_mib, write_results
from released import ReleasedCRATEMAE
from torch import Tensor, nn

from crate_fast import CRATEMAE

SIZES = {  # width, layers of encoder and of decoder, heads; batch on a CPU and on a GPU
    "CRATE-MAE-T": ({"embed_dim": 384, "depth": 12, "num_heads": 6}, 8, 256),
    "CRATE-MAE-S": ({"embed_dim": 576, "depth": 12, "num_heads": 12}, 4, 256),
    "CRATE-MAE-B": ({"embed_dim": 768, "depth": 12, "num_heads": 12}, 4, 256),
    "CRATE-MAE-L": ({"embed_dim": 1024, "depth": 24, "num_heads": 16}, 2, 128),
}
COMMON = {"img_size": 224, "patch_size": 16, "norm_pix_loss": True}
SMOKE = {"smoke": ({"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}, 2, 2)}
ON_A_CPU = ("CRATE-MAE-T", "CRATE-MAE-B")
RATIO = 0.75
RELEASED, OURS, VISIBLE = "released", "ours", "ours, visible only"


class _Step:
    """A peer with everything it needs for a step; the step size 0 keeps its weights.

    Args:
        peer: Which.
        settings: Of the model.
        batch: Images.
        device: Where.
        state: Of the weights; drawn from a seed when None.
    """

    def __init__(self, peer: str, settings: dict, batch: int, device: str, state: dict | None = None):
        torch.manual_seed(0)
        self.peer, self.device = peer, torch.device(device)
        arguments = COMMON | settings
        if peer == RELEASED:
            self.model: nn.Module = ReleasedCRATEMAE(**arguments)
        else:
            self.model = CRATEMAE(**arguments, visible_only=peer == VISIBLE)
        if state is not None:
            self.model.load_state_dict(state)
        self.model.to(device)
        side = arguments["img_size"]
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(batch, 3, side, side, generator=generator).to(device)
        n_patches = (side // arguments["patch_size"]) ** 2
        self.noise = torch.rand(batch, n_patches, generator=generator).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def __call__(self, _argument: object = None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, _, _ = self.model(self.images, RATIO, noise=self.noise)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradient(self) -> Tensor:
        """All gradients of the last step, in one vector."""
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def _check_equal(theirs: _Step, ours: _Step, limits: tuple[float, float]) -> None:
    """The gate: relative differences of the losses and of the whole gradient."""
    losses = theirs().item(), ours().item()
    expected, found = theirs.gradient(), ours.gradient()
    differences = {
        "loss": abs(losses[0] - losses[1]) / losses[0],
        "gradient": ((found - expected).norm() / expected.norm()).item(),
    }
    for (name, value), limit in zip(differences.items(), limits, strict=True):
        if not value < limit:
            raise SystemExit(f"the peers disagree: {name} by {value:.1e}, allowed {limit:.0e}: no numbers")


def _times_on_gpu(steps: dict[str, _Step], rounds: int, timer: Timer) -> dict[str, Timing]:
    plans = {peer: timer.plan(Step(step)) for peer, step in steps.items()}
    samples: dict[str, list[float]] = {peer: [] for peer in steps}
    for _ in range(rounds):
        for peer, step in steps.items():
            times = timer.sample(Step(step), plans[peer].calls, plans[peer].flushes)
            samples[peer].append(statistics.median(times) / 1e3)
    return {peer: Timing(*np.quantile(values, (0.5, 0.2, 0.8)).tolist()) for peer, values in samples.items()}


def measure(sizes: dict, rounds: int, device: str) -> list[dict]:
    """A row a size and peer."""
    on_gpu, rows = device == "cuda", []
    timer = Timer(torch.device(device))
    for name, (settings, on_cpu, on_device) in sizes.items():
        batch = on_device if on_gpu else on_cpu
        state = _Step(OURS, settings, 1, "cpu").model.state_dict()
        steps = {peer: _Step(peer, settings, batch, device, state) for peer in (RELEASED, OURS, VISIBLE)}
        _check_equal(steps[RELEASED], steps[OURS], (1e-2, 5e-2) if on_gpu else (1e-5, 1e-3))
        if on_gpu:
            timings = _times_on_gpu(steps, rounds, timer)
            memory = {peer: timer.peak_mib(step) for peer, step in steps.items()}
        else:
            timings = interleaved(steps, rounds)
            memory = {peer: peak_mib(partial(_Step, peer, settings, batch, device)) for peer in steps}
        for peer, timing in timings.items():
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "peer": peer,
                    "latency_ms": timing.median * 1e3,
                    "20-80 %": f"{timing.low * 1e3:.0f}–{timing.high * 1e3:.0f}",
                    "images_per_s": batch / timing.median,
                    "speed": timings[RELEASED].median / timing.median,
                    "peak_mib": memory[peer],
                }
            )
            print(rows[-1], flush=True)
        del steps
        timer.free_memory()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, and write benchmarks/results/model_{cpu,gpu}.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs; writes nothing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=SIZES, help="default: all on a GPU, T and B on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = options.models or (SIZES if device == "cuda" else ON_A_CPU)
    rows = measure(SMOKE if options.smoke else {name: SIZES[name] for name in names}, options.rounds, device)
    columns = ["model", "batch", "peer", "latency_ms", "20-80 %", "images_per_s", "speed", "peak_mib"]
    table = markdown_table(rows, columns)
    print("\n" + table)
    if not options.smoke:
        kind = "gpu" if device == "cuda" else "cpu"
        precision = {"precision": "bf16 autocast" if device == "cuda" else "fp32", "mask_ratio": RATIO}
        for path in write_results(f"model_{kind}", rows, table, options.output, precision):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
