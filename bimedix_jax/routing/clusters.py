"""Clusters of tokens, the unit of every test and interval, and what is compared between them.

The unit is a record or a document, never a token. Tokens of a record have a topic, a style and hidden states in common,
and a test that permutes tokens finds an effect in nearly every data set that has none.

Letters: C clusters, X cells (layers x experts).
"""

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np

MIN_CLUSTERS = 10
"""A group with fewer has neither interval nor claim."""
FEW_CLUSTERS = 20
"""A group with fewer is warned about."""


BLOCK = 1 << 20
"""Numbers in an array of permutations: 8 MiB."""


def generator(seed: int, *names: str) -> np.random.Generator:
    """A generator for a purpose: what one analysis draws does not depend on which others ran before."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What is compared: two groups of clusters, or differences within clusters with zero.

    Attributes:
      values_CX: one value for each cluster and cell, such as an expert's share of the cluster's choices.
      first_C: whether the cluster belongs to the first group. None if the values are differences within clusters, the
        signs of which are exchangeable.
      stratum_C: labels are exchanged within strata only, and a difference between strata is not one between groups.
    """

    values_CX: np.ndarray
    first_C: np.ndarray | None = None
    stratum_C: np.ndarray | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of clusters by group."""
        if self.first_C is None:
            return (len(self.values_CX),)
        first = int(self.first_C.sum())
        return first, len(self.first_C) - first

    @property
    def enough(self) -> bool:
        """Whether each group has the clusters that an interval or a claim needs."""
        return min(self.sizes) >= MIN_CLUSTERS

    def strata(self) -> list[np.ndarray]:
        """The clusters of each stratum, as indices."""
        if self.stratum_C is None:
            return [np.arange(len(self.values_CX))]
        return [np.flatnonzero(self.stratum_C == name) for name in np.unique(self.stratum_C)]

    def within_strata(self) -> tuple[np.ndarray, np.ndarray]:
        """Values [C, X] less the mean of their stratum, and the first group's share [C] of each cluster's stratum."""
        values_CX = np.asarray(self.values_CX, np.float64)
        assert self.first_C is not None
        centred_CX, share_C = np.empty_like(values_CX), np.empty(len(values_CX))
        for member_S in self.strata():
            centred_CX[member_S] = values_CX[member_S] - values_CX[member_S].mean(0)
            share_C[member_S] = self.first_C[member_S].mean()
        noise_X = 1e-12 * np.abs(values_CX).max(0, initial=0)
        return np.where(np.abs(centred_CX).max(0, initial=0) <= noise_X, 0.0, centred_CX), share_C

    def parts(self) -> list[np.ndarray]:
        """An array [C, X] for each group: the mean of the first less the mean of the second is the difference."""
        if self.first_C is None:
            return [np.asarray(self.values_CX, np.float64)]
        centred_CX, share_C = self.within_strata()
        total = float((share_C * (1 - share_C)).sum())
        first, second = self.sizes
        lead_C, trail_C = first * (1 - share_C) / total, second * share_C / total
        return [(centred_CX * lead_C[:, None])[self.first_C], (centred_CX * trail_C[:, None])[~self.first_C]]


def blocks(total: int, width: int) -> Iterator[int]:
    """Sizes of blocks of permutations, so that an array of so many by `width` has about BLOCK numbers."""
    size = max(min(BLOCK // max(width, 1), total), 1)
    yield from (min(size, total - start) for start in range(0, total, size))


def resampled_weights(clusters: int, resamples: int, rng: np.random.Generator, draws: int | None = None) -> np.ndarray:
    """[B, C] float64: how often each cluster is drawn in each resample, with replacement.

    Args:
      draws: their number, by default that of the clusters.
    """
    drawn_BN = rng.integers(0, clusters, (resamples, clusters if draws is None else draws), np.int32)
    drawn_BN += clusters * np.arange(resamples, dtype=np.int32)[:, None]
    counts = np.bincount(drawn_BN.ravel(), minlength=resamples * clusters)
    return counts.reshape(resamples, clusters).astype(np.float64)
