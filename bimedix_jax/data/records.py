"""The record type: a conversation in English or Arabic, from a question with one answer to a long consultation.

On disk a record is one line of JSON in UTF-8. Conversations are spelled as in the BiMediX paper
(`"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]`); the other keys tell what the
record is and where it came from.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bimedix_jax import files
from bimedix_jax.errors import BimedixError

Language = Literal["en", "ar"]
Kind = Literal["qa", "mcqa", "chat"]
Split = Literal["train", "heldout"]
Speaker = Literal["system", "human", "gpt"]

LETTERS = "ABCDEFGHIJ"
ANSWER_PREFIX: dict[str, str] = {"en": "Answer: ", "ar": "الإجابة: "}


class Turn(BaseModel):
    """What one speaker says. In JSON the speaker's key is `from`, which is a reserved word in Python.

    `language` is set only if a turn is not in its record's language, as when a patient switches languages. `learned` is
    False for an answer that the loss leaves out, as its data set asks (`weight: 0`, `train: false`). JSON has neither
    key otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    speaker: Speaker = Field(validation_alias=AliasChoices("from", "speaker"), serialization_alias="from")
    value: str
    language: Language | None = Field(default=None, exclude_if=lambda language: language is None)
    learned: bool = Field(default=True, exclude_if=lambda learned: learned)

    @model_validator(mode="after")
    def _not_blank(self) -> Self:
        if not self.value.strip():
            raise ValueError(f"a turn of {self.speaker!r} is empty")
        return self


class Record(BaseModel):
    """One conversation and where it came from. Raises pydantic's ValidationError if it is not a valid record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    language: Language
    kind: Kind
    source: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    specialty: str | None = None
    split: Split | None = None
    conversations: tuple[Turn, ...]
    choices: tuple[str, ...] | None = None
    answer: int | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _speakers_alternate(self) -> Self:
        turns = self.conversations[1:] if self.conversations[:1] and self.is_system(0) else self.conversations
        if not turns:
            raise ValueError("conversations is empty")
        for index, turn in enumerate(turns):
            expected = "human" if index % 2 == 0 else "gpt"
            if turn.speaker != expected:
                raise ValueError(f"turn {index + 1} is from {turn.speaker!r}, but {expected!r} must speak next")
        if turns[-1].speaker != "gpt":
            raise ValueError("the last turn must be from 'gpt', since only its turns are learned")
        if not any(turn.learned for turn in turns if turn.speaker == "gpt"):
            raise ValueError("no answer is to be learned")
        return self

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Self:
        if (self.choices is None) != (self.answer is None):
            raise ValueError("choices and answer must be given together")
        if self.choices is None:
            if self.kind == "mcqa":
                raise ValueError("an mcqa record needs choices and answer")
            return self
        if not 2 <= len(self.choices) <= len(LETTERS):
            raise ValueError(f"{len(self.choices)} choices, expected 2 to {len(LETTERS)}")
        if any(not choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        if self.answer is None or not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer {self.answer} is not an index into {len(self.choices)} choices")
        return self

    def is_system(self, index: int) -> bool:
        """Whether turn `index` is a system prompt."""
        return self.conversations[index].speaker == "system"

    def to_json(self) -> str:
        """The record as one line of JSON; Arabic letters are not escaped."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), ensure_ascii=False)


def conversation(*values: str, system: str | None = None) -> tuple[Turn, ...]:
    """Turns from texts by alternating speakers: human, gpt, human, ..."""
    speakers: tuple[Speaker, Speaker] = ("human", "gpt")
    turns = tuple(Turn(speaker=speakers[index % 2], value=value) for index, value in enumerate(values))
    return turns if system is None else (Turn(speaker="system", value=system), *turns)


def multiple_choice_question(question: str, choices: Iterable[str]) -> str:
    """The human turn of an MCQA record: the question, then one lettered choice a line."""
    return "\n".join([question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))])


def multiple_choice_answer(choices: tuple[str, ...], answer: int, language: Language, explanation: str = "") -> str:
    """The gpt turn of an MCQA record: `Answer: B. <its text>`, and the explanation on the next line if there is one."""
    line = f"{ANSWER_PREFIX[language]}{LETTERS[answer]}. {choices[answer]}"
    return f"{line}\n{explanation}" if explanation else line


def question_of(record: Record) -> str:
    """The question without choices or context, by which records are compared across data sets.

    A chat has no single question, and openings such as "Hello, doctor." are shared by many. Its whole text is used.
    """
    if record.kind == "chat":
        return "\n".join(turn.value for turn in record.conversations)
    if "question" in record.provenance:
        return str(record.provenance["question"])
    human = next(turn.value for turn in record.conversations if turn.speaker == "human")
    if record.choices is not None:
        options = multiple_choice_question("", record.choices)
        return human.removesuffix(options)
    return human


def assign_split(key: str, seed: int, heldout_fraction: float) -> Split:
    """The split of all records with this key. It is a hash, so it does not change when other records are added."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < heldout_fraction * 2**64 else "train"


def parse(line: str | bytes, where: str) -> Record:
    """The record in one line of JSON.

    Raises:
        BimedixError: the line is not a record; the message begins with `where`, for example `file:line`.
    """
    try:
        return Record.model_validate_json(line)
    except ValidationError as error:
        raise BimedixError(f"{where}: {explain(error)}; correct the line or remove it") from error


def explain(error: ValidationError) -> str:
    """Pydantic's errors in one line."""
    found = []
    for item in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in item["loc"])
        found.append(f"{place}: {item['msg']}" if place else item["msg"])
    return "; ".join(found)


def read_jsonl(path: str | Path) -> Iterator[Record]:
    """Records of a JSONL file, one at a time; blank lines are skipped.

    Raises:
        BimedixError: there is no such file, or a line is not a record (the message names file and line).
    """
    source = Path(path)
    if not source.is_file():
        raise BimedixError(
            f"there is no file {source}; name a JSONL file of records (`bimedix data assemble` writes one)"
        )
    for number, line in enumerate(files.text_lines(source), start=1):
        if line.strip():
            yield parse(line, f"{source}:{number}")


def write_jsonl(path: str | Path, records: Iterable[Record]) -> int:
    """Write records as JSONL and return their number. Not atomic: write inside `files.new_folder`."""
    count = 0
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(record.to_json() + "\n")
            count += 1
    return count


def sample(split: Split | None = None) -> Iterator[Record]:
    """The English and Arabic sample in the package, with all kinds of records; `split` None gives all of it."""
    folder = resources.files("bimedix_jax") / "assets" / "sample"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    for name in names:
        with (folder / name).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                record = parse(line, f"{name}:{number}")
                if split is None or record.split == split:
                    yield record
