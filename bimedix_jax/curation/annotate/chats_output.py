"""Writes the outcomes of `chats` in the order of the input: chats, rejected questions with reasons, and a report."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.annotate.chat_shapes import ChatStyle, draw
from bimedix_jax.curation.annotate.chats import ChatOutcome, to_record
from bimedix_jax.curation.annotate.job import Outcomes
from bimedix_jax.curation.mix.duplicates import find
from bimedix_jax.data.records import Record, read_jsonl

CHATS, REJECTED, REPORT = "chats.jsonl", "rejected.jsonl", "report.json"
SIMILAR = 0.8
"""Jaccard similarity of five-word shingles from which the later of two chats is left out."""

_BATCH = 2_000


def write(
    folder: Path,
    outcomes: Outcomes,
    style: ChatStyle,
    left_out: Counter[str],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Write CHATS, REJECTED and REPORT into an existing folder and return the report."""
    everything = folder / "everything.jsonl"
    why: Counter[str] = Counter()
    rounds: Counter[int] = Counter()
    questions = 0
    with (
        everything.open("w", encoding="utf-8", newline="\n") as chats,
        (folder / REJECTED).open("w", encoding="utf-8", newline="\n") as rejected,
    ):
        for record, outcome in outcomes():
            questions += 1
            if outcome is not None and outcome.accepted:
                version = outcome.version
                rounds[version.round] += 1
                chats.write(to_record(record, draw(record, style), version, provenance).to_json() + "\n")
                continue
            reasons = ["no answer"] if outcome is None else outcome.reasons()
            why.update(_kinds(outcome))
            last = None if outcome is None else outcome.versions[-1].model_dump(mode="json")
            rejected.write(json.dumps({"id": record.id, "reasons": reasons, "last": last}, ensure_ascii=False) + "\n")
    with (folder / REJECTED).open("a", encoding="utf-8", newline="\n") as rejected:
        counts = _without_duplicates(everything, folder / CHATS, rejected)
    everything.unlink()
    report = {
        "questions": questions,
        **counts,
        "rejected": questions - counts["chats"],
        "rejected_for": dict(sorted(why.items())),
        "written_in_round": {str(number): rounds[number] for number in sorted(rounds)},
        "left_out": dict(sorted(left_out.items())),
        "seed": style.seed,
        **provenance,
    }
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return report


def _kinds(outcome: ChatOutcome | None) -> set[str]:
    """Short names of the reasons against the last draft of a question."""
    if outcome is None:
        return {"no answer"}
    last = outcome.versions[-1]
    if last.dialogue is None:
        return {"no chat"}
    if last.choice is None:
        return {problem.name for problem in last.problems} | {"no judgement"}
    found = {problem.name for problem in last.problems}
    if "conclusion" in last.failure:
        found.add("judge_other_choice")
    if "score" in last.failure:
        found.add("judge_score")
    return found


def _without_duplicates(everything: Path, target: Path, rejected: Any) -> dict[str, Any]:
    """Copy the chats without near-duplicates of an earlier one, and count them."""
    offsets = [0]
    duplicate: dict[int, int] = {}
    with everything.open("rb") as file:
        bands: list[np.ndarray] = []
        batch: list[np.ndarray] = []
        for line in file:
            offsets.append(offsets[-1] + len(line))
            batch.append(_shingles(line))
            if len(batch) == _BATCH:
                bands.append(fingerprints.bands(batch))
                batch = []
        bands.append(fingerprints.bands(batch))

        def shingles_of(row: int) -> np.ndarray:
            file.seek(offsets[row])
            return _shingles(file.readline())

        wanted = np.ones(len(offsets) - 1, bool)
        duplicate = {found.row: found.of for found in find(bands, wanted, shingles_of, SIMILAR)} if wanted.size else {}
    return _copy(everything, target, duplicate, rejected)


def _copy(everything: Path, target: Path, duplicate: dict[int, int], rejected: Any) -> dict[str, Any]:
    turns: Counter[int] = Counter()
    languages: Counter[str] = Counter()
    switched = 0
    ids: list[str] = []
    with target.open("w", encoding="utf-8", newline="\n") as file:
        for row, record in enumerate(read_jsonl(everything)):
            ids.append(record.id)
            if row in duplicate:
                reasons = [f"nearly the same as {ids[duplicate[row]]}"]
                line = {"id": record.provenance["source_id"], "reasons": reasons, "last": None}
                rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
                continue
            file.write(record.to_json() + "\n")
            turns[len(record.conversations) // 2] += 1
            languages[record.language] += 1
            switched += "switch_turn" in record.provenance
    chats = turns.total()
    mean = sum(number * count for number, count in turns.items()) / chats if chats else None
    return {
        "chats": chats,
        "duplicates": len(duplicate),
        "mean_turns": mean,
        "turns": {str(number): turns[number] for number in sorted(turns)},
        "languages": dict(sorted(languages.items())),
        "switched": switched,
    }


def _shingles(line: bytes) -> np.ndarray:
    record = Record.model_validate_json(line)
    text = "\n".join(turn.value for turn in record.conversations)
    return fingerprints.shingles(fingerprints.words(text))
