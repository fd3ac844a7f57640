"""Dialogues that people have: the doctor first, names in one text, several turns of one side, and marks of turns."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.curation.quarantine import Quarantine, WrongSource
from bimedix_jax.curation.readers import read
from bimedix_jax.curation.structure import split_record
from bimedix_jax.data.encoding import ChatEncoder, encode_chat
from bimedix_jax.data.records import Record, conversation
from bimedix_jax.data.tokenizer import byte_tokenizer, load_tokenizer
from bimedix_jax.evals.heldout import example_of

HELLO = ("human", "Hello, doctor.")


def run(source: str) -> tuple[list[Record], Quarantine]:
    quarantine = Quarantine()
    return list(read(source, quarantine)), quarantine


def turns(record: Record) -> list[tuple[str, str]]:
    return [(turn.speaker, turn.value) for turn in record.conversations]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def messages(*said: tuple[str, str], **marks: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **marks} for role, content in said]}


VISIT = [("human", "My knee hurts."), ("gpt", "Since when?"), ("human", "Since Monday."), ("gpt", "Rest it.")]


@pytest.mark.parametrize(
    "text",
    [
        "Patient: My knee hurts.\nDoctor: Since when?\nPatient: Since Monday.\nDoctor: Rest it.",
        "[patient] My knee hurts.\n[doctor] Since when?\n[patient] Since Monday.\n[doctor] Rest it.",
        "[patient] My knee hurts. [doctor] Since when? [patient] Since Monday. [doctor] Rest it.",
        "Patient: My knee hurts. Doctor: Since when? Patient: Since Monday. Doctor: Rest it.",
        "Patient: My knee hurts. Doctor: Since when?\nPatient: Since Monday. Doctor: Rest it.",
        "PATIENT : My knee hurts.\r\n\r\nDOCTOR : Since when?\r\nPt: Since Monday.\r\nDr: Rest it.",
        "**Patient:** My knee hurts.\n**Doctor:** Since when?\n- Patient: Since Monday.\n- Doctor: Rest it.",
        "User: My knee hurts.\nAssistant: Since when?\nUser: Since Monday.\nAssistant: Rest it.",
        "(Patient) My knee hurts.\n<doctor> Since when?\n(Patient) Since Monday.\n<doctor> Rest it.",
        "Patient: My knee hurts.\nDr. Smith: Since when?\nPatient: Since Monday.\nDr. Smith: Rest it.",
    ],
)
def test_names_in_one_text(text: str, tmp_path: Path) -> None:
    (record,) = run(f"dialogue={lines(tmp_path / 'x.jsonl', {'src': text})}?text=src&licence=x")[0]
    assert turns(record) == VISIT
    assert record.kind == "chat"


@pytest.mark.parametrize(
    "text",
    [
        "المريض: ركبتي تؤلمني.\nالطبيب: منذ متى؟\nالمريض: منذ يومين.\nالطبيب: أرح الركبة.",
        "مريض: ركبتي تؤلمني.\nد.: منذ متى؟\nمريض: منذ يومين.\nد.: أرح الركبة.",
        "المريضة : ركبتي تؤلمني.\nد. منذ متى؟\nالمريضة : منذ يومين.\nد. أرح الركبة.",
        "[المريض] ركبتي تؤلمني.\n[الدكتور] منذ متى؟\n[المريض] منذ يومين.\n[الدكتور] أرح الركبة.",
        "المريض: ركبتي تؤلمني. الطبيب: منذ متى؟ المريض: منذ يومين. الطبيب: أرح الركبة.",
        "المريض: ركبتي تؤلمني.\nد. أحمد: منذ متى؟\nالمريض: منذ يومين.\nد. أحمد: أرح الركبة.",
    ],
)
def test_arabic_names_in_one_text(text: str, tmp_path: Path) -> None:
    (record,) = run(f"dialogue={lines(tmp_path / 'x.jsonl', {'src': text})}?text=src&licence=x")[0]
    assert turns(record) == [
        ("human", "ركبتي تؤلمني."), ("gpt", "منذ متى؟"), ("human", "منذ يومين."), ("gpt", "أرح الركبة.")
    ]  # fmt: skip
    assert record.language == "ar"


def test_the_doctor_first_and_several_turns_of_one_side(tmp_path: Path) -> None:
    text = (
        "[doctor] hi , martha .\n[doctor] how are you ?\n[patient] fine .\nreally .\n[doctor] good .\n[patient] bye ."
    )
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [{"src": text, "tgt": "note"}]}))
    source = f"dialogue={path}?text=src&licence=x"
    (record,) = run(source)[0]
    assert turns(record) == [
        HELLO, ("gpt", "hi , martha .\nhow are you ?"), ("human", "fine .\nreally ."), ("gpt", "good .")
    ]  # fmt: skip
    assert record.provenance == {"joined_turns": 1, "opening": "added", "unanswered_turns": 1}
    assert turns(run(f"{source}&opening=drop&join=space")[0][0]) == [("human", "fine .\nreally ."), ("gpt", "good .")]
    assert turns(run(f"{source}&opening=Hi.&join=blank")[0][0])[:2] == [
        ("human", "Hi."), ("gpt", "hi , martha .\n\nhow are you ?")
    ]  # fmt: skip
    for option, way in (("opening=refuse", "opening=add"), ("join=refuse", "join=line")):
        with pytest.raises(WrongSource, match=way):
            run(f"{source}&{option}")
    (arabic,) = run(f"dialogue={lines(tmp_path / 'a.jsonl', {'t': 'الطبيب: مرحبًا، كيف حالك؟'})}?text=t&licence=x")[0]
    assert turns(arabic)[0] == ("human", "مرحبًا دكتور.")


def test_other_names_have_the_side_that_is_stated(tmp_path: Path) -> None:
    text = "Mother: He coughs.\nNurse Kelly: Since when?\nMother: Two days.\nNurse Kelly: I see."
    path = lines(tmp_path / "x.jsonl", {"t": text}, {"t": "Mother: He coughs.\nDoctor: I see."})
    with pytest.raises(WrongSource, match="'mother' speaks, whose side is not known; speakers= names it"):
        run(f"dialogue={path}?text=t&licence=x")
    records, _ = run(f"dialogue={path}?text=t&licence=x&speakers=Mother:human,nurse kelly:gpt")
    assert [side for side, _ in turns(records[0])] == ["human", "gpt"] * 2
    for wrong in ("mother", "mother:nobody", ":gpt"):
        with pytest.raises(WrongSource, match="not of the form name:side"):
            run(f"dialogue={path}?text=t&licence=x&speakers={wrong}")
    unknown = lines(tmp_path / "y.jsonl", {"t": "Doctor: Hi.\nNurse: Take it.\nPatient: ok\nDoctor: Bye."}, {"t": text})
    with pytest.raises(WrongSource, match="speakers= names it"):
        run(f"dialogue={unknown}?text=t&licence=x")


def test_words_before_a_colon_are_no_speakers(tmp_path: Path) -> None:
    text = "Patient: I saw the doctor: he said rest.\nNote: it hurts.\nDoctor: Take this: aspirin.\nDose: one a day."
    (record,) = run(f"dialogue={lines(tmp_path / 'x.jsonl', {'t': text})}?text=t&licence=x")[0]
    assert turns(record) == [
        ("human", "I saw the doctor: he said rest.\nNote: it hurts."), ("gpt", "Take this: aspirin.\nDose: one a day.")
    ]  # fmt: skip


def test_a_dialogue_may_be_a_list_or_a_column_of_a_csv_file(tmp_path: Path) -> None:
    said = [f"{'patient' if side == 'human' else 'doctor'}: {text}" for side, text in VISIT]
    parts = [{"speaker": "Patient" if side == "human" else "Doctor", "text": text} for side, text in VISIT]
    for value in (said, parts):
        (record,) = run(f"dialogue={lines(tmp_path / 'x.jsonl', {'utterances': value})}?text=utterances&licence=x")[0]
        assert turns(record) == VISIT
    (tmp_path / "x.csv").write_text('"1","' + "\n".join(said) + '"\n')
    (record,) = run(f"dialogue={tmp_path / 'x.csv'}?text=1&licence=x&header=no")[0]
    assert turns(record) == VISIT


def test_messages_in_a_cell_of_a_table(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi, doctor"}, {"role": "assistant", "content": 'Hello, "friend"'}]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["id", "messages"], ["nan", json.dumps(said)], ["", "[1]"], ["7", json.dumps(said)]]
        )
    records, quarantine = run(f"messages={tmp_path / 'x.csv'}?licence=x")
    assert turns(records[0]) == [("human", "Hi, doctor"), ("gpt", 'Hello, "friend"')]
    assert len({record.id for record in records}) == 2
    assert [row.reason for row in quarantine.rejected] == ["messages is not a list of messages"]


def test_chats_with_the_doctor_first_or_several_turns_of_one_side(tmp_path: Path) -> None:
    first = messages(("doctor", "Hello."), ("patient", "Hi."), ("doctor", "What is wrong?"))
    twice = messages(("user", "Hi."), ("user", "My knee."), ("assistant", "I see."), ("assistant", "Rest."))
    path = lines(tmp_path / "x.jsonl", first, twice, messages(("user", "Hi."), ("assistant", "Hello.")))
    for reader in ("messages", "sharegpt"):
        records, quarantine = run(f"{reader}={path}?licence=x")
        assert len(records) == 1
        assert [row.reason for row in quarantine.rejected] == [
            "turn 1 is from 'gpt', but 'human' must speak next; opening=add or opening=drop reads such rows",
            "turn 2 is from 'human', but 'gpt' must speak next; join=line reads such rows",
        ]
        records, _ = run(f"{reader}={path}?licence=x&opening=add&join=space")
        assert turns(records[0])[0] == HELLO
        assert turns(records[1]) == [("human", "Hi. My knee."), ("gpt", "I see. Rest.")]


def test_turns_under_either_name_with_either_spelling(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    told = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    for key in ("messages", "conversations", "dialogue"):
        for value in (said, told):
            path = lines(tmp_path / "x.jsonl", {key: value})
            for reader in ("messages", "sharegpt"):
                assert turns(run(f"{reader}={path}?licence=x")[0][0]) == [("human", "Hi"), ("gpt", "Hello")]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0, "train": True}, {"loss": False}])
def test_a_turn_that_is_not_to_be_learned_keeps_its_mark(mark: dict[str, Any], tmp_path: Path) -> None:
    row = messages(("user", "What dose?"), ("assistant", "WRONG DOSE"), ("user", "Sure?"), ("assistant", "No."))
    row["messages"][1] |= mark
    row["messages"][3] |= dict.fromkeys(mark, 1)
    for reader in ("messages", "sharegpt"):
        (record,) = run(f"{reader}={lines(tmp_path / 'x.jsonl', row)}?licence=x")[0]
        assert [turn.learned for turn in record.conversations] == [True, False, True, True]
        assert Record.model_validate_json(record.to_json()) == record
        assert json.loads(record.to_json())["conversations"][1]["learned"] is False
        assert "learned" not in json.loads(record.to_json())["conversations"][3]


def test_a_mark_reaches_the_loss_mask_and_translations(tmp_path: Path) -> None:
    row = messages(("user", "What dose?"), ("assistant", "WRONG DOSE"), ("user", "Sure?"), ("assistant", "No."))
    row["messages"][1]["weight"] = 0
    (record,) = run(f"messages={lines(tmp_path / 'x.jsonl', row)}?licence=x")[0]
    byte_tokenizer(tmp_path / "bytes")
    tokenizer = load_tokenizer(tmp_path / "bytes")
    ids, mask = encode_chat(tokenizer, record.conversations)
    learned = [token for token, is_learned in zip(ids, mask, strict=True) if is_learned]
    (alone, alone_mask) = encode_chat(tokenizer, conversation("Sure?", "No."))
    assert learned == [token for token, is_learned in zip(alone, alone_mask, strict=True) if is_learned]
    tokens, fast = ChatEncoder(tokenizer).encode(record.conversations)
    assert (tokens.tolist(), fast.tolist()) == (ids, mask)
    assert example_of(record, tokenizer).text_bytes == len("No.")
    frame = split_record(record)
    arabic = frame.rebuild({segment.id: "نص" for segment in frame.segments}, {})
    assert [turn.learned for turn in arabic.conversations] == [True, False, True, True]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": 0}, "Value error, no answer is to be learned"),
        ({"weight": 0.5}, "weight of a message is neither 0 nor 1"),
        ({"mask": 1}, "a message has the key 'mask', whose meaning is not known"),
        ({"content": "nan"}, "a text is missing"),
        ({"content": "N/A"}, "a text is missing"),
        ({"content": ""}, "a turn is empty"),
    ],
)
def test_what_cannot_be_learned_or_understood_is_left_out(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good = messages(("user", "What dose?"), ("assistant", "One."))
    row = json.loads(json.dumps(good))
    row["messages"][1] |= change
    records, quarantine = run(f"messages={lines(tmp_path / 'x.jsonl', row, good)}?licence=x")
    assert len(records) == 1
    assert [row.reason for row in quarantine.rejected] == [reason]


def test_keys_without_a_value_and_of_no_consequence_are_ignored(tmp_path: Path) -> None:
    row = messages(("user", "What dose?"), ("assistant", "One."), name="n", tool_calls=None, mask=None, timestamp=1)
    assert len(run(f"messages={lines(tmp_path / 'x.jsonl', row)}?licence=x")[0]) == 1


def test_turns_with_different_marks_are_not_joined(tmp_path: Path) -> None:
    row = messages(("user", "What dose?"), ("assistant", "WRONG."), ("assistant", "One."))
    row["messages"][1]["weight"] = 0
    good = messages(("user", "What dose?"), ("assistant", "One."))
    records, quarantine = run(f"messages={lines(tmp_path / 'x.jsonl', row, good)}?licence=x&join=line")
    assert len(records) == 1
    assert "some are to be learned and some are not" in quarantine.rejected[0].reason


def test_a_patient_may_answer_none(tmp_path: Path) -> None:
    row = messages(("user", "Hi."), ("assistant", "Any allergies?"), ("user", "None"), ("assistant", "Good."))
    assert len(run(f"messages={lines(tmp_path / 'x.jsonl', row)}?licence=x")[0]) == 1
