"""Differences within token ids whose direction varies from id to id.

The sum over ids misses a router that sends some words of one language to the first expert and others away from it, as a
balanced router must. Here the differences of the ids are squared before they are added up. The squares of noise are
subtracted, and the signs of the clusters' scores are flipped for the null distribution.

Letters: U units (clusters, or some together), T token ids, E experts, B flips, P rows of (cluster, group, token id).
"""

import numpy as np

from bimedix_jax.routing.information import TokenRows
from bimedix_jax.routing.sums import SparseMatrix, dense, summing

MOST_UNITS = 100
"""More clusters are merged into so many units, half of them of each group."""
MOST_IDS = 300
"""The shared ids with the most tokens in the group where they are rarer."""


class SquaredDifferences:
    """Sum over ids of m (r1 - r2)**2, where r are an id's routes by group and m is its effective share of the tokens.

    Args:
      rows: rows of the contrast. weight_P: shares of the tokens, which add up to 1 in each group.
      index_P: places of the rows with a shared id.
    """

    def __init__(
        self, rows: TokenRows, weight_P: np.ndarray, index_P: np.ndarray, rng: np.random.Generator, flips: int
    ):
        ids, id_X = np.unique(rows.id_P[index_P], return_inverse=True)
        masses = [np.bincount(id_X, weight_P[index_P] * (rows.first_P[index_P] == x), len(ids)) for x in (True, False)]
        chosen_T = np.sort(np.argsort(-np.minimum(*masses), kind="stable")[:MOST_IDS])
        place_T = np.full(len(ids), -1)
        place_T[chosen_T] = np.arange(len(chosen_T))
        kept_X = place_T[id_X] >= 0
        self.index_P, self.id_P = index_P[kept_X], place_T[id_X[kept_X]]
        lead_T, trail_T = (mass_T[chosen_T] for mass_T in masses)
        self.total_T, effective_T = lead_T + trail_T, lead_T * trail_T / (lead_T + trail_T)
        self.inverse_T = 1 / np.where(effective_T > 0, effective_T, 1)
        unit_C, self.units = _units(rows, rng)
        weight_P, first_P = weight_P[self.index_P], rows.first_P[self.index_P]
        self.cell_P = unit_C[rows.cluster_P[self.index_P]] * len(chosen_T) + self.id_P
        self.weight_P = weight_P
        self.contrast_P = weight_P * (first_P - (lead_T / self.total_T)[self.id_P])
        leverage_UT = self._summed(weight_P) / self.total_T
        self.scale_UT = 1 / np.sqrt(np.maximum(1 - leverage_UT, 1e-3))
        self.sign_BU = rng.integers(0, 2, (flips, self.units), np.int8) * 2.0 - 1.0

    def _summed(self, value_P: np.ndarray) -> np.ndarray:
        """[U, T]: sums by unit and id."""
        return np.bincount(self.cell_P, value_P, self.units * len(self.total_T)).reshape(self.units, -1)

    def layer(self, share_PE: SparseMatrix) -> tuple[np.ndarray, np.ndarray]:
        """The statistic [E] and its values under flips [B, E], studentised and 0 where they are negative."""
        own_PE = share_PE[self.index_P]
        ids = len(self.total_T)
        mean_TE = dense(summing(self.id_P, ids, self.weight_P) @ own_PE) / self.total_T[:, None]
        by_cell = summing(self.cell_P, self.units * ids, self.contrast_P)
        score_UTE = dense(by_cell @ own_PE).reshape(self.units, ids, -1)
        score_UTE -= self._summed(self.contrast_P)[:, :, None] * mean_TE
        scaled_EUT = np.ascontiguousarray(np.moveaxis(score_UTE * self.scale_UT[:, :, None], 2, 0))  # for BLAS
        weighted_EUT = scaled_EUT * self.inverse_T
        gram_EUU = weighted_EUT @ np.swapaxes(scaled_EUT, 1, 2)
        noise_E = np.trace(gram_EUU, axis1=1, axis2=2)
        spread_E = np.sqrt(
            np.maximum(2 * ((gram_EUU**2).sum((1, 2)) - (np.einsum("euu->eu", gram_EUU) ** 2).sum(1)), 0)
        )
        safe_E = np.where(spread_E > 1e-12 * np.maximum(noise_E, 1e-12), spread_E, np.inf)
        found_E = (score_UTE.sum(0) ** 2 * self.inverse_T[:, None]).sum(0)
        flipped_BE = np.stack([((self.sign_BU @ gram_UU) * self.sign_BU).sum(1) for gram_UU in gram_EUU], axis=1)
        return np.maximum(found_E - noise_E, 0) / safe_E, np.maximum(flipped_BE - noise_E, 0) / safe_E


def _units(rows: TokenRows, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """The unit of each cluster, and their number; clusters are merged within their group."""
    side_C = np.zeros(rows.clusters, np.int64)
    side_C[rows.cluster_P[rows.first_P]] += 1
    side_C[rows.cluster_P[~rows.first_P]] += 2
    unit_C, start = np.zeros(rows.clusters, np.int64), 0
    for side in np.unique(side_C):
        member_S = rng.permutation(np.flatnonzero(side_C == side))
        size = min(len(member_S), MOST_UNITS // 2)
        unit_C[member_S] = start + np.arange(len(member_S)) % size
        start += size
    return unit_C, start
