"""Agreement of raters, correlations with bootstrap intervals, and bounds on shares of errors."""

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Level = Literal["nominal", "ordinal", "interval"]
Array = NDArray[np.float64]

_BATCH_VALUES = 1 << 20
"""Values resampled at a time, which limits the memory."""


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float | None:
    """Agreement of two raters on the same items beyond chance (Cohen 1960, doi:10.1177/001316446002000104).

    None where it is undefined: there is no item, or both gave the same single answer to all.
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

    `units` holds the ratings of each item; items with fewer than two are ignored. None where it is undefined: nothing
    was rated twice, or all ratings are the same.
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
    """Squared distances of values: 0 or 1, by the ranks between them, or by their difference."""
    if level == "nominal":
        return 1.0 - np.eye(len(values_V))
    if level == "interval":
        return np.square(values_V[:, None] - values_V[None, :])
    cumulative_V = np.cumsum(totals_V)
    middle_V = cumulative_V - totals_V / 2
    return np.square(middle_V[:, None] - middle_V[None, :])


def pearson(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float | None:
    """Pearson's correlation; None where one side is constant or there are fewer than two pairs."""
    value = float(_pearson(np.asarray(x, np.float64), np.asarray(y, np.float64)))
    return None if math.isnan(value) else value


def spearman(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float | None:
    """Spearman's rank correlation with mean ranks for ties; None as for `pearson`."""
    return pearson(stats.rankdata(x), stats.rankdata(y))


def _pearson(x_RN: Array, y_RN: Array) -> Array:
    """Along the last axis; NaN where it is undefined."""
    if x_RN.shape[-1] < 2:
        return np.full(x_RN.shape[:-1], np.nan)
    with warnings.catch_warnings():  # of constant rows, which give NaN
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return np.asarray(stats.pearsonr(x_RN, y_RN, axis=-1)[0])


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

    def correlation(x_RN: Array, y_RN: Array, axis: int) -> Array:
        del axis  # the last one
        if kind == "spearman":
            x_RN, y_RN = stats.rankdata(x_RN, axis=-1), stats.rankdata(y_RN, axis=-1)
        return _pearson(x_RN, y_RN)

    with warnings.catch_warnings():  # of undefined resamples, which are counted below
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (x_N, y_N),
            correlation,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _BATCH_VALUES // len(x_N)),
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    found_R = found.bootstrap_distribution
    defined_R = found_R[~np.isnan(found_R)]
    result["undefined"] = len(found_R) - len(defined_R)
    if 2 * len(defined_R) >= len(found_R):
        low, high = np.quantile(defined_R, (0.025, 0.975))
        result |= {"low": float(low), "high": float(high)}
    return result


def wilson(errors: int, n: int) -> tuple[float, float]:
    """Wilson's interval at 95 % of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953). (0, 1) for `n` = 0."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(errors, n).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def _wilson_of_effective(share: float, n: float) -> tuple[float, float]:
    """`wilson` for an effective sample size, which is not whole: SciPy takes counts only."""
    z = float(stats.norm.ppf(0.975))
    centre = share + z**2 / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def stratified_wilson(strata: Mapping[str, tuple[int, int, int]]) -> dict[str, float]:
    """Share of errors in all strata from a sample of each: stratum -> (errors, seen, size).

    The share weights each stratum by its size. The interval is Wilson's at the effective sample size under these
    weights (Kish 1965): 1 / sum(W^2 / n). That is the size of the sample if all strata are sampled in proportion, and
    less otherwise. Strata without a reviewed item are left out; `covered` is the share of records in the others.
    """
    seen = {name: row for name, row in strata.items() if row[1] > 0}
    whole = sum(size for _, _, size in strata.values())
    known = sum(size for _, _, size in seen.values())
    if not seen or known == 0:
        return {"share": math.nan, "low": 0.0, "high": 1.0, "effective_n": 0.0, "covered": 0.0}
    weights = {name: size / known for name, (_, _, size) in seen.items()}
    share = sum(weights[name] * errors / n for name, (errors, n, _) in seen.items())
    effective = 1 / sum(weights[name] ** 2 / n for name, (_, n, _) in seen.items())
    low, high = _wilson_of_effective(share, effective)
    return {"share": share, "low": low, "high": high, "effective_n": effective, "covered": known / whole}
