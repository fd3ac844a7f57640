"""The tests of information, split, by_id and exploration: what token ids say about routes."""

from typing import Any

import numpy as np
import planted_routes
import pytest
from scipy.spatial.distance import jensenshannon

from bimedix_jax.routing import information, split
from bimedix_jax.routing.by_id import SquaredDifferences
from bimedix_jax.routing.clusters import generator
from bimedix_jax.routing.contrasts import contrasts
from bimedix_jax.routing.sums import dense, row_shares
from bimedix_jax.routing.tables import TokenCounts, TokenRoutes, count_routes

RNG = np.random.default_rng(2)


def setting(**changes: Any) -> Any:
    tables: Any = planted_routes.tables(np.random.default_rng(4), records=40, tokens=20, **changes)
    (contrast,) = contrasts(tables, "language")
    rows, row_N = split.token_rows(tables.routes, contrast.unit_R, contrast.first_R, contrast.kept_R, contrast.units)
    return tables, contrast, rows, row_N


def test_divergence_agrees_with_scipy():
    p_LE, q_LE = RNG.dirichlet(np.ones(5), (2, 3))
    p_LE[0, 1] = 0
    expected = [jensenshannon(p, q) ** 2 for p, q in zip(p_LE / p_LE.sum(1, keepdims=True), q_LE, strict=True)]
    np.testing.assert_allclose(information.jensen_shannon(p_LE / p_LE.sum(1, keepdims=True), q_LE), expected)
    assert information.jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(np.log(2))


@pytest.mark.parametrize("paired", [False, True])
def test_divergence_is_not_biased_upwards(paired: bool):
    corrected, plugin, contains = [], [], []
    for seed in range(40):
        rng = generator(seed, "divergence")
        loads_CLE = rng.dirichlet([2, 2, 2, 2], (40, 2))
        found = information.divergence(loads_CLE[:20], loads_CLE[20:], paired, rng, 199)
        corrected.append(found.jsd_L)
        plugin.append(found.plugin_L)
        contains.append(found.low_L <= 0)
    assert abs(np.mean(corrected)) < 0.2 * np.mean(plugin)
    assert np.mean(contains) > 0.9


def test_divergence_of_different_groups_is_in_its_interval():
    truth = information.jensen_shannon(np.array([0.4, 0.3, 0.3]), np.array([0.2, 0.4, 0.4]))
    covered = []
    for seed in range(60):
        rng = generator(seed, "divergence")
        lead, trail = (rng.dirichlet(20 * np.array(p), (25, 1)) for p in ([0.4, 0.3, 0.3], [0.2, 0.4, 0.4]))
        found = information.divergence(lead, trail, False, rng, 199)
        covered.append(found.low_L[0] <= truth <= found.high_L[0])
    assert np.mean(covered) > 0.85


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("concentration", [2, 2000])
def test_the_divergence_is_in_its_own_interval(paired: bool, concentration: float):
    """Without a difference, with a small one, and with large ones of clusters that are alike: the bias of permuted
    labels, to which the difference itself contributes, was more than half the interval there."""
    for seed in range(12):
        rng = generator(seed, "divergence")
        slopes_LE = np.outer([0, 0.1, 0.6, 3], np.linspace(-1, 1, 6))
        loads = [np.exp(sign * slopes_LE) / np.exp(sign * slopes_LE).sum(1, keepdims=True) for sign in (1, -1)]
        lead, trail = (np.stack([rng.dirichlet(concentration * p_E, 12) for p_E in p_LE], 1) for p_LE in loads)
        found = information.divergence(lead, trail, paired, rng, 199)
        assert (found.low_L <= found.jsd_L).all()
        assert (found.jsd_L <= found.high_L).all()
        assert (found.high_L <= np.log(2)).all()
        if concentration == 2000:  # hardly any noise, so the bias is small too
            np.testing.assert_allclose(found.jsd_L, information.jensen_shannon(*loads), rtol=0.05, atol=1e-3)


def test_held_out_nats_are_not_positive_without_information_and_near_it_with():
    tables, _, rows, row_N = setting(by_record=0.0)
    vocabulary_C, group_C = information.held_out_nats(rows, tables.routes.choices(0, row_N, len(rows.id_P)), RNG)
    assert vocabulary_C.mean() < 0.01
    assert group_C.mean() < 0.01
    id_N = RNG.integers(0, 4, 8000)
    record_N = np.sort(RNG.integers(0, 40, 8000))
    routes = TokenRoutes(record_N=record_N, id_N=id_N, experts_LNK=id_N[None, :, None] % 2, experts=2)
    rows, row_N = split.token_rows(routes, np.arange(40), np.arange(40) < 20, np.ones(40, bool), 40)
    vocabulary_C, group_C = information.held_out_nats(rows, routes.choices(0, row_N, len(rows.id_P)), RNG)
    assert vocabulary_C.mean() == pytest.approx(np.log(2), abs=0.01)  # the id decides the expert
    assert abs(group_C.mean()) < 0.01
    experts_LNK = ((id_N + (record_N < 20)) % 2)[None, :, None]
    routes = TokenRoutes(record_N=record_N, id_N=id_N, experts_LNK=experts_LNK, experts=2)
    vocabulary_C, group_C = information.held_out_nats(rows, routes.choices(0, row_N, len(rows.id_P)), RNG)
    assert (vocabulary_C + group_C).mean() == pytest.approx(np.log(2), abs=0.01)  # only id and group together do
    assert abs(vocabulary_C.mean()) < 0.1 < group_C.mean()


def test_kitagawa_agrees_with_loops_and_adds_up():
    tables, contrast, rows, row_N = setting(by_token=1.0, by_language=0.3)
    parts = split.Split(rows)
    found = parts.layer(tables.routes.choices(1, row_N, len(rows.id_P)))
    comparison = contrast.comparison(tables.counts_RLE)
    difference = comparison.values_CX[contrast.side_U].mean(0) - comparison.values_CX[~contrast.side_U].mean(0)
    np.testing.assert_allclose(found.token_mix_E + found.within_E + found.unshared_E, difference[4:], atol=1e-12)
    routes, language_R = tables.routes, tables.groups["language"]
    p, r, users = np.zeros((2, 60)), np.zeros((2, 60, 4)), np.zeros((2, 60), int)
    for record in range(40):
        side, own = int(language_R[record] != "ar"), np.flatnonzero(routes.record_N == record)
        for token in own:
            p[side, routes.id_N[token]] += 1 / len(own) / 20
            r[side, routes.id_N[token], routes.experts_LNK[1, token]] += 0.5 / len(own) / 20
        users[side, np.unique(routes.id_N[own])] += 1
    shared = (users >= 2).all(0)
    r = r / np.where(p > 0, p, 1)[:, :, None]
    within = sum((p[0, t] + p[1, t]) / 2 * (r[0, t] - r[1, t]) for t in np.flatnonzero(shared))
    mix = sum((p[0, t] - p[1, t]) * (r[0, t] + r[1, t]) / 2 for t in np.flatnonzero(shared))
    np.testing.assert_allclose(found.within_E, within)
    np.testing.assert_allclose(found.token_mix_E, mix)
    assert parts.overlap == pytest.approx(min(p[0, shared].sum(), p[1, shared].sum()))


def test_scores_are_those_of_a_regression_on_group_and_id():
    """Frisch, Waugh and Lovell: the sum of the scores is the cross product of the residuals."""
    tables, _, rows, row_N = setting(by_language=0.3)
    parts = split.Split(rows)
    choices_PE = tables.routes.choices(0, row_N, len(rows.id_P))
    found = parts.layer(choices_PE)
    kept = np.flatnonzero(parts.shared_P)
    ids = np.unique(rows.id_P[kept], return_inverse=True)[1]
    dummies, weight = np.eye(ids.max() + 1)[ids], np.sqrt(parts.weight_P[kept])[:, None]
    share, label = dense(row_shares(choices_PE))[kept], rows.first_P[kept][:, None].astype(float)

    def residual(y: np.ndarray) -> np.ndarray:
        return y - dummies @ np.linalg.lstsq(weight * dummies, weight * y, rcond=None)[0]

    product = weight**2 * residual(label) * residual(share)
    expected = np.zeros((rows.clusters, 4))
    np.add.at(expected, rows.cluster_P[kept], product)
    np.testing.assert_allclose(found.scores_UE, expected, atol=1e-12)


def test_squared_differences_agree_with_loops():
    tables, _, rows, row_N = setting(by_language=0.3, by_record=0.1)
    parts = split.Split(rows)
    index_P = np.flatnonzero(parts.shared_P)
    squared = SquaredDifferences(rows, parts.weight_P, index_P, generator(0), 1)
    share = row_shares(tables.routes.choices(0, row_N, len(rows.id_P)))
    found_E, _ = squared.layer(share)
    share_PE, weight_P = dense(share), parts.weight_P
    total, noise, grams = np.zeros(4), np.zeros(4), np.zeros((4, rows.clusters, rows.clusters))
    for token in np.unique(rows.id_P[index_P]):
        own = np.flatnonzero(rows.id_P == token)
        mass = [weight_P[own][rows.first_P[own] == x].sum() for x in (True, False)]
        m = mass[0] * mass[1] / sum(mass)
        mean = weight_P[own] @ share_PE[own] / sum(mass)
        contrast_P = weight_P[own] * (rows.first_P[own] - mass[0] / sum(mass))
        score = contrast_P[:, None] * (share_PE[own] - mean)
        scaled = score / np.sqrt(1 - weight_P[own] / sum(mass))[:, None]
        total += score.sum(0) ** 2 / m
        noise += (scaled**2).sum(0) / m
        units = rows.cluster_P[own]
        grams[:, units[:, None], units] += np.einsum("ue,ve->euv", scaled, scaled) / m
    for gram in grams:
        np.fill_diagonal(gram, 0)
    np.testing.assert_allclose(found_E, np.maximum(total - noise, 0) / np.sqrt(2 * (grams**2).sum((1, 2))))


def test_same_ids_agree_with_loops():
    tables, contrast, _, _ = setting(by_language=0.5)
    pair_R = np.array([f"pair {record // 2}" for record in range(40)])
    rows, row_N, overlap, clusters = split.same_ids(
        tables.routes, pair_R, contrast.first_R, np.arange(40) // 2, np.ones(40, bool)
    )
    choices_PE = tables.routes.choices(0, row_N, len(rows.id_P))
    found_UE = split.same_id_differences(rows, choices_PE, np.arange(20), 20)
    routes, expected, shared = tables.routes, [], np.zeros((2, 2))
    names = np.unique(pair_R)
    for name in names:
        lead, trail = np.flatnonzero(pair_R == name)
        tokens = [np.flatnonzero(routes.record_N == record) for record in (lead, trail)]
        ids = np.intersect1d(*(routes.id_N[own] for own in tokens))
        weights, differences = [], []
        for token in ids:
            own = [x[routes.id_N[x] == token] for x in tokens]
            loads = [np.bincount(routes.experts_LNK[0, x].ravel(), minlength=4) / (2 * len(x)) for x in own]
            weights.append(min(map(len, own)))
            differences.append(loads[0] - loads[1])
        expected.append(np.average(differences, axis=0, weights=weights))
        for side in range(2):
            shared[side] += [np.isin(routes.id_N[tokens[side]], ids).sum(), len(tokens[side])]
    np.testing.assert_allclose(found_UE, expected)
    assert overlap == pytest.approx((shared[:, 0] / shared[:, 1]).min())
    assert clusters == 20


def test_counts_by_id_give_the_same_choices_as_single_tokens():
    tables, _, rows, row_N = setting()
    routes = tables.routes
    key, entry_N = np.unique(routes.record_N * 60 + routes.id_N, return_inverse=True)
    layer_X, token_X, slot_X = (x.ravel() for x in np.indices(routes.experts_LNK.shape))
    counts = TokenCounts(
        record_N=key // 60,
        id_N=key % 60,
        tokens_N=np.bincount(entry_N),
        entry_X=entry_N[token_X],
        layer_X=layer_X,
        expert_X=routes.experts_LNK[layer_X, token_X, slot_X],
        count_X=np.ones(len(layer_X)),
        experts=4,
    )
    counts_RLE, tokens_R = count_routes(counts, 40, 2, 4)
    np.testing.assert_array_equal(counts_RLE, tables.counts_RLE)
    np.testing.assert_array_equal(tokens_R, tables.tokens_R)
    other, other_N = split.token_rows(counts, np.arange(40), np.arange(40) % 2 == 0, np.ones(40, bool), 40)
    np.testing.assert_array_equal(other.tokens_P, rows.tokens_P)
    np.testing.assert_allclose(
        dense(counts.choices(1, other_N, len(other.id_P))), dense(routes.choices(1, row_N, len(rows.id_P)))
    )


def test_too_little_overlap_is_not_identified():
    _, _, rows, _ = setting(mixed=0.0)
    assert "0.0 %" in (split.Split(rows).unidentified or "")
    few: Any = planted_routes.tables(np.random.default_rng(4), records=20, tokens=20)
    pairs_R, first_R = np.arange(20) // 2, np.arange(20) % 2 == 0
    rows, _ = split.token_rows(few.routes, pairs_R, first_R, np.ones(20, bool), 10)
    assert "10 and 10 clusters of the groups use shared token ids, 10 different clusters in all; 10 of each" in (
        split.Split(rows).unidentified or ""
    )
    _, _, rows, _ = setting()
    assert split.Split(rows).unidentified is None
