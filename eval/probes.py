"""How well frozen features separate classes: k nearest neighbours, and a linear classifier."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LinearProbe", "knn_predictions", "linear_probe"]

TEMPERATURE = 0.07
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn, the inverse of the regularisation
_HELD_OUT = 0.2
_STEPS = 500
_CHUNK = 1024  # validation images compared at once


def knn_predictions(
    train: Tensor, labels: Tensor, val: Tensor, ks: Sequence[int], temperature: float = TEMPERATURE
) -> dict[int, Tensor]:
    """Classes by a vote of the k most similar training images, each with weight exp(cosine / T) (DINO's protocol).

    Args:
        train: Features [n, C].
        labels: Their classes [n], from 0.
        val: Features [m, C].
        ks: Numbers of neighbours.
        temperature: T, above 0.

    Returns:
        k → classes [m].

    Raises:
        ValueError: k is not from 1 to n.

    >>> knn_predictions(torch.eye(2), torch.tensor([4, 7]), torch.tensor([[0.1, 0.9]]), [1])
    {1: tensor([7])}
    """
    for k in ks:
        if not 1 <= k <= len(train):
            raise ValueError(f"--k {k}: there are {len(train)} training images; ask for at most so many neighbours")
    unit = F.normalize(train.float(), dim=1)
    n_classes = int(labels.max()) + 1
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in val.float().split(_CHUNK):
        similarity, nearest = (F.normalize(part, dim=1) @ unit.T).topk(max(ks), dim=1)
        votes = F.one_hot(labels[nearest], n_classes) * (similarity / temperature).exp().unsqueeze(-1)
        for k in ks:
            found[k].append(votes[:, :k].sum(dim=1).argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in found.items()}


@dataclass(frozen=True)
class LinearProbe:
    """What `linear_probe` found.

    Attributes:
        predictions: Classes of the validation images [m].
        C: The inverse regularisation chosen.
        held_out: C → accuracy on the training images held out.
        converged: Whether the last fit did.
    """

    predictions: Tensor
    C: float
    held_out: dict[float, float]
    converged: bool


def linear_probe(
    train: Tensor, labels: Tensor, val: Tensor, seed: int = 0, strengths: Sequence[float] = STRENGTHS
) -> LinearProbe:
    """A linear classifier on frozen features: multinomial logistic regression (scikit-learn) on standardised
    features.

    The regularisation is the one that does best on a fifth of the training images, held out; then all are fitted.

    Args:
        train: Features [n, C].
        labels: Their classes [n].
        val: Features [m, C].
        seed: Of the choice of images held out.
        strengths: Candidates for C.

    Raises:
        ValueError: There are fewer than two classes, or than ten training images.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n_classes = len(labels.unique())
    if n_classes < 2 or len(train) < 10:
        raise ValueError(
            f"a linear probe of {len(train)} training images of {n_classes} classes says nothing: raise --train-limit"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    apart, rest = order.split([int(_HELD_OUT * len(train)), len(train) - int(_HELD_OUT * len(train))])
    x, y = train.double().numpy(), labels.numpy()

    def fit(rows: Tensor, strength: float):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_STEPS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says so
            return probe.fit(x[rows], y[rows])

    held_out = {c: float(fit(rest, c).score(x[apart], y[apart])) for c in strengths}
    best = max(strengths, key=lambda c: (held_out[c], -c))
    probe = fit(order.sort().values, best)
    predictions = torch.from_numpy(probe.predict(val.double().numpy()))
    return LinearProbe(predictions, best, held_out, bool((probe[-1].n_iter_ < _STEPS).all()))
