"""MaskCut: seconds an image against the dense generalised eigenproblem, and memory as the grid grows.

    python benchmarks/bench_maskcut.py            # results/maskcut.{json,md}; about ten minutes on two cores
    python benchmarks/bench_maskcut.py --smoke    # small, anywhere, nothing written

The peer is the formulation of TokenCut and CutLER: scipy.linalg.eigh(D − A, D, subset_by_index=[1, 2]) in float64,
with the tests' dense oracle around it. Both get the same features; masks that differ stop the benchmark.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import markdown_table, peak_mib, write_results
from torch import Tensor

from crate_fast.eval.images import batches, open_images
from crate_fast.eval.maskcut import maskcut
from crate_fast.eval.models import open_model
from crate_fast.eval.normalized_cut import second_eigenvector

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import maskcut_oracle

TAU, OBJECTS = 0.15, 3


def _features(model: str, data: str, size: int, count: int) -> list[Tensor]:
    """Patch features [P, C] of the first images at the model's default layer."""
    subject = open_model(model, image_size=size)
    layer = subject.extract.default_layer
    found: list[Tensor] = []
    for batch in batches(open_images(data, size, count), 1, []):
        found += subject.extract(subject.normalize(batch.images), [layer]).keys(layer)
    return [features.clone() for features in found]


def _seconds(call: Callable[[], object], repeats: int) -> tuple[float, object]:
    """(median seconds, the last value)."""
    times, value = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        value = call()
        times.append(time.perf_counter() - began)
    return float(np.median(times)), value


def _compare(features: Tensor, repeats: int) -> dict:
    """Both ways on one image, whole and the first eigenproblem alone."""
    side = round(len(features) ** 0.5)
    numpy = features.numpy()
    matrix = maskcut_oracle.affinity(numpy.astype(np.float64), TAU, 1e-5)
    links = torch.from_numpy((matrix > 0.5).astype(np.float32))[None]
    maskcut(features, OBJECTS, TAU)  # warm
    eigen, cut = _seconds(lambda: second_eigenvector(links), repeats)
    whole, result = _seconds(lambda: maskcut(features, OBJECTS, TAU), repeats)
    dense_eigen, (_, vector) = _seconds(lambda: maskcut_oracle.second_eigenvector(matrix), 1)
    dense_whole, masks = _seconds(lambda: maskcut_oracle.maskcut_oracle(numpy, (side, side), OBJECTS, TAU), 1)
    fast = cut.vector[0].double().numpy()
    if not np.array_equal(fast > fast.mean(), vector > vector.mean()):
        raise SystemExit("the two eigenvectors cut the graph differently: no numbers")
    if not np.array_equal(result.masks[0].numpy(), masks):
        raise SystemExit("the two give different masks: no numbers")
    return {
        "patches": len(features),
        "objects": int(masks.any(axis=(1, 2)).sum()),
        "eigenproblem, ours s": eigen,
        "dense s": dense_eigen,
        "ratio": dense_eigen / eigen,
        "image, ours s": whole,
        "image, dense s": dense_whole,
        "image ratio": dense_whole / whole,
        "largest residual": float(np.nanmax(result.residuals.numpy())),
        "solvers": str(result.solvers[0].tolist()),
    }


def _planted(side: int, shared: float, width: int = 384) -> Tensor:
    """Features of a background and three objects, for any grid.

    With `shared` 0.43 a fifth of the pairs of object and background are linked; with 0 none is, and the graph falls
    into four parts.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.zeros(side, side, width)
    features[..., 0] = 1.0
    places = ((1, 5, 1, 6), (6, 9, 5, 9), (2, 4, 7, 9))
    for k, (top, bottom, left, right) in enumerate(places, start=1):
        box = slice(top * side // 10, bottom * side // 10), slice(left * side // 10, right * side // 10)
        features[box] = 0.0
        features[(*box, k)] = 1.0
    features[..., -1] += shared
    noise = torch.randn(features.shape, generator=generator) / width**0.5
    return (features + 0.5 * noise).flatten(0, 1)


def _ours(side: int, shared: float) -> Callable[[], object]:
    features = _planted(side, shared)
    return lambda: maskcut(features, OBJECTS, TAU)


def _dense(side: int, shared: float) -> Callable[[], object]:
    features = _planted(side, shared).numpy()
    return lambda: maskcut_oracle.maskcut_oracle(features, (side, side), 1, TAU)


def _growth(sides: list[int], dense_sides: list[int]) -> list[dict]:
    """Seconds and peak memory of ours as the grid grows, and of one dense eigenproblem where it is affordable."""
    rows = []
    for side, (graph, shared) in itertools.product(sides, (("connected", 0.43), ("in four parts", 0.0))):
        call = _ours(side, shared)
        call()
        seconds, result = _seconds(call, 3)
        row = {"image at patch 8, px": 8 * side, "patches": side * side, "graph": graph, "ours s": seconds}
        row |= {"solvers": str(result.solvers[0].tolist()), "ours peak MiB": peak_mib(partial(_ours, side, shared))}
        row["dense peak MiB"] = peak_mib(partial(_dense, side, shared)) if side in dense_sides and shared else None
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="crate_small_patch8_224@untrained", help="as in crate-fast eval")
    parser.add_argument("--data", default="shape_scenes", help="as in crate-fast eval")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=5, help="of ours; the dense form runs once")
    parser.add_argument("--name", default="maskcut", help="of the files in benchmarks/results/")
    parser.add_argument("--smoke", action="store_true", help="small and short; writes nothing")
    options = parser.parse_args(argv)
    if options.smoke:
        options.model, options.image_size, options.images, options.repeats = (
            "crate_tiny_patch8_224@untrained",
            96,
            1,
            1,
        )
    images = _features(options.model, options.data, options.image_size, options.images)
    rows = [{"image": i} | _compare(features, options.repeats) for i, features in enumerate(images)]
    growth = _growth([12], [12]) if options.smoke else _growth([60, 80, 100, 120], [60])
    table = markdown_table(rows, list(rows[0]))
    ratios = [float(np.median([row[name] for row in rows])) for name in ("ratio", "image ratio")]
    table += f"\nMedian ratio: eigenproblem {ratios[0]:.0f} (goal 50), a whole image {ratios[1]:.0f} (goal 20).\n\n"
    table += (
        "Features of a background and three objects, C = 384, three objects asked for; solvers: 0 Lanczos, 1 block "
        "Lanczos in fp64, 2 dense:\n\n"
    )
    table += markdown_table(growth, list(growth[0]))
    print(table)
    if not options.smoke:
        more = {"model": options.model, "data": options.data.split(":")[0], "image_size": options.image_size}
        kinds = [{"kind": "image"} | row for row in rows] + [{"kind": "growth"} | row for row in growth]
        write_results(options.name, kinds, table, more=more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
