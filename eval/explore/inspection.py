"""Models of the explorer, opened on demand, and their results on a picture as plain JSON values."""

import threading
import uuid
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor

from crate_fast.errors import UserError
from crate_fast.eval.common.features import Features, LayerTokens
from crate_fast.eval.common.images import box_corners
from crate_fast.eval.common.models import LoadedModel, open_model
from crate_fast.eval.explore.pictures import MAX_UPLOAD_BYTES, LRUCache, Pictures
from crate_fast.eval.maskcut import maskcut
from crate_fast.eval.pca import component_colours
from crate_fast.layers import ISTA, ODL
from crate_fast.model import CRATE
from crate_fast.whitebox import LayerTrace, visit_layers

COMPONENTS = ("all", "parts")  # components 2 to 4 of all patches (Fig. 6); 1 to 3 of the foreground (Fig. 9)
_OPEN_MODELS, _INSPECTIONS = 4, 8  # numbers kept in memory; the tokens of B/8 at 480 px take 130 MiB


class ModelChoice(NamedTuple):
    """A model in the page's menu."""

    specification: str  # argument of `models.open_model`
    label: str  # text in the menu
    group: str  # heading in the menu; the checkpoints of a run share it
    untrained: bool = False  # with random weights


class OpenModel(NamedTuple):
    """A model in memory, and a lock to hold while it runs."""

    loaded: LoadedModel
    lock: threading.Lock


class Inspection:
    """Maps, curves and masks of one model on one picture, each computed once.

    `summary` holds "grid", "depth", "heads", "layer" (the paper's), "has_cls", "image_size", "parameters";
    "coding_rate" and "sparsity" of each layer or None; "patch_sparsity" [L][P] or None; "top", the most probable
    classes with "class", "name" and "probability", or None.
    """

    def __init__(self, features: Features, summary: dict):
        self.features, self.summary = features, summary
        self._found = LRUCache(len(COMPONENTS) + len(features.layers))  # all are kept
        self._components, self._masks = threading.Lock(), threading.Lock()

    def attention(self, layer: int, patch: int | None) -> dict:
        """Return the attention of a patch, or of CLS when None, in all heads of a layer: "heads" [H][P]."""
        found = self.features.cls_attention(layer) if patch is None else self.features.patch_attention(layer, patch)
        return {"heads": _rounded(found[0])}

    def components(self, which: str) -> dict:
        """Return principal components as colours: "layers" [L][3·P] from 0 to 255, None for too few patches."""
        if which not in COMPONENTS:
            raise UserError(f"components {which!r}: choose one of {', '.join(COMPONENTS)}")

        def colours(layer: int) -> list[int] | None:
            tokens = self.features.keys(layer).float().cpu()
            found = component_colours(tokens, self.features.grid, which == "parts")
            return None if found is None else (255 * found[0]).round().byte().flatten().tolist()

        layers = sorted(self.features.layers)
        return self._found.once(which, self._components, lambda: {"layers": list(map(colours, layers))})

    def masks(self, layer: int) -> dict:
        """Run MaskCut: "masks" [n][P] of 0 or 1; "boxes" [n] as [left, top, right, bottom] in patches; n ≤ 3."""

        def cut() -> dict:
            found = maskcut(self.features.keys(layer).float().cpu(), grid=self.features.grid).masks[0]
            masks = found[found.flatten(1).any(dim=1)]
            return {"masks": masks.flatten(1).int().tolist(), "boxes": box_corners(masks).tolist()}

        return self._found.once(layer, self._masks, cut)


@torch.inference_mode()
def inspect(loaded: LoadedModel, image: Tensor) -> Inspection:
    """Run a model on one picture, uint8 [3, S, S]. Hold the model's lock, because hooks read its layers."""
    model, extract = loaded.model, loaded.extract
    pixels = loaded.normalize(image.unsqueeze(0).to(loaded.device))
    rates: list[float] = []
    nonzeros: list[Tensor] = []  # share of each token, by layer
    if isinstance(model, CRATE):
        tokens: dict[int, LayerTokens] = {}

        def visit(trace: LayerTrace) -> None:
            tokens[trace.index] = LayerTokens(trace.queries, trace.keys, trace.scale)
            if trace.tied:
                rates.append(trace.coding_rate().item())
            if isinstance(trace.sparsifier.fn, ISTA | ODL):
                nonzeros.append((trace.code()[0] != 0).float().mean(dim=1))

        final = visit_layers(model, pixels, visit)
        features, logits = Features(extract.grid, tokens), model.forward_head(final)
    else:
        features, logits = extract(pixels, range(extract.depth)), model(pixels)
    if not logits.isfinite().all():
        raise UserError(f"the output of {loaded.label} holds NaN or infinity: use an undamaged checkpoint")
    summary = {
        "grid": list(features.grid),
        "depth": extract.depth,
        "heads": extract.heads,
        "layer": extract.default_layer,
        "has_cls": extract.has_cls,
        "image_size": extract.image_size[0],
        "parameters": loaded.facts["parameters"],
        "coding_rate": rates or None,
        "sparsity": [share.mean().item() for share in nonzeros] or None,
        "patch_sparsity": [_rounded(share[1:]) for share in nonzeros] or None,
        "top": None,
    }
    if logits.dim() == 2 and getattr(model, "num_classes", 0):
        names = loaded.classes or []
        values, classes = logits.float().softmax(dim=-1)[0].topk(min(5, logits.shape[-1]))
        summary["top"] = [
            {"class": i, "name": names[i] if i < len(names) else f"class {i}", "probability": value}
            for i, value in zip(classes.tolist(), values.tolist(), strict=True)
        ]
    return Inspection(features, summary)


def _rounded(values: Tensor) -> list:
    return values.cpu().double().numpy().round(9).tolist()


class Explorer:
    """Models, a note about them for the page, pictures, and recent inspections; thread-safe, without sessions.

    Models are opened on first use, with `opening` of `models.open_model`; the latest stay open.
    """

    def __init__(self, choices: list[ModelChoice], note: str, pictures: Pictures, **opening):
        self.choices, self.note, self.pictures, self.opening = choices, note, pictures, opening
        self.session = uuid.uuid4().hex
        self.models = LRUCache(_OPEN_MODELS)
        self.inspections = LRUCache(_INSPECTIONS)
        self._opening = threading.Lock()  # one at a time: initial weights come from the global random generator

    def setup(self) -> dict:
        """Return the page's initial data: session, models, pictures, notes, colour map, largest upload in bytes."""
        colours = (255 * matplotlib.colormaps["viridis"](range(256))[:, :3]).round().astype(int)  # even in lightness
        return {
            "session": self.session,
            "models": [{"label": m.label, "group": m.group, "untrained": m.untrained} for m in self.choices],
            "model_note": self.note,
            "pictures": self.pictures.listing(),
            "picture_note": self.pictures.note,
            "colours": colours.tolist(),
            "largest_upload": MAX_UPLOAD_BYTES,
        }

    def model(self, number: int) -> OpenModel:
        """Return a model by its number in the menu."""
        if not 0 <= number < len(self.choices):
            raise UserError(f"model {number}: give a number from 0 to {len(self.choices) - 1}")
        specification = self.choices[number].specification

        def make() -> OpenModel:
            try:
                return OpenModel(open_model(specification, **self.opening), threading.Lock())
            except (TypeError, OSError, RuntimeError) as error:
                raise UserError(f"{specification} cannot be opened: {error}") from error

        return self.models.once(number, self._opening, make)

    def inspection(self, model: int, picture: str) -> Inspection:
        """Return the inspection of a picture (an id) by a model (a number)."""
        key = (model, picture, self.pictures.version(picture))
        found = self.inspections.get(key)  # without waiting for a busy model
        if found is None:
            opened = self.model(model)

            def make() -> Inspection:
                return inspect(opened.loaded, self.pictures.pixels(picture, opened.loaded.extract.image_size[0]))

            found = self.inspections.once(key, opened.lock, make)
        return found
