"""Mixtral (arXiv 2401.04088): block, model and forward pass."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from bimedix_jax.kernels.attention import Cached
from bimedix_jax.models.attention import Attention, KVCache, RMSNorm, locate, rotations
from bimedix_jax.models.axes import EMBED, LAYERS, VOCAB
from bimedix_jax.models.base import Model
from bimedix_jax.models.call import Call, Observe, Output, Start
from bimedix_jax.models.checks import checked_call
from bimedix_jax.models.config import LoraConfig, MixtralConfig, Remat
from bimedix_jax.models.embedding import Embedding, Head
from bimedix_jax.models.layer_loop import run_layers
from bimedix_jax.models.linear import Linear
from bimedix_jax.models.moe import MoE
from bimedix_jax.models.routers import Decision, Record, RoutingPlan


class Block(nnx.Module):
    """Pre-norm attention and mixture of experts; every parameter is stacked on a leading layer axis."""

    def __init__(self, config: MixtralConfig, dtype: jnp.dtype | str):
        norm_shape, norm_axes = (config.num_layers, config.hidden_size), (LAYERS, EMBED)
        self.attention_norm = RMSNorm(norm_shape, norm_axes, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.moe_norm = RMSNorm(norm_shape, norm_axes, config.rms_norm_eps, dtype)
        self.moe = MoE(config, dtype)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotations_BTH: Float[Array, "B T H"],
        segment_ids_BT: Int[Array, "B T"],
        key_ids_BS: Int[Array, "B S"],
        ancestor_ids_BTA: Int[Array, "B T A"] | None,
        plan: RoutingPlan,
        cache: tuple[Cached, Cached] | None,
        offset: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Decision, tuple[Cached, Cached] | None]:
        """(states after the block, the states that its router reads, what that decided, the cache)."""
        mixed_BTD, cache = self.attention(
            self.attention_norm(x_BTD), rotations_BTH, segment_ids_BT, key_ids_BS, ancestor_ids_BTA, cache, offset
        )
        x_BTD = x_BTD + mixed_BTD
        read_BTD = self.moe_norm(x_BTD)
        experts_BTD, decision = self.moe(read_BTD, segment_ids_BT != 0, plan)
        return x_BTD + experts_BTD, read_BTD, decision, cache


class Mixtral(Model):
    """Embedding, blocks, norm, head. It is built without storage: `load` or `init_random` fills the parameters."""

    def __init__(self, config: MixtralConfig, dtype: jnp.dtype | str = "bfloat16"):
        """`dtype` is that of the parameters and of the computation."""
        super().__init__()
        self.config = config
        self.dtype = str(jnp.dtype(dtype))
        self.lora: LoraConfig | None = None  # configuration of the adapters; set by `add_lora`
        self.embed = Embedding(config, dtype)
        self.layers = Block(config, dtype)
        self.norm = RMSNorm((config.hidden_size,), (EMBED,), config.rms_norm_eps, dtype)
        self.lm_head: Linear | None = nnx.data(
            None if config.tie_embeddings else Linear((config.hidden_size, config.vocab_size), (EMBED, VOCAB), dtype)
        )

    def forward(self, call: Call) -> Output:
        positions_BT, key_ids_BS = locate(call.segment_ids_BT, call.cache, call.ancestor_ids_BTA)
        rotations_BTH = rotations(positions_BT, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        x_BTD = self.embed(call.tokens_BT).astype(self.dtype) if call.start is None else call.start.before_BTD
        x_BTD, routing, sums, kv, observed = run_layers(self.layers, x_BTD, rotations_BTH, key_ids_BS, call)
        cache = call.cache
        if cache is not None:
            k_LBSGH, v_LBSGH = kv
            cache = KVCache(k_LBSGH, v_LBSGH, key_ids_BS, cache.length + call.tokens_BT.shape[1])
        none: Any = None  # the logits, see Output
        return Output(self.norm(x_BTD), none, routing, sums, cache, observed)

    @property
    def head(self) -> Head:
        """The function from final hidden states [..., D] to float32 logits [..., V]."""
        return Head(self.embed, self.lm_head)

    def hidden(
        self,
        tokens_BT: Integer[Array | np.ndarray, "B T"],
        segment_ids_BT: Integer[Array | np.ndarray, "B T"] | None = None,
        plan: RoutingPlan | None = None,
        cache: KVCache | None = None,
        remat: Remat = "none",
        record: Record = "none",
        groups: int = 0,
        group_BT: Int[Array | np.ndarray, "B T"] | None = None,
        observe: Observe | None = None,
        operands: Any = None,
        start: Start | None = None,
        ancestor_ids_BTA: Integer[Array | np.ndarray, "B T A"] | None = None,
    ) -> Output:
        """`__call__` without the output head, and by default without a record.

        Args:
          observe, operands: what else to keep of every layer, see `call.Observe`.
          start: a later layer to begin with, and the states before it. Only for a model on one device.
          ancestor_ids_BTA: the segments in the same row, or in the cache, that each token's own segment continues, such
            as a common beginning and a question; filled up with its own id (tree attention, arXiv 2305.09781).
        """
        how = (plan, cache, remat, record, groups, group_BT, observe, operands, start, ancestor_ids_BTA)
        return self.compiled(checked_call(self.config, tokens_BT, segment_ids_BT, *how))

    def __call__(
        self,
        tokens_BT: Integer[Array | np.ndarray, "B T"],
        segment_ids_BT: Integer[Array | np.ndarray, "B T"] | None = None,
        plan: RoutingPlan | None = None,
        cache: KVCache | None = None,
        remat: Remat = "none",
        record: Record = "full",
        groups: int = 0,
        group_BT: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Output:
        """Runs the model.

        Args:
          tokens_BT: token ids, any integer dtype.
          segment_ids_BT: documents packed into one row have different ids and do not attend to each other; 0 is
            padding, on either side. None: one document in each row, no padding.
          plan: what the routers are told to do.
          cache: keys and values of earlier tokens; these tokens continue them.
          remat: what the backward pass recomputes; never what the routers decided.
          record: how much of the routers' work `routing` keeps: "none", "choices" (experts and weights) or "full"
            (logits too).
          groups: number of token groups that `sums` has; the router losses need at least 1. 0: no sums.
          group_BT: int32 group of each token, from 0; None puts all tokens into group 0.

        Raises:
          ValueError: more positions than the model has, or a plan that does not fit.
        """
        out = self.hidden(tokens_BT, segment_ids_BT, plan, cache, remat, record, groups, group_BT)
        return dataclasses.replace(out, logits_BTV=self.head(out.hidden_BTD))
