"""The models that a visitor can choose: named on the command line, or found; opened when first asked for."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from crate_fast.errors import UserError
from crate_fast.eval.common.models import LoadedModel, class_names, open_model, split_label, split_source
from crate_fast.eval.common.shipped import shipped_names
from crate_fast.train import checkpoint
from crate_fast.train.runs import checkpoint_steps

__all__ = ["Offer", "OpenModel", "Shelf", "default_offers", "offers_of"]

_OPEN_AT_ONCE = 4


@dataclass(frozen=True)
class Offer:
    """A model that can be opened.

    Attributes:
        specification: As `models.open_model` takes it.
        label: On the page.
        group: Offers of one run stand together.
        untrained: Whether its weights are random.
    """

    specification: str
    label: str
    group: str
    untrained: bool = False


@dataclass(frozen=True)
class OpenModel:
    """A model in memory.

    Attributes:
        subject: See `models.LoadedModel`.
        classes: Names of its classes, in order; None where nobody wrote them down.
        lock: To hold while the model runs.
    """

    subject: LoadedModel
    classes: list[str] | None
    lock: threading.Lock


def offers_of(specification: str) -> list[Offer]:
    """What one model named on the command line offers: of a run, its checkpoints and the untrained model too.

    Raises:
        UserError: The folder holds no checkpoints.
    """
    label, source = split_label(specification)
    place, which = split_source(source)
    if not Path(place).is_dir() or which:
        return [Offer(specification, label, label, which == "untrained")]
    steps = checkpoint_steps(Path(place))
    best = checkpoint.best_step(Path(place) / "checkpoints") or steps[-1]
    later = [Offer(f"{place}@{step}", f"{label}, step {step:,}", label) for step in steps]
    return [
        Offer(f"{place}@{best}", f"{label}, best (step {best:,})", label),
        Offer(f"{place}@untrained", f"{label}, untrained", label, True),
        *later,
    ]


def default_offers(runs: Path = Path("runs")) -> tuple[list[Offer], str]:
    """What is offered when no model is named, and what to say about it.

    The newest run below `runs` comes first, then the models of the package and their untrained twins.

    Returns:
        (offers, a sentence for the page).
    """
    found = [path.parent for path in runs.glob("**/config.yaml") if checkpoint.newest(path.parent / "checkpoints")]
    offers, said = [], f"The newest run below {runs}/ comes first; --checkpoint names others."
    if found:
        newest = max(found, key=lambda run: (run / "checkpoints").stat().st_mtime)
        offers += offers_of(str(newest))
    else:
        said = (
            f"There is no run below {runs}/: these small models come with the package. Train one of your own "
            "(crate-fast pretrain), or name one with --checkpoint."
        )
    names, group = shipped_names(), "with the package"
    offers += [Offer(f"shipped:{name}", f"{name}, trained on shape_scenes", group) for name in names]
    offers += [Offer(f"shipped:{name}@untrained", f"{name}, untrained", group, True) for name in names]
    return offers, said


class Shelf:
    """Opens models when they are asked for, and keeps the last few.

    Args:
        offers: What may be opened.
        **opening: `device`, `image_size`, `model_args` and `seed` of `models.open_model`.
    """

    def __init__(self, offers: list[Offer], **opening):
        self.offers = offers
        self._opening = opening
        self._open: OrderedDict[int, OpenModel] = OrderedDict()
        self._lock = threading.Lock()  # of the dictionary
        self._opening_one = [threading.Lock() for _ in offers]  # so that two visitors do not open a model twice

    def get(self, number: int) -> OpenModel:
        """The model of an offer.

        Raises:
            UserError: There is no such offer.
            UserError: It cannot be opened; the message says what to do.
        """
        if not 0 <= number < len(self.offers):
            raise UserError(f"model {number}: there are {len(self.offers)}, counted from 0")
        with self._opening_one[number]:
            opened = self._recall(number)
            if opened is None:
                opened = self._load(self.offers[number].specification)
                with self._lock:
                    self._open[number] = opened
                    if len(self._open) > _OPEN_AT_ONCE:
                        self._open.popitem(last=False)
            return opened

    def _recall(self, number: int) -> OpenModel | None:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
            return self._open.get(number)

    def _load(self, specification: str) -> OpenModel:
        try:
            subject = open_model(specification, **self._opening)
            return OpenModel(subject, class_names(specification), threading.Lock())
        except (TypeError, OSError, RuntimeError) as error:
            raise UserError(f"{specification} cannot be opened: {error}") from error
