"""Coarse segmentation from CLS attention, layer by layer, on `shape_scenes` (paper, Fig. 4).

    python -m crate_fast.eval.coarse_segmentation runs/NAME --samples 500

prints a table and writes `coarse_segmentation.json` into the run's folder.
"""

import argparse
import json
import sys
from pathlib import Path

from torch import nn

from crate_fast.provenance import provenance
from crate_fast.segmentation import THRESHOLDS, score_attention
from crate_fast.train.data import DataSplits, Normalize, eval_loader
from crate_fast.train.runs import load_run

__all__ = ["evaluate", "main"]


def evaluate(model: nn.Module, config, data: DataSplits, layers: list[int] | None = None) -> dict[str, list[dict]]:
    """Score the attention of each layer under both thresholds.

    Args:
        model: A CRATE or an ablation.
        config: The run's, for batch size and normalisation.
        data: With masks.
        layers: All when None.

    Returns:
        "topk" and "mass", each a list of `segmentation.score_attention`'s results with "layer".

    Raises:
        ValueError: The data set has no masks.
    """
    if data.masks is None:
        raise ValueError(f"dataset={config.dataset!r} has no object masks: score a run on shape_scenes")
    normalize = Normalize(config.mean).to(next(model.parameters()).device)
    layers = list(range(model.transformer.depth)) if layers is None else layers
    return {
        threshold: [
            {"layer": layer, **score_attention(model, eval_loader(config, data.masks), normalize, layer, threshold)}
            for layer in layers
        ]
        for threshold in THRESHOLDS
    }


def main(argv: list[str] | None = None) -> int:
    """Score a run's best checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--samples", type=int, default=500, help="validation images to score")
    parser.add_argument("--step", type=int, help="checkpoint to score; the best when absent")
    options = parser.parse_args(argv)
    model, config, data, step = load_run(options.run, options.step, segmentation_samples=options.samples)
    results = evaluate(model, config, data)
    for threshold, rows in results.items():
        first = rows[0]
        print(
            f"\n{threshold} 60 %, {first['images']} images: constant mask {first['constant']:.3f}, random maps "
            f"{first['random']:.3f}, mean mask {first['mean_mask']:.3f}, ceiling {first['ceiling']:.3f}"
        )
        print("layer  best head  one head")
        for row in rows:
            print(f"{row['layer']:5d}  {row['best_head']:9.3f}  {row['fixed_head']:8.3f}")
    path = options.run / "coarse_segmentation.json"
    path.write_text(json.dumps({"step": step, "results": results, **provenance()}, indent=2) + "\n")
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
