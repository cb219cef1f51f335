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
from crate_fast.segmentation import score_attention, scores_table
from crate_fast.train.config import PretrainConfig
from crate_fast.train.data import DataSplits, Normalize, eval_loader
from crate_fast.train.runs import load_run
from crate_fast.whitebox import attention_layer

__all__ = ["evaluate", "main"]


def evaluate(model: nn.Module, config: PretrainConfig, data: DataSplits) -> dict[str, dict]:
    """Score the attention of every layer under both thresholds; see `segmentation.score_attention`.

    Args:
        model: A CRATE or an ablation.
        config: The run's, for batch size and normalisation.
        data: With masks.

    Raises:
        ValueError: The data set has no masks.
    """
    if data.masks is None:
        raise ValueError(f"dataset={config.dataset!r} has no object masks: score a run on shape_scenes")
    normalize = Normalize(config.mean).to(next(model.parameters()).device)
    return score_attention(model, eval_loader(config, data.masks), normalize)


def main(argv: list[str] | None = None) -> int:
    """Score a run's checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--samples", type=int, default=500, help="validation images to score")
    parser.add_argument("--step", type=int, help="checkpoint to score; the best when absent")
    options = parser.parse_args(argv)
    changes = {"segmentation_samples": options.samples, "val_samples": options.samples}
    model, config, data, step = load_run(options.run, options.step, **changes)
    results = evaluate(model, config, data)
    print(scores_table(results, marked=attention_layer(model)))
    path = options.run / "coarse_segmentation.json"
    path.write_text(json.dumps({"step": step, "results": results, **provenance()}, indent=2) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
