"""Tied attention and its gradient for short sequences: a program keeps a whole head on chip (kernels/README.md §3).

The head's first FULL·64 tokens are FULL blocks; the rest, at most 64 tokens, are further keys, KEYS at a time. E_ij =
2^(log2(e)·S_ij − shift) is symmetric, so an unordered pair of blocks needs one tile of it: the tile times W_j goes to
block i, and W_iᵀ times the tile, transposed, to block j. One shift serves the whole head, so there is no running
maximum and no rescaling.

Heads for which one shift does not do (the spread of their logits is too large), and the rest's own rows, are left to
a second launch, of the code in `row_blocks.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.attention_common import LARGEST_SUMS, LOG2_E, addressable
from crate_fast.kernels.launch import Launch
from crate_fast.kernels.row_blocks import backward_rows, forward_rows
from crate_fast.kernels.tiles import LONGEST, Tile, find

__all__ = ["BLOCK", "backward", "forward", "plan_backward", "plan_forward", "plan_remainder", "split", "tile_for"]

BLOCK = 64  # tokens of a block
MOST_BLOCKS = 3  # whose accumulators fit in the registers
HEADROOM = {torch.bfloat16: 90.0, torch.float32: 90.0, torch.float16: 15.0}  # log2 of the largest E in forward
LARGEST_SPREAD = {torch.bfloat16: 180.0, torch.float32: 180.0, torch.float16: 15.0}  # of S_ii in forward, log2
LARGEST_LSE_SPREAD = {torch.bfloat16: 100.0, torch.float32: 100.0, torch.float16: 12.0}  # of L in backward


@triton.jit
def _head(N_HEADS: tl.constexpr):
    """Which head this program works on: batch·H + head, and the two apart in 64 bits."""
    index = tl.program_id(0)
    return index, (index // N_HEADS).to(tl.int64), (index % N_HEADS).to(tl.int64)


@triton.jit
def _block(
    ptr, START: tl.constexpr, SIZE: tl.constexpr, N_TOKENS: tl.constexpr, STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens START to START + SIZE of a head [SIZE, BLOCK_D], zero beyond the head; masked only where it must be."""
    offs_n = tl.arange(0, SIZE)
    offs_d = tl.arange(0, BLOCK_D)
    pointers = ptr + START * STRIDE + (offs_n[:, None] * STRIDE + offs_d[None, :])  # START in the pointer: see below
    if START + SIZE <= N_TOKENS:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=(START + offs_n < N_TOKENS)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_block(ptr, values, START: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A whole block [SIZE, BLOCK_D] to a head's tokens from START on."""
    offs_n = tl.arange(0, values.shape[0])
    offs_d = tl.arange(0, values.shape[1])
    pointers = ptr + START * STRIDE + (offs_n[:, None] * STRIDE + offs_d[None, :])
    if values.shape[1] == HEAD_DIM:
        tl.store(pointers, values.to(ptr.dtype.element_ty))
    else:
        tl.store(pointers, values.to(ptr.dtype.element_ty), mask=(offs_d < HEAD_DIM)[None, :])


@triton.jit
def _own_logits(tokens):
    """|W_i|² of a block's tokens, in fp32."""
    wide = tokens.to(tl.float32)
    return tl.sum(wide * wide, 1)


# --- forward -----------------------------------------------------------------------------------------------------


@triton.jit
def _whole_head_fwd_kernel(
    w_ptr,  # subspace tokens [B, N, H, D], D contiguous
    out_ptr,  # O [B, N, H, D], contiguous, w's dtype
    lse_ptr,  # L [B, H, N], fp32, base 2
    refused_ptr,  # [B·H] int32: 1 where the head is left to the second launch
    stride_wb,
    stride_wh,
    scale_log2,  # s·log2(e), at least 0
    N_TOKENS: tl.constexpr,
    N_HEADS: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,  # blocks of BLOCK tokens
    KEYS: tl.constexpr,  # of the rest, taken at once
    BLOCK: tl.constexpr,
    HEADROOM: tl.constexpr,
    LARGEST_SPREAD: tl.constexpr,
):
    """O and L of the first FULL·BLOCK tokens of one head (paper, Eq. 5).

    E_ij = 2^(log2(e)·S_ij − c) with c = max_i log2(e)·S_ii − HEADROOM, which no logit exceeds by more than HEADROOM:
    O_i = Σ_j E_ij W_j / Σ_j E_ij and L_i = c + log2 Σ_j E_ij. A row's sum is at least E_ii, so it neither overflows
    nor vanishes while the S_ii spread by at most LARGEST_SPREAD. Grid: (B·H). Reads W once, writes O once, keeps
    both accumulators of a pair of blocks in registers: [BLOCK, D] of block i, and [D, BLOCK] of each later block.
    Deterministic.
    """
    index, batch, head = _head(N_HEADS)
    w_ptr += batch * stride_wb + head * stride_wh
    out_ptr += (batch * N_TOKENS * N_HEADS + head) * HEAD_DIM
    lse_ptr += index.to(tl.int64) * N_TOKENS
    FIRST: tl.constexpr = FULL * BLOCK  # of the rest
    w, sums, accs = (), (), ()
    smallest, largest = float("inf"), 0.0
    for t in tl.static_range(FULL):
        tokens = _block(w_ptr, t * BLOCK, BLOCK, N_TOKENS, STRIDE_WN, HEAD_DIM, BLOCK_D)
        own = _own_logits(tokens)
        smallest = tl.minimum(smallest, tl.min(own, 0))
        largest = tl.maximum(largest, tl.max(own, 0))
        w = w + (tokens,)
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
        accs = accs + (tl.zeros([BLOCK_D, BLOCK], tl.float32),)
    w_rest = ()
    for start in tl.static_range(FIRST, N_TOKENS, KEYS):
        tokens = _block(w_ptr, start, KEYS, N_TOKENS, STRIDE_WN, HEAD_DIM, BLOCK_D)
        largest = tl.maximum(largest, tl.max(_own_logits(tokens), 0))
        w_rest = w_rest + (tokens,)
    fits = (largest - smallest) * scale_log2 <= LARGEST_SPREAD  # not where one is NaN
    tl.store(refused_ptr + index, 1 - fits.to(tl.int32))
    shift = largest * scale_log2 - HEADROOM
    if fits:
        for i in tl.static_range(FULL):
            e = tl.exp2(tl.dot(w[i], tl.trans(w[i])) * scale_log2 - shift)
            row_sum = sums[i] + tl.sum(e, 1)
            acc = tl.dot(e.to(w[i].dtype), w[i], tl.trans(accs[i]))
            for j in tl.static_range(i + 1, FULL):
                e = tl.exp2(tl.dot(w[i], tl.trans(w[j])) * scale_log2 - shift)
                row_sum += tl.sum(e, 1)
                low = e.to(w[i].dtype)
                acc = tl.dot(low, w[j], acc)
                new_acc = tl.dot(tl.trans(w[i]), low, accs[j])
                new_sum = sums[j] + tl.sum(e, 0)
                accs = accs[:j] + (new_acc,) + accs[j + 1 :]
                sums = sums[:j] + (new_sum,) + sums[j + 1 :]
            for r in tl.static_range(len(w_rest)):
                e = tl.exp2(tl.dot(w[i], tl.trans(w_rest[r])) * scale_log2 - shift)
                if FIRST + (r + 1) * KEYS > N_TOKENS:
                    e = tl.where((FIRST + r * KEYS + tl.arange(0, KEYS) < N_TOKENS)[None, :], e, 0.0)
                row_sum += tl.sum(e, 1)
                acc = tl.dot(e.to(w[i].dtype), w_rest[r], acc)
            _store_block(out_ptr, acc / row_sum[:, None], i * BLOCK, N_HEADS * HEAD_DIM, HEAD_DIM)
            tl.store(lse_ptr + i * BLOCK + tl.arange(0, BLOCK), shift + tl.log2(row_sum))


# --- backward ----------------------------------------------------------------------------------------------------


@triton.jit
def _pair(w_i, g_i, delta_i, w_j, g_j, v_j, shift, scale, scale_log2, acc, acc_t, BOTH: tl.constexpr):
    """What a pair of blocks gives to dW_i [BLOCK, D] and, with BOTH, to dW_jᵀ [D, BLOCK]; see the kernel.

    Of 60 orders of the products, compiled for heads 48 wide, this one spills least: nothing up to 240 tokens.
    """
    e = tl.exp2(tl.dot(w_i, tl.trans(w_j)) * scale_log2 - shift)
    low = e.to(w_i.dtype)
    e *= scale
    if BOTH:
        acc_t = tl.dot(tl.trans(g_i), low, acc_t)
    acc = tl.dot(low, v_j, acc)
    t = tl.dot(w_i, tl.trans(g_j))
    t = tl.dot(g_i, tl.trans(w_j), t)
    if BOTH:
        acc_t = tl.dot(tl.trans(w_i), (e * (t - delta_i[:, None])).to(w_i.dtype), acc_t)
    acc = tl.dot((e * t).to(w_i.dtype), w_j, acc)
    return acc, acc_t


@triton.jit
def _operands(
    w_ptr, g_ptr, delta_ptr, scale, START: tl.constexpr, SIZE: tl.constexpr, N_TOKENS: tl.constexpr,
    STRIDE_WN: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """W, g, and v = g − s·d·W of a block."""
    w = _block(w_ptr, START, SIZE, N_TOKENS, STRIDE_WN, HEAD_DIM, BLOCK_D)
    g = _block(g_ptr, START, SIZE, N_TOKENS, STRIDE, HEAD_DIM, BLOCK_D)
    offs_n = tl.arange(0, SIZE)
    if START + SIZE <= N_TOKENS:
        delta = tl.load(delta_ptr + START + offs_n)
    else:
        delta = tl.load(delta_ptr + START + offs_n, mask=START + offs_n < N_TOKENS, other=0.0)
    v = g.to(tl.float32) - (scale * delta)[:, None] * w.to(tl.float32)
    return w, g, v.to(w.dtype)


@triton.jit
def _rest_keys(
    w_i, g_i, delta_i, w_ptr, g_ptr, delta_ptr, shift, scale, scale_log2, acc, FIRST: tl.constexpr,
    KEYS: tl.constexpr, N_TOKENS: tl.constexpr, STRIDE_WN: tl.constexpr, STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the rest's tokens, from FIRST on, give to dW_i, KEYS of them at a time. Their own rows come later."""
    for start in tl.static_range(FIRST, N_TOKENS, KEYS):
        w_j, g_j, v_j = _operands(
            w_ptr, g_ptr, delta_ptr, scale, start, KEYS, N_TOKENS, STRIDE_WN, STRIDE, HEAD_DIM, BLOCK_D
        )
        acc, _ = _pair(w_i, g_i, delta_i, w_j, g_j, v_j, shift, scale, scale_log2, acc, acc, False)
    return acc


@triton.jit
def _whole_head_bwd_kernel(
    grad_ptr,  # dO [B, N, H, D], contiguous
    w_ptr,  # subspace tokens [B, N, H, D], D contiguous
    out_ptr,  # O [B, N, H, D], contiguous
    lse_ptr,  # L, from forward, [B, H, N], fp32
    dw_ptr,  # dW [B, N, H, D], contiguous, w's dtype
    g_ptr,  # the same memory, which holds g until dW is known; two names, so that no address is kept for both
    delta_ptr,  # d [B, H, N], fp32, for this program alone
    factor_ptr,  # s·δ [B, H, N], fp32, for this program alone
    refused_ptr,  # [B·H] int32: 1 where the head is left to the second launch
    stride_wb,
    stride_wh,
    scale,  # s, at least 0
    scale_log2,  # s·log2(e)
    N_TOKENS: tl.constexpr,
    N_HEADS: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_A: tl.constexpr,  # N_TOKENS to the next power of two
    LARGEST_SPREAD: tl.constexpr,
):
    """dW of the first FULL·BLOCK tokens of one head.

    With λ_i = 2^(c − L_i), P_ij = λ_i E_ij for E_ij = 2^(log2(e)·S_ij − c). Let g_i = λ_i·dO_i, d_i = g_i·O_i and
    T_ij = g_i·W_j + W_i·g_j. Then (kernels/README.md §3)

        dW_i = Σ_j E_ij (g_j − s·d_j W_j) + s·Σ_j E_ij T_ij W_j − s·(d_i/λ_i) O_i,

    where the last term is −s·d_i Σ_j E_ij W_j. So a pair needs one exponential and seven products: E, two for
    T, and for each of the two blocks one with E and one with E∘T. c is the middle of the L, and dO enters only as g,
    rounded to w's dtype. g is written to dw and read again, because an operand that comes from memory needs no
    registers. Grid: (B·H). Reads W, dO, O and L, writes dW; deterministic.
    """
    index, batch, head = _head(N_HEADS)
    STRIDE: tl.constexpr = N_HEADS * HEAD_DIM
    w_ptr += batch * stride_wb + head * stride_wh
    dense = (batch * N_TOKENS * N_HEADS + head) * HEAD_DIM
    grad_ptr += dense
    out_ptr += dense
    dw_ptr += dense
    g_ptr += dense
    lse_ptr += index.to(tl.int64) * N_TOKENS
    delta_ptr += index.to(tl.int64) * N_TOKENS
    factor_ptr += index.to(tl.int64) * N_TOKENS
    offs_a = tl.arange(0, BLOCK_A)
    smallest = tl.min(tl.load(lse_ptr + offs_a, mask=offs_a < N_TOKENS, other=float("inf")), 0)
    largest = tl.max(tl.load(lse_ptr + offs_a, mask=offs_a < N_TOKENS, other=float("-inf")), 0)
    fits = largest - smallest <= LARGEST_SPREAD  # not where one is NaN
    tl.store(refused_ptr + index, 1 - fits.to(tl.int32))
    if fits:
        shift = (smallest + largest) * 0.5
        offs_d = tl.arange(0, BLOCK_D)
        for start in range(0, N_TOKENS, BLOCK):
            offs_n = start + tl.arange(0, BLOCK)
            mask_n = offs_n < N_TOKENS
            places = offs_n[:, None] * STRIDE + offs_d[None, :]
            mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
            grad = tl.load(grad_ptr + places, mask=mask, other=0.0)
            out = tl.load(out_ptr + places, mask=mask, other=0.0)
            lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)
            g = (grad.to(tl.float32) * tl.exp2(shift - lse)[:, None]).to(grad.dtype)
            delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
            tl.store(g_ptr + places, g, mask=mask)
            tl.store(delta_ptr + offs_n, delta, mask=mask_n)
            tl.store(factor_ptr + offs_n, scale * delta * tl.exp2(lse - shift), mask=mask_n)
        tl.debug_barrier()  # other threads' stores

        w, g, v, accs = (), (), (), ()
        for t in tl.static_range(FULL):
            w_block, g_block, v_block = _operands(
                w_ptr, g_ptr, delta_ptr, scale, t * BLOCK, BLOCK, N_TOKENS, STRIDE_WN, STRIDE, HEAD_DIM, BLOCK_D
            )
            w = w + (w_block,)
            g = g + (g_block,)
            v = v + (v_block,)
            accs = accs + (tl.zeros([BLOCK_D, BLOCK], tl.float32),)
            tl.debug_barrier()  # one block's loads after another's: all at once do not fit in the registers
        for i in tl.static_range(FULL):
            delta = tl.load(delta_ptr + i * BLOCK + tl.arange(0, BLOCK))
            acc, _ = _pair(
                w[i], g[i], delta, w[i], g[i], v[i], shift, scale, scale_log2, tl.trans(accs[i]), accs[i], False
            )
            if i == 0:  # while the other accumulators are zero
                acc = _rest_keys(
                    w[i], g[i], delta, w_ptr, g_ptr, delta_ptr, shift, scale, scale_log2, acc,
                    FULL * BLOCK, KEYS, N_TOKENS, STRIDE_WN, STRIDE, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
            for j in tl.static_range(i + 1, FULL):
                acc, acc_t = _pair(w[i], g[i], delta, w[j], g[j], v[j], shift, scale, scale_log2, acc, accs[j], True)
                accs = accs[:j] + (acc_t,) + accs[j + 1 :]
            if i > 0:
                acc = _rest_keys(
                    w[i], g[i], delta, w_ptr, g_ptr, delta_ptr, shift, scale, scale_log2, acc,
                    FULL * BLOCK, KEYS, N_TOKENS, STRIDE_WN, STRIDE, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
            out = _block(out_ptr, i * BLOCK, BLOCK, N_TOKENS, STRIDE, HEAD_DIM, BLOCK_D)
            acc -= tl.load(factor_ptr + i * BLOCK + tl.arange(0, BLOCK))[:, None] * out.to(tl.float32)
            _store_block(dw_ptr, acc, i * BLOCK, STRIDE, HEAD_DIM)


# --- what is left ------------------------------------------------------------------------------------------------


@triton.jit
def _remainder_fwd_kernel(
    w_ptr,  # as the forward kernel's
    out_ptr,
    lse_ptr,
    refused_ptr,
    stride_wb,
    stride_wn,
    stride_wh,
    n_tokens,
    n_heads,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST_SUM: tl.constexpr,
):
    """O and L of a head's rest, and of its blocks where the forward kernel refused the head.

    Grid: (B·H, 1 + FULL): part 0 is the rest, part k block k − 1.
    """
    index, part = tl.program_id(0), tl.program_id(1)
    batch, head = (index // n_heads).to(tl.int64), (index % n_heads).to(tl.int64)
    w_ptr += batch * stride_wb + head * stride_wh
    out_ptr += (batch * n_tokens * n_heads + head) * HEAD_DIM
    lse_ptr += index.to(tl.int64) * n_tokens
    if part == 0:
        if BLOCK_R > 0:
            forward_rows(
                w_ptr, out_ptr, lse_ptr, None, FULL * BLOCK + tl.arange(0, BLOCK_R), stride_wn, n_tokens, n_heads,
                scale_log2, index, 0.0, HEAD_DIM, BLOCK_D, BLOCK, LARGEST_SUM, False, "ieee",
            )  # fmt: skip
    else:
        if tl.load(refused_ptr + index) != 0:
            forward_rows(
                w_ptr, out_ptr, lse_ptr, None, (part - 1) * BLOCK + tl.arange(0, BLOCK), stride_wn, n_tokens, n_heads,
                scale_log2, index, 0.0, HEAD_DIM, BLOCK_D, BLOCK, 0.0, False, "ieee",
            )  # fmt: skip


@triton.jit
def _remainder_bwd_kernel(
    grad_ptr,  # as the backward kernel's
    w_ptr,
    out_ptr,
    lse_ptr,
    dw_ptr,
    refused_ptr,
    stride_wb,
    stride_wn,
    stride_wh,
    n_tokens,
    n_heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dW of a head's rest, and of its blocks where the backward kernel refused the head; grid as the forward's."""
    index, part = tl.program_id(0), tl.program_id(1)
    batch, head = (index // n_heads).to(tl.int64), (index % n_heads).to(tl.int64)
    dense = (batch * n_tokens * n_heads + head) * HEAD_DIM
    w_ptr += batch * stride_wb + head * stride_wh
    lse_ptr += index.to(tl.int64) * n_tokens
    if part == 0:
        if BLOCK_R > 0:
            backward_rows(
                grad_ptr + dense, w_ptr, out_ptr + dense, lse_ptr, dw_ptr + dense, None, None,
                FULL * BLOCK + tl.arange(0, BLOCK_R), stride_wn, n_tokens, n_heads, scale, scale_log2, index, 0.0,
                HEAD_DIM, BLOCK_D, BLOCK, 0.0, False, False, "ieee",
            )  # fmt: skip
    else:
        if tl.load(refused_ptr + index) != 0:
            backward_rows(
                grad_ptr + dense, w_ptr, out_ptr + dense, lse_ptr, dw_ptr + dense, None, None,
                (part - 1) * BLOCK + tl.arange(0, BLOCK), stride_wn, n_tokens, n_heads, scale, scale_log2, index, 0.0,
                HEAD_DIM, BLOCK_D, BLOCK, 0.0, False, False, "ieee",
            )  # fmt: skip


# --- launches ----------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """How a head's tokens are divided."""

    blocks: int  # of BLOCK tokens
    rest: int  # to the next power of two and at least 16, or 0
    keys: int  # of the rest, taken at once


def split(n_tokens: int, tile: Tile) -> Split | None:
    """Of a sequence; None where this file's kernels do not fit it."""
    blocks = min(n_tokens // BLOCK, MOST_BLOCKS)
    rest = n_tokens - blocks * BLOCK
    if blocks == 0 or rest > BLOCK:
        return None
    padded = 0 if rest == 0 else max(16, triton.next_power_of_2(rest))
    most = tile.block_n if blocks == MOST_BLOCKS else BLOCK
    return Split(blocks, padded, min(max(16, padded), most))


def tile_for(name: str, w: Tensor, precision: str) -> Tile | None:
    """The table's tile where a kernel of this file is to be used for w [B, N, H, D], else None.

    The gradient takes heads of the widths in LONGEST alone (masks cost the last registers), and not float16, whose
    range g = 2^(c − L)·dO would leave.

    Args:
        name: "whole_head_forward" or "whole_head_backward".
        w: Subspace tokens.
        precision: A `launch.Precision`'s row.
    """
    block_d = max(32, triton.next_power_of_2(w.shape[3]))
    tile = find(name, w.device, precision, block_d)
    if tile is None or split(w.shape[1], tile) is None:
        return None
    if name == "whole_head_backward" and (w.shape[1] > LONGEST.get(w.shape[3], 0) or w.dtype == torch.float16):
        return None
    return tile


def _sizes(w: Tensor, tile: Tile) -> dict:
    return {
        "HEAD_DIM": w.shape[3],
        "BLOCK_D": max(32, triton.next_power_of_2(w.shape[3])),
        "FULL": split(w.shape[1], tile).blocks,
        "BLOCK": BLOCK,
    }


def _constants(w: Tensor, tile: Tile) -> dict:
    own = {"N_TOKENS": w.shape[1], "N_HEADS": w.shape[2], "STRIDE_WN": w.stride(1)}
    return own | _sizes(w, tile) | {"KEYS": split(w.shape[1], tile).keys}


def plan_forward(w: Tensor, out: Tensor, lse: Tensor, refused: Tensor, scale: float, tile: Tile) -> Launch:
    """The forward launch on these tensors; what `forward` runs and the compile report compiles."""
    tensors = {"w_ptr": w, "out_ptr": out, "lse_ptr": lse, "refused_ptr": refused}
    limits = {"HEADROOM": HEADROOM[w.dtype], "LARGEST_SPREAD": LARGEST_SPREAD[w.dtype]}
    return Launch(
        kernel=_whole_head_fwd_kernel,
        grid=(w.shape[0] * w.shape[2],),
        arguments=tensors | {"stride_wb": w.stride(0), "stride_wh": w.stride(2), "scale_log2": scale * LOG2_E},
        constants=_constants(w, tile) | limits,
        tile=tile,
    )


def plan_backward(
    grad: Tensor,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    dw: Tensor,
    room: Tensor,
    refused: Tensor,
    scale: float,
    tile: Tile,
) -> Launch:
    """The backward launch on these tensors, with room [2, B, H, N] in fp32 for d and s·δ."""
    tensors = {
        "grad_ptr": grad,
        "w_ptr": w,
        "out_ptr": out,
        "lse_ptr": lse,
        "dw_ptr": dw,
        "g_ptr": dw,
        "delta_ptr": room[0],
        "factor_ptr": room[1],
        "refused_ptr": refused,
    }
    numbers = {
        "stride_wb": w.stride(0),
        "stride_wh": w.stride(2),
        "scale": scale,
        "scale_log2": scale * LOG2_E,
    }
    more = {"BLOCK_A": triton.next_power_of_2(w.shape[1]), "LARGEST_SPREAD": LARGEST_LSE_SPREAD[w.dtype]}
    return Launch(
        kernel=_whole_head_bwd_kernel,
        grid=(w.shape[0] * w.shape[2],),
        arguments=tensors | numbers,
        constants=_constants(w, tile) | more,
        tile=tile,
    )


def plan_remainder(
    grad: Tensor | None,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    dw: Tensor | None,
    refused: Tensor,
    scale: float,
    tile: Tile,
) -> Launch:
    """The second launch, after forward (grad and dw None) or after backward."""
    batch, n_tokens, n_heads, _ = w.shape
    tensors = {"w_ptr": w, "out_ptr": out, "lse_ptr": lse, "refused_ptr": refused}
    numbers = {
        "stride_wb": w.stride(0),
        "stride_wn": w.stride(1),
        "stride_wh": w.stride(2),
        "n_tokens": n_tokens,
        "n_heads": n_heads,
        "scale_log2": scale * LOG2_E,
    }
    constants = _sizes(w, tile) | {"BLOCK_R": split(w.shape[1], tile).rest}
    if grad is None:
        kernel = _remainder_fwd_kernel
        constants["LARGEST_SUM"] = LARGEST_SUMS.get(w.dtype, 0.0)
    else:
        kernel = _remainder_bwd_kernel
        tensors |= {"grad_ptr": grad, "dw_ptr": dw}
        numbers["scale"] = scale
    return Launch(
        kernel=kernel,
        grid=(batch * n_heads, 1 + constants["FULL"]),
        arguments=tensors | numbers,
        constants=constants,
        tile=tile,
    )


def forward(w: Tensor, scale: float, tile: Tile) -> tuple[Tensor, Tensor]:
    """O and L of w [B, N, H, D]; see `subspace_attention.forward`. `tile` is from `tile_for`."""
    w = addressable(w)
    batch, n_tokens, n_heads, _ = w.shape
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    lse = torch.empty(batch, n_heads, n_tokens, dtype=torch.float32, device=w.device)
    if w.numel():
        refused = torch.empty(batch * n_heads, dtype=torch.int32, device=w.device)
        plan_forward(w, out, lse, refused, scale, tile).run()
        plan_remainder(None, w, out, lse, None, refused, scale, tile).run()
    return out, lse


def backward(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float, tile: Tile) -> Tensor:
    """dW [B, N, H, D]; see `subspace_attention.backward`."""
    w, grad, out = addressable(w), grad.contiguous(), out.contiguous()
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if w.numel():
        refused = torch.empty(w.shape[0] * w.shape[2], dtype=torch.int32, device=w.device)
        room = torch.empty(2, *lse.shape, dtype=torch.float32, device=w.device)
        plan_backward(grad, w, out, lse, dw, room, refused, scale, tile).run()
        plan_remainder(grad, w, out, lse, dw, refused, scale, tile).run()
    return dw
