"""Intervals, exact tests and standard errors, each against an independent computation."""

import itertools
import math

import numpy as np
import pytest

from bimedix_jax.sweeps.statistics import paired, sign_flip, standard_errors


def by_enumeration(values):
    signs = itertools.product((-1, 1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(choice, values, strict=True))) for choice in signs]
    return sum(total >= abs(sum(values)) - 1e-9 for total in sums) / len(sums)


@pytest.mark.parametrize(
    "values", [[0.3, 0.1, 0.2, 0.4, 0.25, 0.15], [0.3, -0.1, 0.2, 0.4], [1.0, -1.0], [0.5, 0.5, 0.5]]
)
def test_sign_flip_counts_all_signs(values):
    assert sign_flip(values) == pytest.approx(by_enumeration(values))
    assert sign_flip([-value for value in values]) == pytest.approx(sign_flip(values))


def test_six_seeds_are_the_least_that_reach_5_percent():
    assert sign_flip([0.1 * i for i in range(1, 6)]) == 2 / 2**5 > 0.05
    assert sign_flip([0.1 * i for i in range(1, 7)]) == 2 / 2**6 < 0.05
    assert sign_flip([1.0]) == sign_flip([0.0, 0.0, 0.0]) == 1.0


def test_interval_covers_at_its_level():
    draws = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        found = paired(draws.normal(0.7, 2.0, 5).tolist())
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.7 <= found.high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)
    assert paired([1.0]).low is None


def test_standard_errors_recover_the_sources_of_variance():
    """Mean over many simulated studies, with known variances of seeds, records and residuals."""
    draws, seeds, records = np.random.default_rng(1), 8, 40
    tokens = draws.integers(5, 50, records).astype(float)
    found, means = [], []
    for _ in range(600):
        effect = draws.normal(0, 0.3, (seeds, 1)) + draws.normal(0, 1.0, (1, records))
        nats = tokens * (0.2 + effect + draws.normal(0, 0.5, (seeds, records)))
        found.append(standard_errors(nats, tokens))
        means.append(nats.sum() / (seeds * tokens.sum()))
    assert math.sqrt(np.mean([one.both**2 for one in found])) == pytest.approx(np.std(means), rel=0.1)
    share = (tokens**2).sum() / tokens.sum() ** 2
    assert math.sqrt(np.mean([one.records**2 for one in found])) == pytest.approx(
        math.sqrt(share * (1.0 + 0.25 / seeds)), rel=0.1
    )
    assert math.isnan(standard_errors(np.ones((1, 3)), np.ones(3)).both)
