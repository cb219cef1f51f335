"""Tied attention and its gradient for short sequences: a program keeps a whole head on chip (kernels/README.md §3).

The first FULL·64 tokens of a head are FULL blocks; the rest, at most 64 tokens, are extra keys, KEYS at a time.
E_ij = 2^(log2(e)·S_ij − shift) is symmetric, so each unordered pair of blocks needs one tile of E: it adds E W_j to
block i, and W_iᵀ E, transposed, to block j. One shift for the whole head replaces the running maximum. A second
launch, with the code of attention.py, computes the rest's rows, and heads whose logits spread too far for one shift.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.attention import (
    LARGEST_SUMS,
    LN_2,
    LOG2_E,
    backward_rows,
    block_d,
    find_head,
    forward_rows,
    numbers,
)
from crate_fast.kernels.launch import Launch, Tile, power_of_2

__all__ = ["BLOCK", "backward", "forward", "plan_backward", "plan_forward", "plan_rest", "serves", "split"]

BLOCK = 64  # tokens of a block
MOST_BLOCKS = 3  # more accumulators do not fit in the registers
LONGEST = {64: 256, 48: 240}  # head width: most tokens for which the gradient fits in the registers
HEADROOM = {torch.bfloat16: 90.0, torch.float32: 90.0, torch.float16: 15.0}  # log2 of the largest E in forward
LARGEST_SPREAD = {torch.bfloat16: 180.0, torch.float32: 180.0, torch.float16: 15.0}  # of S_ii in forward, log2
LARGEST_LSE_SPREAD = {torch.bfloat16: 100.0, torch.float32: 100.0, torch.float16: 12.0}  # of L in backward


@triton.jit
def _block(
    ptr, START: tl.constexpr, SIZE: tl.constexpr, N_TOKENS: tl.constexpr, STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load tokens START to START + SIZE of a head [SIZE, BLOCK_D], zero beyond it; masked only if needed."""
    offs_n = tl.arange(0, SIZE)
    offs_d = tl.arange(0, BLOCK_D)
    pointers = ptr + START * STRIDE + (offs_n[:, None] * STRIDE + offs_d[None, :])  # this order saves registers
    if START + SIZE <= N_TOKENS:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=(START + offs_n < N_TOKENS)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _numbers(ptr, START: tl.constexpr, SIZE: tl.constexpr, N_TOKENS: tl.constexpr):
    """Load one number per token of a block [SIZE], zero beyond the head."""
    offs_n = tl.arange(0, SIZE)
    if START + SIZE <= N_TOKENS:
        return tl.load(ptr + START + offs_n)
    else:
        return tl.load(ptr + START + offs_n, mask=START + offs_n < N_TOKENS, other=0.0)


@triton.jit
def _store_block(ptr, values, START: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store a whole block [SIZE, BLOCK_D] to a head's tokens from START on."""
    offs_n = tl.arange(0, values.shape[0])
    offs_d = tl.arange(0, values.shape[1])
    pointers = ptr + START * STRIDE + (offs_n[:, None] * STRIDE + offs_d[None, :])
    if values.shape[1] == HEAD_DIM:
        tl.store(pointers, values.to(ptr.dtype.element_ty))
    else:
        tl.store(pointers, values.to(ptr.dtype.element_ty), mask=(offs_d < HEAD_DIM)[None, :])


@triton.jit
def _own_logits(tokens):
    """Return |W_i|² of a block's tokens in fp32."""
    wide = tokens.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def _whole_head_fwd_kernel(
    w_ptr,  # subspace tokens [B, N, H, D], D contiguous
    out_ptr,  # O [B, N, H, D], contiguous, w's dtype
    lse_ptr,  # L [B, H, N], fp32, base 2
    refused_ptr,  # [B·H] int32: 1 if the second launch computes the head
    stride_wb, stride_wh,
    scale_log2,  # s·log2(e), at least 0
    N_TOKENS: tl.constexpr, N_HEADS: tl.constexpr, STRIDE_WN: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,  # blocks of BLOCK tokens
    KEYS: tl.constexpr,  # keys of the rest per step
    BLOCK: tl.constexpr, HEADROOM: tl.constexpr, LARGEST_SPREAD: tl.constexpr,
):  # fmt: skip
    """Compute O and L of the first FULL·BLOCK tokens of one head (paper, Eq. 5; kernels/README.md §3). Grid: (B·H).

    E_ij = 2^(log2(e)·S_ij − c) with c = max_i log2(e)·S_ii − HEADROOM; O_i = Σ_j E_ij W_j / Σ_j E_ij and
    L_i = c + log2 Σ_j E_ij. The sums use E as rounded to w's dtype for the product, so a token that attends only to
    itself gets exactly its own W_i. Sums are at least E_ii, so nothing overflows or vanishes if the S_ii spread by at
    most LARGEST_SPREAD. Reads W once, writes O once; deterministic.
    """
    index = tl.program_id(0)
    head, _ = find_head(
        index, w_ptr, out_ptr, lse_ptr, stride_wb, STRIDE_WN, stride_wh, N_TOKENS, N_HEADS, scale_log2, HEAD_DIM
    )
    FIRST: tl.constexpr = FULL * BLOCK  # first token of the rest
    w, sums, accs = (), (), ()
    smallest, largest = float("inf"), 0.0
    for t in tl.static_range(FULL):
        tokens = _block(head.w, t * BLOCK, BLOCK, N_TOKENS, STRIDE_WN, HEAD_DIM, BLOCK_D)
        own = _own_logits(tokens)
        smallest = tl.minimum(smallest, tl.min(own, 0))
        largest = tl.maximum(largest, tl.max(own, 0))
        w = w + (tokens,)
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
        accs = accs + (tl.zeros([BLOCK_D, BLOCK], tl.float32),)
    w_rest = ()
    for start in tl.static_range(FIRST, N_TOKENS, KEYS):
        tokens = _block(head.w, start, KEYS, N_TOKENS, STRIDE_WN, HEAD_DIM, BLOCK_D)
        largest = tl.maximum(largest, tl.max(_own_logits(tokens), 0))
        w_rest = w_rest + (tokens,)
    fits = (largest - smallest) * scale_log2 <= LARGEST_SPREAD  # False for NaN
    tl.store(refused_ptr + index, 1 - fits.to(tl.int32))
    shift = largest * scale_log2 - HEADROOM
    if fits:
        for i in tl.static_range(FULL):
            e = tl.exp2(tl.dot(w[i], tl.trans(w[i])) * scale_log2 - shift).to(w[i].dtype)
            row_sum = sums[i] + tl.sum(e.to(tl.float32), 1)
            acc = tl.dot(e, w[i], tl.trans(accs[i]))
            for j in tl.static_range(i + 1, FULL):
                e = tl.exp2(tl.dot(w[i], tl.trans(w[j])) * scale_log2 - shift).to(w[i].dtype)
                row_sum += tl.sum(e.to(tl.float32), 1)
                acc = tl.dot(e, w[j], acc)
                new_acc = tl.dot(tl.trans(w[i]), e, accs[j])
                new_sum = sums[j] + tl.sum(e.to(tl.float32), 0)
                accs = accs[:j] + (new_acc,) + accs[j + 1 :]
                sums = sums[:j] + (new_sum,) + sums[j + 1 :]
            for r in tl.static_range(len(w_rest)):
                e = tl.exp2(tl.dot(w[i], tl.trans(w_rest[r])) * scale_log2 - shift).to(w[i].dtype)
                if FIRST + (r + 1) * KEYS > N_TOKENS:
                    e = tl.where((FIRST + r * KEYS + tl.arange(0, KEYS) < N_TOKENS)[None, :], e, 0.0)
                row_sum += tl.sum(e.to(tl.float32), 1)
                acc = tl.dot(e, w_rest[r], acc)
            _store_block(head.out, acc / row_sum[:, None], i * BLOCK, N_HEADS * HEAD_DIM, HEAD_DIM)
            tl.store(head.lse + i * BLOCK + tl.arange(0, BLOCK), shift + tl.log2(row_sum))


@triton.jit
def _pair(w_i, g_i, d_i, w_j, g_j, d_j, shift, scale_log2, acc, acc_t, BOTH: tl.constexpr):
    """Add a pair of blocks to dW_i [BLOCK, D] in acc and, with BOTH, to dW_jᵀ [D, BLOCK] in acc_t; see the kernel."""
    e = tl.exp2(tl.dot(w_i, tl.trans(w_j)) * scale_log2 - shift)
    low = e.to(w_i.dtype)
    if BOTH:
        acc_t = tl.dot(tl.trans(g_i), low, acc_t)
    acc = tl.dot(low, g_j, acc)
    t = tl.dot(w_i, tl.trans(g_j), -d_i[:, None] - d_j[None, :])
    t = tl.dot(g_i, tl.trans(w_j), t)
    low = (e * (scale_log2 * LN_2) * t).to(w_i.dtype)
    if BOTH:
        acc_t = tl.dot(tl.trans(w_i), low, acc_t)
    acc = tl.dot(low, w_j, acc)
    return acc, acc_t


@triton.jit
def _rest_keys(
    w_i, g_i, d_i, w_ptr, g_ptr, d_ptr, shift, scale_log2, acc, FIRST: tl.constexpr,
    KEYS: tl.constexpr, N_TOKENS: tl.constexpr, STRIDE_WN: tl.constexpr, STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the keys of the rest, from token FIRST on, to dW_i in acc, KEYS at a time."""
    for start in tl.static_range(FIRST, N_TOKENS, KEYS):
        w_j = _block(w_ptr, start, KEYS, N_TOKENS, STRIDE_WN, HEAD_DIM, BLOCK_D)
        g_j = _block(g_ptr, start, KEYS, N_TOKENS, STRIDE, HEAD_DIM, BLOCK_D)
        d_j = _numbers(d_ptr, start, KEYS, N_TOKENS)
        acc, _ = _pair(w_i, g_i, d_i, w_j, g_j, d_j, shift, scale_log2, acc, acc, False)
    return acc


@triton.jit
def _whole_head_bwd_kernel(
    grad_ptr,  # dO [B, N, H, D], contiguous
    w_ptr,  # subspace tokens [B, N, H, D], D contiguous
    out_ptr,  # O [B, N, H, D], contiguous
    lse_ptr,  # L, from forward, [B, H, N], fp32
    dw_ptr,  # dW [B, N, H, D], contiguous, w's dtype
    g_ptr,  # the same memory, which holds g until dW is known; two arguments need fewer registers
    d_ptr,  # d [B, H, N], fp32, scratch memory
    refused_ptr,  # [B·H] int32: 1 if the second launch computes the head
    stride_wb, stride_wh,
    scale_log2,  # s·log2(e), at least 0
    N_TOKENS: tl.constexpr, N_HEADS: tl.constexpr, STRIDE_WN: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, FULL: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_A: tl.constexpr,  # N_TOKENS rounded up to a power of two
    LARGEST_SPREAD: tl.constexpr,
):  # fmt: skip
    """Compute dW of the first FULL·BLOCK tokens of one head (kernels/README.md §3). Grid: (B·H).

    dW_i = Σ_j E_ij g_j + s·Σ_j E_ij T_ij W_j with E_ij = 2^(log2(e)·S_ij − c), c in the middle of the L,
    g_i = 2^(c − L_i)·dO_i, d_i = g_i·O_i and T_ij = g_i·W_j + W_i·g_j − d_i − d_j. T's accumulator starts from the d:
    if a token attends only to itself, T_ii cancels before it is rounded. g is written to dw and read again, because
    an operand from memory needs no registers. Deterministic.
    """
    index = tl.program_id(0)
    head, dense = find_head(
        index, w_ptr, out_ptr, lse_ptr, stride_wb, STRIDE_WN, stride_wh, N_TOKENS, N_HEADS, scale_log2, HEAD_DIM
    )
    STRIDE: tl.constexpr = N_HEADS * HEAD_DIM
    FIRST: tl.constexpr = FULL * BLOCK  # first token of the rest
    grad_ptr += dense
    dw_ptr += dense
    g_ptr += dense
    d_ptr += index.to(tl.int64) * N_TOKENS
    offs_a = tl.arange(0, BLOCK_A)
    smallest = tl.min(tl.load(head.lse + offs_a, mask=offs_a < N_TOKENS, other=float("inf")), 0)
    largest = tl.max(tl.load(head.lse + offs_a, mask=offs_a < N_TOKENS, other=float("-inf")), 0)
    fits = largest - smallest <= LARGEST_SPREAD  # False for NaN
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
            out = tl.load(head.out + places, mask=mask, other=0.0)
            lse = tl.load(head.lse + offs_n, mask=mask_n, other=0.0)
            g = (grad.to(tl.float32) * tl.exp2(shift - lse)[:, None]).to(grad.dtype)
            tl.store(g_ptr + places, g, mask=mask)
            tl.store(d_ptr + offs_n, tl.sum(g.to(tl.float32) * out.to(tl.float32), 1), mask=mask_n)
        tl.debug_barrier()  # wait for other threads' stores

        w, g, accs = (), (), ()
        for t in tl.static_range(FULL):
            w = w + (_block(head.w, t * BLOCK, BLOCK, N_TOKENS, STRIDE_WN, HEAD_DIM, BLOCK_D),)
            g = g + (_block(g_ptr, t * BLOCK, BLOCK, N_TOKENS, STRIDE, HEAD_DIM, BLOCK_D),)
            accs = accs + (tl.zeros([BLOCK_D, BLOCK], tl.float32),)
            tl.debug_barrier()  # one block at a time: all loads at once do not fit in the registers
        for i in tl.static_range(FULL):
            d_i = _numbers(d_ptr, i * BLOCK, BLOCK, N_TOKENS)
            acc, _ = _pair(w[i], g[i], d_i, w[i], g[i], d_i, shift, scale_log2, tl.trans(accs[i]), accs[i], False)
            if i == 0:  # while the other accumulators are zero
                acc = _rest_keys(
                    w[i], g[i], d_i, head.w, g_ptr, d_ptr, shift, scale_log2, acc,
                    FIRST, KEYS, N_TOKENS, STRIDE_WN, STRIDE, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
            for j in tl.static_range(i + 1, FULL):
                d_j = _numbers(d_ptr, j * BLOCK, BLOCK, N_TOKENS)
                acc, acc_t = _pair(w[i], g[i], d_i, w[j], g[j], d_j, shift, scale_log2, acc, accs[j], True)
                accs = accs[:j] + (acc_t,) + accs[j + 1 :]
            if i > 0:
                acc = _rest_keys(
                    w[i], g[i], d_i, head.w, g_ptr, d_ptr, shift, scale_log2, acc,
                    FIRST, KEYS, N_TOKENS, STRIDE_WN, STRIDE, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
            _store_block(dw_ptr, acc, i * BLOCK, STRIDE, HEAD_DIM)


@triton.jit
def _rest_kernel(
    grad_ptr,  # dO, or None for forward
    w_ptr,  # this and the following arguments: as above
    out_ptr, lse_ptr, dw_ptr, refused_ptr, stride_wb, stride_wn, stride_wh, n_tokens, n_heads, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr,
    REST: tl.constexpr,  # tokens of the rest rounded up to a power of two, or 0
    BLOCK: tl.constexpr, LARGEST_SUM: tl.constexpr,
):  # fmt: skip
    """Compute O and L, or dW, of a head's rest, and of its blocks if the head was refused. Grid: (B·H)."""
    index = tl.num_programs(0) - 1 - tl.program_id(0)  # the heads that the first launch read last are still in L2
    head, dense = find_head(
        index, w_ptr, out_ptr, lse_ptr, stride_wb, stride_wn, stride_wh, n_tokens, n_heads, scale_log2, HEAD_DIM
    )
    refused = tl.load(refused_ptr + index)
    KEYS: tl.constexpr = BLOCK // 2  # more do not fit in the registers
    if grad_ptr is None:
        if REST > 0:
            forward_rows(head, FULL * BLOCK + tl.arange(0, REST), HEAD_DIM, BLOCK_D, KEYS, LARGEST_SUM)
        for start in range(0, refused * FULL * BLOCK, BLOCK):
            forward_rows(head, start + tl.arange(0, BLOCK), HEAD_DIM, BLOCK_D, KEYS, 0.0)
    else:
        if REST > 0:
            rest = FULL * BLOCK + tl.arange(0, REST)
            backward_rows(head, grad_ptr + dense, dw_ptr + dense, rest, HEAD_DIM, BLOCK_D, KEYS, False)
        for start in range(0, refused * FULL * BLOCK, BLOCK):
            offs_m = start + tl.arange(0, BLOCK)
            backward_rows(head, grad_ptr + dense, dw_ptr + dense, offs_m, HEAD_DIM, BLOCK_D, KEYS, False)


def split(n_tokens: int, tile: Tile) -> tuple[int, int, int]:
    """Return the numbers of whole blocks, of remaining tokens (0 or padded to 16, 32, 64), of their keys per step."""
    blocks = min(n_tokens // BLOCK, MOST_BLOCKS)
    rest = n_tokens - blocks * BLOCK
    padded = 0 if rest == 0 else max(16, power_of_2(rest))
    return blocks, padded, min(max(16, padded), tile.block_n if blocks == MOST_BLOCKS else BLOCK)


def serves(name: str, w: Tensor) -> bool:
    """Return True if the kernel "whole_head_forward" or "whole_head_backward" supports w [B, N, H, D].

    Backward supports only the head widths in LONGEST, because masks need too many registers, and not float16, where
    g = 2^(c − L)·dO leaves the range.
    """
    n_tokens, head_dim = w.shape[1], w.shape[3]
    if w.dtype == torch.float32 or not BLOCK <= n_tokens <= (MOST_BLOCKS + 1) * BLOCK:
        return False
    return name == "whole_head_forward" or (n_tokens <= LONGEST.get(head_dim, 0) and w.dtype != torch.float16)


def _constants(w: Tensor, tile: Tile) -> dict:
    blocks, _, keys = split(w.shape[1], tile)
    return {"N_TOKENS": w.shape[1], "N_HEADS": w.shape[2], "STRIDE_WN": w.stride(1), "KEYS": keys} | _sizes(w, blocks)


def _sizes(w: Tensor, blocks: int) -> dict:
    return {"HEAD_DIM": w.shape[3], "BLOCK_D": block_d(w), "FULL": blocks, "BLOCK": BLOCK}


def plan_forward(w: Tensor, out: Tensor, lse: Tensor, refused: Tensor, scale: float, tile: Tile) -> Launch:
    """Return the forward launch on these tensors."""
    tensors = {"w_ptr": w, "out_ptr": out, "lse_ptr": lse, "refused_ptr": refused}
    strides = {"stride_wb": w.stride(0), "stride_wh": w.stride(2), "scale_log2": scale * LOG2_E}
    constants = _constants(w, tile) | {"HEADROOM": HEADROOM[w.dtype], "LARGEST_SPREAD": LARGEST_SPREAD[w.dtype]}
    return Launch(_whole_head_fwd_kernel, (w.shape[0] * w.shape[2],), tensors | strides, constants, tile)


def plan_backward(
    grad: Tensor,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    dw: Tensor,
    d: Tensor,
    refused: Tensor,
    scale: float,
    tile: Tile,
) -> Launch:
    """Return the backward launch on these tensors; d [B, H, N] is scratch memory in fp32."""
    tensors = {"grad_ptr": grad, "w_ptr": w, "out_ptr": out, "lse_ptr": lse, "dw_ptr": dw, "g_ptr": dw, "d_ptr": d}
    strides = {"stride_wb": w.stride(0), "stride_wh": w.stride(2), "scale_log2": scale * LOG2_E}
    constants = {"BLOCK_A": power_of_2(w.shape[1]), "LARGEST_SPREAD": LARGEST_LSE_SPREAD[w.dtype]}
    arguments, constants = tensors | {"refused_ptr": refused} | strides, constants | _constants(w, tile)
    return Launch(_whole_head_bwd_kernel, (w.shape[0] * w.shape[2],), arguments, constants, tile)


def plan_rest(
    grad: Tensor | None,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    dw: Tensor | None,
    refused: Tensor,
    scale: float,
    tile: Tile,
) -> Launch:
    """Return the second launch, after forward (`grad` and `dw` are None) or after backward."""
    tensors = {"grad_ptr": grad, "w_ptr": w, "out_ptr": out, "lse_ptr": lse, "dw_ptr": dw, "refused_ptr": refused}
    blocks, rest, _ = split(w.shape[1], tile)
    constants = _sizes(w, blocks) | {"REST": rest, "LARGEST_SUM": LARGEST_SUMS.get(w.dtype, 0.0)}
    return Launch(_rest_kernel, (w.shape[0] * w.shape[2],), tensors | numbers(w, scale), constants, tile)


def forward(w: Tensor, out: Tensor, lse: Tensor, scale: float, tile: Tile) -> None:
    """Write O and L of w [B, N, H, D] to `out` and `lse`; see `attention.forward`."""
    refused = torch.empty(w.shape[0] * w.shape[2], dtype=torch.int32, device=w.device)
    plan_forward(w, out, lse, refused, scale, tile).run()
    plan_rest(None, w, out, lse, None, refused, scale, tile).run()


def backward(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, dw: Tensor, scale: float, tile: Tile) -> None:
    """Write dW of w [B, N, H, D] to `dw`; see `attention.backward`."""
    refused = torch.empty(w.shape[0] * w.shape[2], dtype=torch.int32, device=w.device)
    plan_backward(grad, w, out, lse, dw, torch.empty_like(lse), refused, scale, tile).run()
    plan_rest(grad, w, out, lse, dw, refused, scale, tile).run()
