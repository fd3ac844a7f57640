"""log p of continuations of contexts: a context runs once, however many continuations it has.

A context and its continuations are one row. Each continuation is a segment of its own that continues the context's
(tree attention, arXiv 2305.09781), so that it attends to its context and to itself. Rows are packed into lines of few
widths, and logits are computed for scored positions only. So compiled programs are few.

Where contexts begin with the same tokens, such as a system message, these run once in each line, and its rows continue
them. Long common beginnings, such as solved examples, run once in all (inference/prefixes.py). Each row then has a line
of its own that continues their keys and values.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.padding import WIDTHS, bucket, line_width, packed, pad_right, part_of
from bimedix_jax.inference.planning import Planner, Plans, Tokens
from bimedix_jax.inference.prefixes import MEMBERS, Prefix, common_beginning, rows_after, shared_prefixes
from bimedix_jax.inference.steps import POSITIONS_PER_CHUNK, read_lines, read_prefix, tokens_at
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record, Routing, RoutingPlan

BRANCHES = 512
"""A row's continuations have together at most so many tokens, or as many as its context: they do not attend to each
other, but attention computes their scores."""


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
    """A context, and after it the continuations of `chosen`, all without their last token.

    Attributes:
      branches: tokens of each continuation if there are several; then each is a segment of its own.
    """

    group: int
    chosen: tuple[int, ...]
    tokens: tuple[int, ...]
    branches: tuple[int, ...] = ()

    def parts(self) -> list[tuple[int, int]]:
        """(start, length) of the context, with its continuation if there is only one, and of each branch."""
        length = len(self.tokens) - sum(self.branches)
        starts = length + np.cumsum([0, *self.branches[:-1]]) if self.branches else []
        return [(0, length), *zip(map(int, starts), self.branches, strict=True)]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Lines of packed rows.

    Attributes:
      rows: the rows, each with its line and the place where it would begin if it had all its tokens.
      shared: number of a row's first tokens that are not its own, but the beginning of the line or `prefix`.
      ancestor_ids_BTA: the segments that each token's own one continues; None if none does.
      prefix: the tokens that each line continues; then a line has one row.
    """

    rows: list[tuple[Row, int, int]]
    tokens_BT: np.ndarray
    ids_BT: np.ndarray
    shared: int = 0
    ancestor_ids_BTA: np.ndarray | None = None
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
        self.batches = list(self._batches(batch_tokens, columns, model.config.sliding_window, shares))
        chosen = (len(row.chosen) for batch in self.batches for row, *_ in batch.rows)
        self.targets = bucket(max(chosen, default=1), smallest=1)

    def _batches(self, batch_tokens: int, columns: int | None, window: int | None, shares: bool) -> Iterator[Batch]:
        # a window counts slots of a line, so a row that is longer than it has no branches
        most = min(self.longest, window or self.longest)
        rows = [row for index, group in enumerate(self.groups) for row in self._rows(index, group, most)]
        tree, alone = any(row.branches for row in rows), list[Row]()
        for prefix, members in self._by_prefix(rows):
            if prefix is None or prefix.slots + max(len(row.tokens) for row in members) > self.longest:
                alone += members
                continue
            for chosen, tokens_BT, ids_BT in rows_after(prefix, members, batch_tokens, self.longest):
                places = [(row, line, -len(prefix.tokens)) for line, row in enumerate(chosen)]
                yield _batch(places, tokens_BT, ids_BT, tree, prefix=prefix)
        # kernels for accelerators have no trees, which long rows need more than a short beginning in common
        shares &= max((len(row.tokens) for row in alone), default=0) <= WIDTHS[-1]
        head = common_beginning([self.groups[row.group].context for row in alone]) if shares else ()
        own, longest = [row.tokens[len(head) :] for row in alone], self.longest - len(head)
        width = max(columns - len(head), 1) if columns else line_width(list(map(len, own)), longest, len(head))
        for places, tokens_BT, ids_BT in packed(own, batch_tokens, longest, width):
            yield _batch([(alone[index], line, start) for index, line, start in places], tokens_BT, ids_BT, tree, head)

    def _rows(self, index: int, group: Group, most: int) -> Iterator[Row]:
        """Rows of at most `most` tokens with the continuations of a group, or of one continuation."""
        room = max(min(most - len(group.context), max(BRANCHES, len(group.context))), 0)
        rests = [ids[:-1] for ids in group.continuations]
        rows, filled = list[list[int]](), room + 1
        for number in sorted(range(len(rests)), key=lambda number: len(rests[number])):
            if filled + len(rests[number]) > room:
                rows.append([])
                filled = 0
            rows[-1].append(number)
            filled += len(rests[number])
        for chosen in rows:
            parts = [rests[number] for number in chosen]
            branches = tuple(map(len, parts)) if len(parts) > 1 and any(parts) else ()
            yield Row(index, tuple(chosen), tuple(itertools.chain(group.context, *parts)), branches)

    def _by_prefix(self, rows: list[Row]) -> Iterator[tuple[Prefix | None, list[Row]]]:
        """Rows by the prefix that they share; too few of them share none."""
        found: dict[Prefix | None, list[Row]] = {}
        for row in rows:
            found.setdefault(self.prefixes.get(row.group), []).append(row)
        for prefix, members in found.items():
            yield (prefix if len(members) >= MEMBERS else None), members

    def score(self, batch: Batch) -> dict[Key, Scored]:
        """What is known of each continuation, for all of the batch."""
        return self.score_and_record(batch)[0]

    def score_and_record(self, batch: Batch) -> tuple[dict[Key, Scored], Routes]:
        """`score`, and the record, which is empty unless asked for."""
        sums = Sums()
        prefix, ids = self._prefix(batch), (batch.ids_BT, batch.ancestor_ids_BTA)

        def read(_: str, graph: nnx.GraphDef, weights: nnx.State, free: RoutingPlan) -> Routing | None:
            return read_lines(graph, weights, batch.tokens_BT, *ids, free, "choices")[1]

        own = self.plans.of(self._tokens(batch), read)
        kept = self.plans.record(self.record)
        hidden_BTD, routing = read_lines(self.graph, self.weights, batch.tokens_BT, *ids, own, kept, prefix)
        columns = batch.tokens_BT.shape[1]
        wanted = [found for row, line, start in batch.rows for found in self._wanted(row, line * columns + start)]
        self._collect(hidden_BTD, wanted, sums)
        if routing is not None and self.record != "none":
            for row, line, start in batch.rows:
                sums.routes |= self._routes(row, routing, line, start)
        return {key: (sums.logprob[key], sums.greedy[key]) for key in sums.logprob}, sums.routes

    def _tokens(self, batch: Batch) -> Tokens:
        """The batch's tokens, with their places in their sequences."""
        items_BT, positions_BT = np.zeros_like(batch.ids_BT), np.full_like(batch.ids_BT, -1)
        for row, line, start in batch.rows:
            for number, (first, length) in enumerate(row.parts()):
                skipped, position = (0, len(self.groups[row.group].context)) if number else (batch.shared, 0)
                span = slice(start + first + skipped, start + first + length)
                items_BT[line, span] = self.items[row.group]
                positions_BT[line, span] = position + np.arange(skipped, length)
        return Tokens(batch.tokens_BT, items_BT, positions_BT)

    def _prefix(self, batch: Batch) -> KVCache | None:
        """Keys and values of the batch's prefix; batches of the same prefix follow each other."""
        if batch.prefix is None:
            return None
        if self.read is None or self.read[0] is not batch.prefix:
            tokens_1T, ids_1T = pad_right([batch.prefix.tokens], batch.prefix.slots)
            self.read = batch.prefix, read_prefix(self.graph, self.weights, tokens_1T, ids_1T, RoutingPlan())
        return self.read[1]

    def _routes(self, row: Row, routing: Routing, line: int, start: int) -> Routes:
        """The record of a row."""
        length = len(self.groups[row.group].context)
        (_, whole), *branches = row.parts()
        found: Routes = {(row.group, number): None for number in row.chosen}
        spans = dict(zip(row.chosen, branches, strict=True)) if branches else {row.chosen[0]: (length, whole - length)}
        for number, (first, tokens) in spans.items():
            if tokens:
                found[row.group, number] = part_of(routing, line, start + first, tokens)
        return {**found, (row.group, None): part_of(routing, line, start, length)}

    def _wanted(self, row: Row, start: int) -> Wanted:
        group = self.groups[row.group]
        last = start + len(group.context) - 1
        number, *more = row.chosen
        if not more:
            return [(last + i, [((row.group, number), token)]) for i, token in enumerate(group.continuations[number])]
        found: Wanted = [(last, [((row.group, one), group.continuations[one][0]) for one in row.chosen])]
        for one, (first, length) in zip(row.chosen, row.parts()[1:], strict=False):
            rest = group.continuations[one][1:]
            found += [(start + first + i, [((row.group, one), rest[i])]) for i in range(length)]
        return found

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


def _batch(
    rows: list[tuple[Row, int, int]],
    tokens_BT: np.ndarray,
    ids_BT: np.ndarray,
    tree: bool,
    head: tuple[int, ...] = (),
    prefix: Prefix | None = None,
) -> Batch:
    """The batch, with `head` as segment 1 of each line. Rows continue it, and branches continue their rows."""
    shared = len(head) if prefix is None else len(prefix.tokens)
    if not tree and not head:
        return Batch(rows, tokens_BT, ids_BT, shared, None, prefix)
    if head:
        lines = len(tokens_BT)
        tokens_BT = np.concatenate([np.tile(np.array(head, np.int32), (lines, 1)), tokens_BT], axis=1)
        ids_BT = np.concatenate([np.ones((lines, len(head)), np.int32), np.where(ids_BT, ids_BT + 1, 0)], axis=1)
    parents_BT, ids_BT, free = ids_BT, ids_BT.copy(), ids_BT.max(axis=1) + 1
    for row, line, start in rows:
        for first, length in row.parts()[1:]:
            ids_BT[line, start + first : start + first + length] = free[line]
            free[line] += 1
    roots_BT = np.minimum(ids_BT, 1) if head else ids_BT
    return Batch(rows, tokens_BT, ids_BT, shared, np.stack([parents_BT, roots_BT], axis=-1), prefix)
