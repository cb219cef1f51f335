"""Training speed beside busy processes, by how long OpenMP's threads spin at a barrier.

    python benchmarks/bench_busy_cpu.py        # five minutes on two cores, otherwise idle; --smoke for some seconds

PyTorch's threads meet at a barrier after every operator. By default a thread that arrives first spins 300,000 times
before it sleeps; where another process has the core of the thread it waits for, everybody loses that time. A row is a
policy and a number of busy processes beside; `share` is the speed over a fair share of the quiet default, cores /
(cores + busy processes).
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time

from harness import markdown_table, write_results

from crate_fast import SPIN_COUNT

DEFAULT = "OpenMP's default"
POLICIES = {
    DEFAULT: {"GOMP_SPINCOUNT": "300000"},
    f"GOMP_SPINCOUNT={SPIN_COUNT} (ours)": {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
BUSY = (0, 2)
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_STEPS = """
import sys, time
import torch
from crate_fast import CRATE

torch.manual_seed(0)
model = CRATE(image_size=64, patch_size=8, num_classes=12, dim=96, depth=4, heads=3, dim_head=32)
optimizer = torch.optim.AdamW(model.parameters())
images = torch.randn(64, 3, 64, 64)
steps, began = -2, None
while began is None or time.perf_counter() - began < float(sys.argv[1]):
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()
    steps += 1
    if steps == 0:
        began = time.perf_counter()
print(len(images) * steps / (time.perf_counter() - began))
"""


def _spin() -> None:
    while True:
        pass


def images_per_s(policy: dict[str, str], seconds: float) -> float:
    """Train a small CRATE in a new process, since OpenMP reads its settings when it is loaded."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES} | policy
    command = [sys.executable, "-c", _STEPS, str(seconds)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def measure(busy: tuple[int, ...], rounds: int, seconds: float) -> list[dict]:
    """Measure a row per number of busy processes and policy; the policies take turns."""
    rows, quiet = [], {}
    cores = len(os.sched_getaffinity(0))
    for count in busy:
        others = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(count)]
        for process in others:
            process.start()
        samples: dict[str, list[float]] = {name: [] for name in POLICIES}
        for _ in range(rounds):
            for name, policy in POLICIES.items():
                samples[name].append(images_per_s(policy, seconds))
        for process in others:
            process.kill()
        for name, values in samples.items():
            median = statistics.median(values)
            quiet.setdefault(name, median)
            fair = quiet[DEFAULT] * cores / (cores + count)
            row = {"busy processes": count, "policy": name, "images_per_s": median}
            rows.append(row | {"range": f"{min(values):.0f}–{max(values):.0f}", "share": median / fair})
            print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/busy_cpu.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a step of each, to see that it runs; writes nothing")
    options = parser.parse_args(argv)
    began = time.perf_counter()
    rows = measure((0, 1), 1, 0.01) if options.smoke else measure(BUSY, 3, 4.0)
    if not options.smoke:
        table = markdown_table(rows)
        print(table)
        write_results("busy_cpu", rows, table)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
