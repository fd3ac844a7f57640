"""log p of continuations of contexts: a context runs once, however many continuations it has.

Contexts are packed into lines of one width, as segments, and logits are computed for scored positions only. Where
continuations are longer than a token, the keys and values of the lines are kept, and the continuations run in rounds.
A round has at most one continuation of each context, in the segment of that context, so that it attends to its context
and to itself. Widths are few (WIDTHS, ROUNDS), and so are compiled programs. A continuation that is too long for a
round runs after its own copy of the context.

Where many contexts begin with the same tokens, such as solved examples, these run once (inference/prefixes.py). Each
context then is a row of its own that continues their keys and values.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.padding import bucket, line_width, packed, packed_places, pad_right, part_of
from bimedix_jax.inference.planning import Planner, Plans, Tokens
from bimedix_jax.inference.prefixes import MEMBERS, Prefix, rows_after, shared_prefixes
from bimedix_jax.inference.steps import POSITIONS_PER_CHUNK, read_lines, read_prefix, read_round, tokens_at
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record, Routing, RoutingPlan

ROUNDS = (32, 128, 512)
"""Columns of a round."""
ROUND_TOKENS = 256
"""Tokens of a large batch that take as long as what a round costs beside its own tokens (150 to 200 on two cores)."""


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
Key = tuple[int, int]
"""(index of a group, index of its continuation)."""
Routes = dict[tuple[int, int | None], Routing | None]
"""What the routers did with a context (None) and with each of its continuations except the last token [L, 1, T, ...];
None for a continuation of one token."""


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
      prefix: the tokens that each line continues; then a line has one row, without these tokens.
    """

    rows: list[tuple[Row, int, int]]
    tokens_BT: np.ndarray
    ids_BT: np.ndarray
    round_columns: int
    prefix: Prefix | None = None

    @property
    def keys(self) -> list[Key]:
        """What the batch scores."""
        return [(row.group, number) for row, *_ in self.rows for number in row.chosen]


@dataclasses.dataclass
class Sums:
    """What is known so far of each (group, continuation): log p, and whether it is greedy."""

    logprob: dict[Key, float] = dataclasses.field(default_factory=dict)
    greedy: dict[Key, bool] = dataclasses.field(default_factory=dict)
    routes: Routes = dataclasses.field(default_factory=dict)

    def add(self, key: Key, logprob: float, greedy: bool) -> None:
        """Adds one token."""
        self.logprob[key] = self.logprob.get(key, 0.0) + logprob
        self.greedy[key] = self.greedy.get(key, True) and greedy


Wanted = list[tuple[int, list[tuple[Key, int]]]]
"""Scored positions: (flat index in the batch, [(key, target token), ...])."""


class Continuations:
    """Scores groups with one model, batch by batch. Batches depend on the groups only, not on what is left to do.

    Args:
      plan: what the routers are told to do, or a planner.
      batch_tokens: tokens run at a time; it affects speed, memory and rounding only.
      columns: width of a line; by default one of padding.WIDTHS. Longer rows have lines of their own width.
      items: the row of the plan, or the source of the planner, of each group; by default its index.
      record: "choices" or "full" also returns what the routers did.

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
        columns: int | None = None,
        items: Sequence[int] | None = None,
        record: Record = "none",
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
        self.record: Record = record
        # a plan may do something else in each sequence, and so may a window of slots
        free = isinstance(self.plans.source, RoutingPlan) and self.plans.source.is_free
        shares = free and record == "none" and model.config.sliding_window is None
        self.prefixes = shared_prefixes([group.context for group in self.groups]) if shares else {}
        self.read: tuple[Prefix, KVCache] | None = None
        self.items = np.arange(len(self.groups)) if items is None else np.asarray(items, np.int32)
        self.graph, self.weights = nnx.split(model)
        self.targets = bucket(max((len(group.continuations) for group in self.groups), default=1), smallest=1)
        self.batches = list(self._batches(batch_tokens, columns, model.config.sliding_window))

    def _batches(self, batch_tokens: int, columns: int | None, window: int | None) -> Iterator[Batch]:
        plain: list[Row] = []
        shared: list[Row] = []
        contexts = [len(group.context) for group in self.groups if len(group.continuations) > 1]
        asked = columns or line_width(contexts, self.longest)
        width = self._round_columns(asked, batch_tokens)
        # a sliding window counts slots of the cache, which are not positions where lines are packed
        room = self.longest - width
        if window is not None:
            room = min(asked, room) if asked + width <= window else 0
        for index, group in enumerate(self.groups):
            fits = width if len(group.context) <= room else 0
            short = tuple(number for number, ids in enumerate(group.continuations) if len(ids) - 1 <= fits)
            short = short if len(short) > 1 else ()
            if short:
                alone = all(len(group.continuations[number]) == 1 for number in short)
                (plain if alone else shared).append(Row(index, short, group.context))
            for number, ids in enumerate(group.continuations):
                if number not in short:
                    plain.append(Row(index, (number,), group.context + ids[:-1]))
        own = columns or line_width([len(row.tokens) for row in plain], self.longest)
        for rows, longest, wide, rest in ((plain, self.longest, own, 0), (shared, self.longest - width, asked, width)):
            alone = []
            for prefix, members in self._by_prefix(rows):
                fits = prefix is not None and prefix.slots + max(len(row.tokens) for row in members) <= longest
                if prefix is None or not fits:
                    alone += members
                    continue
                own_rows = [dataclasses.replace(row, tokens=row.tokens[len(prefix.tokens) :]) for row in members]
                for chosen, tokens_BT, ids_BT in rows_after(prefix, own_rows, batch_tokens, longest):
                    yield Batch([(row, line, 0) for line, row in enumerate(chosen)], tokens_BT, ids_BT, rest, prefix)
            loads = [self._tokens_of_rounds(row) for row in alone] if rest else None
            for places, tokens_BT, ids_BT in packed([row.tokens for row in alone], batch_tokens, longest, wide, loads):
                yield Batch([(alone[index], line, start) for index, line, start in places], tokens_BT, ids_BT, rest)

    def _tokens_of_rounds(self, row: Row) -> int:
        """Tokens that follow the row in rounds."""
        return sum(len(self.groups[row.group].continuations[number]) - 1 for number in row.chosen)

    def _by_prefix(self, rows: list[Row]) -> Iterator[tuple[Prefix | None, list[Row]]]:
        """Rows by the prefix that they share; too few of them share none."""
        found: dict[Prefix | None, list[Row]] = {}
        for row in rows:
            found.setdefault(self.prefixes.get(row.group), []).append(row)
        for prefix, members in found.items():
            yield (prefix if len(members) >= MEMBERS else None), members

    def _round_columns(self, columns: int, batch_tokens: int) -> int:
        """The columns of a round for which the fewest tokens run, by an estimate. Each round costs some more."""
        many = [group for group in self.groups if len(group.continuations) > 1]
        lines = max(sum(len(group.context) for group in many) / columns, 1.0)
        height = min(max(batch_tokens // columns, 1), lines)
        most = max((sum(len(ids) > 1 for ids in group.continuations) for group in many), default=0)

        def cost(width: int) -> float:
            rest = sum(len(ids) - 1 for group in many for ids in group.continuations if len(ids) <= width + 1)
            long = [(group, ids) for group in many for ids in group.continuations if len(ids) > width + 1]
            rounds = max(most, 1.3 * rest / (lines * width))  # rounds do not fill up evenly
            tokens = (lines * width + ROUND_TOKENS * lines / height) * rounds
            return tokens + sum(len(group.context) + len(ids) for group, ids in long)

        return min([width for width in ROUNDS if width <= self.longest // 2] or [max(self.longest // 2, 1)], key=cost)

    def score(self, batch: Batch) -> dict[Key, Scored]:
        """What is known of each continuation, for all of the batch."""
        return self.score_and_record(batch)[0]

    def score_and_record(self, batch: Batch) -> tuple[dict[Key, Scored], Routes]:
        """`score`, and the record, which is empty unless asked for."""
        sums = Sums()
        height, columns = batch.tokens_BT.shape
        slots = columns + batch.round_columns if batch.round_columns else 0
        prefix = self._prefix(batch)
        if batch.prefix is not None:
            slots = batch.prefix.slots + columns + batch.round_columns
        order = [row for row, *_ in batch.rows]
        places = [(number, line, start) for number, (_, line, start) in enumerate(batch.rows)]
        items_BT, positions_BT = packed_places(batch.tokens_BT.shape, places, [len(row.tokens) for row in order])
        items_R = self.items[[row.group for row in order]]
        caches: dict[str, KVCache] = {}

        def read(name: str, graph: nnx.GraphDef, weights: nnx.State, free: RoutingPlan) -> Routing | None:
            _, found, routing = read_lines(graph, weights, batch.tokens_BT, batch.ids_BT, free, slots, "choices")
            if found is not None:
                caches[name] = found
            return routing

        own = self.plans.of(
            Tokens(batch.tokens_BT, items_R[items_BT], np.where(batch.ids_BT != 0, positions_BT, -1)), read
        )
        kept = self.plans.record(self.record)
        hidden_BTD, cache, routing = read_lines(
            self.graph, self.weights, batch.tokens_BT, batch.ids_BT, own, slots, kept, prefix
        )
        skipped = len(batch.prefix.tokens) if batch.prefix is not None else 0
        wanted = [
            found for row, line, start in batch.rows for found in self._wanted(row, line * columns + start - skipped)
        ]
        self._collect(hidden_BTD, wanted, sums)
        if routing is not None and self.record != "none":
            for row, line, start in batch.rows:
                sums.routes |= self._routes(row, routing, line, start)
        if cache is not None and batch.round_columns:
            for rows in self._rounds(batch):
                self._run_round(batch, rows, cache, caches, height, sums)
        return {key: (sums.logprob[key], sums.greedy[key]) for key in sums.logprob}, sums.routes

    def _prefix(self, batch: Batch) -> KVCache | None:
        """Keys and values of the batch's prefix; batches of the same prefix follow each other."""
        if batch.prefix is None:
            return None
        if self.read is None or self.read[0] is not batch.prefix:
            tokens_1T, ids_1T = pad_right([batch.prefix.tokens], batch.prefix.slots)
            self.read = batch.prefix, read_prefix(self.graph, self.weights, tokens_1T, ids_1T, RoutingPlan())
        return self.read[1]

    def _routes(self, row: Row, routing: Routing, line: int, start: int) -> Routes:
        """The record of a row, without what follows in rounds."""
        length = len(self.groups[row.group].context)
        found: Routes = {(row.group, number): None for number in row.chosen}
        if len(row.tokens) > length:
            (number,) = row.chosen
            found[row.group, number] = part_of(routing, line, start + length, len(row.tokens) - length)
        return {**found, (row.group, None): part_of(routing, line, start, length)}

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
            tokens_BW[line, span], ids_BW[line, span], items_BW[line, span] = ids[:-1], segment, self.items[index]
            positions_BW[line, span] = len(self.groups[index].context) + np.arange(len(ids) - 1)
            wanted += [(line * width + start + i, [((index, number), token)]) for i, token in enumerate(ids[1:])]
        own = self.plans.of(
            Tokens(tokens_BW, items_BW, positions_BW),
            lambda name, graph, weights, free: read_round(
                graph, weights, caches[name], tokens_BW, ids_BW, free, "choices"
            )[1],
        )
        kept = self.plans.record(self.record)
        hidden_BWD, routing = read_round(self.graph, self.weights, cache, tokens_BW, ids_BW, own, kept)
        self._collect(hidden_BWD, wanted, sums)
        if routing is not None and self.record != "none":
            for index, number, line, start, _ in rows:
                length = len(self.groups[index].continuations[number]) - 1
                sums.routes[index, number] = part_of(routing, line, start, length)

    def _collect(self, hidden_BTD: jax.Array, wanted: Wanted, sums: Sums) -> None:
        """Adds log p of the wanted tokens. The shapes depend on the batch's only."""
        size = -(-hidden_BTD.shape[0] * hidden_BTD.shape[1] // POSITIONS_PER_CHUNK) * POSITIONS_PER_CHUNK
        positions_P, targets_PK = np.zeros(size, np.int32), np.zeros((size, self.targets), np.int32)
        for place, (position, pairs) in enumerate(wanted):
            positions_P[place] = position
            targets_PK[place, : len(pairs)] = [token for _, token in pairs]
        count = np.int32(len(wanted))
        found, best = tokens_at(self.graph, self.weights, hidden_BTD, positions_P, targets_PK, count)
        logprobs_PK, best_P = np.asarray(found, np.float64), np.asarray(best)
        for place, (_, pairs) in enumerate(wanted):
            for column, (key, token) in enumerate(pairs):
                sums.add(key, float(logprobs_PK[place, column]), bool(best_P[place] == token))
