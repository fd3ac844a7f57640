"""What an analysis of routes reads: arrays by record, layer and expert, and the routes of single tokens.

Letters: R records, N tokens, L layers, E experts, K experts of a token, M random routers. A recorder or an importer
fills `Tables`; `count_routes` sums the routes of the tokens by record. Template tokens and first positions belong in an
analysis of their own: leave them out of the arrays.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.sums import SparseMatrix, dense, table

MISSING = ""
"""The label of a record without one."""


class TokenTable(Protocol):
    """Tokens with their record and id, and how often those of a row chose each expert."""

    @property
    def record_N(self) -> np.ndarray: ...

    @property
    def id_N(self) -> np.ndarray: ...

    @property
    def tokens_N(self) -> np.ndarray | None:
        """How many tokens an entry stands for; None if each is one."""
        ...

    def choices(self, layer: int, row_N: np.ndarray, rows: int) -> SparseMatrix:
        """[rows, E] float64: choices by row, where row_N says to which row each entry belongs, -1 for none."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenRoutes:
    """The experts of every token.

    Attributes:
      record_N: index of the token's record, 0 to R-1. id_N: token id.
      experts_LNK: integers below `experts`; a view of any strides will do.
    """

    record_N: np.ndarray
    id_N: np.ndarray
    experts_LNK: np.ndarray
    experts: int
    tokens_N: None = None

    def choices(self, layer: int, row_N: np.ndarray, rows: int) -> SparseMatrix:
        """[rows, E] float64: choices by row; tokens of row -1 are left out."""
        kept_N = row_N >= 0
        chosen_NK = np.asarray(self.experts_LNK[layer])[kept_N]
        row_X = np.repeat(row_N[kept_N], chosen_NK.shape[1])
        return table((row_X, chosen_NK.ravel()), np.ones(len(row_X)), (rows, self.experts))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenCounts:
    """Counts by record, layer, token id and expert, where the single tokens were not kept.

    Attributes:
      record_N, id_N, tokens_N: the distinct (record, id), and how many tokens each has.
      entry_X, layer_X, expert_X, count_X: choices of expert_X in layer_X by the tokens of entry entry_X, which is an
        index into the first three.
    """

    record_N: np.ndarray
    id_N: np.ndarray
    tokens_N: np.ndarray
    entry_X: np.ndarray
    layer_X: np.ndarray
    expert_X: np.ndarray
    count_X: np.ndarray
    experts: int

    def choices(self, layer: int, row_N: np.ndarray, rows: int) -> SparseMatrix:
        """[rows, E] float64: choices by row; entries of row -1 are left out."""
        row_X = row_N[self.entry_X]
        kept_X = (self.layer_X == layer) & (row_X >= 0)
        place = (row_X[kept_X], self.expert_X[kept_X])
        return table(place, self.count_X[kept_X], (rows, self.experts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interaction:
    """The interaction of a knock-out with the groups of the question `field`: first minus second group, in nats."""

    field: str
    layer: int
    expert: int
    estimate: float
    p_adjusted: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """A recording of routes, summed by record. Fields that were not recorded are None.

    Attributes:
      counts_RLE: how often the record's tokens chose each expert.
      tokens_R: number of the record's tokens.
      groups: for each field ("language", ...) the label of each record; MISSING where it has none.
      cluster_R: the record's unit of analysis, such as its document; by default each record is one.
      pair_R: what a record shares with its translation; MISSING for a record without one.
      stratum_R: labels are exchanged within strata only.
      layer_L: the layers' numbers, by default 0 to L-1.
      weights_RLE: sums of the weights that the tokens gave to the experts.
      routes: the single tokens, of the same records.
      random_RMLE: counts of M random routers that read the same hidden states.
      baseline_RLE: counts of the base model on the same records.
      nll_R, shuffled_nll_R: mean NLL per token, with the model's own routes, and if each token gets the set and weights
        of another token of its record. nll_floor: the numerical noise of their difference.
      correct_R: 1 where the model answered the question of the record right, 0 where wrong, NaN where not known.
      interactions: results of knock-outs.
    """

    counts_RLE: np.ndarray
    tokens_R: np.ndarray
    groups: Mapping[str, np.ndarray]
    cluster_R: np.ndarray | None = None
    pair_R: np.ndarray | None = None
    stratum_R: np.ndarray | None = None
    layer_L: np.ndarray | None = None
    weights_RLE: np.ndarray | None = None
    routes: TokenTable | None = None
    random_RMLE: np.ndarray | None = None
    baseline_RLE: np.ndarray | None = None
    nll_R: np.ndarray | None = None
    shuffled_nll_R: np.ndarray | None = None
    nll_floor: float = 1e-4
    correct_R: np.ndarray | None = None
    interactions: Sequence[Interaction] | None = None

    def __post_init__(self) -> None:
        if self.counts_RLE.ndim != 3 or 0 in self.counts_RLE.shape:
            raise BimedixError(
                f"counts of routes have the shape {self.counts_RLE.shape}; give records x layers x experts, none empty."
            )
        records, layers, experts = self.counts_RLE.shape
        self._require_shapes(records, layers, experts)
        empty = np.flatnonzero(self.counts_RLE.sum(2).min(1) <= 0)
        if len(empty):
            raise BimedixError(f"record {empty[0]} has a layer without any route; leave out records without tokens.")
        if (self.nll_R is None) != (self.shuffled_nll_R is None):
            raise BimedixError("the divergence gate needs the NLL with and without shuffled routes; give both or none.")

    def _require_shapes(self, records: int, layers: int, experts: int) -> None:
        """Raises BimedixError for an array that does not belong to the same records, layers and experts."""
        expected: dict[str, tuple[int, ...]] = {"layer_L": (layers,)}
        expected |= dict.fromkeys(("tokens_R", "cluster_R", "pair_R", "stratum_R"), (records,))
        expected |= dict.fromkeys(("nll_R", "shuffled_nll_R", "correct_R"), (records,))
        expected |= dict.fromkeys(("weights_RLE", "baseline_RLE"), (records, layers, experts))
        given = {name: getattr(self, name) for name in expected}
        given |= {f"labels of {name}": labels for name, labels in self.groups.items()}
        for name, array in given.items():
            shape = expected.get(name, (records,))
            if array is not None and np.shape(array) != shape:
                raise BimedixError(f"{name} has the shape {np.shape(array)}, but the counts of routes need {shape}.")
        routers = self.random_RMLE
        if routers is not None and (routers.ndim, routers.shape[0], *routers.shape[2:]) != (
            4,
            records,
            layers,
            experts,
        ):
            raise BimedixError(
                f"random_RMLE has the shape {routers.shape}, but the counts of routes need "
                f"({records}, random routers, {layers}, {experts})."
            )

    @property
    def layers(self) -> list[int]:
        """The layers' numbers."""
        layers = range(self.counts_RLE.shape[1]) if self.layer_L is None else self.layer_L
        return [int(layer) for layer in layers]


def count_routes(routes: TokenTable, records: int, layers: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """counts_RLE and tokens_R of the tokens' routes, int64."""
    counts_RLE = np.zeros((records, layers, experts), np.int64)
    for layer in range(layers):
        counts_RLE[:, layer] = dense(routes.choices(layer, routes.record_N, records)).round().astype(np.int64)
    tokens_N = np.ones(len(routes.record_N)) if routes.tokens_N is None else routes.tokens_N
    return counts_RLE, np.bincount(routes.record_N, tokens_N, records).astype(np.int64)
