"""bfloat16 in Triton's interpreter, which otherwise treats its bits as integers.

Inside `interpreted_bfloat16` bf16 arrays have the dtype of ml_dtypes (from onnx): every result is rounded to
nearest, ties to even, as on a GPU. Matrix products accumulate in float32.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from crate_fast import kernels


@contextlib.contextmanager
def interpreted_bfloat16() -> Iterator[None]:
    """Let the kernels accept bf16 tensors on a CPU, and round them as a GPU does."""
    bfloat16, builder, handle = np.dtype(ml_dtypes.bfloat16), interpreter.InterpreterBuilder, interpreter.TensorHandle
    np_dtype, unavailable_reason = interpreter._get_np_dtype, kernels.unavailable_reason
    memory = interpreter._interpreter

    def np_dtype_or_bfloat16(dtype):
        return bfloat16 if dtype.scalar == tl.bfloat16 else np_dtype(dtype)

    def cast(self, source, dtype):  # Triton's own truncates
        return handle(source.data.astype(np_dtype_or_bfloat16(dtype)), dtype.scalar)

    def get_bf16(self, value):
        return handle(np.array([value], bfloat16), tl.bfloat16)

    def load(pointers, mask, other, dtype):  # memory is accessed as uint16: Triton 3.9 rejects ml_dtypes
        if dtype != bfloat16:
            return memory.load(pointers, mask, other, dtype)
        bits = other.astype(bfloat16, copy=False).view(np.uint16)
        return memory.load(pointers, mask, bits, np.dtype(np.uint16)).view(bfloat16)

    def store(pointers, values, mask):
        return memory.store(pointers, values.view(np.uint16) if values.dtype == bfloat16 else values, mask)

    def reason(device, dtype=None, head_dim=None):
        interpreted = device.type == "cpu" and dtype == torch.bfloat16
        return unavailable_reason(device, torch.float32 if interpreted else dtype, head_dim)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):  # no warnings, as on a GPU
        patch.setattr(interpreter, "_get_np_dtype", np_dtype_or_bfloat16)
        patch.setattr(interpreter, "_interpreter", SimpleNamespace(**vars(memory) | {"load": load, "store": store}))
        patch.setattr(builder, "cast_impl", cast)
        patch.setattr(builder, "get_bf16", get_bf16, raising=False)  # not in every Triton
        patch.setattr(kernels, "unavailable_reason", reason)
        yield
