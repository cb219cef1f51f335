"""Triton kernels and their launchers, explained in README.md. Importing this package does not import Triton."""

from crate_fast.kernels.launch import assuming_gpu, unavailable_reason

__all__ = ["assuming_gpu", "unavailable_reason"]
