"""Turns of a conversation as people write them, made into turns that alternate: speakers, openings, joins and marks.

Options of the readers of conversations:

    speakers    doctor:gpt,patient:human    sides of names, in addition to those of the reader
    opening     refuse | add | drop | TEXT  what happens if the doctor speaks first: the row is left out, the patient
                                            first says "Hello, doctor." or TEXT, or the doctor's turn is dropped
    join        refuse | line | space | blank   what happens if a side has several turns in a row
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bimedix_jax.curation.quarantine import WrongSource
from bimedix_jax.curation.readers.rows import tidy
from bimedix_jax.curation.readers.script import language_of
from bimedix_jax.curation.readers.texts import is_missing
from bimedix_jax.data.records import Turn

Side = Literal["system", "human", "gpt"]

SIDES: dict[str, Side] = {"system": "system", "human": "human", "gpt": "gpt", "user": "human", "assistant": "gpt"}
SIDES |= {"patient": "human", "doctor": "gpt"}
OPENINGS = {"en": "Hello, doctor.", "ar": "مرحبًا دكتور."}
JOINS = {"line": "\n", "space": " ", "blank": "\n\n"}

SPEAKER_NAMES = ("from", "role", "speaker")
TEXT_NAMES = ("value", "content", "text", "utterance")
MARKS = ("weight", "train", "learned", "learn", "loss", "trainable")
"""Keys of a message that say whether it is learned."""

_HARMLESS = {
    "name",
    "id",
    "timestamp",
    "time",
    "date",
    "create_time",
    "created_at",
    "model",
    "lang",
    "language",
    "index",
}
_HARMLESS |= {"turn", "turn_id", "tokens", "markdown", "hash", "refusal"}


@dataclass(frozen=True)
class Said:
    """What one speaker says; `learned` is False if the data set asks not to learn it."""

    side: Side
    text: str
    learned: bool = True


@dataclass(frozen=True, kw_only=True)
class Style:
    """How turns become a conversation. `speakers` maps names in lower case; for the others see the module docstring."""

    speakers: Mapping[str, Side]
    opening: str = "refuse"
    join: str = "refuse"


def parse_style(
    known: Mapping[str, Side], speakers: str | None, opening: str | None, join: str | None, lenient: bool = False
) -> Style:
    """The style that options of a source state. `lenient`: by default an opening is added and turns are joined.

    Raises:
        WrongSource: an option is not of its form.
    """
    names, stated = dict(known), set[str]()
    for pair in [] if speakers is None else speakers.split(","):
        name, _, side = pair.rpartition(":")
        if not name.strip() or side.strip().lower() not in SIDES:
            raise WrongSource(
                f"speakers={speakers} is not of the form name:side,name:side, with the sides human, gpt and system"
            )
        if speaker_name(name) in stated:
            raise WrongSource(f"speakers={speakers} names {name.strip()!r} twice; give each name one side")
        stated.add(speaker_name(name))
        names[speaker_name(name)] = SIDES[side.strip().lower()]
    join = join or ("line" if lenient else "refuse")
    if join not in (*JOINS, "refuse"):
        raise WrongSource(f"join={join} is none of refuse, {', '.join(JOINS)}")
    if opening == "":
        raise WrongSource("opening= is empty; write refuse, add, drop, or the text with which the patient begins")
    return Style(speakers=names, opening=opening or ("add" if lenient else "refuse"), join=join)


def speaker_name(name: object) -> str:
    """One spelling of a speaker's name: lower case, without brackets and colon, `_` for spaces."""
    return re.sub(r"[\s_-]+", "_", str(name).strip(" \t\r\n[](){}<>:：*\"'").casefold()).strip("_")


def said_by(speaker: object, text: object, style: Style, learned: bool = True) -> Said:
    """What a named speaker says.

    Raises:
        ValueError: the name is unknown, or the text is missing.
    """
    side = style.speakers.get(speaker_name(speaker)) if isinstance(speaker, str) else None
    if side is None:
        known = ", ".join(style.speakers)
        raise ValueError(f"{speaker!r} is not a speaker; known are {known}; speakers= names others")
    if is_missing(text) and not (side == "human" and text == "None"):  # a patient may answer None
        raise ValueError("a text is missing")
    return Said(side, tidy(text), learned)


def message(fields: Mapping[str, Any], style: Style) -> Said:
    """A message such as {role, content, weight} or {from, value, train}.

    Raises:
        ValueError: it calls a tool, has parts that are not text, or a key whose meaning is not known.
    """
    if fields.get("tool_calls") or fields.get("function_call"):
        raise ValueError("a message calls a tool")
    speaker = _key(fields, SPEAKER_NAMES)
    value = _key(fields, TEXT_NAMES)
    learned = True
    for name, mark in fields.items():
        if name in (speaker, value) or mark is None or mark == [] or mark == "" or name in _HARMLESS:
            continue
        if name not in MARKS:
            raise ValueError(f"a message has the key {name!r}, whose meaning is not known")
        if mark not in (0, 1):
            raise ValueError(f"{name} of a message is neither 0 nor 1")
        learned = learned and bool(mark)
    return said_by(fields[speaker], _content(fields[value]), style, learned)


def _key(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if name in fields and fields[name] is not None), names[0])


def _content(content: object) -> object:
    if not isinstance(content, list):
        return content
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
        raise ValueError("a message has parts that are not text")
    return "\n".join(tidy(part["text"]) for part in content)


def alternating(said: Sequence[Said], style: Style) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    """Turns that begin with the patient, alternate and end with an answer; and what was changed, as provenance.

    Raises:
        ValueError: they do not, and the style does not say what to do about it.
    """
    provenance: dict[str, Any] = {}
    instructions = [part for part in said[:1] if part.side == "system"]
    turns = [part for part in said[len(instructions) :] if part.text]
    if len(turns) + len(instructions) < len(said):
        raise ValueError("a turn is empty")
    if style.join != "refuse":
        joined = _joined(turns, JOINS[style.join])
        if len(joined) < len(turns):
            provenance["joined_turns"] = len(turns) - len(joined)
        turns = joined
    if turns and turns[0].side == "gpt" and style.opening == "drop":
        turns = turns[1:]
        provenance["opening"] = "dropped"
    elif turns and turns[0].side == "gpt" and style.opening != "refuse":
        text = style.opening if style.opening != "add" else OPENINGS[language_of(turns[0].text)]
        turns = [Said("human", text), *turns]
        provenance["opening"] = "added"
    while turns and turns[-1].side == "human":
        turns = turns[:-1]
        provenance["unanswered_turns"] = provenance.get("unanswered_turns", 0) + 1
    _check_order(turns)
    found = [*instructions, *turns]
    return tuple(_turn(part) for part in found), provenance


def _turn(said: Said) -> Turn:
    return Turn(speaker=said.side, value=said.text, learned=said.learned or said.side != "gpt")


def _joined(turns: Sequence[Said], between: str) -> list[Said]:
    found: list[Said] = []
    for turn in turns:
        if not found or found[-1].side != turn.side:
            found.append(turn)
        elif found[-1].learned != turn.learned and turn.side == "gpt":
            raise ValueError("of several turns of the doctor in a row, some are to be learned and some are not")
        else:
            found[-1] = Said(turn.side, found[-1].text + between + turn.text, turn.learned)
    return found


def _check_order(turns: Sequence[Said]) -> None:
    for index, turn in enumerate(turns):
        expected = "human" if index % 2 == 0 else "gpt"
        if turn.side != expected:
            way = "opening=add or opening=drop" if index == 0 else "join=line"
            raise ValueError(
                f"turn {index + 1} is from {turn.side!r}, but {expected!r} must speak next; {way} reads such rows"
            )
