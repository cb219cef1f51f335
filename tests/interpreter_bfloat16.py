"""bfloat16 in Triton's interpreter, which by itself computes with its bits as integers.

Inside `interpreted_bfloat16` a bf16 value is a float32 that bf16 can hold: every bf16 result is rounded to nearest,
ties to even, as a GPU does it. Products add up in float32. Memory holds the usual 16 bits.
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
    load, store, bitcast = builder.create_masked_load, builder.create_masked_store, builder.create_bitcast

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

    def any_bitcast(self, src, dst_type):
        source = handle(_to_bits(src.data), tl.uint16) if _is_bfloat16(src.dtype) else src
        if _is_bfloat16(dst_type):
            return handle(_from_bits(source.data.view(np.uint16)), tl.bfloat16)
        return bitcast(self, source, dst_type)

    def no_atomics(original):
        def atomic(self, *args):
            if any(_is_bfloat16(arg.dtype) for arg in args if isinstance(arg, handle)):
                raise NotImplementedError("atomics on bf16 in the interpreter")
            return original(self, *args)

        return atomic

    return {
        (builder, "create_masked_load"): masked_load,
        (builder, "create_masked_store"): masked_store,
        (builder, "create_bitcast"): any_bitcast,
        (builder, "create_atomic_rmw"): no_atomics(builder.create_atomic_rmw),
        (builder, "create_atomic_cas"): no_atomics(builder.create_atomic_cas),
    }


def _arithmetic_patches() -> dict:
    """Return replacements for what takes bf16's bits apart, and for sums, which round at each addition."""
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    convert, fabs, reduced_sum = interpreter._convert_float, builder.create_fabs, interpreter.ReduceOps.sum

    def converted(data, source, target, rounding):
        """From or to bf16: the handle made of the result rounds it to nearest."""
        if tl.bfloat16 not in (source, target):
            return convert(data, source, target, rounding)
        if source.primitive_bitwidth < 16 or target.primitive_bitwidth < 16:
            raise NotImplementedError(f"{source} to {target} in the interpreter")
        wide = data.astype(interpreter._get_np_dtype(target))
        if target == tl.bfloat16 and rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return np.where(np.isnan(wide), wide, _from_bits((wide.view(np.uint32) >> 16).astype(np.uint16)))
        return wide

    def absolute(self, arg):
        return handle(np.abs(arg.data), tl.bfloat16) if _is_bfloat16(arg.dtype) else fabs(self, arg)

    def halving_sum(self, input):
        """Rounded after each of log2(size) additions, as a GPU's threads do it."""
        if not _is_bfloat16(input.dtype):
            return reduced_sum(self, input)
        data = input.handle.data
        for axis in range(data.ndim) if self.axis is None else [self.axis]:
            while data.shape[axis] > 1:
                first, second = np.split(data, 2, axis)
                data = handle(first + second, tl.bfloat16).data
        return reduced_sum(self, tl.core.tensor(handle(data, tl.bfloat16), input.dtype))

    def no_scan(original):
        def scan(self, input):
            if _is_bfloat16(input.dtype):
                raise NotImplementedError("scans of bf16 in the interpreter: widen to float32, as tl.cumsum does")
            return original(self, input)

        return scan

    return {
        (interpreter, "_convert_float"): converted,
        (builder, "create_fabs"): absolute,
        (interpreter.ReduceOps, "sum"): halving_sum,
        (interpreter.ScanOps, "cumsum"): no_scan(interpreter.ScanOps.cumsum),
        (interpreter.ScanOps, "cumprod"): no_scan(interpreter.ScanOps.cumprod),
    }


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
    patches |= _memory_patches() | _arithmetic_patches()
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
