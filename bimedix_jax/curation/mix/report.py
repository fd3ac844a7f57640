"""The report of a mix: counts by decision, tables, ratios, hashes, and a line for each contaminated record."""

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax import __version__, files
from bimedix_jax.curation import counts
from bimedix_jax.curation.counts import Count
from bimedix_jax.curation.fingerprints import digest
from bimedix_jax.curation.mix.candidates import Candidates, Decision
from bimedix_jax.curation.mix.config import MixConfig
from bimedix_jax.curation.mix.decontaminate import Hit, parents_of
from bimedix_jax.curation.mix.scan import Columns
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import parse, read
from bimedix_jax.data.records import Record


class Evaluation:
    """The evaluation sets. `ids` and `sets` are indexed by the number of the record once `records` is exhausted."""

    def __init__(self, sources: tuple[str, ...]) -> None:
        self.sources = sources
        self.ids: list[str] = []
        self.sets: list[tuple[str, str]] = []  # (source, language)
        self.quarantine = Quarantine()

    def records(self) -> Iterator[Record]:
        """All evaluation records, without those that their source marks for training."""
        for source in self.sources:
            for record in read(source, self.quarantine):
                if record.split != "train":
                    self.ids.append(record.id)
                    self.sets.append((record.source, record.language))
                    yield record


def write_contamination(
    path: Path,
    candidates: Candidates,
    columns: Columns,
    decisions: np.ndarray,
    hits: Iterable[Hit],
    evaluation: Evaluation,
) -> list[dict[str, Any]]:
    """Write a line for each record that overlaps an evaluation set; return counts of them for the report."""
    of_row = {hit.row: hit for hit in hits}
    tally: collections.Counter[tuple[str, str, str, str, str]] = collections.Counter()
    relatives = _relatives(columns, of_row.values(), evaluation)
    with path.open("w", encoding="utf-8") as file:
        for row in np.flatnonzero((decisions == Decision.CONTAMINATED) | (decisions == Decision.FAMILY)).tolist():
            record = candidates.record(row)
            hit = of_row.get(row)
            found = hit.evaluation if hit else relatives.get(row)
            line: dict[str, Any] = {
                "record": record.id,
                "language": record.language,
                "kind": record.kind,
                "source": record.source,
                "by": hit.by if hit else "family",
                "share": round(hit.share, 4) if hit else None,
                "evaluation": None if found is None else evaluation.ids[found],
                "evaluation_source": None if found is None else evaluation.sets[found][0],
                "made_from": next((name for name in parents_of(record) if name is not None), None),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            tally[line["evaluation_source"] or "", record.source, record.language, record.kind, line["by"]] += 1
    names = ("evaluation", "source", "language", "kind", "by")
    return [{**dict(zip(names, key, strict=True)), "records": n} for key, n in sorted(tally.items())]


def _relatives(columns: Columns, hits: Iterable[Hit], evaluation: Evaluation) -> dict[int, int]:
    """The evaluation record of each row that is related to a hit, found as in decontaminate.families."""
    known = {digest(name): number for number, name in enumerate(evaluation.ids)}
    found: dict[int, int] = {}
    fresh = {hit.row: hit.evaluation for hit in hits}
    while True:
        for row, number in fresh.items():
            for name in (columns.ids[row], *columns.parents[:, row]):
                if name:
                    known.setdefault(int(name), number)
        found |= fresh
        names = np.array(sorted(known), np.uint64)
        related = np.isin(columns.ids, names) | np.isin(columns.parents, names).any(axis=0)
        rows = [row for row in np.flatnonzero(related).tolist() if row not in found]
        fresh = {
            row: next(known[int(n)] for n in (columns.ids[row], *columns.parents[:, row]) if int(n) in known)
            for row in rows
        }
        if not fresh:
            return found


def set_counts(columns: Columns, chosen: np.ndarray) -> dict[tuple[str, str], Count]:
    """Sums by kind and language over the chosen records (bool [N])."""
    found: dict[tuple[str, str], Count] = collections.defaultdict(Count)
    for code, (kind, language, *_) in enumerate(columns.groups):
        found[kind, language] += _sum(columns, chosen & (columns.group == code))
    return dict(found)


def build(
    config: MixConfig,
    columns: Columns,
    decisions: np.ndarray,
    evaluation: Evaluation,
    contamination: list[dict[str, Any]],
    quarantine: Quarantine,
    train: str,
) -> dict[str, Any]:
    """The report. `train` is the SHA-256 of the set."""
    chosen = decisions == Decision.KEPT
    found = set_counts(columns, chosen)
    groups = []
    for code, group in sorted(enumerate(columns.groups), key=lambda item: item[1]):
        count = _sum(columns, chosen & (columns.group == code))
        if count.samples:
            groups.append({**dict(zip(("kind", "language", "source", "licence"), group, strict=True)), **vars(count)})
    sizes = collections.Counter(evaluation.sets)
    available = np.unique(columns.group[(decisions == Decision.SURPLUS) | chosen])
    kinds = {columns.groups[code][0] for code in available.tolist()}
    own = {name: value for name, value in dataclasses.asdict(config).items() if name != "workers"}
    return {
        "records": int(chosen.sum()),
        "sha256": train,
        "settings": own,
        "versions": {"bimedix_jax": __version__, "rensa": importlib.metadata.version("rensa")},
        "decisions": {decision.name.lower(): int((decisions == decision).sum()) for decision in Decision},
        "sources": [_source(columns, decisions, number, source) for number, source in enumerate(config.sources)],
        "rejected_rows": quarantine.count,
        "kinds_left_out": sorted(kinds - {group["kind"] for group in groups}),
        "groups": groups,
        "tables": counts.tables(found),
        "ratios": counts.ratios(found),
        "evaluation": {
            "sources": [{"source": source, "sha256": source_hash(source)} for source in evaluation.sources],
            "sets": [{"source": s, "language": lang, "records": n} for (s, lang), n in sorted(sizes.items())],
            "rejected_rows": evaluation.quarantine.count,
        },
        "contamination": contamination,
    }


def source_hash(source: str) -> str | None:
    """SHA-256 of a source's file, or of the names and hashes of a folder's files; None for the hub and the sample."""
    name, place, _ = parse(source)
    if name == "sample" or not isinstance(place, Path):
        return None
    if place.is_file():
        return files.sha256(place)
    inner = sorted(path for path in place.rglob("*") if path.is_file())
    listing = "".join(f"{path.relative_to(place)}\0{files.sha256(path)}\n" for path in inner)
    return hashlib.sha256(listing.encode()).hexdigest()


def _source(columns: Columns, decisions: np.ndarray, number: int, source: str) -> dict[str, Any]:
    numbers = np.bincount(decisions[columns.origin == number], minlength=len(Decision)).tolist()
    named = {decision.name.lower(): numbers[decision] for decision in Decision}
    return {"source": source, "sha256": source_hash(source), "read": sum(numbers), **named}


def _sum(columns: Columns, rows: np.ndarray) -> Count:
    sums = (int(column[rows].sum(dtype=np.int64)) for column in (columns.exchanges, columns.tokens, columns.learned))
    return Count(int(rows.sum()), *sums)
