"""Which experts are chosen together: all pairs of a token's set, compared with random sets of the same loads.

Two experts that are chosen often are also chosen together often. The comparison keeps what does not concern pairs: the
size of each token's set, and how often each record's tokens chose each expert. Random sets with both come from
curveball trades (Strona et al., Nature Communications 5, 2014): two tokens of a record pool the experts that only one
of them has, and each gets back as many at random.

Letters: N tokens, K experts of a token, E experts.
"""

import dataclasses

import numpy as np
from scipy.special import ndtr

MIXING = 10
"""Rounds of trades before the first sample: in a round each token trades with one other of its record."""
BETWEEN = 2
"""Rounds between samples."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Coactivation:
    """For each pair of experts, symmetric with a diagonal of NaN.

    Attributes:
      together_EE: tokens that have both. expected_EE: their mean over random sets.
      lift_EE: together over expected; 1 is chance, NaN if never expected.
      p_EE: two-sided, with a normal approximation to the random sets.
    """

    together_EE: np.ndarray
    expected_EE: np.ndarray
    lift_EE: np.ndarray
    p_EE: np.ndarray


def sets(experts_NK: np.ndarray, experts: int) -> np.ndarray:
    """[N, E] bool: whether the token has the expert. Other numbers than 0 to E-1 mark slots without an expert."""
    numbers_NK = np.asarray(experts_NK, np.int64)
    numbers_NK = np.where((numbers_NK < 0) | (numbers_NK >= experts), experts, numbers_NK)
    chosen_NX = np.zeros((len(numbers_NK), experts + 1), bool)
    np.put_along_axis(chosen_NX, numbers_NK, True, axis=1)
    return np.ascontiguousarray(chosen_NX[:, :experts])


def partners(record_N: np.ndarray) -> np.ndarray:
    """Where the first token of each pair is, if the tokens are ordered by record; the second is the next one."""
    sorted_N = np.sort(record_N)
    starts = np.flatnonzero(np.r_[True, np.diff(sorted_N) != 0])
    rank_N = np.arange(len(sorted_N)) - np.repeat(starts, np.diff(np.r_[starts, len(sorted_N)]))
    lead_M = np.flatnonzero(rank_N[:-1] % 2 == 0)
    return lead_M[sorted_N[lead_M] == sorted_N[lead_M + 1]]


def trade(chosen_NE: np.ndarray, record_N: np.ndarray, partners_M: np.ndarray, rng: np.random.Generator) -> None:
    """One round of trades between random tokens of each record, in place. Set sizes and each record's loads stay."""
    order_N = np.argsort(record_N + rng.random(len(record_N)))
    lead, trail = order_N[partners_M], order_N[partners_M + 1]
    first_ME, second_ME = chosen_NE[lead], chosen_NE[trail]
    pool_ME = first_ME ^ second_ME
    own_M1 = (first_ME & pool_ME).sum(1, keepdims=True)
    key_ME = np.where(pool_ME, rng.random(pool_ME.shape, np.float32), np.float32(2))
    rank_ME = key_ME.argsort(1).argsort(1)
    given_ME = pool_ME & (rank_ME < own_M1)
    chosen_NE[lead] = (first_ME & ~pool_ME) | given_ME
    chosen_NE[trail] = (second_ME & ~pool_ME) | (pool_ME & ~given_ME)


def coactivation(
    experts_NK: np.ndarray, record_N: np.ndarray, experts: int, rng: np.random.Generator, samples: int = 40
) -> Coactivation:
    """Lift of every pair over random sets with the same sizes and the same loads in each record."""
    chosen_NE = sets(experts_NK, experts)
    together_EE = _together(chosen_NE)
    partners_M, drawn = partners(record_N), []
    for sample in range(samples):
        for _ in range(BETWEEN if sample else MIXING):
            trade(chosen_NE, record_N, partners_M, rng)
        drawn.append(_together(chosen_NE))
    drawn_SEE = np.array(drawn)
    expected_EE, spread_EE = drawn_SEE.mean(0), drawn_SEE.std(0, ddof=1)
    lift_EE = np.where(expected_EE > 0, together_EE / np.where(expected_EE > 0, expected_EE, 1), np.nan)
    # the mean of the samples has an error as well
    score_EE = (together_EE - expected_EE) / np.where(spread_EE > 0, spread_EE * np.sqrt(1 + 1 / samples), np.inf)
    p_EE = 2 * ndtr(-np.abs(score_EE))
    for array_EE in (lift_EE, p_EE, expected_EE, together_EE):
        np.fill_diagonal(array_EE, np.nan)
    return Coactivation(together_EE=together_EE, expected_EE=expected_EE, lift_EE=lift_EE, p_EE=p_EE)


def _together(chosen_NE: np.ndarray) -> np.ndarray:
    as_float_NE = chosen_NE.astype(np.float32)
    return (as_float_NE.T @ as_float_NE).astype(np.float64)
