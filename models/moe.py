"""The sparse mixture of experts: route, dispatch, experts, combine. No token is ever dropped."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from bimedix_jax.kernels.expert_mlp import expert_mlp
from bimedix_jax.kernels.permute import Permutation, combine, dispatch, sort_by_expert
from bimedix_jax.models import shards
from bimedix_jax.models.axes import BATCH, EMBED, EXPERTS, LAYERS, MLP
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.linear import ExpertLinear, Linear
from bimedix_jax.models.plans import RoutingPlan, token_keys
from bimedix_jax.models.remat import ROUTES
from bimedix_jax.models.routers import NO_EXPERT, Decision, Routing, decide, router_of


class RouterState(nnx.Variable):
    """What a router variant learns without gradients, float32 [L, E]."""


class MoE(nnx.Module):
    """Mixtral's feed-forward block: sum over chosen experts of weight * w2(silu(w1 x) * w3 x) (arXiv 2401.04088)."""

    def __init__(self, config: MixtralConfig, dtype: jnp.dtype | str):
        layers, experts = config.num_layers, config.router.num_experts
        width, hidden = config.hidden_size, config.intermediate_size
        self.router = Linear((layers, width, experts), (LAYERS, EMBED, None), dtype)
        self.set_router(config)
        self.w1 = ExpertLinear((layers, experts, width, hidden), (LAYERS, EXPERTS, EMBED, MLP), dtype)
        self.w2 = ExpertLinear((layers, experts, hidden, width), (LAYERS, EXPERTS, MLP, EMBED), dtype)
        self.w3 = ExpertLinear((layers, experts, width, hidden), (LAYERS, EXPERTS, EMBED, MLP), dtype)

    def set_router(self, config: MixtralConfig) -> None:
        """Sets the router variant of this configuration; its state has no storage yet."""
        self.config = config.router
        shape = (config.num_layers, config.router.num_experts)
        state = RouterState(jax.ShapeDtypeStruct(shape, jnp.float32), axes=(LAYERS, None))
        self.state: RouterState | None = nnx.data(state if router_of(config.router).update else None)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], plan: RoutingPlan
    ) -> tuple[Float[Array, "B T D"], Decision]:
        """(the mixture, what the router decided). Padding has no expert, and its output is 0."""
        decision = self.decide(x_BTD, valid_BT, plan)
        owners_BTK = jnp.where(
            decision.routing.experts_LBTK == NO_EXPERT, self.config.num_experts, decision.routing.experts_LBTK
        )
        y_ND = self.mix(
            x_BTD.reshape(-1, x_BTD.shape[-1]),
            owners_BTK.reshape(-1, self.config.top_k),
            decision.routing.weights_LBTK.reshape(-1, self.config.top_k),
        )
        return y_ND.reshape(x_BTD.shape), decision

    @jax.named_scope("router")
    def decide(self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], plan: RoutingPlan) -> Decision:
        """What the router decides for these states. Every checkpoint policy keeps it for the backward pass."""
        logits_BTE = checkpoint_name(self.router(x_BTD.astype(jnp.float32)), ROUTES)
        state_E = None if self.state is None else self.state.get_value()
        decision = decide(logits_BTE, self.config, plan, valid_BT, state_E, noise_keys(plan, valid_BT))
        routing = decision.routing
        kept = Routing(
            checkpoint_name(routing.experts_LBTK, ROUTES), checkpoint_name(routing.weights_LBTK, ROUTES), logits_BTE
        )
        return dataclasses.replace(decision, routing=kept)

    def mix(
        self, x_ND: Float[Array, "N D"], owners_NK: Int[Array, "N K"], weights_NK: Float[Array, "N K"]
    ) -> Float[Array, "N D"]:
        """Each token's weighted sum over its experts; the owner num_experts means no expert.

        Under expert parallelism, every shard gathers the tokens of all shards and computes the part of its experts. The
        sums are scattered back to the shards of the tokens. Shapes allow for the worst case, so no token is dropped.
        """
        exchanged = shards.is_split_like(EXPERTS, BATCH)  # otherwise the shards of experts have the same tokens
        experts = self.config.num_experts // shards.count(EXPERTS)
        with jax.named_scope("dispatch"):
            if exchanged:
                x_ND, owners_NK, weights_NK = (shards.gather(EXPERTS, x) for x in (x_ND, owners_NK, weights_NK))
            owners_NK, weights_NK = own_choices(owners_NK, weights_NK, shards.index(EXPERTS) * experts, experts)
            permutation = checkpoint_name(sort_by_expert(owners_NK, experts), ROUTES)
        y_ND = self.feed_forward(x_ND, weights_NK, permutation)
        with jax.named_scope("combine"):
            y_ND = shards.sum_and_scatter(EXPERTS, y_ND) if exchanged else shards.sum_over(EXPERTS, y_ND)
            return shards.sum_over(MLP, y_ND)

    def feed_forward(
        self, x_ND: Float[Array, "N D"], weights_NK: Float[Array, "N K"], permutation: Permutation
    ) -> Float[Array, "N D"]:
        """The experts of this shard, as one operation unless adapters have dropout, which applies between its parts."""
        layers = (self.w1, self.w3, self.w2)
        if not any(layer.drops for layer in layers):
            base, deltas = zip(*((layer.w.get_value(), layer.factors(x_ND.dtype)) for layer in layers), strict=True)
            return expert_mlp(x_ND, weights_NK, permutation, base, deltas)
        x_MD, sizes_e = dispatch(x_ND, permutation), permutation.group_sizes_E
        with jax.named_scope("experts/w1_w3"):
            hidden_MF = jax.nn.silu(self.w1(x_MD, sizes_e)) * self.w3(x_MD, sizes_e)
        with jax.named_scope("experts/w2"):
            y_MD = self.w2(hidden_MF, sizes_e)
        return combine(y_MD, weights_NK, permutation)


def noise_keys(plan: RoutingPlan, valid_BT: Bool[Array, "B T"]) -> jax.Array | None:
    """A key for each token of one layer; None for a plan without noise."""
    keys = plan.keys_LBT
    if keys is None or keys.shape == valid_BT.shape:
        return keys
    batch, length = valid_BT.shape
    rows_B = shards.index(BATCH) * batch + jnp.arange(batch)
    return token_keys(keys, rows_B[:, None], jnp.arange(length)[None])


def own_choices(
    owners_NK: Int[Array, "N K"], weights_NK: Float[Array, "N K"], first: Int[Array, ""], count: int
) -> tuple[Int[Array, "N C"], Float[Array, "N C"]]:
    """(owners, weights) for one shard's experts, the `count` experts from `first` on, numbered from 0.

    The owner `count` means an expert of another shard, or none. A token chooses an expert at most once, so
    C = min(K, count) slots are enough.
    """
    if shards.count(EXPERTS) == 1:
        return owners_NK, weights_NK
    own_NK = (owners_NK >= first) & (owners_NK < first + count)
    local_NK = jnp.where(own_NK, owners_NK - first, count)
    if count >= owners_NK.shape[1]:
        return local_NK, weights_NK
    slots_NC = jnp.argsort(~own_NK, axis=1, stable=True)[:, :count]
    return jnp.take_along_axis(local_NK, slots_NC, axis=1), jnp.take_along_axis(weights_NK, slots_NC, axis=1)
