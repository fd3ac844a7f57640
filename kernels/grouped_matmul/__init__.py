"""Rows sorted by expert times each expert's matrix, dense or NF4, forward and backward."""

from bimedix_jax.kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
