"""The recording step: one forward pass that returns, in compact types, what a recording keeps of every token.

Margins, entropies, norms and the counts of random routers are computed inside the loop over layers
(`models.call.Observe`), so that no logits of all layers are kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bimedix_jax.inference.scoring import chosen_logprobs
from bimedix_jax.models.moe import MoE
from bimedix_jax.models.router_sums import margins
from bimedix_jax.models.routers import NO_EXPERT, Decision, RoutingPlan
from bimedix_jax.routing.parts import PartLayout


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is kept of each layer besides experts and weights; an `Observe`.

    Attributes:
      scores: margins and entropies.
      norms: the norm of every chosen expert's output, before its weight; one more pass through the experts.
      slots: records of a row whose choices of random routers are counted, 0 without random routers. The operand is
        then (weights [D, R * E], biases [R, E]), and the groups number the records of a row.
      states: the states that the router reads.
      before: the states before the layer, for `call.Start`.
    """

    scores: bool = False
    norms: bool = False
    slots: int = 0
    states: bool = False
    before: bool = False

    def __call__(
        self,
        moe: MoE,
        x_BTD: jax.Array,
        decision: Decision,
        group_BT: jax.Array,
        operand: Any,
        before_BTD: jax.Array,
    ) -> dict[str, jax.Array]:
        found = {}
        if self.scores:
            logits_BTE = decision.routing.logits_LBTE
            experts = jnp.arange(logits_BTE.shape[-1])
            chosen_BTE = (decision.chosen_BTK[..., None] == experts[None, None, None]).any(-2)
            log_mass_BTE = jax.nn.log_softmax(logits_BTE, axis=-1)
            found["margin"] = margins(decision.ranks_BTE, chosen_BTE)
            found["entropy"] = -jnp.sum(jnp.exp(log_mass_BTE) * log_mass_BTE, axis=-1)
        if self.norms:
            found["norms"] = output_norms(moe, x_BTD, decision.routing.experts_LBTK)
        if self.slots:
            weights_DX, biases_RE = operand
            found["random"] = random_counts(x_BTD, group_BT, weights_DX, biases_RE, moe.config.top_k, self.slots)
        if self.states:
            found["states"] = x_BTD
        if self.before:
            found["before"] = before_BTD
        return found


def output_norms(moe: MoE, x_BTD: Float[Array, "B T D"], experts_BTK: Int[Array, "B T K"]) -> Float[Array, "B T K"]:
    """The Euclidean norm of each chosen expert's output; 0 in a slot without an expert."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    owners_BTK = jnp.where(experts_BTK == NO_EXPERT, moe.config.num_experts, experts_BTK)
    ones_N1 = jnp.ones((len(x_ND), 1), jnp.float32)
    norms = []
    for slot in range(experts_BTK.shape[-1]):
        y_ND = moe.mix(x_ND, owners_BTK[..., slot].reshape(-1, 1), ones_N1)
        norms.append(jnp.linalg.norm(y_ND.astype(jnp.float32), axis=-1).reshape(x_BTD.shape[:2]))
    return jnp.stack(norms, axis=-1)


def random_counts(
    x_BTD: Float[Array, "B T D"],
    group_BT: Int[Array, "B T"],
    weights_DX: Float[Array, "D X"],
    biases_RE: Float[Array, "R E"],
    top_k: int,
    slots: int,
) -> Int[Array, "B S R E"]:
    """How often each random router chooses each expert for the tokens of each group of a row."""
    scores_BTX = x_BTD.astype(jnp.float32) @ weights_DX
    scores_BTRE = scores_BTX.reshape(*x_BTD.shape[:2], *biases_RE.shape) + biases_RE[None, None]
    least_BTR1 = jax.lax.top_k(scores_BTRE, top_k)[0][..., -1:]
    chosen_BTRE = (scores_BTRE >= least_BTR1).astype(jnp.float32)
    member_BTS = (group_BT[..., None] == jnp.arange(slots)[None, None]).astype(jnp.float32)
    return jnp.einsum("bts,btre->bsre", member_BTS, chosen_BTRE).round().astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a step returns: the columns of a layout (static), and float32 routes for a second pass."""

    layout: PartLayout
    watch: Watch
    routes: bool = False


@functools.partial(jax.jit, static_argnames=("graph", "kept"))
def record_step(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    group_BT: jax.Array,
    plan: RoutingPlan,
    operands: Any,
    kept: Kept,
) -> dict[str, Any]:
    """Columns of every token [B, T, ...], the counts of random routers [B, S, L, R, E], and the routes if asked.

    Args:
      ids_BT: segment ids; 0 is padding. group_BT: record of the row whose random routers count the token, or -1.
      operands: of `Watch`, for all layers.
    """
    model, layout = nnx.merge(graph, state), kept.layout
    watch = kept.watch if dataclasses.astuple(kept.watch) != dataclasses.astuple(Watch()) else None
    out = model.hidden(tokens_BT, ids_BT, plan, record="choices", group_BT=group_BT, observe=watch, operands=operands)
    seen = out.observed or {}
    real = jnp.float32 if layout.exact else jnp.float16
    experts_LBTK = out.routing.experts_LBTK
    if layout.gaps:
        experts_LBTK = jnp.where(experts_LBTK == NO_EXPERT, layout.no_expert, experts_LBTK)
    found: dict[str, Any] = {
        "nll": next_token_nll(model, out.hidden_BTD, tokens_BT),
        "experts": jnp.moveaxis(experts_LBTK, 0, 2).astype(jnp.uint16 if layout.wide else jnp.uint8),
        "weights": jnp.moveaxis(out.routing.weights_LBTK, 0, 2).astype(real),
    }
    found |= {
        name: jnp.moveaxis(seen[name], 0, 2).astype(real) for name in ("margin", "entropy", "norms") if name in seen
    }
    if "random" in seen:
        found["random"] = jnp.moveaxis(seen["random"], 0, 2)
    if kept.routes:
        found["routes"] = (out.routing.experts_LBTK, out.routing.weights_LBTK)
    return found


def next_token_nll(model: Any, hidden_BTD: jax.Array, tokens_BT: jax.Array) -> Float[Array, "B T"]:
    """-log p of each token given those before it, float32. It has no meaning for the first token of a segment."""
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    logprobs_N = chosen_logprobs(model, hidden_ND, jnp.roll(tokens_BT.reshape(-1), -1))
    return -jnp.roll(logprobs_N, 1).reshape(tokens_BT.shape)


@functools.partial(jax.jit, static_argnames="graph")
def nll_step(
    graph: nnx.GraphDef, state: nnx.State, tokens_BT: jax.Array, ids_BT: jax.Array, plan: RoutingPlan
) -> Float[Array, "B T"]:
    """`next_token_nll` under a plan, without a record."""
    model = nnx.merge(graph, state)
    return next_token_nll(model, model.hidden(tokens_BT, ids_BT, plan).hidden_BTD, tokens_BT)


@jax.jit
def taken_from(routes: tuple[jax.Array, jax.Array], from_BT: jax.Array) -> RoutingPlan:
    """The plan that gives each token the experts and weights of the token at this place in the flat batch."""
    experts_LBTK, weights_LBTK = (
        x_LBTK.reshape(x_LBTK.shape[0], -1, x_LBTK.shape[-1])[:, from_BT] for x_LBTK in routes
    )
    return RoutingPlan(experts_LBTK=experts_LBTK, weights_LBTK=weights_LBTK)


@functools.partial(jax.jit, static_argnames="graph")
def states_step(
    graph: nnx.GraphDef, state: nnx.State, tokens_BT: jax.Array, ids_BT: jax.Array
) -> tuple[Float[Array, "L B T D"], Int[Array, "L B T K"]]:
    """The states that the routers read, and the experts that they choose."""
    out = nnx.merge(graph, state).hidden(tokens_BT, ids_BT, record="choices", observe=Watch(states=True))
    return out.observed["states"], out.routing.experts_LBTK
