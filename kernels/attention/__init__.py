"""Softmax attention of grouped query heads over packed segments."""

from bimedix_jax.kernels.attention.api import attention
from bimedix_jax.kernels.attention.cache import Cached, HeadMajor, write

__all__ = ["Cached", "HeadMajor", "attention", "write"]
