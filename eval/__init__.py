"""Evaluation protocols. Each module has a Python function `evaluate` and a command, `crate-fast eval PROTOCOL`.

The `evaluate` functions share these arguments:

    loaded           the model, a `common.models.LoadedModel`
    images           data set of `Sample`s at the model's image size, with the annotations of the protocol
    batches          batches of images, from `common.images.batches`
    layer, layers    layer indices from 0; negative indices count from the end
    seed             seed of random maps, noise, masks or held-out images
    **reading        `batch_size`, `workers`, `progress` and `problems` of `common.images.batches`
"""
