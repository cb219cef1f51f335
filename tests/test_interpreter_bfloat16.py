"""bf16 in Triton's interpreter against PyTorch's bf16, bit for bit; matrix products to fp32 rounding."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

on_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about Triton's interpreter")
pytestmark = [pytest.mark.usefixtures("bfloat16"), on_gpu]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SPECIAL = [0.0, 1.0, torch.inf, 3.4e38, 65504.0, 1e-38, 9e-41, 1e-45]
SPECIAL += [-value for value in SPECIAL] + [torch.nan]


@triton.jit
def _kernel(a_ptr, b_ptr, out_ptr, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    a = tl.load(a_ptr + tl.arange(0, SIZE))
    b = tl.load(b_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), tl.reshape(FUNCTION(a, b), [SIZE]))


def _run(function, a, b=None, *, dtype=BF16):
    """Return function(a, b) of flat blocks, computed in the interpreter and stored as `dtype`."""
    out = torch.empty(a.numel(), dtype=dtype)
    _kernel[(1,)](a, a if b is None else b, out, function, a.numel())
    return out


def _equal(actual, expected):
    """Return True if the bits are equal; any NaN equals any other."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    same = torch.where(expected.isnan(), actual.isnan(), actual.view(integers) == expected.view(integers))
    return actual.dtype == expected.dtype and bool(same.all())


def _values(seed=0, size=4096):
    """Return fp32 numbers of every exponent; half are ties or next to one, the last are SPECIAL."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2**32, size, dtype=np.uint32)
    low = np.array([0x8000, 0x7FFF, 0x8001, 0x0000], np.uint32)
    bits[::2] = (bits[::2] & np.uint32(0xFFFF0000)) | low[np.arange(size // 2) % 4]
    values = torch.from_numpy(bits.view(np.float32))
    values[-len(SPECIAL) :] = torch.tensor(SPECIAL)
    return values


def _moderate(size=1024, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(BF16)


def test_every_bf16_number_is_loaded_and_stored():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    assert _equal(_run(lambda a, b: a, every), every)
    assert _equal(_run(lambda a, b: a, every, dtype=FP32), every.float())


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_casts_round_as_pytorch(dtype):
    values, low = _values().to(dtype), _values().to(BF16)
    to = getattr(tl, str(dtype).removeprefix("torch."))
    assert _equal(_run(lambda a, b: a.to(tl.bfloat16), values), values.to(BF16))
    assert _equal(_run(lambda a, b: a, values), values.to(BF16))  # at a store
    assert _equal(_run(lambda a, b: a.to(to), low, dtype=dtype), low.to(dtype))


def test_elementwise_operations_round_as_pytorch():
    a, b = _values(1).to(BF16), _values(2).to(BF16).roll(1000)
    a[:2048], b[:2048] = _moderate(2048, 1), _moderate(2048, 2)
    b[::3] = a[::3]
    expected = a.where((a > b) & (a != 1.0), torch.tensor(0.1, dtype=BF16))
    assert _equal(_run(lambda a, b: tl.where((a > b) & (a != 1.0), a, 0.1), a, b), expected)
    expected = (a.float() * b.float() + a.float()).to(BF16)
    assert _equal(_run(lambda a, b: a.to(tl.float32) * b + a, a, b), expected)


def test_matrix_products_accumulate_in_fp32():
    a, b = _moderate(64 * 64, 1), _moderate(64 * 64, 2)

    def ours(a, b):
        return tl.dot(tl.reshape(a, [64, 64]), tl.reshape(b, [64, 64]), tl.zeros([64, 64], tl.float32))

    def of_rounded(a, b):  # with an operand computed in the kernel
        weights = tl.exp2(tl.reshape(a, [64, 64]).to(tl.float32))
        return tl.dot(weights.to(tl.bfloat16), tl.reshape(b, [64, 64]))

    for function, first, tolerance in ((ours, a, 1e-5), (of_rounded, a.float().exp2().to(BF16), 1e-4)):
        product = first.view(64, 64).double() @ b.view(64, 64).double()
        found = _run(function, a, b, dtype=FP32).view(64, 64).double()
        torch.testing.assert_close(found, product, rtol=0, atol=tolerance)
