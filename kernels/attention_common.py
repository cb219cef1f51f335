"""What the attention kernels share: where a program works, dropout's mask, products, and a launch's arguments."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, matmul_precision
from crate_fast.kernels.tiles import Tile, lookup

__all__ = [
    "LARGEST_SUMS",
    "LOG2_E",
    "addressable",
    "dropout_keep",
    "inner_products",
    "load_columns",
    "place",
    "plan",
    "tile_for",
]

LOG2_E = 1 / math.log(2)
LARGEST_SUMS = {  # of a row's weights, up to which no running maximum is needed; fp32 always has one
    torch.bfloat16: 2.0**60,  # so that weights times W stay finite
    torch.float16: 2.0**15,  # so that the weights do
}


@triton.jit
def place(n_tokens, n_heads, BLOCK_M: tl.constexpr):
    """Which head this program works on (batch·H + head, and the two apart in 64 bits) and which of its tokens."""
    row_blocks = tl.cdiv(n_tokens, BLOCK_M)
    head_index = tl.program_id(0) // row_blocks
    start_m = (tl.program_id(0) % row_blocks) * BLOCK_M
    batch = (head_index // n_heads).to(tl.int64)
    head = (head_index % n_heads).to(tl.int64)
    return head_index, batch, head, start_m + tl.arange(0, BLOCK_M)


@triton.jit
def dropout_keep(seed, head_index, rows, cols, dropout_p):
    """Whether attention weight (row, col) of a head is kept: a Philox draw at that position, so that backward
    finds the same mask, and its transpose, without storing it. rows and cols broadcast to the tile."""
    rows = (rows + cols * 0).to(tl.uint32)
    cols = (cols + rows.to(tl.int32) * 0).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, rows, cols, rows * 0 + head_index.to(tl.uint32), rows * 0)
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def inner_products(a, b, PRECISION: tl.constexpr):
    """a bᵀ in fp32 for a [M, D] and b [N, D].

    On the plain units (fp32, "ieee") a thread keeps whole rows of its operands in registers, and 128 channels of two
    do not fit: there even and odd channels are multiplied one after the other, with a barrier between them so that
    the compiler does not load all of them first.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32 and a.shape[1] > 64:
        a_even, a_odd = tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))
        b_even, b_odd = tl.split(tl.reshape(b, [b.shape[0], b.shape[1] // 2, 2]))
        even = tl.dot(a_even, tl.trans(b_even), input_precision=PRECISION)
        tl.debug_barrier()
        return tl.dot(a_odd, tl.trans(b_odd), even, input_precision=PRECISION)
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def load_columns(pointers, mask, UNMASKED: tl.constexpr):
    """A block of whole tokens; without a mask where the head width is a power of two."""
    if UNMASKED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


def tile_for(name: str, w: Tensor, dropout_p: float) -> Tile:
    """The table's tile of an attention kernel for w [B, N, H, D]."""
    block_d = max(32, triton.next_power_of_2(w.shape[3]))
    return lookup(name + "_dropout" * (dropout_p > 0), w.device, matmul_precision(w.dtype).row, block_d)


def plan(
    kernel,
    name: str,
    w: Tensor,
    tensors: dict[str, Tensor | None],
    scale: float,
    dropout_p: float,
    tile: Tile | None,
    more: dict | None = None,
) -> Launch:
    """The launch of one of this file's kernels; `more` are its further arguments and constants."""
    batch, n_tokens, n_heads, head_dim = w.shape
    precision = matmul_precision(w.dtype)
    block_d = max(32, triton.next_power_of_2(head_dim))
    tile = tile or tile_for(name, w, dropout_p)
    names = {
        "stride_wb": w.stride(0),
        "stride_wn": w.stride(1),
        "stride_wh": w.stride(2),
        "n_tokens": n_tokens,
        "n_heads": n_heads,
        "scale_log2": scale * LOG2_E,
        "dropout_p": dropout_p,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "HAS_DROPOUT": dropout_p > 0.0,
        "PRECISION": precision.dot,
        **(more or {}),
    }
    return Launch(
        kernel=kernel,
        grid=(triton.cdiv(n_tokens, tile.block_m) * batch * n_heads,),
        arguments=tensors | {name: value for name, value in names.items() if name.islower()},
        constants={name: value for name, value in names.items() if name.isupper()},
        tile=tile,
    )


def addressable(w: Tensor) -> Tensor:
    """`w` itself where the kernels can address it, else a contiguous copy.

    They assume that D is contiguous, and that offsets inside an image fit in 32 bits (those between images need not):
    every projection's output does both, unless one image has 2³¹ elements.
    """
    n_tokens, n_heads, head_dim = w.shape[1:]
    if n_tokens * n_heads * head_dim >= 2**31:
        raise ValueError(f"w has shape {tuple(w.shape)}: N·H·D must be under 2³¹; split the heads over several calls")
    fits = n_tokens * w.stride(1) < 2**31
    return w if fits and (w.stride(3) == 1 or head_dim == 1) else w.contiguous()
