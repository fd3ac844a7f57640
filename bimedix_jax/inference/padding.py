"""Batches of few shapes from sequences of any length, and the mapping from batches back to sequences.

Each new shape is compiled, so lengths are rounded up to 2^k or 3 * 2^(k-1). There are two such lengths per octave, and
at most a third of a row is padding. Padding has segment id 0: the model neither attends to it nor routes it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np

from bimedix_jax.models.routers import Routing

Item = TypeVar("Item")

Row = Sequence[int] | np.ndarray


def bucket(length: int, smallest: int = 16) -> int:
    """The smallest of 2^k and 3 * 2^(k-1) that is at least `length` and `smallest`."""
    length = max(length, smallest, 1)
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if power >= 4 and length <= power * 3 // 4 else power


def pad_left(rows: Sequence[Row], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BT, segment_ids_BT), int32; every row ends in the last column."""
    return _pad(rows, length, left=True)


def pad_right(rows: Sequence[Row], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BT, segment_ids_BT), int32; every row begins in the first column."""
    return _pad(rows, length, left=False)


def _pad(rows: Sequence[Row], length: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.zeros((len(rows), length), np.int32)
    segment_ids_BT = np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {index} has {len(row)} tokens, more than the {length} columns.")
        place = slice(length - len(row), length) if left else slice(0, len(row))
        tokens_BT[index, place] = row
        segment_ids_BT[index, place] = 1
    return tokens_BT, segment_ids_BT


def by_length(
    items: Sequence[Item], length_of: Callable[[Item], int], batch_tokens: int, longest: int
) -> Iterator[tuple[list[Item], int, int]]:
    """Batches of items of similar length, longest first: (items, rows, columns).

    `rows * columns` is about `batch_tokens`. Columns are the bucket of the longest item, at most `longest`; no item may
    be longer. Every batch except the last is full; the last one has empty rows up to a bucket.
    """
    waiting = sorted(items, key=length_of, reverse=True)
    while waiting:
        columns = min(bucket(length_of(waiting[0])), longest)
        full = max(batch_tokens // columns, 1)
        batch, waiting = waiting[:full], waiting[full:]
        yield batch, min(bucket(len(batch), smallest=1), full), columns


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: longest first, each in the first bin with enough room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > capacity:
            raise ValueError(f"item {index} has length {lengths[index]}, more than the capacity {capacity} of a bin.")
        place = next((number for number, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


WIDTHS = (512, 768, 1024)
"""Widths of lines."""
FEW = (32, 128, 512)
"""Widths of the only line of few tokens."""


def line_width(lengths: Sequence[int], longest: int, taken: int = 0) -> int:
    """The width whose lines have the fewest tokens when rows of these lengths are packed, at most `longest`.

    With `taken` tokens at the beginning of each line it is one of WIDTHS. A wide line costs more, since attention is
    quadratic.
    """

    def cost(width: int) -> float:
        return sum(len(lines) * (taken + own) * (8192 + taken + own) for own, lines in _lines(lengths, width, longest))

    widths = sorted({min(max(width - taken, 1), longest) for width in WIDTHS})
    return widths[0] if max(lengths, default=0) <= widths[0] // 4 else min(widths, key=cost)


def _lines(lengths: Sequence[int], columns: int, longest: int) -> list[tuple[int, list[list[int]]]]:
    """(width, lines of indices) of the rows that are longer than `columns`, then of the others."""
    long = [index for index, length in enumerate(lengths) if length > columns]
    short = [index for index, length in enumerate(lengths) if length <= columns]
    long_width = min(bucket(max((lengths[index] for index in long), default=1)), longest)
    total = sum(lengths[index] for index in short)
    short_width = min(columns, next((width for width in FEW if width >= total), columns))
    found = []
    for chosen, width in ((long, long_width), (short, short_width)):
        lines = first_fit([lengths[index] for index in chosen], width)
        found.append((width, [[chosen[i] for i in line] for line in lines]))
    return found


def packed(
    rows: Sequence[Row], batch_tokens: int, longest: int, columns: int = 1024
) -> Iterator[tuple[list[tuple[int, int, int]], np.ndarray, np.ndarray]]:
    """Batches of at most two shapes with all rows, as segments of lines: (places, tokens_BT, segment_ids_BT).

    Attention stays inside a segment, so a row scores as it does alone, and rows need no padding to a common length.
    Rows longer than `columns` come first, in lines as long as the bucket of the longest. Neither a line nor a row may
    exceed `longest`. A place is (index of the row, line, start). Where there are fewer lines than a batch has, their
    number is rounded up to a power of two; the last batch is filled up with empty lines.
    """
    for width, lines in _lines(list(map(len, rows)), min(columns, longest), longest):
        height = min(max(batch_tokens // width, 1), 1 << (len(lines) - 1).bit_length())
        for start in range(0, len(lines), height):
            yield _packed_batch(rows, lines[start : start + height], height, width)


def _packed_batch(
    rows: Sequence[Row], lines: Sequence[Sequence[int]], height: int, width: int
) -> tuple[list[tuple[int, int, int]], np.ndarray, np.ndarray]:
    tokens_BT, segment_ids_BT = np.zeros((height, width), np.int32), np.zeros((height, width), np.int32)
    places = []
    for line, indices in enumerate(lines):
        start = 0
        for segment, index in enumerate(indices, start=1):
            end = start + len(rows[index])
            tokens_BT[line, start:end] = rows[index]
            segment_ids_BT[line, start:end] = segment
            places.append((index, line, start))
            start = end
    return places, tokens_BT, segment_ids_BT


def packed_places(
    shape: tuple[int, ...], places: Sequence[tuple[int, int, int]], lengths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(item, position in the item) of every token of a packed batch, int32 [B, T]; 0 and 0 at padding.

    Args:
      places: (index of an item, line, start), from `packed`.
      lengths: tokens of each item, by index.
    """
    items_BT, positions_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for index, line, start in places:
        span = slice(start, start + lengths[index])
        items_BT[line, span], positions_BT[line, span] = index, np.arange(lengths[index])
    return items_BT, positions_BT


def part_of(routing: Routing, line: int, start: int, length: int) -> Routing:
    """The record of one sequence of a batch, as NumPy arrays [L, 1, length, ...]."""
    return jax.tree.map(lambda x: np.asarray(x)[:, line : line + 1, start : start + length], routing)
