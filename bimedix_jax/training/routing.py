"""Routers in a step: groups of tokens for their sums, what is reported of them, and plans for micro-batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bimedix_jax.experiment import RouterTraining
from bimedix_jax.models.router_sums import RouterSums
from bimedix_jax.models.routers import RoutingPlan

Batch = dict[str, jax.Array]
"""tokens_BT, segment_ids_BT int32 and loss_mask_BT bool, and language_BT int32 where languages are distinguished;
those of a step have a leading axis A of micro-batches."""


def share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, and 0 for 0 / 0: a step may hold no target, as the last one of an epoch."""
    return part / jnp.maximum(whole, 1.0)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How tokens are divided for the routers' sums: by row where the aux loss needs it, and by language on request.

    Attributes:
      by_row: whether each row is a group.
      languages: number of languages that are groups, beside one group for all others; 0 for no such groups.
    """

    by_row: bool
    languages: int

    @classmethod
    def of(cls, router: RouterTraining) -> "Grouping":
        return cls(router.aux_scope == "sequence", len(router.languages))

    @property
    def parts(self) -> int:
        """Groups of a row."""
        return self.languages + 1 if self.languages else 1

    def rows(self, micro: Batch) -> int:
        return micro["tokens_BT"].shape[0] if self.by_row else 1

    def ask(self, micro: Batch) -> dict[str, Any]:
        """Arguments `groups` and `group_BT` of the model."""
        rows_B = jnp.arange(micro["tokens_BT"].shape[0]) * self.parts if self.by_row else jnp.zeros(1, jnp.int32)
        group_BT = jnp.broadcast_to(rows_B[:, None], micro["tokens_BT"].shape)
        if self.languages:
            group_BT = group_BT + micro["language_BT"]
        return {"groups": self.rows(micro) * self.parts, "group_BT": group_BT}

    def each_row(self, sums: RouterSums, micro: Batch) -> RouterSums:
        """Sums over languages, by row (over all rows as well, unless each is a group)."""
        return self._pool(sums, micro, 2)

    def each_language(self, sums: RouterSums, micro: Batch) -> RouterSums:
        """Sums over rows, by language."""
        return self._pool(sums, micro, 1)

    def _pool(self, sums: RouterSums, micro: Batch, axis: int) -> RouterSums:
        shape = (self.rows(micro), self.parts)
        return jax.tree.map(lambda x: jnp.sum(x.reshape(x.shape[0], *shape, *x.shape[2:]), axis=axis), sums)


def load_spread(chosen_LE: jax.Array) -> dict[str, jax.Array]:
    """How evenly each layer's experts are used: entropy over its maximum (1 is even), and the largest share."""
    shares_LE = chosen_LE / jnp.maximum(jnp.sum(chosen_LE, axis=-1, keepdims=True), 1.0)
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(shares_LE, shares_LE), axis=-1)
    most = jnp.log(float(max(chosen_LE.shape[-1], 2)))
    return {"load_entropy": entropy_L / most, "load_max_share": jnp.max(shares_LE, axis=-1)}


def router_metrics(sums: RouterSums, languages: Sequence[str]) -> dict[str, Any]:
    """Load, entropy and margin by layer over all tokens, and under `by_language` for each language."""
    total = jax.tree.map(lambda x: jnp.sum(x, axis=1), sums)
    metrics: dict[str, Any] = load_spread(total.chosen_LXE)
    metrics |= {"router_entropy": share(total.entropy_LX, total.tokens_LX)}
    metrics |= {"router_margin": share(total.margin_LX, total.tokens_LX)}
    if languages:
        metrics["by_language"] = {}
    for x, language in enumerate(languages):
        own = jax.tree.map(lambda leaf, x=x: leaf[:, x], sums)
        means = {name: share(getattr(own, f"{name}_LX"), own.tokens_LX) for name in ("entropy", "margin", "z")}
        load = share(own.chosen_LXE, jnp.sum(own.chosen_LXE, axis=-1, keepdims=True))
        metrics["by_language"][language] = {"tokens": own.tokens_LX[0], "load": load, **means}
    return metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartedPlan:
    """A plan for the micro-batches of a step.

    Attributes:
      own_A: fields in which each row has its own values, [A, L, B, ...].
      shared: the other fields, [L, 1, ...].
    """

    own_A: RoutingPlan
    shared: RoutingPlan

    def of(self, own: RoutingPlan, number: jax.Array) -> RoutingPlan:
        """The plan of one micro-batch, given its fields out of `own_A` and its number."""
        fields = [field.name for field in dataclasses.fields(RoutingPlan)]
        shared = self.shared.fold_in(number)  # rows are numbered within a micro-batch, and each needs its own noise
        joined = {name: getattr(shared if getattr(own, name) is None else own, name) for name in fields}
        return RoutingPlan(**joined)


def parted(plan: RoutingPlan, parts: int, rows: int) -> PartedPlan:
    """A plan for `parts` micro-batches of `rows` rows.

    Raises:
      ValueError: a field has as many rows as neither 1 nor the step.
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
                f"RoutingPlan.{field.name} has {x.shape[1]} rows, a step has {parts * rows}; give 1 or as many."
            )
    return PartedPlan(RoutingPlan(**own), RoutingPlan(**shared))
