"""Weights prepared once per call: G = η(D − DᵀD), and a weight with the preceding LayerNorm's γ and β folded in; the
gradients of both (kernels/README.md §5, §6)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_fast.kernels.launch import Launch, Tile, cdiv

__all__ = ["fold", "fold_backward", "scale", "unscale"]

PRODUCT = Tile(64, 64, 4, 3, 32)  # of two [C, C] matrices
INTERPRETED_PRODUCT = Tile(256, 256, 4, 1, 128)  # few blocks: in the interpreter the time is per block
ROWS = Tile(16, 128, 4, 1)  # a program owns rows of the weight
COLUMNS = Tile(64, 16, 4, 1)  # a program owns columns of the weight and their sums


@triton.jit
def _load(ptr, rows, cols, stride_row, stride_col, n_rows, n_cols):
    """Load entries of a matrix of any strides, zero outside."""
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return tl.load(ptr + rows[:, None] * stride_row + cols[None, :] * stride_col, mask=mask, other=0.0)


@triton.jit
def _store(ptr, values, rows, cols, n_rows, n_cols):
    """Store entries of a contiguous matrix."""
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(ptr + rows[:, None] * n_cols + cols[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fold_kernel(
    dictionary_ptr,  # D [C, C], contiguous
    folded_ptr,  # G [C, C], contiguous, in the product's dtype
    step_size,  # η
    WIDTH: tl.constexpr,  # C
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a BLOCK×BLOCK tile of G = η(D − DᵀD); fp32 is multiplied as TF32. Grid: (⌈C/BLOCK⌉²)."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    offs_m = (tl.program_id(0) // blocks) * BLOCK + tl.arange(0, BLOCK)
    offs_n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        left = _load(dictionary_ptr, offs_k, offs_m, WIDTH, 1, WIDTH, WIDTH)
        right = _load(dictionary_ptr, offs_k, offs_n, WIDTH, 1, WIDTH, WIDTH)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="tf32")
    dictionary = _load(dictionary_ptr, offs_m, offs_n, WIDTH, 1, WIDTH, WIDTH).to(tl.float32)
    _store(folded_ptr, step_size * (dictionary - acc), offs_m, offs_n, WIDTH, WIDTH)


@triton.jit
def _fold_bwd_kernel(
    grad_ptr,  # dG [C, C], contiguous, fp32
    dictionary_ptr,  # D [C, C], contiguous
    out_ptr,  # dD [C, C], contiguous
    step_size,  # η
    WIDTH: tl.constexpr,  # C
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a BLOCK×BLOCK tile of dD = η(dG − D(dG + dGᵀ)), multiplied as TF32. Grid: (⌈C/BLOCK⌉²)."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    offs_m = (tl.program_id(0) // blocks) * BLOCK + tl.arange(0, BLOCK)
    offs_n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        dictionary = _load(dictionary_ptr, offs_m, offs_k, WIDTH, 1, WIDTH, WIDTH).to(tl.float32)
        both = _load(grad_ptr, offs_k, offs_n, WIDTH, 1, WIDTH, WIDTH)
        both += _load(grad_ptr, offs_k, offs_n, 1, WIDTH, WIDTH, WIDTH)
        acc = tl.dot(dictionary, both, acc, input_precision="tf32")
    grad = _load(grad_ptr, offs_m, offs_n, WIDTH, 1, WIDTH, WIDTH)
    _store(out_ptr, step_size * (grad - acc), offs_m, offs_n, WIDTH, WIDTH)


@triton.jit
def _scale_kernel(
    weight_ptr,  # A [N, K], any strides
    gamma_ptr,  # γ [K]
    beta_ptr,  # β [K]
    base_ptr,  # b [N], or None
    scaled_ptr,  # A∘γ [N, K], contiguous, in the product's dtype
    offset_ptr,  # Aβ + b [N]
    stride_wn, stride_wk,
    HEIGHT: tl.constexpr,  # N
    WIDTH: tl.constexpr,  # K
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Fold a LayerNorm nγ + β into the next weight: (nγ + β)Aᵀ = n(A∘γ)ᵀ + Aβ. Grid: (⌈N/BLOCK_M⌉)."""
    offs_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < HEIGHT
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        gamma = tl.load(gamma_ptr + offs_k, mask=offs_k < WIDTH, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + offs_k, mask=offs_k < WIDTH, other=0.0).to(tl.float32)
        weight = _load(weight_ptr, offs_n, offs_k, stride_wn, stride_wk, HEIGHT, WIDTH).to(tl.float32)
        _store(scaled_ptr, weight * gamma[None, :], offs_n, offs_k, HEIGHT, WIDTH)
        total += tl.sum(weight * beta[None, :], 1)
    if base_ptr is not None:
        total += tl.load(base_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(offset_ptr + offs_n, total.to(offset_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _unscale_kernel(
    grad_ptr,  # R, the gradient of A∘γ [N, K], contiguous
    offset_grad_ptr,  # r, the gradient of Aβ [N], fp32
    weight_ptr,  # A [N, K], contiguous
    gamma_ptr,  # γ [K]
    beta_ptr,  # β [K]
    dweight_ptr,  # dA = R∘γ + r⊗β [N, K], contiguous
    dgamma_ptr,  # dγ = Σ_n R∘A [K], fp32
    dbeta_ptr,  # dβ = Aᵀr [K], fp32
    HEIGHT: tl.constexpr,  # N
    WIDTH: tl.constexpr,  # K
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of A, γ and β, BLOCK_K columns per program. Grid: (⌈K/BLOCK_K⌉). Deterministic."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < WIDTH
    gamma = tl.load(gamma_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    dgamma = tl.zeros([BLOCK_K], tl.float32)
    dbeta = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, HEIGHT, BLOCK_M):
        offs_n = start + tl.arange(0, BLOCK_M)
        grad = _load(grad_ptr, offs_n, offs_k, WIDTH, 1, HEIGHT, WIDTH).to(tl.float32)
        weight = _load(weight_ptr, offs_n, offs_k, WIDTH, 1, HEIGHT, WIDTH).to(tl.float32)
        offset_grad = tl.load(offset_grad_ptr + offs_n, mask=offs_n < HEIGHT, other=0.0)[:, None]
        _store(dweight_ptr, grad * gamma[None, :] + offset_grad * beta[None, :], offs_n, offs_k, HEIGHT, WIDTH)
        dgamma += tl.sum(grad * weight, 0)
        dbeta += tl.sum(offset_grad * weight, 0)
    tl.store(dgamma_ptr + offs_k, dgamma, mask=mask_k)
    tl.store(dbeta_ptr + offs_k, dbeta, mask=mask_k)


def _run_square(kernel, tensors: dict[str, Tensor], step_size: float, dictionary: Tensor) -> None:
    tile, width = INTERPRETED_PRODUCT if dictionary.device.type == "cpu" else PRODUCT, len(dictionary)
    constants = {"WIDTH": width, "BLOCK": tile.block_m, "BLOCK_K": tile.block_k}
    grid = (cdiv(width, tile.block_m) ** 2,)
    Launch(kernel, grid, tensors | {"step_size": step_size}, constants, tile).run()


def _run_weight(kernel, arguments: dict[str, Tensor | int | None], weight: Tensor, tile: Tile, programs: int) -> None:
    height, width = weight.shape
    constants = {"HEIGHT": height, "WIDTH": width, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_n}
    Launch(kernel, (programs,), arguments, constants, tile).run()


def fold(dictionary: Tensor, step_size: float, dtype: torch.dtype) -> Tensor:
    """Return G = η(D − DᵀD) [C, C] in `dtype`. fp32 is multiplied as TF32; G's rounding to half is no finer."""
    dictionary = dictionary.contiguous()
    folded = torch.empty_like(dictionary, dtype=dtype)  # contiguous, as the kernel assumes
    _run_square(_fold_kernel, {"dictionary_ptr": dictionary, "folded_ptr": folded}, step_size, dictionary)
    return folded


def fold_backward(grad: Tensor, dictionary: Tensor, step_size: float) -> Tensor:
    """Return dD = η(dG − D(dG + dGᵀ)) [C, C] in D's dtype, from dG [C, C] in fp32."""
    dictionary = dictionary.contiguous()
    out = torch.empty_like(dictionary)
    tensors = {"grad_ptr": grad.contiguous(), "dictionary_ptr": dictionary, "out_ptr": out}
    _run_square(_fold_bwd_kernel, tensors, step_size, dictionary)
    return out


def scale(
    weight: Tensor, gamma: Tensor, beta: Tensor, dtype: torch.dtype, base: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return A∘γ [N, K] in `dtype`, and Aβ (+ base) [N] in fp32, for a weight A [N, K] after a LayerNorm nγ + β."""
    scaled = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    offset = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    arguments = {"weight_ptr": weight, "gamma_ptr": gamma.contiguous(), "beta_ptr": beta.contiguous()}
    arguments |= {"base_ptr": base, "scaled_ptr": scaled, "offset_ptr": offset}
    arguments |= {"stride_wn": weight.stride(0), "stride_wk": weight.stride(1)}
    _run_weight(_scale_kernel, arguments, weight, ROWS, cdiv(len(weight), ROWS.block_m))
    return scaled, offset


def unscale(
    grad: Tensor, offset_grad: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dA [N, K] in A's dtype, dγ and dβ [K] in fp32, from the gradients of A∘γ [N, K] and of Aβ [N] (fp32)."""
    weight = weight.contiguous()
    dweight = torch.empty_like(weight)
    dgamma, dbeta = (torch.empty(weight.shape[1], dtype=torch.float32, device=weight.device) for _ in range(2))
    tensors = {"grad_ptr": grad.contiguous(), "offset_grad_ptr": offset_grad.contiguous(), "weight_ptr": weight}
    tensors |= {"gamma_ptr": gamma.contiguous(), "beta_ptr": beta.contiguous(), "dweight_ptr": dweight}
    tensors |= {"dgamma_ptr": dgamma, "dbeta_ptr": dbeta}
    _run_weight(_unscale_kernel, tensors, weight, COLUMNS, cdiv(weight.shape[1], COLUMNS.block_n))
    return dweight, dgamma, dbeta
