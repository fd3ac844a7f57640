"""Intervals, tests, power, calibration and kappa, each against an independent computation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bimedix_jax.evals import statistics
from bimedix_jax.evals.accuracy import Accuracy


def answers(both, only_a, only_b, neither):
    """The answers of two models, 1 where correct, from the counts of their table."""
    pairs = [(1, 1)] * both + [(1, 0)] * only_a + [(0, 1)] * only_b + [(0, 0)] * neither
    return np.array(pairs, float).T


@pytest.mark.parametrize(("correct", "total"), [(30, 100), (500, 1273), (2, 12)])
def test_the_bootstrap_of_a_share_is_binomial(correct, total):
    """Resamples of n answers have Binomial(n, share) correct ones, whose quantiles scipy knows."""
    values_N1 = np.repeat([1, 0], [correct, total - correct])[:, None]
    found = statistics.percentiles(statistics.resampled_means(values_N1)[:, 0], correct / total)
    ends = stats.binom.ppf([0.025, 0.975], total, correct / total) / total
    assert [found.low, found.high] == pytest.approx(ends, abs=1.01 / total)


def test_clusters_are_drawn_together():
    """All 27 resamples of three clusters, enumerated."""
    values, clusters = np.array([1.0, 0, 1, 1, 0, 0]), np.array(["a", "a", "b", "b", "b", "c"])
    own = {"a": (1, 2), "b": (2, 3), "c": (0, 1)}
    draws = itertools.product("abc", repeat=3)
    expected = [sum(own[c][0] for c in drawn) / sum(own[c][1] for c in drawn) for drawn in draws]
    found = statistics.resampled_means(values[:, None], clusters)[:, 0]
    assert set(np.round(found, 9)) == set(np.round(expected, 9))
    assert found.mean() == pytest.approx(np.mean(expected), abs=0.01)
    assert found.std() == pytest.approx(np.std(expected), abs=0.01)
    copied = np.repeat(np.arange(50), 4)  # each question four times: no narrower than the questions alone
    once = statistics.resampled_means((np.arange(50) % 2)[:, None])
    assert np.array_equal(statistics.resampled_means((copied % 2)[:, None], copied), once)


@pytest.mark.parametrize(("correct", "total"), [(0, 3), (0, 8), (3, 8), (8, 8), (700, 1273)])
def test_the_interval_of_an_accuracy_is_wilsons_as_in_results(correct, total):
    found, expected = statistics.wilson(correct / total, total), Accuracy(correct, total)
    assert [found.low, found.high] == pytest.approx(expected.interval, abs=1e-12)
    assert found.low <= found.value <= found.high
    assert found.high - found.low > 0.02


def test_the_mean_of_tasks_is_no_more_certain_than_they_are():
    """Two tasks of eight questions without a right answer, and without a difference."""
    none = (np.zeros(8), [str(n) for n in range(8)])
    own, same = statistics.wilson(0.0, 8), statistics.agresti_min(0, 0, 8)
    apart = statistics.combined([[(none, own)], [(none, own)]])
    assert (apart.value, apart.low, apart.high) == (0, 0, pytest.approx(own.high / math.sqrt(2)))
    together = statistics.combined([[(none, own), (none, own)]])  # in two languages: nothing shows that they differ
    assert together.high == pytest.approx(own.high)
    mean = statistics.combined([[(none, same)], [(none, same)]])
    assert (mean.low, mean.high) == pytest.approx((same.low / math.sqrt(2), same.high / math.sqrt(2)))


def test_the_mean_of_large_tasks_has_the_interval_of_the_bootstrap():
    rng = np.random.default_rng(1)
    first_N, second_N = (rng.random(800) < 0.4).astype(float), (rng.random(500) < 0.6).astype(float)
    again_N = np.where(rng.random(800) < 0.7, first_N, rng.random(800) < 0.4).astype(float)
    names = [str(n) for n in range(800)]
    strata = [[(first_N, names), (again_N, names)], [(second_N, names[:500])]]
    drawn = statistics.average_interval(strata)
    own = [[(task, statistics.wilson(task[0].mean(), len(task[0]))) for task in tasks] for tasks in strata]
    found = statistics.combined(own)
    assert found.value == pytest.approx(drawn.value)
    assert [found.low, found.high] == pytest.approx([drawn.low, drawn.high], abs=2e-3)


def test_few_or_equal_answers_have_no_bootstrap_interval():
    few = statistics.calibration(np.full(9, 0.5), np.arange(9) % 2).to_dict()
    assert (few["low"], few["high"]) == (None, None)
    agreed = statistics.kappa(np.arange(40) % 2, np.arange(40) % 2)
    assert agreed.bootstrapped("kappa", 40) == {"kappa": 1.0, "low": None, "high": None}


def test_the_average_draws_a_question_and_its_translation_together():
    """Against the variance of a sum of two equal tasks, which is four times that of one, and of two others."""
    values = np.arange(60) % 3 == 0
    clusters = [str(n) for n in range(60)]
    error = math.sqrt(values.var() / 60)
    together = statistics.average_interval([[(values, clusters), (values, clusters)]])
    apart = statistics.average_interval([[(values, clusters)], [(values, clusters)]])
    assert together.value == apart.value == pytest.approx(1 / 3)
    assert together.high - together.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * error / math.sqrt(2), rel=0.1)
    pair = statistics.paired(np.repeat(values, 2), np.ones(120), np.repeat(np.arange(60), 2))
    assert (pair.n, pair.clusters) == (120, 60)
    assert pair.p == pytest.approx(
        statistics.mcnemar(0, 40)
    )  # 40 questions, not 80, of which B alone answers both forms


def test_the_same_answers_give_the_same_numbers():
    a_N, b_N = answers(40, 12, 20, 28)
    assert statistics.paired(a_N, b_N) == statistics.paired(a_N, b_N)
    order = np.random.default_rng(0).permutation(len(a_N))
    assert statistics.paired(a_N[order], b_N[order]) == statistics.paired(a_N, b_N)


@pytest.mark.parametrize("sums", [[2, 2, -1, 1, 1], [1, 1, 1, 0], [2, -1, -1], [2, 2, 2, 2, 1, 0, 0], [0]])
def test_the_test_of_clusters_counts_all_signs(sums):
    flips = [sum(signs) for signs in itertools.product(*[(-size, size) for size in sums])]
    expected = sum(abs(total) >= abs(sum(sums)) for total in flips) / len(flips)
    assert statistics.sign_flips(np.array(sums, float)) == pytest.approx(expected)


def test_a_question_and_its_translation_are_not_two_pieces_of_evidence():
    """B alone answers five of eight questions, in both languages: p and the interval are those of eight questions."""
    clusters = np.repeat(np.arange(8), 2)
    found = statistics.paired(np.zeros(16), np.repeat([1.0, 0.0], [10, 6]), clusters)
    assert found.p == pytest.approx(statistics.mcnemar(0, 5))
    once = statistics.agresti_min(0, 5, 8)
    assert [found.difference.low, found.difference.high] == pytest.approx([once.low, once.high])
    assert found.p_bootstrap < 0.02  # resamples of eight clusters vary too little


@pytest.mark.parametrize(("only_a", "only_b"), [(8, 1), (1, 8), (5, 5), (3, 14), (0, 0), (0, 6)])
def test_mcnemar_counts_all_outcomes(only_a, only_b):
    total = only_a + only_b
    rarer = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1)) / 2**total
    assert statistics.mcnemar(only_a, only_b) == pytest.approx(min(1.0, 2 * rarer))


def test_the_paired_bootstrap_agrees_with_its_normal_limit():
    """The standard error of a paired difference is sqrt(b + c - (b - c)^2 / n) / n."""
    found = statistics.paired(*answers(600, 100, 160, 413))
    difference, n = 60 / 1273, 1273
    error = math.sqrt(260 - 60**2 / n) / n
    assert found.difference.value == pytest.approx(difference)
    expected = [difference - 1.96 * error, difference + 1.96 * error]
    assert [found.difference.low, found.difference.high] == pytest.approx(expected, abs=0.1 * error)
    assert found.p_bootstrap == pytest.approx(2 * stats.norm.sf(difference / error), abs=2e-3)
    assert (found.only_a, found.only_b, found.n) == (100, 160, n)


def test_few_differing_answers_do_not_give_a_narrow_interval():
    """Agresti and Min: Wald's interval after 0.5 is added to each cell."""
    found = statistics.paired(*answers(50, 0, 0, 50))
    half = 1.959964 * math.sqrt(1.0) / 102
    assert [found.difference.low, found.difference.high] == pytest.approx([-half, half], rel=1e-5)
    assert (found.p, found.p_bootstrap) == (1.0, 1.0)
    few = statistics.paired(*answers(50, 1, 9, 40)).difference
    table = np.array([1.5, 9.5]) / 102
    half = 1.959964 * math.sqrt((table.sum() - (table[1] - table[0]) ** 2) / 102)
    assert [few.value, few.low, few.high] == pytest.approx([0.08, 8 / 102 - half, 8 / 102 + half], rel=1e-5)


def test_holm_is_monotone_and_bounds_bonferroni():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@pytest.mark.parametrize(("n", "discordant", "difference"), [(20, 0.5, 0.4), (30, 0.3, 0.3), (25, 0.6, 0.0)])
def test_power_is_that_of_all_outcomes(n, discordant, difference):
    """The sum over all numbers of questions that A alone and B alone answer."""
    b, a = (discordant + difference) / 2, (discordant - difference) / 2
    expected = sum(
        stats.multinomial.pmf([only_a, only_b, n - only_a - only_b], n, [a, b, 1 - a - b])
        for only_a in range(n + 1)
        for only_b in range(n + 1 - only_a)
        if statistics.mcnemar(only_a, only_b) <= 0.05
    )
    assert statistics.power_of_mcnemar(n, discordant, difference) == pytest.approx(expected, abs=1e-9)


def test_the_smallest_detectable_difference_has_the_power_that_it_claims():
    for n, discordant in ((100, 0.5), (1273, 0.2), (4183, 0.3)):
        found = statistics.detectable(n, discordant)
        assert found is not None
        assert statistics.power_of_mcnemar(n, discordant, found) == pytest.approx(0.8, abs=0.005)
        # Miettinen's formula for large samples is a little optimistic, since the exact test is conservative
        wide, narrow = math.sqrt(discordant), math.sqrt(discordant - found**2)
        formula = (1.959964 * wide + 0.841621 * narrow) / math.sqrt(n)
        assert formula == pytest.approx(found, rel=0.1)
        assert formula < found
    assert statistics.detectable(100, 0.02) is None
    assert statistics.unrelated(0.25) == pytest.approx(0.25 * 0.75 + 0.75 * 0.25)


def test_calibration_by_hand():
    """Bins [0.2, 0.3), [0.6, 0.7) and [0.9, 1]: gaps of 0.25, 0.15 and 0.475 with 1, 1 and 2 of 4 answers."""
    found = statistics.calibration(np.array([0.25, 0.65, 0.95, 1.0]), np.array([0, 0.5, 0, 1]))
    assert found.error.value == pytest.approx((0.25 + 0.15 + 2 * 0.475) / 4)
    assert [row["n"] for row in found.bins] == [1, 1, 2]
    assert found.bins[2] == {"low": 0.9, "high": 1.0, "n": 2, "confidence": pytest.approx(0.975), "accuracy": 0.5}


def test_a_calibrated_model_has_the_error_of_chance():
    rng = np.random.default_rng(0)
    confidence_N = rng.uniform(0.25, 1, 400)
    honest = statistics.calibration(confidence_N, rng.random(400) < confidence_N)
    assert honest.error.value == pytest.approx(honest.by_chance, abs=0.03)
    boastful = statistics.calibration(confidence_N, rng.random(400) < 0.25)
    assert boastful.error.low > 5 * boastful.by_chance
    assert boastful.error.value == pytest.approx(np.abs(confidence_N.mean() - 0.25), abs=0.05)


def test_confidences_are_shares_of_the_options():
    assert statistics.confidences([math.log(0.2), math.log(0.1), math.log(0.1)]) == pytest.approx([0.5, 0.25, 0.25])
    assert statistics.confidences([-2000.0, -2000.0]) == [0.5, 0.5]


def test_kappa_by_hand_and_its_interval_by_the_delta_method():
    """Table [[20, 5], [10, 15]]: agreement 0.7, 0.5 by chance. Variance: Fleiss, Cohen and Everitt 1969."""
    table = np.array([[20, 5], [10, 15]])
    cells = [(row, column) for row in (0, 1) for column in (0, 1) for _ in range(20 * table[row, column])]
    first, second = np.array(cells).T
    found = statistics.kappa(first, second)
    assert found.value == pytest.approx(0.4)
    share, count = table / 50, 1000
    rows, columns, kappa, chance = share.sum(1), share.sum(0), 0.4, 0.5
    variance = sum(share[i, i] * ((1 - chance) - (rows[i] + columns[i]) * (1 - 0.7)) ** 2 for i in (0, 1))
    variance += (1 - 0.7) ** 2 * sum(
        share[i, j] * (columns[i] + rows[j]) ** 2 for i in (0, 1) for j in (0, 1) if i != j
    )
    variance -= (0.7 * chance - 2 * chance + 0.7) ** 2
    half = 1.96 * math.sqrt(variance / count) / (1 - chance) ** 2
    assert [found.low, found.high] == pytest.approx([kappa - half, kappa + half], abs=0.1 * half)
    assert statistics.kappa(np.array([2, 2, 2]), np.array([2, 2, 2])).value == 1.0
    assert statistics.kappa(np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0])).value == pytest.approx(-1.0)
