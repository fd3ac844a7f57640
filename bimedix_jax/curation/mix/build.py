"""Mix sources in both languages into one training set at an exact ratio, without evaluation text or near-duplicates.

Worker processes scan all records once (scan.py) and return numbers about each. All decisions are made on those numbers.
A text is read again only to compare two texts or to write a record. Memory is about 260 bytes a record, plus that of
the workers. The output folder gets

    train.jsonl           the records, in an order that the seed fixes
    contamination.jsonl   records removed because they overlap an evaluation set, and how
    duplicates.jsonl      records removed as near-duplicates, of which record, and how similar
    quarantine.jsonl      lines that are not valid records
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

from bimedix_jax import files
from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.mix import card, decontaminate, duplicates, report, targets
from bimedix_jax.curation.mix.candidates import Candidates, Decision
from bimedix_jax.curation.mix.config import MixConfig
from bimedix_jax.curation.mix.decontaminate import EvaluationIndex, Hit
from bimedix_jax.curation.mix.scan import Columns, ScanLines
from bimedix_jax.curation.quarantine import Quarantine, Rejected
from bimedix_jax.curation.readers import read
from bimedix_jax.data.parallel import batched, ordered_map

TRAIN, CONTAMINATION, DUPLICATES = "train.jsonl", "contamination.jsonl", "duplicates.jsonl"
QUARANTINE, REPORT, CARD = "quarantine.jsonl", "report.json", "README.md"


def mix(config: MixConfig, folder: Path) -> dict[str, Any]:
    """Write a set into an existing folder and return its report. Call it inside `files.new_folder`.

    Raises:
        BimedixError: a source cannot be read, or there are too few records for the ratio or preset.
    """
    evaluation = report.Evaluation(config.evaluation)
    index = decontaminate.build_index(evaluation.records(), config.ngram, config.share)
    spool = folder / "candidates.jsonl"
    bands: list[np.ndarray] = []
    with (folder / QUARANTINE).open("w", encoding="utf-8") as rejects:

        def note(row: Rejected) -> None:
            rejects.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")

        quarantine = Quarantine(sink=note)
        columns, hits = _scan(config, index, spool, bands, quarantine)
    candidates = Candidates(spool, columns)
    try:
        decisions = _decide_by_line(columns)
        _contaminated(columns, decisions, hits, np.array(sorted(index.ids), np.uint64))
        _near_duplicates(config, bands, candidates, decisions, folder / DUPLICATES)
        wanted = _wanted(config, columns, decisions)
        rows = _choose(config, columns, decisions, wanted)
        digest = _write(folder / TRAIN, candidates, columns, rows, wanted)
        removed = report.write_contamination(folder / CONTAMINATION, candidates, columns, decisions, hits, evaluation)
    finally:
        candidates.close()
    spool.unlink()
    found = report.build(config, columns, decisions, evaluation, removed, quarantine, digest)
    (folder / REPORT).write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card.render(found), encoding="utf-8")
    return found


def _scan(
    config: MixConfig, index: EvaluationIndex, spool: Path, bands: list[np.ndarray], quarantine: Quarantine
) -> tuple[Columns, list[Hit]]:
    """The numbers of every record, and its overlap with the evaluation sets."""
    waiting: collections.deque[tuple[int, np.ndarray, np.ndarray]] = collections.deque()
    columns, hits, total = Columns(), [], 0
    with spool.open("wb") as file, tqdm(desc="reading", unit=" records", disable=None) as progress:

        def batches() -> Iterator[list[tuple[int, bytes]]]:
            position = 0
            for number, source in enumerate(config.sources):
                for batch in batched(itertools.islice(lines_of(source, quarantine), config.limit)):
                    file.writelines(line for _, line in batch)
                    lengths = np.array([len(line) for _, line in batch], np.int64)
                    waiting.append((number, position + np.cumsum(lengths) - lengths, lengths))
                    position += int(lengths.sum())
                    yield batch

        task = ScanLines(index, config.tokenizer, config.template)
        for scanned in ordered_map(task, batches(), config.workers):
            number, offsets, lengths = waiting.popleft()
            hits += [dataclasses.replace(hit, row=hit.row + total) for hit in scanned.hits]
            columns.append(scanned, offsets, lengths, number)
            bands.append(scanned.bands)
            for line, reason in scanned.rejected:
                quarantine.add("records", config.sources[number], line, reason)
            progress.update(len(lengths))
            total += len(lengths)
    columns.close()
    return columns, hits


def lines_of(source: str, quarantine: Quarantine) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of JSON of a source. The lines of a JSONL file of records are passed through unchanged."""
    name, separator, place = source.partition("=")
    path = Path(place if separator else name).expanduser()
    if path.is_file() and (name == "records" if separator else path.suffix == ".jsonl"):
        for number, line in enumerate(files.text_lines(path), start=1):
            if line.strip():
                yield number, line if line.endswith(b"\n") else line + b"\n"
        return
    for number, record in enumerate(read(source, quarantine), start=1):
        yield number, record.to_json().encode() + b"\n"


def _decide_by_line(columns: Columns) -> np.ndarray:
    """Decisions that need only the record itself, and duplicate ids: of records with the same id the first is kept."""
    decisions = np.where(columns.heldout, Decision.HELDOUT, Decision.KEPT).astype(np.uint8)
    decisions[columns.group < 0] = Decision.MALFORMED
    rows = np.flatnonzero(decisions == Decision.KEPT)
    _, first = np.unique(columns.ids[rows], return_index=True)
    decisions[np.delete(rows, first)] = Decision.SAME_ID
    return decisions


def _contaminated(columns: Columns, decisions: np.ndarray, hits: Iterable[Hit], known: np.ndarray) -> None:
    """Mark records that overlap an evaluation set, and their families: sources, translations and chats."""
    direct = np.zeros(len(decisions), bool)
    direct[[hit.row for hit in hits]] = True
    everything = decontaminate.families(columns.ids, columns.parents, direct, known)
    undecided = (decisions == Decision.KEPT) | (decisions == Decision.SAME_ID)
    decisions[undecided & everything] = Decision.FAMILY
    decisions[undecided & direct] = Decision.CONTAMINATED


def _near_duplicates(
    config: MixConfig, bands: list[np.ndarray], candidates: Candidates, decisions: np.ndarray, path: Path
) -> None:
    """Mark near-duplicates and write a line for each: its id, the id of the kept record, their similarity."""
    wanted = (decisions == Decision.KEPT) & (config.near_duplicates > 0)
    found = duplicates.find(bands, wanted, candidates.shingles, config.near_duplicates)
    with path.open("w", encoding="utf-8") as file:
        for pair in tqdm(found, desc="near-duplicates", unit=" removed", disable=None):
            decisions[pair.row] = Decision.NEAR_DUPLICATE
            names = {"record": candidates.record(pair.row).id, "duplicate_of": candidates.record(pair.of).id}
            line = {**names, "similarity": round(pair.similarity, 4)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _wanted(config: MixConfig, columns: Columns, decisions: np.ndarray) -> dict[tuple[str, str], int]:
    sizes = np.bincount(columns.group[decisions == Decision.KEPT], minlength=len(columns.groups))
    available: dict[tuple[str, str], int] = collections.defaultdict(int)
    for (kind, language, *_), size in zip(columns.groups, sizes.tolist(), strict=True):
        available[kind, language] += size
    if config.preset is None:
        return targets.by_ratio(available, config.ratio)
    return targets.by_preset(available, config.preset, config.scale)


def _choose(
    config: MixConfig, columns: Columns, decisions: np.ndarray, wanted: dict[tuple[str, str], int]
) -> np.ndarray:
    """Numbers of the chosen records in their final order; the other kept records become surplus.

    The position of a record depends only on its id and the seed, so other records do not change the order of a set.
    """
    chosen = np.zeros(len(decisions), bool)
    order = fingerprints.scatter(columns.ids, f"choose {config.seed}")
    for part, count in wanted.items():
        codes = [code for code, group in enumerate(columns.groups) if group[:2] == part]
        rows = np.flatnonzero((decisions == Decision.KEPT) & np.isin(columns.group, codes))
        chosen[rows[np.argsort(order[rows], kind="stable")[:count]]] = True
    decisions[(decisions == Decision.KEPT) & ~chosen] = Decision.SURPLUS
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(fingerprints.scatter(columns.ids[rows], f"order {config.seed}"), kind="stable")]


def _write(
    path: Path, candidates: Candidates, columns: Columns, rows: np.ndarray, wanted: dict[tuple[str, str], int]
) -> str:
    """Write the chosen records and return the SHA-256 of the file. Checks the numbers written against `wanted`."""
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
        raise AssertionError(f"{dict(written)} were written instead of {wanted}; this is a bug, please report it")
    return digest.hexdigest()
