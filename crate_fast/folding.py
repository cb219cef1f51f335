"""G = η(D − DᵀD), the one matrix of an ISTA step: computed once a call, or once for many calls in a scope."""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from crate_fast.autocast import without_autocast
from crate_fast.cpu import linear
from crate_fast.tracing import own_operators_fit

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
        if own_operators_fit():
            return step_size * _FoldDictionary.apply(dictionary)
        return step_size * (dictionary - dictionary.t() @ dictionary)


@dataclass
class _Cache:
    """What the open scopes share; every thread's, since autograd recomputes checkpoints in threads of its own."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    scopes: int = 0
    entries: dict = field(default_factory=dict)  # (id of D, η, dtype, who folds, stream) → (D, its version, G)
    hook: object = None


_cache = _Cache()


def _refuse_step(*_) -> None:
    raise RuntimeError("an optimiser steps inside cached_dictionaries(): end the scope before the step")


@contextmanager
def cached_dictionaries():
    """A scope in which every dictionary is folded once, however often it is used: the steps of one weight update.

    For gradient accumulation (forward and backward of all micro-batches), activation checkpointing, evaluation
    loops and serving. Inside, no dictionary may change: an optimiser's step and a change that PyTorch counts
    (`load_state_dict`) are errors; one behind its back (`parameter.data.add_(…)`) goes unseen. Only `nn.Parameter`s
    are kept. Outside, in compiled code and while a CUDA graph is captured, every call folds anew.

    >>> with cached_dictionaries():
    ...     pass  # for batch in batches: model(batch)
    """
    with _cache.lock:
        if _cache.scopes == 0:
            _cache.hook = register_optimizer_step_pre_hook(_refuse_step)
        _cache.scopes += 1
    try:
        yield
    finally:
        with _cache.lock:
            _cache.scopes -= 1
            if _cache.scopes == 0:
                _cache.hook.remove()
                _cache.entries.clear()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _cacheable(dictionary: Tensor) -> bool:
    if torch.compiler.is_compiling() or _cache.scopes == 0 or not isinstance(dictionary, nn.Parameter):
        return False
    return dictionary.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _fold(dictionary: Tensor, step_size: float, dtype: torch.dtype) -> Tensor:
    return fold_dictionary(dictionary, step_size).to(dtype)


def fold_dictionary_once(
    dictionary: Tensor,
    step_size: float,
    dtype: torch.dtype,
    fold: Callable[[Tensor, float, torch.dtype], Tensor] = _fold,
) -> Tensor:
    """G in `dtype` and without a gradient, from the scopes' cache where one is open; `fold` computes it.

    Raises:
        RuntimeError: The dictionary has changed since a scope folded it.
    """
    if not _cacheable(dictionary):
        with torch.no_grad():
            return fold(dictionary, step_size, dtype)
    key = (id(dictionary), step_size, dtype, fold, _stream(dictionary.device))
    with _cache.lock:
        if key not in _cache.entries:
            with torch.inference_mode(False), torch.no_grad():  # so that a training step can use it too
                folded = fold(dictionary, step_size, dtype)
            _cache.entries[key] = (dictionary, _version(dictionary), folded)
        _, version, folded = _cache.entries[key]
    if version != _version(dictionary):
        raise RuntimeError("a dictionary changed inside cached_dictionaries(): end the scope before it changes")
    return folded
