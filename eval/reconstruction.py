"""What a CRATE-MAE makes of hidden patches: a figure by mask ratio, and how far off it is.

    crate-fast eval reconstruction runs/MAE --data folder:PHOTOS --ratios 0.25,0.5,0.75,0.9

Errors are root mean squares over the hidden pixels, of values from 0 to 1, beside those of two constants: the mean
colour of the image's visible pixels, and the mean of each channel over the whole image, which nothing that sees only
the visible ones can know. A model trained on normalised targets is given each patch's true mean and deviation back,
as in its figure; its errors are therefore no model's without them, and marked.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from crate_fast.errors import UserError, run_command
from crate_fast.eval.common.command import evaluation_parser, open_models, output_folder, positive, settings_of
from crate_fast.eval.common.images import Batch, batches, open_images
from crate_fast.eval.common.models import Subject
from crate_fast.eval.common.results import file_name, say_written, write_results, write_table
from crate_fast.train.reconstruction import RATIOS, image_noise, reconstruction_figure

__all__ = ["evaluate", "main"]


def _errors(images: Tensor, filled: Tensor, hidden: Tensor) -> Tensor:
    """Squared errors summed over hidden pixels, of the model, the visible mean and the whole mean; their number: [4].

    Args:
        images, filled: Values from 0 to 1, [B, 3, S, S].
        hidden: Boolean [B, 1, S, S].
    """
    visible = ~hidden
    seen = (images * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)
    guesses = (filled, seen, images.mean((2, 3), keepdim=True))
    sums = [((guess - images).square() * hidden).sum() for guess in guesses]
    return torch.stack([*sums, hidden.sum() * images.shape[1]]).double().cpu()


@torch.inference_mode()
def evaluate(
    subject: Subject, image_batches: Iterable[Batch], ratios: Sequence[float] = RATIOS, seed: int = 0
) -> list[dict]:
    """Losses and errors of one model, by mask ratio.

    Args:
        subject: Opened from a CRATE-MAE.
        image_batches: Images of the size that the model expects.
        ratios: Mask ratios.
        seed: Of the masks, which are the same for any batch size.

    Returns:
        A row a ratio: "mask_ratio", "loss" as it is trained on, "rmse", "rmse_visible_mean", "rmse_image_mean",
        "images".

    Raises:
        UserError: The model is no autoencoder.
    """
    model = _autoencoder(subject)
    unit = 255 * subject.normalize.scale
    sums, losses, count = torch.zeros(len(ratios), 4, dtype=torch.float64), [0.0] * len(ratios), 0
    for batch in image_batches:
        pixels = subject.normalize(batch.images.to(subject.device))
        seeds = [(seed, count + number) for number in range(len(pixels))]
        noise = image_noise(model, seeds).to(pixels.device)
        plain = (pixels - subject.normalize.shift) / unit
        for row, ratio in enumerate(ratios):
            loss, pred, mask = model(pixels, ratio, noise=noise)
            filled = (model.reconstruction(pixels, pred) - subject.normalize.shift) / unit
            sums[row] += _errors(plain, filled, model.mask_image(mask).bool())
            losses[row] += loss.item() * len(pixels)
        count += len(pixels)
    names = ("rmse", "rmse_visible_mean", "rmse_image_mean")
    rows = []
    for ratio, loss, (*errors, pixels) in zip(ratios, losses, sums.tolist(), strict=True):
        rows.append({"mask_ratio": ratio, "loss": loss / count, "images": count})
        rows[-1] |= {name: (error / pixels) ** 0.5 for name, error in zip(names, errors, strict=True)}
    return rows


def _autoencoder(subject: Subject):
    if subject.autoencoder is None:
        raise UserError(f"{subject.label} is no CRATE-MAE, and fills nothing in: name a run of pretrain_mae")
    return subject.autoencoder.eval()


def _ratios(text: str) -> list[float]:
    ratios = [float(word) for word in text.split(",")]
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise argparse.ArgumentTypeError(f"{ratio}: a mask ratio is above 0 and below 1")
    return ratios


def _table(label: str, rows: Sequence[dict], normalised: bool) -> list[dict]:
    return [
        {
            "model": label,
            "hidden": f"{row['mask_ratio']:.0%}",
            "loss": row["loss"],
            "error" + (" (patch statistics given)" if normalised else ""): row["rmse"],
            "visible mean": row["rmse_visible_mean"],
            "image mean": row["rmse_image_mean"],
        }
        for row in rows
    ]


def _run(options: argparse.Namespace) -> None:
    subjects = open_models(options)
    for subject in subjects:
        for ratio in options.ratios:
            _autoencoder(subject).kept(ratio)  # refuses a ratio that leaves no patch
        if options.image_size not in (None, *subject.autoencoder.image_size):
            raise UserError(
                f"--image-size {options.image_size}: {subject.label} decodes {subject.autoencoder.image_size[0]} px "
                "images only; leave it out"
            )
    folder = output_folder(options, "reconstruction")
    problems, results, table, written = [], {}, [], []
    for subject in subjects:
        images = open_images(options.data, subject.autoencoder.image_size[0], options.limit)
        read = list(batches(images, options.batch_size, problems, workers=options.workers, progress=subject.label))
        results[subject.label] = evaluate(subject, read, options.ratios, options.seed)
        table += _table(subject.label, results[subject.label], subject.autoencoder.norm_pix_loss)
        shown = torch.cat([batch.images for batch in read])[: options.show]
        titles = [str(sample.key)[-24:] for batch in read for sample in batch.samples][: options.show]
        paths = [folder / f"{file_name(subject.label)}.{kind}" for kind in ("png", "pdf")]
        autoencoder, normalize = subject.autoencoder, subject.normalize
        noise = image_noise(autoencoder, [(options.seed, number) for number in range(len(shown))])
        reconstruction_figure(autoencoder, shown, normalize, paths, options.ratios, noise, titles)
        written += paths
    print(write_table(folder, "reconstruction", table), end="")
    config = settings_of(options) | {"models": [subject.facts for subject in subjects]}
    problems = list(dict.fromkeys(problems))  # the same images for every model
    written.append(write_results(folder, "reconstruction", config, results, problems))
    say_written([*written, folder / "reconstruction.md"], problems)


def main(argv: list[str] | None = None) -> int:
    """Measure and draw; see the module's text."""
    parser = evaluation_parser("reconstruction", __doc__.splitlines()[0], limit=64)
    ratios = ",".join(map(str, RATIOS))
    parser.add_argument("--ratios", type=_ratios, default=list(RATIOS), help=f"mask ratios; default {ratios}")
    parser.add_argument("--show", type=positive, default=8, help="images in the figure; default %(default)s")
    return run_command(lambda: _run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
