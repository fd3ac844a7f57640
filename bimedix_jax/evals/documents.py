"""The data of our tasks for lm-evaluation-harness: local files, or data sets on the hub, as documents of one form.

Task files name `bimedix_jax.evals.documents.load`. Which files and hub ids a benchmark has is in PLACES and HUB.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bimedix_jax.curation.readers.hub import HubSet
from bimedix_jax.curation.readers.rows import rows
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.layouts import NO_QUESTION, NO_VALID_OPTION, Document, document_of, first_number, row_problem
from bimedix_jax.evals.repeated import warn_repeated
from bimedix_jax.files import read_json

DATA = "BIMEDIX_EVAL_DATA"
"""Environment variable with the folder of the data, where `lm_eval --metadata '{"data": ...}'` does not name one."""
SUBJECTS = (
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
    "anatomy",
)
NINE = (*(f"mmlu_{subject}" for subject in SUBJECTS), "medmcqa", "medqa", "pubmedqa")
"""The paper's benchmarks, in the order of its tables."""
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
MOST_CHOICES = 6
"""Choices that have a letter in the tasks; questions with more are left out and counted."""
NOT_CLINICAL = ("Physics", "Statistics", "Chemistry")
"""Specialties of MedAraBench that the subset `medarabench_clinical` leaves out."""

PLACES: dict[str, tuple[str, ...]] = {
    "mmlu_en": ("mmlu_medical_en/medagents_mmlu_test.jsonl",),
    "medmcqa_en": ("medmcqa_en/dev.json", "medmcqa_en/dev.jsonl", "medmcqa_en/medmcqa_val2816_single.jsonl"),
    "medqa_en": ("medqa_usmle_en/medqa_4options_test.jsonl", "medqa_usmle_en/phrases_no_exclude_test.jsonl"),
    "pubmedqa_en": ("pubmedqa/ori_pqal.json",),
    "medarabench_ar": ("medarabench/medarabench-test_split.csv", "medarabench-test_split.csv"),
}
"""Files below the folder of the data, by benchmark and language; the first that exists."""
FEWSHOT: dict[str, tuple[str, ...]] = {
    "mmlu_en": ("mmlu_medical_en/dev/{subject}_dev.csv",),
    "medmcqa_en": ("medmcqa_en/train.json", "medmcqa_en/train.jsonl"),
    "medqa_en": ("medqa_usmle_en/phrases_no_exclude_train.jsonl",),
    "pubmedqa_en": ("pubmedqa/ori_pqal.json",),
}
HUB: dict[str, tuple[HubSet, HubSet | None]] = {
    **{
        f"mmlu_{subject}_en": (
            HubSet("cais/mmlu", None, subject, "test"),
            HubSet("cais/mmlu", None, subject, "dev"),
        )
        for subject in SUBJECTS
    },
    "medmcqa_en": (HubSet("openlifescienceai/medmcqa", split="validation"), HubSet("openlifescienceai/medmcqa")),
    "medqa_en": (
        HubSet("GBaker/MedQA-USMLE-4-options-hf", split="test"),
        HubSet("GBaker/MedQA-USMLE-4-options-hf", split="train"),
    ),
    "pubmedqa_en": (
        HubSet("bigbio/pubmed_qa", "refs/convert/parquet", "pubmed_qa_labeled_fold0_source", "test"),
        HubSet("bigbio/pubmed_qa", "refs/convert/parquet", "pubmed_qa_labeled_fold0_source", "train"),
    ),
    **{f"mmlu_{subject}_ar": (HubSet(f"BiMediX/mmlu-{subject}-arabic"), None) for subject in SUBJECTS},
    "medmcqa_ar": (HubSet("BiMediX/medmcqa-arabic"), None),
    "medqa_ar": (HubSet("BiMediX/medqa-test_arabic"), None),
    "pubmedqa_ar": (HubSet("BiMediX/pubmedqa-test_arabic"), None),
    **{f"mmmlu_{subject}_ar": (HubSet("openai/MMMLU", None, "AR_XY", "test"), None) for subject in SUBJECTS},
    **{
        f"htmmlu_{subject}_ar": (HubSet("MBZUAI/human_translated_arabic_mmlu", None, subject, "test"), None)
        for subject in SUBJECTS
    },
    "arabicmmlu_biology_ar": (
        HubSet("MBZUAI/ArabicMMLU", None, "Biology (High School)", "test"),
        HubSet("MBZUAI/ArabicMMLU", None, "Biology (High School)", "dev"),
    ),
}
"""Data sets on the hub (questions, solved examples) by benchmark and language. The paper's authors published theirs in
Arabic under BiMediX/, with the questions in the split `train`."""


@dataclasses.dataclass(frozen=True)
class Documents:
    """The questions of a task.

    Attributes:
      source: the file or data set that they come from.
      excluded: questions that were left out, by reason.
    """

    questions: tuple[Document, ...]
    solved: tuple[Document, ...]
    source: str
    excluded: Mapping[str, int]


def load(benchmark: str, language: str, data: str | None = None, exclude_flagged: bool = False, **_: Any) -> Any:
    """The splits `test` and `fewshot` of a task, for `custom_dataset` in a task file.

    Raises:
      BimedixError: there are no such data, or a row has an unknown layout.
    """
    import datasets

    found = read(benchmark, language, data, exclude_flagged)
    kinds = {name: datasets.Value("string") for name in ("id", "question", "language", "subject", "context")}
    lists = {name: datasets.List(datasets.Value("string")) for name in ("choices", "flags")}
    features = datasets.Features({**kinds, **lists, "answer": datasets.Value("int64")})

    def columns(documents: tuple[Document, ...]) -> Any:
        made = [document.to_dict() for document in documents]
        return datasets.Dataset.from_dict({name: [row[name] for row in made] for name in features}, features=features)

    return datasets.DatasetDict({"test": columns(found.questions), "fewshot": columns(found.solved)})


@functools.lru_cache(maxsize=64)
def read(benchmark: str, language: str, data: str | None = None, exclude_flagged: bool = False) -> Documents:
    """The questions of a benchmark in one language; those without a valid answer are always left out.

    Args:
      data: folders of the data, separated as in PATH; None: those of the environment variable DATA, else the hub.
    """
    data = data or os.environ.get(DATA)
    name = "medarabench" if benchmark == "medarabench_clinical" else benchmark
    if data is None:
        places = HUB.get(f"{name}_{language}")
        if places is None:
            raise BimedixError(f"{benchmark} is not on the hub; put its file into a folder and name that as the data")
        source, solved = places
    else:
        source, solved = local(name, language, [Path(folder).expanduser() for folder in data.split(os.pathsep)])
    try:
        file = documents_of(source, name, language, solved=False)
    except BimedixError as error:
        if isinstance(source, Path):
            raise
        remedy = f"or put {name}_{language}.jsonl into a folder and name that with --data"
        raise BimedixError(f"{error}, {remedy}") from error
    found, lines = file.documents, file.lines
    if name == "medarabench":
        found = list(flagged_copies(found))
    elif isinstance(source, Path):
        warn_repeated(label(source), ((one.id, (one.context, one.question), one.choices) for one in found))
    reasons = collections.Counter[str]()
    first: dict[str, int] = {}
    kept = []
    for document, line in zip(found, lines, strict=True):
        reason = why_excluded(document, benchmark, exclude_flagged)
        if reason is None:
            kept.append(document)
        else:
            reasons[reason] += 1
            first.setdefault(reason, line)
    if not kept:
        shown = [
            f"{count} because {sentence(reason)} (line {first[reason]})" for reason, count in reasons.most_common()
        ]
        why = f"all rows were left out: {'; '.join(shown)}; correct them" if shown else "check its rows"
        raise BimedixError(f"{label(source)} has no question of {benchmark}; {why}")
    examples = () if solved is None else documents_of(solved, name, language, True, file.first).documents
    return Documents(tuple(kept), tuple(examples), label(source), dict(reasons))


def why_excluded(document: Document, benchmark: str, exclude_flagged: bool) -> str | None:
    """Why a question is left out; None keeps it."""
    broken = next((flag for flag in (NO_QUESTION, NO_VALID_OPTION) if flag in document.flags), None)
    if broken is not None:
        return broken
    if len(document.choices) > MOST_CHOICES:
        return f"more_than_{MOST_CHOICES}_choices"
    if benchmark == "medarabench_clinical" and document.subject in NOT_CLINICAL:
        return "not_clinical"
    return document.flags[0] if exclude_flagged and document.flags else None


def sentence(reason: str) -> str:
    """Why a question was left out, in words."""
    known = {
        NO_QUESTION: "there is no question",
        NO_VALID_OPTION: "the answer is none of the choices, or the text of two",
        f"more_than_{MOST_CHOICES}_choices": f"there are more than {MOST_CHOICES} choices",
        "not_clinical": "the specialty is not clinical",
    }
    return known.get(reason, f"it has the flag {reason}")


def flagged_copies(documents: list[Document]) -> Iterator[Document]:
    """The documents, flagged where a question's text occurs with different letters as its answer (`conflicting`), and
    where text and options have occurred before (`duplicate`)."""
    answers: dict[str, set[int]] = {}
    for document in documents:
        answers.setdefault(document.question.strip(), set()).add(document.answer)
    seen = set()
    for document in documents:
        flags = [*document.flags]
        text = document.question.strip()
        if len(answers[text]) > 1:
            flags.append("conflicting")
        copy = (text, document.choices)
        if copy in seen:
            flags.append("duplicate")
        seen.add(copy)
        yield dataclasses.replace(document, flags=tuple(flags))


def label(source: Path | HubSet) -> str:
    """A place for messages and results."""
    if isinstance(source, Path):
        return str(source)
    return f"hf:{source.name}{f'@{source.revision}' if source.revision else ''}#{source.config or ''}/{source.split}"


def local(benchmark: str, language: str, folders: list[Path]) -> tuple[Path, Path | None]:
    """The files of questions and of solved examples. BENCHMARK_LANGUAGE.jsonl comes before PLACES."""
    subject = benchmark.removeprefix("mmlu_")
    family = f"{'mmlu' if benchmark.startswith('mmlu_') else benchmark}_{language}"
    own = tuple(f"{benchmark}_{language}{ending}" for ending in ENDINGS)
    wanted = [*own, *PLACES.get(family, ())]
    source = first_file(folders, wanted)
    if source is None:
        listed = ", ".join(map(str, folders))
        names = ", ".join((own[0], *PLACES.get(family, ())))
        raise BimedixError(f"{listed} has no questions of {benchmark} ({language}); put one of these there: {names}")
    solved = [f"{benchmark}_{language}.fewshot{ending}" for ending in ENDINGS]
    return source, first_file(folders, [*solved, *(name.format(subject=subject) for name in FEWSHOT.get(family, ()))])


def first_file(folders: list[Path], names: list[str]) -> Path | None:
    """The first of these files that is in one of the folders."""
    return next((folder / name for name in names for folder in folders if (folder / name).is_file()), None)


@dataclasses.dataclass(frozen=True)
class File:
    """What `documents_of` found.

    Attributes:
      lines: that of each document.
      first: the number of the first choice; None if no answer is a number.
    """

    documents: list[Document]
    lines: list[int]
    first: int | None


def documents_of(source: Path | HubSet, benchmark: str, language: str, solved: bool, first: int | None = None) -> File:
    """The documents of one place that belong to a benchmark.

    Args:
      first: the number of the first choice, if the numbers of solved examples do not tell.

    Raises:
      BimedixError: a row cannot be read, or the numbers of the answers may count from 0 and from 1.
    """
    subject = benchmark.split("mmlu_", 1)[1] if "mmlu_" in benchmark and "arabic" not in benchmark else None
    found = list(fields_of(source, solved))
    authors = isinstance(source, Path) and source.name.startswith(("dev.json", "train.json"))
    try:
        counted = 1 if authors else first_number(((line, fields) for _, line, _, fields in found), label(source))
    except BimedixError:
        if first is None:
            raise
        counted = first
    documents, lines = [], []
    for where, line, number, fields in found:
        one = document_of(fields, where, counted or 0)
        if subject is not None and one.subject not in (None, subject):
            continue
        own = one.id or f"{benchmark}/{number}"
        if "options" in fields and isinstance(source, Path):  # as the readers of records name these questions
            own = f"{source.parent.name}/{own}"
        changes = {"id": own, "language": one.language or language, "subject": one.subject or subject}
        documents.append(dataclasses.replace(one, **changes))
        lines.append(line)
    return File(documents, lines, counted)


def fields_of(source: Path | HubSet, solved: bool) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """(file and line, line, number of the row, its fields) of one place.

    PubMedQA's questions and solved examples are in one file, whose test set is named by another.
    """
    keyed = isinstance(source, Path) and source.name == "ori_pqal.json"
    tests: dict[str, str] = {}
    if isinstance(source, Path) and keyed:
        tests = read_json(source.with_name("test_ground_truth.json"), dict[str, str], "fetch it again")
    headerless = isinstance(source, Path) and source.name.endswith("_dev.csv")
    for number, row in enumerate(rows(source, keyed=keyed, header=not headerless), start=1):
        where = f"{source if isinstance(source, Path) else row.file}:{row.line}"
        try:
            fields: dict[str, Any] = dict(row.fields())
        except ValueError as error:
            raise BimedixError(f"{where}: {row_problem(error)}; correct the row or remove it") from error
        if keyed:
            if (row.key in tests) == solved:
                continue
            fields["pmid"] = row.key
        if headerless:
            fields = {"question": fields["0"], "choices": [fields[str(n)] for n in range(1, 5)], "answer": fields["5"]}
        yield where, row.line, number, fields
