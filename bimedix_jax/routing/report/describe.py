"""What a report describes and does not test: loads by group, dead experts, persistence, close choices, flips.

Letters: R records, U clusters, N tokens, L layers, E experts.
"""

import dataclasses

import numpy as np

from bimedix_jax.routing import measures
from bimedix_jax.routing.clusters import generator
from bimedix_jax.routing.contrasts import Contrast, contrasts, joined_units
from bimedix_jax.routing.intervals import mean_intervals
from bimedix_jax.routing.measures import DeadExpert
from bimedix_jax.routing.recorded import RECORD, clusters, counting_roles
from bimedix_jax.routing.recording import Recording
from bimedix_jax.routing.tables import Tables

PERSISTENCE = "overlap of a token's experts with those of the next token, less that with a random token of its record"
CLOSE = 1e-4
"""A k-th chosen score that exceeds the best refused one by less is decided by rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """A mean over clusters for each layer, with its 95 % interval [L, 3]: mean, low, high, NaN if not known."""

    name: str
    what: str
    values_L3: np.ndarray
    clusters: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Load:
    """The mean load of a group over its clusters, [L, E]."""

    question: str
    group: str
    clusters: int
    tokens: int
    share_LE: np.ndarray


def loads(tables: Tables, fields: list[str]) -> list[Load]:
    """The load of each group of each question."""
    found = []
    for contrast in _asked(tables, fields):
        tokens = contrast.by_group(tables.tokens_R)
        for group, share_CLE in zip(contrast.groups, contrast.loads(tables.counts_RLE), strict=True):
            if len(share_CLE):
                one = Load(
                    question=contrast.name,
                    group=group,
                    clusters=len(share_CLE),
                    tokens=tokens[group],
                    share_LE=share_CLE.mean(0),
                )
                found.append(one)
    return found


def _asked(tables: Tables, fields: list[str]) -> list[Contrast]:
    return [contrast for field in fields if field in tables.groups for contrast in contrasts(tables, field)]


def units(tables: Tables) -> np.ndarray:
    """[R]: index of each record's cluster; those that a translated pair connects are one."""
    kept_R = np.ones(len(tables.tokens_R), bool)
    return np.unique(joined_units(tables.cluster_R, tables.pair_R, kept_R), return_inverse=True)[1]


def dead(tables: Tables) -> list[DeadExpert]:
    """Experts that no token chose, with the layers' numbers."""
    unit_R = units(tables)
    counts_ULE = np.zeros((unit_R.max() + 1, *tables.counts_RLE.shape[1:]), np.int64)
    np.add.at(counts_ULE, unit_R, tables.counts_RLE)
    return [dataclasses.replace(one, layer=tables.layers[one.layer]) for one in measures.dead_experts(counts_ULE)]


def described(recording: Recording, baseline: Recording | None, unit: str, seed: int) -> list[Measure]:
    """The measures that the recording has the columns for."""
    if recording.manifest.kind != "tokens":
        return []
    counted, found = Counted.of(recording), []
    persistence_RL = counted.persistence()
    if persistence_RL is not None:
        found.append(("persistence", PERSISTENCE, persistence_RL))
    if "margin" in recording.manifest.columns:
        found.append(("close choices", "share of tokens whose choice is decided by rounding", counted.close()))
    if baseline is not None:
        changed_RL, overlap_RL = counted.flips(baseline)
        found.append(("flips", "share of tokens whose set of experts differs from the base model's", changed_RL))
        found.append(("overlap with base", "share of a token's experts that the base model chooses too", overlap_RL))
    groups = recording.groups()
    cluster_R = None if unit == RECORD else clusters(groups[unit])
    unit_R = joined_units(cluster_R, groups.get("pair"), np.ones(recording.manifest.records, bool))
    return [_measure(name, what, values_RL, unit_R, seed) for name, what, values_RL in found]


def _measure(name: str, what: str, values_RL: np.ndarray, unit_R: np.ndarray, seed: int) -> Measure:
    finite_R = np.isfinite(values_RL).all(1)
    names, unit_X = np.unique(unit_R[finite_R], return_inverse=True)
    sums_UL = np.zeros((len(names), values_RL.shape[1]))
    np.add.at(sums_UL, unit_X, values_RL[finite_R])
    mean_UL = sums_UL / np.bincount(unit_X, minlength=len(names))[:, None]
    values_L3 = mean_intervals(mean_UL, generator(seed, "describe", name))
    return Measure(name=name, what=what, values_L3=values_L3, clusters=len(names))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Counted:
    """The tokens of a recording that count, by the number of their record in it.

    Attributes:
      mask_N: which of all tokens count; the other arrays have these only.
      experts_NLK: E in a slot without an expert.
    """

    recording: Recording
    mask_N: np.ndarray
    record_N: np.ndarray
    experts_NLK: np.ndarray

    @classmethod
    def of(cls, recording: Recording) -> "Counted":
        columns = recording.tokens("record", "role")
        mask_N = counting_roles(recording.manifest.roles, None)[columns["role"]]
        record_N = columns["record"][mask_N].astype(np.int64)
        return cls(recording=recording, mask_N=mask_N, record_N=record_N, experts_NLK=chosen(recording)[mask_N])

    def persistence(self) -> np.ndarray | None:
        """[R, L]: excess of the overlap of neighbours; None where some slots have no expert."""
        records, experts = self.recording.manifest.records, self.recording.manifest.experts
        if (self.experts_NLK == experts).any():
            return None
        layers = (self.experts_NLK[None, :, layer] for layer in range(self.experts_NLK.shape[1]))
        found = [measures.persistence(layer_1NK, self.record_N, records, experts) for layer_1NK in layers]
        return np.concatenate([one.next_RL - one.random_RL for one in found], 1)

    def close(self) -> np.ndarray:
        """[R, L]: share of tokens with a close choice."""
        margin_NL = self.recording.tokens("margin")["margin"][self.mask_N]
        return measures.margins(margin_NL.T, self.record_N, self.recording.manifest.records, CLOSE)

    def flips(self, baseline: Recording) -> tuple[np.ndarray, np.ndarray]:
        """[R, L] each: tokens with another set, and the overlap / k. `tables_of` has compared the tokens."""
        place = {name: number for number, name in enumerate(baseline.records["id"])}
        starts = np.r_[0, np.cumsum(np.array(baseline.records["tokens"], np.int64))]
        numbers = [place[name] for name in self.recording.records["id"]]
        index_N = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in numbers])
        records, experts = self.recording.manifest.records, self.recording.manifest.experts
        theirs_NLK = chosen(baseline)[index_N[self.mask_N]]
        found = [
            measures.flips(own_NK[None], their_NK[None], self.record_N, records, experts)
            for own_NK, their_NK in zip(self.experts_NLK.swapaxes(0, 1), theirs_NLK.swapaxes(0, 1), strict=True)
        ]
        return np.concatenate([x.changed_RL for x in found], 1), np.concatenate([x.overlap_RL for x in found], 1)


def chosen(recording: Recording) -> np.ndarray:
    """[N, L, K]: the experts of all tokens, E in a slot without one, in the smallest type that has them."""
    experts = recording.manifest.experts
    kind = np.min_scalar_type(experts)
    parts = (part["experts"] for part in recording.parts("experts"))
    return np.concatenate([np.where(part < 0, experts, part).astype(kind) for part in parts])


def roles(recording: Recording) -> list[tuple[str, int, bool]]:
    """Role, number of its tokens, and whether they count."""
    if recording.manifest.kind != "tokens":
        return []
    counts = np.zeros(256, np.int64)
    for part in recording.parts("role"):
        counts += np.bincount(part["role"], minlength=256)
    counting = counting_roles(recording.manifest.roles, None)
    named = [(name, int(counts[at]), bool(counting[at])) for at, name in enumerate(recording.manifest.roles)]
    unknown = int(counts[len(recording.manifest.roles) :].sum())
    return [row for row in [*named, ("not known", unknown, True)] if row[1]]
