"""Sums over tokens of what routers did, and the router losses, which are functions of the sums.

Each layer sums inside the loop over layers, so no array has both a layer and a token axis. Sums of micro-batches and
shards can be added.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.pytree import Leaf
from bimedix_jax.models.routers import Decision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """Sums over the tokens of each group X (all tokens, rows, languages), without padding; L is absent for one layer.

    Only `mass_LXE` and `z_LX` have gradients.

    Attributes:
      chosen_LXE: how often the router chose each expert; a plan's permutation does not change it.
      mass_LXE: probability of each expert in the softmax of the router's logits.
      entropy_LX: entropy of these probabilities in nats.
      margin_LX: rank of the last chosen expert minus the rank of the best expert that was allowed but not chosen.
      top_margin_LX: highest rank minus the second highest, of the experts that were allowed.
      top_weight_LX: largest weight of a token.
      z_LX: logsumexp of the logits, squared.
      tokens_LX: tokens.
    """

    chosen_LXE: Leaf
    mass_LXE: Leaf
    entropy_LX: Leaf
    margin_LX: Leaf
    top_margin_LX: Leaf
    top_weight_LX: Leaf
    z_LX: Leaf
    tokens_LX: Leaf


def sums_of(decision: Decision, group_BT: Int[Array, "B T"], groups: int) -> RouterSums:
    """Sums of one layer, without L. Tokens whose `group_BT` is outside of [0, groups) are not summed."""
    routing, logits_BTE = decision.routing, decision.routing.logits_LBTE
    assert logits_BTE is not None  # a decision always has logits
    experts = logits_BTE.shape[-1]
    chosen_BTE = jnp.zeros(logits_BTE.shape, bool)
    for k in range(decision.chosen_BTK.shape[-1]):  # a token chooses an expert at most once
        chosen_BTE = chosen_BTE | (decision.chosen_BTK[..., k, None] == jnp.arange(experts)[None, None])
    log_mass_BTE = jax.nn.log_softmax(logits_BTE, axis=-1)
    mass_BTE, z_BT = jnp.exp(log_mass_BTE), jax.nn.logsumexp(logits_BTE, axis=-1) ** 2
    per_token = {
        "entropy_LX": lax.stop_gradient(-jnp.sum(mass_BTE * log_mass_BTE, axis=-1)),
        "margin_LX": lax.stop_gradient(margins(decision.ranks_BTE, chosen_BTE)),
        "top_margin_LX": lax.stop_gradient(top_margins(decision.ranks_BTE)),
        "top_weight_LX": lax.stop_gradient(jnp.max(routing.weights_LBTK, axis=-1)),
        "z_LX": z_BT,
        "tokens_LX": jnp.ones(z_BT.shape, jnp.float32),
    }
    columns_BTC = jnp.concatenate(
        [chosen_BTE.astype(jnp.float32), mass_BTE, jnp.stack(list(per_token.values()), axis=-1)], axis=-1
    )
    sums_XC = sum_by_group(columns_BTC, group_BT, groups)
    singles = dict(zip(per_token, jnp.moveaxis(sums_XC[:, 2 * experts :], -1, 0), strict=True))
    return RouterSums(sums_XC[:, :experts], sums_XC[:, experts : 2 * experts], **singles)


def sum_by_group(x_BTC: Float[Array, "B T C"], group_BT: Int[Array, "B T"], groups: int) -> Float[Array, "X C"]:
    member_BTX = (group_BT[..., None] == jnp.arange(groups)[None, None]).astype(jnp.float32)
    return jnp.einsum("btx,btc->xc", member_BTX, x_BTC, precision=lax.Precision.HIGHEST)


def margins(ranks_BTE: jax.Array, chosen_BTE: jax.Array) -> jax.Array:
    """The margin of each token, [B, T]; 0 if no allowed expert was left, or if a banned one was forced."""
    last_BT = jnp.min(jnp.where(chosen_BTE, ranks_BTE, jnp.inf), axis=-1)
    refused_BT = jnp.max(jnp.where(chosen_BTE, -jnp.inf, ranks_BTE), axis=-1)
    return jnp.where(jnp.isfinite(last_BT) & jnp.isfinite(refused_BT), last_BT - refused_BT, 0.0)


def top_margins(ranks_BTE: jax.Array) -> jax.Array:
    """Highest rank of each token minus its second highest, [B, T]; 0 if fewer than two experts were allowed."""
    best_BTE = jnp.argmax(ranks_BTE, axis=-1)[..., None] == jnp.arange(ranks_BTE.shape[-1])[None, None]
    first_BT = jnp.max(ranks_BTE, axis=-1)
    second_BT = jnp.max(jnp.where(best_BTE, -jnp.inf, ranks_BTE), axis=-1)
    return jnp.where(jnp.isfinite(first_BT) & jnp.isfinite(second_BT), first_BT - second_BT, 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """Sums over layers for the load-balancing loss, for all tokens [E] or for each group [X, E].

    Attributes:
      chosen_E: how often each expert was chosen, without gradient.
      mass_E: summed probability of each expert.
      tokens: token-layer pairs.
    """

    chosen_E: Leaf
    mass_E: Leaf
    tokens: Leaf


def load_of(sums: RouterSums, by_group: bool = False) -> Load:
    """Sums over layers, and over groups unless `by_group`."""
    axes = (0,) if by_group else (0, 1)
    return Load(
        lax.stop_gradient(jnp.sum(sums.chosen_LXE, axis=axes)),
        jnp.sum(sums.mass_LXE, axis=axes),
        jnp.sum(sums.tokens_LX, axis=axes),
    )


def balance(chosen_E: jax.Array, mass_E: jax.Array, tokens: jax.Array) -> jax.Array:
    """E * sum_e (share of choices) * (share of probability), over the last axis (arXiv 2101.03961, eq. 4).

    Under balanced load it is top_k.
    """
    tokens = jnp.maximum(tokens, 1)[..., None]
    return chosen_E.shape[-1] * jnp.sum((chosen_E / tokens) * (mass_E / tokens), axis=-1)


AuxScope = Literal["sequence", "micro_batch", "global"]


def load_balancing_loss(
    sums: RouterSums, scope: AuxScope = "micro_batch", total: Load | None = None
) -> Float[Array, ""]:
    """Load-balancing loss. It is not linear in the batch, so it depends on the scope.

    Args:
      scope: "micro_batch" sums over all layers and tokens first, as Hugging Face does. "sequence" averages the losses
        of the groups, which must be rows, and skips groups without tokens. "global" uses the choices and the number of
        tokens in `total`, the load of the whole optimiser step; the sum over micro-batches is then the step's loss.

    Raises:
      ValueError: scope "global" without `total`, or an unknown scope.
    """
    if scope == "global":
        if total is None:
            raise ValueError('Scope "global" needs the load of the whole optimiser step in `total`.')
        return balance(total.chosen_E, load_of(sums).mass_E, total.tokens)
    if scope == "sequence":
        load = load_of(sums, by_group=True)
        present_X = (load.tokens > 0).astype(jnp.float32)
        losses_X = balance(load.chosen_E, load.mass_E, load.tokens)
        return jnp.sum(losses_X * present_X) / jnp.maximum(jnp.sum(present_X), 1)
    if scope == "micro_batch":
        load = load_of(sums)
        return balance(load.chosen_E, load.mass_E, load.tokens)
    raise ValueError(f'Unknown aux-loss scope {scope!r}; choose "sequence", "micro_batch" or "global".')


def router_z_loss(sums: RouterSums) -> Float[Array, ""]:
    """Mean over layers and tokens of logsumexp(logits) squared (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return jnp.sum(sums.z_LX) / jnp.maximum(jnp.sum(sums.tokens_LX), 1)
