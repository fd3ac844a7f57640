"""Questions with choices: MedQA, MedMCQA, MMLU and PubMedQA, in the formats of their authors and of the hub."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bimedix_jax.curation.quarantine import Quarantine, WrongSource
from bimedix_jax.curation.readers import rows as row_files
from bimedix_jax.curation.readers.answers import number_of
from bimedix_jax.curation.readers.choices import choices_of, label_of
from bimedix_jax.curation.readers.reading import Reading
from bimedix_jax.curation.readers.rows import Place, Row, build_all, optional, row_id, rows, said, split_for, tidy
from bimedix_jax.curation.structure import FIXED_CHOICES
from bimedix_jax.data import records
from bimedix_jax.data.records import Record, Split, conversation
from bimedix_jax.errors import BimedixError

DECISIONS = ("yes", "no", "maybe")
ABSTRACT_AND_QUESTION = {"en": ("Abstract", "Question"), "ar": ("الملخص", "السؤال")}


def medqa(place: Place, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """MedQA (Jin et al. 2020): {question, options {A: ...}, answer, answer_idx, meta_info}, four or five options.

    The split is taken from the name of the file or hub split, unless `split` is given.
    """
    how, account = reading or Reading(), quarantine.account

    def make(row: Row, fields: dict[str, Any]) -> Record:
        return _lettered("medqa", "MIT", row, fields, split_for(row, how, account), how)

    yield from build_all("medqa", rows(place, reading=how, account=account), quarantine, make, how)


def medqa_usmle_en(folder: Path, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """MedQA, USMLE, four options: the 1,273 test questions in the layout of MedAgents (`realidx`)."""
    yield from _test_set("medqa_usmle_en", folder, "medqa_4options_test.jsonl", "Apache-2.0", quarantine, reading)


def medmcqa_en(folder: Path, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """MedMCQA (Pal et al. 2022): the validation questions, which the field uses as its test set.

    The authors' file `dev.json` has all 4,183 of them. Without it, the 2,816 single-choice ones in the layout of
    MedAgents are read.
    """
    how = dataclasses.replace(reading or Reading(), split="heldout")
    authors = next((folder / name for name in ("dev.json", "dev.jsonl") if (folder / name).is_file()), None)
    if authors is None:
        yield from _test_set("medmcqa_en", folder, "medmcqa_val2816_single.jsonl", "MIT", quarantine, reading)
    else:
        yield from medmcqa(authors, quarantine, reading=how)


def mmlu_medical_en(folder: Path, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """Six medical subjects of MMLU (Hendrycks et al. 2021): the canonical 1,089 test questions.

    `test/*.csv` of the same folder is an older version (282 instead of 272 questions of professional medicine) and is
    not read.
    """
    yield from _test_set("mmlu_medical_en", folder, "medagents_mmlu_test.jsonl", "MIT", quarantine, reading)


def medmcqa(
    place: Place, quarantine: Quarantine, *, reading: Reading | None = None, first_option: str | None = None
) -> Iterator[Record]:
    """MedMCQA (Pal et al. 2022): {question, opa..opd, cop, exp, subject_name, topic_name, choice_type, id}.

    `cop` counts from 1 in the authors' JSON files and from 0 on the hub and in Parquet files made from it;
    For other copies, set `first_option` (0 or 1). A value that shows a wrong setting stops reading.
    """
    if first_option not in (None, "0", "1"):
        raise BimedixError(f"first_option={first_option} is neither 0 nor 1")
    how, account = reading or Reading(), quarantine.account

    def make(row: Row, fields: dict[str, Any]) -> Record:
        authors = isinstance(place, Path) and row.file.removesuffix(".gz").endswith((".json", ".jsonl"))
        first = int(authors) if first_option is None else int(first_option)
        account.note(f"answers: cop counts from {first} in {row.file}; first_option= decides otherwise")
        number = number_of(fields["cop"])
        if number is None or number == -1:
            raise ValueError("the answer is not published (test questions)")
        answer = number - first
        if answer in (-1, 4):
            raise WrongSource(f"{row.file}:{row.line} has cop {number}: options are counted from {1 - first} in this "
                              f"file; pass first_option={1 - first}")  # fmt: skip
        return multiple_choice(
            f"medmcqa/{fields['id']}" if fields.get("id") else row_id("medmcqa", row),
            "medmcqa",
            "Apache-2.0",
            fields["question"],
            tuple(tidy(fields[name]) for name in ("opa", "opb", "opc", "opd")),
            answer,
            {name: fields[name] for name in ("topic_name", "choice_type") if fields.get(name)},
            split_for(row, how, account),
            how,
            explanation=optional(fields.get("exp")),
            specialty=optional(fields.get("subject_name")) or None,
        )

    yield from build_all("medmcqa", rows(place, reading=how, account=account), quarantine, make, how)


def mmlu(
    place: Place, quarantine: Quarantine, *, reading: Reading | None = None, subjects: str | None = None
) -> Iterator[Record]:
    """MMLU (Hendrycks et al. 2021): `<subject>_<part>.csv` without header, or hub rows {question, subject, choices,
    answer}. All questions are held out unless `split` is given.

    `subjects` selects subjects, separated by commas; rows of other subjects are skipped.
    """
    wanted = None if subjects is None else set(subjects.split(","))
    how, account = reading or Reading(), quarantine.account

    def make(row: Row, fields: dict[str, Any]) -> Record:
        side = split_for(row, how, account, otherwise="heldout")
        if "choices" not in fields:
            subject, _, part = row.stem.rpartition("/")[2].rpartition("_")
            return _mmlu_csv(subject, part, row.line, list(fields.values()), "mmlu", side, how)
        subject = fields["subject"]
        choices, answer = choices_of(fields["choices"]).texts, number_of(fields["answer"])
        if answer is None:
            raise ValueError("the answer is not a number")
        if answer == len(choices):
            raise WrongSource(
                f"{row.file}:{row.line} has answer {answer} of {len(choices)} choices, but MMLU counts from 0; "
                "read this copy with table=, which finds out what they count from"
            )
        return multiple_choice(
            f"mmlu/{subject}/{row.stem.rpartition('/')[2]}/{row.line}",
            "mmlu",
            "MIT",
            fields["question"],
            tuple(tidy(choice) for choice in choices),
            answer,
            {"subject": subject},
            side,
            how,
            specialty=subject,
        )

    def is_wanted(row: Row) -> bool:
        if wanted is None:
            return True
        content = row.content
        subject = row.stem.rpartition("/")[2].rpartition("_")[0]
        if isinstance(content, dict) and "subject" in content:
            subject = content["subject"]
        account.skipped += 0 if subject in wanted else row.lines
        return subject in wanted

    found = filter(is_wanted, rows(place, header=False, reading=how, account=account))
    yield from build_all("mmlu", found, quarantine, make, how)


def mmlu_medical_en_dev(folder: Path, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """The development and validation questions of the six medical subjects (CSV), for few-shot prompts."""
    source = "mmlu_medical_en_dev"
    how = reading or Reading()
    for part in ("dev", "val"):
        paths = sorted((folder / part).glob(f"*_{part}.csv"))
        if not paths:
            raise BimedixError(f"there is no {part}/*_{part}.csv in {folder}; name the folder of the MMLU CSV files")
        for path in paths:
            subject = path.stem.removesuffix(f"_{part}")

            def make(row: Row, fields: dict[str, Any], subject: str = subject, part: str = part) -> Record:
                return _mmlu_csv(subject, part, row.line, list(fields.values()), source, "heldout", how)

            found = rows(path, header=False, account=quarantine.account)
            yield from build_all(source, found, quarantine, make, how)


def pubmedqa(place: Place, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """PubMedQA (Jin et al. 2019), labelled part: abstract and question -> yes, no or maybe, and the long answer.

    In the authors' folder the 500 ids of test_ground_truth.json are `heldout`, the others `train`. In a copy without
    that file (the hub's `pqa_labeled`) all rows are held out, since half of them are the test set.
    """
    how, account = reading or Reading(), quarantine.account
    test: dict[str, Any] = {}
    authors = isinstance(place, Path) and place.is_dir() and (place / "ori_pqal.json").is_file()
    if isinstance(place, Path) and authors:
        test = _ground_truth(place)
        place = place / "ori_pqal.json"

    def make(row: Row, fields: dict[str, Any]) -> Record:
        pmid = _pmid(row, fields)
        decision = _field(fields, "final_decision")
        if pmid in test and test[pmid] != decision:
            raise ValueError(f"final_decision is {decision!r}, but {test[pmid]!r} in the ground truth")
        side: Split = "train" if authors and pmid not in test else "heldout"
        return _abstract("pubmedqa", row, fields, how.split or side, how)

    yield from build_all("pubmedqa", rows(place, keyed=True, reading=how, account=account), quarantine, make, how)


def pubmedqa_artificial(place: Place, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """PubMedQA, artificial part (211,269 rows): questions made from titles, decisions made by rule; for training."""

    how = reading or Reading()

    def make(row: Row, fields: dict[str, Any]) -> Record:
        return _abstract("pubmedqa_artificial", row, fields, how.split or "train", how)

    found = rows(place, keyed=True, reading=how, account=quarantine.account)
    yield from build_all("pubmedqa_artificial", found, quarantine, make, how)


def pubmedqa_unlabelled(place: Place, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """PubMedQA, unlabelled part (61,249 rows): only the long answer, without a decision; for training."""

    how = reading or Reading()

    def make(row: Row, fields: dict[str, Any]) -> Record:
        return _abstract("pubmedqa_unlabelled", row, fields, how.split or "train", how, decided=False)

    found = rows(place, keyed=True, reading=how, account=quarantine.account)
    yield from build_all("pubmedqa_unlabelled", found, quarantine, make, how)


def multiple_choice(
    name: str,
    source: str,
    licence: str,
    question: object,
    choices: tuple[str, ...],
    answer: int,
    provenance: dict[str, Any],
    split: Split | None,
    how: Reading,
    explanation: str = "",
    specialty: str | None = None,
    instruction: str = "",
) -> Record:
    """A record of a question with lettered choices. `instruction` is put before the question."""
    asked = said(question)
    language = how.spoken_in_exam(asked, choices)
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} is not one of {len(choices)} choices")
    human = records.multiple_choice_question(f"{instruction}\n{asked}" if instruction else asked, choices)
    return Record(
        id=name,
        language=language,
        kind="mcqa",
        source=source,
        licence=licence,
        specialty=specialty,
        split=split,
        conversations=conversation(human, records.multiple_choice_answer(choices, answer, language, explanation)),
        choices=choices,
        answer=answer,
        provenance={**provenance, "question": asked} if instruction else provenance,
    )


def _test_set(
    source: str, folder: Path, name: str, licence: str, quarantine: Quarantine, reading: Reading | None
) -> Iterator[Record]:
    """One JSONL file of test questions in the layout of MedAgents. All records are held out."""
    how = reading or Reading()
    path = row_files.named_file(folder, name)

    def make(row: Row, fields: dict[str, Any]) -> Record:
        return _lettered(source, licence, row, fields, "heldout", how, {"part": "test", "row": fields["realidx"]})

    yield from build_all(source, rows(path, account=quarantine.account), quarantine, make, how)


def _lettered(
    source: str,
    licence: str,
    row: Row,
    fields: dict[str, Any],
    split: Split | None,
    how: Reading,
    provenance: dict[str, Any] | None = None,
) -> Record:
    """A row {question, options, answer, answer_idx}. Options have labels, in any form of readers/choices.py."""
    options = choices_of(fields["options"])
    label, texts = label_of(fields["answer_idx"]), tuple(tidy(text) for text in options.texts)
    if label not in options.labels:
        raise ValueError("answer_idx is not the label of an option")
    if texts[options.labels.index(label)] != said(fields["answer"]):
        raise ValueError("the option that answer_idx names is not the stated answer")
    found = dict(provenance or {})
    for name in ("subject", "meta_info"):
        if fields.get(name):
            found[name] = fields[name]
    own = fields.get("realidx", fields.get("id"))
    subject = f"{fields['subject']}/" if "subject" in fields else ""
    return multiple_choice(
        f"{source}/{subject}{own}" if own is not None else row_id(source, row),
        source,
        licence,
        fields["question"],
        texts,
        options.labels.index(label),
        found,
        split,
        how,
        specialty=fields.get("subject"),
    )


def _mmlu_csv(
    subject: str, part: str, number: int, values: list[str], source: str, split: Split | None, how: Reading
) -> Record:
    """A CSV row without header: question, A, B, C, D, letter."""
    if len(values) != 6:
        raise ValueError(f"{len(values)} columns, expected question, four choices and a letter")
    if values[5] not in tuple("ABCD"):
        raise ValueError(f"answer {values[5]!r} is not one of A, B, C, D")
    return multiple_choice(
        f"{source.removesuffix('_dev')}/{subject}/{part}/{number}",
        source,
        "MIT",
        values[0],
        tuple(tidy(choice) for choice in values[1:5]),
        "ABCD".index(values[5]),
        {"part": part, "row": number, "subject": subject},
        split,
        how,
        specialty=subject,
    )


def _abstract(
    source: str, row: Row, fields: dict[str, Any], split: Split | None, how: Reading, decided: bool = True
) -> Record:
    """A row of PubMedQA in the authors' spelling (QUESTION, CONTEXTS) or the hub's (question, context.contexts)."""
    decision = _field(fields, "final_decision") if decided else None
    if decided and decision not in DECISIONS:
        raise ValueError(f"final_decision is {decision!r}")
    contexts = fields["CONTEXTS"] if "CONTEXTS" in fields else fields["context"]["contexts"]
    abstract = "\n".join(tidy(context) for context in contexts)
    question, long_answer = said(_field(fields, "question")), tidy(how.reply(_field(fields, "long_answer")))
    pmid, language = _pmid(row, fields), how.spoken(question, long_answer)
    choices = DECISIONS if language == "en" else tuple(FIXED_CHOICES[choice] for choice in DECISIONS)
    right = DECISIONS.index(str(decision)) if decided else None
    told = long_answer if right is None else f"{records.ANSWER_PREFIX[language]}{choices[right]}\n{long_answer}"
    about, asked = ABSTRACT_AND_QUESTION[language]
    return Record(
        id=f"{source}/{pmid}",
        language=language,
        kind="qa",
        source=source,
        licence="MIT",
        split=split,
        conversations=conversation(f"{about}: {abstract}\n{asked}: {question}", told),
        choices=choices if decided else None,
        answer=right,
        provenance={"pmid": pmid, "question": question},
    )


def _field(fields: dict[str, Any], name: str) -> Any:
    """A field whose name is in capitals in the authors' files (except final_decision) and in lower case on the hub."""
    return fields[name.upper()] if name.upper() in fields else fields[name]


def _pmid(row: Row, fields: dict[str, Any]) -> str:
    return row.key if row.key is not None else str(fields["pubid"])


def _ground_truth(folder: Path) -> dict[str, Any]:
    """The decisions of the official test set. Every test id must have a row."""
    truth = {row.key: row.content for row in rows(row_files.named_file(folder, "test_ground_truth.json"), keyed=True)}
    known = {row.key for row in rows(folder / "ori_pqal.json", keyed=True)}
    missing = sorted(str(pmid) for pmid in truth.keys() - known)
    if missing:
        raise BimedixError(
            f"{len(missing)} test ids of {folder} have no row in ori_pqal.json ({missing[0]}); fetch both again"
        )
    return {str(pmid): decision for pmid, decision in truth.items()}
