"""Shapley values against their definition over orders, and on games whose values are known."""

import itertools

import numpy as np
import pytest

from bimedix_jax.routing.shapley import EXACT_PLAYERS, game_of

NAMES = ("a", "b", "c", "d")


def over_orders(values_C: np.ndarray, count: int) -> np.ndarray:
    """The mean of what each player adds, over all orders."""
    total_P, orders = np.zeros(count), list(itertools.permutations(range(count)))
    for order in orders:
        coalition = 0
        for player in order:
            total_P[player] += values_C[coalition | 1 << player] - values_C[coalition]
            coalition |= 1 << player
    return total_P / len(orders)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_values_are_means_over_all_orders_and_add_up(count: int):
    rng = np.random.default_rng(count)
    game, values_C = game_of(NAMES[:count], 0, rng), rng.standard_normal(1 << count)
    found_P = game.shapley() @ values_C
    np.testing.assert_allclose(found_P, over_orders(values_C, count), rtol=1e-12)
    np.testing.assert_allclose(found_P.sum(), values_C[-1] - values_C[0], rtol=1e-12)
    for player, adds in enumerate(game.marginals(values_C)):
        assert len(adds) == 1 << (count - 1)
        assert adds.min() <= found_P[player] <= adds.max()


def test_interactions_of_a_known_game():
    """v = 1 for a, 2 for b, 4 for both b and c, and 8 for all three: the index shares out the product of three."""
    game = game_of(NAMES[:3], 0, np.random.default_rng(0))
    a, b, c = (np.array([coalition >> player & 1 for coalition in game.coalitions]) for player in range(3))
    pairs, weights_XC = game.interactions()
    assert pairs == [(0, 1), (0, 2), (1, 2)]
    np.testing.assert_allclose(weights_XC @ (a + 2 * b + 4 * b * c + 8 * a * b * c), [4, 4, 8])
    np.testing.assert_allclose(game.shapley() @ (a + 2 * b + 4 * b * c), [1, 4, 2])


def test_sampled_orders_are_unbiased_and_add_up():
    count = EXACT_PLAYERS + 1
    names = [str(player) for player in range(count)]
    game = game_of(names, 400, np.random.default_rng(0))
    present_CP = np.array([[coalition >> player & 1 for player in range(count)] for coalition in game.coalitions])
    size_P = np.arange(count) / 10.0
    values_C = (present_CP @ size_P) ** 2  # the value of player i is i times the sum of all, over 100
    found_P, error_P = game.shapley() @ values_C, game.standard_errors(values_C)
    assert error_P is not None
    np.testing.assert_allclose(found_P.sum(), values_C[-1] - values_C[0], rtol=1e-12)
    assert (np.abs(found_P - size_P * size_P.sum()) <= 4 * error_P + 1e-9).all()
    assert game.interactions()[0] == []
    assert game.coalitions[0] == 0
    assert game.members(game.coalitions[-1]) == names
    assert len(game.orders or ()) == 400
