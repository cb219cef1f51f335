"""G = η(D − DᵀD), the one matrix of an ISTA step: computed once a call, or once for many calls in a scope."""

from contextlib import contextmanager

import torch
from torch import Tensor

from crate_fast.autocast import without_autocast
from crate_fast.cpu import linear

__all__ = ["cached_dictionaries", "fold_dictionary", "fold_dictionary_once"]


class _FoldDictionary(torch.autograd.Function):
    """D − DᵀD. Its gradient needs one product, not the two that autograd would find: dG − D(dG + dGᵀ)."""

    @staticmethod
    def forward(dictionary):
        return dictionary - linear(dictionary.t(), dictionary.t())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (dictionary,) = ctx.saved_tensors
        return grad - linear(dictionary, grad + grad.t())


def fold_dictionary(dictionary: Tensor, step_size: float = 0.1) -> Tensor:
    """The matrix of the ISTA gradient step, G = η(D − DᵀD): x + xG = x + η(xD − xDᵀD).

    Args:
        dictionary: D [C, C].
        step_size: η.

    Returns:
        G [C, C] in the dictionary's dtype, computed without autocast.
    """
    with without_autocast(dictionary.device.type):
        return step_size * _FoldDictionary.apply(dictionary)


_cache: dict | None = None  # (id of D, η, dtype) → (D, its version, G), inside the scope


@contextmanager
def cached_dictionaries():
    """A scope in which every dictionary is folded once, however often it is used: the steps of one weight update.

    For gradient accumulation (forward and backward of all micro-batches), activation checkpointing, evaluation
    loops and serving. Inside, no dictionary may change: a change that PyTorch counts (an optimiser's step,
    `load_state_dict`) is an error, one behind its back (`parameter.data.add_(…)`) goes unseen. Outside, and in
    compiled code, every call folds anew: for an image batch of M tokens that is C/M of the step's own product.

    >>> with cached_dictionaries():
    ...     pass  # for batch in batches: model(batch)
    """
    global _cache
    outer, _cache = _cache, {} if _cache is None else _cache
    try:
        yield
    finally:
        _cache = outer


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def fold_dictionary_once(dictionary: Tensor, step_size: float, dtype: torch.dtype) -> Tensor:
    """`fold_dictionary` in `dtype` and without a gradient, from the scope's cache where there is one.

    Raises:
        RuntimeError: The dictionary has changed since the scope folded it.
    """
    with torch.no_grad():
        if _cache is None or torch.compiler.is_compiling():
            return fold_dictionary(dictionary, step_size).to(dtype)
        key = (id(dictionary), step_size, dtype)
        if key not in _cache:
            folded = fold_dictionary(dictionary, step_size).to(dtype)
            _cache[key] = (dictionary, _version(dictionary), folded)
        _, version, folded = _cache[key]
        if version != _version(dictionary):
            raise RuntimeError(
                "a dictionary changed inside cached_dictionaries(): end the scope before the optimiser's step"
            )
        return folded
