"""Rows sorted by expert times the matrices of their experts, dense or NF4, with gradients."""

from bimedix_jax.kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
