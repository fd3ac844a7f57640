"""Two groups of records, their clusters, and how those are compared: by permuted labels or, within pairs, by signs.

Letters: R records, U clusters of a contrast, L layers, E experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from bimedix_jax.routing.clusters import Comparison
from bimedix_jax.routing.sums import components, table
from bimedix_jax.routing.tables import MISSING

OTHERS = "others"


class Grouped(Protocol):
    """Records with labels and units of analysis, as in tables.Tables."""

    @property
    def groups(self) -> Mapping[str, np.ndarray]: ...

    @property
    def cluster_R(self) -> np.ndarray | None: ...

    @property
    def pair_R(self) -> np.ndarray | None: ...

    @property
    def stratum_R(self) -> np.ndarray | None: ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Contrast:
    """Which records are compared.

    Attributes:
      name: "language", or "kind=qa" for qa against all others. field: "language", "kind".
      groups: names of the first and the second group.
      kept_R: whether the record takes part. first_R: whether it belongs to the first group.
      unit_R: index of its cluster, 0 to `units`-1 where it takes part.
      paired: each cluster has records of both groups.
      side_U: whether the cluster belongs to the first group; None if paired. stratum_U: its stratum, if there are any.
      dropped: number of clusters left out, because they have both groups where others have one, or the reverse.
    """

    name: str
    field: str
    groups: tuple[str, str]
    kept_R: np.ndarray
    first_R: np.ndarray
    unit_R: np.ndarray
    units: int
    paired: bool
    side_U: np.ndarray | None
    stratum_U: np.ndarray | None
    dropped: int

    @property
    def clusters(self) -> dict[str, int]:
        """Number of clusters by group."""
        if self.side_U is None:
            return dict.fromkeys(self.groups, self.units)
        first = int(self.side_U.sum())
        return {self.groups[0]: first, self.groups[1]: self.units - first}

    def by_group(self, values_R: np.ndarray) -> dict[str, int]:
        """Sums of a number of each record, by group."""
        sums = [int(values_R[self.kept_R & (self.first_R == first)].sum()) for first in (True, False)]
        return dict(zip(self.groups, sums, strict=True))

    def sums(self, values_RLE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[U, L, E] of each group: sums over the cluster's records; zeros where it has none."""
        record_X = np.flatnonzero(self.kept_R)
        place_X = np.where(self.first_R[record_X], 0, self.units) + self.unit_R[record_X]
        shape = (2 * self.units, len(self.kept_R))
        matrix = table((place_X, record_X), np.ones(len(record_X)), shape)
        summed = matrix @ values_RLE.reshape(len(values_RLE), -1)
        lead, trail = summed.reshape(2, self.units, *values_RLE.shape[1:])
        return lead, trail

    def loads(self, values_RLE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[clusters of the group, L, E] of each group: shares of the cluster's choices, which sum to 1."""
        lead, trail = self.sums(values_RLE)
        if self.side_U is not None:
            lead, trail = lead[self.side_U], trail[~self.side_U]
        return _shares(lead), _shares(trail)

    def comparison(self, values_RLE: np.ndarray) -> Comparison:
        """The groups' loads, [U, L * E]."""
        lead, trail = self.sums(values_RLE)
        if self.side_U is None:
            difference_ULE = _shares(lead) - _shares(trail)
            return Comparison(values_CX=difference_ULE.reshape(self.units, -1))
        shares_ULE = _shares(lead + trail)  # one of them is zero
        return Comparison(values_CX=shares_ULE.reshape(self.units, -1), first_C=self.side_U, stratum_C=self.stratum_U)

    def means(self, totals_RX: np.ndarray, tokens_R: np.ndarray) -> Comparison:
        """The groups' means per token, [U, X]: of the cluster's records, so that a cluster counts once.

        Args:
          totals_RX: sums over the tokens of each record. tokens_R: their number; every group of a cluster has some.
        """
        lead_UX, trail_UX = (part_U1X[:, 0] for part_U1X in self.sums(totals_RX[:, None]))
        lead_U1, trail_U1 = (part_U11[:, 0] for part_U11 in self.sums(tokens_R[:, None, None]))
        if self.side_U is None:
            return Comparison(values_CX=lead_UX / lead_U1 - trail_UX / trail_U1)
        mean_UX = (lead_UX + trail_UX) / (lead_U1 + trail_U1)  # one of them is zero
        return Comparison(values_CX=mean_UX, first_C=self.side_U, stratum_C=self.stratum_U)


def _shares(values_ULE: np.ndarray) -> np.ndarray:
    total_UL1 = values_ULE.sum(-1, keepdims=True)
    return values_ULE / np.where(total_UL1 > 0, total_UL1, 1)


def contrasts(tables: Grouped, field: str) -> list[Contrast]:
    """One contrast for two groups, and each group against all others for more; none for fewer."""
    labels_R = np.asarray(tables.groups[field]).astype(str)
    names = sorted(set(labels_R.tolist()) - {MISSING})
    if len(names) < 2:
        return []
    if len(names) == 2:
        return [_contrast(tables, field, field, (names[0], names[1]), labels_R == names[0], labels_R != MISSING)]
    others = OTHERS if OTHERS not in names else f"all {OTHERS}"
    return [
        _contrast(tables, f"{field}={name}", field, (name, others), labels_R == name, labels_R != MISSING)
        for name in names
    ]


def _contrast(
    tables: Grouped, name: str, field: str, groups: tuple[str, str], first_R: np.ndarray, kept_R: np.ndarray
) -> Contrast:
    unit_R = joined_units(tables.cluster_R, tables.pair_R, kept_R)
    present = np.zeros((2, len(unit_R)), bool)
    for side, first in enumerate((True, False)):
        present[side, unit_R[kept_R & (first_R == first)]] = True
    both_U, either_U = present[0] & present[1], present[0] | present[1]
    paired = bool(both_U.sum() > (either_U & ~both_U).sum())
    chosen_U = both_U if paired else either_U & ~both_U
    kept_R = kept_R & chosen_U[unit_R]
    names_U, index_R = np.unique(np.where(kept_R, unit_R, -1), return_inverse=True)
    missing = int(len(names_U) > 0 and names_U[0] == -1)
    unit_R, units = index_R - missing, len(names_U) - missing
    side_U, stratum_U = np.zeros(units, bool), None
    side_U[unit_R[kept_R]] = first_R[kept_R]
    if tables.stratum_R is not None:
        codes_R = np.unique(np.asarray(tables.stratum_R).astype(str), return_inverse=True)[1]
        stratum_U = np.zeros(units, np.int64)
        stratum_U[unit_R[kept_R]] = codes_R[kept_R]
    return Contrast(
        name=name,
        field=field,
        groups=groups,
        kept_R=kept_R,
        first_R=first_R,
        unit_R=unit_R,
        units=units,
        paired=paired,
        side_U=None if paired else side_U,
        stratum_U=None if paired else stratum_U,
        dropped=int(either_U.sum()) - units,
    )


def joined_units(cluster_R: np.ndarray | None, pair_R: np.ndarray | None, kept_R: np.ndarray) -> np.ndarray:
    """[R]: index of the cluster of each record; clusters that a pair connects are one, since translations are alike."""
    records = len(kept_R)
    cluster_R = np.arange(records) if cluster_R is None else np.unique(cluster_R, return_inverse=True)[1]
    if pair_R is None:
        return cluster_R
    pair_R = np.asarray(pair_R).astype(str)
    linked_X = np.flatnonzero(kept_R & (pair_R != MISSING))
    pairs, pair_X = np.unique(pair_R[linked_X], return_inverse=True)
    size = records + len(pairs)
    return components(cluster_R[linked_X], records + pair_X, size)[cluster_R]
