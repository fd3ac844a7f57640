"""Routers in a training step: groups of tokens for their sums, their metrics, and plans for micro-batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bimedix_jax.experiment import RouterTraining
from bimedix_jax.models.router_sums import RouterSums
from bimedix_jax.models.routers import RoutingPlan

Batch = dict[str, jax.Array]
"""tokens_BT and segment_ids_BT int32, loss_mask_BT bool, and language_BT int32 if languages are reported. The batch of
a step has a leading axis A of micro-batches."""


def share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, and 0 for 0 / 0, since the last step of an epoch may have no target."""
    return part / jnp.maximum(whole, 1.0)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """The groups of tokens over which the routers' sums are taken: by row, by language, by both, or one group.

    Attributes:
      by_row: whether each row is a group, as aux_scope "sequence" needs.
      languages: number of languages, each with a group, besides one group for all others; 0 does not group by language.
    """

    by_row: bool
    languages: int

    @classmethod
    def of(cls, router: RouterTraining) -> "Grouping":
        return cls(router.aux_scope == "sequence", len(router.languages))

    @property
    def parts(self) -> int:
        """Groups in a row."""
        return self.languages + 1 if self.languages else 1

    def rows(self, micro: Batch) -> int:
        return micro["tokens_BT"].shape[0] if self.by_row else 1

    def arguments(self, micro: Batch) -> dict[str, Any]:
        """The arguments `groups` and `group_BT` of the model."""
        rows_B = jnp.arange(micro["tokens_BT"].shape[0]) * self.parts if self.by_row else jnp.zeros(1, jnp.int32)
        group_BT = jnp.broadcast_to(rows_B[:, None], micro["tokens_BT"].shape)
        if self.languages:
            group_BT = group_BT + micro["language_BT"]
        return {"groups": self.rows(micro) * self.parts, "group_BT": group_BT}

    def each_row(self, sums: RouterSums, micro: Batch) -> RouterSums:
        """Sums of each row over its languages. Unless `by_row`, these are the sums of all rows."""
        return self._pool(sums, micro, 2)

    def each_language(self, sums: RouterSums, micro: Batch) -> RouterSums:
        """Sums of each language over all rows."""
        return self._pool(sums, micro, 1)

    def _pool(self, sums: RouterSums, micro: Batch, axis: int) -> RouterSums:
        shape = (self.rows(micro), self.parts)
        return jax.tree.map(lambda x: jnp.sum(x.reshape(x.shape[0], *shape, *x.shape[2:]), axis=axis), sums)


def load_spread(chosen_LE: jax.Array) -> dict[str, jax.Array]:
    """Balance of each layer's load: its entropy over the maximum (1 is balanced), and the largest expert's share."""
    shares_LE = chosen_LE / jnp.maximum(jnp.sum(chosen_LE, axis=-1, keepdims=True), 1.0)
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(shares_LE, shares_LE), axis=-1)
    most = jnp.log(float(max(chosen_LE.shape[-1], 2)))
    return {"load_entropy": entropy_L / most, "load_max_share": jnp.max(shares_LE, axis=-1)}


def router_metrics(sums: RouterSums, languages: Sequence[str]) -> dict[str, Any]:
    """Load, entropy and margin of each layer over all tokens, and for each language under `by_language`."""
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
