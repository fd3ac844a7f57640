"""Next-token losses from hidden states, without storing the logits of all tokens."""

from bimedix_jax.kernels.cross_entropy.api import cross_entropy

__all__ = ["cross_entropy"]
