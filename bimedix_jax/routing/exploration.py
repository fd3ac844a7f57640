"""Searches over many candidates: single token ids, and pairs of experts. They yield no claims.

p-values are adjusted by Benjamini and Hochberg over everything that was tried, and only the first are listed.

Letters: P rows of (cluster, group, token id), L layers, E experts, N tokens, K experts of a token.
"""

import numpy as np
from scipy.special import stdtr

from bimedix_jax.routing.claims import Exploration
from bimedix_jax.routing.clusters import MIN_CLUSTERS, generator
from bimedix_jax.routing.coactivation import coactivation
from bimedix_jax.routing.contrasts import Contrast
from bimedix_jax.routing.split import token_rows
from bimedix_jax.routing.stats import benjamini_hochberg
from bimedix_jax.routing.sums import SparseMatrix, dense, row_shares, summing
from bimedix_jax.routing.tables import Tables, TokenRoutes

MOST_IDS = 200
"""Token ids that are tried: the most frequent that enough clusters of both groups use."""
LISTED = 30
"""Findings that are listed."""
LARGEST_Q = 0.1
SWAPPED_TOKENS = 3000
"""Tokens whose sets of experts are swapped, from as many records as they fill."""


def explore_tokens(tables: Tables, contrast: Contrast) -> list[Exploration]:
    """Token ids whose routes differ between the groups, by Welch's test over clusters."""
    table = tables.routes
    if table is None:
        return []
    rows, row_N = token_rows(table, contrast.unit_R, contrast.first_R, contrast.kept_R, contrast.units)
    users_GT = np.array([np.bincount(rows.id_P[rows.first_P == x], minlength=rows.ids) for x in (True, False)])
    used_T = np.where(users_GT.min(0, initial=1 << 60) >= MIN_CLUSTERS, users_GT.sum(0), 0)
    chosen_S = np.argsort(-used_T, kind="stable")[:MOST_IDS]
    chosen_S = chosen_S[used_T[chosen_S] > 0]
    if not len(chosen_S):
        return []
    order_T = np.full(rows.ids, -1)
    order_T[chosen_S] = np.arange(len(chosen_S))
    index_P = np.flatnonzero(order_T[rows.id_P] >= 0)
    place_P, first_P = order_T[rows.id_P[index_P]], rows.first_P[index_P]
    estimates, p_values = [], []
    for layer in range(tables.counts_RLE.shape[1]):
        share_PE = row_shares(table.choices(layer, row_N, len(rows.tokens_P))[index_P])
        difference_SE, p_SE = _welch_by_id(share_PE, place_P, first_P, len(chosen_S))
        estimates.append(difference_SE)
        p_values.append(p_SE)
    estimate_LSE, p_LSE = np.array(estimates), np.array(p_values)
    ids = np.unique(table.id_N[contrast.kept_R[table.record_N]])[chosen_S]
    q_LSE = benjamini_hochberg(p_LSE.ravel()).reshape(p_LSE.shape)
    return [
        Exploration(
            kind="token",
            what=f"{contrast.name}: token {ids[which]}",
            layer=tables.layers[layer],
            experts=(int(expert),),
            token=int(ids[which]),
            estimate=float(estimate_LSE[layer, which, expert]),
            p=float(p_LSE[layer, which, expert]),
            q=float(q_LSE[layer, which, expert]),
        )
        for layer, which, expert in _first(q_LSE, p_LSE)
    ]


def explore_pairs(tables: Tables, seed: int, most_tokens: int = SWAPPED_TOKENS) -> list[Exploration]:
    """Pairs of experts that are chosen together more or less often than loads explain; none for sets of one expert."""
    routes = tables.routes
    if not isinstance(routes, TokenRoutes) or routes.experts_LNK.shape[2] < 2:
        return []
    kept_N = sampled_records(routes.record_N, most_tokens, generator(seed, "records"))
    found = [
        coactivation(np.asarray(routes.experts_LNK[layer])[kept_N], routes.record_N[kept_N], routes.experts, rng)
        for layer, rng in enumerate(generator(seed, "co-activation").spawn(tables.counts_RLE.shape[1]))
    ]
    lead_Z, trail_Z = np.triu_indices(routes.experts, 1)
    p_LZ = np.array([layer.p_EE[lead_Z, trail_Z] for layer in found])
    q_LZ = benjamini_hochberg(p_LZ.ravel()).reshape(p_LZ.shape)
    return [
        Exploration(
            kind="pair",
            what=f"experts {lead_Z[which]} and {trail_Z[which]} together",
            layer=tables.layers[layer],
            experts=(int(lead_Z[which]), int(trail_Z[which])),
            token=None,
            estimate=float(found[layer].lift_EE[lead_Z[which], trail_Z[which]]),
            p=float(p_LZ[layer, which]),
            q=float(q_LZ[layer, which]),
        )
        for layer, which in _first(q_LZ, p_LZ)
    ]


def sampled_records(record_N: np.ndarray, most_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """[N] bool: the tokens of random records, as many as have at most `most_tokens` together, at least one record."""
    tokens_R = np.bincount(record_N)
    order_R = rng.permutation(len(tokens_R))
    fits_R = np.cumsum(tokens_R[order_R]) <= most_tokens
    fits_R[: np.argmax(tokens_R[order_R] > 0) + 1] = True
    chosen_R = np.zeros(len(tokens_R), bool)
    chosen_R[order_R[fits_R]] = True
    return chosen_R[record_N]


def _welch_by_id(
    share_PE: SparseMatrix, place_P: np.ndarray, first_P: np.ndarray, ids: int
) -> tuple[np.ndarray, np.ndarray]:
    """[S, E] each: difference of the groups' mean shares over clusters, and its p-value."""
    means, variances, counts = [], [], []
    for side in (True, False):
        own_X = np.flatnonzero(first_P == side)
        grouped = summing(place_P[own_X], ids)
        count_S1 = np.bincount(place_P[own_X], minlength=ids)[:, None].astype(np.float64)
        mean_SE = dense(grouped @ share_PE[own_X]) / count_S1
        square_SE = dense(grouped @ share_PE[own_X].power(2)) / count_S1
        means.append(mean_SE)
        variances.append(np.maximum(square_SE - mean_SE**2, 0) / (count_S1 - 1))
        counts.append(count_S1)
    difference_SE, variance_SE = means[0] - means[1], variances[0] + variances[1]
    below_SE = sum(v**2 / (n - 1) for v, n in zip(variances, counts, strict=True))
    freedom_SE = np.where(below_SE > 0, variance_SE**2 / np.where(below_SE > 0, below_SE, 1), 1)
    t_SE = difference_SE / np.sqrt(np.where(variance_SE > 1e-18, variance_SE, np.inf))
    p_SE = 2 * stdtr(np.maximum(freedom_SE, 1), -np.abs(t_SE))
    certain_SE = (variance_SE <= 1e-18) & (np.abs(difference_SE) > 1e-9)  # no cluster of either group varies
    return difference_SE, np.where(certain_SE, 0.0, p_SE)


def _first(q: np.ndarray, p: np.ndarray) -> list[tuple[int, ...]]:
    """Places of the smallest p-values with a q of at most LARGEST_Q, in order."""
    order = np.argsort(p, axis=None, kind="stable")[:LISTED]
    places = [tuple(int(i) for i in np.unravel_index(place, q.shape)) for place in order]
    return [place for place in places if q[place] <= LARGEST_Q]
