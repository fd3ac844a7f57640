"""From the NLL of coalitions to a split of the gain: Shapley values with intervals, interactions, ranges over orders.

Letters: R records, N tokens, C coalitions, P players, U clusters, X columns.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from bimedix_jax.routing.clusters import generator
from bimedix_jax.routing.intervals import mean_intervals
from bimedix_jax.routing.replay import Replayed
from bimedix_jax.routing.sequences import Sequences
from bimedix_jax.routing.tables import MISSING

NEGLIGIBLE = 1e-9
"""Nats below which a value counts as 0 when a split is called dependent on the order; so does what is within twice the
error of the endpoints, which is rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """The split of the gain in one group of records. All numbers are nats per token; a gain is NLL saved.

    Attributes:
      nll_C3: NLL of each coalition with the ends of its interval; NaN where there are too few clusters.
      gain_3, shapley_P3: the gain and each player's part of it.
      interaction_X3: for each pair of players.
      least_P, most_P: what a player brings in the order where it brings least and most.
      error_P: standard error of the sampled orders; None if all coalitions were run.
      endpoint_error: largest difference between the NLL of both ends and that of the models themselves.
    """

    records: int
    clusters: int
    tokens: int
    nll_C3: np.ndarray
    gain_3: np.ndarray
    shapley_P3: np.ndarray
    pairs: list[tuple[int, int]]
    interaction_X3: np.ndarray
    least_P: np.ndarray
    most_P: np.ndarray
    error_P: np.ndarray | None
    endpoint_error: float

    @property
    def sum_error(self) -> float:
        """Difference between the players' parts and the gain, relative to the largest of them."""
        parts_P = self.shapley_P3[:, 0]
        largest = max(abs(self.gain_3[0]), float(np.abs(parts_P).max()))
        return abs(float(parts_P.sum()) - self.gain_3[0]) / largest if largest else 0.0

    def doubts(self, players: tuple[str, ...]) -> list[str]:
        """Why the split depends on the order in which parts are exchanged; empty if it does not."""
        found, zero = [], max(NEGLIGIBLE, 2 * self.endpoint_error)
        for player, name in enumerate(players):
            if self.least_P[player] < -zero and self.most_P[player] > zero:
                found.append(f"{name} saves or costs nats, depending on the order")
            for row, pair in enumerate(self.pairs):
                size = abs(self.interaction_X3[row, 0])
                if player in pair and size > abs(self.shapley_P3[player, 0]) + zero:
                    other = players[pair[0] if pair[1] == player else pair[1]]
                    found.append(f"the interaction of {name} with {other} exceeds the value of {name}")
        return found

    def to_dict(self, players: tuple[str, ...], members: list[list[str]]) -> dict[str, Any]:
        """The split for JSON. `members`: the players that each coalition takes from the tuned model."""
        doubts = self.doubts(players)
        return {
            "values": [
                {"tuned": names, "nats": row[0], "low": row[1], "high": row[2]}
                for names, row in zip(members, self.nll_C3.tolist(), strict=True)
            ],
            "gain": self.gain_3[0],
            "shapley": dict(zip(players, self.shapley_P3[:, 0].tolist(), strict=True)),
            "intervals": {name: row[1:] for name, row in zip(players, self.shapley_P3.tolist(), strict=True)}
            | {"gain": self.gain_3[1:].tolist()},
            "range_over_orders": {
                name: [float(self.least_P[player]), float(self.most_P[player])] for player, name in enumerate(players)
            },
            "interactions": [
                {"players": [players[i], players[j]], "nats": row[0], "low": row[1], "high": row[2]}
                for (i, j), row in zip(self.pairs, self.interaction_X3.tolist(), strict=True)
            ],
            "standard_errors": None if self.error_P is None else dict(zip(players, self.error_P.tolist(), strict=True)),
            "order_dependent": bool(doubts),
            "why": doubts,
            "sum_error": self.sum_error,
            "endpoint_error": self.endpoint_error,
            "records": self.records,
            "clusters": self.clusters,
            "tokens": self.tokens,
        }


def attribution(replayed: Replayed, sequences: Sequences, kept_R: np.ndarray, seed: int = 0) -> Attribution:
    """The split over the records of a group. NLLs are means over tokens, as those of `bimedix eval run`."""
    records = len(sequences.ids)
    game, record_N = replayed.game, replayed.record_N
    tokens_R = np.bincount(record_N, minlength=records) * kept_R
    nats_CR = np.array([np.bincount(record_N, nll_N, records) for nll_N in replayed.nll_CN])
    shapley_PC = -game.shapley()  # a gain is a decrease of the NLL
    pairs, interaction_XC = game.interactions()
    gain_1C = np.zeros((1, len(game.coalitions)))
    gain_1C[0, 0], gain_1C[0, -1] = gain_1C[0, 0] + 1, gain_1C[0, -1] - 1
    weights_XC = np.concatenate([np.eye(len(game.coalitions)), gain_1C, shapley_PC, -interaction_XC])
    unit_R, used_R = sequences.unit_R, tokens_R > 0
    found_X3 = ratio_intervals((weights_XC @ nats_CR).T[used_R], tokens_R[used_R], unit_R[used_R], seed)
    coalitions, players = len(game.coalitions), len(game.players)
    marginals = game.marginals(-found_X3[:coalitions, 0])
    total = tokens_R.sum()
    ends = [float((np.bincount(record_N, nll_N, records) * kept_R).sum() / total) for nll_N in replayed.ends_2N]
    parts = np.split(found_X3, np.cumsum([coalitions, 1, players]))
    return Attribution(
        records=int(used_R.sum()),
        clusters=len(np.unique(unit_R[used_R])),
        tokens=int(total),
        nll_C3=parts[0],
        gain_3=parts[1][0],
        shapley_P3=parts[2],
        pairs=pairs,
        interaction_X3=parts[3],
        least_P=np.array([values.min() for values in marginals]),
        most_P=np.array([values.max() for values in marginals]),
        error_P=game.standard_errors(-found_X3[:coalitions, 0]),
        endpoint_error=max(abs(ends[0] - found_X3[0, 0]), abs(ends[1] - found_X3[coalitions - 1, 0])),
    )


def ratio_intervals(totals_RX: np.ndarray, tokens_R: np.ndarray, unit_R: np.ndarray, seed: int) -> np.ndarray:
    """[X, 3]: sums per token with bootstrap-t intervals over clusters, by linearisation; see `mean_intervals`."""
    index_R = np.unique(unit_R, return_inverse=True)[1]
    clusters = int(index_R.max()) + 1
    totals_UX, tokens_U = np.zeros((clusters, totals_RX.shape[1])), np.zeros(clusters)
    np.add.at(totals_UX, index_R, totals_RX)
    np.add.at(tokens_U, index_R, tokens_R)
    ratio_X = np.array([math.fsum(column) for column in totals_RX.T]) / tokens_U.sum()
    influence_UX = (totals_UX - tokens_U[:, None] * ratio_X) / tokens_U.mean()
    found_X3 = mean_intervals(ratio_X + influence_UX, generator(seed, "attribution"))
    found_X3[:, 0] = ratio_X
    return found_X3


def groups_of(sequences: Sequences) -> dict[str, np.ndarray]:
    """bool [R] for each group of `bimedix eval run`: a language, or a language and a kind."""
    language_R, kind_R = sequences.labels("language"), sequences.labels("kind")
    found = {str(name): language_R == name for name in np.unique(language_R) if name != MISSING}
    for name, kept_R in list(found.items()):
        kinds = [kind for kind in np.unique(kind_R[kept_R]) if kind != MISSING]
        found |= {f"{name}/{kind}": kept_R & (kind_R == kind) for kind in kinds}
    return dict(sorted(found.items()))


def report(replayed: Replayed, sequences: Sequences, seed: int = 0) -> dict[str, Any]:
    """The split over all records and in each group, and how routes differ, for JSON."""
    players = replayed.game.players
    members = [replayed.game.members(coalition) for coalition in replayed.game.coalitions]
    everyone_R = np.ones(len(sequences.ids), bool)
    splits = {
        name: attribution(replayed, sequences, kept_R, seed).to_dict(players, members)
        for name, kept_R in ({"": everyone_R} | groups_of(sequences)).items()
    }
    length_R = np.array(sequences.lengths, np.float64)
    changed_L, overlap_L = (
        (values_RL * length_R[:, None]).sum(0) / length_R.sum()
        for values_RL in (replayed.changed_RL, replayed.overlap_RL)
    )
    overall = splits.pop("")
    return {
        "players": list(players),
        "exact": replayed.game.exact,
        "orders": None if replayed.game.orders is None else len(replayed.game.orders),
        **overall,
        "endpoint_error": max(split["endpoint_error"] for split in (overall, *splits.values())),
        "groups": splits,
        "flips": {
            "sets_changed": float(changed_L.mean()),
            "overlap": float(overlap_L.mean()),
            "sets_changed_by_layer": changed_L.tolist(),
        },
    }
