"""Contexts with a long common beginning: which share one, and batches of what follows it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from bimedix_jax.inference.padding import bucket, pad_right

MEMBERS = 4
"""Fewer contexts share no prefix."""
SHORTEST = 64
"""Tokens of the shortest prefix that is shared."""
FEWEST = 8
"""Tokens of the shortest beginning that rows of a line share."""
SHARE = 0.5
"""A prefix is shared if it has at least this share of the mean length of what follows. Rows that continue a prefix are
padded to a common length, which packed lines are not."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """The tokens that some contexts begin with."""

    tokens: tuple[int, ...]

    @property
    def slots(self) -> int:
        """Slots of its cache."""
        return bucket(len(self.tokens), smallest=SHORTEST)


class HasTokens(Protocol):
    @property
    def tokens(self) -> Sequence[int]: ...


Row = TypeVar("Row", bound=HasTokens)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def common_beginning(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all contexts begin with, or none if they are few. A token of every context is left to follow."""
    if len(contexts) < MEMBERS:
        return ()
    first, last = min(contexts), max(contexts)  # what these two share, all in between share too
    length = min(common(first, last), min(map(len, contexts)) - 1)
    return first[:length] if length >= FEWEST else ()


def shared_prefixes(contexts: Sequence[tuple[int, ...]]) -> dict[int, Prefix]:
    """The prefix of each context that shares one, by index. A token of every context is left to follow it.

    Contexts are sorted, so that those with the same beginning are neighbours. A neighbour joins if it keeps at least
    half of what the earlier ones have in common.
    """
    found: dict[int, Prefix] = {}
    order = sorted(range(len(contexts)), key=lambda index: contexts[index])
    members: list[int] = []
    length = 0

    def close() -> None:
        if len(members) < MEMBERS or length < SHORTEST:
            return
        rest = sum(len(contexts[index]) - length for index in members) / len(members)
        if length >= SHARE * rest:
            prefix = Prefix(contexts[members[0]][:length])
            found.update(dict.fromkeys(members, prefix))

    for index in order:
        kept = min(length, common(contexts[members[-1]], contexts[index])) if members else 0
        kept = min(kept, len(contexts[index]) - 1)
        if members and kept >= SHORTEST and 2 * kept >= length:
            members.append(index)
            length = kept
        else:
            close()
            members, length = [index], len(contexts[index]) - 1
    close()
    return found


def rows_after(
    prefix: Prefix, rows: Sequence[Row], batch_tokens: int, longest: int
) -> Iterator[tuple[list[Row], np.ndarray, np.ndarray]]:
    """Batches (rows, tokens_BT, segment_ids_BT) of what follows the prefix in rows of similar length, longest first.

    Their segment is 1. Batches of one width have few heights, and empty rows fill them up.
    """
    skipped = len(prefix.tokens)
    waiting = sorted(rows, key=lambda row: -len(row.tokens))
    while waiting:
        columns = min(bucket(len(waiting[0].tokens) - skipped, smallest=SHORTEST), longest - prefix.slots)
        full = max(batch_tokens // columns, 1)
        chosen, waiting = waiting[:full], waiting[full:]
        height = min(bucket(len(chosen), smallest=max(full // 4, 1)), full)
        empty: list[Sequence[int]] = [()] * (height - len(chosen))
        yield chosen, *pad_right([*(row.tokens[skipped:] for row in chosen), *empty], columns)
