"""Sorting token-expert pairs by expert, and combining the outputs of experts."""

from bimedix_jax.kernels.permute.api import Permutation, combine, dispatch, sort_by_expert

__all__ = ["Permutation", "combine", "dispatch", "sort_by_expert"]
