"""The Triton kernels of subspace attention, ISTA and the LayerNorm in front of it, and their launchers.

README.md has the mathematics and each kernel's schedule. Importing this package imports no Triton; its modules do.
"""

from crate_fast.kernels.support import assuming_gpu, unavailable_reason

__all__ = ["assuming_gpu", "unavailable_reason"]
