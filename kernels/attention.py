"""Tied attention O = softmax(s·W Wᵀ) W and its gradient over [B, N, H, D] (kernels/README.md §1, §2).

`forward` and `backward` choose the schedule: whole_head.py for short sequences if the tile table has a row, else the
kernels here, which compute blocks of rows for any length in one pass.

The kernels use two properties of tied logits S = s·W Wᵀ with s ≥ 0. A row's own logit S_ii is known before the first
key is read, so it replaces the running maximum. Padding tokens are zero vectors: they add nothing to O at any finite
weight, and their logit 0 never raises a maximum, which is at least S_ii ≥ 0.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, Tile, cdiv, find, lookup, power_of_2, precision

__all__ = ["backward", "forward", "plan_backward", "plan_forward"]

LOG2_E = 1 / math.log(2)
LN_2 = tl.constexpr(math.log(2))
LARGEST_SUMS = {  # a larger sum of a row's weights needs a running maximum; fp32 always uses one
    torch.bfloat16: 2.0**60,  # keeps weights times W finite
    torch.float16: 2.0**15,  # keeps the weights finite
}
LARGEST_SPREAD = tl.constexpr(100.0)  # of a head's L (base 2); beyond it P_ij and P_ji need an exponential each


class Head(NamedTuple):
    """Pointers, strides and sizes of one head inside a kernel."""

    w: Any  # W [N, D], row stride stride_wn
    out: Any  # O [N, D], row stride `stride`, as for dO and dW
    lse: Any  # L [N], fp32, base 2
    stride_wn: Any
    stride: Any  # H·D
    n_tokens: Any
    scale_log2: Any  # s·log2(e), at least 0


@triton.jit
def find_head(
    index, w_ptr, out_ptr, lse_ptr, stride_wb, stride_wn, stride_wh, n_tokens, n_heads, scale_log2,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Return head number `index` = batch·H + head and its offset in dO and dW; offsets between images are 64-bit."""
    batch, head = (index // n_heads).to(tl.int64), (index % n_heads).to(tl.int64)
    dense = (batch * n_tokens * n_heads + head) * HEAD_DIM
    w_ptr += batch * stride_wb + head * stride_wh
    lse_ptr += index.to(tl.int64) * n_tokens
    return Head(w_ptr, out_ptr + dense, lse_ptr, stride_wn, n_heads * HEAD_DIM, n_tokens, scale_log2), dense


@triton.jit
def forward_rows(
    head,
    offs_m,  # [BLOCK_M] the tokens
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    LARGEST_SUM: tl.constexpr,  # 0: a running maximum from the start
):  # fmt: skip
    """Store O_i and L_i for the tokens offs_m of a head (kernels/README.md §1).

    The first pass over the keys subtracts each row's own logit S_ii. If a sum of weights exceeds LARGEST_SUM or is
    NaN, a second pass with a running maximum replaces its result.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < head.n_tokens
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    w_rows = tl.load(head.w + offs_m[:, None] * head.stride_wn + offs_d[None, :], mask=mask, other=0.0)
    if LARGEST_SUM > 0:
        wide = w_rows.to(tl.float32)
        own = tl.sum(wide * wide, 1) * head.scale_log2
        acc, shift, row_sum = _sweep(head, w_rows, own, HEAD_DIM, BLOCK_D, BLOCK_N, False)
        if tl.min((row_sum <= LARGEST_SUM).to(tl.int32), 0) == 0:
            acc, shift, row_sum = _sweep(head, w_rows, own * 0.0, HEAD_DIM, BLOCK_D, BLOCK_N, True)
    else:
        zero = tl.zeros([w_rows.shape[0]], tl.float32)
        acc, shift, row_sum = _sweep(head, w_rows, zero, HEAD_DIM, BLOCK_D, BLOCK_N, True)
    out = (acc / row_sum[:, None]).to(head.out.dtype.element_ty)
    tl.store(head.out + offs_m[:, None] * head.stride + offs_d[None, :], out, mask=mask)
    tl.store(head.lse + offs_m, shift + tl.log2(row_sum), mask=mask_m)


@triton.jit
def backward_rows(
    head,
    grad_ptr,  # dO [N, D] of the head
    dw_ptr,  # dW [N, D] of the head
    offs_m,  # [BLOCK_M] the tokens
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_EXP: tl.constexpr,  # one exponential for two weights where the spread of L allows
):  # fmt: skip
    """Store dW_i for the tokens offs_m of a head, in one pass over its tokens (kernels/README.md §2)."""
    tl.assume(head.n_tokens > 0)  # else acc has a zero-iteration path, and ptxas serialises the matrix instructions
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < head.n_tokens
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    dense = offs_m[:, None] * head.stride + offs_d[None, :]
    w_rows = tl.load(head.w + offs_m[:, None] * head.stride_wn + offs_d[None, :], mask=mask, other=0.0)
    grad_rows = tl.load(grad_ptr + dense, mask=mask, other=0.0)
    lse_rows = tl.load(head.lse + offs_m, mask=mask_m, other=0.0)
    out_rows = tl.load(head.out + dense, mask=mask, other=0.0)
    delta_rows = head.scale_log2 * LN_2 * tl.sum(grad_rows.to(tl.float32) * out_rows.to(tl.float32), 1)  # s·δ
    if ONE_EXP:
        shift, spread = _spread(head.lse, head.n_tokens, 512)
        if spread <= LARGEST_SPREAD:
            acc = _gradient_sweep(
                head, grad_ptr, w_rows, grad_rows, lse_rows, delta_rows, shift, HEAD_DIM, BLOCK_D, BLOCK_N, True, None
            )
        else:
            acc = _gradient_sweep(
                head, grad_ptr, w_rows, grad_rows, lse_rows, delta_rows, shift, HEAD_DIM, BLOCK_D, BLOCK_N, False, 1
            )
    else:
        acc = _gradient_sweep(
            head, grad_ptr, w_rows, grad_rows, lse_rows, delta_rows, 0.0, HEAD_DIM, BLOCK_D, BLOCK_N, False, None
        )
    tl.store(dw_ptr + dense, acc.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(w_rows, w_cols, acc, shift, row_sum, inside, scale_log2, RUNNING: tl.constexpr):
    """Add a block of keys to a softmax and its product. RUNNING: `shift` [BLOCK_M] is the largest logit so far."""
    logits = tl.dot(w_rows, tl.trans(w_cols), input_precision="tf32")
    if RUNNING:
        largest = tl.maximum(shift, tl.max(logits, 1) * scale_log2)
        rescale = tl.exp2(shift - largest)
        row_sum *= rescale
        acc = acc * rescale[:, None]
        shift = largest
    weights = tl.exp2(logits * scale_log2 - shift[:, None])
    if inside is not None:
        weights = tl.where(inside[None, :], weights, 0.0)
    row_sum += tl.sum(weights, 1)
    acc = tl.dot(weights.to(w_cols.dtype), w_cols, acc, input_precision="tf32")
    return acc, shift, row_sum


@triton.jit
def _sweep(
    head, w_rows, shift, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, RUNNING: tl.constexpr
):
    """Return the unnormalised output of some queries over all keys of a head, the shifts, and the sums of weights."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    acc = tl.zeros([w_rows.shape[0], BLOCK_D], tl.float32)
    row_sum = tl.zeros([w_rows.shape[0]], tl.float32)
    full = head.n_tokens // BLOCK_N * BLOCK_N
    pointers = head.w + offs_n[:, None] * head.stride_wn + offs_d[None, :]
    for _ in tl.range(0, full, BLOCK_N):
        w_cols = tl.load(pointers) if HEAD_DIM == BLOCK_D else tl.load(pointers, mask=mask_d, other=0.0)
        acc, shift, row_sum = _attend(w_rows, w_cols, acc, shift, row_sum, None, head.scale_log2, RUNNING)
        pointers += BLOCK_N * head.stride_wn
    if full < head.n_tokens:
        inside = full + offs_n < head.n_tokens
        w_cols = tl.load(pointers, mask=inside[:, None] & mask_d, other=0.0)
        acc, shift, row_sum = _attend(w_rows, w_cols, acc, shift, row_sum, inside, head.scale_log2, RUNNING)
    return acc, shift, row_sum


@triton.jit
def _spread(lse_ptr, n_tokens, BLOCK: tl.constexpr):
    """Return the middle of the range of a head's log-sum-exps, and the width of that range."""
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
    head, grad_ptr, w_rows, grad_rows, lse_rows, delta_rows, shift,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_EXP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return dW of some rows [BLOCK_M, BLOCK_D] by a loop over blocks of all tokens j of the head.

    ONE_EXP: one exponential gives both weights of a tile, P_ij = F_ij·2^(shift − L_i), P_ji = F_ij·2^(shift − L_j).
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    scale = head.scale_log2 * LN_2
    acc = tl.zeros([w_rows.shape[0], BLOCK_D], tl.float32)
    factor_rows = tl.exp2(shift - lse_rows)
    w_pointers = head.w + offs_n[:, None] * head.stride_wn + offs_d[None, :]
    dense = offs_n[:, None] * head.stride + offs_d[None, :]
    for start_n in tl.range(0, head.n_tokens, BLOCK_N, num_stages=STAGES):
        mask_n = start_n + offs_n < head.n_tokens
        mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
        w_cols = tl.load(w_pointers, mask=mask, other=0.0)
        grad_cols = tl.load(grad_ptr + dense, mask=mask, other=0.0)
        out_cols = tl.load(head.out + dense, mask=mask, other=0.0)
        lse_cols = tl.load(head.lse + start_n + offs_n, mask=mask_n, other=float("inf"))  # a padding key's P_ji is 0
        delta_cols = scale * tl.sum(grad_cols.to(tl.float32) * out_cols.to(tl.float32), 1)

        logits = tl.dot(w_rows, tl.trans(w_cols), input_precision="tf32")
        grad_ij = tl.dot(grad_rows, tl.trans(w_cols), input_precision="tf32")  # dO_i·W_j
        grad_ji = tl.dot(w_rows, tl.trans(grad_cols), input_precision="tf32")  # W_i·dO_j
        if ONE_EXP:
            both = tl.exp2(logits * head.scale_log2 - shift)
            weights_ij = both * factor_rows[:, None]
            weights_ji = both * tl.exp2(shift - lse_cols)[None, :]
        else:
            weights_ij = tl.exp2(logits * head.scale_log2 - lse_rows[:, None])
            weights_ji = tl.exp2(logits * head.scale_log2 - lse_cols[None, :])
        acc = tl.dot(weights_ji.to(w_rows.dtype), grad_cols, acc, input_precision="tf32")
        grad_logits = weights_ij * (scale * grad_ij - delta_rows[:, None])
        grad_logits += weights_ji * (scale * grad_ji - delta_cols[None, :])
        acc = tl.dot(grad_logits.to(w_rows.dtype), w_cols, acc, input_precision="tf32")
        w_pointers += BLOCK_N * head.stride_wn
        dense += BLOCK_N * head.stride
    return acc


@triton.jit
def _subspace_attention_fwd_kernel(
    w_ptr,  # subspace tokens [B, N, H, D], D contiguous
    out_ptr,  # O [B, N, H, D], contiguous, w's dtype
    lse_ptr,  # L: log2 Σ_j 2^(log2(e)·S_ij) [B, H, N], fp32
    stride_wb, stride_wn, stride_wh, n_tokens, n_heads,
    scale_log2,  # s·log2(e), at least 0
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM rounded up to a power of two, at least 32
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LARGEST_SUM: tl.constexpr,
):  # fmt: skip
    """Compute O_i = Σ_j P_ij W_j for BLOCK_M tokens i of one head, and their log-sum-exp (paper, Eq. 5).

    Grid: (⌈N / BLOCK_M⌉·B·H); consecutive programs share a head. Softmax and accumulation in fp32; the weights are
    rounded to w's dtype for the second product. Deterministic.
    """
    blocks = tl.cdiv(n_tokens, BLOCK_M)
    head, _ = find_head(
        tl.program_id(0) // blocks, w_ptr, out_ptr, lse_ptr, stride_wb, stride_wn, stride_wh, n_tokens, n_heads,
        scale_log2, HEAD_DIM,
    )  # fmt: skip
    offs_m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    forward_rows(head, offs_m, HEAD_DIM, BLOCK_D, BLOCK_N, LARGEST_SUM)


@triton.jit
def _subspace_attention_bwd_kernel(
    grad_ptr,  # dO [B, N, H, D], contiguous
    w_ptr,  # subspace tokens [B, N, H, D], D contiguous
    out_ptr,  # O [B, N, H, D], contiguous
    lse_ptr,  # L, from forward, [B, H, N], fp32
    dw_ptr,  # dW [B, N, H, D], contiguous, w's dtype
    stride_wb, stride_wn, stride_wh, n_tokens, n_heads,
    scale_log2,  # s·log2(e), at least 0
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_EXP: tl.constexpr,
):  # fmt: skip
    """Compute dW_i for BLOCK_M tokens i of one head, in one pass over the tokens j (kernels/README.md §2).

    dW_i = Σ_j P_ji dO_j + s·Σ_j [P_ij(dO_i·W_j − δ_i) + P_ji(W_i·dO_j − δ_j)] W_j with δ_i = dO_i·O_i. One tile of
    the symmetric S gives P_ij and P_ji. Weights and dS are rounded to w's dtype for the last two products. Padding
    tokens need no mask: W_j and dO_j are zero, P_ij is at most 1, P_ji is 0. Grid: as forward. Deterministic.
    """
    blocks = tl.cdiv(n_tokens, BLOCK_M)
    head, dense = find_head(
        tl.program_id(0) // blocks, w_ptr, out_ptr, lse_ptr, stride_wb, stride_wn, stride_wh, n_tokens, n_heads,
        scale_log2, HEAD_DIM,
    )  # fmt: skip
    offs_m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    backward_rows(head, grad_ptr + dense, dw_ptr + dense, offs_m, HEAD_DIM, BLOCK_D, BLOCK_N, ONE_EXP)


def numbers(w: Tensor, scale: float) -> dict[str, int | float]:
    """Return the scalar run-time arguments of a kernel."""
    names = ("stride_wb", "stride_wn", "stride_wh", "n_tokens", "n_heads", "scale_log2")
    return dict(zip(names, (*w.stride()[:3], *w.shape[1:3], scale * LOG2_E), strict=True))


def _plan(kernel, w: Tensor, tensors: dict[str, Tensor], scale: float, tile: Tile, more: dict) -> Launch:
    sizes = {"HEAD_DIM": w.shape[3], "BLOCK_D": block_d(w), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    grid = (cdiv(w.shape[1], tile.block_m) * w.shape[0] * w.shape[2],)
    return Launch(kernel, grid, tensors | numbers(w, scale), sizes | more, tile)


def plan_forward(w: Tensor, out: Tensor, lse: Tensor, scale: float, tile: Tile | None = None) -> Launch:
    """Return the forward launch on these tensors."""
    tensors = {"w_ptr": w, "out_ptr": out, "lse_ptr": lse}
    tile = tile or lookup("attention_forward", w.device, precision(w.dtype), block_d(w))
    more = {"LARGEST_SUM": LARGEST_SUMS.get(w.dtype, 0.0)}
    return _plan(_subspace_attention_fwd_kernel, w, tensors, scale, tile, more)


def plan_backward(
    grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, dw: Tensor, scale: float, tile: Tile | None = None
) -> Launch:
    """Return the backward launch on these tensors."""
    tensors = {"grad_ptr": grad, "w_ptr": w, "out_ptr": out, "lse_ptr": lse, "dw_ptr": dw}
    tile = tile or lookup("attention_backward", w.device, precision(w.dtype), block_d(w))
    more = {"ONE_EXP": tile.one_exp and w.dtype in LARGEST_SUMS}
    return _plan(_subspace_attention_bwd_kernel, w, tensors, scale, tile, more)


def block_d(w: Tensor) -> int:
    """Return the head width of w [B, N, H, D] rounded up to a power of two, at least 32."""
    return max(32, power_of_2(w.shape[3]))


def addressable(w: Tensor) -> Tensor:
    """Return `w` if the kernels can address it, else a contiguous copy.

    The kernels require a contiguous D, and offsets inside an image that fit in 32 bits. The output of a projection
    meets both, unless one image has 2³¹ elements.
    """
    n_tokens, n_heads, head_dim = w.shape[1:]
    if n_tokens * n_heads * head_dim >= 2**31:
        raise ValueError(f"w has shape {tuple(w.shape)}: N·H·D must be under 2³¹; split the heads over several calls")
    fits = n_tokens * w.stride(1) < 2**31
    return w if fits and (w.stride(3) == 1 or head_dim == 1) else w.contiguous()


def _whole_head_tile(name: str, w: Tensor, tile: Tile | None) -> Tile | None:
    from crate_fast.kernels import whole_head  # not at the top: whole_head imports this module

    if tile is not None or not whole_head.serves(name, w):
        return None
    return find(name, w.device, precision(w.dtype), block_d(w))


def forward(w: Tensor, scale: float, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Return O and the row log-sum-exp of tied attention.

    Args:
        w: [B, N, H, D], D at most 128, of any strides; copied if D is not contiguous.
        scale: s, at least 0.
        tile: Use blocks of rows with this tile instead of the table's choice.

    Returns:
        O [B, N, H, D], contiguous, in w's dtype; L [B, H, N] in fp32, base 2: log2 Σ_j exp(S_ij).
    """
    from crate_fast.kernels import whole_head

    w = addressable(w)
    batch, n_tokens, n_heads, _ = w.shape
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    lse = torch.empty(batch, n_heads, n_tokens, dtype=torch.float32, device=w.device)
    if w.numel():
        whole = _whole_head_tile("whole_head_forward", w, tile)
        if whole is not None:
            whole_head.forward(w, out, lse, scale, whole)
        else:
            plan_forward(w, out, lse, scale, tile).run()
    return out, lse


def backward(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float, tile: Tile | None = None) -> Tensor:
    """Return dW [B, N, H, D] from dO (copied if not contiguous) and the inputs and outputs of `forward`."""
    from crate_fast.kernels import whole_head

    w, grad, out = addressable(w), grad.contiguous(), out.contiguous()
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if w.numel():
        whole = _whole_head_tile("whole_head_backward", w, tile)
        if whole is not None:
            whole_head.backward(grad, w, out, lse, dw, scale, whole)
        else:
            plan_backward(grad, w, out, lse, dw, scale, tile).run()
    return dw
