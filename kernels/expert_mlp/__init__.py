"""A mixture's feed-forward experts as one operation: dispatch, gate, up, SwiGLU, down, combine."""

from bimedix_jax.kernels.expert_mlp.api import expert_mlp

__all__ = ["expert_mlp"]
