"""A small kernel of two chained products, which shows whether an assembler compiles them right."""

import torch
import triton
import triton.language as tl


@triton.jit
def _two_products_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    out_ptr,  # [M, K], fp32
    n_cols,  # N, a multiple of BLOCK
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (A Bᵀ / K) B. The second product's left operand is in registers: what old assemblers get wrong on Hopper.

    Grid: (M / BLOCK_M).
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, K)
    a = tl.load(a_ptr + offs_m[:, None] * K + offs_k[None, :])
    acc = tl.zeros([BLOCK_M, K], tl.float32)
    for start in range(0, n_cols, BLOCK):
        b = tl.load(b_ptr + (start + tl.arange(0, BLOCK))[:, None] * K + offs_k[None, :])
        first = tl.dot(a, tl.trans(b)) / K
        acc = tl.dot(first.to(b.dtype), b, acc)
    tl.store(out_ptr + offs_m[:, None] * K + offs_k[None, :], acc)


def trial(device: torch.device) -> float:
    """Return the relative norm of the products' error at 4 and 8 warps; ValueError where it is not rounding."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    rows, cols, k = (256, 512, 64) if device.type == "cuda" else (128, 128, 64)
    a, b = (torch.randn(size, k, device=device).to(dtype) for size in (rows, cols))
    expected = a.double() @ b.double().t() / k @ b.double()
    worst = 0.0
    for warps in (4, 8):
        out = torch.full((rows, k), torch.nan, device=device)
        _two_products_kernel[(rows // 128,)](a, b, out, cols, K=k, BLOCK_M=128, BLOCK=64, num_warps=warps)
        error = ((out.double() - expected).norm() / expected.norm()).item()
        if not error < 1e-2:
            raise ValueError(f"products of tensor cores are wrong at {warps} warps: {error:.1%} of the norm")
        worst = max(worst, error)
    return worst
