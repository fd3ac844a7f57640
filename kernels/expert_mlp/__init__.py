"""The feed-forward experts as one operation: dispatch, gate, up, SwiGLU, down, combine."""

from bimedix_jax.kernels.expert_mlp.api import expert_mlp
from bimedix_jax.kernels.expert_mlp.layout import out_of_stacks
from bimedix_jax.kernels.stacks import LayerOf

__all__ = ["LayerOf", "expert_mlp", "out_of_stacks"]
