"""Sources in both languages into one training set: without evaluation, without near-duplicates, at an exact ratio.

One pass in worker processes over all records (scan.py) gives numbers about each. Everything after it is decided on
those numbers, and texts are read again only where two must be compared or a record is written. Memory is about 100
bytes a record and what the workers hold. The folder gets

    train.jsonl           the records, in an order that the seed fixes
    contamination.jsonl   what was removed for the evaluation's sake, and why
    duplicates.jsonl      what was removed as a near-duplicate, of what, and how similar
    quarantine.jsonl      lines that are no records
    report.json           all counts, ratios, hashes and settings
    README.md             the data card
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.mix import card, decontaminate, duplicates, report, targets
from bimedix_jax.curation.mix.candidates import Candidates, Fate
from bimedix_jax.curation.mix.decontaminate import EvaluationIndex, Hit
from bimedix_jax.curation.mix.scan import Columns, ScanLines
from bimedix_jax.curation.quarantine import Quarantine, Rejected
from bimedix_jax.curation.readers import read
from bimedix_jax.data.parallel import batched, ordered_map

TRAIN, CONTAMINATION, DUPLICATES = "train.jsonl", "contamination.jsonl", "duplicates.jsonl"
QUARANTINE, REPORT, CARD = "quarantine.jsonl", "report.json", "README.md"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a set. `ratio` counts where `preset` is None.

    Attributes:
      sources, evaluation: as readers.read takes them; evaluation records marked for training do not count.
      ratio: Arabic to English in each kind.
      preset, scale: see targets.py.
      near_duplicates: least similarity that removes a record; 0 keeps all.
      ngram, share: see decontaminate.
      limit: records taken of each source.
      seed: chooses among records and orders them.
      tokenizer, template: count tokens as training sees them; None counts none.
      workers: processes; the set does not depend on it.
    """

    sources: tuple[str, ...]
    evaluation: tuple[str, ...]
    ratio: tuple[int, int]
    preset: targets.Preset | None
    scale: bool
    near_duplicates: float
    ngram: int
    share: float
    limit: int | None
    seed: int
    tokenizer: str | None
    template: str | None
    workers: int


def mix(settings: Settings, folder: Path) -> dict[str, Any]:
    """Write a set into an existing folder and return its report. Call it inside `files.new_folder`.

    Raises:
        BimedixError: a source cannot be read, or there are too few records for what was asked.
    """
    evaluation = report.Evaluation(settings.evaluation)
    index = decontaminate.build_index(evaluation.records(), settings.ngram, settings.share)
    spool = folder / "candidates.jsonl"
    bands: list[np.ndarray] = []
    with (folder / QUARANTINE).open("w", encoding="utf-8") as rejects:

        def note(row: Rejected) -> None:
            rejects.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")

        quarantine = Quarantine(sink=note)
        columns, hits = _scan(settings, index, spool, bands, quarantine)
    candidates = Candidates(spool, columns)
    try:
        fate = _first_fates(columns)
        _contaminated(columns, fate, hits, np.array(sorted(index.ids), np.uint64))
        _near_duplicates(settings, bands, candidates, fate, folder / DUPLICATES)
        wanted = _wanted(settings, columns, fate)
        rows = _choose(settings, columns, fate, wanted)
        digest = _write(folder / TRAIN, candidates, columns, rows, wanted)
        removed = report.write_contamination(folder / CONTAMINATION, candidates, columns, fate, hits, evaluation)
    finally:
        candidates.close()
    spool.unlink()
    found = report.build(settings, columns, fate, evaluation, removed, quarantine, digest)
    (folder / REPORT).write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card.render(found), encoding="utf-8")
    return found


def _scan(
    settings: Settings, index: EvaluationIndex, spool: Path, bands: list[np.ndarray], quarantine: Quarantine
) -> tuple[Columns, list[Hit]]:
    """Every record's numbers, and its meeting with the evaluation."""
    waiting: collections.deque[tuple[int, np.ndarray, np.ndarray]] = collections.deque()
    columns, hits, total = Columns(), [], 0
    with spool.open("wb") as file, tqdm(desc="reading", unit=" records", disable=None) as progress:

        def batches() -> Iterator[list[tuple[int, bytes]]]:
            position = 0
            for number, source in enumerate(settings.sources):
                for batch in batched(itertools.islice(lines_of(source, quarantine), settings.limit)):
                    file.writelines(line for _, line in batch)
                    lengths = np.array([len(line) for _, line in batch], np.int64)
                    waiting.append((number, position + np.cumsum(lengths) - lengths, lengths))
                    position += int(lengths.sum())
                    yield batch

        task = ScanLines(index, settings.tokenizer, settings.template)
        for scanned in ordered_map(task, batches(), settings.workers):
            number, offsets, lengths = waiting.popleft()
            hits += [dataclasses.replace(hit, row=hit.row + total) for hit in scanned.hits]
            columns.append(scanned, offsets, lengths, number)
            bands.append(scanned.bands)
            for line, reason in scanned.rejected:
                quarantine.add("records", settings.sources[number], line, reason)
            progress.update(len(lengths))
            total += len(lengths)
    columns.close()
    return columns, hits


def lines_of(source: str, quarantine: Quarantine) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of JSON of a source: a JSONL file of records as it stands, any other through its reader."""
    name, separator, place = source.partition("=")
    path = Path(place if separator else name).expanduser()
    if path.is_file() and (name == "records" if separator else path.suffix == ".jsonl"):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line if line.endswith(b"\n") else line + b"\n"
        return
    for number, record in enumerate(read(source, quarantine), start=1):
        yield number, record.to_json().encode() + b"\n"


def _first_fates(columns: Columns) -> np.ndarray:
    """Fates that a record's own line decides, and of records with one id all but the first."""
    fate = np.where(columns.heldout, Fate.HELDOUT, Fate.KEPT).astype(np.uint8)
    fate[columns.group < 0] = Fate.MALFORMED
    rows = np.flatnonzero(fate == Fate.KEPT)
    _, first = np.unique(columns.ids[rows], return_index=True)
    fate[np.delete(rows, first)] = Fate.SAME_ID
    return fate


def _contaminated(columns: Columns, fate: np.ndarray, hits: Iterable[Hit], known: np.ndarray) -> None:
    """Mark records that meet the evaluation, and their families: translations, sources, chats."""
    direct = np.zeros(len(fate), bool)
    direct[[hit.row for hit in hits]] = True
    everything = decontaminate.families(columns.ids, columns.parents, direct, known)
    undecided = (fate == Fate.KEPT) | (fate == Fate.SAME_ID)
    fate[undecided & everything] = Fate.FAMILY
    fate[undecided & direct] = Fate.CONTAMINATED


def _near_duplicates(
    settings: Settings, bands: list[np.ndarray], candidates: Candidates, fate: np.ndarray, path: Path
) -> None:
    """Mark near-duplicates and write a line for each: its id, that of the record that stays, their similarity."""
    wanted = (fate == Fate.KEPT) & (settings.near_duplicates > 0)
    found = duplicates.find(bands, wanted, candidates.shingles, settings.near_duplicates)
    with path.open("w", encoding="utf-8") as file:
        for pair in tqdm(found, desc="near-duplicates", unit=" removed", disable=None):
            fate[pair.row] = Fate.NEAR_DUPLICATE
            names = {"record": candidates.record(pair.row).id, "duplicate_of": candidates.record(pair.of).id}
            line = {**names, "similarity": round(pair.similarity, 4)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _wanted(settings: Settings, columns: Columns, fate: np.ndarray) -> dict[tuple[str, str], int]:
    sizes = np.bincount(columns.group[fate == Fate.KEPT], minlength=len(columns.groups))
    available: dict[tuple[str, str], int] = collections.defaultdict(int)
    for (kind, language, *_), size in zip(columns.groups, sizes.tolist(), strict=True):
        available[kind, language] += size
    if settings.preset is None:
        return targets.by_ratio(available, settings.ratio)
    return targets.by_preset(available, settings.preset, settings.scale)


def _choose(settings: Settings, columns: Columns, fate: np.ndarray, wanted: dict[tuple[str, str], int]) -> np.ndarray:
    """Numbers of the chosen records in their final order; the rest becomes surplus.

    A record's place depends on its id and the seed alone: other records coming or going do not reorder a set.
    """
    chosen = np.zeros(len(fate), bool)
    lottery = fingerprints.scatter(columns.ids, f"choose {settings.seed}")
    for part, count in wanted.items():
        codes = [code for code, group in enumerate(columns.groups) if group[:2] == part]
        rows = np.flatnonzero((fate == Fate.KEPT) & np.isin(columns.group, codes))
        chosen[rows[np.argsort(lottery[rows], kind="stable")[:count]]] = True
    fate[(fate == Fate.KEPT) & ~chosen] = Fate.SURPLUS
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(fingerprints.scatter(columns.ids[rows], f"order {settings.seed}"), kind="stable")]


def _write(
    path: Path, candidates: Candidates, columns: Columns, rows: np.ndarray, wanted: dict[tuple[str, str], int]
) -> str:
    """Write the chosen records; SHA-256 of the file. What was written is counted again, against what was wanted."""
    digest = hashlib.sha256()
    written: collections.Counter[tuple[str, str]] = collections.Counter()
    with path.open("wb") as file:
        for row in tqdm(rows.tolist(), desc="writing", unit=" records", disable=None):
            line = candidates.line(row)
            file.write(line)
            digest.update(line)
            kind, language, *_ = columns.groups[columns.group[row]]
            written[kind, language] += 1
    if written != wanted:
        raise AssertionError(f"{dict(written)} were written where {wanted} were wanted: a bug, please report it")
    return digest.hexdigest()
