"""Agreement, correlation and bounds: what a few reviewers say about a judge, and about what none of them saw."""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Level = Literal["nominal", "ordinal", "interval"]
Array = NDArray[np.float64]

Z95 = 1.959963984540054
"""The normal distribution's 97.5 % point: two-sided intervals at 95 %."""


_AT_ONCE = 1 << 20
"""Values resampled at a time, which bounds the memory."""


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float | None:
    """Agreement of two raters on the same items beyond chance (Cohen 1960, doi:10.1177/001316446002000104).

    None where it is undefined: no item, or both gave one and the same answer throughout.
    """
    if len(one) != len(other):
        raise ValueError(f"{len(one)} and {len(other)} ratings: both raters must have rated the same items")
    if not one:
        return None
    n = len(one)
    observed = sum(a == b for a, b in zip(one, other, strict=True)) / n
    left, right = Counter(one), Counter(other)
    expected = sum(left[value] * right[value] for value in left) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level = "nominal") -> float | None:
    """Agreement of any number of raters with gaps (Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011).

    `units` holds for each item the ratings it got; items with fewer than two say nothing. None where it is undefined:
    nothing was rated twice, or all ratings are the same.
    """
    paired = [list(unit) for unit in units if len(unit) >= 2]
    values = sorted({value for unit in paired for value in unit})
    if len(values) < 2:
        return None
    place = {value: index for index, value in enumerate(values)}
    coincidence_VV = np.zeros((len(values), len(values)))
    for unit in paired:
        for a, b in itertools.permutations(unit, 2):
            coincidence_VV[place[a], place[b]] += 1 / (len(unit) - 1)
    totals_V = coincidence_VV.sum(0)
    distance_VV = _distance(np.array(values), totals_V, level)
    n = totals_V.sum()
    observed = (coincidence_VV * distance_VV).sum()
    expected = (np.outer(totals_V, totals_V) * distance_VV).sum() / (n - 1)
    return float(1 - observed / expected)


def _distance(values_V: Array, totals_V: Array, level: Level) -> Array:
    """Squared distances of values: 0 or 1, by ranks between them, or by their difference."""
    if level == "nominal":
        return 1.0 - np.eye(len(values_V))
    if level == "interval":
        return np.square(values_V[:, None] - values_V[None, :])
    cumulative_V = np.cumsum(totals_V)
    middle_V = cumulative_V - totals_V / 2
    return np.square(middle_V[:, None] - middle_V[None, :])


def pearson(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float | None:
    """Pearson's correlation; None where one side is constant or there are fewer than two pairs."""
    return _number(_pearson(np.asarray(x, np.float64)[None], np.asarray(y, np.float64)[None])[0])


def spearman(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where `pearson` of the ranks is."""
    return pearson(ranks(x), ranks(y))


def ranks(values: Sequence[float] | Array) -> Array:
    """Ranks from 1 along the last axis, equal values at the mean of theirs."""
    values_RN = np.atleast_2d(np.asarray(values, np.float64))
    n = values_RN.shape[-1]
    order_RN = np.argsort(values_RN, axis=-1, kind="stable")
    sorted_RN = np.take_along_axis(values_RN, order_RN, -1)
    new_RN = np.ones(values_RN.shape, bool)
    new_RN[:, 1:] = sorted_RN[:, 1:] != sorted_RN[:, :-1]
    place_N = np.arange(n)
    first_RN = np.maximum.accumulate(np.where(new_RN, place_N, 0), -1)
    end_RN = np.ones(values_RN.shape, bool)
    end_RN[:, :-1] = new_RN[:, 1:]
    last_RN = np.minimum.accumulate(np.where(end_RN, place_N, n)[:, ::-1], -1)[:, ::-1]
    ranks_RN = np.empty(values_RN.shape)
    np.put_along_axis(ranks_RN, order_RN, (first_RN + last_RN) / 2 + 1, -1)
    return ranks_RN.reshape(np.shape(values))


def _pearson(x_RN: Array, y_RN: Array) -> Array:
    """Row by row; NaN where it is undefined."""
    found_R = np.full(len(x_RN), np.nan)
    if x_RN.shape[-1] < 2:
        return found_R
    defined_R = (np.ptp(x_RN, -1) > 0) & (np.ptp(y_RN, -1) > 0)
    x_RN, y_RN = (_scaled(values_RN[defined_R]) for values_RN in (x_RN, y_RN))
    products_R = (x_RN * y_RN).sum(-1) / np.sqrt((x_RN**2).sum(-1) * (y_RN**2).sum(-1))
    found_R[defined_R] = np.clip(products_R, -1, 1)
    return found_R


def _scaled(values_RN: Array) -> Array:
    """Centred rows within [-1, 1], so that squares of very large and very small values neither overflow nor vanish."""
    centred_RN = values_RN - values_RN.mean(-1, keepdims=True)
    return centred_RN / np.abs(centred_RN).max(-1, keepdims=True)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def bootstrap(
    kind: Literal["pearson", "spearman"],
    x: Sequence[float] | Array,
    y: Sequence[float] | Array,
    resamples: int = 2_000,
    seed: int = 0,
) -> dict[str, float | int | None]:
    """`value` of a correlation and its 95 % percentile interval over resampled pairs.

    Resamples for which the correlation is undefined are left out; `undefined` counts them. Without a value, or where
    more than half of the resamples are undefined, there is no interval.
    """
    x_N, y_N = np.asarray(x, np.float64), np.asarray(y, np.float64)
    value = pearson(x_N, y_N) if kind == "pearson" else spearman(x_N, y_N)
    result: dict[str, float | int | None] = {"value": value, "low": None, "high": None, "n": len(x_N), "undefined": 0}
    if value is None:
        return result
    random = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(x_N))
    parts = []
    for start in range(0, resamples, rows):
        drawn_RN = random.integers(len(x_N), size=(min(rows, resamples - start), len(x_N)))
        a_RN, b_RN = x_N[drawn_RN], y_N[drawn_RN]
        parts.append(_pearson(a_RN, b_RN) if kind == "pearson" else _pearson(ranks(a_RN), ranks(b_RN)))
    found_R = np.concatenate(parts)
    defined_R = found_R[~np.isnan(found_R)]
    result["undefined"] = len(found_R) - len(defined_R)
    if 2 * len(defined_R) >= len(found_R):
        low, high = np.quantile(defined_R, (0.025, 0.975))
        result |= {"low": float(low), "high": float(high)}
    return result


def wilson(share: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share that was seen in `n` (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    `n` may be an effective size, so no whole number. Nothing seen: (0, 1).
    """
    if n <= 0:
        return 0.0, 1.0
    centre = share + z**2 / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def stratified_wilson(strata: Mapping[str, tuple[int, int, int]]) -> dict[str, float]:
    """Share of errors in all strata together from a sample of each: stratum -> (errors, seen, size).

    The share weights each stratum by its size. The interval is Wilson's at the effective sample size under these
    weights (Kish 1965): 1 / sum(W^2 / n), which is the sample's size when each stratum is sampled in proportion, and
    less otherwise. Strata of which nothing was seen are left out; `covered` is the share of the whole that is left.
    """
    seen = {name: row for name, row in strata.items() if row[1] > 0}
    whole = sum(size for _, _, size in strata.values())
    known = sum(size for _, _, size in seen.values())
    if not seen or known == 0:
        return {"share": math.nan, "low": 0.0, "high": 1.0, "effective_n": 0.0, "covered": 0.0}
    weights = {name: size / known for name, (_, _, size) in seen.items()}
    share = sum(weights[name] * errors / n for name, (errors, n, _) in seen.items())
    effective = 1 / sum(weights[name] ** 2 / n for name, (_, n, _) in seen.items())
    low, high = wilson(share, effective)
    return {"share": share, "low": low, "high": high, "effective_n": effective, "covered": known / whole}
