"""Overlap compares answers with answers; questions are ignored."""

import json

import pytest

from bimedix_jax.cli import main
from bimedix_jax.curation.overlap import overlap
from bimedix_jax.data.records import Record, conversation

LONG = "one two three four five six seven eight nine ten"


def record(answer: str, source: str = "a", question: str = "What?") -> Record:
    return Record(
        id=answer[:9] + source,
        language="en",
        kind="qa",
        source=source,
        licence="CC0-1.0",
        conversations=conversation(question, answer),
    )


def test_overlap_is_the_share_of_runs_of_eight_words() -> None:
    """Ten words have three runs. The other answer has the same first eight words, so one run is shared."""
    other = record("One, two: three four five six seven eight. Then something else")
    (row,) = overlap([record(LONG)], [other])
    assert row == {"source": "a", "records": 1, "seen_share": pytest.approx(1 / 3), "mostly_seen": 0.0}
    (row,) = overlap([record(LONG)], [record(LONG), other])
    assert (row["seen_share"], row["mostly_seen"]) == (1.0, 1.0)


def test_questions_and_short_answers_are_ignored() -> None:
    assert overlap([record(LONG)], [record("yes", question=LONG)])[0]["seen_share"] == 0
    assert overlap([record("too short to have a run")], [record(LONG)]) == []


def test_each_source_has_its_own_row() -> None:
    rows = overlap([record(LONG, "b"), record("not at all what the other one of them says", "a")], [record(LONG)])
    assert [(row["source"], row["seen_share"]) for row in rows] == [("a", 0.0), ("b", 1.0)]


def test_data_stats_prints_the_overlap(tmp_path, capsys) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(record(LONG).model_dump_json(by_alias=True) + "\n")
    assert main(["data", "stats", "--sources", str(file), "--against", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overlap"][0]["seen_share"] == 1.0
    assert main(["data", "stats", "--against", str(tmp_path / "none.jsonl")]) == 1
    assert "there is no file" in capsys.readouterr().err
