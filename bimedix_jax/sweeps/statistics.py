"""Statistics of paired differences over seeds."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
EXACT = 16
"""Most seeds whose 2**n signs are all tried; with more, RESAMPLES signs are drawn with a fixed seed."""
RESAMPLES = 99_999


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its 95 % interval over seeds by Student's t; None with one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def paired(differences: Sequence[float]) -> Difference:
    values = np.asarray(differences, float)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Difference(mean, None, None, count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return Difference(mean, mean - half, mean + half, count)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the hypothesis that each difference is as likely with the other sign.

    Exact: the share of all 2**n choices of signs whose mean is at least as far from 0.
    """
    values = np.asarray(differences, float)
    if len(values) < 2 or not values.any():
        return 1.0
    resamples = 2 ** len(values) if len(values) <= EXACT else RESAMPLES
    found = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Standard errors of a mean difference, by what is drawn again: seeds, records, or both."""

    seeds: float
    records: float
    both: float


def standard_errors(nats_SR: np.ndarray, weights_R: np.ndarray) -> Errors:
    """Two-way clustered standard errors of a weighted mean (Cameron, Gelbach and Miller 2011): seeds plus records,
    minus what they share.

    Args:
      nats_SR: the difference of each record with each seed, in nats.
      weights_R: tokens or bytes of each record. The difference is the sum of nats over seeds and records, divided by
        the sum of weights.
    """
    seeds, records = nats_SR.shape
    if seeds < 2 or records < 2:
        return Errors(math.nan, math.nan, math.nan)
    mean = nats_SR.sum() / (seeds * weights_R.sum())
    # influence of each (seed, record) on the ratio of sums
    influence_SR = (nats_SR - mean * weights_R) / (seeds * weights_R.sum())
    of_seeds = seeds / (seeds - 1) * float(np.sum(influence_SR.sum(axis=1) ** 2))
    of_records = records / (records - 1) * float(np.sum(influence_SR.sum(axis=0) ** 2))
    shared = float(np.sum(influence_SR**2))
    both = max(of_seeds, of_records, of_seeds + of_records - shared)
    return Errors(math.sqrt(of_seeds), math.sqrt(of_records), math.sqrt(both))
