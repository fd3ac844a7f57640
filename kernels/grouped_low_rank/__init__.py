"""The low-rank deltas of experts, for rows sorted by expert."""

from bimedix_jax.kernels.grouped_low_rank.api import grouped_low_rank

__all__ = ["grouped_low_rank"]
