"""From the results of runs to what a report says: contrasts, differences, curves. Nothing here depends on time."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from bimedix_jax.errors import listed
from bimedix_jax.evals.statistics import holm
from bimedix_jax.sweeps.results import Result, by_group
from bimedix_jax.sweeps.statistics import Difference, Errors, paired, sign_flip, standard_errors
from bimedix_jax.sweeps.study import EVALUATED, FEWEST_SEEDS


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The paired difference of a metric between an arm and the baseline, over the seeds that both finished."""

    arm: str
    metric: str
    difference: Difference
    value: float
    baseline: float


@dataclasses.dataclass(frozen=True)
class Primary:
    """The declared contrast and its result; without a seed that both arms finished, `comparison` is None.

    Attributes:
      p: two-sided, exact. p_holm: adjusted over the primaries of all studies in the report.
      errors: standard errors by source; None for a metric that has no records.
    """

    metric: str
    arm: str
    baseline: str
    sign: int
    comparison: Comparison | None
    p: float | None
    errors: Errors | None
    p_holm: float | None = None
    declarations: Sequence[Mapping[str, Any]] = ()
    """Of study.json, oldest first; the last one is this contrast."""

    @property
    def declared_beforehand(self) -> bool:
        """Whether the contrast is the same as before the first step of a run."""
        return all(one["primary"] == self.declarations[-1]["primary"] for one in self.declarations)

    def changes(self) -> list[str]:
        """A sentence for each change that was made after runs had begun, and one for seeds that were not declared."""
        found = []
        for before, now in pairwise(self.declarations):
            begun = f"after {now['begun']} run{'s' if now['begun'] > 1 else ''} had begun"
            if before["primary"] != now["primary"]:
                found.append(f"The contrast was changed {begun}; before, it was {named(before['primary'])}")
            if before["seeds"] != now["seeds"]:
                found.append(
                    f"The declared seeds were changed {begun}, from {listed([str(x) for x in before['seeds']])} to "
                    f"{listed([str(x) for x in now['seeds']])}"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON: flat, with null for what is not known."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("metric", "arm", "baseline", "sign")}
        difference = self.comparison.difference if self.comparison else None
        found |= {"seeds": 0, "difference": None, "interval": None, "as_expected": None}
        if difference is not None:
            interval = None if difference.low is None else [difference.low, difference.high]
            found |= {"seeds": difference.seeds, "difference": difference.mean, "interval": interval}
            found["as_expected"] = math.copysign(1, difference.mean) == self.sign and difference.mean != 0
        errors = None if self.errors is None else dataclasses.asdict(self.errors)
        found |= {"declared_beforehand": self.declared_beforehand, "changes": self.changes()}
        return {**found, "p": self.p, "p_holm": self.p_holm, "standard_errors": errors, "note": self.note()}

    def note(self) -> str | None:
        """What the reader must know about p."""
        seeds = self.comparison.difference.seeds if self.comparison else 0
        if seeds >= FEWEST_SEEDS:
            return None
        least = 2.0 ** (1 - seeds) if seeds > 1 else 1.0
        return f"The smallest p of {plural(seeds)} is {least:.3g}; {FEWEST_SEEDS} seeds are the least that reach 0.05"


@dataclasses.dataclass(frozen=True)
class StudyTable:
    """All figures of one study."""

    study: str
    size: str
    question: str
    arms: list[str]
    metrics: list[str]
    primary: Primary
    values: dict[str, dict[str, tuple[float, int]]]
    """Metric -> arm -> (mean over seeds, number of seeds)."""
    comparisons: dict[str, list[Comparison]]
    """Metric -> the comparison of each arm but the baseline."""
    results: list[Result]

    def of(self, arm: str) -> list[Result]:
        """The finished runs of an arm."""
        return [result for result in self.results if result.arm == arm and result.state == "finished"]

    @property
    def missing(self) -> list[Result]:
        """The runs that are not finished."""
        return [result for result in self.results if result.state != "finished"]


def named(contrast: Mapping[str, Any]) -> str:
    """A declared contrast in words."""
    expected = "lower" if contrast["sign"] < 0 else "higher"
    return f"{contrast['metric']} of {contrast['arm']} minus {contrast['baseline']}, expected {expected}"


def plural(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def tabulate(study: Mapping[str, Any], results: Sequence[Result]) -> StudyTable:
    """The figures of a study from study.json and its runs."""
    ordered = sorted(results, key=lambda result: (study["arms"].index(result.arm), result.seed))
    finished = [result for result in ordered if result.state == "finished"]
    metrics = list(dict.fromkeys(name for result in finished for name in result.metrics))
    baseline = study["primary"]["baseline"]
    arms = [arm for arm in study["arms"] if any(result.arm == arm for result in results)]
    values = {
        metric: {
            arm: (math.fsum(found) / len(found), len(found))
            for arm in arms
            if (found := [r.metrics[metric] for r in finished if r.arm == arm and metric in r.metrics])
        }
        for metric in metrics
    }
    others = [arm for arm in arms if arm != baseline]
    comparisons = {
        metric: [found for arm in others if (found := compare(finished, metric, arm, baseline)) is not None]
        for metric in metrics
    }
    primary = primary_of(study["primary"], finished)
    primary = dataclasses.replace(primary, declarations=study.get("declarations", ()))
    return StudyTable(
        study["study"],
        study["size"],
        study["question"],
        arms,
        metrics,
        primary,
        values,
        comparisons,
        ordered,
    )


def pairs(finished: Sequence[Result], arm: str, baseline: str) -> list[tuple[Result, Result]]:
    """The runs of two arms with the same seed."""
    own, other = ({r.seed: r for r in finished if r.arm == name} for name in (arm, baseline))
    return [(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())]


def compare(finished: Sequence[Result], metric: str, arm: str, baseline: str) -> Comparison | None:
    found = [
        (one.metrics[metric], other.metrics[metric])
        for one, other in pairs(finished, arm, baseline)
        if metric in one.metrics and metric in other.metrics
    ]
    if not found:
        return None
    differences = [one - other for one, other in found]
    value, base = (math.fsum(column) / len(found) for column in zip(*found, strict=True))
    return Comparison(arm, metric, paired(differences), value, base)


def primary_of(declared: Mapping[str, Any], finished: Sequence[Result]) -> Primary:
    metric, arm, baseline, sign = (declared[name] for name in ("metric", "arm", "baseline", "sign"))
    comparison = compare(finished, metric, arm, baseline)
    if comparison is None:
        return Primary(metric, arm, baseline, sign, None, None, None)
    both = pairs(finished, arm, baseline)
    differences = [one.metrics[metric] - other.metrics[metric] for one, other in both]
    return Primary(metric, arm, baseline, sign, comparison, sign_flip(differences), errors_of(metric, both))


def errors_of(metric: str, both: Sequence[tuple[Result, Result]]) -> Errors | None:
    """Standard errors of the difference by source; None where the records are not the same in all runs."""
    name, _, group = metric.partition("/")
    if name not in EVALUATED:
        return None
    unit, scale = ("tokens", 1.0) if name == "nats_per_token" else ("bytes", 1 / math.log(2))
    rows, weights = [], None
    for one, other in both:
        chosen = [
            (mine, theirs)
            for mine, theirs in zip(one.records, other.records, strict=False)
            if not group or group in by_group([mine])
        ]
        if not chosen or any(mine["id"] != theirs["id"] for mine, theirs in chosen):
            return None
        rows.append([scale * (mine["nats"] - theirs["nats"]) for mine, theirs in chosen])
        own = [mine[unit] for mine, _ in chosen]
        if weights is not None and own != weights:
            return None
        weights = own
    found = standard_errors(np.asarray(rows), np.asarray(weights, float))
    return None if math.isnan(found.both) else found


def adjusted(tables: Sequence[StudyTable]) -> list[StudyTable]:
    """The tables with Holm's p over the primaries of one size. Those of other sizes are other experiments."""
    found = list(tables)
    for size in {table.size for table in tables}:
        places = [i for i, table in enumerate(tables) if table.size == size and table.primary.p is not None]
        values = holm([p for i in places if (p := tables[i].primary.p) is not None])
        for place, value in zip(places, values, strict=True):
            primary = dataclasses.replace(found[place].primary, p_holm=value)
            found[place] = dataclasses.replace(found[place], primary=primary)
    return found
