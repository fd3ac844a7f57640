"""The evidence for each rung of "routes depend on X", computed for one contrast. Nothing is claimed here.

Letters: U clusters, L layers, E experts, X = L x E cells, M random routers.
"""

import dataclasses

import numpy as np

from bimedix_jax.routing.by_id import SquaredDifferences
from bimedix_jax.routing.clusters import FEW_CLUSTERS, MIN_CLUSTERS, Comparison, generator
from bimedix_jax.routing.contrasts import Contrast
from bimedix_jax.routing.information import TokenRows, held_out_nats, jensen_shannon
from bimedix_jax.routing.intervals import mean_intervals
from bimedix_jax.routing.split import LEAST_OVERLAP, Split, same_id_differences, same_ids, token_rows
from bimedix_jax.routing.stats import PERMUTATIONS, Test, compare, flipped_sums, in_blocks, step_down
from bimedix_jax.routing.sums import row_shares
from bimedix_jax.routing.tables import MISSING, Tables, TokenTable

LEAST_ROUTERS = 100
"""Random routers below which "beyond geometry" is not tested."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenEvidence:
    """Beyond token identity.

    Attributes:
      why_not: why it is not identified; the p-values are then None.
      p_X: adjusted for all cells, and for the two tests: of the sum of differences over ids, and of their squares.
      token_mix_X, within_X, unshared_X: Kitagawa's split of the difference in load.
      summary: its three parts, mean over layers, with signs from other clusters.
      same_id: test on the same id on both sides of a pair; None if not identified, for the reason `same_id_why_not`.
      vocabulary_LI, group_LI: held-out nats with low and high (NaN if not known).
    """

    why_not: str | None
    overlap: float
    p_X: np.ndarray | None
    token_mix_X: np.ndarray
    within_X: np.ndarray
    unshared_X: np.ndarray
    summary: tuple[float, float, float]
    same_id: Test | None
    same_id_why_not: str | None
    vocabulary_LI: np.ndarray
    group_LI: np.ndarray


def token_evidence(tables: Tables, contrast: Contrast, permutations: int, seed: int) -> TokenEvidence | None:
    """Evidence beyond token identity; None if the recording has no tokens."""
    table = tables.routes
    if table is None:
        return None
    rows, row_N = token_rows(table, contrast.unit_R, contrast.first_R, contrast.kept_R, contrast.units)
    split = Split(rows)
    halves = _halves(contrast, rows, generator(seed, contrast.name, "halves"))
    why_not, rng = split.unidentified, generator(seed, contrast.name, "token")
    squared = None
    if why_not is None:
        squared = SquaredDifferences(rows, split.weight_P, np.flatnonzero(split.shared_P), rng, permutations)
    parts, scores, scaled, squares, summaries, nats = [], [], [], [], [], []
    for layer in range(tables.counts_RLE.shape[1]):
        choices_PE = table.choices(layer, row_N, len(rows.tokens_P))
        found = split.layer(choices_PE)
        parts.append((found.token_mix_E, found.within_E, found.unshared_E))
        scores.append(found.scores_UE)
        scaled.append(found.scaled_UE)
        if squared is not None:
            squares.append(squared.layer(row_shares(choices_PE)))
        opposed = [half.layer(choices_PE[index_P]) for half, index_P in halves]
        summaries.append(_cross_fitted([(x.token_mix_E, x.within_E, x.unshared_E) for x in opposed]))
        nats.extend(held_out_nats(rows, choices_PE, generator(seed, contrast.name, "folds")))
    p_X = None
    if why_not is None:
        _, summed_p_X = flipped_sums(np.concatenate(scores, 1), np.concatenate(scaled, 1), rng, permutations)
        found_X, flipped_BX = (np.concatenate(part, axis=-1) for part in zip(*squares, strict=True))
        squared_p_X, _ = step_down(found_X, in_blocks(flipped_BX))
        p_X = np.minimum(2 * np.minimum(summed_p_X, squared_p_X), 1.0)
    same_id, same_id_why_not = _same_id(tables, table, contrast, permutations, seed)
    nats_CX = np.stack(nats, axis=1)
    nats_XI = mean_intervals(nats_CX[np.isfinite(nats_CX).all(1)], generator(seed, contrast.name, "nats"))
    mix_LE, within_LE, unshared_LE = (np.array(part) for part in zip(*parts, strict=True))
    mean_3 = np.mean(summaries, axis=0)
    return TokenEvidence(
        why_not=why_not,
        overlap=split.overlap,
        p_X=p_X,
        token_mix_X=mix_LE.ravel(),
        within_X=within_LE.ravel(),
        unshared_X=unshared_LE.ravel(),
        summary=(float(mean_3[0]), float(mean_3[1]), float(mean_3[2])),
        same_id=same_id,
        same_id_why_not=same_id_why_not,
        vocabulary_LI=nats_XI[0::2],
        group_LI=nats_XI[1::2],
    )


def _halves(contrast: Contrast, rows: TokenRows, rng: np.random.Generator) -> list[tuple[Split, np.ndarray]]:
    """Two random halves of the clusters of each group, with the rows of each."""
    side_U = np.zeros(contrast.units, bool) if contrast.side_U is None else contrast.side_U
    half_U = np.zeros(contrast.units, bool)
    for first in (True, False):
        member_S = rng.permutation(np.flatnonzero(side_U == first))
        half_U[member_S[: len(member_S) // 2]] = True
    found = []
    for chosen in (True, False):
        index_P = np.flatnonzero(half_U[rows.cluster_P] == chosen)
        kept = dataclasses.replace(
            rows,
            cluster_P=rows.cluster_P[index_P],
            id_P=rows.id_P[index_P],
            first_P=rows.first_P[index_P],
            tokens_P=rows.tokens_P[index_P],
        )
        found.append((Split(kept), index_P))
    return found


def _cross_fitted(halves: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """[3]: half the sum over experts of each part, with the sign of the difference in the other half.

    They add up to the total variation distance of the loads without the upward bias of its absolute values.
    """
    (first, second), totals = halves, [sum(parts) for parts in halves]
    signs = [np.sign(total_E) for total_E in totals]
    return np.array([(signs[1] @ first[part] + signs[0] @ second[part]) / 4 for part in range(3)])


def _same_id(
    tables: Tables, table: TokenTable, contrast: Contrast, permutations: int, seed: int
) -> tuple[Test | None, str | None]:
    """The test of equal routes of the same id on both sides of a pair, or why there is none."""
    if tables.pair_R is None:
        return None, "not available: the records have no pairs"
    pair_R = np.asarray(tables.pair_R).astype(str)
    kept_R = contrast.kept_R & (pair_R != MISSING)
    rows, row_N, overlap, clusters = same_ids(table, pair_R, contrast.first_R, contrast.unit_R, kept_R)
    if clusters < FEW_CLUSTERS or overlap < LEAST_OVERLAP:
        return None, (
            f"not identified: {clusters} clusters have a pair with the same token id on both sides "
            f"({100 * overlap:.1f} % of the tokens); {FEW_CLUSTERS} clusters and {100 * LEAST_OVERLAP:.0f} % are needed"
        )
    unit_A = np.zeros(rows.clusters, np.int64)
    unit_A[np.unique(pair_R, return_inverse=True)[1][kept_R]] = contrast.unit_R[kept_R]
    found = [
        same_id_differences(rows, table.choices(layer, row_N, len(rows.tokens_P)), unit_A, contrast.units)
        for layer in range(tables.counts_RLE.shape[1])
    ]
    values_UX = np.concatenate(found, axis=1)
    values_UX = values_UX[np.isfinite(values_UX).all(1)]
    rng = generator(seed, contrast.name, "same id")
    return compare(Comparison(values_CX=values_UX), rng, permutations), None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """Beyond geometry: the divergence of the groups' loads, compared with that of random routers.

    Attributes:
      percentile_L: 0 to 100, random routers with a smaller divergence. p_L: adjusted for all layers.
    """

    percentile_L: np.ndarray
    p_L: np.ndarray


def geometry(tables: Tables, contrast: Contrast) -> Geometry | None:
    """Compares with random routers that read the same hidden states; None below LEAST_ROUTERS of them.

    Under the null hypothesis the router is one more of them. Each divergence is compared with the mean and standard
    deviation of all M + 1, and the largest over the layers adjusts: p = (1 + b) / (1 + M).
    """
    routers = tables.random_RMLE
    if routers is None or routers.shape[1] < LEAST_ROUTERS:
        return None
    found = [_plugin(contrast, tables.counts_RLE)]
    found += [_plugin(contrast, routers[:, router]) for router in range(routers.shape[1])]
    jsd_ML = np.array(found)
    spread_L = jsd_ML.std(0)
    score_ML = (jsd_ML - jsd_ML.mean(0)) / np.where(spread_L > 0, spread_L, np.inf)
    own_L, largest_M = score_ML[0], score_ML[1:].max(1)
    reached_L = (largest_M[:, None] >= own_L).sum(0)
    below_L = (jsd_ML[1:] < jsd_ML[0]).mean(0) + (jsd_ML[1:] == jsd_ML[0]).mean(0) / 2
    return Geometry(percentile_L=100 * below_L, p_L=(1 + reached_L) / (1 + len(largest_M)))


def _plugin(contrast: Contrast, counts_RLE: np.ndarray) -> np.ndarray:
    lead, trail = contrast.loads(counts_RLE)
    return jensen_shannon(lead.mean(0), trail.mean(0))


def learned(tables: Tables, contrast: Contrast, permutations: int, seed: int) -> Test | None:
    """Test of the change of the difference since the base model's recording; None if there is none."""
    if tables.baseline_RLE is None:
        return None
    after, before = (contrast.comparison(counts) for counts in (tables.counts_RLE, tables.baseline_RLE))
    change = dataclasses.replace(after, values_CX=after.values_CX - before.values_CX)
    return compare(change, generator(seed, contrast.name, "learned"), permutations, limit=2.0)


def knockout_interactions(
    tables: Tables, contrast: Contrast, delta_RX: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0
) -> Test | None:
    """Test of the interaction of knock-outs with the groups, adjusted for all that were tried.

    Args:
      delta_RX: change of the record's NLL in nats per token, for each expert that was knocked out.

    Returns:
      None if a group has fewer than MIN_CLUSTERS clusters.
    """
    if min(contrast.clusters.values()) < MIN_CLUSTERS:
        return None
    tokens_R11 = np.asarray(tables.tokens_R, np.float64)[:, None, None]
    lead, trail = contrast.sums(np.asarray(delta_RX)[:, None] * tokens_R11)
    tokens = contrast.sums(tokens_R11)
    mean = [x[:, 0] / np.where(count[:, 0] > 0, count[:, 0], 1) for x, count in zip((lead, trail), tokens, strict=True)]
    values_UX = mean[0] - mean[1] if contrast.side_U is None else mean[0] + mean[1]
    comparison = Comparison(values_CX=values_UX, first_C=contrast.side_U, stratum_C=contrast.stratum_U)
    return compare(comparison, generator(seed, contrast.name, "knock-out"), permutations, limit=float("inf"))
