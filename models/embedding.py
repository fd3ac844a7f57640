"""Token embeddings and the output head."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.by_output import ByOutput
from bimedix_jax.kernels.nf4_matmul import matmul
from bimedix_jax.models import shards
from bimedix_jax.models.axes import EMBED, VOCAB
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.linear import Linear, placeholder


class Embedding(nnx.Module):
    """Token embeddings, table [V, D]."""

    def __init__(self, config: MixtralConfig, dtype: jnp.dtype | str):
        self.table = placeholder((config.vocab_size, config.hidden_size), (VOCAB, EMBED), dtype)

    @jax.named_scope("embedding")
    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return shards.gather_parameter("embed.table", self.table[...])[tokens_BT]


@dataclasses.dataclass(frozen=True)
class Head:
    """The output head: a layer with its own weights, or the transposed embedding table."""

    embed: Embedding
    layer: Linear | None

    @jax.named_scope("head")
    def __call__(self, hidden_BTD: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """float32 logits of final hidden states."""
        if self.layer is not None:
            return self.layer(hidden_BTD, "float32")
        return matmul(hidden_BTD, ByOutput(self.embed.table[...]), "float32")

    @property
    def weight_DV(self) -> jax.Array | None:
        """The weight matrix of the head, if the head is a plain product; None for a head with an adapter."""
        if self.layer is None:
            return self.embed.table[...].T
        return self.layer.w[...] if self.layer.lora is None else None


def gather_head(head: Head) -> None:
    """On a shard: gathers the parameters of the model's head, in place, before the head is called several times."""
    if head.layer is not None:
        nnx.update(head.layer, shards.gather_state("lm_head", nnx.state(head.layer)))
    else:
        head.embed.table.set_value(shards.gather_parameter("embed.table", head.embed.table[...]))
