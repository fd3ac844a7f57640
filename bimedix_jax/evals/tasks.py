"""The nine benchmark tasks of the BiMediX paper (Tables 3 to 5), read from local folders.

To add a task, add a row to TASKS and, if its files need one, a reader in bimedix_jax/curation/readers/.
"""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, ValidationError

from bimedix_jax.curation.quarantine import Rejected
from bimedix_jax.curation.readers import READERS, Quarantine, read
from bimedix_jax.data.records import Language, Record, explain
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.accuracy import Accuracy
from bimedix_jax.evals.heldout import held_out, heldout_records
from bimedix_jax.evals.journal import Part, nothing
from bimedix_jax.evals.multiple_choice import MultipleChoice, multiple_choice
from bimedix_jax.evals.repeated import warn_repeated_records
from bimedix_jax.files import read_json
from bimedix_jax.inference.planning import AnyPlan
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record as RecordKind

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """One column of the paper's tables.

    Attributes:
      label: the column's heading.
      reader: name in readers.READERS, and name of the folder in `--data`.
      subject: subject of the reader's records that belong to the task; None: all do.
      questions: number of questions in the paper; None for a set of one's own.
    """

    label: str
    reader: str
    subject: str | None
    questions: int | None


TASKS: dict[str, Task] = {
    "mmlu_clinical_knowledge": Task("CliKG", "mmlu_medical_en", "clinical_knowledge", 265),
    "mmlu_college_biology": Task("CBio", "mmlu_medical_en", "college_biology", 144),
    "mmlu_college_medicine": Task("CMed", "mmlu_medical_en", "college_medicine", 173),
    "mmlu_medical_genetics": Task("MedGen", "mmlu_medical_en", "medical_genetics", 100),
    "mmlu_professional_medicine": Task("ProMed", "mmlu_medical_en", "professional_medicine", 272),
    "mmlu_anatomy": Task("Ana", "mmlu_medical_en", "anatomy", 135),
    "medmcqa": Task("MedMCQA", "medmcqa_en", None, 4183),
    "medqa": Task("MedQA", "medqa_usmle_en", None, 1273),
    "pubmedqa": Task("PubMedQA", "pubmedqa", None, 500),
}


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    Attributes:
      available: number of questions in the local files; `task.questions` is the number in the paper.
      limited: whether `limit` left some of them out.
      rejected: number of rows of the files that are not valid questions.
    """

    task: Task
    choice: MultipleChoice
    available: int
    limited: bool
    rejected: int

    @property
    def score(self) -> Accuracy:
        """The headline accuracy of the task, over all its languages."""
        return total(self.choice.scores)

    def to_dict(self) -> dict[str, Any]:
        """The result for JSON."""
        sizes = {group: score.total for group, score in self.choice.scores.items() if "/" not in group}
        return {
            "label": self.task.label,
            **self.score.to_dict(),
            "by_text": total(self.choice.scores_by_text).to_dict(),
            "by_group": {group: score.to_dict() for group, score in self.choice.scores.items()},
            "chance": sum(self.choice.chance[group] * size for group, size in sizes.items()) / sum(sizes.values()),
            "available": self.available,
            "paper_questions": self.task.questions,
            "limited": self.limited,
            "too_long": sum(count for group, count in self.choice.too_long.items() if "/" not in group),
            "ties": sum(count for group, count in self.choice.to_dict()["ties"].items() if "/" not in group),
            "rejected": self.rejected,
        }


def total(scores: Mapping[str, Accuracy]) -> Accuracy:
    """The accuracy over all languages."""
    parts = [score for group, score in scores.items() if "/" not in group]
    return Accuracy(sum(part.correct for part in parts), sum(part.total for part in parts))


def named(names: Iterable[str]) -> list[str]:
    """Names of tasks in the order of TASKS; `all` means all nine.

    Raises:
      BimedixError: an unknown name.
    """
    wanted = set(names)
    unknown = sorted(wanted - set(TASKS) - {"all"})
    if unknown:
        raise BimedixError(f"there is no task {', '.join(unknown)}; name some of {', '.join(TASKS)}, or all")
    return [name for name in TASKS if name in wanted or "all" in wanted]


def questions_of(name: str, data: str | Path) -> tuple[list[Record], int]:
    """The held-out questions of a task in the folder `data`, and the number of rows that were rejected.

    Raises:
      BimedixError: the task's folder is missing, or it is not laid out as the reader expects.
    """
    task = TASKS[name]
    folder = Path(data).expanduser() / task.reader
    if not folder.is_dir():
        raise BimedixError(f"task {name} needs the folder {folder}; put its files there or leave the task out")
    quarantine = Quarantine()
    records = [
        record
        for record in READERS[task.reader](folder, quarantine)
        if record.split == "heldout" and task.subject in (None, record.provenance.get("subject"))
    ]
    if not records:
        raise BimedixError(f"{folder} has no question of task {name}; check its files")
    return records, len(quarantine.rejected)


def heldout_of(source: str, limit: int | None) -> list[Record]:
    """The held-out records of `sample`, of a JSONL file, or of NAME=PLACE?options with a reader's name.

    Raises:
      BimedixError: there is none, or the source cannot be read.
    """
    if "=" not in source or Path(source).is_file():
        kept = own_records(source, limit)
    else:
        quarantine = Quarantine()
        found = list(read(source, quarantine))
        warn_rejected(source, quarantine)
        kept = held_out(found, source, limit)
    warn_repeated_records(source, kept)
    return kept


def own_records(source: str, limit: int | None) -> list[Record]:
    """As `heldout_records`; where a line lacks fields of a record, the error says how to read other layouts."""
    try:
        return heldout_records(source, limit)
    except BimedixError as error:
        problem = error.__cause__
        if not isinstance(problem, ValidationError):
            raise
        found = problem.errors(include_url=False, include_input=False)
        missing = [str(item["loc"][0]) for item in found if item["type"] == "missing" and len(item["loc"]) == 1]
        if not missing:
            raise
        where = str(error).partition(f": {explain(problem)}")[0]
        raise BimedixError(
            f"{where} is not a record, since it has no {', '.join(missing)}; add what is missing, or name the columns: "
            f"--heldout 'table={source}?question=...&choices=...&answer=...&licence=...'"
        ) from problem


class OwnSet(BaseModel):
    """A set of questions of one's own, by the names of its columns; see the reader `table` in docs/data.md.

    Attributes:
      data: file (JSONL, JSON, CSV, Parquet, XLSX) or hf:owner/name; relative to the file of the sets.
      choices: one column, or one for each choice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    question: str = "question"
    choices: str | tuple[str, ...] = "choices"
    answer: str = "answer"
    language: Language | None = None
    context: str | None = None
    specialty: str | None = None
    id: str | None = None
    licence: str = "not stated"

    def source(self, folder: Path) -> str:
        """The source for the reader `table`."""
        choices = self.choices if isinstance(self.choices, str) else ",".join(self.choices)
        options = {**self.model_dump(exclude={"data"}, exclude_none=True), "choices": choices}
        return f"table={beside(folder, self.data)}?{urlencode(options)}"


def beside(folder: Path, place: str) -> str:
    """A place that a file in `folder` names."""
    return place if place.startswith("hf:") else str(folder / Path(place).expanduser())


def read_sets(path: Path) -> "Questions":
    """The questions of the sets in a JSON file: {name: {data, question, choices, answer, ...} or NAME=PLACE?options}.

    Raises:
      BimedixError: a name is that of a task, a set cannot be read or has no questions with choices.
    """
    remedy = "write {name: {data, question, choices, answer, language}} or {name: NAME=PLACE?options}"
    found: Questions = {}
    for name, own in read_json(path, dict[str, OwnSet | str], remedy, unique_keys=True).items():
        if name in TASKS:
            raise BimedixError(f"{path} calls a set {name}, as a task of the paper; choose another name")
        quarantine = Quarantine()
        if isinstance(own, str):
            reader, _, place = own.partition("=")
            source = f"{reader}={beside(path.parent, place)}"
        else:
            source = own.source(path.parent)
        records = [record for record in read(source, quarantine) if record.choices is not None]
        if not records:
            raise BimedixError(f"{source} ({name} in {path}) has no question with choices; check its columns")
        warn_rejected(name, quarantine)
        warn_repeated_records(name, records)
        found[name] = (records, len(quarantine.rejected))
    return found


def warn_rejected(name: str, quarantine: Quarantine) -> None:
    """Warns of rows that are not valid records, with the first line of each reason."""
    first: dict[str, Rejected] = {}
    for row in quarantine.rejected:
        first.setdefault(row.reason, row)
    counts = collections.Counter(row.reason for row in quarantine.rejected)
    if not counts:
        return
    shown = [f"{count} because {reason} (line {first[reason].line})" for reason, count in counts.most_common(REASONS)]
    more = ["..."] if len(counts) > REASONS else []
    log.warning("%s: %d rows are not valid and were left out: %s", name, counts.total(), "; ".join([*shown, *more]))


REASONS = 5
"""Reasons that a warning lists."""
Questions = dict[str, tuple[list[Record], int]]
"""The questions of tasks by name, and the number of rows that were rejected."""


def read_tasks(names: Iterable[str], data: str | Path) -> Questions:
    """The questions of tasks in the folder `data`; raises BimedixError for unknown names and missing files."""
    return {name: questions_of(name, data) for name in named(names)}


def run_tasks(
    model: Mixtral,
    tokenizer: Tokenizer,
    names: Iterable[str],
    data: str | Path | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    plan: AnyPlan = None,
    record: RecordKind = "none",
    questions: Questions | None = None,
    saved: Callable[[str], Part] = nothing,
) -> dict[str, TaskResult]:
    """Scores tasks.

    All files are read before the first question is scored, so that a missing file is an error early.

    Args:
      limit: number of questions of each task, the first ones; the result marks such a task as limited.
      plan: what the routers are told to do; its B and T are 1. Or rules.
      record: "choices" or "full" keeps what the routers did, in `TaskResult.choice.routing`.
      questions: what `read_tasks` and `read_sets` returned; None reads the files of `names` in `data`.
      saved: the results of a task of an earlier start, by its name, and where to save more of them.
    """
    if questions is None:
        if data is None:
            raise BimedixError("the tasks need the folder of their data; pass it")
        questions = read_tasks(names, data)
    results = {}
    for name, (records, rejected) in questions.items():
        chosen = list(itertools.islice(records, limit))
        choice = multiple_choice(model, tokenizer, chosen, max_length, batch_tokens, plan, record, saved(name))
        task = TASKS.get(name) or Task(name, "", None, None)
        results[name] = TaskResult(task, choice, len(records), len(chosen) < len(records), rejected)
    return results


def average(accuracies: Sequence[float]) -> float | None:
    """The paper's AVG, the unweighted mean of the nine columns; None if one is missing."""
    return sum(accuracies) / len(TASKS) if len(accuracies) == len(TASKS) else None
