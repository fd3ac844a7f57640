"""Routers in a training step: groups of tokens for sums of routers and losses, and plans for micro-batches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bimedix_jax.experiment import RouterTraining
from bimedix_jax.models import shards
from bimedix_jax.models.axes import LENGTH
from bimedix_jax.models.router_sums import RouterSums, sum_by_group
from bimedix_jax.models.routers import RoutingPlan

Batch = dict[str, jax.Array]
"""tokens_BT and segment_ids_BT int32, loss_mask_BT bool, and group_BT int32 if groups are reported. The batch of a step
has a leading axis A of micro-batches."""


def share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, and 0 for 0 / 0, since the last step of an epoch may have no target."""
    return part / jnp.maximum(whole, 1.0)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """The groups of tokens over which the routers' sums are taken: by row, by language and kind, by both, or one group.

    Attributes:
      by_row: whether each row is a group, as aux_scope "sequence" needs.
      named: number of groups of language and kind, besides one group for all other tokens; 0 for one group.
    """

    by_row: bool
    named: int

    @classmethod
    def of(cls, router: RouterTraining, named: int = 0) -> "Grouping":
        return cls(router.aux_scope == "sequence", named)

    @property
    def parts(self) -> int:
        """Groups in a row."""
        return self.named + 1 if self.named else 1

    def rows(self, micro: Batch) -> int:
        return micro["tokens_BT"].shape[0] if self.by_row else 1

    def arguments(self, micro: Batch) -> dict[str, Any]:
        """The arguments `groups` and `group_BT` of the model."""
        rows_B = jnp.arange(micro["tokens_BT"].shape[0]) * self.parts if self.by_row else jnp.zeros(1, jnp.int32)
        group_BT = jnp.broadcast_to(rows_B[:, None], micro["tokens_BT"].shape)
        if self.named:
            group_BT = group_BT + micro["group_BT"]
        return {"groups": self.rows(micro) * self.parts, "group_BT": group_BT}

    def each_row(self, sums: RouterSums, micro: Batch) -> RouterSums:
        """Sums of each row over its groups. Unless `by_row`, these are the sums of all rows."""
        return self._pool(sums, micro, 2)

    def each_group(self, sums: RouterSums, micro: Batch) -> RouterSums:
        """Sums of each group of language and kind over all rows."""
        return self._pool(sums, micro, 1)

    def losses(self, nll_BT: jax.Array, learned_BT: jax.Array, micro: Batch) -> jax.Array:
        """(summed NLL, number of targets) of each group, [X, 2]; of this shard's part of the tokens."""
        group_BT = shards.own_part(LENGTH, micro["group_BT"], 1)
        columns_BTC = jnp.stack([nll_BT, learned_BT.astype(jnp.float32)], axis=-1)
        return sum_by_group(columns_BTC, group_BT, self.parts)

    def _pool(self, sums: RouterSums, micro: Batch, axis: int) -> RouterSums:
        shape = (self.rows(micro), self.parts)
        return jax.tree.map(lambda x: jnp.sum(x.reshape(x.shape[0], *shape, *x.shape[2:]), axis=axis), sums)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """A routing plan split into the micro-batches of a step.

    Attributes:
      own_A: the fields with values for each row, [A, L, B, ...].
      shared: the other fields, [L, 1, ...].
    """

    own_A: RoutingPlan
    shared: RoutingPlan

    def of(self, own: RoutingPlan, number: jax.Array) -> RoutingPlan:
        """The plan of one micro-batch, from its part of `own_A` and its number."""
        fields = [field.name for field in dataclasses.fields(RoutingPlan)]
        shared = self.shared.fold_in(number)  # row indices repeat in each micro-batch, but the noise must not
        joined = {name: getattr(shared if getattr(own, name) is None else own, name) for name in fields}
        return RoutingPlan(**joined)


def split_plan(plan: RoutingPlan, parts: int, rows: int) -> SplitPlan:
    """Splits a plan into `parts` micro-batches of `rows` rows.

    Raises:
      ValueError: the B of a field is neither 1 nor the rows of the step.
    """
    own, shared = {}, {}
    for field in dataclasses.fields(RoutingPlan):
        x = getattr(plan, field.name)
        if x is None or x.shape[1] == 1:
            shared[field.name] = x
        elif x.shape[1] == parts * rows:
            own[field.name] = jnp.moveaxis(x.reshape(x.shape[0], parts, rows, *x.shape[2:]), 1, 0)
        else:
            raise ValueError(
                f"RoutingPlan.{field.name} has {x.shape[1]} rows, a step has {parts * rows}; pass 1 or {parts * rows}."
            )
    return SplitPlan(RoutingPlan(**own), RoutingPlan(**shared))
