"""log p of continuations of contexts: a context runs once, however many continuations it has.

Contexts are packed into lines of one width, as segments, and logits are computed for scored positions only. Where
continuations are longer than a token, the keys and values of the lines are kept, and the continuations run in rounds.
A round has at most one continuation of each context, in the segment of that context, so that it attends to its context
and to itself. There are at most two widths of lines, and one width of rounds for each: few shapes are compiled.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.padding import bucket, packed, packed_places
from bimedix_jax.inference.planning import Planner, Plans, Tokens
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record, Routing, RoutingPlan

POSITIONS_PER_CHUNK = 64
"""Positions whose logits are in memory at the same time; their number is rounded up to a bucket of at least this."""


@dataclasses.dataclass(frozen=True)
class Group:
    """A context and the continuations to score after it; all of them have tokens."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens that the model reads of the context and its longest continuation: all but the last one."""
        return len(self.context) + max(map(len, self.continuations)) - 1


Scored = tuple[float, bool]
"""(log p of a continuation in nats, whether each of its tokens was the most likely one)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What runs in a line: a context with one continuation, or a context alone, for the first token of several."""

    group: int
    chosen: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Lines of packed rows.

    Attributes:
      rows: the rows, each with its line and start.
      round_columns: columns of the rounds that follow; 0 if no continuation is longer than a token.
    """

    rows: list[tuple[Row, int, int]]
    tokens_BT: np.ndarray
    ids_BT: np.ndarray
    round_columns: int


@dataclasses.dataclass
class Sums:
    """What is known so far of each (group, continuation): log p, and whether it is greedy."""

    logprob: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    greedy: dict[tuple[int, int], bool] = dataclasses.field(default_factory=dict)

    def add(self, key: tuple[int, int], logprob: float, greedy: bool) -> None:
        """Adds one token."""
        self.logprob[key] = self.logprob.get(key, 0.0) + logprob
        self.greedy[key] = self.greedy.get(key, True) and greedy


Wanted = list[tuple[int, list[tuple[tuple[int, int], int]]]]
"""Scored positions: (flat index in the batch, [(key, target token), ...])."""


class Continuations:
    """Scores groups with one model, batch by batch. Batches depend on the groups only, not on what is left to do.

    Args:
      plan: what the routers are told to do, with B and T of 1, or a planner whose sources are the groups.
      batch_tokens: tokens run at a time; it affects speed and memory only.
      columns: width of a line; longer rows have lines of their own width.

    Raises:
      BimedixError: a token id that the model lacks, an empty context or continuation, or a group that is longer than
        the model's context.
    """

    def __init__(
        self,
        model: Mixtral,
        groups: Sequence[Group],
        plan: RoutingPlan | Planner | None = None,
        batch_tokens: int = 4096,
        columns: int = 512,
    ):
        self.groups, self.longest = list(groups), model.config.max_position_embeddings
        for group in self.groups:
            if not group.context or not all(group.continuations):
                raise BimedixError("a context or a continuation has no tokens; give each at least one")
            if group.longest > self.longest:
                raise BimedixError(
                    f"a context with its continuation has {group.longest} tokens, more than this model's context of "
                    f"{self.longest}; shorten it"
                )
        require_ids(
            (ids for group in self.groups for ids in (group.context, *group.continuations)), model.config.vocab_size
        )
        self.plans = Plans(plan or RoutingPlan(), model)
        self.graph, self.weights = nnx.split(model)
        self.targets = bucket(max((len(group.continuations) for group in self.groups), default=1), smallest=1)
        # a sliding window counts slots of the cache, which are not positions where lines are packed
        self.shares = model.config.sliding_window is None
        self.batches = list(self._batches(batch_tokens, min(columns, self.longest)))

    def _batches(self, batch_tokens: int, columns: int) -> Iterator[Batch]:
        plain: list[Row] = []
        shared: list[Row] = []
        width = self._round_columns(columns)
        for index, group in enumerate(self.groups):
            every = tuple(range(len(group.continuations)))
            alone = all(len(group.continuations[number]) == 1 for number in every)
            if len(every) > 1 and (alone or (self.shares and len(group.context) + width <= self.longest)):
                (plain if alone else shared).append(Row(index, every, group.context))
                continue
            for number in every:
                plain.append(Row(index, (number,), group.context + group.continuations[number][:-1]))
        for rows, longest, rest in ((plain, self.longest, 0), (shared, self.longest - width, width)):
            for places, tokens_BT, ids_BT in packed([row.tokens for row in rows], batch_tokens, longest, columns):
                yield Batch([(rows[index], line, start) for index, line, start in places], tokens_BT, ids_BT, rest)

    def _round_columns(self, columns: int) -> int:
        """Columns of a round, so that a line's continuations fill about as many rounds as a context has."""
        many = [group for group in self.groups if len(group.continuations) > 1]
        longest = max((len(ids) - 1 for group in many for ids in group.continuations), default=0)
        context = sum(len(group.context) for group in many) or 1
        mean = sum(len(ids) - 1 for group in many for ids in group.continuations) / max(self.targets, 1)
        return bucket(max(longest, round(1.2 * mean * columns / context)))

    def score(self, batch: Batch) -> dict[tuple[int, int], Scored]:
        """(index of a group, index of its continuation) -> what is known of it, for all of the batch."""
        sums = Sums()
        height, columns = batch.tokens_BT.shape
        slots = columns + batch.round_columns if batch.round_columns else 0
        lengths = {row.group: len(row.tokens) for row, *_ in batch.rows}
        order = [row for row, *_ in batch.rows]
        places = [(number, line, start) for number, (_, line, start) in enumerate(batch.rows)]
        items_BT, positions_BT = packed_places(batch.tokens_BT.shape, places, [len(row.tokens) for row in order])
        groups_R = np.array([row.group for row in order], np.int32)
        caches: dict[str, KVCache] = {}

        def read(name: str, graph: nnx.GraphDef, weights: nnx.State, free: RoutingPlan) -> Routing | None:
            _, found, routing = read_lines(graph, weights, batch.tokens_BT, batch.ids_BT, free, slots, "choices")
            if found is not None:
                caches[name] = found
            return routing

        own = self.plans.of(
            Tokens(batch.tokens_BT, groups_R[items_BT], np.where(batch.ids_BT != 0, positions_BT, -1)), read
        )
        kept = self.plans.record("none")
        hidden_BTD, cache, _ = read_lines(self.graph, self.weights, batch.tokens_BT, batch.ids_BT, own, slots, kept)
        wanted = [found for row, line, start in batch.rows for found in self._wanted(row, line * columns + start)]
        self._collect(hidden_BTD, wanted, sums)
        if cache is not None:
            for rows in self._rounds(batch):
                self._run_round(batch, rows, cache, caches, lengths, height, sums)
        return {key: (sums.logprob[key], sums.greedy[key]) for key in sums.logprob}

    def _wanted(self, row: Row, start: int) -> Wanted:
        group = self.groups[row.group]
        last = start + len(group.context) - 1
        number, *more = row.chosen
        if more:
            return [(last, [((row.group, one), group.continuations[one][0]) for one in row.chosen])]
        return [(last + i, [((row.group, number), token)]) for i, token in enumerate(group.continuations[number])]

    def _rounds(self, batch: Batch) -> list[list[tuple[int, int, int, int, int]]]:
        """Rounds of (group, continuation, line, start, segment): first-fit, longest continuations first."""
        rounds: list[list[tuple[int, int, int, int, int]]] = []
        used: list[tuple[dict[int, int], set[int]]] = []
        waiting = [
            (row.group, number, line, int(batch.ids_BT[line, start]))
            for row, line, start in batch.rows
            for number in row.chosen
            if len(self.groups[row.group].continuations[number]) > 1
        ]
        waiting.sort(key=lambda item: -len(self.groups[item[0]].continuations[item[1]]))
        for index, number, line, segment in waiting:
            size = len(self.groups[index].continuations[number]) - 1
            fits = (
                place
                for place, (filled, present) in enumerate(used)
                if index not in present and filled.get(line, 0) + size <= batch.round_columns
            )
            place = next(fits, len(rounds))
            if place == len(rounds):
                rounds.append([])
                used.append(({}, set()))
            filled, present = used[place]
            rounds[place].append((index, number, line, filled.get(line, 0), segment))
            filled[line] = filled.get(line, 0) + size
            present.add(index)
        return rounds

    def _run_round(
        self,
        batch: Batch,
        rows: list[tuple[int, int, int, int, int]],
        cache: KVCache,
        caches: dict[str, KVCache],
        lengths: dict[int, int],
        height: int,
        sums: Sums,
    ) -> None:
        width = batch.round_columns
        tokens_BW, ids_BW, items_BW = (np.zeros((height, width), np.int32) for _ in range(3))
        positions_BW = np.full((height, width), -1, np.int32)
        wanted: Wanted = []
        for index, number, line, start, segment in rows:
            ids = self.groups[index].continuations[number]
            span = slice(start, start + len(ids) - 1)
            tokens_BW[line, span], ids_BW[line, span], items_BW[line, span] = ids[:-1], segment, index
            positions_BW[line, span] = lengths[index] + np.arange(len(ids) - 1)
            wanted += [(line * width + start + i, [((index, number), token)]) for i, token in enumerate(ids[1:])]
        own = self.plans.of(
            Tokens(tokens_BW, items_BW, positions_BW),
            lambda name, graph, weights, free: read_round(
                graph, weights, caches[name], tokens_BW, ids_BW, free, "choices"
            )[1],
        )
        kept = self.plans.record("none")
        hidden_BWD, _ = read_round(self.graph, self.weights, cache, tokens_BW, ids_BW, own, kept)
        self._collect(hidden_BWD, wanted, sums)

    def _collect(self, hidden_BTD: jax.Array, wanted: Wanted, sums: Sums) -> None:
        """Adds log p of the wanted tokens."""
        size = bucket(len(wanted), smallest=POSITIONS_PER_CHUNK)
        width = max(self.targets if len(pairs) > 1 else 1 for _, pairs in wanted)
        positions_P, targets_PK = np.zeros(size, np.int32), np.zeros((size, width), np.int32)
        for place, (position, pairs) in enumerate(wanted):
            positions_P[place] = position
            targets_PK[place, : len(pairs)] = [token for _, token in pairs]
        found, best = tokens_at(self.graph, self.weights, hidden_BTD, positions_P, targets_PK)
        logprobs_PK, best_P = np.asarray(found, np.float64), np.asarray(best)
        for place, (_, pairs) in enumerate(wanted):
            for column, (key, token) in enumerate(pairs):
                sums.add(key, float(logprobs_PK[place, column]), bool(best_P[place] == token))


@functools.partial(jax.jit, static_argnames=("graph", "slots", "record"))
def read_lines(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    plan: RoutingPlan,
    slots: int,
    record: Record,
) -> tuple[Float[Array, "B T D"], KVCache | None, Routing | None]:
    """(final hidden states of packed lines, their cache of this many slots or None without slots, the record)."""
    model = nnx.merge(graph, weights)
    cache = KVCache.zeros(model.config, tokens_BT.shape[0], slots, model.dtype) if slots else None
    out = model.hidden(tokens_BT, ids_BT, plan, cache, record=record)
    return out.hidden_BTD, out.cache, out.routing


@functools.partial(jax.jit, static_argnames=("graph", "record"))
def read_round(
    graph: nnx.GraphDef,
    weights: nnx.State,
    cache: KVCache,
    tokens_BW: jax.Array,
    ids_BW: jax.Array,
    plan: RoutingPlan,
    record: Record,
) -> tuple[Float[Array, "B W D"], Routing | None]:
    """Final hidden states of continuations, each in the segment of its context. The cache is not changed."""
    out = nnx.merge(graph, weights).hidden(tokens_BW, ids_BW, plan, cache, record=record)
    return out.hidden_BTD, out.routing


@functools.partial(jax.jit, static_argnames=("graph",))
def tokens_at(
    graph: nnx.GraphDef,
    weights: nnx.State,
    hidden_BTD: jax.Array,
    positions_P: Int[Array, "P"],
    targets_PK: Int[Array, "P K"],
) -> tuple[Float[Array, "P K"], Int[Array, "P"]]:
    """(float32 log p of the targets after the tokens at flat positions, the most likely token there)."""
    head, count = nnx.merge(graph, weights).head, positions_P.shape[0]
    padding = -count % POSITIONS_PER_CHUNK
    hidden_PD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[positions_P]
    hidden_CRD = jnp.pad(hidden_PD, ((0, padding), (0, 0))).reshape(-1, POSITIONS_PER_CHUNK, hidden_PD.shape[1])
    targets_CRK = jnp.pad(targets_PK, ((0, padding), (0, 0))).reshape(-1, POSITIONS_PER_CHUNK, targets_PK.shape[1])

    def one_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits_RV = head(chunk[0])
        chosen_RK = jnp.take_along_axis(logits_RV, chunk[1], axis=-1)
        return chosen_RK - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True), jnp.argmax(logits_RV, axis=-1)

    logprobs_CRK, best_CR = jax.lax.map(one_chunk, (hidden_CRD, targets_CRK))
    return logprobs_CRK.reshape(-1, targets_PK.shape[1])[:count], best_CR.reshape(-1)[:count].astype(jnp.int32)
