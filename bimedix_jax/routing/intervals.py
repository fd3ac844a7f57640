"""Intervals over clusters: bootstrap-t, intra-class correlation and design effect, bounds for what never occurred.

Letters: C clusters, X cells, B resamples.
"""

import numpy as np
from scipy.special import betaincinv

from bimedix_jax.routing.clusters import Comparison, blocks, resampled_weights

RESAMPLES = 1999
COLUMNS = 256
"""Cells whose quantiles are computed at a time."""
LEAST_ERROR = 0.2
"""A resample's standard error is at least this share of the sample's.

Without it, an expert that one cluster uses has an infinite interval: a third of the resamples lack that cluster.
"""


def resampled_t(comparison: Comparison, rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """[B, X] float32: studentised deviations of the differences of resamples from the sample's difference.

    Clusters are drawn with replacement within their group (Efron and Tibshirani 1993, section 12.5).
    """
    parts = comparison.parts()
    cells, start = parts[0].shape[1], 0
    t_BX = np.empty((resamples, cells), np.float32)
    for size in blocks(resamples, max(cells, len(comparison.values_CX))):
        weights = [resampled_weights(len(part), size, rng) for part in parts]
        t_BX[start : start + size] = _deviations(parts, weights)
        start += size
    return t_BX


def _deviations(parts: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
    shift_BX, spread_BX, variance_X = 0.0, 0.0, np.zeros(parts[0].shape[1])
    for sign, part_CX, weight_BC in zip((1.0, -1.0), parts, weights, strict=False):
        clusters = len(part_CX)
        centred_CX = part_CX - part_CX.mean(0)
        moved_BX = weight_BC @ centred_CX / clusters
        square_BX = weight_BC @ centred_CX**2 / clusters
        shift_BX = shift_BX + sign * moved_BX
        spread_BX = spread_BX + np.maximum(square_BX - moved_BX**2, 0) / (clusters - 1)
        variance_X += (centred_CX**2).mean(0) / (clusters - 1)
    least_X = np.where(variance_X > 0, LEAST_ERROR * np.sqrt(variance_X), 1.0)
    return shift_BX / np.maximum(np.sqrt(spread_BX), least_X)


def bootstrap_t(
    estimate_X: np.ndarray, error_X: np.ndarray, t_BX: np.ndarray, level: float = 0.95, limit: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Ends [X] of the intervals of differences, from the deviations of `resampled_t`.

    Args:
      limit: the largest possible magnitude of a difference; intervals end there. inf if there is none.
    """
    low_X, high_X = np.empty((2, len(estimate_X)))
    for start in range(0, len(estimate_X), COLUMNS):
        block = slice(start, start + COLUMNS)
        lower_X, upper_X = np.quantile(t_BX[:, block], [(1 - level) / 2, (1 + level) / 2], axis=0)
        low_X[block] = estimate_X[block] - upper_X * error_X[block]
        high_X[block] = estimate_X[block] - lower_X * error_X[block]
    return np.clip(low_X, -limit, limit), np.clip(high_X, -limit, limit)


def mean_intervals(values_CX: np.ndarray, rng: np.random.Generator, level: float = 0.95) -> np.ndarray:
    """[X, 3]: the mean over clusters of each column, with the ends of its bootstrap-t interval.

    The ends are NaN below clusters.MIN_CLUSTERS.
    """
    values_CX = np.asarray(values_CX, np.float64)
    comparison = Comparison(values_CX=values_CX)
    found_X3 = np.full((values_CX.shape[1], 3), np.nan)
    if len(values_CX):
        found_X3[:, 0] = values_CX.mean(0)
    if comparison.enough:
        error_X = values_CX.std(0, ddof=1) / np.sqrt(len(values_CX))
        t_BX = resampled_t(comparison, rng)
        found_X3[:, 1:] = np.transpose(bootstrap_t(found_X3[:, 0], error_X, t_BX, level, float("inf")))
    return found_X3


def intraclass(counts_CX: np.ndarray, tokens_C: np.ndarray, group_C: np.ndarray) -> tuple[float | None, float | None]:
    """Intra-class correlation of "this token chose this expert" within clusters, pooled over cells, and design effect.

    The analysis-of-variance estimator with clusters nested in groups. The design effect is 1 + (m - 1) icc with the
    token-weighted mean size m of a cluster. None if there are too few clusters, or no variation.

    Args:
      counts_CX: choices of each cell by the cluster's tokens, each of which chooses an expert at most once.
      tokens_C: number of tokens. group_C: the cluster's group.
    """
    groups, index_C = np.unique(group_C, return_inverse=True)
    tokens_C = np.asarray(tokens_C, np.float64)
    clusters, total = len(tokens_C), tokens_C.sum()
    if clusters <= len(groups) or total <= clusters:
        return None, None
    share_CX = counts_CX / tokens_C[:, None]
    belongs_GC = (index_C == np.arange(len(groups))[:, None]).astype(np.float64)
    tokens_G = belongs_GC @ tokens_C
    mean_GX = belongs_GC @ counts_CX / tokens_G[:, None]
    between = float((tokens_C[:, None] * (share_CX - mean_GX[index_C]) ** 2).sum()) / (clusters - len(groups))
    within = float((tokens_C[:, None] * share_CX * (1 - share_CX)).sum()) / (total - clusters)
    size = (total - (belongs_GC @ tokens_C**2 / tokens_G).sum()) / (clusters - len(groups))
    spread = between + (size - 1) * within
    if spread <= 0:
        return None, None
    icc = (between - within) / spread
    return icc, max(1 + ((tokens_C**2).sum() / total - 1) * icc, 0.0)


def never_chosen_bound(clusters: int, level: float = 0.95) -> float:
    """Upper bound of the share of clusters that use an expert which none of `clusters` clusters used.

    (1 - bound)**clusters = 1 - level, so it is about 3 / clusters.
    """
    return float(1 - (1 - level) ** (1 / clusters)) if clusters else 1.0


def binomial_upper(successes: int, trials: int, level: float = 0.95) -> float:
    """One-sided upper bound of a proportion (Clopper and Pearson 1934)."""
    return 1.0 if successes >= trials else float(betaincinv(successes + 1, trials - successes, level))
