"""Interventions in training: the routing plan of each step, from the records in the step's rows."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bimedix_jax.data.encoding import FIRST, ROLES
from bimedix_jax.data.pack import Row
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.inference.planning import UNKNOWN, Source, Tokens
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.routing.interventions import Interventions
from bimedix_jax.routing.rules import training_rules
from bimedix_jax.sharding.layout import Layout
from bimedix_jax.training.prepare import replicated_plan
from bimedix_jax.training.rows import Rows


def rules_of_run(experiment: Experiment, plan: RoutingPlan | None) -> Interventions | None:
    """The rules that the experiment names; None without.

    Raises:
      BimedixError: the file is not a list of rules, a rule needs another pass of a model, or there is a plan as well.
    """
    if experiment.intervene is None:
        return None
    if plan is not None:
        raise BimedixError("The run has a routing plan and the experiment has intervene; give one of them.")
    return Interventions(training_rules(experiment.intervene), sparse=True)


@dataclasses.dataclass(frozen=True)
class StepPlans:
    """The routing plan of each step.

    Attributes:
      fixed: that of all steps, replicated over the mesh; None if there is none, or if rules depend on the tokens.
      rules: rules that depend on the tokens; None without.
    """

    fixed: RoutingPlan | None
    rules: Interventions | None
    config: MixtralConfig
    rows: Rows
    layout: Layout | None

    @classmethod
    def of_run(
        cls,
        plan: RoutingPlan | None,
        rules: Interventions | None,
        config: MixtralConfig,
        rows: Rows,
        layout: Layout | None,
    ) -> "StepPlans":
        if rules is not None and not rules.by_token:
            plan, rules = rules.planner(config, []).same_for_all, None
        return cls(replicated_plan(plan, layout), rules, config, rows, layout)

    @property
    def free(self) -> bool:
        """Whether the routers follow no plan."""
        return self.fixed is None and self.rules is None

    def of_step(self, step: int) -> RoutingPlan | None:
        """The plan of a step, counted from 0. Every process makes it for all rows of the step."""
        return self.fixed if self.rules is None else self.of_rows(self.rows.whole(step))

    def of_rows(self, rows: Sequence[Row]) -> RoutingPlan | None:
        """The plan of a batch of packed rows."""
        if self.rules is None:
            return self.fixed
        tokens, sources = tokens_of_rows(rows)
        return replicated_plan(self.rules.planner(self.config, sources).plan(tokens, {}).plan, self.layout)


def tokens_of_rows(rows: Sequence[Row]) -> tuple[Tokens, list[Source]]:
    """The tokens of packed rows, and what is known of each conversation in them. Only answers have a known role."""
    tokens_BT = np.stack([row.tokens for row in rows])
    items_BT, positions_BT = np.zeros(tokens_BT.shape, np.int32), np.full(tokens_BT.shape, -1, np.int32)
    sources: list[Source] = []
    for number, row in enumerate(rows):
        for segment in row.segments:
            own_T = row.segment_ids == segment.segment
            items_BT[number, own_T], positions_BT[number, own_T] = len(sources), np.arange(own_T.sum())
            roles = np.where(row.loss_mask[own_T], ROLES.index("answer"), UNKNOWN).astype(np.uint8)
            roles[:FIRST] = ROLES.index("first")
            fields = {"source": segment.source or None}
            language, kind = segment.language or None, segment.kind or None
            sources.append(Source(segment.id, language, kind, roles, fields, "packed rows"))
    return Tokens(tokens_BT, items_BT, positions_BT), sources
