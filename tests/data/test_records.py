from pathlib import Path

import pytest
from pydantic import ValidationError

from bimedix_jax.data import records
from bimedix_jax.data.records import Record, Turn, conversation
from bimedix_jax.errors import BimedixError


def make(**changes: object) -> Record:
    fields = {
        "id": "a",
        "language": "ar",
        "kind": "qa",
        "source": "test",
        "licence": "Apache-2.0",
        "conversations": conversation("ما هو الربو؟", "مرض مزمن في الشعب الهوائية."),
    }
    return Record.model_validate({**fields, **changes})


def test_the_json_spelling_is_the_papers_and_survives_a_round_trip() -> None:
    record = make()
    line = record.to_json()
    assert '"conversations": [{"from": "human", "value": "ما هو الربو؟"}' in line
    assert records.parse(line, "here") == record


def test_only_a_turn_in_another_language_has_a_language() -> None:
    turns = (Turn(speaker="human", value="Hi", language="en"), Turn(speaker="gpt", value="أهلا"))
    line = make(conversations=turns).to_json()
    assert '{"from": "human", "value": "Hi", "language": "en"}, {"from": "gpt", "value": "أهلا"}' in line
    assert records.parse(line, "here").conversations == turns
    with pytest.raises(ValidationError, match="language"):
        Turn.model_validate({"from": "human", "value": "Salut", "language": "fr"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": conversation("q", "a")[::-1]}, "'human' must speak"),
        ({"conversations": conversation("q", "a", "q2")}, "last turn must be from 'gpt'"),
        ({"conversations": [*conversation("q", "a"), Turn(speaker="system", value="s")]}, "'human' must speak"),
        ({"kind": "mcqa"}, "needs choices and answer"),
        ({"choices": ["a", "b"]}, "must be given together"),
        ({"kind": "mcqa", "choices": ["a", "b"], "answer": 2}, "not an index"),
        ({"kind": "mcqa", "choices": ["a", "b"], "answer": -1}, "not an index"),
        ({"language": "fr"}, "language"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_an_invalid_record_raises(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**changes)


def test_an_empty_turn_raises() -> None:
    with pytest.raises(ValidationError, match="is empty"):
        Turn(speaker="human", value=" \n")


def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(make().to_json() + "\n\n" + '{"id": "b"}\n', encoding="utf-8")
    found = records.read_jsonl(path)
    assert next(found) == make()
    with pytest.raises(BimedixError, match=r"r\.jsonl:3: language: Field required"):
        next(found)


def test_records_round_trip_through_a_file(tmp_path: Path) -> None:
    written = [make(id=str(i)) for i in range(3)]
    assert records.write_jsonl(tmp_path / "r.jsonl", written) == 3
    assert list(records.read_jsonl(tmp_path / "r.jsonl")) == written


def test_the_split_depends_only_on_key_and_seed() -> None:
    first = [records.assign_split(f"r{i}", 0, 0.1) for i in range(4000)]
    assert first == [records.assign_split(f"r{i}", 0, 0.1) for i in range(4000)]
    assert 330 < first.count("heldout") < 470
    assert first != [records.assign_split(f"r{i}", 1, 0.1) for i in range(4000)]


def test_the_question_is_found_without_its_choices() -> None:
    choices = ("Insulin", "Aspirin")
    asked = records.multiple_choice_question("Which lowers glucose?", choices)
    assert asked == "Which lowers glucose?\nA. Insulin\nB. Aspirin"
    answered = records.multiple_choice_answer(choices, 0, "en", "It moves glucose into cells.")
    assert answered == "Answer: A. Insulin\nIt moves glucose into cells."
    record = make(kind="mcqa", choices=choices, answer=0, conversations=conversation(asked, answered))
    assert records.question_of(record) == "Which lowers glucose?"


def test_the_bundled_sample_has_all_languages_kinds_and_splits() -> None:
    everything = list(records.sample())
    assert len(everything) >= 240
    assert len({record.id for record in everything}) == len(everything)
    assert {(record.language, record.kind) for record in everything} == {
        (language, kind) for language in ("en", "ar") for kind in ("qa", "mcqa", "chat")
    }
    by_language = {name: sum(record.language == name for record in everything) for name in ("en", "ar")}
    assert by_language["en"] == 2 * by_language["ar"]
    heldout = list(records.sample("heldout"))
    assert len(heldout) >= 60
    assert len(heldout) + len(list(records.sample("train"))) == len(everything)
    for record in everything:
        if record.choices is not None and record.answer is not None:
            human, gpt = (turn.value for turn in record.conversations)
            assert human.endswith(records.multiple_choice_question("", record.choices)), record.id
            line = gpt.splitlines()[0]
            assert line == records.multiple_choice_answer(record.choices, record.answer, record.language), record.id
