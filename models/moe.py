"""The sparse mixture of experts: route, dispatch, experts, combine. No pair of a valid token is dropped."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bimedix_jax.kernels.expert_mlp import expert_mlp
from bimedix_jax.kernels.permute import Permutation, combine, dispatch, sort_by_expert
from bimedix_jax.models import shards
from bimedix_jax.models.axes import BATCH, EMBED, EXPERTS, LAYERS, MLP
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.linear import ExpertLinear, Linear
from bimedix_jax.models.routers import Routing, RoutingPlan, route


class MoE(nnx.Module):
    """Mixtral's feed-forward block: sum over chosen experts of weight * w2(silu(w1 x) * w3 x) (arXiv 2401.04088)."""

    def __init__(self, config: MixtralConfig, dtype: jnp.dtype | str):
        layers, experts = config.num_layers, config.router.num_experts
        width, hidden = config.hidden_size, config.intermediate_size
        self.config = config.router
        self.router = Linear((layers, width, experts), (LAYERS, EMBED, None), dtype)
        self.w1 = ExpertLinear((layers, experts, width, hidden), (LAYERS, EXPERTS, EMBED, MLP), dtype)
        self.w2 = ExpertLinear((layers, experts, hidden, width), (LAYERS, EXPERTS, MLP, EMBED), dtype)
        self.w3 = ExpertLinear((layers, experts, width, hidden), (LAYERS, EXPERTS, EMBED, MLP), dtype)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], plan: RoutingPlan
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The mixture, and what the router did. Padding is routed in the record but to no expert: its output is 0."""
        routing = route(self.router(x_BTD.astype(jnp.float32)), self.config, plan)
        top_k = self.config.top_k
        owners_BTK = jnp.where(valid_BT[..., None], routing.experts_LBTK, self.config.num_experts)
        y_ND = self.mix(
            x_BTD.reshape(-1, x_BTD.shape[-1]),
            owners_BTK.reshape(-1, top_k),
            routing.weights_LBTK.reshape(-1, top_k),
        )
        return y_ND.reshape(x_BTD.shape), routing

    def mix(
        self, x_ND: Float[Array, "N D"], owners_NK: Int[Array, "N K"], weights_NK: Float[Array, "N K"]
    ) -> Float[Array, "N D"]:
        """Each token's weighted sum over its experts; an owner of num_experts is no expert.

        Where experts are split over shards, every shard takes the tokens of all, computes what its experts owe them,
        and the sums return to the tokens' own shards. Rows are counted for the worst case, so none is ever dropped.
        """
        exchanged = shards.is_split_like(EXPERTS, BATCH)  # otherwise these shards hold the same tokens already
        if exchanged:
            x_ND, owners_NK, weights_NK = (shards.gather(EXPERTS, x) for x in (x_ND, owners_NK, weights_NK))
        experts = self.config.num_experts // shards.count(EXPERTS)
        owners_NK, weights_NK = own_choices(owners_NK, weights_NK, shards.index(EXPERTS) * experts, experts)
        permutation = sort_by_expert(owners_NK, experts)
        y_ND = self.feed_forward(x_ND, weights_NK, permutation)
        y_ND = shards.sum_and_scatter(EXPERTS, y_ND) if exchanged else shards.sum_over(EXPERTS, y_ND)
        return shards.sum_over(MLP, y_ND)

    def feed_forward(
        self, x_ND: Float[Array, "N D"], weights_NK: Float[Array, "N K"], permutation: Permutation
    ) -> Float[Array, "N D"]:
        """The experts of this shard, as one operation where nothing comes between its parts."""
        layers = (self.w1, self.w3, self.w2)
        if not any(layer.drops for layer in layers):
            base, deltas = zip(*((layer.w.get_value(), layer.factors(x_ND.dtype)) for layer in layers), strict=True)
            return expert_mlp(x_ND, weights_NK, permutation, base, deltas)
        x_MD, sizes_E = dispatch(x_ND, permutation), permutation.group_sizes_E
        y_MD = self.w2(jax.nn.silu(self.w1(x_MD, sizes_E)) * self.w3(x_MD, sizes_E), sizes_E)
        return combine(y_MD, weights_NK, permutation)


EXPERT_MATRIX = re.compile(r"\['moe'\]\['w[123]'\]\['w'\]\.value")


def is_expert_matrix(path: Any, array: Any) -> bool:
    """Whether this leaf of a state of layers is a dense weight of the experts, which may come as a LayerOf."""
    return EXPERT_MATRIX.search(jax.tree_util.keystr(path)) is not None and array.ndim == 4


def own_choices(
    owners_NK: Int[Array, "N K"], weights_NK: Float[Array, "N K"], first: Int[Array, ""], count: int
) -> tuple[Int[Array, "N C"], Float[Array, "N C"]]:
    """(owners, weights) of the `count` experts from `first` on, numbered from 0; `count` is the owner of other slots.

    A token chooses an expert at most once, so C = min(K, count) slots are enough.
    """
    if shards.count(EXPERTS) == 1:
        return owners_NK, weights_NK
    own_NK = (owners_NK >= first) & (owners_NK < first + count)
    local_NK = jnp.where(own_NK, owners_NK - first, count)
    if count >= owners_NK.shape[1]:
        return local_NK, weights_NK
    slots_NC = jnp.argsort(~own_NK, axis=1, stable=True)[:, :count]
    return jnp.take_along_axis(local_NK, slots_NC, axis=1), jnp.take_along_axis(weights_NK, slots_NC, axis=1)
