"""CUDA graphs: the kernels of a call are recorded once and launched together, which saves the host's time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from crate_fast.errors import UserError

_WARM_UPS = 3
_Result = TypeVar("_Result")


def record(function: Callable[[], _Result]) -> tuple[_Result, Callable[[], None]]:
    """Call `function` three times on a side stream, to load and tune what it uses, and record its next call.

    Returns:
        (result of the recorded call: tensors that only a replay fills; the replay).
    """
    if not torch.cuda.is_available():
        raise UserError("CUDA graphs need a CUDA GPU, and PyTorch finds none")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: loading threads, which pin memory meanwhile, must not end the recording
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay


class GraphedCall:
    """A function of tensors that is recorded as a CUDA graph at its first call and replayed at every call.

    Shapes, dtypes and addresses must stay those of the first call. The next call overwrites the result.

    Args:
        function: Takes tensors on the GPU; it neither waits for the device nor decides by values.
        recording: Makes a context that undoes the side effects of recording.
    """

    def __init__(
        self, function: Callable[..., _Result], recording: Callable[[], AbstractContextManager] = nullcontext
    ):
        self.function, self.recording = function, recording
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor) -> _Result:
        """Copy the inputs to where the graph reads them, and replay it."""
        if self._replay is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            with self.recording():
                self._result, self._replay = record(lambda: self.function(*self._inputs))
        for recorded, tensor in zip(self._inputs, inputs, strict=True):
            if (recorded.shape, recorded.dtype) != (tensor.shape, tensor.dtype):
                raise UserError(
                    f"the graph was recorded with {list(recorded.shape)} in {recorded.dtype}, and this is "
                    f"{list(tensor.shape)} in {tensor.dtype}: give it the same"
                )
            recorded.copy_(tensor)
        self._replay()
        return self._result
