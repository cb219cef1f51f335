"""Where PyTorch has to see its own operators instead of ours, and what ours say to a second derivative."""

import warnings
from contextlib import contextmanager, nullcontext

import torch
from torch.autograd import forward_ad
from torch.library import CustomOpDef

__all__ = [
    "being_transformed",
    "being_written",
    "own_operators_fit",
    "refuse_double_backward",
    "without_tracer_warnings",
]


def being_written() -> bool:
    """Return whether a graph is recorded that has to run without this package, at sizes it may not have seen yet.

    That is inside `torch.jit.trace` and `torch.export`, and so inside both exporters of ONNX.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return torch.jit.is_tracing() or torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # Dynamo would write the questions into its graph
def being_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation is under way.

    A registered operator has no rule for them: `torch.func.grad` refuses it, `vmap` runs it once per sample, and
    `jvp` takes its derivative for zero without a word. PyTorch has no public way to ask.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def own_operators_fit() -> bool:
    """Return whether operators that this package registers may run: outside of tracing, export and `torch.func`."""
    return not (being_written() or being_transformed())


def without_tracer_warnings():
    """A context for checks of shapes, which a trace is to be without: `torch.jit.trace` does not warn of them."""
    return _ignoring_tracer_warnings() if torch.jit.is_tracing() else nullcontext()


@contextmanager
def _ignoring_tracer_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


def refuse_double_backward(op: CustomOpDef, remedy: str) -> None:
    """Make differentiating a backward operator an error that says what to do instead."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{op._qualname} cannot be differentiated again (a second derivative was asked for): {remedy}, "
            "or use crate_fast.reference"
        )

    op.register_autograd(refuse)
