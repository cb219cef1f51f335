"""MaskCut: seconds per image, ours and with SciPy's two eigensolvers.

    python benchmarks/bench_maskcut.py            # results/maskcut.{json,md}; a few minutes on two cores
    python benchmarks/bench_maskcut.py --smoke    # small, anywhere, nothing written

The peers are the tests' oracle (maskcut_oracle.py) in float64 with one of these solvers:

    dense    scipy.linalg.eigh(D − A, D, subset_by_index=[1, 2]), as TokenCut and CutLER do
    eigsh    scipy.sparse.linalg.eigsh(D^-½AD^-½, 2, which="LA"), ARPACK's Lanczos on the normalised affinities

All have the same features and are timed in turn. The benchmark stops if their masks differ.
"""

import argparse
import sys
from functools import partial

from harness import interleaved, write_results

import maskcut_oracle
import numpy as np
from gpu_report import markdown_table
from scipy.sparse.linalg import eigsh
from torch import Tensor

from crate_fast.eval.common.images import batches, open_images
from crate_fast.eval.common.models import open_model
from crate_fast.eval.maskcut import maskcut

TAU, OBJECTS = 0.15, 3
DATA = "shape_scenes"


def features_of(model: str, size: int, count: int) -> list[Tensor]:
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


def compare(features: Tensor, rounds: int) -> dict:
    """Compare the masks of one image, then measure its MaskCut in all three forms."""
    side = round(len(features) ** 0.5)
    calls = {"ours": lambda: maskcut(features, OBJECTS, TAU).masks[0].numpy()}
    for name, solve in {"eigsh": _eigsh, "dense": maskcut_oracle.second_eigenvector}.items():
        oracle = partial(maskcut_oracle.maskcut_oracle, features.numpy(), (side, side), OBJECTS, TAU, solve)
        calls[name] = oracle
    masks = {name: call() for name, call in calls.items()}
    for name in ("eigsh", "dense"):
        if not np.array_equal(masks["ours"], masks[name]):
            raise SystemExit(f"ours and {name} give different masks: no numbers")
    seconds = {name: timing.median for name, timing in interleaved(calls, rounds).items()}
    row = {"patches": len(features), "objects": int(masks["ours"].any(axis=(1, 2)).sum())}
    row |= {f"{name}, s": value for name, value in seconds.items()}
    return row | {f"{name} / ours": seconds[name] / seconds["ours"] for name in ("eigsh", "dense")}


def main(argv: list[str] | None = None) -> int:
    """Compare the results, measure, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all three")
    parser.add_argument("--smoke", action="store_true", help="small and short; writes nothing")
    options = parser.parse_args(argv)
    model, size, count, rounds = "crate_small_patch8_224@untrained", 480, 3, options.repeats
    if options.smoke:
        model, size, count, rounds = "crate_tiny_patch8_224@untrained", 96, 1, 1
    rows = [{"image": i} | compare(features, rounds) for i, features in enumerate(features_of(model, size, count))]
    table = markdown_table(rows)
    print(table)
    if not options.smoke:
        write_results("maskcut", rows, table, more={"model": model, "data": DATA, "image_size": size})
    return 0


if __name__ == "__main__":
    sys.exit(main())
