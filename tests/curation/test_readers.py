import csv
import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import READERS, read
from bimedix_jax.data.records import Record, conversation
from bimedix_jax.errors import BimedixError

MULTIPLE_CHOICE = {
    "question": "Which  vitamin prevents scurvy? ",
    "options": {"A": "Vitamin A", "B": "Vitamin C"},
    "answer_idx": "B",
    "answer": "Vitamin C",
    "realidx": 7,
}


def run(source: str) -> tuple[list[Record], Quarantine]:
    quarantine = Quarantine()
    return list(read(source, quarantine)), quarantine


def write_lines(path: Path, *rows: object) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_medquad_groups_by_condition_and_gives_reasons_for_rejections(tmp_path: Path) -> None:
    row = {"id": "1", "source": "NIH", "url": "u", "focus": "Gout ", "qtype": "causes"}
    rows = [
        {**row, "question": "What causes Gout ?", "answer": "Uric  acid crystals."},
        {**row, "question": "Is gout common ?", "answer": " "},
        {**row, "question": "What is gout ?"},
    ]
    with gzip.open(tmp_path / "medquad_answered.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    records, quarantine = run(f"medquad={tmp_path}")
    assert [turn.value for turn in records[0].conversations] == ["What causes Gout?", "Uric acid crystals."]
    assert (records[0].id, records[0].provenance["group"], len(records)) == ("medquad/NIH/1/1", "gout", 1)
    assert [(row.file, row.line) for row in quarantine.rejected] == [
        ("medquad_answered.jsonl.gz", line) for line in (2, 3, 4)
    ]
    reasons = [row.reason for row in quarantine.rejected]
    assert "is empty" in reasons[0]
    assert reasons[1] == "field 'answer' is missing"
    assert "property name" in reasons[2]
    assert quarantine.read["medquad"] == 4


def write_dialogues(folder: Path, *dialogues: str) -> None:
    names = ["TrainingSet", "ValidationSet", "TestSet-1-MEDIQA-Chat-2023", "TestSet-2-MEDIQA-Sum-2023"]
    for name, rows in zip(names, [dialogues, [], [], ["Patient: Hi.\nDoctor: Hello."]], strict=True):
        with (folder / f"MTS-Dialog-{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["ID", "section_header", "section_text", "dialogue"])
            writer.writerows([index, "CC", "note", dialogue] for index, dialogue in enumerate(rows))


def test_dialogues_become_alternating_turns(tmp_path: Path) -> None:
    write_dialogues(
        tmp_path,
        "Doctor: Hello.\r\nDoctor: What is wrong?\r\nPatient: My knee.\r\nGuest_family_1: He fell.\r\n"
        "yesterday\r\nDoctor: I see.\r\nPatient: Thanks.",
        "Patient: Hm.\nGuest_clinician: Hm?",
        "no speaker\nDoctor: Hello.",
    )
    records, quarantine = run(f"mts_dialog={tmp_path}")
    assert [(turn.speaker, turn.value) for turn in records[0].conversations] == [
        ("human", "Hello, doctor."),
        ("gpt", "Hello.\nWhat is wrong?"),
        ("human", "My knee.\nFamily member: He fell.\nyesterday"),
        ("gpt", "I see."),
    ]
    assert records[0].provenance == {
        "file": "MTS-Dialog-TrainingSet.csv",
        "row": "0",
        "section": "CC",
        "opening": "added",
        "unanswered_turns": 1,
    }
    assert [record.split for record in records] == ["train", "heldout"]
    assert [row.reason for row in quarantine.rejected] == ["the doctor says nothing", "the first line names no speaker"]
    assert [row.line for row in quarantine.rejected] == [10, 12]


def test_invalid_utf8_is_quarantined_not_replaced(tmp_path: Path) -> None:
    write_dialogues(tmp_path, "Patient: My knee.\nDoctor: XX")
    path = tmp_path / "MTS-Dialog-TrainingSet.csv"
    path.write_bytes(path.read_bytes().replace(b"XX", b"\xe9t\xe9"))
    records, quarantine = run(f"mts_dialog={tmp_path}")
    assert len(records) == 1
    assert "a text is not valid UTF-8" in quarantine.rejected[0].reason
    assert "can't encode" in quarantine.rejected[0].detail


def test_pubmedqa_test_ids_are_held_out(tmp_path: Path) -> None:
    row = {"QUESTION": "Does it help?", "CONTEXTS": ["One.", "Two."], "LONG_ANSWER": "It does."}
    rows = {
        "1": {**row, "final_decision": "yes"},
        "2": {**row, "final_decision": "no"},
        "3": {**row, "final_decision": "?"},
    }
    (tmp_path / "ori_pqal.json").write_text(json.dumps(rows))
    (tmp_path / "test_ground_truth.json").write_text(json.dumps({"2": "no"}))
    records, quarantine = run(f"pubmedqa={tmp_path}")
    assert [(record.id, record.split, record.answer) for record in records] == [
        ("pubmedqa/1", "train", 0),
        ("pubmedqa/2", "heldout", 1),
    ]
    human, gpt = (turn.value for turn in records[0].conversations)
    assert human == "Abstract: One.\nTwo.\nQuestion: Does it help?"
    assert gpt == "Answer: yes\nIt does."
    assert [(row.reason, row.detail) for row in quarantine.rejected] == [
        ("final_decision is …", "final_decision is '?'")
    ]
    (tmp_path / "test_ground_truth.json").write_text(json.dumps({"9": "no"}))
    with pytest.raises(BimedixError, match="1 test ids"):
        run(f"pubmedqa={tmp_path}")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("medqa_usmle_en", "medqa_4options_test.jsonl"),
        ("medmcqa_en", "medmcqa_val2816_single.jsonl"),
        ("mmlu_medical_en", "medagents_mmlu_test.jsonl"),
    ],
)
def test_multiple_choice_rows_are_checked_and_held_out(name: str, file: str, tmp_path: Path) -> None:
    write_lines(
        tmp_path / file,
        MULTIPLE_CHOICE,
        {**MULTIPLE_CHOICE, "answer_idx": "A"},
        {**MULTIPLE_CHOICE, "options": {"B": "x", "A": "y"}},
    )
    records, quarantine = run(f"{name}={tmp_path}")
    assert len(records) == 1
    assert (records[0].split, records[0].answer, records[0].provenance["part"]) == ("heldout", 1, "test")
    human, gpt = (turn.value for turn in records[0].conversations)
    assert human == "Which vitamin prevents scurvy?\nA. Vitamin A\nB. Vitamin C"
    assert gpt == "Answer: B. Vitamin C"
    assert [row.line for row in quarantine.rejected] == [2, 3]


def test_mmlu_csv_rows_have_six_columns_and_a_letter(tmp_path: Path) -> None:
    for part in ("dev", "val"):
        (tmp_path / part).mkdir()
        rows = 'What?,"a, or b",b,c,d,C\nWhat?,a,b,c,d\nWhat?,a,b,c,d,E\n'
        (tmp_path / part / f"anatomy_{part}.csv").write_text(rows)
    records, quarantine = run(f"mmlu_medical_en_dev={tmp_path}")
    assert [record.id for record in records] == [f"mmlu_medical_en/anatomy/{part}/1" for part in ("dev", "val")]
    assert records[0].choices == ("a, or b", "b", "c", "d")
    assert len(quarantine.rejected) == 4


def test_tico19_gives_both_languages_of_a_pair(tmp_path: Path) -> None:
    """From rows and from the authors' TSV; with the pair and the document, which a split keeps together."""
    texts = {"en": "Wash your hands.", "ar": "اغسل يديك."}
    rows = [{"id": "wiki_9:12", "source": "https://example.org/a", **texts}, {"id": "12", **texts}, {"id": "a:1"}]
    write_lines(tmp_path / "rows.jsonl", *rows, "{broken")
    records, quarantine = run(f"tico19={tmp_path / 'rows.jsonl'}")
    assert [(record.id, record.language) for record in records] == [
        ("tico19/wiki_9:12/en", "en"),
        ("tico19/wiki_9:12/ar", "ar"),
    ]
    assert [record.conversations[-1].value for record in records] == list(texts.values())
    about = {"pair": "wiki_9:12", "document": "wiki_9", "group": "wiki_9", "url": "https://example.org/a"}
    assert records[0].provenance == records[1].provenance == about
    assert [row.line for row in quarantine.rejected] == [2, 2, 3, 3, 4, 4]
    assert "does not name a document" in quarantine.rejected[0].reason
    head = "sourceLang\ttargetLang\tsourceString\ttargetString\tstringID\turl\tlicense\ttranslatorId\n"
    line = "en\tar\tWash your hands.\tاغسل يديك.\twiki_9:12\thttps://example.org/a\tpublic\t7\n"
    (tmp_path / "test.en-ar.tsv").write_text(head + line, "utf-8")
    again, _ = run(f"tico19={tmp_path / 'test.en-ar.tsv'}")
    assert [record.model_copy(update={"split": None}) for record in again] == records
    assert {record.split for record in again} == {"heldout"}  # from the name of the file
    assert [record.language for record in run(f"tico19={tmp_path / 'rows.jsonl'}?language=ar")[0]] == ["ar"]


def test_record_files_and_the_sample_are_sources(tmp_path: Path) -> None:
    record = Record(id="a", language="en", kind="qa", source="s", licence="l", conversations=conversation("q", "a"))
    write_lines(tmp_path / "r.jsonl", record.to_json(), "{}")
    records, quarantine = run(str(tmp_path / "r.jsonl"))
    assert records == [record]
    assert quarantine.rejected[0].line == 2
    assert len(run("sample")[0]) >= 240


@pytest.mark.parametrize("source", ["nothing=x", "medquad", "medquad=/does/not/exist", "sample=x", "medquad=."])
def test_unreadable_sources_raise_with_the_reason(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BimedixError):
        run(source)


# readers whose formats are tested in the other files test_readers_*.py
ELSEWHERE = {
    "test_readers_exams.py": ["medqa", "medmcqa", "mmlu", "pubmedqa_artificial", "pubmedqa_unlabelled"],
    "test_readers_texts.py": ["liveqa", "medicationqa", "chatdoctor", "pmc_llama", "sharegpt", "messages", "table"],
    "test_readers_dialogues.py": ["dialogue"],
}

PUBLISHED = {
    "medquad": ("medquad", 16407, 0),
    "mts_dialog": ("mts_dialog", 1699, 2),
    "pubmedqa": ("pubmedqa", 1000, 0),
    "medqa_usmle_en": ("medqa_usmle_en", 1273, 0),
    "medmcqa_en": ("medmcqa_en", 2816, 0),
    "mmlu_medical_en": ("mmlu_medical_en", 1089, 0),
    "mmlu_medical_en_dev": ("mmlu_medical_en", 153, 0),
    "tico19": ("tico19_en_ar/tico19_en_ar.jsonl", 6142, 0),
}


@pytest.mark.skipif("BIMEDIX_DATA" not in os.environ, reason="BIMEDIX_DATA names no folder of published data")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_data_is_read_completely(name: str) -> None:
    folder, count, rejected = PUBLISHED[name]
    quarantine = Quarantine()
    records: Iterator[Record] = read(f"{name}={Path(os.environ['BIMEDIX_DATA']) / folder}", quarantine)
    ids = {record.id for record in records}
    assert (len(ids), len(quarantine.rejected)) == (count, rejected)


def test_every_reader_is_tested() -> None:
    assert set(READERS) == {*PUBLISHED, "sample", "records", *itertools.chain(*ELSEWHERE.values())}
    for name, readers in ELSEWHERE.items():
        text = (Path(__file__).parent / name).read_text("utf-8")
        assert not [reader for reader in readers if f'"{reader}' not in text and f"{reader}=" not in text]
