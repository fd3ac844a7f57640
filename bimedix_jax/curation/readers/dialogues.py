"""Conversations: MTS-Dialog, ShareGPT and Vicuna (`conversations`), OpenAI (`messages`)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers.rows import Place, Row, build_all, named_file, parse_split, row_id, rows, tidy
from bimedix_jax.curation.readers.tables import parse_language
from bimedix_jax.data.records import Record, Split, Turn

# names of the two sides in exports of ShareGPT
SHAREGPT_SPEAKERS = {
    "system": "system",
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "chatgpt": "gpt",
    "assistant": "gpt",
}
OPENAI_SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}


def mts_dialog(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """MTS-Dialog (Ben Abacha et al. 2023): doctor-patient dialogues (CSV), the training set for training.

    The doctor is `gpt`; patient, relatives and other clinicians are `human`, relatives and clinicians with a label.
    Consecutive lines of one side become one turn. Most dialogues begin with the doctor; they get the opening "Hello,
    doctor." (provenance: `opening`). What the patient says after the doctor's last turn is left out (provenance:
    `unanswered_turns`), since no answer follows.
    """
    parts: dict[str, Split] = {
        "MTS-Dialog-TrainingSet.csv": "train",
        "MTS-Dialog-ValidationSet.csv": "heldout",
        "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv": "heldout",
        "MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv": "heldout",
    }
    for name, split in parts.items():

        def make(row: Row, fields: dict[str, Any], split: Split = split) -> Record:
            return _dialogue_record(row, fields, split)

        yield from build_all("mts_dialog", rows(named_file(folder, name)), quarantine, make)


def sharegpt(
    place: Place,
    quarantine: Quarantine,
    *,
    licence: str,
    source: str = "sharegpt",
    language: str = "en",
    split: str | None = None,
) -> Iterator[Record]:
    """Rows {id, conversations: [{from, value}]}, the format of ShareGPT and Vicuna.

    The system prompt is the first turn, or the field `system` of FastChat. A last turn of the human is left out, as in
    mts_dialog. A conversation that begins with an answer is quarantined.
    """

    def make(row: Row, fields: dict[str, Any]) -> Record:
        turns = [_turn(turn["from"], turn["value"], SHAREGPT_SPEAKERS) for turn in fields["conversations"]]
        if fields.get("system"):
            turns.insert(0, Turn(speaker="system", value=tidy(fields["system"])))
        return _chat(row, fields, turns, source, licence, parse_language(language), parse_split(split, row))

    yield from build_all(source, rows(place), quarantine, make)


def messages(
    place: Place,
    quarantine: Quarantine,
    *,
    licence: str,
    source: str = "messages",
    language: str = "en",
    split: str | None = None,
) -> Iterator[Record]:
    """Rows {messages: [{role, content}]}, the format of OpenAI's fine-tuning files; content is text or parts of text.

    Rows with tool calls, tool results, images or sound are quarantined, since a record cannot represent them.
    """

    def make(row: Row, fields: dict[str, Any]) -> Record:
        turns = []
        for message in fields["messages"]:
            if message.get("tool_calls") or message.get("function_call"):
                raise ValueError("a message calls a tool")
            turns.append(_turn(message["role"], _content(message["content"]), OPENAI_SPEAKERS))
        return _chat(row, fields, turns, source, licence, parse_language(language), parse_split(split, row))

    yield from build_all(source, rows(place), quarantine, make)


def _turn(speaker: object, value: object, speakers: dict[str, str]) -> Turn:
    if not isinstance(speaker, str) or speaker not in speakers:
        raise ValueError(f"{speaker!r} is not a speaker; known are {', '.join(speakers)}")
    return Turn.model_validate({"from": speakers[speaker], "value": tidy(value)})


def _content(content: object) -> str:
    if not isinstance(content, list):
        return tidy(content)
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
        raise ValueError("a message has parts that are not text")
    return "\n".join(tidy(part["text"]) for part in content)


def _chat(
    row: Row, fields: dict[str, Any], turns: list[Turn], source: str, licence: str, language: Any, split: Split | None
) -> Record:
    provenance: dict[str, Any] = {}
    if turns and turns[-1].speaker == "human":
        turns = turns[:-1]
        provenance["unanswered_turns"] = 1
    exchanges = sum(turn.speaker == "gpt" for turn in turns)
    return Record(
        id=row_id(source, row, fields.get("id")),
        language=language,
        kind="chat" if exchanges > 1 else "qa",
        source=source,
        licence=licence,
        split=split,
        conversations=tuple(turns),
        provenance=provenance,
    )


# "Gest_family", "Guest_clinican" and numbered guests occur in the published files
_SPEAKER = re.compile(r'^\s*"?\s*(doctor|patient|gu?est_(?:family|clinici?an)(?:_?\d)?)\s*:\s*(.*)$', re.IGNORECASE)


def _dialogue_record(row: Row, fields: dict[str, Any], split: Split) -> Record:
    turns = _merge_speakers(tidy(fields["dialogue"]))
    provenance: dict[str, Any] = {"file": row.file, "row": fields["ID"], "section": fields["section_header"]}
    if turns and turns[0].speaker == "gpt":
        turns.insert(0, Turn(speaker="human", value="Hello, doctor."))
        provenance["opening"] = "added"
    if turns and turns[-1].speaker == "human":
        turns.pop()
        provenance["unanswered_turns"] = 1
    if not turns:
        raise ValueError("the doctor says nothing")
    return Record(
        id=f"mts_dialog/{row.stem.removeprefix('MTS-Dialog-')}/{fields['ID']}",
        language="en",
        kind="chat",
        source="mts_dialog",
        licence="CC-BY-4.0",
        split=split,
        conversations=tuple(turns),
        provenance=provenance,
    )


def _merge_speakers(dialogue: str) -> list[Turn]:
    """Turns from lines "Doctor: ...". A line without a speaker continues the line before it."""
    sides: list[tuple[str, list[str]]] = []
    for line in dialogue.splitlines():
        if not line.strip():
            continue
        match = _SPEAKER.match(line)
        if match is None:
            if not sides:
                raise ValueError("the first line names no speaker")
            sides[-1][1].append(line.strip())
            continue
        who, text = match[1].lower(), match[2].strip()
        side = "gpt" if who == "doctor" else "human"
        if "family" in who:
            text = f"Family member: {text}"
        elif "clinic" in who:
            text = f"Clinician: {text}"
        if not text:
            continue
        if sides and sides[-1][0] == side:
            sides[-1][1].append(text)
        else:
            sides.append((side, [text]))
    return [Turn.model_validate({"from": side, "value": "\n".join(texts)}) for side, texts in sides]
