"""Reads verdicts in any format and applies them: one translation for each item, or none."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from bimedix_jax import files
from bimedix_jax.curation.arabic import ARABIC_LETTER, plain
from bimedix_jax.curation.checks.api import check
from bimedix_jax.curation.checks.surface import check_script
from bimedix_jax.curation.review import label_studio, tables
from bimedix_jax.curation.review.items import ReviewItem, Verdict
from bimedix_jax.curation.review.segments import segments, with_edits
from bimedix_jax.data.records import Record, read_jsonl
from bimedix_jax.errors import BimedixError

FORMS = {".json": "label-studio", ".csv": "csv", ".jsonl": "jsonl"}


def read(path: Path, items: Mapping[str, ReviewItem], reviewer: str | None = None) -> list[Verdict]:
    """The verdicts of a file: a Label Studio export (.json), CSV or JSONL.

    `reviewer` is the name for verdicts without one; by default the name of the file without its ending.

    Raises:
        BimedixError: the file is missing, is not UTF-8, has another format, or does not fit the items; or an edited
            text is not in Arabic at all.
    """
    form = FORMS.get(path.suffix.lower())
    if form is None:
        raise BimedixError(f"{path} does not end in one of {', '.join(FORMS)}; a Label Studio export ends in .json")
    try:
        text = files.read_text(path)
    except OSError as error:
        raise BimedixError(f"cannot read {path} ({error.strerror}); name a file that was exported") from error
    if form == "label-studio":
        found = label_studio.verdicts(text, path.name, items)
        _require_arabic(found, path.name, items)
        return found
    saved = datetime.fromtimestamp(path.stat().st_mtime).astimezone().replace(microsecond=0)
    read_table = tables.from_csv if form == "csv" else tables.from_jsonl
    found = read_table(text, path.name, items, saved, reviewer or path.stem)
    _require_arabic(found, path.name, items)
    return found


def _require_arabic(verdicts: Iterable[Verdict], where: str, items: Mapping[str, ReviewItem]) -> None:
    """Raise BimedixError if an edited text has no Arabic letter, unless it is a name or notation of the source."""
    for verdict in verdicts:
        sources = {part.id: part.source for part in segments(items[verdict.item])} if verdict.edited else {}
        for name, text in (verdict.edited or {}).items():
            if ARABIC_LETTER.search(plain(text)) or check_script(plain(sources.get(name, "")), plain(text)) is None:
                continue
            raise BimedixError(
                f"{where}: item {verdict.item!r}: the edited text of segment {name!r} has no Arabic ({text[:60]!r}); "
                "write the translation there, or reject the item"
            )


def latest(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Each reviewer's latest verdict on each item, ordered by item and reviewer."""
    last: dict[tuple[str, str], Verdict] = {}
    for verdict in verdicts:
        key = (verdict.item, verdict.reviewer)
        if key not in last or last[key].time <= verdict.time:
            last[key] = verdict
    return [last[key] for key in sorted(last)]


@dataclass(frozen=True)
class Settled:
    """The result of an item: its final record, or why there is none."""

    item: ReviewItem
    result: Literal["accepted", "edited", "rejected", "undecided", "unreviewed"]
    record: Record | None
    differing_edits: bool = False


def settle(items: Iterable[ReviewItem], verdicts: Sequence[Verdict]) -> list[Settled]:
    """Each item's result by majority of the verdicts that keep it (accept, edit) and those that reject it.

    With as many of both, an item is undecided and has no record. The latest edit is used; `differing_edits` is set if
    edits differ. The record's provenance has the verdicts with reviewer, time and decision, and the flags that the
    final text still raises.
    """
    by_item: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in latest(verdicts):
        by_item[verdict.item].append(verdict)
    return [_settle(item, by_item[item.id]) for item in items]


def _settle(item: ReviewItem, verdicts: list[Verdict]) -> Settled:
    if not verdicts:
        return Settled(item, "unreviewed", None)
    rejecting = sum(verdict.decision == "reject" for verdict in verdicts)
    keeping = len(verdicts) - rejecting
    if rejecting == keeping:
        return Settled(item, "undecided", None)
    if rejecting > keeping:
        return Settled(item, "rejected", None)
    edits = sorted((v for v in verdicts if v.decision == "edit"), key=lambda v: (v.time, v.reviewer))
    differing = len({tuple(sorted((v.edited or {}).items())) for v in edits}) > 1
    review = [
        {
            "reviewer": v.reviewer,
            "time": v.time.isoformat(),
            "decision": v.decision,
            "score": v.score,
            "comment": v.comment,
        }
        for v in verdicts
    ]
    record = with_edits(item, (edits[-1].edited or {}) if edits else {}, {"review": review})
    flags = [str(flag) for flag in check(item.source, record)]
    if flags:
        record = record.model_copy(update={"provenance": {**record.provenance, "flags_after_review": flags}})
    return Settled(item, "edited" if edits else "accepted", record, differing)


def counts(settled: Iterable[Settled]) -> dict[str, Any]:
    """Number of items with each result, and with edits that differ."""
    rows = list(settled)
    results = Counter(row.result for row in rows)
    return {
        **{name: results[name] for name in ("accepted", "edited", "rejected", "undecided", "unreviewed")},
        "differing_edits": sum(row.differing_edits for row in rows),
    }


def merge(translated: Path | None, settled: Sequence[Settled]) -> Iterator[Record]:
    """All accepted translations: those of `translated` with their edits, then those that only review accepted.

    Sampled translations that were rejected or undecided are left out. Those without a verdict are copied unchanged.
    """
    rows = {row.item.translation.id: row for row in settled if row.item.translation is not None}
    rescued = {row.record.id: row.record for row in settled if row.record is not None}
    if translated is not None:
        for record in read_jsonl(translated):
            row = rows.get(record.id)
            if row is None or row.result == "unreviewed":
                yield record
            elif row.record is not None:
                yield rescued.pop(record.id)
    yield from rescued.values()
