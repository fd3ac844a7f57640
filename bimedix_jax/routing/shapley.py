"""Shapley values of a game whose coalitions were all measured, or of sampled orders; NumPy only.

A coalition is a number: bit i is set if player i takes part. Values are numbers that a coalition reaches, such as the
NLL that it saves. All results are linear in them, so that they can also be computed record by record.

Letters: P players, C coalitions, O orders.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

EXACT_PLAYERS = 8
"""So many players have 256 coalitions; with more, orders are sampled."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Game:
    """Which coalitions are measured, and how values follow from them.

    Attributes:
      players: their names.
      coalitions: numbers of the coalitions; the first has no player and the last has all.
      orders: sampled orders of the players; None if all coalitions are measured.
    """

    players: tuple[str, ...]
    coalitions: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...] | None = None

    @property
    def exact(self) -> bool:
        return self.orders is None

    def members(self, coalition: int) -> list[str]:
        """Names of the players of a coalition."""
        return [name for player, name in enumerate(self.players) if coalition >> player & 1]

    def shapley(self) -> np.ndarray:
        """[P, C]: times the values of the coalitions, the Shapley values. In each order they add up to the total."""
        place, count = self._places(), len(self.players)
        weights_PC = np.zeros((count, len(self.coalitions)))
        if self.orders is None:
            for player, coalition in itertools.product(range(count), self.coalitions):
                if not coalition >> player & 1:
                    weight = order_share(coalition.bit_count(), count)
                    weights_PC[player, place[coalition | 1 << player]] += weight
                    weights_PC[player, place[coalition]] -= weight
            return weights_PC
        for order in self.orders:
            for player, before, after in steps(order):
                weights_PC[player, place[after]] += 1 / len(self.orders)
                weights_PC[player, place[before]] -= 1 / len(self.orders)
        return weights_PC

    def interactions(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Pairs of players and [pairs, C], the weights of their Shapley interaction index; no pairs if not exact.

        The index is the mean of v(S + i + j) - v(S + i) - v(S + j) + v(S) over coalitions S without both, in random
        order (Grabisch and Roubens, International Journal of Game Theory 28, 1999).
        """
        count, place = len(self.players), self._places()
        pairs = list(itertools.combinations(range(count), 2)) if self.exact else []
        weights_XC = np.zeros((len(pairs), len(self.coalitions)))
        for row, (i, j) in enumerate(pairs):
            for coalition in self.coalitions:
                if not coalition >> i & 1 and not coalition >> j & 1:
                    weight = order_share(coalition.bit_count(), count - 1)
                    for joining, sign in ((1 << i | 1 << j, 1), (1 << i, -1), (1 << j, -1), (0, 1)):
                        weights_XC[row, place[coalition | joining]] += sign * weight
        return pairs, weights_XC

    def marginals(self, values_C: np.ndarray) -> list[np.ndarray]:
        """For each player, what it adds to the coalitions before it: to all, or to those of the sampled orders."""
        place = self._places()
        found: list[list[float]] = [[] for _ in self.players]
        if self.orders is None:
            for player, coalition in itertools.product(range(len(self.players)), self.coalitions):
                if not coalition >> player & 1:
                    found[player].append(values_C[place[coalition | 1 << player]] - values_C[place[coalition]])
        else:
            for order in self.orders:
                for player, before, after in steps(order):
                    found[player].append(values_C[place[after]] - values_C[place[before]])
        return [np.array(values) for values in found]

    def standard_errors(self, values_C: np.ndarray) -> np.ndarray | None:
        """[P]: errors of the sampled orders, from the means of each order and its reverse; None if exact."""
        if self.orders is None:
            return None
        pairs_PX = np.array(self.marginals(values_C)).reshape(len(self.players), -1, 2).mean(2)
        return pairs_PX.std(1, ddof=1) / math.sqrt(pairs_PX.shape[1])

    def _places(self) -> dict[int, int]:
        return {coalition: place for place, coalition in enumerate(self.coalitions)}


def order_share(before: int, players: int) -> float:
    """The share of the orders of so many players in which a given one comes just after a given set of `before`."""
    return float(Fraction(math.factorial(before) * math.factorial(players - before - 1), math.factorial(players)))


def steps(order: Sequence[int]) -> list[tuple[int, int, int]]:
    """(player, the coalition before it, the coalition with it) for each player in order."""
    found, coalition = [], 0
    for player in order:
        found.append((player, coalition, coalition | 1 << player))
        coalition |= 1 << player
    return found


def game_of(players: Sequence[str], orders: int, rng: np.random.Generator) -> Game:
    """The game of these players: exact up to EXACT_PLAYERS, else with so many sampled orders, each with its reverse."""
    count = len(players)
    if count <= EXACT_PLAYERS:
        return Game(players=tuple(players), coalitions=tuple(range(1 << count)))
    drawn: list[tuple[int, ...]] = []
    for _ in range(max(orders // 2, 2)):
        order = tuple(int(player) for player in rng.permutation(count))
        drawn += [order, order[::-1]]
    reached = {0} | {after for order in drawn for _, _, after in steps(order)}
    return Game(players=tuple(players), coalitions=tuple(sorted(reached)), orders=tuple(drawn))
