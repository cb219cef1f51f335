"""MaskCut by its dense definition in float64: the oracle of test_maskcut.py."""

from collections import deque

import numpy as np
import scipy.linalg


def affinity(features: np.ndarray, tau: float, epsilon: float) -> np.ndarray:
    """Return A: 1 where the cosine exceeds τ, else ε. A patch of zeros is not linked, not even to itself."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)
    return np.where(unit @ unit.T > tau, 1.0, epsilon)


def second_eigenvector(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (λ₂, λ₃) and v₂ of (D − A)v = λDv; max |v₂| is 1, and its first largest entry is positive."""
    degrees = np.diag(matrix.sum(axis=1))
    last = min(2, len(matrix) - 1)
    values, vectors = scipy.linalg.eigh(degrees - matrix, degrees, subset_by_index=[1, last])
    vector = vectors[:, 0]
    vector /= np.abs(vector).max()
    return values, vector * np.sign(vector[first(np.abs(vector), 1.0)])


def first(values: np.ndarray, extreme: float) -> int:
    """Return the index of the first entry within 1e-4 of the extreme one; equal patches differ by less."""
    return int(np.flatnonzero(np.abs(values - extreme) <= 1e-4)[0])


def object_of(vector: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the object's mask: split at the mean, corner rule, flood fill from the seed over four neighbours."""
    picture = vector.reshape(grid)
    foreground = picture > picture.mean()
    seed = np.unravel_index(first(vector, vector.max()), grid)
    rows, columns = grid
    corners = [foreground[r, c] for r in (0, rows - 1) for c in (0, columns - 1)]
    if sum(corners) >= 3:
        foreground = ~foreground
        seed = np.unravel_index(first(vector, vector.min()), grid)
    found = np.zeros(grid, bool)
    queue = deque([seed])
    while queue:
        r, c = queue.popleft()
        if 0 <= r < rows and 0 <= c < columns and foreground[r, c] and not found[r, c]:
            found[r, c] = True
            queue.extend([(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)])
    return found


def maskcut_oracle(features: np.ndarray, grid: tuple[int, int], num_objects: int, tau: float) -> np.ndarray:
    """Return the masks [n, rows, columns] of an image with features [P, C]."""
    features = features.astype(np.float64).copy()
    masks = np.zeros((num_objects, *grid), bool)
    painted = np.zeros(grid, bool)
    previous = None
    for turn in range(num_objects):
        features[painted.ravel()] = 0.0
        matrix = affinity(features, tau, 1e-5)
        if (matrix == 1).sum() == (~painted).sum() ** 2:  # all remaining patches are linked: no cut
            break
        _, vector = second_eigenvector(matrix)
        mask = object_of(vector, grid)
        if turn > 0:
            overlap = (mask & previous).sum() / (mask | previous).sum()
            if overlap > 0.5 or mask.mean() <= 0.01:
                break
        fresh = mask & ~painted
        if not fresh.any():
            break
        masks[turn], previous = fresh, mask
        painted |= mask
    return masks
