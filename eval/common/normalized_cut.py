"""The second eigenvector of a normalised cut, by deflated Lanczos: the expensive part of MaskCut.

A graph of P patches has affinities A = ε·11ᵀ + (1 − ε)·B with B in {0, 1} and degrees d = A·1. The wanted vector
solves (D − A)v = λDv for the second smallest λ (Shi and Malik, *Normalized Cuts and Image Segmentation*). With
M = D^-½AD^-½ it is v = D^-½y, where y belongs to M's second largest eigenvalue. The first eigenvector D^½·1 is known.
Every Lanczos vector is made orthogonal to it, which leaves y as the top eigenvector. This takes a few dozen products
with B. A dense decomposition takes seconds at 3,600 patches.

There are three solvers. Each is used for graphs that the previous one cannot solve; up to 1,000 patches the second is
skipped, because the third is faster:

1. Lanczos in fp32, a batch of graphs at a time. The residual is about 1e-7, which is enough if the next eigenvalue is
   at least 1e-3 away.
2. Block Lanczos in fp64, a graph at a time. A nearly disconnected graph has one eigenvalue for each part, about 1e-5
   apart. A block of several vectors finds them together, and fp64 separates them.
3. A dense decomposition in fp64.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_STEPS = 160  # Lanczos steps
_BLOCK, _MAX_BLOCKS = 8, 60  # vectors per block; blocks
_SMALL = 1000  # patches; up to here the dense solver is faster than block Lanczos
SAME = 1e-4  # entries this close to the largest equal it: patches with the same links differ only by rounding
_CHECK_EVERY = 4  # steps
_RESIDUAL = 3e-6  # about ten units in the last place of fp32, the rounding error of ‖My − θy‖
_SMALLEST_GAP = 1e-3  # below it, fp32 rounding may rotate the vector by more than a few thousandths


class Cut(NamedTuple):
    """Second eigenvectors of a batch of graphs."""

    # v [B, P], scaled to max |v| = 1. The first patch whose |v| is within `SAME` of 1 has a positive entry. All zero
    # for a graph with all patches linked to each other, which has no cut.
    vector: Tensor
    eigenvalue: Tensor  # the second smallest λ of (D − A)v = λDv, [B]
    residual: Tensor  # ‖My − (1 − λ)y‖ for the unit vector y = D^½v/‖D^½v‖, [B], computed from the solution
    solver: Tensor  # solver used, [B]: 0 Lanczos, 1 block Lanczos in fp64, 2 dense


class _Graphs:
    """Normalised affinities M of a batch, from `links` B [b, P, P] and `present` [b, P]."""

    def __init__(self, links: Tensor, present: Tensor, epsilon: float):
        self.links, self.epsilon = links, epsilon
        self.present = present.to(links.dtype)
        linked = self._linked(torch.ones_like(self.present))  # counts, exact in fp32 up to 2²⁴
        self.complete = (linked == self.present.sum(dim=-1, keepdim=True) * self.present).all(dim=-1)
        degrees = epsilon * links.shape[-1] + (1 - epsilon) * linked
        self.inverse_root = degrees.rsqrt()
        self.top = F.normalize(degrees.sqrt(), dim=-1)

    def _linked(self, x: Tensor) -> Tensor:
        masked = self.present * x
        if len(self.links) == 1:
            return self.present * (masked @ self.links[0])  # B is symmetric
        return self.present * torch.bmm(self.links, masked.unsqueeze(-1)).squeeze(-1)

    def product(self, x: Tensor) -> Tensor:
        """Return Mx for x [b, P], or for several vectors [k, P] of a single graph."""
        scaled = self.inverse_root * x
        total = scaled.sum(dim=-1, keepdim=True)
        return self.inverse_root * (self.epsilon * total + (1 - self.epsilon) * self._linked(scaled))


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """Return x [b, P] orthogonalised against `basis` [b, k, P]."""
    for _ in range(2):  # the second pass removes rounding errors
        x = x - torch.bmm(torch.bmm(basis, x.unsqueeze(-1)).transpose(1, 2), basis).squeeze(1)
    return x


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)


def _lanczos(graphs: _Graphs) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y [b, P], θ [b], gap to the next Ritz value [b]) of M without its known top eigenvector."""
    basis = graphs.top.unsqueeze(1)
    # one fixed random vector for all graphs; a pattern could be orthogonal to the wanted vector
    start = torch.randn(graphs.top.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = _unit(_orthogonal(start.to(graphs.top).expand_as(graphs.top), basis))
    alphas, betas = [], []
    steps = min(MAX_STEPS, graphs.top.shape[-1] - 1)
    complete = graphs.complete.cpu()
    for step in range(1, steps + 1):
        basis = torch.cat([basis, x.unsqueeze(1)], dim=1)
        y = graphs.product(x)
        alphas.append((x * y).sum(dim=-1))
        rest = _orthogonal(y, basis)
        betas.append(rest.norm(dim=-1))
        x = _unit(_orthogonal(_unit(rest), basis))  # if β is only rounding, the Krylov space is exhausted
        if step == steps or (step >= 8 and step % _CHECK_EVERY == 0):
            diagonal, side = (torch.stack(v, dim=1).double().cpu() for v in (alphas, betas))
            # eigh reads the lower triangle of the tridiagonal matrix
            values, vectors = torch.linalg.eigh(torch.diag_embed(diagonal) + torch.diag_embed(side[:, :-1], -1))
            left = side[:, -1] * vectors[:, -1, -1].abs()  # residual of the largest
            gap = values[:, -1] - values[:, -2] if step > 1 else torch.ones_like(left)
            hopeless = (gap < _SMALLEST_GAP) & (step >= 24)  # for fp32
            if (complete | hopeless | ((left <= 0.1 * _RESIDUAL) & (left <= 1e-4 * gap))).all():
                break
    ritz = _unit(torch.bmm(vectors[:, :, -1].unsqueeze(1).to(basis), basis[:, 1:]).squeeze(1))
    return ritz, values[:, -1].to(ritz), gap.to(ritz)


def second_eigenvector(links: Tensor, present: Tensor | None = None, epsilon: float = 1e-5) -> Cut:
    """Compute the second eigenvectors of the normalised cuts of a batch of graphs.

    Args:
        links: B [batch, P, P], floating point, symmetric, entries 0 or 1; P is at least 2.
        present: Boolean [batch, P]; all when None. An absent patch has affinity ε to all patches: its row and column
            of B count as zero.
        epsilon: Affinity of patches that are not linked.

    Returns:
        `Cut`. An exactly repeated eigenvalue may not be detected; it has no unique vector, and rounding selects one.

    Source: Shi and Malik, 2000; Parlett, *The Symmetric Eigenvalue Problem*, ch. 13.

    >>> block = torch.ones(3, 3)
    >>> cut = second_eigenvector(torch.block_diag(block, block)[None])
    >>> (cut.vector > cut.vector.mean()).tolist()
    [[True, True, True, False, False, False]]
    """
    present = torch.ones(links.shape[:2], dtype=torch.bool, device=links.device) if present is None else present
    graphs = _Graphs(links, present, epsilon)
    y, theta, gap = _lanczos(graphs)
    residual = (graphs.product(y) - theta.unsqueeze(-1) * y).norm(dim=-1)
    failed = ~((residual <= _RESIDUAL) & (gap >= _SMALLEST_GAP)) & ~graphs.complete  # a NaN fails too
    vector, solver = graphs.inverse_root * y, torch.zeros_like(failed, dtype=torch.long)
    for row in failed.nonzero().flatten().tolist():
        vector[row], theta[row], residual[row], solver[row] = _solve_again(links[row], present[row], epsilon)
    vector = torch.where(graphs.complete.unsqueeze(-1), 0.0, _signed(vector))
    return Cut(vector, 1 - theta, torch.where(graphs.complete, 0.0, residual), solver)


def _solve_again(links: Tensor, present: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return (v [P], θ, residual, solver) of one graph, in fp64."""
    graph = _Graphs(links.double().unsqueeze(0), present.unsqueeze(0), epsilon)
    if len(links) > _SMALL and (found := _block_lanczos(graph)):
        return graph.inverse_root[0] * found[0], found[1], found[2], 1
    # dense M, which takes a few times 8 P² bytes
    matrix = graph.product(torch.eye(len(links)).to(graph.top))
    values, vectors = torch.linalg.eigh(matrix)
    y, theta = vectors[:, -2], values[-2]
    return graph.inverse_root[0] * y, theta, (matrix @ y - theta * y).norm(), 2


def _block_lanczos(graph: _Graphs) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return (y [P], θ, residual) of one graph in fp64, or None without convergence."""
    noise = torch.randn(len(graph.top[0]), _BLOCK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = noise.to(graph.top)
    known = graph.top[0].unsqueeze(1)
    basis, image = known[:, :0], known[:, :0]  # V and MV
    for _ in range(_MAX_BLOCKS):
        for _ in range(2):  # the second pass corrects columns that were only rounding
            for _ in range(2):
                block = block - known @ (known.T @ block)
                block = block - basis @ (basis.T @ block)
            block, _ = torch.linalg.qr(block)
        basis = torch.cat([basis, block], dim=1)
        block = graph.product(block.T).T
        image = torch.cat([image, block], dim=1)
        values, vectors = torch.linalg.eigh(basis.T @ image)
        y = basis @ vectors[:, -1]
        residual = (image @ vectors[:, -1] - values[-1] * y).norm()
        # a gap below 1e-9 means a multiple eigenvalue, for which a dense solver is no better than 1e-13
        if residual <= 1e-4 * (values[-1] - values[-2]) or residual <= 1e-13:
            return y, values[-1], residual
        if basis.shape[1] + 2 * _BLOCK > len(y):
            break
    return None


def _signed(vector: Tensor) -> Tensor:
    """Scale v to max |v| = 1, with the first of its largest entries positive."""
    size = vector.abs()
    largest = size.amax(dim=-1, keepdim=True)
    first = (size >= (1 - SAME) * largest).int().argmax(dim=-1, keepdim=True)
    return vector / largest * vector.gather(-1, first).sign()


_PRECISION = threading.RLock()  # torch's settings belong to the process


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Disable TF32 and bf16 in fp32 matrix products within a context, on GPUs and CPUs; one thread at a time."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    with _PRECISION:
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
