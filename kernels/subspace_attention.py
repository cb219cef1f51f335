"""Tied attention O = softmax(s·W Wᵀ) W and its gradient over [B, N, H, D] (kernels/README.md §1, §2): one pass each,
but for fp32, where a pass for δ comes before the gradient's.

Two facts about tied logits S = s·W Wᵀ, s ≥ 0, keep masks out of the inner loops: a row's maximum is at least
S_ii ≥ 0, so a padding key, whose logits are 0, never raises it; and padding tokens are zero vectors, so whatever
finite weight they get, they add nothing.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, matmul_precision
from crate_fast.kernels.tiles import Tile, lookup

__all__ = ["backward", "forward", "needs_delta", "plan_backward", "plan_delta", "plan_forward"]

LOG2_E = 1 / math.log(2)


@triton.jit
def _place(n_tokens, n_heads, BLOCK_M: tl.constexpr):
    """Which head this program works on (batch·H + head, and the two apart in 64 bits) and which of its tokens."""
    row_blocks = tl.cdiv(n_tokens, BLOCK_M)
    head_index = tl.program_id(0) // row_blocks
    start_m = (tl.program_id(0) % row_blocks) * BLOCK_M
    batch = (head_index // n_heads).to(tl.int64)
    head = (head_index % n_heads).to(tl.int64)
    return head_index, batch, head, start_m + tl.arange(0, BLOCK_M)


@triton.jit
def _dropout_keep(seed, head_index, rows, cols, dropout_p):
    """Whether attention weight (row, col) of a head is kept: a Philox draw at that position, so that backward
    finds the same mask, and its transpose, without storing it. rows and cols broadcast to the tile."""
    rows = (rows + cols * 0).to(tl.uint32)
    cols = (cols + rows.to(tl.int32) * 0).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, rows, cols, rows * 0 + head_index.to(tl.uint32), rows * 0)
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def _inner_products(a, b, PRECISION: tl.constexpr):
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
def _attend(
    w_rows,  # [BLOCK_M, BLOCK_D] queries
    w_cols,  # [BLOCK_N, BLOCK_D] keys, which are the values too
    acc,  # [BLOCK_M, BLOCK_D] fp32, unnormalised output
    row_max,  # [BLOCK_M] fp32, in units of log2
    row_sum,  # [BLOCK_M] fp32
    offs_m,
    offs_n,
    n_tokens,
    scale_log2,
    seed,
    head_index,
    dropout_p,
    MASKED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax over a block of keys; MASKED where some of them lie beyond the sequence."""
    logits = _inner_products(w_rows, w_cols, PRECISION)
    new_max = tl.maximum(row_max, tl.max(logits, 1) * scale_log2)
    rescale = tl.exp2(row_max - new_max)
    weights = tl.exp2(logits * scale_log2 - new_max[:, None])
    if MASKED:
        weights = tl.where(offs_n[None, :] < n_tokens, weights, 0.0)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None]
    if HAS_DROPOUT:
        keep = _dropout_keep(seed, head_index, offs_m[:, None], offs_n[None, :], dropout_p)
        weights = tl.where(keep, weights, 0.0)
    acc = tl.dot(weights.to(w_cols.dtype), w_cols, acc, input_precision=PRECISION)
    return acc, new_max, row_sum


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
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O_i = Σ_j P_ij W_j for BLOCK_M tokens i of one head, and their log-sum-exp (paper, Eq. 5).

    Grid: (⌈N / BLOCK_M⌉·B·H), the row blocks of a head side by side. Reads the head's tokens once, a block of
    BLOCK_N at a time, each as key and as value. Softmax and accumulation in fp32; the weights are rounded to
    w's dtype for the second product. Deterministic. 4·N²·D FLOPs a head, nominal.
    """
    head_index, batch, head, offs_m = _place(n_tokens, n_heads, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < n_tokens
    mask_d = offs_d < HEAD_DIM

    w_ptr += batch * stride_wb + head * stride_wh
    w_rows = tl.load(
        w_ptr + offs_m[:, None] * stride_wn + offs_d[None, :],
        mask=mask_m[:, None] & mask_d[None, :],
        other=0.0,
    )
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.zeros([BLOCK_M], tl.float32)  # a lower bound: S_ii ≥ 0
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    full = n_tokens // BLOCK_N * BLOCK_N
    cols_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_d[None, :]
    for start_n in range(0, full, BLOCK_N):
        w_cols = _load_columns(cols_ptrs, mask_d[None, :], HEAD_DIM == BLOCK_D)
        acc, row_max, row_sum = _attend(
            w_rows, w_cols, acc, row_max, row_sum, offs_m, start_n + offs_n, n_tokens, scale_log2,
            seed, head_index, dropout_p, False, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
        cols_ptrs += BLOCK_N * stride_wn
    if full < n_tokens:
        w_cols = tl.load(cols_ptrs, mask=(full + offs_n < n_tokens)[:, None] & mask_d[None, :], other=0.0)
        acc, row_max, row_sum = _attend(
            w_rows, w_cols, acc, row_max, row_sum, offs_m, full + offs_n, n_tokens, scale_log2,
            seed, head_index, dropout_p, True, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    kept = row_sum * (1.0 - dropout_p) if HAS_DROPOUT else row_sum
    out = acc / kept[:, None]
    out_ptr += (batch * n_tokens * n_heads + head) * HEAD_DIM
    tl.store(
        out_ptr + offs_m[:, None] * (n_heads * HEAD_DIM) + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_d[None, :],
    )
    tl.store(lse_ptr + head_index.to(tl.int64) * n_tokens + offs_m, row_max + tl.log2(row_sum), mask=mask_m)


@triton.jit
def _load_columns(pointers, mask, UNMASKED: tl.constexpr):
    """A block of whole tokens; without a mask where the head width is a power of two."""
    if UNMASKED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


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
    head_index, batch, head, offs_m = _place(n_tokens, n_heads, BLOCK_M)
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
        logits = _inner_products(w_rows, w_cols, PRECISION)
        grad_ij = _inner_products(grad_rows, w_cols, PRECISION)
        weights_ij = tl.exp2(logits * scale_log2 - lse_rows[:, None])
        weights_ij = tl.where((cols < n_tokens)[None, :], weights_ij, 0.0)
        if HAS_DROPOUT:
            keep_ij = _dropout_keep(seed, head_index, offs_m[:, None], cols[None, :], dropout_p)
            grad_ij = tl.where(keep_ij, grad_ij * (1.0 / (1.0 - dropout_p)), 0.0)
        delta += tl.sum(weights_ij * grad_ij, 1)
        total += tl.sum(weights_ij, 1)
    tl.store(delta_ptr + statistics, delta / total, mask=mask_m)
    tl.store(own_lse_ptr + statistics, lse_rows + tl.log2(total), mask=mask_m)


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
    HAS_DELTA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_i for BLOCK_M tokens i of one head, in one pass over the tokens j (kernels/README.md §2).

    dW_i = Σ_j P_ji dO_j + s·Σ_j [P_ij(dO_i·W_j − δ_i) + P_ji(W_i·dO_j − δ_j)] W_j with δ_i = dO_i·O_i. S is
    symmetric, so one tile of it gives P_ij = 2^(log2(e)·S_ij − L_i) and P_ji = 2^(log2(e)·S_ij − L_j). Five products
    a tile, dW written once, nothing added by atomics: deterministic. Without delta_ptr, δ_j is computed again with
    each block of O_j and dO_j.

    Grid: as forward. Padding tokens need no mask: their W_j and dO_j are zero and their weights at most 1.
    Products accumulate in fp32; weights and dL are rounded to w's dtype for the last two products.
    """
    tl.assume(n_tokens > 0)  # else ptxas serialises the matrix instructions for the loop that never runs
    head_index, batch, head, offs_m = _place(n_tokens, n_heads, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < n_tokens
    mask_d = offs_d < HEAD_DIM
    mask_rows = mask_m[:, None] & mask_d[None, :]

    w_ptr += batch * stride_wb + head * stride_wh
    dense = (batch * n_tokens * n_heads + head) * HEAD_DIM  # of dO, O and dW
    grad_ptr += dense
    out_ptr += dense
    dw_ptr += dense
    lse_ptr += head_index.to(tl.int64) * n_tokens
    dense_stride = n_heads * HEAD_DIM

    dense_rows = offs_m[:, None] * dense_stride + offs_d[None, :]
    w_rows = tl.load(w_ptr + offs_m[:, None] * stride_wn + offs_d[None, :], mask=mask_rows, other=0.0)
    grad_rows = tl.load(grad_ptr + dense_rows, mask=mask_rows, other=0.0)
    lse_rows = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0)
    if HAS_DELTA:
        delta_ptr += head_index.to(tl.int64) * n_tokens
        delta_rows = scale * tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
    else:
        out_rows = tl.load(out_ptr + dense_rows, mask=mask_rows, other=0.0)
        delta_rows = scale * tl.sum(grad_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    w_cols_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_d[None, :]
    dense_cols = offs_n[:, None] * dense_stride + offs_d[None, :]
    for start_n in range(0, n_tokens, BLOCK_N):
        mask_n = start_n + offs_n < n_tokens
        mask_cols = mask_n[:, None] & mask_d[None, :]
        w_cols = tl.load(w_cols_ptrs, mask=mask_cols, other=0.0)
        grad_cols = tl.load(grad_ptr + dense_cols, mask=mask_cols, other=0.0)
        lse_cols = tl.load(lse_ptr + start_n + offs_n, mask=mask_n, other=0.0)
        if HAS_DELTA:
            delta_cols = scale * tl.load(delta_ptr + start_n + offs_n, mask=mask_n, other=0.0)
        else:
            out_cols = tl.load(out_ptr + dense_cols, mask=mask_cols, other=0.0)
            delta_cols = scale * tl.sum(grad_cols.to(tl.float32) * out_cols.to(tl.float32), 1)

        logits = _inner_products(w_rows, w_cols, PRECISION)
        grad_ij = _inner_products(grad_rows, w_cols, PRECISION)  # dO_i·W_j
        grad_ji = _inner_products(w_rows, grad_cols, PRECISION)  # W_i·dO_j
        weights_ij = tl.exp2(logits * scale_log2 - lse_rows[:, None])
        weights_ji = tl.exp2(logits * scale_log2 - lse_cols[None, :])
        values_ji = weights_ji
        if HAS_DROPOUT:
            cols = start_n + offs_n
            kept = 1.0 / (1.0 - dropout_p)
            keep_ij = _dropout_keep(seed, head_index, offs_m[:, None], cols[None, :], dropout_p)
            keep_ji = _dropout_keep(seed, head_index, cols[None, :], offs_m[:, None], dropout_p)
            grad_ij = tl.where(keep_ij, grad_ij * kept, 0.0)
            grad_ji = tl.where(keep_ji, grad_ji * kept, 0.0)
            values_ji = tl.where(keep_ji, weights_ji * kept, 0.0)
        acc = tl.dot(values_ji.to(w_rows.dtype), grad_cols, acc, input_precision=PRECISION)
        grad_logits = weights_ij * (scale * grad_ij - delta_rows[:, None])
        grad_logits += weights_ji * (scale * grad_ji - delta_cols[None, :])
        acc = tl.dot(grad_logits.to(w_rows.dtype), w_cols, acc, input_precision=PRECISION)
        w_cols_ptrs += BLOCK_N * stride_wn
        dense_cols += BLOCK_N * dense_stride

    tl.store(dw_ptr + dense_rows, acc.to(dw_ptr.dtype.element_ty), mask=mask_rows)


def _plan(
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
    tile = tile or lookup(name + "_dropout" * (dropout_p > 0), w.device, precision.row, block_d)
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


def plan_forward(
    w: Tensor, out: Tensor, lse: Tensor, scale: float, dropout_p: float, seed: Tensor | None, tile: Tile | None = None
) -> Launch:
    """The forward launch on these tensors; what `forward` runs and the compile report compiles."""
    tensors = {"w_ptr": w, "out_ptr": out, "lse_ptr": lse, "seed_ptr": seed}
    return _plan(_subspace_attention_fwd_kernel, "attention_forward", w, tensors, scale, dropout_p, tile)


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
    return _plan(_subspace_attention_delta_kernel, "attention_delta", w, tensors, scale, dropout_p, tile)


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
    more = {"scale": scale, "HAS_DELTA": delta is not None}
    return _plan(_subspace_attention_bwd_kernel, "attention_backward", w, tensors, scale, dropout_p, tile, more)


def _addressable(w: Tensor) -> Tensor:
    """`w` itself where the kernels can address it, else a contiguous copy.

    They assume that D is contiguous, and that offsets inside an image fit in 32 bits (those between images need not):
    every projection's output does both, unless one image has 2³¹ elements.
    """
    n_tokens, n_heads, head_dim = w.shape[1:]
    if n_tokens * n_heads * head_dim >= 2**31:
        raise ValueError(f"w has shape {tuple(w.shape)}: N·H·D must be under 2³¹; split the heads over several calls")
    fits = n_tokens * w.stride(1) < 2**31
    return w if fits and (w.stride(3) == 1 or head_dim == 1) else w.contiguous()


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
    w = _addressable(w)
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
    w, grad, out = _addressable(w), grad.contiguous(), out.contiguous()
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if w.numel():
        delta = None
        if needs_delta(w.dtype):
            delta, own_lse = torch.empty_like(lse), torch.empty_like(lse)
            plan_delta(grad, w, lse, delta, own_lse, scale, dropout_p, seed, tile).run()
            lse = own_lse
        plan_backward(grad, w, out, lse, dw, delta, scale, dropout_p, seed, tile).run()
    return dw
