"""Tests over clusters: studentised differences, permuted labels or signs, max-T over cells, Holm over questions.

Differences are divided by their standard error over clusters before labels are permuted (Chung and Romano, Annals of
Statistics 41, 2013), and adjusted by Westfall and Young's step-down max-T (1993), p = (1 + b) / (1 + B). That is exact
for exchangeable clusters, and for large groups also if the groups differ in size and variance. It is not enough for 20
clusters with skewed shares: the tails of their means are longer than those of a mixture of both groups, and the largest
of 32 cells is in those tails. In 24 % of data sets of 60 against 20 clusters it then finds a false positive
(docs/results/routing_statistics.md). So the same adjustment is also made with bootstrap-t deviations, in which each
group keeps its own variance and skewness, and the larger of the two p-values counts.

Letters: C clusters, X cells (layers x experts), B permutations or resamples.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.special import ndtri

from bimedix_jax.routing.clusters import Comparison, blocks
from bimedix_jax.routing.intervals import bootstrap_t, resampled_t

PERMUTATIONS = 1999
TIED = 1e-9
"""Statistics that differ by less, relatively, are equal: a permutation may repeat the observed labels."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Test:
    """The result for each cell.

    Attributes:
      estimate_X, error_X: the difference and its standard error over clusters.
      t_X: their ratio; 0 in a cell without variation.
      p_X: adjusted for all cells.
      low_X, high_X: 95 % intervals (bootstrap-t), not adjusted for the number of cells.
      largest: the largest |t| over the cells in each permutation, and in each resample.
      freedom_X: Welch's degrees of freedom.
    """

    estimate_X: np.ndarray
    error_X: np.ndarray
    t_X: np.ndarray
    p_X: np.ndarray
    low_X: np.ndarray
    high_X: np.ndarray
    largest: tuple[np.ndarray, ...]
    freedom_X: np.ndarray

    def critical(self, alpha: float) -> float:
        """|t| from which on a cell is significant, adjusted for all cells."""
        return max(critical_value(largest_B, alpha) for largest_B in self.largest)


def compare(
    comparison: Comparison, rng: np.random.Generator, permutations: int = PERMUTATIONS, limit: float = 1.0
) -> Test:
    """Tests every cell, adjusted for all of them.

    Args:
      permutations: also the number of resamples.
      limit: the largest possible magnitude of a difference; intervals end there.

    Raises:
      ValueError: a group has fewer than two clusters, or no stratum has clusters of both groups.
    """
    if min(comparison.sizes) < 2:
        raise ValueError(f"groups of {comparison.sizes} clusters have no variance; each needs at least two")
    if comparison.first_C is None:
        estimate_X, error_X, freedom_X, permuted = _signs(comparison.values_CX, rng, permutations)
    else:
        estimate_X, error_X, freedom_X, permuted = _labels(comparison, rng, permutations)
    t_X = _ratio(estimate_X, error_X)
    permuted_p_X, permuted_B = step_down(t_X, permuted)
    t_BX = resampled_t(comparison, rng, permutations)
    resampled_p_X, resampled_B = step_down(t_X, in_blocks(t_BX))
    low_X, high_X = bootstrap_t(estimate_X, error_X, t_BX, limit=limit)
    return Test(
        estimate_X=estimate_X,
        error_X=error_X,
        t_X=t_X,
        p_X=np.maximum(permuted_p_X, resampled_p_X),
        low_X=low_X,
        high_X=high_X,
        largest=(permuted_B, resampled_B),
        freedom_X=freedom_X,
    )


def _ratio(estimate_X: np.ndarray, error_X: np.ndarray) -> np.ndarray:
    return estimate_X / np.where(error_X > 0, error_X, np.inf)


def in_blocks(t_BX: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of an array of statistics, as many at a time as `step_down` should copy."""
    start = 0
    for size in blocks(*t_BX.shape):
        yield t_BX[start : start + size]
        start += size


def step_down(t_X: np.ndarray, permuted: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Adjusted p-values by Westfall and Young's step-down max-T, and the largest |t| of each permutation.

    Args:
      permuted: blocks [b, X] of statistics under permutation.
    """
    size_X = np.abs(t_X)
    order_X = np.argsort(-size_X, kind="stable")
    reached_X, largest, total = np.zeros(len(t_X)), [], 0
    for t_bX in permuted:
        sorted_bX = np.abs(t_bX)[:, order_X]
        tail_bX = np.maximum.accumulate(sorted_bX[:, ::-1], axis=1)[:, ::-1]  # the largest of this and lesser cells
        reached_X += (tail_bX >= size_X[order_X] * (1 - TIED)).sum(0)
        largest.append(tail_bX[:, 0])
        total += len(t_bX)
    p_X = np.empty(len(t_X))
    p_X[order_X] = np.maximum.accumulate((1 + reached_X) / (1 + total))
    return p_X, np.concatenate(largest)


def critical_value(largest_B: np.ndarray, alpha: float) -> float:
    """The least |t| with an adjusted p-value of at most alpha, in the limit of values that lie densely."""
    allowed = int(np.floor(alpha * (1 + len(largest_B)) + TIED)) - 1  # b may be at most this
    return float("inf") if allowed < 0 else float(np.sort(largest_B)[::-1][min(allowed, len(largest_B) - 1)])


def _labels(
    comparison: Comparison, rng: np.random.Generator, permutations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Iterator[np.ndarray]]:
    """Estimate, error, degrees of freedom, and blocks of statistics under permuted labels."""
    centred_CX, share_C = comparison.within_strata()
    assert comparison.first_C is not None
    if not (share_C * (1 - share_C)).any():
        raise ValueError("no stratum has clusters of both groups")
    first_C = comparison.first_C.astype(np.float64)
    calculate = _studentised(centred_CX, share_C, comparison.sizes)
    estimate_X, error_X = (part[0] for part in calculate(first_C[None]))
    freedom_X = _welch(centred_CX, comparison.first_C)
    strata = comparison.strata()

    def permuted() -> Iterator[np.ndarray]:
        for size in blocks(permutations, max(centred_CX.shape)):
            labels_bC = np.tile(first_C, (size, 1))
            for member_S in strata:
                labels_bC[:, member_S] = rng.permuted(labels_bC[:, member_S], axis=1)
            difference_bX, spread_bX = calculate(labels_bC)
            yield _ratio(difference_bX, spread_bX)

    return estimate_X, error_X, freedom_X, permuted()


def _studentised(
    centred_CX: np.ndarray, share_C: np.ndarray, sizes: tuple[int, ...]
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A function from labels [b, C] (1.0 in the first group) to differences and their standard errors, both [b, X].

    The difference is the coefficient of the label in a regression on label and stratum, and its error the
    heteroscedasticity-robust one, with n / (n - 1) by group. Without strata that is the difference of two means with
    Welch's error. The sums over clusters are products of matrices: residuals are never formed.
    """
    lead, trail = (n / max(n - 1, 1) for n in sizes)
    above_C, below_C = 1 - share_C, share_C  # a label less the mean label of its stratum is `above` or `-below`
    total = float((above_C * below_C).sum())  # the labels' sum of squares, which no permutation changes
    squares_CX = centred_CX**2
    by_label_CX = (lead * above_C**2 - trail * below_C**2)[:, None] * squares_CX
    always_X = trail * (below_C**2) @ squares_CX
    cubes_CX = (lead * above_C**3 + trail * below_C**3)[:, None] * centred_CX
    always_cubes_X = trail * (below_C**3) @ centred_CX
    floor_X = TIED * np.sqrt(squares_CX.mean(0))

    def calculate(labels_bC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        difference_bX = labels_bC @ centred_CX / total
        first_bX = labels_bC @ by_label_CX + always_X
        second_bX = labels_bC @ cubes_CX - always_cubes_X
        fourth_b1 = labels_bC @ (lead * above_C**4 - trail * below_C**4)[:, None] + trail * (below_C**4).sum()
        variance_bX = first_bX - 2 * difference_bX * second_bX + difference_bX**2 * fourth_b1
        return difference_bX, np.maximum(np.sqrt(np.maximum(variance_bX, 0)) / total, floor_X)

    return calculate


def _signs(
    values_CX: np.ndarray, rng: np.random.Generator, permutations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Iterator[np.ndarray]]:
    """As `_labels`, for differences within clusters whose signs are flipped."""
    values_CX = np.asarray(values_CX, np.float64)
    clusters, cells = values_CX.shape
    square_X = (values_CX**2).mean(0)
    floor_X = TIED * np.sqrt(square_X)

    def error(mean_bX: np.ndarray) -> np.ndarray:
        return np.maximum(np.sqrt(np.maximum(square_X - mean_bX**2, 0) / (clusters - 1)), floor_X)

    def permuted() -> Iterator[np.ndarray]:
        for size in blocks(permutations, max(clusters, cells)):
            mean_bX = _flips(rng, size, clusters) @ values_CX / clusters
            spread_bX = error(mean_bX)
            yield _ratio(mean_bX, spread_bX)

    estimate_X = values_CX.mean(0)
    return estimate_X, error(estimate_X), np.full(cells, clusters - 1.0), permuted()


def flipped_sums(
    scores_CX: np.ndarray, scaled_CX: np.ndarray, rng: np.random.Generator, permutations: int = PERMUTATIONS
) -> tuple[np.ndarray, np.ndarray]:
    """Statistics [X] and adjusted p-values [X] of "the scores have mean zero" (the wild bootstrap of scores).

    Args:
      scores_CX: independent between clusters; they add up to the statistic.
      scaled_CX: the same, scaled so that their squares estimate the variance of the sum. Their signs are flipped.
    """
    clusters, cells = scores_CX.shape
    error_X = np.sqrt((scaled_CX**2).sum(0))
    error_X[error_X <= TIED * np.abs(scaled_CX).max(initial=0)] = 0  # rounding

    def permuted() -> Iterator[np.ndarray]:
        for size in blocks(permutations, max(clusters, cells)):
            yield _ratio(_flips(rng, size, clusters) @ scaled_CX, error_X)

    t_X = _ratio(scores_CX.sum(0), error_X)
    return t_X, step_down(t_X, permuted())[0]


def _flips(rng: np.random.Generator, size: int, clusters: int) -> np.ndarray:
    return rng.integers(0, 2, (size, clusters), np.int8) * 2.0 - 1.0


def _welch(values_CX: np.ndarray, first_C: np.ndarray) -> np.ndarray:
    """Welch and Satterthwaite's degrees of freedom; the smaller group's where nothing varies."""
    parts = [values_CX[chosen] for chosen in (first_C, ~first_C)]
    squared = [part.var(0, ddof=1) / len(part) for part in parts]
    below = sum(square**2 / (len(part) - 1) for square, part in zip(squared, parts, strict=True))
    least = float(min(len(part) for part in parts) - 1)
    return np.where(below > 0, sum(squared) ** 2 / np.where(below > 0, below, 1), least)


def detectable(test: Test, alpha: float, power: float = 0.8) -> np.ndarray:
    """The minimum detectable effect [X]: the difference that the adjusted test finds with this probability.

    |t| must reach the critical value c of the largest statistic. The statistic around its non-centrality has a variance
    of about 1 + c**2 / (2 df), because the error in its denominator is estimated.
    """
    critical = test.critical(alpha)
    spread_X = np.sqrt(1 + critical**2 / (2 * test.freedom_X))
    return test.error_X * (critical + ndtri(power) * spread_X)


def equivalent(test: Test, alpha: float, margin: float) -> np.ndarray:
    """[X]: whether the interval of all cells simultaneously lies within the margin."""
    return np.abs(test.estimate_X) + test.critical(alpha) * test.error_X < margin


def holm(p_QX: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Adjusts the p-values of several questions, each already adjusted within, for their number (Holm 1979)."""
    least = [float(p_X.min(initial=1.0)) for p_X in p_QX]
    adjusted: list[np.ndarray] = [np.empty(0)] * len(least)
    reached = 0.0
    for rank, question in enumerate(np.argsort(least, kind="stable")):
        factor = len(least) - rank
        adjusted[question] = np.minimum(np.maximum(p_QX[question] * factor, reached), 1.0)
        reached = max(reached, min(factor * least[question], 1.0))
    return adjusted


def benjamini_hochberg(p_X: np.ndarray) -> np.ndarray:
    """q-values: the false discovery rate at which each would be found."""
    order_X = np.argsort(p_X, kind="stable")
    scaled_X = p_X[order_X] * len(p_X) / np.arange(1, len(p_X) + 1)
    q_X = np.empty(len(p_X))
    q_X[order_X] = np.minimum(np.minimum.accumulate(scaled_X[::-1])[::-1], 1.0)
    return q_X
