"""Hidden patches reconstructed by a CRATE-MAE: a figure by mask ratio, and errors.

Errors are root mean squares over the hidden pixels, with values from 0 to 1. Two constant predictions are baselines:
the mean colour of the visible pixels, and the mean colour of the whole image, which a model cannot see. A model with
normalised targets is given each patch's true mean and deviation, as in its figure; its errors are marked.
"""

import argparse
from collections.abc import Iterable, Sequence

import torch

from crate_fast.errors import UserError
from crate_fast.eval.common.command import Evaluation, open_models
from crate_fast.eval.common.images import Batch, batches, open_images
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.results import file_name
from crate_fast.options import main_of
from crate_fast.train.reconstruction import RATIOS, image_noise, reconstruction_figure


@torch.inference_mode()
def evaluate(
    loaded: LoadedModel, image_batches: Iterable[Batch], ratios: Sequence[float] = RATIOS, seed: int = 0
) -> list[dict]:
    """Measure one model's loss and errors at each mask ratio.

    Args:
        loaded: A CRATE-MAE. Other arguments: see `crate_fast.eval`.
        ratios: Mask ratios.
        seed: Seed of the masks, which do not depend on the batch size.

    Returns:
        For each ratio: "mask_ratio", training "loss", "rmse", "rmse_visible_mean", "rmse_image_mean", "images".

    Raises:
        UserError: The model is not a CRATE-MAE.
    """
    model = _autoencoder(loaded)
    unit = 255 * loaded.normalize.scale
    # for each ratio the squared errors of model, visible mean and image mean over hidden values, and their number
    sums, losses, count = torch.zeros(len(ratios), 4, dtype=torch.float64), [0.0] * len(ratios), 0
    for batch in image_batches:
        pixels = loaded.normalize(batch.images.to(loaded.device))
        seeds = [(seed, count + number) for number in range(len(pixels))]
        noise = image_noise(model, seeds).to(pixels.device)
        plain = (pixels - loaded.normalize.shift) / unit
        for row, ratio in enumerate(ratios):
            loss, pred, mask = model(pixels, ratio, noise=noise)
            filled = (model.reconstruction(pixels, pred) - loaded.normalize.shift) / unit
            hidden = model.mask_image(mask).bool()
            visible_mean = (plain * ~hidden).sum((2, 3), keepdim=True) / (~hidden).sum((2, 3), keepdim=True)
            guesses = (filled, visible_mean, plain.mean((2, 3), keepdim=True))
            errors = [((guess - plain).square() * hidden).sum() for guess in guesses]
            sums[row] += torch.stack([*errors, hidden.sum() * plain.shape[1]]).double().cpu()
            losses[row] += loss.item() * len(pixels)
        count += len(pixels)
    names = ("rmse", "rmse_visible_mean", "rmse_image_mean")
    rows = []
    for ratio, loss, (*errors, pixels) in zip(ratios, losses, sums.tolist(), strict=True):
        rows.append({"mask_ratio": ratio, "loss": loss / count, "images": count})
        rows[-1] |= {name: (error / pixels) ** 0.5 for name, error in zip(names, errors, strict=True)}
    return rows


def _autoencoder(loaded: LoadedModel):
    if loaded.autoencoder is None:
        raise UserError(f"{loaded.label} is not a CRATE-MAE: name a run of pretrain_mae")
    return loaded.autoencoder.eval()


def _command(options: argparse.Namespace) -> None:
    models = open_models(options)
    for loaded in models:
        for ratio in options.ratios:
            _autoencoder(loaded).kept(ratio)  # raises if no patch is visible
        if options.image_size not in (None, *loaded.autoencoder.image_size):
            raise UserError(
                f"--image-size {options.image_size}: {loaded.label} decodes {loaded.autoencoder.image_size[0]} px "
                "images only; leave it out"
            )
    evaluation = Evaluation("reconstruction", options, models)
    results, table = {}, []
    for loaded in models:
        images = open_images(options.data, loaded.autoencoder.image_size[0], options.limit)
        read = list(batches(images, **evaluation.reading(loaded.label)))
        results[loaded.label] = evaluate(loaded, read, options.ratios, options.seed)
        error = "error" + " (patch statistics given)" * loaded.autoencoder.norm_pix_loss
        names = {"loss": "loss", error: "rmse", "visible mean": "rmse_visible_mean", "image mean": "rmse_image_mean"}
        for row in results[loaded.label]:
            first = {"model": loaded.label, "hidden": f"{row['mask_ratio']:.0%}"}
            table.append(first | {title: row[name] for title, name in names.items()})
        shown = torch.cat([batch.images for batch in read])[: options.show]
        titles = [str(sample.key)[-24:] for batch in read for sample in batch.samples][: options.show]
        paths = evaluation.figure(file_name(loaded.label))
        look = options.ratios, options.seed, titles
        reconstruction_figure(loaded.autoencoder, shown, loaded.normalize, paths, *look)
    evaluation.write_table("reconstruction", table)
    evaluation.finish(results)


main = main_of("eval reconstruction", _command)
