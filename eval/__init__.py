"""Evaluation protocols, one module each: `evaluate` in Python, and `main`, the command `crate-fast eval`.

Arguments that the protocols' `evaluate` share:

    loaded           the model, a `common.models.LoadedModel`
    images           data set of `Sample`s at the model's image size, with the annotations that the protocol needs
    batches          the images batch by batch, from `common.images.batches`
    layer, layers    layers counted from 0, negative ones from the end
    seed             seed of random maps, noise, masks or held-out images
    **reading        `batch_size`, `workers`, `progress` and `problems` of `common.images.batches`
"""
