"""Routing: which experts a token uses, and with which weights. Variants, interventions and replay all use these stages.

    steer -> score -> choose -> weigh

`steer` applies a plan's noise, bias and temperature to the router's logits. `score` computes scores from the logits.
`choose` selects the best experts, never a banned one and always a forced one, and a plan may use fewer of them. `weigh`
computes weights from the scores of the chosen experts. A plan may then replace them, permute the experts and multiply
their outputs. All of this is the same code for all variants, so every variant obeys every plan. A new variant is a row
of ROUTERS.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from bimedix_jax.kernels.pytree import Leaf
from bimedix_jax.models.config import RouterConfig
from bimedix_jax.models.plans import RoutingPlan, checked_plan
from bimedix_jax.models.remat import ROUTES

__all__ = ["ROUTERS", "Router", "Routing", "RoutingPlan", "checked_plan", "route"]

BANNED = -1e8
"""An expert with a steered logit below this is never chosen, unless the plan forces it."""
NO_EXPERT = -1
"""Expert id in the record of a slot without an expert: padding, or a plan that leaves fewer than k experts."""
FORCED = 1e6
"""Rank of a forced expert, above that of any other."""

Record = Literal["none", "choices", "full"]
"""What a call records of its routers: nothing; experts and weights; or also the logits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the routers did. L is absent for one layer; the loop over layers stacks the layers.

    Attributes:
      experts_LBTK: int32, the experts that compute, in the order of choice and after the plan's permutation; NO_EXPERT
        (-1) in a slot without an expert.
      weights_LBTK: float32, weight of each expert's output, with the plan's gain; 0 in a slot without an expert.
      logits_LBTE: float32, the router's logits, before the plan's noise, bias and temperature. None with record
        "choices"; the type omits this, so that other callers need no check.
    """

    experts_LBTK: Leaf
    weights_LBTK: Leaf
    logits_LBTE: Leaf


if TYPE_CHECKING:
    Recorded = Routing
else:
    Recorded = Any
"""Routing, or None without a record. The type omits None, because callers know whether they asked for a record."""


@dataclasses.dataclass(frozen=True)
class Router:
    """A variant: the functions in which routers differ, and properties that the tests check.

    Attributes:
      score: (steered logits [B, T, E], config) -> scores [B, T, E], from which weights are made.
      rank: (scores, state [E] or None) -> ranks [B, T, E]; the k highest are chosen. Ranks have no gradient.
      weigh: (scores of the chosen experts [B, T, K], which of them exist, config) -> weights [B, T, K].
      update: (state [L, E], how often each expert was chosen [L, E], config) -> state after an optimiser step; None for
        a variant without state. The state starts at zero and has no gradient.
      reads: fields of RouterConfig that it uses besides num_experts, top_k and variant.
      normalised: whether the weights of a token sum to `config.scale`; otherwise they sum to at most that.
      shift_invariant: whether adding a number to all logits of a token has no effect.
    """

    score: Callable[[jax.Array, RouterConfig], jax.Array]
    weigh: Callable[[jax.Array, jax.Array, RouterConfig], jax.Array]
    rank: Callable[[jax.Array, jax.Array | None], jax.Array] = lambda scores_BTE, _: scores_BTE
    update: Callable[[jax.Array, jax.Array, RouterConfig], jax.Array] | None = None
    reads: tuple[str, ...] = ()
    normalised: bool = True
    shift_invariant: bool = True


def masked_softmax(scores_BTK: jax.Array, exists_BTK: jax.Array, config: RouterConfig) -> jax.Array:
    """Mixtral's weights: softmax over the logits of the chosen experts.

    It equals the renormalised top-k of the softmax over all experts (arXiv 2401.04088, section 2.1), but stays finite
    if the probabilities of the chosen experts would underflow.
    """
    del config
    return jax.nn.softmax(jnp.where(exists_BTK, scores_BTK, 2 * BANNED), axis=-1)


def scaled(scores_BTK: jax.Array, exists_BTK: jax.Array, config: RouterConfig) -> jax.Array:
    """The scores themselves, times `scale`."""
    del exists_BTK  # `decide` sets the weights of these slots to 0
    return config.scale * scores_BTK


def scaled_shares(scores_BTK: jax.Array, exists_BTK: jax.Array, config: RouterConfig) -> jax.Array:
    """Shares of the chosen experts' scores, times `scale`."""
    scores_BTK = jnp.where(exists_BTK, scores_BTK, 0.0)
    total_BT1 = jnp.sum(scores_BTK, axis=-1, keepdims=True)
    return config.scale * scores_BTK / jnp.maximum(total_BT1, jnp.finfo(jnp.float32).tiny)


def biased_ranks(scores_BTE: jax.Array, state_E: jax.Array | None) -> jax.Array:
    return scores_BTE if state_E is None else scores_BTE + state_E[None, None]


def balancing_bias(state_LE: jax.Array, chosen_LE: jax.Array, config: RouterConfig) -> jax.Array:
    """b + u * sign(mean load - load): raises the rank of experts with little load (arXiv 2412.19437)."""
    mean_L1 = jnp.mean(chosen_LE, axis=-1, keepdims=True)
    return state_LE + config.bias_rate * jnp.sign(mean_L1 - chosen_LE)


ROUTERS: dict[str, Router] = {
    # Mixtral (arXiv 2401.04088)
    "topk": Router(score=lambda logits_BTE, _: logits_BTE, weigh=masked_softmax),
    # scale * softmax over all experts: Switch (arXiv 2101.03961, eq. 2), OLMoE (arXiv 2409.02060)
    "softmax_topk": Router(
        score=lambda logits_BTE, _: jax.nn.softmax(logits_BTE, axis=-1),
        weigh=scaled,
        reads=("scale",),
        normalised=False,
    ),
    # DeepSeek-V3 (arXiv 2412.19437, eqs. 12-16): sigmoid + bias for the choice, sigmoid alone for the weights
    "sigmoid_bias": Router(
        score=lambda logits_BTE, _: jax.nn.sigmoid(logits_BTE),
        weigh=scaled_shares,
        rank=biased_ranks,
        update=balancing_bias,
        reads=("scale", "bias_rate"),
        shift_invariant=False,
    ),
}


def router_of(config: RouterConfig) -> Router:
    """The variant that a configuration names.

    Raises:
      ValueError: unknown `config.variant`, or a parameter that this variant does not use.
    """
    if config.variant not in ROUTERS:
        raise ValueError(f"Unknown router variant {config.variant!r}; choose one of {', '.join(sorted(ROUTERS))}.")
    router = ROUTERS[config.variant]
    for field in dataclasses.fields(RouterConfig):
        if field.default is dataclasses.MISSING or field.name in ("variant", *router.reads):
            continue
        if getattr(config, field.name) != field.default:
            raise ValueError(
                f"Router variant {config.variant!r} does not read {field.name}; leave it at {field.default}."
            )
    return router


def steer(logits_BTE: Float[Array, "B T E"], plan: RoutingPlan, keys_BT: Array | None = None) -> Float[Array, "B T E"]:
    """The logits with the plan's noise, bias and temperature, in this order.

    A high temperature does not lift a ban, and a low one does not cause a ban.
    """
    own_BTE = logits_BTE
    if plan.noise_LBT is not None:
        if keys_BT is None:
            raise ValueError("A plan with noise needs a key for each token; RoutingPlan.noisy makes the keys.")
        draw = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, logits_BTE.shape[-1:], jnp.float32)))
        logits_BTE = logits_BTE + plan.noise_LBT[..., None] * draw(keys_BT)
    if plan.bias_LBTE is not None:
        logits_BTE = logits_BTE + plan.bias_LBTE
    if plan.deviations_LBTE is not None:
        logits_BTE = logits_BTE + plan.deviations_LBTE * deviation(own_BTE)
    if plan.temperature_LBT is not None:
        heated_BTE = jnp.maximum(logits_BTE / plan.temperature_LBT[..., None], BANNED)
        logits_BTE = jnp.where(logits_BTE < BANNED, logits_BTE, heated_BTE)
    return logits_BTE


def deviation(logits_BTE: Float[Array, "B T E"]) -> Float[Array, "B T 1"]:
    """Standard deviation of a token's logits over the experts; if they are all equal, 0 with gradient 0."""
    variance_BT1 = jnp.var(logits_BTE, axis=-1, keepdims=True)
    varied_BT1 = variance_BT1 > 0
    return jnp.where(varied_BT1, jnp.sqrt(jnp.where(varied_BT1, variance_BT1, 1.0)), 0.0)


def choose(
    ranks_BTE: Float[Array, "B T E"],
    allowed_BTE: Bool[Array, "B T E"],
    forced_BTK: Int[Array, "#B #T K"] | None,
    top_k: int,
) -> tuple[Int[Array, "B T K"], Bool[Array, "B T K"]]:
    """(the k experts of highest rank, whether each of them exists): forced ones first, then allowed ones."""
    ranks_BTE = lax.stop_gradient(jnp.where(allowed_BTE, ranks_BTE, -jnp.inf))
    if forced_BTK is not None:
        # earlier slots rank higher, so that forced experts keep the order of the plan
        order_K = FORCED + jnp.arange(top_k, 0, -1, dtype=jnp.float32)
        experts_E = jnp.arange(ranks_BTE.shape[-1])
        placed_BTKE = forced_BTK[..., None] == experts_E[None, None, None]
        places_BTE = jnp.max(jnp.where(placed_BTKE, order_K[None, None, :, None], 0), axis=-2)
        ranks_BTE = jnp.where(places_BTE > 0, places_BTE, ranks_BTE)
    best_BTK, experts_BTK = lax.top_k(ranks_BTE, top_k)
    return experts_BTK.astype(jnp.int32), best_BTK != -jnp.inf  # NaN counts as a rank


@dataclasses.dataclass(frozen=True)
class Decision:
    """Result of `decide` for one layer.

    Attributes:
      routing: the record.
      chosen_BTK: the experts that the router chose, before the plan's permutation; otherwise as in the record.
      ranks_BTE: the ranks by which they were chosen, -inf for bans.
    """

    routing: Routing
    chosen_BTK: jax.Array
    ranks_BTE: jax.Array


def decide(
    logits_BTE: Float[Array, "B T E"],
    config: RouterConfig,
    plan: RoutingPlan,
    valid_BT: Bool[Array, "B T"] | None = None,
    state_E: Float[Array, "E"] | None = None,
    keys_BT: Array | None = None,
) -> Decision:
    """Like `route`, but also returns the ranks."""
    router, logits_BTE = router_of(config), logits_BTE.astype(jnp.float32)
    with jax.named_scope("steer"):
        steered_BTE = steer(logits_BTE, plan, keys_BT)
        if steered_BTE is not logits_BTE:
            steered_BTE = checkpoint_name(steered_BTE, ROUTES)
        allowed_BTE = ~(steered_BTE < BANNED)  # NaN is allowed, so that it stays visible
    with jax.named_scope("score"):
        scores_BTE = router.score(steered_BTE, config)
    with jax.named_scope("choose"):
        ranks_BTE = router.rank(scores_BTE, state_E)
        chosen_BTK, exists_BTK = choose(ranks_BTE, allowed_BTE, plan.experts_LBTK, config.top_k)
        if plan.active_LBT is not None:
            exists_BTK = exists_BTK & (jnp.arange(config.top_k)[None, None] < plan.active_LBT[..., None])
    with jax.named_scope("weigh"):
        weights_BTK = router.weigh(jnp.take_along_axis(scores_BTE, chosen_BTK, axis=-1), exists_BTK, config)
        if plan.weights_LBTK is not None:
            weights_BTK = jnp.where(plan.weights_LBTK >= 0, plan.weights_LBTK, weights_BTK)
        experts_BTK = chosen_BTK if plan.map_LBTE is None else of_chosen(plan.map_LBTE, chosen_BTK)
        if plan.gain_LBTE is not None:
            weights_BTK = weights_BTK * of_chosen(plan.gain_LBTE, experts_BTK)
        if valid_BT is not None:
            exists_BTK = exists_BTK & valid_BT[..., None]
        chosen_BTK, experts_BTK = (jnp.where(exists_BTK, x, NO_EXPERT) for x in (chosen_BTK, experts_BTK))
        weights_BTK = jnp.where(exists_BTK, weights_BTK, 0.0)
    ranks_BTE = jnp.where(allowed_BTE, ranks_BTE, -jnp.inf)
    return Decision(Routing(experts_BTK, weights_BTK, logits_BTE), chosen_BTK, ranks_BTE)


def of_chosen(values_BTE: jax.Array, experts_BTK: jax.Array) -> jax.Array:
    """[B, T, K]: the values of these experts; B and T of the values may be 1."""
    values_BTE = jnp.broadcast_to(values_BTE, (*experts_BTK.shape[:2], values_BTE.shape[-1]))
    return jnp.take_along_axis(values_BTE, experts_BTK, axis=-1)


def route(
    logits_BTE: Float[Array, "B T E"],
    config: RouterConfig,
    plan: RoutingPlan,
    valid_BT: Bool[Array, "B T"] | None = None,
    state: Float[Array, "E"] | None = None,
    key: Array | None = None,
) -> Routing:
    """Routes the tokens of one layer, in float32.

    Args:
      logits_BTE: the router's logits.
      plan: the fields of this layer, without L.
      valid_BT: False at padding, which gets no expert; None: all tokens are valid.
      state: what the variant has learned without gradients; None: no state.
      key: PRNG key of each token [B, T], for the plan's noise.

    Raises:
      ValueError: unknown `config.variant`, a parameter that it does not use, or noise without keys.
    """
    return decide(logits_BTE, config, plan, valid_BT, state, key).routing
