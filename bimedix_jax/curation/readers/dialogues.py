"""Conversations: MTS-Dialog, ShareGPT and Vicuna (`conversations`), OpenAI (`messages`), transcripts in one text."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import turns
from bimedix_jax.curation.readers.reading import Reading
from bimedix_jax.curation.readers.rows import (
    Place,
    Row,
    build_all,
    is_yes,
    named_file,
    row_id,
    rows,
    said,
    split_for,
)
from bimedix_jax.curation.readers.texts import is_missing
from bimedix_jax.curation.readers.transcripts import SPEAKERS, transcript
from bimedix_jax.curation.readers.turns import Said, Side, Style
from bimedix_jax.data.records import Record, Split, Turn

# names of the two sides in exports of ShareGPT, in OpenAI's files and in data sets of consultations
CHAT_SPEAKERS: Mapping[str, Side] = {**SPEAKERS, "developer": "system"}
CONVERSATIONS = ("conversations", "messages", "conversation", "dialogue", "dialog", "turns")
"""Keys of a row that hold its turns; the key after which the reader is named comes first."""


def mts_dialog(folder: Path, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """MTS-Dialog (Ben Abacha et al. 2023): doctor-patient dialogues (CSV), the training set for training.

    The doctor is `gpt`; patient, relatives and other clinicians are `human`, relatives and clinicians with a label.
    Consecutive lines of one side become one turn. Most dialogues begin with the doctor; they get the opening "Hello,
    doctor." (provenance: `opening`). What the patient says after the doctor's last turn is left out (provenance:
    `unanswered_turns`), since no answer follows.
    """
    how = reading or Reading()
    parts: dict[str, Split] = {
        "MTS-Dialog-TrainingSet.csv": "train",
        "MTS-Dialog-ValidationSet.csv": "heldout",
        "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv": "heldout",
        "MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv": "heldout",
    }
    for name, split in parts.items():

        def make(row: Row, fields: dict[str, Any], split: Split = split) -> Record:
            return _dialogue_record(row, fields, split, how)

        found = rows(named_file(folder, name), account=quarantine.account)
        yield from build_all("mts_dialog", found, quarantine, make, how)


def sharegpt(
    place: Place,
    quarantine: Quarantine,
    *,
    licence: str,
    source: str = "sharegpt",
    speakers: str | None = None,
    opening: str | None = None,
    join: str | None = None,
    reading: Reading | None = None,
) -> Iterator[Record]:
    """Rows {id, conversations: [{from, value}]}, the format of ShareGPT and Vicuna.

    The system prompt is the first turn, or the field `system` of FastChat. A last turn of the human is left out, as in
    mts_dialog. A conversation that begins with an answer, or in which a side has several turns in a row, is quarantined
    unless `opening` and `join` say what happens (readers/turns.py). `weight: 0` and `train: false` of a turn are kept:
    it is not learned.
    """
    style = turns.parse_style(CHAT_SPEAKERS, speakers, opening, join)

    def parts_of(fields: dict[str, Any]) -> list[Said]:
        found = _messages(fields, "conversations", style)
        if fields.get("system"):
            found.insert(0, Said("system", said(fields["system"])))
        return found

    yield from _chats(place, quarantine, source, licence, parts_of, style, reading)


def messages(
    place: Place,
    quarantine: Quarantine,
    *,
    licence: str,
    source: str = "messages",
    speakers: str | None = None,
    opening: str | None = None,
    join: str | None = None,
    reading: Reading | None = None,
) -> Iterator[Record]:
    """Rows {messages: [{role, content}]}, the format of OpenAI's fine-tuning files; content is text or parts of text.

    Rows with tool calls, tool results, images or sound are quarantined, since a record cannot represent them. So are
    rows with a key of a message whose meaning is not known. `speakers`, `opening`, `join` and marks: as in sharegpt.
    """
    style = turns.parse_style(CHAT_SPEAKERS, speakers, opening, join)

    def parts_of(fields: dict[str, Any]) -> list[Said]:
        return _messages(fields, "messages", style)

    yield from _chats(place, quarantine, source, licence, parts_of, style, reading)


def dialogue(
    place: Place,
    quarantine: Quarantine,
    *,
    text: str,
    licence: str,
    source: str = "dialogue",
    speakers: str | None = None,
    opening: str | None = None,
    join: str | None = None,
    header: str = "yes",
    reading: Reading | None = None,
) -> Iterator[Record]:
    """A table whose column `text` holds a whole dialogue: `Doctor: ...`, `[patient] ...`, `الطبيب: ...`.

    `speakers` adds names to those of readers/transcripts.py. If the doctor speaks first, the patient says "Hello,
    doctor." before; several turns of one side in a row become one, joined by line breaks. `opening` and `join` change
    both. The column may also hold a list of such lines, or of turns {speaker, text}.
    """
    style = turns.parse_style(SPEAKERS, speakers, opening, join, lenient=True)

    def parts_of(fields: dict[str, Any]) -> list[Said]:
        value = fields[text]
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return [turns.message(item, style) for item in value]
        return transcript("\n".join(map(said, value)) if isinstance(value, list) else said(value), style)

    yield from _chats(place, quarantine, source, licence, parts_of, style, reading, header)


def _messages(fields: dict[str, Any], first: str, style: Style) -> list[Said]:
    key = next((name for name in (first, *CONVERSATIONS) if fields.get(name)), first)
    found = fields[key]
    if isinstance(found, str):  # a cell of a table
        found = json.loads(found)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"{key} is not a list of messages")
    return [turns.message(item, style) for item in found]


def _chats(
    place: Place,
    quarantine: Quarantine,
    source: str,
    licence: str,
    parts_of: Callable[[dict[str, Any]], list[Said]],
    style: Style,
    reading: Reading | None,
    header: str = "yes",
) -> Iterator[Record]:
    """Records of rows that `parts_of` turns into what the speakers say."""
    how, account = reading or Reading(), quarantine.account

    def make(row: Row, fields: dict[str, Any]) -> Record:
        found, provenance = turns.alternating(parts_of(fields), style)
        for turn in found:
            if turn.speaker == "gpt":
                how.reply(turn.value)
        exchanges = sum(turn.speaker == "gpt" for turn in found)
        return Record(
            id=row_id(source, row, None if is_missing(fields.get("id")) else fields["id"]),
            language=how.spoken("\n".join(turn.value for turn in found if turn.speaker != "system")),
            kind="chat" if exchanges > 1 else "qa",
            source=source,
            licence=licence,
            split=split_for(row, how, account),
            conversations=found,
            provenance=provenance,
        )

    found = rows(place, header=is_yes("header", header), reading=how, account=account)
    yield from build_all(source, found, quarantine, make, how)


# "Gest_family", "Guest_clinican" and numbered guests occur in the published files
_SPEAKER = re.compile(r'^\s*"?\s*(doctor|patient|gu?est_(?:family|clinici?an)(?:_?\d)?)\s*:\s*(.*)$', re.IGNORECASE)


def _dialogue_record(row: Row, fields: dict[str, Any], split: Split, how: Reading) -> Record:
    found = _merge_speakers(said(fields["dialogue"]))
    spoken = how.spoken("\n".join(turn.value for turn in found))
    provenance: dict[str, Any] = {"file": row.file, "row": fields["ID"], "section": fields["section_header"]}
    if found and found[0].speaker == "gpt":
        found.insert(0, Turn(speaker="human", value=turns.OPENINGS[spoken]))
        provenance["opening"] = "added"
    if found and found[-1].speaker == "human":
        found.pop()
        provenance["unanswered_turns"] = 1
    if not found:
        raise ValueError("the doctor says nothing")
    return Record(
        id=f"mts_dialog/{row.stem.removeprefix('MTS-Dialog-')}/{fields['ID']}",
        language=spoken,
        kind="chat",
        source="mts_dialog",
        licence="CC-BY-4.0",
        split=split,
        conversations=tuple(found),
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
