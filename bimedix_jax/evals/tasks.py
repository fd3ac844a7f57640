"""The nine benchmark tasks of the BiMediX paper (Tables 3 to 5), read from local folders.

To add a task, add a row to TASKS and, if its files need one, a reader in bimedix_jax/curation/readers/.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bimedix_jax.curation.readers import READERS, Quarantine
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.multiple_choice import Accuracy, MultipleChoice, multiple_choice
from bimedix_jax.inference.planning import AnyPlan
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record as RecordKind


@dataclasses.dataclass(frozen=True)
class Task:
    """One column of the paper's tables.

    Attributes:
      label: the column's heading.
      reader: name in readers.READERS, and name of the folder in `--data`.
      subject: subject of the reader's records that belong to the task; None: all do.
      questions: number of questions in the paper.
    """

    label: str
    reader: str
    subject: str | None
    questions: int


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
        """The headline accuracy of the task."""
        return self.choice.scores["en"]

    def to_dict(self) -> dict[str, Any]:
        """The result for JSON."""
        return {
            "label": self.task.label,
            **self.score.to_dict(),
            "by_text": self.choice.scores_by_text["en"].to_dict(),
            "chance": self.choice.chance["en"],
            "available": self.available,
            "paper_questions": self.task.questions,
            "limited": self.limited,
            "too_long": self.choice.too_long.get("en", 0),
            "rejected": self.rejected,
        }


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


Questions = dict[str, tuple[list[Record], int]]
"""The questions of tasks by name, and the number of rows that were rejected."""


def read_tasks(names: Iterable[str], data: str | Path) -> Questions:
    """The questions of tasks in the folder `data`; raises BimedixError for unknown names and missing files."""
    return {name: questions_of(name, data) for name in named(names)}


def run_tasks(
    model: Mixtral,
    tokenizer: Tokenizer,
    names: Iterable[str],
    data: str | Path,
    limit: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    plan: AnyPlan = None,
    record: RecordKind = "none",
    questions: Questions | None = None,
) -> dict[str, TaskResult]:
    """Scores tasks.

    All files are read before the first question is scored, so that a missing file is an error early.

    Args:
      limit: number of questions of each task, the first ones; the result marks such a task as limited.
      plan: what the routers are told to do; its B and T are 1. Or rules.
      record: "choices" or "full" keeps what the routers did, in `TaskResult.choice.routing`.
      questions: what `read_tasks` returned; None reads the files.
    """
    read = read_tasks(names, data) if questions is None else questions
    results = {}
    for name, (records, rejected) in read.items():
        chosen = list(itertools.islice(records, limit))
        choice = multiple_choice(model, tokenizer, chosen, max_length, batch_tokens, plan, record)
        results[name] = TaskResult(TASKS[name], choice, len(records), len(chosen) < len(records), rejected)
    return results


def average(accuracies: Sequence[float]) -> float | None:
    """The paper's AVG, the unweighted mean of the nine columns; None if one is missing."""
    return sum(accuracies) / len(TASKS) if len(accuracies) == len(TASKS) else None
