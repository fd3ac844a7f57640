"""The sparse mixture of experts: route, dispatch, experts, combine. No pair of a valid token is dropped."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from bimedix_jax.kernels.permute import combine, dispatch, sort_by_expert
from bimedix_jax.models.axes import EMBED, EXPERTS, LAYERS, MLP
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
        experts, top_k = self.config.num_experts, self.config.top_k
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        owners_BTK = jnp.where(valid_BT[..., None], routing.experts_LBTK, experts)
        permutation = sort_by_expert(owners_BTK.reshape(-1, top_k), experts)
        x_MD = dispatch(x_ND, permutation)
        gate_MF = self.w1(x_MD, permutation.group_sizes_E)
        up_MF = self.w3(x_MD, permutation.group_sizes_E)
        y_MD = self.w2(jax.nn.silu(gate_MF) * up_MF, permutation.group_sizes_E)
        y_ND = combine(y_MD, routing.weights_LBTK.reshape(-1, top_k), permutation)
        return y_ND.reshape(x_BTD.shape), routing
