"""The feed-forward experts as one operation: dispatch, gate, up, SwiGLU, down, combine."""

from bimedix_jax.kernels.expert_mlp.api import expert_mlp
from bimedix_jax.kernels.expert_mlp.layout import LayerOf, out_of_stacks

__all__ = ["LayerOf", "expert_mlp", "out_of_stacks"]
