"""Packing: several conversations in one row of fixed length, separated by segment ids.

Best fit over a bounded window of open rows. It streams, is deterministic, and fills rows to about 99 % if conversations
are much shorter than a row. A packed folder has

    rows.array_record   one record a row, as `Row.to_bytes` writes it
    index.json          counts by language, kind and source; tokenizer fingerprint, template, seed
    manifest.json       size and SHA-256 of the two files above

Segment ids count from 1 within a row, and 0 marks padding. Attention stays inside a segment and positions restart in
each, so the loss is the same packed and unpacked.
"""

import bisect
import dataclasses
import json
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bimedix_jax import files
from bimedix_jax.data.encoding import Example, encode_chat
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError

ROWS, INDEX, MANIFEST = "rows.array_record", "index.json", "manifest.json"
FORMAT = "bimedix packed rows 1"

Packing = Literal["best_fit", "none"]
TooLong = Literal["truncate", "drop"]


@dataclass(frozen=True)
class Segment:
    """The conversation in one segment of a row, so that a routing record can be traced to it."""

    segment: int  # id within the row, from 1
    id: str
    language: str
    kind: str
    source: str
    tokens: int
    learned: int

    def to_list(self) -> list[int | str]:
        """The fields in order."""
        return [self.segment, self.id, self.language, self.kind, self.source, self.tokens, self.learned]


@dataclass(frozen=True)
class Row:
    """One row of T tokens."""

    tokens: np.ndarray  # int32 [T]
    segment_ids: np.ndarray  # int32 [T], 0 is padding
    loss_mask: np.ndarray  # bool [T], True where the token is a supervised target
    segments: tuple[Segment, ...]

    def to_bytes(self) -> bytes:
        """Little-endian: uint32 length of a JSON header, the header, int32 tokens, int32 segment ids, mask bytes."""
        header = {"length": len(self.tokens), "segments": [segment.to_list() for segment in self.segments]}
        text = json.dumps(header, ensure_ascii=False).encode()
        arrays = zip((self.tokens, self.segment_ids, self.loss_mask), ("<i4", "<i4", "u1"), strict=True)
        return struct.pack("<I", len(text)) + text + b"".join(np.asarray(x, kind).tobytes() for x, kind in arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Row":
        """The inverse of `to_bytes`."""
        (size,) = struct.unpack_from("<I", data)
        header = json.loads(data[4 : 4 + size])
        length, start = header["length"], 4 + size
        return cls(
            tokens=np.frombuffer(data, "<i4", length, start),
            segment_ids=np.frombuffer(data, "<i4", length, start + 4 * length),
            loss_mask=np.frombuffer(data, "u1", length, start + 8 * length).astype(bool),
            segments=tuple(Segment(*values) for values in header["segments"]),
        )


@dataclass
class PackReport:
    """Counts of what was packed, truncated and left out."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped_too_long: int = 0
    dropped_nothing_learned: int = 0
    groups: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)  # examples, tokens, supervised tokens

    def add(self, example: Example, learned: int) -> None:
        """Count an example that was packed, and its supervised tokens."""
        tokens = len(example.tokens)
        group = self.groups.setdefault((example.language, example.kind, example.source), [0, 0, 0])
        group[0] += 1
        group[1] += tokens
        group[2] += learned
        self.examples += 1
        self.tokens += tokens
        self.learned_tokens += learned

    def to_dict(self, sequence_length: int) -> dict[str, Any]:
        """For JSON. `efficiency` is the share of positions that are not padding."""
        plain = {name: value for name, value in vars(self).items() if name != "groups"}
        names = ("language", "kind", "source", "examples", "tokens", "learned_tokens")
        groups = [dict(zip(names, (*key, *counts), strict=True)) for key, counts in sorted(self.groups.items())]
        return {**plain, "efficiency": self.tokens / max(1, self.rows * sequence_length), "groups": groups}


def encode_record(tokenizer: Tokenizer, record: Record) -> Example:
    """A record as tokens, by the tokenizer's chat template."""
    ids, mask = encode_chat(tokenizer, record.conversations)
    tokens, learned = np.asarray(ids, np.int32), np.asarray(mask, bool)
    return Example(record.id, record.language, record.kind, record.source, tokens, learned)


def pack(
    examples: Iterable[Example],
    sequence_length: int,
    pad_id: int = 0,
    packing: Packing = "best_fit",
    too_long: TooLong = "truncate",
    window: int = 256,
    report: PackReport | None = None,
) -> Iterator[Row]:
    """Rows of `sequence_length` tokens.

    Each example is placed in the open row that has the least room left for it. When more than `window` rows are open,
    the fullest is closed. An example longer than a row is truncated or dropped, as `too_long` says. An example without
    a supervised token is dropped. `packing="none"` gives every example its own row.
    """
    report = PackReport() if report is None else report
    open_rows: list[tuple[int, int]] = []  # (free tokens, key), sorted
    contents: dict[int, list[_Placed]] = {}
    for key, placed in enumerate(_fitting(examples, sequence_length, too_long, report)):
        length = len(placed[0].tokens)
        place = bisect.bisect_left(open_rows, (length, -1)) if packing == "best_fit" else len(open_rows)
        if place < len(open_rows):
            free, row = open_rows.pop(place)
        else:
            free, row = sequence_length, key
        contents.setdefault(row, []).append(placed)
        if packing == "none" or free == length:
            yield _row(contents.pop(row), sequence_length, pad_id, report)
            continue
        bisect.insort(open_rows, (free - length, row))
        if len(open_rows) > window:
            _, fullest = open_rows.pop(0)
            yield _row(contents.pop(fullest), sequence_length, pad_id, report)
    for _, row in open_rows:
        yield _row(contents.pop(row), sequence_length, pad_id, report)


def batch(rows: Sequence[Row], groups: Sequence[tuple[str, str]] = ()) -> dict[str, np.ndarray]:
    """Rows as the training batch: tokens_BT and segment_ids_BT int32, loss_mask_BT bool (True at supervised targets).

    With `groups`, also group_BT int32, as `groups_of`.
    """
    found = {
        "tokens_BT": np.stack([row.tokens for row in rows]),
        "segment_ids_BT": np.stack([row.segment_ids for row in rows]),
        "loss_mask_BT": np.stack([row.loss_mask for row in rows]),
    }
    return found | ({"group_BT": np.stack([groups_of(row, groups) for row in rows])} if groups else {})


def groups_of(row: Row, groups: Sequence[tuple[str, str]]) -> np.ndarray:
    """int32 [T]: the index in `groups` of each token's (language, kind), their number for padding and others.

    A group (language, "") has all kinds of the language that have no group of their own.
    """
    places = {pair: place for place, pair in enumerate(groups)}
    of_segment = np.full(len(row.segments) + 1, len(groups), np.int32)
    for segment in row.segments:
        rest = places.get((segment.language, ""), len(groups))
        of_segment[segment.segment] = places.get((segment.language, segment.kind), rest)
    return of_segment[row.segment_ids]


def shuffled_lines(path: str | Path, seed: int) -> Iterator[tuple[int, bytes]]:
    """Lines of a JSONL file with their byte offsets, in an order that depends on `seed`; blank lines are skipped.

    It needs 24 bytes of memory for each line, however long the line is.

    Raises:
        BimedixError: there is no such file.
    """
    source = Path(path)
    if not source.is_file():
        raise BimedixError(
            f"there is no file {source}; name a JSONL file of records (`bimedix data assemble` writes one)"
        )
    files.require_content(source, text=True)
    with source.open("rb") as file:
        starts, position = array("q"), 0
        if file.read(len(files.BYTE_ORDER_MARK)) == files.BYTE_ORDER_MARK:
            position = len(files.BYTE_ORDER_MARK)
        file.seek(position)
        for line in file:
            if line.strip():
                starts.append(position)
            position += len(line)
        for offset in np.random.default_rng(seed).permutation(np.frombuffer(starts, np.int64)):
            file.seek(offset)
            yield int(offset), file.readline()


def write(
    folder: Path, rows: Iterable[Row], report: PackReport, sequence_length: int, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write rows and index into an existing folder; return the index. Call it inside `files.new_folder`.

    `facts` is added to the index: tokenizer fingerprint, template, seed and whatever else determined the rows. The
    manifest has size and SHA-256 of the files, so that a copy can be checked (`loader.fingerprint`).

    Raises:
        BimedixError: there is no row to write.
    """
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] (compiled)

    writer = array_record_module.ArrayRecordWriter(str(folder / ROWS), "group_size:1,zstd:1")
    try:
        for row in rows:
            writer.write(row.to_bytes())
    finally:
        writer.close()
    if not report.rows:
        raise BimedixError("no record is left to pack; check --split and --sequence-length")
    index = {"format": FORMAT, "sequence_length": sequence_length, **facts, **report.to_dict(sequence_length)}
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    written = {name: (folder / name) for name in (ROWS, INDEX)}
    hashes = {name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for name, path in written.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": hashes}, indent=2) + "\n", encoding="utf-8")
    return index


_Placed = tuple[Example, int]  # an example and its number of supervised tokens


def _fitting(
    examples: Iterable[Example], sequence_length: int, too_long: TooLong, report: PackReport
) -> Iterator[_Placed]:
    """The examples to pack, truncated to the length of a row; those left out are counted in the report."""
    for example in examples:
        if example.learned[:1].any():
            raise ValueError(f"{example.id}: the first token cannot be learned, since no token comes before it")
        length = len(example.tokens)
        if length > sequence_length and too_long == "drop":
            report.dropped_too_long += 1
            continue
        kept = example
        if length > sequence_length:
            tokens, learned = example.tokens[:sequence_length], example.learned[:sequence_length]
            kept = dataclasses.replace(example, tokens=tokens, learned=learned)
        count = int(np.count_nonzero(kept.learned))
        if not count:
            report.dropped_nothing_learned += 1
            continue
        if length > sequence_length:
            report.truncated += 1
            report.truncated_tokens += length - sequence_length
        report.add(kept, count)
        yield kept, count


def _row(examples: Sequence[_Placed], sequence_length: int, pad_id: int, report: PackReport) -> Row:
    report.rows += 1
    tokens = np.full(sequence_length, pad_id, np.int32)
    segment_ids = np.zeros(sequence_length, np.int32)
    loss_mask = np.zeros(sequence_length, bool)
    segments, start = [], 0
    for number, (example, learned) in enumerate(examples, start=1):
        end = start + len(example.tokens)
        tokens[start:end], segment_ids[start:end], loss_mask[start:end] = example.tokens, number, example.learned
        segments.append(
            Segment(number, example.id, example.language, example.kind, example.source, end - start, learned)
        )
        start = end
    return Row(tokens, segment_ids, loss_mask, tuple(segments))
