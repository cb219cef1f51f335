"""CRATE on a CPU in fp32: training step and inference against the released form, same weights, in one run.

    python benchmarks/bench_cpu.py            # a quarter of an hour on two cores; --smoke for half a minute

Peers: the released form (three-product ISTA, attention written out, PyTorch's default products), and ours with the
library of products that the processor was not given (`CRATE_FAST_ONEDNN` on or off).
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from harness import RESULTS, TIGHT, differences, interleaved, markdown_table, peak_mib, write_results

import torch
import torch.nn.functional as F
from released import ReleasedCRATE
from torch import nn

from crate_fast import CRATE
from crate_fast.cpu import onednn_suits_processor

SHAPES = {  # name: (model, batch)
    "T/16": ({"patch_size": 16, "dim": 384, "heads": 6}, 8),
    "S/8": ({"patch_size": 8, "dim": 384, "heads": 6}, 4),
    "B/16": ({"patch_size": 16, "dim": 768, "heads": 12}, 8),
}
COMMON = {"image_size": 224, "num_classes": 1000, "depth": 12}
SMOKE = {"smoke": ({"patch_size": 16, "dim": 64, "heads": 2, "dim_head": 32, "depth": 2, "image_size": 64}, 2)}
OTHER = ("ours, oneDNN off", "0") if onednn_suits_processor() else ("ours, oneDNN on", "1")
PEERS = {"released": (ReleasedCRATE, None), OTHER[0]: (CRATE, OTHER[1]), "ours": (CRATE, None)}


def _choose(onednn: str | None) -> None:
    os.environ.pop("CRATE_FAST_ONEDNN", None)
    if onednn is not None:
        os.environ["CRATE_FAST_ONEDNN"] = onednn


def _train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, onednn: str | None, optimizer) -> None:
    _choose(onednn)
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


@torch.inference_mode()
def _infer(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, onednn: str | None, optimizer
) -> torch.Tensor:
    _choose(onednn)
    return model(images)


CALLS = {"training step": _train, "inference": _infer}


def _build(peer: str, settings: dict, batch: int, state: dict | None = None) -> tuple:
    """(model, images, labels, onednn, optimizer), the same numbers for every peer; the step size 0 keeps them so."""
    model_class, onednn = PEERS[peer]
    torch.manual_seed(0)
    model = model_class(**(COMMON | settings))
    if state is not None:
        model.load_state_dict(state)
    size = (COMMON | settings)["image_size"]
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    return model, images, labels, onednn, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)


def _prepare(peer: str, what: str, settings: dict, batch: int):
    """For `peak_mib`: the call to measure, ready in a fresh process."""
    return partial(CALLS[what], *_build(peer, settings, batch))


def _check_equal(built: dict[str, tuple]) -> None:
    """The gate: logits and gradients of every peer against the first's."""
    found = {}
    for peer, arguments in built.items():
        logits = _infer(*arguments)
        _train(*arguments)
        found[peer] = {"output": logits} | {name: p.grad for name, p in arguments[0].named_parameters()}
    first = next(iter(built))
    for peer in built:
        for name, value in differences(found[peer], found[first]).items():
            if not value < TIGHT[name]:
                raise SystemExit(
                    f"the peers disagree: {name} of {peer!r} by {value:.1e}, allowed {TIGHT[name]:.0e}: no numbers"
                )


def measure(shapes: dict, rounds: int) -> list[dict]:
    """One row per shape, call and peer."""
    rows = []
    for name, (settings, batch) in shapes.items():
        torch.manual_seed(0)
        state = ReleasedCRATE(**(COMMON | settings)).state_dict()
        built = {peer: _build(peer, settings, batch, state) for peer in PEERS}
        _check_equal(built)
        for what, call in CALLS.items():
            timings = interleaved({peer: partial(call, *arguments) for peer, arguments in built.items()}, rounds)
            memory = {peer: peak_mib(partial(_prepare, peer, what, settings, batch)) for peer in PEERS}
            for peer, timing in timings.items():
                rows.append(
                    {
                        "model": name,
                        "what": what,
                        "batch": batch,
                        "peer": peer,
                        "latency_ms": timing.median * 1e3,
                        "20-80 %": f"{timing.low * 1e3:.0f}–{timing.high * 1e3:.0f}",
                        "images_per_s": batch / timing.median,
                        "speed": timings["released"].median / timing.median,
                        "peak_mib": memory[peer],
                    }
                )
                print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/cpu.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs; writes nothing")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    shapes = SMOKE if options.smoke else {name: SHAPES[name] for name in options.models}
    rows = measure(shapes, 2 if options.smoke else options.rounds)
    columns = ["model", "what", "batch", "peer", "latency_ms", "20-80 %", "images_per_s", "speed", "peak_mib"]
    table = markdown_table(rows, columns)
    print("\n" + table)
    if not options.smoke:
        for path in write_results("cpu", rows, table, options.output):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
