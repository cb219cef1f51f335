"""Probes of frozen features: labelled images, k nearest neighbours, and a linear classifier."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from crate_fast.errors import UserError, require
from crate_fast.eval.common.images import Sample
from crate_fast.train.data import UNREADABLE

__all__ = ["LabelledImages", "LinearProbe", "knn_predictions", "linear_probe", "pooled"]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, the inverse of the regularisation
_STEPS = 500
_SIMILARITIES = 2**26  # held at once: 256 MiB


class LabelledImages(Dataset):
    """Images of a split; an unreadable one is a sample with a `problem`.

    Args:
        split: (uint8 image [3, S, S], label) by (epoch, index), as `plain_splits` gives.
        name: Name of the split, for messages.
        limit: Number of images, evenly spaced over the split, which may be sorted by class; all when None.
    """

    def __init__(self, split: Dataset, name: str, limit: int | None = None):
        self.split, self.name, total = split, name, len(split)
        count = min(limit or total, total)
        self.indices = [i * total // count for i in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Sample:
        index = self.indices[number]
        try:
            return self._sample(index, *self.split[0, index])
        except UNREADABLE as error:
            problem = f"{self.name} image {index}: {error}"
            return Sample(index, torch.zeros(3, 1, 1, dtype=torch.uint8), (0, 0), None, problem)

    def __getitems__(self, numbers: list[int]) -> list[Sample]:
        if not hasattr(self.split, "__getitems__"):
            return [self[number] for number in numbers]
        indices = [self.indices[number] for number in numbers]  # scenes: drawn faster together, and never unreadable
        return list(
            map(self._sample, indices, *zip(*self.split.__getitems__([(0, i) for i in indices]), strict=True))
        )

    @staticmethod
    def _sample(index: int, image: Tensor, label: int) -> Sample:
        return Sample(index, image, tuple(image.shape[1:]), label=int(label))


def check_pool(model: nn.Module, pool: str) -> None:
    """Refuse CLS pooling for a model without CLS."""
    if pool == "cls" and getattr(model, "cls_token", None) is None:
        raise UserError("this model has no CLS token: pass --pool mean")


def pooled(model: nn.Module, tokens: Tensor, pool: str = "cls") -> Tensor:
    """Pool tokens [B, N, C] of `forward_features` to one vector per image, after the final LayerNorm: [B, C].

    Args:
        model: A CRATE or a timm `VisionTransformer`.
        tokens: Tokens, prefix first.
        pool: "cls", or "mean" over the patches.

    Raises:
        UserError: The model has no CLS token.
    """
    prefix = model.num_prefix_tokens
    check_pool(model, pool)
    token = tokens[:, :1] if pool == "cls" else tokens[:, prefix:].mean(dim=1, keepdim=True)
    # any pooling of equal tokens returns them
    return model.forward_head(token.expand(-1, prefix + 1, -1), pre_logits=True)


def knn_predictions(
    train: Tensor, labels: Tensor, val: Tensor, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Classify by a vote of the k most similar training images with weights exp(cosine / T) (DINO's protocol).

    Args:
        train: Features [n, C].
        labels: Their classes [n], from 0.
        val: Features [m, C].
        ks: Numbers of neighbours.
        temperature: T, above 0.

    Returns:
        k → classes [m].

    Raises:
        UserError: k is not from 1 to n.

    >>> knn_predictions(torch.eye(2), torch.tensor([4, 7]), torch.tensor([[0.1, 0.9]]), [1])
    {1: tensor([7])}
    """
    check_neighbours(ks, len(train))
    unit = F.normalize(train.float(), dim=1)
    n_classes = int(labels.max()) + 1
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in val.float().split(max(1, _SIMILARITIES // len(train))):
        similarity, nearest = (F.normalize(part, dim=1) @ unit.T).topk(max(ks), dim=1)
        weights, classes = (similarity / temperature).exp(), labels[nearest]
        for k in ks:
            votes = weights.new_zeros(len(part), n_classes)
            found[k].append(votes.scatter_add_(1, classes[:, :k], weights[:, :k]).argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in found.items()}


def check_neighbours(ks: Sequence[int], n_images: int) -> None:
    """Refuse more neighbours than training images."""
    for k in ks:
        if not 1 <= k <= n_images:
            raise UserError(f"--k {k}: there are {n_images} training images; ask for at most as many neighbours")


def check_linear(n_images: int, n_classes: int) -> None:
    """Refuse a linear probe of fewer than ten images or two classes."""
    if n_classes < 2 or n_images < 10:
        raise UserError(
            f"a linear probe of {n_images} training images of {n_classes} classes says nothing: raise --train-limit"
        )


class LinearProbe(NamedTuple):
    """Result of `linear_probe`.

    Attributes:
        predictions: Classes of the validation images [m].
        C: The inverse regularisation chosen.
        held_out: C → accuracy on the held-out training images.
        converged: True if the last fit converged.
    """

    predictions: Tensor
    C: float
    held_out: dict[float, float]
    converged: bool


def linear_probe(train: Tensor, labels: Tensor, val: Tensor, seed: int = 0) -> LinearProbe:
    """Fit scikit-learn's multinomial logistic regression on standardised frozen features.

    The regularisation is chosen on a held-out fifth of the training images; then all are fitted.

    Args:
        train: Features [n, C].
        labels: Their classes [n].
        val: Features [m, C].
        seed: Seed of the choice of held-out images.

    Raises:
        UserError: scikit-learn is missing, or there are fewer than ten training images, or than two classes in those
            that are not held out.
    """
    require("sklearn")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    apart, rest = order.tensor_split([int(0.2 * len(train))])
    check_linear(len(train), len(labels[rest].unique()))
    x, y = train.double().numpy(), labels.numpy()

    def fit(rows: Tensor, strength: float):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_STEPS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says so
            return probe.fit(x[rows], y[rows])

    held_out = {c: float(fit(rest, c).score(x[apart], y[apart])) for c in STRENGTHS}
    best = max(STRENGTHS, key=lambda c: (held_out[c], -c))
    probe = fit(order.sort().values, best)
    predictions = torch.from_numpy(probe.predict(val.double().numpy()))
    return LinearProbe(predictions, best, held_out, bool((probe[-1].n_iter_ < _STEPS).all()))
