"""The Triton kernels and their launchers; README.md explains them. Importing this package imports no Triton."""

from crate_fast.kernels.launch import assuming_gpu, unavailable_reason

__all__ = ["assuming_gpu", "unavailable_reason"]
