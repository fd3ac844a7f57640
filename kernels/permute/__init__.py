"""Sorting token-expert pairs by expert and combining the experts' answers."""

from bimedix_jax.kernels.permute.api import Permutation, combine, dispatch, sort_by_expert

__all__ = ["Permutation", "combine", "dispatch", "sort_by_expert"]
