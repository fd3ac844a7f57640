"""Routing: which experts a token uses, with what weights. The one seam for variants, interventions and replay.

`route` is a pure function of the router's logits, its configuration and a plan; it returns everything that the rest of
the model and any analysis needs. A new variant is a function here and a line in ROUTERS.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bimedix_jax.kernels.pytree import Leaf
from bimedix_jax.models.config import MixtralConfig, RouterConfig

FORCED = 1e6
"""Selection score of a forced expert, above any logit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router did. Inside the layer scan the leading L is not there yet; the scan stacks it.

    Attributes:
      experts_LBTK: int32, chosen experts in the order of choice.
      weights_LBTK: float32, how much of each expert's output is used; they sum to 1 unless the plan says otherwise.
      logits_LBTE: float32, the router's own logits, before the plan's bias and temperature.
    """

    experts_LBTK: Leaf
    weights_LBTK: Leaf
    logits_LBTE: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """What the router is told to do. B and T may be 1 to mean every sequence, every token; None leaves the router free.

    Values are data: changing them never recompiles; setting a field that was None does so once.

    Attributes:
      bias_LBTE: float32 added to the logits; a large negative one bans an expert.
      temperature_LBT: float32 that divides the logits; 1 is neutral.
      experts_LBTK: int32 experts to use; -1 leaves a slot to the router's best expert that is not forced already.
      weights_LBTK: float32 weights to use; -1 leaves a slot its own.
    """

    bias_LBTE: Leaf | None = None
    temperature_LBT: Leaf | None = None
    experts_LBTK: Leaf | None = None
    weights_LBTK: Leaf | None = None

    @classmethod
    def neutral(cls, config: MixtralConfig, batch: int = 1, length: int = 1) -> "RoutingPlan":
        """A plan with every field set that changes nothing: start from it to vary any field without recompiling."""
        lead = (config.num_layers, batch, length)
        return cls(
            jnp.zeros((*lead, config.router.num_experts), jnp.float32),
            jnp.ones(lead, jnp.float32),
            jnp.full((*lead, config.router.top_k), -1, jnp.int32),
            jnp.full((*lead, config.router.top_k), -1.0, jnp.float32),
        )

    def check(self, config: MixtralConfig, batch: int, length: int) -> None:
        """Raises ValueError if a field does not fit the model or the batch."""
        last = {"bias_LBTE": config.router.num_experts, "temperature_LBT": None}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            width = last.get(field.name, config.router.top_k)
            tail = () if width is None else (width,)
            fits = value.shape[:1] == (config.num_layers,) and value.shape[3:] == tail and value.ndim == 3 + len(tail)
            if not (fits and value.shape[1] in (1, batch) and value.shape[2] in (1, length)):
                raise ValueError(
                    f"RoutingPlan.{field.name} has shape {value.shape}; this model and batch need "
                    f"{(config.num_layers, batch, length, *tail)}, where batch and length may be 1."
                )


def route_topk(logits_BTE: Float[Array, "B T E"], config: RouterConfig, plan: RoutingPlan) -> Routing:
    """Mixtral's router: softmax over all experts, top-k, renormalised to sum to 1, all in float32.

    The softmax over the chosen experts' logits equals the renormalised top-k of the softmax over all (arXiv 2401.04088,
    section 2.1), and stays finite where the others' probabilities underflow.
    """
    logits_BTE = logits_BTE.astype(jnp.float32)
    steered_BTE = logits_BTE
    if plan.bias_LBTE is not None:
        steered_BTE = steered_BTE + plan.bias_LBTE
    if plan.temperature_LBT is not None:
        steered_BTE = steered_BTE / plan.temperature_LBT[..., None]
    scores_BTE = jax.lax.stop_gradient(steered_BTE)
    if plan.experts_LBTK is not None:
        forced_BTKE = jax.nn.one_hot(plan.experts_LBTK, config.num_experts, dtype=jnp.float32)
        # earlier slots score higher, so that a fully forced token keeps the order of the plan
        order_K = jnp.arange(config.top_k, 0, -1, dtype=jnp.float32)
        rank_BTE = jnp.max(forced_BTKE * order_K[None, None, :, None], axis=-2)
        scores_BTE = jnp.where(rank_BTE > 0, FORCED + rank_BTE, scores_BTE)
    _, experts_BTK = jax.lax.top_k(scores_BTE, config.top_k)
    weights_BTK = jax.nn.softmax(jnp.take_along_axis(steered_BTE, experts_BTK, axis=-1), axis=-1)
    if plan.weights_LBTK is not None:
        weights_BTK = jnp.where(plan.weights_LBTK >= 0, plan.weights_LBTK, weights_BTK)
    return Routing(experts_BTK.astype(jnp.int32), weights_BTK, logits_BTE)


RouterFunction = Callable[[jax.Array, RouterConfig, RoutingPlan], Routing]
ROUTERS: dict[str, RouterFunction] = {"topk": route_topk}


def route(logits_BTE: Float[Array, "B T E"], config: RouterConfig, plan: RoutingPlan) -> Routing:
    """Decides for one layer; `plan` holds that layer's fields, without L.

    Raises:
      ValueError: unknown `config.variant`.
    """
    if config.variant not in ROUTERS:
        raise ValueError(f"Unknown router variant {config.variant!r}; choose one of {', '.join(sorted(ROUTERS))}.")
    return ROUTERS[config.variant](logits_BTE, config, plan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """Sums over tokens and layers from which a load-balancing loss follows; loads of parts add up.

    Attributes:
      counts_E: times each expert was chosen (one-hot, so without gradient).
      mass_E: router probability that each expert received.
      tokens: number of token-layer pairs summed over, padding excluded.
    """

    counts_E: Leaf
    mass_E: Leaf
    tokens: Leaf


def load_of(routing: Routing, valid_BT: Bool[Array, "B T"], per_sequence: bool = False) -> Load:
    """Load over all layers and valid tokens; with `per_sequence` every field keeps a leading B."""
    axes = (0, 2) if per_sequence else (0, 1, 2)
    layers, _, _, experts = routing.logits_LBTE.shape
    valid = valid_BT.astype(jnp.float32)
    chosen_LBTE = jnp.sum(jax.nn.one_hot(routing.experts_LBTK, experts, dtype=jnp.float32), axis=-2)
    probabilities_LBTE = jax.nn.softmax(routing.logits_LBTE, axis=-1)
    return Load(
        jax.lax.stop_gradient(jnp.sum(chosen_LBTE * valid[None, :, :, None], axis=axes)),
        jnp.sum(probabilities_LBTE * valid[None, :, :, None], axis=axes),
        layers * jnp.sum(valid, axis=1 if per_sequence else None),
    )


def balance(counts_E: jax.Array, mass_E: jax.Array, tokens: jax.Array) -> jax.Array:
    """E * sum_e (share of choices) * (share of probability), over the last axis (arXiv 2101.03961, eq. 4).

    It is top_k when balanced.
    """
    tokens = jnp.maximum(tokens, 1)[..., None]
    return counts_E.shape[-1] * jnp.sum((counts_E / tokens) * (mass_E / tokens), axis=-1)


AuxScope = Literal["sequence", "micro_batch", "global"]


def load_balancing_loss(
    routing: Routing, valid_BT: Bool[Array, "B T"], scope: AuxScope = "micro_batch", total: Load | None = None
) -> Float[Array, ""]:
    """Load-balancing loss with an explicit scope; it is not linear in the batch, so the scope changes it.

    Args:
      valid_BT: False at padding, which counts nowhere.
      scope: "micro_batch" pools all layers and tokens of this batch, as Hugging Face does; "sequence" averages the loss
        of each row that has a valid token; "global" uses the choices and token count of `total`, the load of the whole
        optimiser step, so that the sum of this value over the step's micro-batches is the loss of the step.

    Raises:
      ValueError: scope "global" without `total`, or an unknown scope.
    """
    if scope == "global":
        if total is None:
            raise ValueError('Scope "global" needs the load of the whole optimiser step in `total`.')
        return balance(total.counts_E, load_of(routing, valid_BT).mass_E, total.tokens)
    if scope == "sequence":
        load = load_of(routing, valid_BT, per_sequence=True)
        present_B = (load.tokens > 0).astype(jnp.float32)
        losses_B = balance(load.counts_E, load.mass_E, load.tokens)
        return jnp.sum(losses_B * present_B) / jnp.maximum(jnp.sum(present_B), 1)
    if scope == "micro_batch":
        load = load_of(routing, valid_BT)
        return balance(load.counts_E, load.mass_E, load.tokens)
    raise ValueError(f'Unknown aux-loss scope {scope!r}; choose "sequence", "micro_batch" or "global".')


def router_z_loss(logits_LBTE: Float[Array, "L B T E"], valid_BT: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over layers and valid tokens of logsumexp(logits) squared (ST-MoE, arXiv 2202.08906, eq. 5)."""
    valid = valid_BT.astype(jnp.float32)
    squares_LBT = jax.nn.logsumexp(logits_LBTE, axis=-1) ** 2
    return jnp.sum(squares_LBT * valid[None]) / jnp.maximum(logits_LBTE.shape[0] * jnp.sum(valid), 1)
