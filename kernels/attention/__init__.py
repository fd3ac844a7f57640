"""Softmax attention of grouped query heads over packed segments."""

from bimedix_jax.kernels.attention.api import attention

__all__ = ["attention"]
