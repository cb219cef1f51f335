"""Tied attention and its gradient by blocks of rows, for any length (kernels/README.md §1, §2): one pass each, but
for fp32, where a pass for δ comes before the gradient's.

Tied logits S = s·W Wᵀ, s ≥ 0, are kinder than others. A row's own logit S_ii is at most its maximum, and known before
the first key is read: it takes the maximum's place. And padding tokens are zero vectors, so whatever finite weight
they get, they add nothing; their logits, 0, never raise a maximum that is at least S_ii ≥ 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.attention_common import (
    LARGEST_SUMS,
    addressable,
    dropout_keep,
    inner_products,
    load_columns,
    place,
    plan,
    tile_for,
)
from crate_fast.kernels.launch import Launch, matmul_precision
from crate_fast.kernels.tiles import Tile

__all__ = ["backward", "forward", "needs_delta", "plan_backward", "plan_delta", "plan_forward"]

LARGEST_SPREAD = 100.0  # of a head's L (base 2), up to which backward takes two weights from one exponential


@triton.jit
def _attend(
    w_rows,  # [BLOCK_M, BLOCK_D] queries
    w_cols,  # [BLOCK_N, BLOCK_D] keys, which are the values too
    acc,  # [BLOCK_M, BLOCK_D] fp32, unnormalised output
    shift,  # [BLOCK_M] fp32, what the rows' logits are lowered by, in units of log2
    row_sum,  # [BLOCK_M] fp32
    offs_m,
    offs_n,
    n_tokens,
    scale_log2,
    seed,
    head_index,
    dropout_p,
    MASKED: tl.constexpr,
    RUNNING: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of a softmax over a block of keys; MASKED where some of them lie beyond the sequence, RUNNING where
    `shift` follows the largest logit so far."""
    logits = inner_products(w_rows, w_cols, PRECISION)
    if RUNNING:
        largest = tl.maximum(shift, tl.max(logits, 1) * scale_log2)
        rescale = tl.exp2(shift - largest)
        row_sum *= rescale
        acc = acc * rescale[:, None]
        shift = largest
    weights = tl.exp2(logits * scale_log2 - shift[:, None])
    if MASKED:
        weights = tl.where(offs_n[None, :] < n_tokens, weights, 0.0)
    row_sum += tl.sum(weights, 1)
    if HAS_DROPOUT:
        keep = dropout_keep(seed, head_index, offs_m[:, None], offs_n[None, :], dropout_p)
        weights = tl.where(keep, weights, 0.0)
    acc = tl.dot(weights.to(w_cols.dtype), w_cols, acc, input_precision=PRECISION)
    return acc, shift, row_sum


@triton.jit
def _sweep(
    w_ptr,  # the head's tokens
    w_rows,
    shift,
    offs_m,
    stride_wn,
    n_tokens,
    scale_log2,
    seed,
    head_index,
    dropout_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    RUNNING: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All keys of a head for some of its queries: the unnormalised output, its shift, and the sums of the weights."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    acc = tl.zeros([w_rows.shape[0], BLOCK_D], tl.float32)
    row_sum = tl.zeros([w_rows.shape[0]], tl.float32)
    full = n_tokens // BLOCK_N * BLOCK_N
    cols_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_d[None, :]
    for start_n in tl.range(0, full, BLOCK_N, num_stages=STAGES):
        w_cols = load_columns(cols_ptrs, mask_d[None, :], HEAD_DIM == BLOCK_D)
        acc, shift, row_sum = _attend(
            w_rows, w_cols, acc, shift, row_sum, offs_m, start_n + offs_n, n_tokens, scale_log2,
            seed, head_index, dropout_p, False, RUNNING, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
        cols_ptrs += BLOCK_N * stride_wn
    if full < n_tokens:
        w_cols = tl.load(cols_ptrs, mask=(full + offs_n < n_tokens)[:, None] & mask_d[None, :], other=0.0)
        acc, shift, row_sum = _attend(
            w_rows, w_cols, acc, shift, row_sum, offs_m, full + offs_n, n_tokens, scale_log2,
            seed, head_index, dropout_p, True, RUNNING, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    return acc, shift, row_sum


@triton.jit
def forward_rows(
    w_ptr,  # the head's tokens
    out_ptr,  # the head's O
    lse_ptr,  # the head's L
    seed_ptr,
    offs_m,  # [BLOCK_M] the queries
    stride_wn,
    n_tokens,
    n_heads,
    scale_log2,
    head_index,
    dropout_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LARGEST_SUM: tl.constexpr,  # 0: with a running maximum from the start
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O_i and L_i for some tokens i of a head, in one pass over its tokens, or two (kernels/README.md §1).

    The first pass lowers a row's logits by its own, S_ii, which is known beforehand. Where that leaves weights whose
    sum exceeds LARGEST_SUM, or is not a number, the second takes over, with a running maximum.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < n_tokens
    mask_rows = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    w_rows = tl.load(w_ptr + offs_m[:, None] * stride_wn + offs_d[None, :], mask=mask_rows, other=0.0)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    if LARGEST_SUM > 0:
        wide = w_rows.to(tl.float32)
        own = tl.sum(wide * wide, 1) * scale_log2
        acc, shift, row_sum = _sweep(
            w_ptr, w_rows, own, offs_m, stride_wn, n_tokens, scale_log2, seed, head_index, dropout_p,
            HEAD_DIM, BLOCK_D, BLOCK_N, None, False, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
        if tl.min((row_sum <= LARGEST_SUM).to(tl.int32), 0) == 0:
            acc, shift, row_sum = _sweep(
                w_ptr, w_rows, own * 0.0, offs_m, stride_wn, n_tokens, scale_log2, seed, head_index, dropout_p,
                HEAD_DIM, BLOCK_D, BLOCK_N, 1, True, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
    else:
        zero = tl.zeros([w_rows.shape[0]], tl.float32)
        acc, shift, row_sum = _sweep(
            w_ptr, w_rows, zero, offs_m, stride_wn, n_tokens, scale_log2, seed, head_index, dropout_p,
            HEAD_DIM, BLOCK_D, BLOCK_N, None, True, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    kept = row_sum * (1.0 - dropout_p) if HAS_DROPOUT else row_sum
    out = acc / kept[:, None]
    tl.store(
        out_ptr + offs_m[:, None] * (n_heads * HEAD_DIM) + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_rows,
    )
    tl.store(lse_ptr + offs_m, shift + tl.log2(row_sum), mask=mask_m)


@triton.jit
def _subspace_attention_fwd_kernel(
    w_ptr,  # subspace tokens [B, N, H, D], D contiguous
    out_ptr,  # O [B, N, H, D], contiguous, w's dtype
    lse_ptr,  # log2 Σ_j 2^(log2(e)·S_ij) [B, H, N], fp32
    seed_ptr,  # int64 scalar, or None without dropout
    stride_wb,
    stride_wn,
    stride_wh,
    n_tokens,
    n_heads,
    scale_log2,  # s·log2(e), at least 0
    dropout_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM to the next power of two, at least 32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LARGEST_SUM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O_i = Σ_j P_ij W_j for BLOCK_M tokens i of one head, and their log-sum-exp (paper, Eq. 5).

    Grid: (⌈N / BLOCK_M⌉·B·H), the row blocks of a head side by side. Reads the head's tokens once, a block of
    BLOCK_N at a time, each as key and as value. Softmax and accumulation in fp32; the weights are rounded to
    w's dtype for the second product. Deterministic. 4·N²·D FLOPs a head, nominal.
    """
    head_index, batch, head, offs_m = place(n_tokens, n_heads, BLOCK_M)
    forward_rows(
        w_ptr + (batch * stride_wb + head * stride_wh),
        out_ptr + (batch * n_tokens * n_heads + head) * HEAD_DIM,
        lse_ptr + head_index.to(tl.int64) * n_tokens,
        seed_ptr, offs_m, stride_wn, n_tokens, n_heads, scale_log2, head_index, dropout_p,
        HEAD_DIM, BLOCK_D, BLOCK_N, LARGEST_SUM, HAS_DROPOUT, PRECISION,
    )  # fmt: skip


@triton.jit
def _subspace_attention_delta_kernel(
    grad_ptr,  # dO [B, N, H, D], contiguous
    w_ptr,  # subspace tokens [B, N, H, D], D contiguous
    lse_ptr,  # L, from forward, [B, H, N], fp32
    delta_ptr,  # δ [B, H, N], fp32
    own_lse_ptr,  # L again [B, H, N], fp32
    seed_ptr,  # int64 scalar, or None without dropout
    stride_wb,
    stride_wn,
    stride_wh,
    n_tokens,
    n_heads,
    scale_log2,  # s·log2(e), at least 0
    dropout_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """δ_i = Σ_j P_ij (dO_i·W_j), which is dO_i·O_i, and L_i, for BLOCK_M tokens, by backward's own products.

    For fp32 on the plain units alone: there a row that attends to one token cancels dO·W − δ to the last bit, as
    eager PyTorch does, where dO·O leaves the rounding of two different sums (kernels/README.md, precision).
    Grid: as forward. Deterministic.
    """
    head_index, batch, head, offs_m = place(n_tokens, n_heads, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < n_tokens
    mask_d = offs_d < HEAD_DIM
    mask_rows = mask_m[:, None] & mask_d[None, :]

    w_ptr += batch * stride_wb + head * stride_wh
    grad_ptr += (batch * n_tokens * n_heads + head) * HEAD_DIM
    statistics = head_index.to(tl.int64) * n_tokens + offs_m
    w_rows = tl.load(w_ptr + offs_m[:, None] * stride_wn + offs_d[None, :], mask=mask_rows, other=0.0)
    dense_rows = offs_m[:, None] * (n_heads * HEAD_DIM) + offs_d[None, :]
    grad_rows = tl.load(grad_ptr + dense_rows, mask=mask_rows, other=0.0)
    lse_rows = tl.load(lse_ptr + statistics, mask=mask_m, other=0.0)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    delta = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)  # of the weights: 1, but for the rounding of other products
    for start_n in range(0, n_tokens, BLOCK_N):
        cols = start_n + offs_n
        mask_cols = (cols < n_tokens)[:, None] & mask_d[None, :]
        w_cols = tl.load(w_ptr + cols[:, None] * stride_wn + offs_d[None, :], mask=mask_cols, other=0.0)
        logits = inner_products(w_rows, w_cols, PRECISION)
        grad_ij = inner_products(grad_rows, w_cols, PRECISION)
        weights_ij = tl.exp2(logits * scale_log2 - lse_rows[:, None])
        weights_ij = tl.where((cols < n_tokens)[None, :], weights_ij, 0.0)
        if HAS_DROPOUT:
            keep_ij = dropout_keep(seed, head_index, offs_m[:, None], cols[None, :], dropout_p)
            grad_ij = tl.where(keep_ij, grad_ij * (1.0 / (1.0 - dropout_p)), 0.0)
        delta += tl.sum(weights_ij * grad_ij, 1)
        total += tl.sum(weights_ij, 1)
    tl.store(delta_ptr + statistics, delta / total, mask=mask_m)
    tl.store(own_lse_ptr + statistics, lse_rows + tl.log2(total), mask=mask_m)


@triton.jit
def _spread(lse_ptr, n_tokens, BLOCK: tl.constexpr):
    """The middle of the log-sum-exps of a head, and how far apart the smallest and the largest are."""
    offs = tl.arange(0, BLOCK)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, n_tokens, BLOCK, num_stages=1):
        mask = start + offs < n_tokens
        low = tl.minimum(low, tl.load(lse_ptr + start + offs, mask=mask, other=float("inf")))
        high = tl.maximum(high, tl.load(lse_ptr + start + offs, mask=mask, other=float("-inf")))
    smallest, largest = tl.min(low, 0), tl.max(high, 0)
    return (smallest + largest) * 0.5, largest - smallest


@triton.jit
def _gradient_sweep(
    w_rows,  # [BLOCK_M, BLOCK_D]
    grad_rows,  # dO of the rows
    lse_rows,  # [BLOCK_M]
    delta_rows,  # s·δ of the rows
    shift,  # a number between the head's smallest and largest L
    grad_ptr,  # the head's tensors, as the kernel's
    w_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    seed,
    offs_m,
    stride_wn,
    n_tokens,
    n_heads,
    scale,
    scale_log2,
    head_index,
    dropout_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ONE_EXP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW of some rows: all tokens j of the head, a block at a time.

    ONE_EXP: both weights of a tile from one exponential, P_ij = F_ij·2^(shift − L_i), P_ji = F_ij·2^(shift − L_j).
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    dense_stride = n_heads * HEAD_DIM
    acc = tl.zeros([w_rows.shape[0], BLOCK_D], tl.float32)
    factor_rows = tl.exp2(shift - lse_rows)
    w_cols_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_d[None, :]
    dense_cols = offs_n[:, None] * dense_stride + offs_d[None, :]
    for start_n in tl.range(0, n_tokens, BLOCK_N, num_stages=STAGES):
        mask_n = start_n + offs_n < n_tokens
        mask_cols = mask_n[:, None] & mask_d[None, :]
        w_cols = tl.load(w_cols_ptrs, mask=mask_cols, other=0.0)
        grad_cols = tl.load(grad_ptr + dense_cols, mask=mask_cols, other=0.0)
        lse_cols = tl.load(lse_ptr + start_n + offs_n, mask=mask_n, other=float("inf"))  # a padding key's P_ji is 0
        if HAS_DELTA:
            delta_cols = scale * tl.load(delta_ptr + start_n + offs_n, mask=mask_n, other=0.0)
        else:
            out_cols = tl.load(out_ptr + dense_cols, mask=mask_cols, other=0.0)
            delta_cols = scale * tl.sum(grad_cols.to(tl.float32) * out_cols.to(tl.float32), 1)

        logits = inner_products(w_rows, w_cols, PRECISION)
        grad_ij = inner_products(grad_rows, w_cols, PRECISION)  # dO_i·W_j
        grad_ji = inner_products(w_rows, grad_cols, PRECISION)  # W_i·dO_j
        if ONE_EXP:
            both = tl.exp2(logits * scale_log2 - shift)
            weights_ij = both * factor_rows[:, None]
            weights_ji = both * tl.exp2(shift - lse_cols)[None, :]
        else:
            weights_ij = tl.exp2(logits * scale_log2 - lse_rows[:, None])
            weights_ji = tl.exp2(logits * scale_log2 - lse_cols[None, :])
        values_ji = weights_ji
        if HAS_DROPOUT:
            cols = start_n + offs_n
            kept = 1.0 / (1.0 - dropout_p)
            keep_ij = dropout_keep(seed, head_index, offs_m[:, None], cols[None, :], dropout_p)
            keep_ji = dropout_keep(seed, head_index, cols[None, :], offs_m[:, None], dropout_p)
            grad_ij = tl.where(keep_ij, grad_ij * kept, 0.0)
            grad_ji = tl.where(keep_ji, grad_ji * kept, 0.0)
            values_ji = tl.where(keep_ji, weights_ji * kept, 0.0)
        acc = tl.dot(values_ji.to(w_rows.dtype), grad_cols, acc, input_precision=PRECISION)
        grad_logits = weights_ij * (scale * grad_ij - delta_rows[:, None])
        grad_logits += weights_ji * (scale * grad_ji - delta_cols[None, :])
        acc = tl.dot(grad_logits.to(w_rows.dtype), w_cols, acc, input_precision=PRECISION)
        w_cols_ptrs += BLOCK_N * stride_wn
        dense_cols += BLOCK_N * dense_stride
    return acc


@triton.jit
def backward_rows(
    grad_ptr,  # the head's tensors, as the kernel's
    w_ptr,
    out_ptr,
    lse_ptr,
    dw_ptr,
    delta_ptr,
    seed_ptr,
    offs_m,  # [BLOCK_M] the rows
    stride_wn,
    n_tokens,
    n_heads,
    scale,
    scale_log2,
    head_index,
    dropout_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LARGEST_SPREAD: tl.constexpr,  # of L in a head, up to which one exponential serves two weights; 0: never
    HAS_DELTA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_i for some tokens i of a head, in one pass over its tokens."""
    tl.assume(n_tokens > 0)  # else ptxas serialises the matrix instructions for the loop that never runs
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < n_tokens
    mask_rows = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    dense_rows = offs_m[:, None] * (n_heads * HEAD_DIM) + offs_d[None, :]
    w_rows = tl.load(w_ptr + offs_m[:, None] * stride_wn + offs_d[None, :], mask=mask_rows, other=0.0)
    grad_rows = tl.load(grad_ptr + dense_rows, mask=mask_rows, other=0.0)
    lse_rows = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0)
    if HAS_DELTA:
        delta_rows = scale * tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
    else:
        out_rows = tl.load(out_ptr + dense_rows, mask=mask_rows, other=0.0)
        delta_rows = scale * tl.sum(grad_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    if LARGEST_SPREAD > 0:
        shift, spread = _spread(lse_ptr, n_tokens, 512)
        if spread <= LARGEST_SPREAD:
            acc = _gradient_sweep(
                w_rows, grad_rows, lse_rows, delta_rows, shift, grad_ptr, w_ptr, out_ptr, lse_ptr, delta_ptr, seed,
                offs_m, stride_wn, n_tokens, n_heads, scale, scale_log2, head_index, dropout_p,
                HEAD_DIM, BLOCK_D, BLOCK_N, None, HAS_DELTA, HAS_DROPOUT, True, PRECISION,
            )  # fmt: skip
        else:
            acc = _gradient_sweep(
                w_rows, grad_rows, lse_rows, delta_rows, shift, grad_ptr, w_ptr, out_ptr, lse_ptr, delta_ptr, seed,
                offs_m, stride_wn, n_tokens, n_heads, scale, scale_log2, head_index, dropout_p,
                HEAD_DIM, BLOCK_D, BLOCK_N, 1, HAS_DELTA, HAS_DROPOUT, False, PRECISION,
            )  # fmt: skip
    else:
        acc = _gradient_sweep(
            w_rows, grad_rows, lse_rows, delta_rows, 0.0, grad_ptr, w_ptr, out_ptr, lse_ptr, delta_ptr, seed,
            offs_m, stride_wn, n_tokens, n_heads, scale, scale_log2, head_index, dropout_p,
            HEAD_DIM, BLOCK_D, BLOCK_N, None, HAS_DELTA, HAS_DROPOUT, False, PRECISION,
        )  # fmt: skip
    tl.store(dw_ptr + dense_rows, acc.to(dw_ptr.dtype.element_ty), mask=mask_rows)


@triton.jit
def _subspace_attention_bwd_kernel(
    grad_ptr,  # dO [B, N, H, D], contiguous
    w_ptr,  # subspace tokens [B, N, H, D], D contiguous
    out_ptr,  # O [B, N, H, D], contiguous
    lse_ptr,  # L, from forward, [B, H, N], fp32
    dw_ptr,  # dW [B, N, H, D], contiguous, w's dtype
    delta_ptr,  # δ [B, H, N], fp32, or None: then it is dO·O
    seed_ptr,  # int64 scalar, or None without dropout
    stride_wb,
    stride_wn,
    stride_wh,
    n_tokens,
    n_heads,
    scale,  # s, at least 0
    scale_log2,  # s·log2(e)
    dropout_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LARGEST_SPREAD: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_i for BLOCK_M tokens i of one head, in one pass over the tokens j (kernels/README.md §2).

    dW_i = Σ_j P_ji dO_j + s·Σ_j [P_ij(dO_i·W_j − δ_i) + P_ji(W_i·dO_j − δ_j)] W_j with δ_i = dO_i·O_i. S is
    symmetric, so one tile of it gives P_ij = 2^(log2(e)·S_ij − L_i) and P_ji = 2^(log2(e)·S_ij − L_j). Five products
    a tile, dW written once, nothing added by atomics: deterministic. Without delta_ptr, δ_j is computed again with
    each block of O_j and dO_j.

    Grid: as forward. Padding tokens need no mask: their W_j and dO_j are zero, P_ij at most 1 and P_ji zero.
    Products accumulate in fp32; weights and dL are rounded to w's dtype for the last two products.
    """
    head_index, batch, head, offs_m = place(n_tokens, n_heads, BLOCK_M)
    dense = (batch * n_tokens * n_heads + head) * HEAD_DIM  # of dO, O and dW
    row = head_index.to(tl.int64) * n_tokens
    backward_rows(
        grad_ptr + dense, w_ptr + (batch * stride_wb + head * stride_wh), out_ptr + dense, lse_ptr + row,
        dw_ptr + dense, None if delta_ptr is None else delta_ptr + row, seed_ptr, offs_m, stride_wn, n_tokens,
        n_heads, scale, scale_log2, head_index, dropout_p,
        HEAD_DIM, BLOCK_D, BLOCK_N, LARGEST_SPREAD, HAS_DELTA, HAS_DROPOUT, PRECISION,
    )  # fmt: skip


def plan_forward(
    w: Tensor, out: Tensor, lse: Tensor, scale: float, dropout_p: float, seed: Tensor | None, tile: Tile | None = None
) -> Launch:
    """The forward launch on these tensors; what `forward` runs and the compile report compiles."""
    tensors = {"w_ptr": w, "out_ptr": out, "lse_ptr": lse, "seed_ptr": seed}
    tile = tile or tile_for("attention_forward", w, dropout_p)
    more = {"LARGEST_SUM": LARGEST_SUMS.get(w.dtype, 0.0) if tile.two_loops else 0.0}
    return plan(_subspace_attention_fwd_kernel, "attention_forward", w, tensors, scale, dropout_p, tile, more)


def plan_delta(
    grad: Tensor,
    w: Tensor,
    lse: Tensor,
    delta: Tensor,
    own_lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    tile: Tile | None = None,
) -> Launch:
    """The launch for δ and L on these tensors; what `backward` runs in fp32 and the compile report compiles."""
    tensors = {
        "grad_ptr": grad,
        "w_ptr": w,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "own_lse_ptr": own_lse,
        "seed_ptr": seed,
    }
    return plan(_subspace_attention_delta_kernel, "attention_delta", w, tensors, scale, dropout_p, tile)


def plan_backward(
    grad: Tensor,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    dw: Tensor,
    delta: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    tile: Tile | None = None,
) -> Launch:
    """The backward launch on these tensors; what `backward` runs and the compile report compiles."""
    tensors = {
        "grad_ptr": grad,
        "w_ptr": w,
        "out_ptr": out,
        "lse_ptr": lse,
        "dw_ptr": dw,
        "delta_ptr": delta,
        "seed_ptr": seed,
    }
    tile = tile or tile_for("attention_backward", w, dropout_p)
    spread = LARGEST_SPREAD if tile.two_loops and w.dtype in LARGEST_SUMS else 0.0
    more = {"scale": scale, "HAS_DELTA": delta is not None, "LARGEST_SPREAD": spread}
    return plan(_subspace_attention_bwd_kernel, "attention_backward", w, tensors, scale, dropout_p, tile, more)


def needs_delta(dtype: torch.dtype) -> bool:
    """Whether backward takes δ and L from a pass of its own: in fp32 without tf32."""
    return matmul_precision(dtype).row == "ieee"


def forward(
    w: Tensor, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """O and the row log-sum-exp of tied attention.

    Args:
        w: [B, N, H, D], D at most 128; strides as they come (copied only where D is not contiguous).
        scale: s, at least 0.
        dropout_p: Probability of dropping an attention weight, in [0, 1).
        seed: int64 scalar tensor on w's device that decides the dropped weights; None without dropout.
        tile: In place of the table's.

    Returns:
        O [B, N, H, D], contiguous, in w's dtype; L [B, H, N] in fp32, base 2: log2 Σ_j exp(S_ij).
    """
    w = addressable(w)
    batch, n_tokens, n_heads, _ = w.shape
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    lse = torch.empty(batch, n_heads, n_tokens, dtype=torch.float32, device=w.device)
    if w.numel():
        plan_forward(w, out, lse, scale, dropout_p, seed, tile).run()
    return out, lse


def backward(
    grad: Tensor,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """dW [B, N, H, D] from dO (any strides; copied where not contiguous) and what `forward` took and returned."""
    w, grad, out = addressable(w), grad.contiguous(), out.contiguous()
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if w.numel():
        delta = None
        if needs_delta(w.dtype):
            delta, own_lse = torch.empty_like(lse), torch.empty_like(lse)
            plan_delta(grad, w, lse, delta, own_lse, scale, dropout_p, seed, tile).run()
            lse = own_lse
        plan_backward(grad, w, out, lse, dw, delta, scale, dropout_p, seed, tile).run()
    return dw
