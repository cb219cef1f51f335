"""bfloat16 in Triton's interpreter, which by itself computes with its bits as integers.

Inside `interpreted_bfloat16` a bf16 value is a float32 that bf16 can hold: every bf16 result is rounded to nearest,
ties to even, as a GPU does it. Products add up in float32. Memory holds the usual 16 bits. What no kernel does with
bf16 values (sums, scans, atomics, casts of bits) is refused.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from crate_fast import kernels

__all__ = ["interpreted_bfloat16", "round_to_bfloat16"]


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest bf16, ties to even; the result is float32, NaN where it was."""
    wide = np.asarray(values).astype(np.float32)
    bits = wide.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    quiet = bits | np.uint32(0x400000)  # a NaN whose payload is in the lower half stays one
    return (np.where(np.isnan(wide), quiet, nearest) & np.uint32(0xFFFF0000)).view(np.float32)


def _to_bits(values: np.ndarray) -> np.ndarray:
    return (round_to_bfloat16(values).view(np.uint32) >> 16).astype(np.uint16)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bfloat16(dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _handle_patches(rounded) -> dict:
    """Return replacements under which a bf16 handle holds float32 values, each passed through `rounded`."""
    handle, np_dtype, fits = interpreter.TensorHandle, interpreter._get_np_dtype, interpreter._validate_np_data_size

    def post_init(self):
        if _is_bfloat16(self.dtype) and self.data.dtype == bool:
            self.dtype = tl.int1  # a comparison, which the interpreter labels with its operands' dtype
        elif _is_bfloat16(self.dtype):
            assert self.data.dtype.kind == "f", f"bf16 values came as {self.data.dtype}: patch what made them"
            self.data = rounded(self.data)
        if not fits_or_bfloat16(self.data, self.dtype):
            raise ValueError(f"{self.data.dtype} does not fit in {self.dtype}")

    def fits_or_bfloat16(data, dtype):
        return data.itemsize <= 4 if _is_bfloat16(dtype) else fits(data, dtype)

    return {
        (handle, "__post_init__"): post_init,
        (interpreter, "_validate_np_data_size"): fits_or_bfloat16,
        (interpreter, "_get_np_dtype"): lambda ty: np.dtype(np.float32) if _is_bfloat16(ty) else np_dtype(ty),
    }


def _memory_patches() -> dict:
    """Return replacements for what reads and writes bf16's 16 bits."""
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def as_bits(pointers):
        return handle(pointers.data, tl.pointer_type(tl.uint16))

    def masked_load(self, ptrs, mask, other, *args, **kwargs):
        if ptrs.get_element_ty() != tl.bfloat16:
            return load(self, ptrs, mask, other, *args, **kwargs)
        other = None if other is None else handle(_to_bits(other.data), tl.uint16)
        return handle(_from_bits(load(self, as_bits(ptrs), mask, other, *args, **kwargs).data), tl.bfloat16)

    def masked_store(self, ptrs, value, mask, *args, **kwargs):
        if ptrs.get_element_ty() != tl.bfloat16:
            return store(self, ptrs, value, mask, *args, **kwargs)
        assert _is_bfloat16(value.dtype), f"{value.dtype} stored as bf16"
        return store(self, as_bits(ptrs), handle(_to_bits(value.data), tl.uint16), mask, *args, **kwargs)

    return {(builder, "create_masked_load"): masked_load, (builder, "create_masked_store"): masked_store}


def _other_patches() -> dict:
    """Return replacements for casts, and refusals of what takes bf16 values apart or adds them up in bf16."""
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float

    def converted(data, source, target, rounding):
        """From or to bf16: the handle made of the result rounds it to nearest."""
        if tl.bfloat16 not in (source, target):
            return convert(data, source, target, rounding)
        narrow = min(source.primitive_bitwidth, target.primitive_bitwidth) < 16
        if narrow or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError(f"{source} to {target}, rounded by {rounding}, in the interpreter")
        return data.astype(interpreter._get_np_dtype(target))

    def refused(original, name):
        def refuse(self, *args):
            dtypes = [getattr(arg, "dtype", arg) for arg in args]
            if any(isinstance(dtype, tl.dtype) and _is_bfloat16(dtype) for dtype in dtypes):
                raise NotImplementedError(f"{name} of bf16 in the interpreter: widen to float32")
            return original(self, *args)

        return refuse

    names = [(builder, f"create_{name}") for name in ("bitcast", "fabs", "atomic_rmw", "atomic_cas")]
    names += [(interpreter.ReduceOps, "sum"), (interpreter.ScanOps, "cumsum"), (interpreter.ScanOps, "cumprod")]
    refusals = {(owner, name): refused(getattr(owner, name), name) for owner, name in names}
    return {(interpreter, "_convert_float"): converted, **refusals}


def _allow_on_the_cpu(unavailable_reason):
    """`unavailable_reason` without the refusal of bf16 tensors on a CPU."""

    def reason(device, dtype=None, head_dim=None):
        interpreted = device.type == "cpu" and dtype == torch.bfloat16
        return unavailable_reason(device, torch.float32 if interpreted else dtype, head_dim)

    return reason


@contextlib.contextmanager
def interpreted_bfloat16(rounding: bool = True) -> Iterator[None]:
    """A context in which the kernels take bf16 tensors on a CPU and compute with them as a GPU does.

    Args:
        rounding: False keeps bf16 values in float32 and rounds at stores alone: for tests of tests.

    Raises:
        AttributeError: A name of Triton's interpreter that this replaces is missing.
    """
    patches = _handle_patches(round_to_bfloat16 if rounding else lambda data: data.astype(np.float32))
    patches |= _memory_patches() | _other_patches()
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):  # a GPU overflows without a word
        for (owner, name), replacement in patches.items():
            patch.setattr(owner, name, replacement)
        patch.setattr(  # not in every Triton
            interpreter.InterpreterBuilder,
            "get_bf16",
            lambda self, value: interpreter.TensorHandle(np.array([value], np.float32), tl.bfloat16),
            raising=False,
        )
        patch.setattr(kernels, "unavailable_reason", _allow_on_the_cpu(kernels.unavailable_reason))
        yield
