"""bfloat16 in Triton's interpreter, which by itself computes with its bits as integers.

Inside `interpreted_bfloat16` the interpreter's bf16 arrays have the dtype of ml_dtypes (which comes with onnx): every
result is rounded to nearest, ties to even, as a GPU does it. Products add up in float32.
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

__all__ = ["interpreted_bfloat16"]


@contextlib.contextmanager
def interpreted_bfloat16() -> Iterator[None]:
    """A context in which the kernels take bf16 tensors on a CPU and compute with them as a GPU does.

    Raises:
        AttributeError: A name of Triton's interpreter that this replaces is missing.
    """
    bfloat16, builder, handle = np.dtype(ml_dtypes.bfloat16), interpreter.InterpreterBuilder, interpreter.TensorHandle
    np_dtype, unavailable_reason = interpreter._get_np_dtype, kernels.unavailable_reason
    memory = interpreter._interpreter

    def np_dtype_or_bfloat16(dtype):
        return bfloat16 if dtype.scalar == tl.bfloat16 else np_dtype(dtype)

    def cast(self, source, dtype):  # Triton's own cuts digits off
        return handle(source.data.astype(np_dtype_or_bfloat16(dtype)), dtype.scalar)

    def get_bf16(self, value):
        return handle(np.array([value], bfloat16), tl.bfloat16)

    def load(pointers, mask, other, dtype):  # memory is read and written as bits: Triton 3.9 takes no other's dtypes
        if dtype != bfloat16:
            return memory.load(pointers, mask, other, dtype)
        bits = other.astype(bfloat16, copy=False).view(np.uint16)
        return memory.load(pointers, mask, bits, np.dtype(np.uint16)).view(bfloat16)

    def store(pointers, values, mask):
        return memory.store(pointers, values.view(np.uint16) if values.dtype == bfloat16 else values, mask)

    def reason(device, dtype=None, head_dim=None):
        interpreted = device.type == "cpu" and dtype == torch.bfloat16
        return unavailable_reason(device, torch.float32 if interpreted else dtype, head_dim)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):  # a GPU overflows without a word
        patch.setattr(interpreter, "_get_np_dtype", np_dtype_or_bfloat16)
        patch.setattr(interpreter, "_interpreter", SimpleNamespace(**vars(memory) | {"load": load, "store": store}))
        patch.setattr(builder, "cast_impl", cast)
        patch.setattr(builder, "get_bf16", get_bf16, raising=False)  # not in every Triton
        patch.setattr(kernels, "unavailable_reason", reason)
        yield
