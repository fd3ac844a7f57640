"""The ladder of claims for "routes depend on X": a level is reached only on top of those before.

    association   the routes differ between the groups if labels are permuted: in load, or within token ids
    token         the same token id is routed differently (not identified without enough shared ids)
    geometry      the groups are further apart than random routers on the same hidden states would bring them
    learned       the difference grew since the base model's recording of the same records
    functional    a knock-out of the expert costs one group more than the other

The divergence gate stands between geometry and learned: as long as the experts have not been shown to differ, it does
not matter to whom a token goes, and neither routes are called learned or functional, nor experts specialised.
"""

import dataclasses

import numpy as np

from bimedix_jax.routing.claims import LEVELS, Gate, Refusal, highest
from bimedix_jax.routing.clusters import MIN_CLUSTERS, Comparison, generator
from bimedix_jax.routing.contrasts import Contrast, joined_units
from bimedix_jax.routing.evidence import LEAST_ROUTERS, Geometry, TokenEvidence
from bimedix_jax.routing.intervals import mean_intervals
from bimedix_jax.routing.stats import Test
from bimedix_jax.routing.tables import Tables

LOAD_WEIGHT = 0.9
"""Share of the error rate of "association" for differences in load; the rest is for those within token ids.

A balanced router has equal loads whatever its routes depend on, so a difference within token ids must be able to carry
a claim alone. Weighted Bonferroni keeps the error rate of the two together.
"""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """All tests of one contrast, p-values of which are adjusted for its cells, not yet for the number of questions."""

    contrast: Contrast
    load: Test
    token: TokenEvidence | None
    geometry: Geometry | None
    learned: Test | None
    interactions: dict[tuple[int, int], tuple[float, float]] | None

    @property
    def association(self) -> np.ndarray:
        """[X]: p-values of "the routes do not depend on the group", by load and within token ids."""
        if self.token is None or self.token.p_X is None:
            return self.load.p_X
        return np.minimum(np.minimum(self.load.p_X / LOAD_WEIGHT, self.token.p_X / (1 - LOAD_WEIGHT)), 1.0)

    @property
    def load_alpha(self) -> float:
        """The factor by which the test of loads uses the error rate."""
        return 1.0 if self.token is None or self.token.p_X is None else LOAD_WEIGHT


def divergence_gate(tables: Tables, seed: int) -> Gate | None:
    """What shuffled routes cost; None if that was not measured."""
    if tables.nll_R is None or tables.shuffled_nll_R is None:
        return None
    cost_R = np.asarray(tables.shuffled_nll_R, np.float64) - tables.nll_R
    return gate_of(cost_R, tables.tokens_R, tables.cluster_R, tables.pair_R, tables.nll_floor, seed)


def gate_of(
    cost_R: np.ndarray,
    tokens_R: np.ndarray,
    cluster_R: np.ndarray | None,
    pair_R: np.ndarray | None,
    floor: float,
    seed: int,
) -> Gate:
    """The gate from each record's cost of shuffled routes, in nats per token; arrays as in `Tables`."""
    unit_R = np.unique(joined_units(cluster_R, pair_R, np.ones(len(cost_R), bool)), return_inverse=True)[1]
    weight_R = np.asarray(tokens_R, np.float64)
    cost_U = np.bincount(unit_R, cost_R * weight_R) / np.bincount(unit_R, weight_R)
    mean, low, high = (float(x) for x in mean_intervals(cost_U[:, None], generator(seed, "gate"))[0])
    if np.isnan(low):
        return Gate(delta_nll=mean, low=None, high=None, floor=floor, diverged=None)
    return Gate(delta_nll=mean, low=low, high=high, floor=floor, diverged=low > floor)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rungs:
    """p-values [X] by rung, adjusted for cells and questions; None where a rung was not tested."""

    association: np.ndarray
    token: np.ndarray | None
    geometry: np.ndarray | None
    learned: np.ndarray | None


def levels(
    evidence: Evidence, rungs: Rungs, gate: Gate | None, cells: list[tuple[int, int]], alpha: float
) -> list[str]:
    """The level of each cell."""
    count = len(cells)
    never_X = np.zeros(count, bool)
    passed = [rungs.association < alpha]
    passed.append(never_X if rungs.token is None else (rungs.token < alpha) & ~contradicted(evidence, alpha))
    passed.append(never_X if rungs.geometry is None else rungs.geometry < alpha)
    diverged = gate is not None and gate.diverged is True
    if rungs.learned is None or evidence.learned is None or not diverged:
        passed.append(never_X)
    else:
        grew_X = evidence.learned.estimate_X * evidence.load.estimate_X > 0
        passed.append((rungs.learned < alpha) & grew_X)
    known = evidence.interactions or {}
    passed.append(np.array([known.get(cell, (0.0, 1.0))[1] < alpha for cell in cells]))
    height_X = np.logical_and.accumulate(np.array(passed), axis=0).sum(0)
    return [LEVELS[height] for height in height_X]


def contradicted(evidence: Evidence, alpha: float) -> np.ndarray:
    """[X]: whether the same id on both sides of translated pairs differs in the opposite direction."""
    token = evidence.token
    if token is None or token.same_id is None:
        return np.zeros(len(evidence.load.p_X), bool)
    return (token.same_id.p_X < alpha) & (token.same_id.estimate_X * token.within_X < 0)


def refusals(evidence: Evidence, tables: Tables, gate: Gate | None, found: list[str]) -> list[Refusal]:
    """Which rungs were not tested and why, and what must not be concluded."""
    name, token = evidence.contrast.name, evidence.token
    refused = []

    def refuse(claim: str, why: str) -> None:
        refused.append(Refusal(claim=f"routes depend on {name}: {claim}", why=why))

    if token is None:
        refuse("beyond token identity", "not tested: the recording has no token ids")
    elif token.why_not is not None:
        refuse("beyond token identity", token.why_not)
    if evidence.geometry is None:
        routers = 0 if tables.random_RMLE is None else tables.random_RMLE.shape[1]
        given = f"{routers} random routers read the same hidden states" if routers else "no random router was recorded"
        refuse("beyond geometry", f"not tested: {given}; record with --random-routers {LEAST_ROUTERS} or more")
    reason, undecided = gate_reason(gate), why_undecided(evidence, found)
    if evidence.learned is None:
        refuse("learned in fine-tuning", "not tested: there is no recording of the base model on the same records")
    elif undecided is not None:
        refuse("learned in fine-tuning", undecided)
    if evidence.interactions is None:
        refuse("functional", "not tested: there is no knock-out of experts for this field")
    elif undecided is not None or evidence.learned is None:
        refuse("functional", undecided or "not tested, because it needs the level learned, which was not tested")
    if reason is not None:
        refuse("learned, functional, or that experts differ in what they do", reason)
    if "none" in found:
        refuse(
            "no dependence where none was found",
            "what is not significant is not resolved, and balanced loads are alike whatever the routes depend on",
        )
    if token is not None and token.why_not is None and token.same_id_why_not is not None:
        refuse("beyond token identity, the same id on both sides of a pair", token.same_id_why_not)
    return refused


def why_undecided(evidence: Evidence, found: list[str]) -> str | None:
    """Why no baseline and no knock-out can raise a claim beyond "geometry"; None if they can."""
    tested = {"token": evidence.token is not None and evidence.token.p_X is not None}
    tested |= {"geometry": evidence.geometry is not None}
    for level, known in tested.items():
        if not known:
            return f"not tested, because it needs the level {level}, which was not tested"
    reached = LEVELS.index(highest(found)) >= LEVELS.index("geometry")
    return None if reached else "not tested, because it needs the level geometry, which no expert reaches"


def gate_reason(gate: Gate | None) -> str | None:
    """Why claims end at "geometry"; None if they do not."""
    if gate is None:
        return "not tested: the cost of shuffled routes was not recorded (--gate), so experts may be equal"
    if gate.diverged is None:
        return f"not tested: the cost of shuffled routes has no interval below {MIN_CLUSTERS} clusters"
    if not gate.diverged:
        return (
            f"the divergence gate fails: giving tokens the routes of others costs {gate.delta_nll:.3g} nats a token, "
            f"with a lower end of {gate.low:.3g} that is not above the noise of {gate.floor:.3g}"
        )
    return None


def token_weighted(contrast: Contrast, counts_RLE: np.ndarray) -> np.ndarray:
    """[L, E]: difference of the groups' loads if every token counts once."""
    lead, trail = (part.sum(0) for part in contrast.sums(counts_RLE))
    return lead / lead.sum(-1, keepdims=True) - trail / trail.sum(-1, keepdims=True)


def plain_difference(comparison: Comparison) -> np.ndarray:
    """[X]: the difference without any test, where there are too few clusters for one."""
    parts = comparison.values_CX, comparison.first_C
    if parts[1] is None:
        return parts[0].mean(0)
    return parts[0][parts[1]].mean(0) - parts[0][~parts[1]].mean(0)
