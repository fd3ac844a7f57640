"""Evaluation sets in Arabic: one file for each task, in the order of the English questions, with their answer keys.

Every question with a translation is written, also a doubtful one: its problems are in `provenance.flags`, and
`bimedix eval harness --exclude-flagged` leaves it out. So nobody measures an accuracy over broken questions unawares.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from bimedix_jax.curation.review.items import Reason, Version
from bimedix_jax.data.records import Record

TASKS = {"medmcqa_en": "medmcqa", "medqa_usmle_en": "medqa"}
"""Source of a record -> name of the task; MMLU has one for each subject."""


def task_of(record: Record) -> str:
    """The task that an English question belongs to."""
    if record.source == "mmlu_medical_en":
        return f"mmlu_{record.provenance.get('subject') or record.specialty}"
    return TASKS.get(record.source, record.source)


def not_a_question(record: Record) -> str | None:
    """Why a record is no question of a benchmark, or None."""
    if record.language != "en":
        return "are not English"
    if record.choices is None:
        return "have no choices"
    return "are not in the test set" if record.split == "train" else None


@dataclasses.dataclass
class Benchmarks:
    """Writes TASK_ar.jsonl into a folder, and counts.

    Attributes:
      lines: by task, the questions written so far.
      flags: by task, how many questions have each flag; `low_score` if only the score was too low.
      missing: by task, ids of questions without a translation.
    """

    folder: Path
    lines: Counter[str] = dataclasses.field(default_factory=Counter)
    flagged: Counter[str] = dataclasses.field(default_factory=Counter)
    flags: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, record: Record, version: Version | None, translation: Record | None, reason: Reason | None) -> None:
        """The outcome of one question; `reason` is why people review it, "sample" or None for an accepted one."""
        task = task_of(record)
        if version is None or translation is None:
            self.missing.setdefault(task, []).append(record.id)
            return
        names = sorted({flag.name for flag in version.flags})
        if not names and reason not in (None, "sample"):
            names = ["low_score"]
        if translation.answer != record.answer or len(translation.choices or ()) != len(record.choices or ()):
            raise AssertionError(f"the translation of {record.id} has another answer key")
        own = translation.model_copy(update={"provenance": {**translation.provenance, "flags": names}})
        with (self.folder / f"{task}_ar.jsonl").open("a", encoding="utf-8", newline="\n") as file:
            file.write(own.to_json() + "\n")
        self.lines[task] += 1
        self.flagged[task] += bool(names)
        self.flags.setdefault(task, Counter()).update(names)

    def report(self) -> dict[str, Any]:
        """By task: questions, those with flags, each flag, and what has no translation."""
        return {
            task: {
                "questions": self.lines[task],
                "flagged": self.flagged[task],
                "flags": dict(sorted(self.flags.get(task, {}).items())),
                "missing": self.missing.get(task, []),
            }
            for task in sorted({*self.lines, *self.missing})
        }
