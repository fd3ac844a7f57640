import numpy as np
import pytest
from scipy import stats as distributions

from bimedix_jax.routing import intervals
from bimedix_jax.routing.clusters import Comparison, generator, resampled_weights

RNG = np.random.default_rng(1)


def test_deviations_agree_with_resampling_one_by_one():
    values_CX, first_C = RNG.gamma(2.0, size=(25, 3)), np.arange(25) < 15
    t_BX = intervals.resampled_t(Comparison(values_CX=values_CX, first_C=first_C), generator(5), 20)
    rng = generator(5)
    weights = [resampled_weights(size, 20, rng) for size in (15, 10)]
    parts = [values_CX[first_C], values_CX[~first_C]]
    for b in range(20):
        drawn = [np.repeat(part, weight[b].astype(int), axis=0) for part, weight in zip(parts, weights, strict=True)]
        error_X = np.sqrt(sum(part.var(0, ddof=1) / len(part) for part in drawn))
        moved_X = drawn[0].mean(0) - drawn[1].mean(0) - (parts[0].mean(0) - parts[1].mean(0))
        np.testing.assert_allclose(t_BX[b], moved_X / error_X, rtol=1e-4)


def test_intervals_of_normal_values_agree_with_student():
    values_CX = RNG.standard_normal((200, 1))
    ((mean, low, high),) = intervals.mean_intervals(values_CX, generator(0))
    expected = distributions.ttest_1samp(values_CX[:, 0], 0).confidence_interval()
    assert mean == pytest.approx(values_CX.mean())
    assert low == pytest.approx(expected.low, abs=0.02)
    assert high == pytest.approx(expected.high, abs=0.02)


def test_intervals_cover_the_truth():
    covered = []
    for seed in range(60):
        rng = generator(seed, "cover")
        values_CX = rng.dirichlet([1, 2, 3, 4], 30)
        found_X3 = intervals.mean_intervals(values_CX, rng)
        covered.append((found_X3[:, 1] <= [0.1, 0.2, 0.3, 0.4]) & (found_X3[:, 2] >= [0.1, 0.2, 0.3, 0.4]))
    assert 0.9 < np.mean(covered) < 0.99


def test_no_interval_below_ten_clusters():
    assert np.isnan(intervals.mean_intervals(np.ones((9, 1)), generator(0))[0, 1:]).all()


def test_an_expert_of_one_cluster_has_a_finite_interval():
    values_CX = np.zeros((30, 1))
    values_CX[0] = 0.2
    assert np.isfinite(intervals.mean_intervals(values_CX, generator(0))).all()


def test_intraclass_agrees_with_analysis_of_variance_of_single_tokens():
    tokens_C, group_C = RNG.integers(5, 40, 24), np.arange(24) % 2
    share_CX = RNG.dirichlet([1, 1, 1], 24)
    counts_CX = np.array([RNG.multinomial(n, p) for n, p in zip(tokens_C, share_CX, strict=True)])
    icc, effect = intervals.intraclass(counts_CX, tokens_C, group_C)
    between = within = 0.0
    for cell in range(3):
        tokens = [np.arange(n) < c for n, c in zip(tokens_C, counts_CX[:, cell], strict=True)]
        for group in range(2):
            own = [tokens[c].astype(float) for c in np.flatnonzero(group_C == group)]
            grand = np.concatenate(own).mean()
            between += sum(len(x) * (x.mean() - grand) ** 2 for x in own) / 22
            within += sum(((x - x.mean()) ** 2).sum() for x in own) / (tokens_C.sum() - 24)
    size = (
        sum(
            tokens_C[group_C == g].sum() - (tokens_C[group_C == g] ** 2).sum() / tokens_C[group_C == g].sum()
            for g in (0, 1)
        )
        / 22
    )
    assert icc == pytest.approx((between - within) / (between + (size - 1) * within))
    assert effect == pytest.approx(1 + ((tokens_C**2).sum() / tokens_C.sum() - 1) * icc)


def test_intraclass_of_independent_tokens_is_zero_and_of_equal_ones_is_one():
    tokens_C, group_C = np.full(200, 30), np.zeros(200)
    counts_CX = RNG.multinomial(30, [0.5, 0.5], 200)
    assert abs(intervals.intraclass(counts_CX, tokens_C, group_C)[0] or 1) < 0.02
    alike_CX = 30 * np.eye(2)[RNG.integers(0, 2, 200)]
    assert intervals.intraclass(alike_CX, tokens_C, group_C)[0] == pytest.approx(1)
    assert intervals.intraclass(np.ones((1, 1)), np.ones(1), np.zeros(1)) == (None, None)


def test_bounds_agree_with_scipy():
    expected = distributions.binomtest(3, 40, alternative="less").proportion_ci(0.95, "exact").high
    assert intervals.binomial_upper(3, 40) == pytest.approx(expected)
    assert intervals.never_chosen_bound(40) == pytest.approx(intervals.binomial_upper(0, 40))
