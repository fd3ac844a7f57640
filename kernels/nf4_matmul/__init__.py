"""Activations times one weight matrix, dense or NF4."""

from bimedix_jax.kernels.nf4_matmul.api import matmul

__all__ = ["matmul"]
