"""Is it more than vocabulary? Routes of the same token ids in two groups.

Arabic and English hardly share words, so routes that depend on the token alone already differ by language. Kitagawa's
split (1955) divides the difference of two loads over the ids that both groups use: `token_mix` is what their different
frequencies explain, `within` is the difference of the routes of the same id, and `unshared` belongs to ids that only
one group uses, about which nothing can be said. Every cluster counts once.

The test of "within" compares routes with the mean of their id, with a regression on group and id whose scores are
summed by cluster. It needs no model of the ids' frequencies.

Letters: U clusters, L layers, E experts, T shared token ids, P rows of (cluster, group, token id).
"""

import dataclasses

import numpy as np

from bimedix_jax.routing.clusters import FEW_CLUSTERS, MIN_CLUSTERS
from bimedix_jax.routing.information import TokenRows
from bimedix_jax.routing.sums import SparseMatrix, dense, row_shares, summing, table
from bimedix_jax.routing.tables import TokenTable

LEAST_OVERLAP = 0.02
"""Share of tokens with shared ids below which the split is not identified."""
LEAST_USERS = 2
"""Clusters of each group that must use an id: of an id with one cluster, its group and its cluster are the same."""


def token_rows(
    tokens: TokenTable, cluster_R: np.ndarray, first_R: np.ndarray, kept_R: np.ndarray, clusters: int
) -> tuple[TokenRows, np.ndarray]:
    """The rows of (cluster, group, token id), and the row of each entry of the tokens, -1 if its record is left out."""
    kept_N = kept_R[tokens.record_N]
    record_N = tokens.record_N[kept_N]
    ids, id_N = np.unique(tokens.id_N[kept_N], return_inverse=True)
    key_N = (cluster_R[record_N].astype(np.int64) * 2 + first_R[record_N]) * max(len(ids), 1) + id_N
    keys_P, inverse_N = np.unique(key_N, return_inverse=True)
    row_N = np.full(len(kept_N), -1, np.int64)
    row_N[kept_N] = inverse_N
    tokens_N = None if tokens.tokens_N is None else tokens.tokens_N[kept_N]
    side_P, id_P = np.divmod(keys_P, max(len(ids), 1))
    rows = TokenRows(
        cluster_P=side_P // 2,
        id_P=id_P,
        first_P=side_P % 2 == 1,
        tokens_P=np.bincount(inverse_N, tokens_N, len(keys_P)),
        clusters=clusters,
        ids=len(ids),
    )
    return rows, row_N


class Split:
    """The token ids of a question: their frequencies by group, and what is computed for each layer from them.

    Attributes:
      overlap: share of tokens with a shared id, in the group where it is smaller.
      users: number of clusters with a shared id, by group.
    """

    def __init__(self, rows: TokenRows):
        self.rows = rows
        side_P = 2 * rows.cluster_P + rows.first_P
        total_S = np.bincount(side_P, rows.tokens_P, 2 * rows.clusters)
        present_S = total_S > 0
        units = [int(present_S[group::2].sum()) for group in (1, 0)]
        # frequencies by group add up to 1, and each of its clusters contributes the same
        self.weight_P = rows.tokens_P / total_S[side_P] / np.where(rows.first_P, *(max(n, 1) for n in units))
        users = [np.bincount(rows.id_P[rows.first_P == first], minlength=rows.ids) for first in (True, False)]
        self.shared_P = ((users[0] >= LEAST_USERS) & (users[1] >= LEAST_USERS))[rows.id_P]
        self.overlap = min(float(self.weight_P[self.shared_P & (rows.first_P == x)].sum()) for x in (True, False))
        chosen = [self.shared_P & (rows.first_P == first) for first in (True, False)]
        self.users = tuple(len(np.unique(rows.cluster_P[mask_P])) for mask_P in chosen)

    @property
    def unidentified(self) -> str | None:
        """Why nothing can be said about routes beyond the token id; None if something can."""
        clusters = len(np.unique(self.rows.cluster_P[self.shared_P]))
        if self.overlap < LEAST_OVERLAP:
            return (
                f"not identified: token ids that both groups use cover {100 * self.overlap:.1f} % of the tokens of a "
                f"group, and {100 * LEAST_OVERLAP:.0f} % are needed"
            )
        if clusters < FEW_CLUSTERS or min(self.users) < MIN_CLUSTERS:
            return (
                f"not identified: {self.users[0]} and {self.users[1]} clusters of the groups use shared token ids, "
                f"{clusters} different clusters in all; {MIN_CLUSTERS} of each group and {FEW_CLUSTERS} different ones "
                "in all are needed"
            )
        return None

    def layer(self, choices_PE: SparseMatrix) -> "LayerSplit":
        """The split of a layer."""
        rows, shared_P = self.rows, np.flatnonzero(self.shared_P)
        share_PE = row_shares(choices_PE)
        first_P = rows.first_P
        unshared_E = sum(
            sign * (share_PE.T @ (self.weight_P * ~self.shared_P * (first_P == side)))
            for sign, side in ((1, True), (-1, False))
        )
        ids, id_P = np.unique(rows.id_P[shared_P], return_inverse=True)
        weight_P, side_P = self.weight_P[shared_P], first_P[shared_P]
        loads, masses = [], []
        for side in (True, False):
            own_P = weight_P * (side_P == side)
            loads.append(dense(summing(id_P, len(ids), own_P) @ share_PE[shared_P]))
            masses.append(np.bincount(id_P, own_P, len(ids)))
        rates = [load_TE / mass_T[:, None] for load_TE, mass_T in zip(loads, masses, strict=True)]
        within_E = ((masses[0] + masses[1]) / 2) @ (rates[0] - rates[1])
        token_mix_E = (masses[0] - masses[1]) @ ((rates[0] + rates[1]) / 2)
        scores = self._scores(share_PE[shared_P], shared_P, id_P, loads, masses)
        return LayerSplit(token_mix_E, within_E, np.asarray(unshared_E), *scores)

    def _scores(
        self,
        share_PE: SparseMatrix,
        shared_P: np.ndarray,
        id_P: np.ndarray,
        loads: list[np.ndarray],
        masses: list[np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores [U, E] of the regression on group and id, and the same scaled by their leverage.

        A score is the sum over a cluster's rows of weight x (group less its mean for the id) x (share less its mean
        for the id). A cluster with the part h of an id's weight has pulled the mean towards itself: its residual is
        divided by sqrt(1 - h), which makes the squares unbiased (Bell and McCaffrey 2002).
        """
        total_T = masses[0] + masses[1]
        mean_TE = (loads[0] + loads[1]) / total_T[:, None]
        weight_P, first_P = self.weight_P[shared_P], self.rows.first_P[shared_P]
        cluster_P = self.rows.cluster_P[shared_P]
        pair_P = np.unique(cluster_P * len(total_T) + id_P, return_inverse=True)[1]  # a cluster may have both groups
        leverage_P = np.bincount(pair_P, weight_P)[pair_P] / total_T[id_P]
        contrast_P = weight_P * (first_P - (masses[0] / total_T)[id_P])
        found = []
        for factor_P in (contrast_P, contrast_P / np.sqrt(np.maximum(1 - leverage_P, 1e-3))):
            by_row_UP = summing(cluster_P, self.rows.clusters, factor_P)
            by_id_UT = table((cluster_P, id_P), factor_P, (self.rows.clusters, len(total_T)))
            found.append(dense(by_row_UP @ share_PE) - by_id_UT @ mean_TE)
        return found[0], found[1]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSplit:
    """Kitagawa's split [E] of a layer, whose parts add up to the difference of the loads, and the scores [U, E]."""

    token_mix_E: np.ndarray
    within_E: np.ndarray
    unshared_E: np.ndarray
    scores_UE: np.ndarray
    scaled_UE: np.ndarray


def same_ids(
    tokens: TokenTable, pair_R: np.ndarray, first_R: np.ndarray, cluster_R: np.ndarray, kept_R: np.ndarray
) -> tuple[TokenRows, np.ndarray, float, int]:
    """Rows of (pair, group, token id) whose id occurs on both sides of a translated pair.

    Returns:
      the rows (`cluster_P` is an index of pairs); the row of each entry of the tokens, -1 for none; the share of tokens
      that have such an id, in the group where it is smaller; and the number of clusters with one.
    """
    pairs, index_R = np.unique(pair_R, return_inverse=True)
    rows, row_N = token_rows(tokens, index_R, first_R, kept_R, len(pairs))
    key_P = rows.cluster_P.astype(np.int64) * max(rows.ids, 1) + rows.id_P
    _, place_P, sides = np.unique(key_P, return_inverse=True, return_counts=True)
    both_P = sides[place_P] == 2
    shares = [
        rows.tokens_P[both_P & (rows.first_P == x)].sum() / max(rows.tokens_P[rows.first_P == x].sum(), 1)
        for x in (True, False)
    ]
    renumbered_P = np.where(both_P, np.cumsum(both_P) - 1, -1)
    row_N = np.where(row_N >= 0, renumbered_P[row_N], -1)
    kept = TokenRows(
        cluster_P=rows.cluster_P[both_P],
        id_P=rows.id_P[both_P],
        first_P=rows.first_P[both_P],
        tokens_P=rows.tokens_P[both_P],
        clusters=len(pairs),
        ids=rows.ids,
    )
    clusters = {int(cluster) for cluster in cluster_R[kept_R & np.isin(index_R, kept.cluster_P)]}
    return kept, row_N, float(min(shares)), len(clusters)


def same_id_differences(rows: TokenRows, choices_PE: SparseMatrix, unit_A: np.ndarray, units: int) -> np.ndarray:
    """[U, E]: difference of the routes of the same id on both sides of a pair, first minus second group.

    The mean over the ids of a pair, weighted by the smaller number of tokens, then over the pairs of a unit; NaN for a
    unit without such a pair.

    Args:
      unit_A: the unit of each pair.
    """
    key_P = rows.cluster_P.astype(np.int64) * max(rows.ids, 1) + rows.id_P
    order_P = np.lexsort((~rows.first_P, key_P))  # the first group's row comes before the second's
    lead, trail = order_P[0::2], order_P[1::2]
    share_PE = row_shares(choices_PE)
    weight_Z = np.minimum(rows.tokens_P[lead], rows.tokens_P[trail])
    pair_Z = rows.cluster_P[lead]
    weight_Z = weight_Z / np.bincount(pair_Z, weight_Z, rows.clusters)[pair_Z]
    present_A = np.bincount(pair_Z, minlength=rows.clusters) > 0
    pairs_U = np.bincount(unit_A[present_A], minlength=units)
    weight_Z = weight_Z / pairs_U[unit_A[pair_Z]]
    grouped_UZ = summing(unit_A[pair_Z], units, weight_Z)
    difference_UE = dense(grouped_UZ @ (share_PE[lead] - share_PE[trail]))
    return np.where(pairs_U[:, None] > 0, difference_UE, np.nan)
