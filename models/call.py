"""Operands and results of a call of the model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from bimedix_jax.kernels.pytree import Leaf
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.config import Remat
from bimedix_jax.models.router_sums import RouterSums, load_balancing_loss, router_z_loss
from bimedix_jax.models.routers import Record, Recorded, Routing, RoutingPlan

Observe = Callable[..., Any]
"""(moe, x_BTD, decision, group_BT, operand, before_BTD) -> a pytree of arrays that begin with B.

What to keep of a layer, given its mixture of experts, the states that its router reads, what the router decided, the
group of each token, -1 at padding, its layer of the operands, and the states before the layer. It is static: equal ones
share a compiled program.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Start:
    """Where a call begins, if not with the first layer.

    Attributes:
      layer: int32 scalar, the first layer that runs; another one does not recompile.
      before_BTD: the states before it, which an earlier call observed.
    """

    layer: Leaf
    before_BTD: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """Operands of one call of the model.

    Attributes:
      plan: what the routers are told to do.
      cache: keys and values of earlier tokens.
      group_BT: int32 group of each token in the routers' sums; tokens outside of [0, groups) are not summed.
      operands: a pytree of arrays that begin with L, for `observe`.
      remat: what the backward pass recomputes.
      record: how much of each token's routing is returned.
      groups: number of groups; 0 means no sums.
      observe: what else is kept of every layer; None means nothing.
      ancestor_ids_BTA: the segments that each token's own one continues; None means none.
      start: the layer to begin with; None means the first one. Nothing is recorded then.
    """

    tokens_BT: Leaf
    segment_ids_BT: Leaf
    plan: RoutingPlan
    cache: KVCache | None
    group_BT: Leaf | None
    remat: Remat = dataclasses.field(metadata={"static": True})
    record: Record = dataclasses.field(metadata={"static": True})
    groups: int = dataclasses.field(metadata={"static": True})
    operands: Any = None
    observe: Observe | None = dataclasses.field(default=None, metadata={"static": True})
    start: Start | None = None
    ancestor_ids_BTA: Leaf | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Results of one call of the model.

    Attributes:
      hidden_BTD: states after the final norm, in the compute dtype.
      logits_BTV: float32. None from `Mixtral.hidden`; the type omits this, so that other callers need no check.
      routing: what every router did, as far as it was recorded; None with record "none".
      sums: the routers' sums over tokens; None with groups 0.
      cache: the updated cache, if one was given.
      observed: what `observe` returned for each layer, stacked on a leading axis; None without one.
    """

    hidden_BTD: Leaf
    logits_BTV: Leaf
    routing: Recorded
    sums: RouterSums | None
    cache: KVCache | None
    observed: Any = None

    @property
    def aux_loss(self) -> jax.Array:
        """Hugging Face's load-balancing loss of this batch, unscaled and without padding; needs `groups`."""
        return load_balancing_loss(self._sums())

    @property
    def z_loss(self) -> jax.Array:
        """Router z-loss of this batch, unscaled and without padding; needs `groups`."""
        return router_z_loss(self._sums())

    def _sums(self) -> RouterSums:
        if self.sums is None:
            raise ValueError("This call computed no sums over tokens; pass groups=1.")
        return self.sums


def recorded(routing: Routing, record: Record) -> Recorded:
    """The part of a router's record that `record` selects."""
    none: Any = None
    if record == "none":
        return none
    return routing if record == "full" else dataclasses.replace(routing, logits_LBTE=none)
