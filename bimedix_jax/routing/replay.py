"""Which part of a fine-tune's gain came with the attention, the experts and the routes, as Shapley values.

Every coalition of parts is run: parameters of the base or of the tuned model, under the recorded sets and weights of
the one or the other. Most of these models are hybrids that nobody trained.

Letters as in routing/sequences.py and routing/shapley.py.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import nnx
from tqdm import tqdm

from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.scoring import target_logprobs
from bimedix_jax.models.routers import Record as RecordKind
from bimedix_jax.models.routers import Routing, RoutingPlan
from bimedix_jax.routing.clusters import generator
from bimedix_jax.routing.coalitions import ATTENTION, EXPERTS, ROUTER, ROUTES, SETS, WEIGHTS, Pair, Routes
from bimedix_jax.routing.measures import overlap
from bimedix_jax.routing.sequences import Batch, Sequences, batches
from bimedix_jax.routing.shapley import Game, game_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Players:
    """What counts as a player.

    Attributes:
      split_gates: the sets of experts and their weights instead of the routes.
      live: the router's parameters instead of the routes; nothing is replayed.
      layers: number of groups of consecutive layers, each with players of its own.
    """

    split_gates: bool = False
    live: bool = False
    layers: int = 1

    @property
    def factors(self) -> tuple[str, ...]:
        if self.live:
            return ATTENTION, EXPERTS, ROUTER
        return (ATTENTION, EXPERTS, SETS, WEIGHTS) if self.split_gates else (ATTENTION, EXPERTS, ROUTES)

    def check(self, pair: Pair) -> None:
        """Raises BimedixError if these players do not fit the models."""
        if self.live and self.split_gates:
            raise BimedixError("live replays no routes, so there are no gates to split; leave out one of the two")
        if not 1 <= self.layers <= pair.layers:
            raise BimedixError(
                f"{self.layers} groups of layers do not fit {pair.layers} layers; give 1 to {pair.layers}"
            )
        if self.live and not pair.same_router:
            raise BimedixError(
                "the adapter was trained with another router variant than the base, so their routers cannot be "
                "exchanged; leave out --live to exchange the routes"
            )

    def spans(self, layers: int) -> list[range]:
        """The layers of each group."""
        ends = [layers * group // self.layers for group in range(self.layers + 1)]
        return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]

    def names(self, layers: int) -> list[str]:
        """A name for each player: "experts", or "experts 0:4" for a group of layers."""
        if self.layers == 1:
            return list(self.factors)
        return [f"{factor} {span.start}:{span.stop}" for span in self.spans(layers) for factor in self.factors]

    def tuned(self, coalition: int, layers: int) -> dict[str, np.ndarray]:
        """For each factor, bool [L]: the layers in which a coalition has the tuned model's."""
        found = {factor: np.zeros(layers, bool) for factor in self.factors}
        for group, span in enumerate(self.spans(layers)):
            for place, factor in enumerate(self.factors):
                found[factor][span.start : span.stop] = bool(coalition >> (group * len(self.factors) + place) & 1)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Replayed:
    """The negative log-likelihood of every token under every coalition.

    Attributes:
      nll_CN: nats of the answers' tokens, record by record.
      record_N, position_N: record and position of each token.
      ends_2N: the same of the base and of the tuned model themselves, without replay.
      changed_RL, overlap_RL: share of the record's tokens with another set in the tuned model, and mean overlap / k.
    """

    game: Game
    nll_CN: np.ndarray
    record_N: np.ndarray
    position_N: np.ndarray
    ends_2N: np.ndarray
    changed_RL: np.ndarray
    overlap_RL: np.ndarray


def replay(
    pair: Pair,
    sequences: Sequences,
    players: Players | None = None,
    orders: int = 24,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> Replayed:
    """Runs every coalition on every record.

    Args:
      orders: number of sampled orders where there are too many players for all coalitions.

    Raises:
      BimedixError: the players do not fit the models, or a model computes NaN or infinity.
    """
    players = players or Players()
    players.check(pair)
    rng = generator(seed, "orders")
    game = game_of(players.names(pair.layers), orders, rng)
    tokens = Tokens.of(sequences)
    nll_CN, ends_2N = np.zeros((len(game.coalitions), tokens.count)), np.zeros((2, tokens.count))
    changed_RL, overlap_RL = np.zeros((2, len(sequences.ids), pair.layers))
    runs = [CoalitionRun(pair, players, coalition) for coalition in game.coalitions]
    models = [nnx.split(model) for model in (pair.base, pair.tuned)]
    record: RecordKind = "full" if players.split_gates else "choices"
    config = pair.tuned.config
    total = len(list(batches(sequences, sequences.answer, config, batch_tokens)))
    with tqdm(total=total * len(runs), desc="coalitions", unit="run", delay=2, disable=None) as bar:
        for batch in batches(sequences, sequences.answer, config, batch_tokens):
            routings = []
            for row, (graph, weights) in enumerate(models):
                logprobs_BT, routing = target_logprobs(
                    graph, weights, batch.tokens_BT, batch.ids_BT, batch.scored_BT, None, record
                )
                assert routing is not None
                tokens.put(ends_2N[row], batch, -logprobs_BT)
                routings.append(routing)
            routes = Routes(routings[0], routings[1], pair)
            if pair.same_router and not players.live:
                routes = routes.settled(CoalitionRun(pair, Players(live=True), 0).free(batch, record))
            flips_of(routes, batch, config.router.num_experts, changed_RL, overlap_RL)
            for row, run in enumerate(runs):
                tokens.put(nll_CN[row], batch, run.nll(batch, routes))
                bar.update()
    if not (np.isfinite(nll_CN).all() and np.isfinite(ends_2N).all()):
        raise BimedixError("a model computes NaN or infinity; check its weights, or load it with base float32")
    return Replayed(
        game=game,
        nll_CN=nll_CN,
        record_N=tokens.record_N,
        position_N=tokens.position_N,
        ends_2N=ends_2N,
        changed_RL=changed_RL,
        overlap_RL=overlap_RL,
    )


class CoalitionRun:
    """Runs one coalition on batches."""

    def __init__(self, pair: Pair, players: Players, coalition: int):
        self.pair, self.live = pair, players.live
        self.tuned = players.tuned(coalition, pair.layers)
        kept_L = np.ones(pair.layers, bool)  # with replay, the router's own decisions are not used
        self.parameters = {ROUTER: kept_L} | {name: self.tuned[name] for name in (ATTENTION, EXPERTS)}
        if players.live:
            self.parameters[ROUTER] = self.tuned[ROUTER]

    def free(self, batch: Batch, record: RecordKind) -> Routing:
        """What the routers do without a plan."""
        arrays = (batch.tokens_BT, batch.ids_BT, batch.scored_BT)
        routing = target_logprobs(self.pair.graph, self.pair.state(self.parameters), *arrays, None, record)[1]
        assert routing is not None
        return routing

    def nll(self, batch: Batch, routes: Routes) -> np.ndarray:
        """[B, T]: nats of the scored tokens."""
        plan = RoutingPlan()
        if not self.live:
            sets_L, weights_L = (self.tuned[name if name in self.tuned else ROUTES] for name in (SETS, WEIGHTS))
            plan = routes.plan(sets_L, weights_L)
        state = self.pair.state(self.parameters)
        logprobs_BT, _ = target_logprobs(
            self.pair.graph, state, batch.tokens_BT, batch.ids_BT, batch.scored_BT, plan, "none"
        )
        return -logprobs_BT


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The places of the scored tokens in arrays over all records."""

    chosen: Sequence[np.ndarray]
    start_R: np.ndarray
    record_N: np.ndarray
    position_N: np.ndarray

    @classmethod
    def of(cls, sequences: Sequences) -> "Tokens":
        sizes_R = np.array([int(chosen.sum()) for chosen in sequences.answer])
        return cls(
            sequences.answer,
            np.concatenate([[0], np.cumsum(sizes_R)]),
            np.repeat(np.arange(len(sizes_R)), sizes_R),
            np.concatenate([np.flatnonzero(chosen) for chosen in sequences.answer]),
        )

    @property
    def count(self) -> int:
        return len(self.record_N)

    def put(self, values_N: np.ndarray, batch: Batch, values_BT: np.ndarray) -> None:
        """Copies the values of a batch's scored tokens, in place."""
        for index, values_T in batch.by_sequence(values_BT):
            values_N[self.start_R[index] : self.start_R[index + 1]] = values_T[self.chosen[index]]


def flips_of(routes: Routes, batch: Batch, experts: int, changed_RL: np.ndarray, overlap_RL: np.ndarray) -> None:
    """Sets the records' shares of tokens with another set, and their mean overlap, in place."""
    base_LBTK, tuned_LBTK = (np.asarray(routing.experts_LBTK) for routing in (routes.base, routes.tuned))
    for index, line, start in batch.places:
        span = slice(start, start + batch.lengths[index])
        kept_LT = overlap(base_LBTK[:, line, span], tuned_LBTK[:, line, span], experts)
        changed_RL[index], overlap_RL[index] = (kept_LT < 1 - 1e-9).mean(1), kept_LT.mean(1)
