"""What one model did with one picture, computed once: every map, curve and mask that the page shows."""

import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.eval.common.features import Features, LayerTokens
from crate_fast.eval.common.models import LoadedModel
from crate_fast.eval.common.principal_components import TooFewPatchesError, foreground, pca_rgb
from crate_fast.eval.maskcut import maskcut
from crate_fast.layers import ISTA
from crate_fast.model import CRATE
from crate_fast.whitebox import LayerTrace, visit_layers

__all__ = ["COMPONENTS", "Inspection", "inspect"]

COMPONENTS = ("all", "parts")  # components 2 to 4 of all patches (Fig. 6); 1 to 3 of the foreground (Fig. 9)


@dataclass
class Inspection:
    """What a model did with a picture.

    Attributes:
        features: Queries and keys of every layer.
        coding_rate: R^c of every layer; None without subspaces.
        sparsity: Share of non-zeros after ISTA of every layer and patch, [L, P]; None without ISTA.
        mean_sparsity: Of every layer, CLS included, as `whitebox.nonzero_fraction`; None without ISTA.
        top: The five most probable classes, (number, probability); None without a classifier.
    """

    features: Features
    coding_rate: list[float] | None
    sparsity: np.ndarray | None
    mean_sparsity: list[float] | None
    top: list[tuple[int, float]] | None

    def __post_init__(self):
        self._colouring, self._cutting = threading.Lock(), threading.Lock()
        self._components: dict[str, list[np.ndarray | None]] = {}
        self._masks: dict[int, np.ndarray] = {}

    @property
    def bytes(self) -> int:
        """Memory of the tokens it keeps."""
        tensors = [tensor for layer in self.features.layers.values() for tensor in (layer.queries, layer.keys)]
        storages = [tensor.untyped_storage() for tensor in tensors]  # several may be views of one
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def attention(self, layer: int, patch: int | None) -> np.ndarray:
        """Attention of a patch, or of CLS, on the patches: [H, P].

        Raises:
            UserError: There is no such layer or patch, or no CLS token.
        """
        found = self.features.cls_attention(layer) if patch is None else self.features.patch_attention(layer, patch)
        return found[0].cpu().numpy()

    def components(self, which: str) -> list[np.ndarray | None]:
        """Principal components as colours, a layer each: uint8 [P, 3]; None where too few patches are foreground.

        Args:
            which: Of `COMPONENTS`.

        Raises:
            UserError: It is none of them, or the features are not finite.
        """
        if which not in COMPONENTS:
            raise UserError(f"components {which!r}: choose one of {', '.join(COMPONENTS)}")
        with self._colouring:
            if which not in self._components:
                self._components[which] = [self._colours(layer, which) for layer in sorted(self.features.layers)]
            return self._components[which]

    def _colours(self, layer: int, which: str) -> np.ndarray | None:
        tokens = self.features.keys(layer).float().cpu()
        try:
            mask = foreground(tokens, grid=self.features.grid).mask if which == "parts" else None
            colours, _ = pca_rgb(tokens, mask, first=1 if which == "parts" else 2)
        except TooFewPatchesError:
            return None
        return (255 * colours[0]).round().byte().numpy()

    def masks(self, layer: int) -> np.ndarray:
        """MaskCut's objects, at most three: boolean [n, rows, columns].

        Raises:
            UserError: There is no such layer, or the features are not finite.
        """
        with self._cutting:
            if layer not in self._masks:
                found = maskcut(self.features.keys(layer).float().cpu(), grid=self.features.grid).masks[0]
                self._masks[layer] = found[found.flatten(1).any(dim=1)].numpy()
            return self._masks[layer]


@torch.inference_mode()
def inspect(subject: LoadedModel, image: Tensor) -> Inspection:
    """Run a model on one picture. One thread at a time may do so with one model: it is read through hooks.

    Args:
        subject: The model.
        image: uint8 [3, S, S], of the size that it expects.

    Raises:
        UserError: Its output is not finite.
    """
    pixels = subject.normalize(image.unsqueeze(0).to(subject.device))
    if isinstance(subject.model, CRATE):
        return _inspect_crate(subject, pixels)
    features = subject.extract(pixels, range(subject.extract.depth))
    return Inspection(features, None, None, None, _top(subject, subject.model(pixels)))


def _inspect_crate(subject: LoadedModel, pixels: Tensor) -> Inspection:
    tokens: dict[int, LayerTokens] = {}
    rates: list[float] = []
    shares: list[Tensor] = []

    def visit(trace: LayerTrace) -> None:
        tokens[trace.index] = LayerTokens(trace.queries, trace.keys, trace.tied, trace.scale)
        if trace.tied:
            rates.append(trace.coding_rate().item())
        if isinstance(subject.model.transformer.layers[trace.index][1].fn, ISTA):
            shares.append((trace.after_ista[0] != 0).float().mean(dim=1).cpu())

    final = visit_layers(subject.model, pixels, visit)
    top = _top(subject, subject.model.forward_head(final))
    features = Features(subject.extract.grid, tokens)
    if not shares:
        return Inspection(features, rates or None, None, None, top)
    by_token = torch.stack(shares)
    mean = by_token.mean(dim=1).tolist()
    return Inspection(features, rates or None, by_token[:, 1:].numpy(), mean, top)


def _top(subject: LoadedModel, logits: Tensor) -> list[tuple[int, float]] | None:
    if not logits.isfinite().all():
        raise UserError(f"the output of {subject.label} holds NaN or infinity: its checkpoint is damaged")
    if logits.dim() != 2 or not getattr(subject.model, "num_classes", 0):
        return None
    values, classes = logits.float().softmax(dim=-1)[0].topk(min(5, logits.shape[-1]))
    return list(zip(classes.tolist(), values.tolist(), strict=True))
