"""The texts of a record that are checked one by one: the question, each choice, each turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bimedix_jax.data.records import LETTERS, Record, multiple_choice_answer, multiple_choice_question

Pair = tuple[str, str]


@dataclass(frozen=True)
class Segments:
    """Texts and their translations by place. `texts` are questions and turns; places are None, "question", "turn 2"."""

    texts: tuple[tuple[str | None, Pair], ...]
    choices: tuple[Pair, ...] = ()


def of_records(source: Record, translation: Record) -> Segments:
    """The segments of two records with the same number of turns.

    A turn that ends with the lettered choices is only its question. A turn with the answer key is only what follows it.
    """
    choices: tuple[Pair, ...] = ()
    if source.choices is not None and translation.choices is not None:
        choices = tuple(zip(source.choices, translation.choices, strict=False))
    texts = []
    for number, (before, after) in enumerate(zip(source.conversations, translation.conversations, strict=False), 1):
        if before.language == "ar":  # the patient switched to Arabic in this turn, so it was not translated
            continue
        pair = (_own_text(source, before.value), _own_text(translation, after.value))
        if all(pair):
            texts.append((f"turn {number}", pair))
        elif any(pair):  # only one side has the choices or the key
            texts.append((f"turn {number}", (before.value, after.value)))
    return Segments(tuple(texts), choices)


def _own_text(record: Record, value: str) -> str:
    if record.choices is None or record.answer is None:
        return value
    value = value.removesuffix(multiple_choice_question("", record.choices))
    return value.removeprefix(multiple_choice_answer(record.choices, record.answer, record.language)).lstrip("\n")


def of_objects(source: Any, translation: Any) -> Segments:
    """The segments of a text, or of an object with `question` and `choices` and texts under other names.

    Raises:
        ValueError: the two sides have different shapes, or neither shape.
    """
    if isinstance(source, str) and isinstance(translation, str):
        return Segments(((None, (source, translation)),))
    if not isinstance(source, Mapping) or not isinstance(translation, Mapping):
        raise ValueError("en and ar must both be texts, or both be objects with question and choices")
    texts = []
    for name, value in source.items():
        if name in _CHOICES or name in _NO_TEXT or not isinstance(value, str):
            continue
        other = translation.get(name)
        if not isinstance(other, str):
            raise ValueError(f"en has the text {name!r}, and ar has not")
        texts.append((str(name), (value, other)))
    own, given = _choices(source), _choices(translation)
    if not texts and not own:
        raise ValueError("an object needs a text, such as question, or choices")
    return Segments(tuple(texts), tuple(zip(own, given, strict=False)))


_CHOICES = ("choices", "options")
_NO_TEXT = ("id", "answer", "answer_idx", "label", "source", "licence", "split", "subject", "language", "kind")


def _choices(record: Mapping[str, Any]) -> list[str]:
    found = next((record[name] for name in _CHOICES if record.get(name) is not None), [])
    if isinstance(found, Mapping) and isinstance(found.get("text"), list):  # {"text": [...], "label": [...]}
        found = found["text"]
    if isinstance(found, Mapping):
        found = list(found.values())
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError("choices must be a list, or an object of letters and texts")
    texts = [choice.get("text") if isinstance(choice, Mapping) else choice for choice in found]
    if not all(isinstance(text, str | int | float) for text in texts):
        raise ValueError("a choice is neither a text nor an object with `text`")
    if len(texts) > len(LETTERS):
        raise ValueError(f"{len(texts)} choices, at most {len(LETTERS)} are supported")
    return [str(text) for text in texts]


def counts(source: Any, translation: Any) -> tuple[int, int]:
    """How many choices the two objects have."""
    return tuple(len(_choices(side)) if isinstance(side, Mapping) else 0 for side in (source, translation))  # pyright: ignore[reportReturnType]
