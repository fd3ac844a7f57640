"""The part of assembling that concerns one record at a time: reading, checking, splitting, keys for what follows.

A shard folder holds what shard i of n made of rows i, i + n, i + 2 n, ... of every source:

    records.part       a line each: what merging needs to know, a tab, the record; in the order of the rows
    quarantine.jsonl   rows that became no record
    manifest.json      the plan it belongs to, and counts by source

Merging all shards gives what one shard 0 of 1 gives, since a record depends on nothing but its row. Every shard goes
through all files, which costs little beside making records; from the hub each machine streams or caches its own copy.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from bimedix_jax import __version__
from bimedix_jax.curation import readers
from bimedix_jax.curation.assembly import disjoint
from bimedix_jax.curation.assembly.recipe import RECORDS_MADE, ROWS, Part, Plan
from bimedix_jax.curation.quarantine import Quarantine, Rejected
from bimedix_jax.curation.readers import hub
from bimedix_jax.curation.readers.hub import HubSet
from bimedix_jax.data import records as record_files
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

RECORDS, QUARANTINE, MANIFEST = "records.part", "quarantine.jsonl", "manifest.json"
FORMAT = "bimedix shard 1"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A record as merging sees it: everything that decides whether it stays, and its line of JSON.

    Attributes:
      place: (number of the source in the plan, number of the row in the source); what entries are ordered by.
      text: digest of split and turns.
      keys: as disjoint.keys gives them.
    """

    place: tuple[int, int]
    split: str
    source: str
    id: str
    text: bytes
    keys: tuple[tuple[str, bytes], ...]
    line: bytes

    def to_bytes(self) -> bytes:
        """One line."""
        keys = [[by, key.hex()] for by, key in self.keys]
        head = [*self.place, self.split, self.source, self.id, self.text.hex(), keys]
        return json.dumps(head).encode() + b"\t" + self.line + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> "Entry":
        """The inverse of `to_bytes`."""
        head, _, line = data.rstrip(b"\n").partition(b"\t")
        part, row, split, source, name, text, keys = json.loads(head)
        pairs = tuple((by, bytes.fromhex(key)) for by, key in keys)
        return cls((part, row), split, source, name, bytes.fromhex(text), pairs, line)


def write_shard(plan: Plan, folder: Path, shard: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Read a plan's sources, rows of `shard` only, into an existing folder; return the manifest.

    Raises:
        BimedixError: a source cannot be read, or its licence or revision is not what the plan says.
    """
    sources = []
    with (folder / RECORDS).open("wb") as out, (folder / QUARANTINE).open("w", encoding="utf-8") as rejects:
        for number, part in enumerate(plan.parts):
            place = pinned(part)
            quarantine = Quarantine(shard=shard, limit=plan.limit)
            quarantine.sink = _sink(rejects, number, quarantine)
            made: Counter[str] = Counter()
            for record in _progress(part, place, quarantine):
                _check_licence(part, record)
                made[record.source] += 1
                entry = _entry((number, quarantine.row), _with_split(record, plan.seed, plan.heldout_fraction))
                out.write(entry.to_bytes())
            revision = place.revision if isinstance(place, HubSet) else None
            counts = {"read": dict(sorted(quarantine.read.items())), "records": dict(sorted(made.items()))}
            sources.append({"name": part.name, "revision": revision, **counts, "rejected": quarantine.count})
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "plan": plan.digest(),
        "shard": list(shard),
        "sources": sources,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_part(part: Part, quarantine: Quarantine) -> Iterator[Record]:
    """Records of a part, from the revision and under the licence that it says; for evaluation sets."""
    for record in _progress(part, pinned(part), quarantine):
        _check_licence(part, record)
        yield record


def pinned(part: Part) -> readers.Place:
    """The part's place, a set on the hub at its commit, after comparing the licence of its card.

    Raises:
        BimedixError: see hub.pin; or the card states another licence.
    """
    place = part.place
    if not isinstance(place, HubSet) or place.folder is not None:
        return place
    found = hub.pin(place)
    stated = part.card or part.licence
    if stated is not None and stated.casefold() != found.licence.casefold():
        raise BimedixError(
            f"the hub says that {place.name} is under {found.licence!r}, the recipe {stated!r}; read its card, and put "
            "what is right into the recipe"
        )
    return dataclasses.replace(place, revision=found.commit)


def unexpected(part: Part, counts: dict[str, Any]) -> list[str]:
    """A sentence for each count that is not what the part expects. `counts` has `read` and `records`, by name."""
    found = {**counts["read"], ROWS: sum(counts["read"].values()), RECORDS_MADE: sum(counts["records"].values())}
    wrong = []
    for name, expected in part.expect.items():
        least, most = expected if isinstance(expected, tuple) else (expected, expected)
        if not least <= found.get(name, 0) <= most:
            wanted = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            what = name if name in (ROWS, RECORDS_MADE) else f"rows of {name}"
            wrong.append(f"{part.name} has {found.get(name, 0):,} {what}, expected are {wanted}")
    return wrong


def entries(path: Path) -> Iterator[Entry]:
    """The entries of a `records.part`."""
    with path.open("rb") as file:
        yield from map(Entry.from_bytes, file)


def rejected(path: Path) -> Iterator[tuple[tuple[int, int], Rejected]]:
    """(place, row) of a shard's `quarantine.jsonl`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            part, row, fields = json.loads(line)
            yield (part, row), Rejected(**fields)


def _sink(file: IO[str], number: int, quarantine: Quarantine) -> Callable[[Rejected], None]:
    """Writes a rejected row with its place."""

    def note(row: Rejected) -> None:
        head = [number, quarantine.row]
        file.write(json.dumps([*head, dataclasses.asdict(row)], ensure_ascii=False) + "\n")

    return note


def _progress(part: Part, place: readers.Place, quarantine: Quarantine) -> Iterator[Record]:
    """Records of the part, with a bar that counts rows, those of other shards too."""
    expected = part.expect.get(ROWS)
    total = expected[1] if isinstance(expected, tuple) else expected
    if quarantine.limit is not None:
        total = min(total or quarantine.limit, quarantine.limit)
    with tqdm(desc=part.name, unit=" rows", total=total, disable=None) as bar:
        for record in readers.read_place(part.reader, place, part.options, quarantine):
            yield record
            bar.update(quarantine.row + 1 - bar.n)


def _check_licence(part: Part, record: Record) -> None:
    if part.licence is not None and record.licence != part.licence:
        raise BimedixError(
            f"{record.id} of {part.name} is under {record.licence!r}, the recipe says {part.licence!r}; correct one"
        )


def _with_split(record: Record, seed: int, heldout_fraction: float) -> Record:
    """A record without a split gets one by the hash of its id, or of what its source groups records by."""
    if record.split is not None:
        return record
    key = str(record.provenance.get("group", record.id))
    return record.model_copy(update={"split": record_files.assign_split(key, seed, heldout_fraction)})


def _entry(place: tuple[int, int], record: Record) -> Entry:
    said = f"{record.split}\0" + "\0".join(f"{turn.speaker}\0{turn.value}" for turn in record.conversations)
    text = hashlib.blake2b(said.encode(), digest_size=16).digest()
    keys = tuple(disjoint.keys(record))
    return Entry(place, str(record.split), record.source, record.id, text, keys, record.to_json().encode())
