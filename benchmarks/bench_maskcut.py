"""MaskCut: seconds per image compared with SciPy's two eigensolvers, and memory by the size of the grid.

    python benchmarks/bench_maskcut.py            # results/maskcut.{json,md}; about ten minutes on two cores
    python benchmarks/bench_maskcut.py --smoke    # small, anywhere, nothing written

The peers solve the same problem in float64, within the tests' oracle (maskcut_oracle.py):

    dense    scipy.linalg.eigh(D − A, D, subset_by_index=[1, 2]), as TokenCut and CutLER do
    eigsh    scipy.sparse.linalg.eigsh(D^-½AD^-½, 2, which="LA"), ARPACK's Lanczos on the normalised affinities

All have the same features and are timed in turn. The benchmark stops if their cuts or masks differ.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Collection
from functools import partial

from harness import interleaved, peak_mib, write_results

import maskcut_oracle
import numpy as np
import torch
from gpu_report import markdown_table
from scipy.sparse.linalg import eigsh
from torch import Tensor

from crate_fast.eval.common.images import batches, open_images
from crate_fast.eval.common.models import open_model
from crate_fast.eval.common.normalized_cut import second_eigenvector
from crate_fast.eval.maskcut import maskcut

TAU, OBJECTS = 0.15, 3
DATA = "shape_scenes"


def _features(model: str, size: int, count: int) -> list[Tensor]:
    """Compute patch features [P, C] of the first images at the model's default layer."""
    loaded = open_model(model, image_size=size)
    layer = loaded.extract.default_layer
    found: list[Tensor] = []
    for batch in batches(open_images(DATA, size, count), 1, []):
        found += loaded.extract(loaded.normalize(batch.images), [layer]).keys(layer)
    return [features.clone() for features in found]


def _eigsh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return λ₂ and v₂ as the oracle's `second_eigenvector` does."""
    inverse_root = 1 / np.sqrt(matrix.sum(axis=1))
    values, vectors = eigsh(inverse_root[:, None] * matrix * inverse_root, 2, which="LA")  # ascending
    vector = inverse_root * vectors[:, 0]
    vector /= np.abs(vector).max()
    return 1 - values[:1], vector * np.sign(vector[maskcut_oracle.first(np.abs(vector), 1.0)])


def _compare(features: Tensor, rounds: int) -> dict:
    """Measure all three on one image: all of MaskCut, and the first eigenproblem alone."""
    side = round(len(features) ** 0.5)
    numpy = features.numpy()
    matrix = maskcut_oracle.affinity(numpy.astype(np.float64), TAU, 1e-5)
    links = torch.from_numpy((matrix > 0.5).astype(np.float32))[None]

    def oracle(solve: Callable) -> Callable[[], np.ndarray]:
        return lambda: maskcut_oracle.maskcut_oracle(numpy, (side, side), OBJECTS, TAU, solve)

    dense = maskcut_oracle.second_eigenvector
    eigen = {
        "ours": lambda: second_eigenvector(links).vector[0].double().numpy(),
        "eigsh": lambda: _eigsh(matrix)[1],
        "dense": lambda: dense(matrix)[1],
    }
    whole = {
        "ours": lambda: maskcut(features, OBJECTS, TAU).masks[0].numpy(),
        "eigsh": oracle(_eigsh),
        "dense": oracle(dense),
    }
    vectors = {name: call() for name, call in eigen.items()}
    masks = {name: call() for name, call in whole.items()}
    for name in ("eigsh", "dense"):
        if not np.array_equal(vectors["ours"] > vectors["ours"].mean(), vectors[name] > vectors[name].mean()):
            raise SystemExit(f"the eigenvectors of ours and {name} cut the graph differently: no numbers")
        if not np.array_equal(masks["ours"], masks[name]):
            raise SystemExit(f"ours and {name} give different masks: no numbers")
    result = maskcut(features, OBJECTS, TAU)
    eigen_s = {name: timing.median for name, timing in interleaved(eigen, rounds).items()}
    whole_s = {name: timing.median for name, timing in interleaved(whole, rounds).items()}
    return {
        "patches": len(features),
        "objects": int(masks["ours"].any(axis=(1, 2)).sum()),
        "eigenproblem, ours s": eigen_s["ours"],
        "eigsh s": eigen_s["eigsh"],
        "dense s": eigen_s["dense"],
        "eigsh ratio": eigen_s["eigsh"] / eigen_s["ours"],
        "ratio": eigen_s["dense"] / eigen_s["ours"],
        "image, ours s": whole_s["ours"],
        "image, eigsh s": whole_s["eigsh"],
        "image, dense s": whole_s["dense"],
        "image eigsh ratio": whole_s["eigsh"] / whole_s["ours"],
        "image ratio": whole_s["dense"] / whole_s["ours"],
        "largest residual": float(np.nanmax(result.residuals.numpy())),
        "solvers": str(result.solvers[0].tolist()),
    }


def _planted(side: int, shared: float, width: int = 384) -> Tensor:
    """Make features of a background and three objects.

    With `shared` 0.43 a fifth of the pairs of object and background are linked; with 0 none are, and the graph has
    four parts.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.zeros(side, side, width)
    features[..., 0] = 1.0
    boxes = ((1, 5, 1, 6), (6, 9, 5, 9), (2, 4, 7, 9))
    for k, (top, bottom, left, right) in enumerate(boxes, start=1):
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


GRAPHS = {"connected": 0.43, "in four parts": 0.0}  # name → `shared` of `_planted`


def _growth(sides: list[int], dense_sides: list[int], graphs: Collection[str] = tuple(GRAPHS)) -> list[dict]:
    """Measure ours by the size of the grid, and the memory of one dense eigenproblem for `dense_sides`."""
    rows = []
    for side, graph in itertools.product(sides, graphs):
        shared = GRAPHS[graph]
        call = _ours(side, shared)
        seconds, result = interleaved({"ours": call}, 3)["ours"].median, call()
        row = {"image at patch 8, px": 8 * side, "patches": side * side, "graph": graph, "ours s": seconds}
        row |= {"solvers": str(result.solvers[0].tolist()), "ours peak MiB": peak_mib(partial(_ours, side, shared))}
        row["dense peak MiB"] = peak_mib(partial(_dense, side, shared)) if side in dense_sides and shared else None
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Compare the results, measure, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all three")
    parser.add_argument("--smoke", action="store_true", help="small and short; writes nothing")
    options = parser.parse_args(argv)
    model, size, count, rounds = "crate_small_patch8_224@untrained", 480, 3, options.repeats
    if options.smoke:
        model, size, count, rounds = "crate_tiny_patch8_224@untrained", 96, 1, 1
    images = _features(model, size, count)
    rows = [{"image": i} | _compare(features, rounds) for i, features in enumerate(images)]
    growth = _growth([12], [12], ["connected"]) if options.smoke else _growth([60, 80, 100, 120], [60])
    table = markdown_table(rows)

    def ratio(name: str) -> float:
        return float(np.median([row[name] for row in rows]))

    table += (
        f"\nMedian ratio to dense: eigenproblem {ratio('ratio'):.0f} (goal 50), a whole image "
        f"{ratio('image ratio'):.0f} (goal 20); to eigsh: eigenproblem {ratio('eigsh ratio'):.1f}, a whole image "
        f"{ratio('image eigsh ratio'):.1f}. The three are timed in turn, {rounds} rounds; the peers' "
        "affinities are in float64.\n\n"
    )
    table += (
        "Features of a background and three objects, C = 384, three objects asked for; solvers: 0 Lanczos, 1 block "
        "Lanczos in fp64, 2 dense:\n\n"
    )
    table += markdown_table(growth)
    print(table)
    if not options.smoke:
        kinds = [{"kind": "image"} | row for row in rows] + [{"kind": "growth"} | row for row in growth]
        write_results("maskcut", kinds, table, more={"model": model, "data": DATA, "image_size": size})
    return 0


if __name__ == "__main__":
    sys.exit(main())
