import itertools

import numpy as np
import pytest

from bimedix_jax.routing import coactivation, measures
from bimedix_jax.routing.exploration import explore_pairs
from bimedix_jax.routing.recorded import GappedRoutes
from bimedix_jax.routing.tables import Tables, count_routes

RNG = np.random.default_rng(3)
RECORD_N = np.repeat([0, 1, 2], [20, 1, 30])
EXPERTS_LNK = np.array([[RNG.permutation(5)[:2] for _ in RECORD_N] for _ in range(3)])


def test_loads_sum_to_one_and_count_each_record_once():
    counts_RLE = np.array([[[1, 1]], [[300, 100]]])
    np.testing.assert_allclose(measures.load(counts_RLE), [[0.625, 0.375]])


def test_dead_experts_have_a_bound():
    counts_CLE = np.ones((30, 2, 3))
    counts_CLE[:, 1, 2] = 0
    (dead,) = measures.dead_experts(counts_CLE)
    assert (dead.layer, dead.expert) == (1, 2)
    assert 0.9 < 30 * dead.bound / 3 < 1


def test_flips_ignore_the_order_of_a_set():
    swapped = EXPERTS_LNK[:, :, ::-1].copy()
    same = measures.flips(EXPERTS_LNK, swapped, RECORD_N, 4, 5)
    assert np.nanmax(same.changed_RL) == 0
    assert np.isnan(same.changed_RL[3]).all()
    swapped[0, 0] = [e for e in range(5) if e not in EXPERTS_LNK[0, 0]][:2]
    found = measures.flips(EXPERTS_LNK, swapped, RECORD_N, 4, 5)
    assert found.changed_RL[0, 0] == pytest.approx(1 / 20)
    assert found.overlap_RL[0, 0] == pytest.approx(19 / 20)
    with pytest.raises(ValueError, match="same tokens"):
        measures.flips(EXPERTS_LNK, swapped[:, 1:], RECORD_N, 3, 5)


def test_saturation_reaches_one_at_the_last_step():
    steps = np.stack([np.roll(EXPERTS_LNK, shift, axis=1) for shift in (2, 1, 0)])
    found = measures.saturation(steps, RECORD_N, 3, 5)
    assert found.shape == (3, 3, 3)
    np.testing.assert_allclose(found[-1], 1)
    assert found[0].mean() < 0.7


def test_persistence_agrees_with_loops():
    found = measures.persistence(EXPERTS_LNK, RECORD_N, 3, 5)
    for record, layer in itertools.product((0, 2), range(3)):
        own = [set(x) for x in EXPERTS_LNK[layer][record == RECORD_N]]
        neighbours = np.mean([len(a & b) / 2 for a, b in itertools.pairwise(own)])
        others = np.mean([len(a & b) / 2 for a, b in itertools.combinations(own, 2)])
        assert found.next_RL[record, layer] == pytest.approx(neighbours)
        assert found.random_RL[record, layer] == pytest.approx(others)
    assert np.isnan(found.next_RL[1]).all()


def test_small_margins_are_counted():
    margin_LN = np.full((1, len(RECORD_N)), 0.5)
    margin_LN[0, :5] = 1e-6
    np.testing.assert_allclose(measures.margins(margin_LN, RECORD_N, 3), [[0.25], [0], [0]])


def test_weight_change_is_relative():
    before = RNG.standard_normal((2, 3, 4, 5))
    np.testing.assert_allclose(measures.weight_change(before, 1.5 * before), 0.5)


def test_the_usual_index_of_vocabulary_is_high_without_any_dependence():
    """Many rare ids, as in any text: the index of a router that ignores tokens is far above 1 / E."""
    counts_TE = np.array([RNG.multinomial(n, np.full(8, 1 / 8)) for n in 2 + RNG.zipf(1.5, 3000) % 400])
    index, null = measures.vocabulary_specialisation(counts_TE)
    assert index > 0.3
    assert index == pytest.approx(null, abs=0.01)


def test_trades_keep_the_size_of_sets_and_the_loads_of_records():
    chosen_NE = coactivation.sets(EXPERTS_LNK[0], 5)
    before = chosen_NE.copy()
    for _ in range(5):
        coactivation.trade(chosen_NE, RECORD_N, coactivation.partners(RECORD_N), RNG)
    assert (chosen_NE.sum(1) == 2).all()
    for record in range(3):
        own = record == RECORD_N
        np.testing.assert_array_equal(chosen_NE[own].sum(0), before[own].sum(0))
    assert (chosen_NE != before).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_slots_without_an_expert_belong_to_no_pair(dtype):
    """Experts 0 and 1 go together; every fifth token has a single expert and every seventh none."""
    chosen_NK = np.where(RNG.random((600, 1)) < 0.5, [[0, 1]], [[2, 3]])
    loose_N = RNG.random(600) < 0.3
    chosen_NK[loose_N] = np.argsort(RNG.random((loose_N.sum(), 4)))[:, :2]
    chosen_NK[::5, 1], chosen_NK[::7] = 255, 255
    assert (coactivation.sets(chosen_NK.astype(dtype), 4).sum(1) == (chosen_NK < 255).sum(1)).all()
    other_NK = np.where(RNG.random((600, 1)) < 0.5, chosen_NK, chosen_NK[:, ::-1])
    assert (measures.overlap(chosen_NK[None].astype(dtype), other_NK[None].astype(dtype), 4) == 1).all()
    one, two = (np.array([[row]]) for row in ([0, 255], [0, 1]))
    assert measures.overlap(one, two, 4) == 0.5
    record_N = np.arange(600) // 20
    routes = GappedRoutes(
        record_N=record_N, id_N=RNG.integers(0, 9, 600), experts_LNK=chosen_NK[None].astype(dtype), experts=4
    )
    counts_RLE, tokens_R = count_routes(routes, 30, 1, 4)
    assert counts_RLE.sum() == (chosen_NK < 255).sum()
    kept_R = counts_RLE.sum(2).min(1) > 0
    assert kept_R.all()
    tables = Tables(counts_RLE=counts_RLE, tokens_R=tokens_R, groups={}, routes=routes)
    found = explore_pairs(tables, seed=0)
    assert {pair.experts for pair in found[:2]} == {(0, 1), (2, 3)}
    assert all(pair.estimate > 1.2 for pair in found[:2])


def test_trades_reach_all_sets_equally_often():
    """Three tokens with two of four experts each: every matrix with these sums has the same share in the long run."""
    start = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]], bool)
    rows = [np.array(x) for x in itertools.product((0, 1), repeat=4) if sum(x) == 2]
    possible = [m for m in (np.array(x) for x in itertools.product(rows, repeat=3)) if (m.sum(0) == start.sum(0)).all()]
    chosen_NE, record_N, seen = start.copy(), np.zeros(3, int), []
    for _ in range(6000):
        coactivation.trade(chosen_NE, record_N, coactivation.partners(record_N), RNG)
        seen.append(chosen_NE.tobytes())
    shares = np.unique(seen, return_counts=True)[1] / len(seen)
    assert len(shares) == len(possible)
    np.testing.assert_allclose(shares, 1 / len(possible), atol=0.03)


def test_pairs_that_are_planted_have_a_lift():
    pairs = np.array([[0, 1], [2, 3]])
    planted = np.array([pairs[RNG.integers(2)] if RNG.random() < 0.6 else RNG.permutation(4)[:2] for _ in range(400)])
    found = coactivation.coactivation(planted, np.arange(400) // 40, 4, RNG)
    assert found.lift_EE[0, 1] > 1.5
    assert found.p_EE[0, 1] < 1e-6
    chance = np.array([RNG.permutation(4)[:2] for _ in range(400)])
    found = coactivation.coactivation(chance, np.arange(400) // 40, 4, RNG)
    assert abs(found.lift_EE[0, 1] - 1) < 0.3
    assert np.nanmin(found.p_EE) > 1e-3
