"""Statistics of answers: intervals, paired tests, the smallest difference that a task can show, calibration, agreement.

A question is the unit that is drawn again. Questions that belong together, such as one in two languages, form a cluster
and are drawn together. All random numbers come from fixed seeds, so the same answers give the same numbers.

Letters: N questions, X columns, B resamples.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
ALPHA, POWER = 0.05, 0.8
RESAMPLES = 9_999
CURVE_RESAMPLES = 999
"""For the calibration error, whose resamples are sums over thousands of questions."""
BINS = 10
FEW = 20
"""With fewer questions that one model alone answers, resamples vary too little: of 200 simulated sets of 265 questions
with about 13 such questions, the 95 % interval contained the difference in 88 %. Without any it has no width."""

MIN_QUESTIONS = 10
"""Fewest questions for a bootstrap interval of a calibration error or of kappa."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self, name: str) -> dict[str, Any]:
        """The fields for JSON; `name` is that of the estimate."""
        return {name: self.value, "low": self.low, "high": self.high}

    def bootstrapped(self, name: str, n: int) -> dict[str, Any]:
        """`to_dict` of a bootstrap interval over `n` questions: without ends for few questions (MIN_QUESTIONS), and
        where all resamples are equal, which says nothing about other questions."""
        known = n >= MIN_QUESTIONS and self.low < self.high
        return self.to_dict(name) if known else {name: self.value, "low": None, "high": None}


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two models on the same questions: B's accuracy minus A's.

    Attributes:
      difference: with the interval of the paired bootstrap, or of Agresti and Min for few differing answers (FEW).
      only_a, only_b: questions that one of them answers correctly and the other does not.
      clusters: number of clusters, n if each question is its own.
      p: McNemar's exact test, two-sided; if questions form clusters, its form for clusters (`sign_flips`).
      p_bootstrap: twice the share of resamples on the other side of zero.
    """

    difference: Interval
    only_a: int
    only_b: int
    n: int
    clusters: int
    p: float
    p_bootstrap: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How well confidence predicts correctness.

    Attributes:
      error: expected calibration error (Guo et al. 2017) over BINS bins of equal width, with a bootstrap interval.
      by_chance: mean error of a perfectly calibrated model with the same confidences. The error of few questions is
        large even then, so only what exceeds this tells anything.
      bins: for each bin that has questions: low, high, n, confidence, accuracy.
    """

    error: Interval
    by_chance: float
    bins: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        count = sum(int(row["n"]) for row in self.bins)
        return {**self.error.bootstrapped("ece", count), "ece_by_chance": self.by_chance, "bins": self.bins}


def resampled_means(
    values_NX: np.ndarray, clusters_N: np.ndarray | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """[B, X]: means over questions whose clusters are drawn with replacement (Efron 1979)."""
    values_NX = np.asarray(values_NX, np.float64)
    labels_N = np.arange(len(values_NX)) if clusters_N is None else np.asarray(clusters_N)
    _, index_N = np.unique(labels_N, return_inverse=True)
    sums_CX = np.zeros((index_N.max() + 1, values_NX.shape[1] + 1))
    np.add.at(sums_CX, index_N, np.column_stack([values_NX, np.ones(len(values_NX))]))
    drawn_BX = _drawn(sums_CX, seed, resamples)
    return drawn_BX[:, :-1] / drawn_BX[:, -1:]


def percentiles(drawn_B: np.ndarray, value: float) -> Interval:
    """The percentile interval of an estimate from its resamples."""
    low, high = np.quantile(drawn_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def wilson(share: float, n: int) -> Interval:
    """A share of `n` questions with Wilson's interval (Wilson 1927), which has a width for 0 and 1 too.

    For questions that form clusters, `n` is the number of clusters: a question and its translation count as one.
    """
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share))


Task = tuple[np.ndarray, Sequence[Any]]
"""The value of each question of a task, and its cluster."""


def average_interval(strata: Sequence[Sequence[Task]], seed: int = 0) -> Interval:
    """The unweighted mean of the means of tasks, with its bootstrap interval. Clusters are drawn within each stratum.

    Args:
      strata: the tasks that have clusters in common, such as a task in two languages, and the others alone.
    """
    total_B, count = np.zeros(RESAMPLES), 0
    means: list[float] = []
    for place, tasks in enumerate(strata):
        sums_CT, sizes_CT = _by_cluster(tasks)
        means += [float(np.mean(values_N)) for values_N, _ in tasks]
        drawn_BX = _drawn(np.stack([sums_CT, sizes_CT], axis=2).reshape(len(sums_CT), -1), seed + place, RESAMPLES)
        total_B += (drawn_BX[:, ::2] / np.maximum(drawn_BX[:, 1::2], 1.0)).sum(axis=1)
        count += len(tasks)
    return percentiles(total_B / count, float(np.mean(means)))


def combined(strata: Sequence[Sequence[tuple[Task, Interval]]]) -> Interval:
    """The unweighted mean of the means of tasks, with an interval from those of the tasks.

    For few right or few differing answers, where resamples vary too little. Each distance to an end counts like a
    standard error, with the correlation between tasks that have clusters in common; it is taken as 1 where it is not
    known. Source: Zou and Donner, Statistics in Medicine 27, 2008 (MOVER).
    """
    values = [interval.value for tasks in strata for _, interval in tasks]
    below = above = 0.0
    for tasks in strata:
        alike_TT = _correlations([task for task, _ in tasks])
        down_T = np.array([interval.value - interval.low for _, interval in tasks])
        up_T = np.array([interval.high - interval.value for _, interval in tasks])
        below += max(float(down_T @ alike_TT @ down_T), 0.0)
        above += max(float(up_T @ alike_TT @ up_T), 0.0)
    mean, count = float(np.mean(values)), len(values)
    return Interval(mean, mean - math.sqrt(below) / count, mean + math.sqrt(above) / count)


def _by_cluster(tasks: Sequence[Task]) -> tuple[np.ndarray, np.ndarray]:
    """[C, T] twice: sums of the values of each cluster, and numbers of its questions."""
    labels = sorted({label for _, clusters in tasks for label in clusters})
    number = {label: row for row, label in enumerate(labels)}
    sums_CT, sizes_CT = np.zeros((len(labels), len(tasks))), np.zeros((len(labels), len(tasks)))
    for column, (values_N, clusters) in enumerate(tasks):
        rows = [number[label] for label in clusters]
        np.add.at(sums_CT, (rows, column), np.asarray(values_N, np.float64))
        np.add.at(sizes_CT, (rows, column), 1.0)
    return sums_CT, sizes_CT


def _correlations(tasks: Sequence[Task]) -> np.ndarray:
    """[T, T]: correlations of the means of tasks over their clusters; 1 where a task's values are all equal."""
    sums_CT, sizes_CT = _by_cluster(tasks)
    apart_CT = sums_CT - sizes_CT * (sums_CT.sum(axis=0) / sizes_CT.sum(axis=0))
    norm_T = np.sqrt((apart_CT**2).sum(axis=0))
    known_TT = np.outer(norm_T, norm_T) > 1e-12
    alike_TT = np.where(known_TT, apart_CT.T @ apart_CT / np.where(known_TT, np.outer(norm_T, norm_T), 1.0), 1.0)
    np.fill_diagonal(alike_TT, 1.0)
    return alike_TT


def _drawn(sums_CX: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """[B, X]: sums over clusters that are drawn with replacement.

    Equal clusters are counted and their numbers are drawn at once, which is the same distribution and much faster.
    """
    kinds_KX, counts_K = np.unique(sums_CX, axis=0, return_counts=True)
    total = int(counts_K.sum())
    return np.random.default_rng(seed).multinomial(total, counts_K / total, size=resamples) @ kinds_KX


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: of the questions that one model alone answers, each is as likely A's as B's.

    Source: McNemar, Psychometrika 12, 1947; the binomial test of the discordant pairs.
    """
    return float(stats.binomtest(only_b, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def sign_flips(sums_C: np.ndarray) -> float:
    """Two-sided p of the exact test that the difference of each cluster is as likely A's as B's.

    McNemar's test if each cluster has one question. The distribution of the sum over all choices of signs is computed
    in full, by clusters of equal size.

    Args:
      sums_C: right answers of B minus those of A in each cluster, whole numbers.
    """
    sizes, counts = np.unique(np.abs(sums_C[sums_C != 0]).astype(int), return_counts=True)
    shares = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        own = np.zeros(2 * size * count + 1)
        own[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        shares = np.convolve(shares, own)
    most = len(shares) // 2
    beyond = np.abs(np.arange(len(shares)) - most) >= abs(round(float(sums_C.sum())))
    return min(1.0, float(shares[beyond].sum()))


def paired(a_N: np.ndarray, b_N: np.ndarray, clusters_N: np.ndarray | None = None, seed: int = 0) -> Paired:
    """Compares the answers of two models to the same questions in the same order, 1 where correct and 0 otherwise."""
    a_N, b_N = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
    drawn_B = resampled_means((b_N - a_N)[:, None], clusters_N, seed)[:, 0]
    only_a, only_b = int(np.sum(a_N > b_N)), int(np.sum(b_N > a_N))
    value, n = float((b_N - a_N).mean()), len(a_N)
    difference, p_bootstrap = percentiles(drawn_B, value), beyond_zero(drawn_B)
    clusters = n if clusters_N is None else len(np.unique(clusters_N))
    if clusters == n:
        difference = agresti_min(only_a, only_b, n) if only_a + only_b < FEW else difference
        return Paired(difference, only_a, only_b, n, n, mcnemar(only_a, only_b), p_bootstrap)
    _, index_N = np.unique(np.asarray(clusters_N), return_inverse=True)
    sums_C = np.bincount(index_N, b_N - a_N)
    own_C = sums_C / np.bincount(index_N)
    if np.count_nonzero(own_C) < FEW:
        difference = _half_added(float(own_C.sum()), float((own_C**2).sum()), clusters, value)
    return Paired(difference, only_a, only_b, n, clusters, sign_flips(sums_C), p_bootstrap)


def agresti_min(only_a: int, only_b: int, n: int) -> Interval:
    """Interval of a paired difference after half a question is added to each cell of the table of both models' answers.

    Source: Agresti and Min, Statistics in Medicine 24, 2005.
    """
    return _half_added(only_b - only_a, only_a + only_b, n, (only_b - only_a) / n)


def _half_added(total: float, squares: float, n: int, value: float) -> Interval:
    """The same from the sum of the differences of `n` questions or clusters and the sum of their squares."""
    centre = total / (n + 2)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(squares + 1 - total**2 / (n + 2)) / (n + 2)
    return Interval(value, max(centre - half, -1.0), min(centre + half, 1.0))


def beyond_zero(drawn_B: np.ndarray) -> float:
    """Two-sided p from resamples of a difference: the level at which the percentile interval begins at zero."""
    least = min(int((drawn_B <= 0).sum()), int((drawn_B >= 0).sum()))
    return min(1.0, 2 * (1 + least) / (1 + len(drawn_B)))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): the family-wise error is bounded however the tests depend on each other."""
    order, adjusted, most = np.argsort(p, kind="stable"), [1.0] * len(p), 0.0
    for rank, place in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = most
    return adjusted


def power_of_mcnemar(n: int, discordant: float, difference: float, alpha: float = ALPHA) -> float:
    """Probability that McNemar's exact test of `n` questions rejects.

    Args:
      discordant: probability that exactly one of the two models is correct. difference: of the accuracies.
    """
    if discordant <= 0:
        return 0.0
    spread = 8 * math.sqrt(n * discordant * (1 - discordant)) + 1  # further out the probabilities are below 1e-14
    counts_M = np.arange(max(0, int(n * discordant - spread)), min(n, int(n * discordant + spread)) + 1)
    # rejects if the rarer side has at most this many: the largest k with 2 P(X <= k) <= alpha
    limit_M = stats.binom.ppf(alpha / 2, counts_M, 0.5).astype(int)
    limit_M = np.where(2 * stats.binom.cdf(limit_M, counts_M, 0.5) <= alpha, limit_M, limit_M - 1)
    share = min(0.5 + difference / (2 * discordant), 1.0)
    below_M = stats.binom.cdf(limit_M, counts_M, share) + stats.binom.cdf(limit_M, counts_M, 1 - share)
    return float(np.sum(stats.binom.pmf(counts_M, n, discordant) * np.where(counts_M > 0, below_M, 0.0)))


def detectable(n: int, discordant: float, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """The smallest difference of two accuracies that McNemar's exact test finds with probability `power`.

    The difference cannot exceed `discordant`. None: even the largest one is found less often.
    """
    if power_of_mcnemar(n, discordant, discordant, alpha) < power:
        return None
    low, high = 0.0, discordant
    while high - low > 1e-4 * discordant:
        middle = (low + high) / 2
        low, high = (low, middle) if power_of_mcnemar(n, discordant, middle, alpha) >= power else (middle, high)
    return high


def unrelated(accuracy: float) -> float:
    """How often exactly one of two models of about this accuracy is correct if their errors are independent.

    Related models disagree less often, so smaller differences can be found between them.
    """
    return 2 * accuracy * (1 - accuracy)


def confidences(logprobs: Sequence[float]) -> list[float]:
    """The share of each option in the probability of all options."""
    values = np.asarray(logprobs, np.float64)
    weights = np.exp(values - values.max())
    return (weights / weights.sum()).tolist()


def calibration(confidence_N: np.ndarray, correct_N: np.ndarray, seed: int = 0) -> Calibration:
    """The calibration of answers, each with the confidence in it and 1 if it is correct."""
    confidence_N, correct_N = np.asarray(confidence_N, np.float64), np.asarray(correct_N, np.float64)
    bin_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    rng = np.random.default_rng(seed)
    count = len(confidence_N)

    def error(gap_N: np.ndarray, bins_N: np.ndarray) -> float:
        return float(np.abs(np.bincount(bins_N, gap_N, BINS)).sum() / count)

    drawn, chance = [], []
    for _ in range(CURVE_RESAMPLES):
        rows_N = rng.integers(0, count, count)
        drawn.append(error((correct_N - confidence_N)[rows_N], bin_N[rows_N]))
        chance.append(error((rng.random(count) < confidence_N) - confidence_N, bin_N))
    bins: list[dict[str, float]] = []
    for number in np.unique(bin_N).tolist():
        own = bin_N == number
        row = {"low": number / BINS, "high": (number + 1) / BINS, "n": int(own.sum())}
        bins.append(row | {"confidence": float(confidence_N[own].mean()), "accuracy": float(correct_N[own].mean())})
    found = percentiles(np.array(drawn), error(correct_N - confidence_N, bin_N))
    return Calibration(found, float(np.mean(chance)), bins)


def kappa(first_N: np.ndarray, second_N: np.ndarray, seed: int = 0) -> Interval:
    """Cohen's kappa of two choices for each question (Cohen 1960), with its bootstrap interval.

    1 is perfect agreement and 0 is what independent choices with these frequencies give. A resample in which agreement
    is certain, since both always choose the same option, counts as 1.
    """
    options, index = np.unique(np.concatenate([first_N, second_N]), return_inverse=True)
    size, count = len(options), len(first_N)
    counts_K = np.bincount(index[:count] * size + index[count:], minlength=size * size)
    drawn_BK = np.random.default_rng(seed).multinomial(count, counts_K / count, size=RESAMPLES)
    found_B = _kappas(np.vstack([counts_K, drawn_BK]).reshape(-1, size, size) / count)
    return percentiles(found_B[1:], float(found_B[0]))


def _kappas(share_BRC: np.ndarray) -> np.ndarray:
    observed_B = np.trace(share_BRC, axis1=1, axis2=2)
    expected_B = (share_BRC.sum(2) * share_BRC.sum(1)).sum(1)
    certain_B = expected_B >= 1 - 1e-12
    return np.where(certain_B, 1.0, (observed_B - expected_B) / np.where(certain_B, 1.0, 1 - expected_B))
