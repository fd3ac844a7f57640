"""What an analysis of routes says: questions with their cells and layers, claims with their level, and refusals.

These classes are `claims.json`: `Analysis.to_dict()` has its keys. What was not recorded or cannot be computed is None.
Layers and experts have the numbers of the recording.
"""

import dataclasses
import enum
import math
from typing import Any

import numpy as np

LEVELS = ("none", "association", "token", "geometry", "learned", "functional")
"""The ladder of "routes depend on X": each level presupposes those before."""


class Verdict(enum.StrEnum):
    """What the tests say about the difference of a cell."""

    DIFFERENT = "different"
    EQUIVALENT = "equivalent"
    """The simultaneous interval lies within the margin of equivalence. It is about the load only."""
    NOT_RESOLVED = "not resolved"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """The divergence gate: what it costs to give each token the set and weights of another token of its record.

    Attributes:
      delta_nll: nats per token, mean over clusters; exactly 0 where all experts are equal.
      low, high: its 95 % interval; None below 10 clusters.
      floor: differences up to here are numerical noise.
      diverged: `low > floor`; None if it cannot be told.
    """

    delta_nll: float
    low: float | None
    high: float | None
    floor: float
    diverged: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """The difference of an expert's load between two groups.

    In the question of answers.py it is a difference of squared distances, and there is no expert.

    Attributes:
      estimate: share of the layer's choices, first minus second group; every cluster counts once.
      low, high: 95 % interval (bootstrap-t over clusters), not adjusted for the number of cells.
      p_adjusted: of "the routes to this expert do not depend on the group", by load or within tokens; includes max-T
        over the cells and Holm over the questions.
      mde80: the difference in load that this test would detect with a probability of 80 %.
      token_weighted: the same difference if every token counts once.
      p_load, p_within: adjusted p-values of the two parts: difference in load, difference within token ids.
      token_mix, within_token, unshared: Kitagawa's split of the difference; the three add up to it.
      learned: change of the difference since the baseline; p_learned is its adjusted p-value.
      p_same_id: the same token id on both sides of a translated pair.
      interaction, p_interaction: of the knock-out of this expert.
    """

    layer: int
    expert: int | None
    estimate: float
    low: float | None
    high: float | None
    p_adjusted: float | None
    mde80: float | None
    verdict: Verdict | None
    token_weighted: float | None
    p_load: float | None
    p_within: float | None = None
    token_mix: float | None = None
    within_token: float | None = None
    unshared: float | None = None
    same_id: float | None = None
    p_same_id: float | None = None
    learned: float | None = None
    p_learned: float | None = None
    interaction: float | None = None
    p_interaction: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """How far the loads of two groups are apart in a layer.

    Attributes:
      jsd: Jensen-Shannon divergence of the groups' loads in nats (0 to log 2), less its bias: below 0 by chance.
      low, high: the 95 % interval of the same quantity, around it.
      geometry_percentile: 0 to 100, the share of random routers whose divergence is smaller; None if not tested.
      p_geometry: "the router separates the groups no more than a random one", adjusted over the layers.
      soft_jsd: the same divergence of the weights that the experts get; None if weights were not recorded.
      vocabulary_nats: by how much the token id predicts the experts of unseen clusters better than the loads do, in
        nats a choice. language_nats: by how much id and group predict better than the id.
    """

    layer: int
    jsd: float
    low: float | None
    high: float | None
    geometry_percentile: float | None = None
    p_geometry: float | None = None
    soft_jsd: float | None = None
    vocabulary_nats: float | None = None
    vocabulary_low: float | None = None
    vocabulary_high: float | None = None
    language_nats: float | None = None
    language_low: float | None = None
    language_high: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """ "Do the routes depend on this field?", for two groups.

    Attributes:
      name: the field, such as "language"; "kind=qa" if the group qa is compared with all others.
      groups: the names of the two groups; estimates are the first minus the second.
      unit: what counts once. paired: both groups occur in each unit, so signs are flipped instead of labels permuted.
      clusters, tokens: number by group.
      icc: intra-class correlation of choices within clusters. design_effect: the factor by which it inflates variances.
      family: number of cells that are adjusted together.
      overlap: share of tokens whose id both groups use, in the group where it is smaller.
      token_mix, within_token, unshared: Kitagawa's split of the loads' total variation distance (`distance`), mean over
        layers. The signs come from other clusters than the differences, so that noise adds nothing on average.
      equivalent: all cells are; it never says that routes do not depend on the field.
      level: the highest level of its claims.

    What was not tested is None.
    """

    name: str
    groups: tuple[str, str]
    unit: str
    paired: bool
    clusters: dict[str, int]
    tokens: dict[str, int]
    icc: float | None = None
    design_effect: float | None = None
    family: int
    cells: tuple[Cell, ...]
    layers: tuple[Layer, ...] = ()
    overlap: float | None = None
    token_mix: float | None = None
    within_token: float | None = None
    unshared: float | None = None
    distance: float | None = None
    equivalent: bool | None = None
    level: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """The level that the routes to an expert, or those of a layer, reach for a question."""

    question: str
    layer: int
    expert: int | None
    level: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """What is not claimed, and why, each a sentence or a part of one."""

    claim: str
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exploration:
    """A finding of a search over many candidates: q is Benjamini and Hochberg's, and there is no claim.

    Attributes:
      kind: "token" (difference between groups for one token id) or "pair" (co-activation of two experts).
      what: a readable name. estimate: a difference of shares, or a lift (1 is chance).
    """

    kind: str
    what: str
    layer: int
    experts: tuple[int, ...]
    token: int | None
    estimate: float
    p: float
    q: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """All results. `seed` and `permutations` are those of the tests."""

    gate: Gate | None
    questions: tuple[Question, ...]
    claims: tuple[Claim, ...]
    refused: tuple[Refusal, ...]
    exploration: tuple[Exploration, ...]
    warnings: tuple[str, ...]
    alpha: float
    margin: float
    permutations: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers of NumPy become Python's, and what is not finite becomes None."""
        return _plain(dataclasses.asdict(self))


def highest(levels: list[str]) -> str:
    """The highest of some levels; "none" if there are none."""
    return max(levels, key=LEVELS.index, default="none")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, enum.StrEnum) else value
