"""Exams with choices, in the formats of their authors and of the hub."""

import json
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.curation.quarantine import Quarantine, WrongSource
from bimedix_jax.curation.readers import read
from bimedix_jax.data.records import Record, question_of
from bimedix_jax.errors import BimedixError

MEDQA: dict[str, Any] = {
    "question": "A 30-year-old has a wheeze. Which drug relieves it fastest?",
    "answer": "Salbutamol",
    "options": {"A": "Salbutamol", "B": "Montelukast", "C": "Omeprazole", "D": "Digoxin"},
    "meta_info": "step2&3",
    "answer_idx": "A",
    "metamap_phrases": ["wheeze"],
}
MEDMCQA = {
    "question": "Vitamin of scurvy is",
    "exp": "Ascorbic acid is needed to hydroxylate proline.",
    "cop": 3,
    "opa": "A",
    "opb": "B1",
    "opc": "C",
    "opd": "D",
    "subject_name": "Biochemistry",
    "topic_name": "Vitamins",
    "id": "e9ad821a",
    "choice_type": "single",
}
ABSTRACT = {
    "QUESTION": "Does it help?",
    "CONTEXTS": ["We asked.", "We found."],
    "LABELS": ["OBJECTIVE", "RESULTS"],
    "MESHES": ["Humans"],
    "LONG_ANSWER": "It does.",
}


def run(source: str) -> tuple[list[Record], Quarantine]:
    quarantine = Quarantine()
    return list(read(source, quarantine)), quarantine


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    files.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_medqa_splits_follow_the_file_name(tmp_path: Path) -> None:
    lines(tmp_path / "phrases_no_exclude_train.jsonl", MEDQA, {**MEDQA, "answer_idx": "B"}, {**MEDQA, "options": None})
    lines(tmp_path / "phrases_no_exclude_test.jsonl", MEDQA)
    records, quarantine = run(f"medqa={tmp_path}")
    assert [(record.id.rpartition("-")[0], record.split) for record in records] == [
        ("medqa/phrases_no_exclude_test/1", "heldout"),
        ("medqa/phrases_no_exclude_train/1", "train"),
    ]
    assert (records[0].answer, records[0].provenance) == (0, {"meta_info": "step2&3"})
    assert [row.line for row in quarantine.rejected] == [2, 3]
    assert run(f"medqa={tmp_path / 'phrases_no_exclude_test.jsonl'}?split=train")[0][0].split == "train"


def test_medqa_options_may_be_a_list_or_have_gaps(tmp_path: Path) -> None:
    listed = [{"key": letter, "value": text} for letter, text in MEDQA["options"].items()]
    gaps = {**MEDQA["options"], "E": None}
    path = lines(tmp_path / "train.jsonl", {**MEDQA, "options": listed}, {**MEDQA, "options": gaps})
    assert [len(record.choices or ()) for record in run(f"medqa={path}")[0]] == [4, 4]


def test_medmcqa_answers_count_from_1_in_the_authors_files_and_from_0_elsewhere(tmp_path: Path) -> None:
    authors = lines(tmp_path / "train.json", MEDMCQA)  # published as JSON lines with the ending .json
    hub = parquet(tmp_path / "train-00000-of-00001.parquet", {**MEDMCQA, "cop": 2})
    (one,), (two,) = run(f"medmcqa={authors}")[0], run(f"medmcqa={hub}")[0]
    assert one == two
    assert one.conversations[1].value == "Answer: C. C\nAscorbic acid is needed to hydroxylate proline."
    assert (one.id, one.specialty, one.split) == ("medmcqa/e9ad821a", "Biochemistry", "train")
    assert run(f"medmcqa={authors}?first_option=0")[0][0].answer == 3


@pytest.mark.parametrize(("name", "cop"), [("train.json", 0), ("dev.jsonl", 0)])
def test_medmcqa_stops_if_answers_count_from_another_number(name: str, cop: int, tmp_path: Path) -> None:
    """With a wrong first number every answer would be wrong, so reading stops instead of rejecting one row."""
    with pytest.raises(WrongSource, match="pass first_option=0"):
        run(f"medmcqa={lines(tmp_path / name, MEDMCQA, {**MEDMCQA, 'cop': cop})}")
    with pytest.raises(WrongSource, match="pass first_option=1"):
        run(f"medmcqa={parquet(tmp_path / 'x.parquet', {**MEDMCQA, 'cop': 4})}")


def test_medmcqa_test_questions_have_no_answer_and_are_quarantined(tmp_path: Path) -> None:
    path = lines(tmp_path / "test.json", {**MEDMCQA, "cop": None}, {**MEDMCQA, "opd": ""}, MEDMCQA)
    records, quarantine = run(f"medmcqa={path}")
    assert len(records) == 1
    assert [row.reason.split(";")[0] for row in quarantine.rejected] == [
        "the answer is not published (test questions)",
        "Value error, a choice is empty",
    ]


def test_mmlu_csv_and_hub_rows_by_subject(tmp_path: Path) -> None:
    for part in ("test", "dev"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"anatomy_{part}.csv").write_text('"Which, of these?",a,b,c,d,C\nWhat?,a,b,c,d,E\n')
        (tmp_path / part / f"virology_{part}.csv").write_text("What?,a,b,c,d,A\n")
    records, quarantine = run(f"mmlu={tmp_path}?subjects=anatomy")
    assert [(record.id, record.split, record.specialty) for record in records] == [
        ("mmlu/anatomy/dev/1", "heldout", "anatomy"),
        ("mmlu/anatomy/test/1", "heldout", "anatomy"),
    ]
    assert question_of(records[0]).strip() == "Which, of these?"
    assert [(row.file, row.line) for row in quarantine.rejected] == [
        ("dev/anatomy_dev.csv", 2),
        ("test/anatomy_test.csv", 2),
    ]
    row = {"question": "What?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 3}
    path = parquet(tmp_path / "test-0.parquet", row, {**row, "subject": "virology"})
    (record,) = run(f"mmlu={path}?subjects=anatomy")[0]
    assert (record.answer, record.provenance["subject"]) == (3, "anatomy")


def test_pubmedqa_artificial_in_both_formats(tmp_path: Path) -> None:
    path = tmp_path / "ori_pqaa.json"
    path.write_text(json.dumps({"25429730": {**ABSTRACT, "final_decision": "yes"}, "2": ABSTRACT}, indent=4))
    hub = {
        "pubid": 25429730,
        "question": ABSTRACT["QUESTION"],
        "context": {"contexts": ABSTRACT["CONTEXTS"], "labels": ABSTRACT["LABELS"], "meshes": ABSTRACT["MESHES"]},
        "long_answer": ABSTRACT["LONG_ANSWER"],
        "final_decision": "yes",
    }
    authors, quarantine = run(f"pubmedqa_artificial={path}")
    assert authors == run(f"pubmedqa_artificial={parquet(tmp_path / 'train.parquet', hub)}")[0]
    (record,) = authors
    assert (record.id, record.split, record.answer) == ("pubmedqa_artificial/25429730", "train", 0)
    assert [turn.value for turn in record.conversations] == [
        "Abstract: We asked.\nWe found.\nQuestion: Does it help?",
        "Answer: yes\nIt does.",
    ]
    assert [row.reason for row in quarantine.rejected] == ["field 'final_decision' is missing"]


def test_pubmedqa_unlabelled_has_open_questions(tmp_path: Path) -> None:
    (tmp_path / "ori_pqau.json").write_text(json.dumps({"7": ABSTRACT}))
    (record,) = run(f"pubmedqa_unlabelled={tmp_path}")[0]
    assert (record.kind, record.choices, record.conversations[1].value) == ("qa", None, "It does.")


def test_a_copy_of_pubmedqa_without_the_list_of_test_questions_is_held_out(tmp_path: Path) -> None:
    row = {
        "pubid": 1,
        "question": "Q?",
        "context": {"contexts": ["C."]},
        "long_answer": "L.",
        "final_decision": "maybe",
    }
    (record,) = run(f"pubmedqa={lines(tmp_path / 'train.jsonl', row)}")[0]
    assert (record.split, record.provenance["pmid"]) == ("heldout", "1")
    with pytest.raises(BimedixError, match="write split=train or split=heldout"):
        run(f"pubmedqa_artificial={tmp_path / 'train.jsonl'}?split=test")


@pytest.mark.parametrize(
    ("stated", "question", "choices"),
    [
        ("ar", "Which organ pumps blood?", ["the heart", "the liver"]),
        ("en", "كم عظمة في جسم الإنسان؟", ["٢٠٦", "٣٠٦"]),
    ],
)
def test_a_question_with_choices_in_the_script_of_the_other_language_is_no_record(
    stated: str, question: str, choices: list[str], tmp_path: Path
) -> None:
    """Whatever the words before its answer, which are ours and in the stated language."""
    row = {"question": question, "choices": choices, "answer": "A"}
    path = lines(tmp_path / "own.jsonl", row, row)
    with pytest.raises(WrongSource, match="its language is stated to be"):
        run(f"table={path}?licence=own&question=question&choices=choices&answer=answer&language={stated}")
