"""Packing: several conversations in one row of fixed length, kept apart by segment ids.

Best fit over a bounded window of open rows: streaming, deterministic, and within about one per cent of full for
conversations much shorter than a row. A packed folder holds

    rows.array_record   one record a row, as `Row.to_bytes` writes it
    index.json          what went in: counts by language, kind and source, tokenizer fingerprint, template, seed

Segment ids count from 1 within a row and 0 marks padding; the model keeps attention inside a segment and restarts
positions in each, so packed and unpacked loss agree.
"""

import bisect
import dataclasses
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bimedix_jax.data import records as record_files
from bimedix_jax.data.chat_template import encode_chat
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError

ROWS, INDEX = "rows.array_record", "index.json"
FORMAT = "bimedix packed rows 1"

Packing = Literal["best_fit", "none"]
TooLong = Literal["truncate", "drop"]


@dataclass(frozen=True)
class Example:
    """One conversation as tokens. `learned` marks the targets: the assistant's tokens."""

    id: str
    language: str
    kind: str
    source: str
    tokens: np.ndarray  # int32 [N]
    learned: np.ndarray  # bool [N]


@dataclass(frozen=True)
class Segment:
    """Which conversation a segment of a row is: routing is keyed by these."""

    segment: int  # its id within the row, from 1
    id: str
    language: str
    kind: str
    source: str
    tokens: int
    learned: int


@dataclass(frozen=True)
class Row:
    """One row of T tokens."""

    tokens: np.ndarray  # int32 [T]
    segment_ids: np.ndarray  # int32 [T], 0 is padding
    loss_mask: np.ndarray  # bool [T], True where the token is a learned target
    segments: tuple[Segment, ...]

    def to_bytes(self) -> bytes:
        """Little-endian: uint32 length of a JSON header, the header, int32 tokens, int32 segment ids, mask bytes."""
        header = {"length": len(self.tokens), "segments": [dataclasses.astuple(segment) for segment in self.segments]}
        text = json.dumps(header, ensure_ascii=False).encode()
        arrays = (self.tokens.astype("<i4"), self.segment_ids.astype("<i4"), self.loss_mask.astype("u1"))
        return struct.pack("<I", len(text)) + text + b"".join(array.tobytes() for array in arrays)

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
    """What packing did; everything that was cut or left out is counted here."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped_too_long: int = 0
    dropped_nothing_learned: int = 0
    groups: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)  # examples, tokens, learned

    def add(self, example: Example) -> None:
        """Count an example that found a row."""
        counts = (1, len(example.tokens), int(example.learned.sum()))
        group = self.groups.setdefault((example.language, example.kind, example.source), [0, 0, 0])
        for index, count in enumerate(counts):
            group[index] += count
        self.examples += counts[0]
        self.tokens += counts[1]
        self.learned_tokens += counts[2]

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

    An example goes into the open row that it fills best; with `window` rows open, the fullest is closed. An example
    longer than a row loses its end (or is left out, by `too_long`); one that has no learned token left is left out.
    `packing="none"` gives every example its own row.
    """
    report = PackReport() if report is None else report
    open_rows: list[tuple[int, int]] = []  # (free tokens, key), sorted
    contents: dict[int, list[Example]] = {}
    for key, example in enumerate(_fitting(examples, sequence_length, too_long, report)):
        length = len(example.tokens)
        place = bisect.bisect_left(open_rows, (length, -1)) if packing == "best_fit" else len(open_rows)
        if place < len(open_rows):
            free, row = open_rows.pop(place)
        else:
            free, row = sequence_length, key
        contents.setdefault(row, []).append(example)
        if packing == "none" or free == length:
            yield _row(contents.pop(row), sequence_length, pad_id, report)
            continue
        bisect.insort(open_rows, (free - length, row))
        if len(open_rows) > window:
            _, fullest = open_rows.pop(0)
            yield _row(contents.pop(fullest), sequence_length, pad_id, report)
    for _, row in open_rows:
        yield _row(contents.pop(row), sequence_length, pad_id, report)


def batch(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Rows as the training batch: tokens_BT and segment_ids_BT int32, loss_mask_BT bool (True at learned targets)."""
    return {
        "tokens_BT": np.stack([row.tokens for row in rows]),
        "segment_ids_BT": np.stack([row.segment_ids for row in rows]),
        "loss_mask_BT": np.stack([row.loss_mask for row in rows]),
    }


def shuffled(path: str | Path, seed: int) -> Iterator[Record]:
    """Records of a JSONL file in an order that `seed` fixes; memory is 16 bytes a record, whatever their size.

    Raises:
        BimedixError: there is no such file, or a line is not a record.
    """
    source = Path(path)
    if not source.is_file():
        raise BimedixError(
            f"there is no file {source}; name a JSONL file of records (`bimedix data assemble` writes one)"
        )
    with source.open("rb") as file:
        starts, position = [], 0
        for line in file:
            if line.strip():
                starts.append(position)
            position += len(line)
        offsets = np.asarray(starts, np.int64)
        for offset in np.random.default_rng(seed).permutation(offsets):
            file.seek(int(offset))
            yield record_files.parse(file.readline().decode(), f"{source} at byte {offset}")


def write(
    folder: Path, rows: Iterable[Row], report: PackReport, sequence_length: int, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write rows and index into an existing folder; return the index. Call it inside `files.new_folder`.

    `facts` joins the index: tokenizer fingerprint, template, seed and whatever else decided the rows.

    Raises:
        BimedixError: there is no row to write.
    """
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] (compiled)

    writer = array_record_module.ArrayRecordWriter(str(folder / ROWS), "group_size:1,zstd:3")
    try:
        for row in rows:
            writer.write(row.to_bytes())
    finally:
        writer.close()
    if not report.rows:
        raise BimedixError("no record was left to pack; look at the split and at the sequence length")
    index = {"format": FORMAT, "sequence_length": sequence_length, **facts, **report.to_dict(sequence_length)}
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return index


def _fitting(
    examples: Iterable[Example], sequence_length: int, too_long: TooLong, report: PackReport
) -> Iterator[Example]:
    """The examples that get a place, cut to the length of a row; the rest is counted."""
    for example in examples:
        if example.learned[:1].any():
            raise ValueError(f"{example.id}: the first token has nothing before it to be predicted from")
        length = len(example.tokens)
        if length > sequence_length and too_long == "drop":
            report.dropped_too_long += 1
            continue
        kept = dataclasses.replace(
            example, tokens=example.tokens[:sequence_length], learned=example.learned[:sequence_length]
        )
        if not kept.learned.any():
            report.dropped_nothing_learned += 1
            continue
        if length > sequence_length:
            report.truncated += 1
            report.truncated_tokens += length - sequence_length
        report.add(kept)
        yield kept


def _row(examples: Sequence[Example], sequence_length: int, pad_id: int, report: PackReport) -> Row:
    report.rows += 1
    tokens = np.full(sequence_length, pad_id, np.int32)
    segment_ids = np.zeros(sequence_length, np.int32)
    loss_mask = np.zeros(sequence_length, bool)
    segments, start = [], 0
    for number, example in enumerate(examples, start=1):
        end = start + len(example.tokens)
        tokens[start:end], segment_ids[start:end], loss_mask[start:end] = example.tokens, number, example.learned
        learned = int(example.learned.sum())
        segments.append(
            Segment(number, example.id, example.language, example.kind, example.source, end - start, learned)
        )
        start = end
    return Row(tokens, segment_ids, loss_mask, tuple(segments))
