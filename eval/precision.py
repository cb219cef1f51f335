"""fp32 products that are fp32, whatever was allowed elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["exact_fp32"]


@contextmanager
def exact_fp32() -> Iterator[None]:
    """No tf32 or bf16 inside fp32 matrix products, on GPUs and CPUs; what was set before is put back."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
