"""Rules for chats: the drawn shape, questions before the answer, the answer itself, and no mention of the exam."""

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bimedix_jax.curation.annotate.chat_shapes import ChatShape
from bimedix_jax.curation.arabic import arabic_share, plain, sentences, stems, words
from bimedix_jax.curation.checks.numbers import in_digits
from bimedix_jax.data.records import LETTERS, Language, Record

ProblemName = Literal[
    "turns", "language", "no_question", "answer_early", "answer_missing", "another_choice", "exam_talk", "repetition"
]

SUPPORTED = 0.5
"""Share of the words of the right choice that the doctor must use: answers are paraphrased."""

MOST_LATIN, LEAST_ARABIC = 0.2, 0.5
"""Largest share of Arabic letters in an English turn, and smallest in an Arabic one, which may name drugs."""


class Said(BaseModel):
    """One turn as the model returns it. Its explicit description is sent, as in translation.py."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"description": "One turn as the model returns it."}
    )

    speaker: Literal["patient", "doctor"]
    language: Language
    text: str


class Dialogue(BaseModel):
    """A consultation as the model returns it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"description": "A whole consultation as the model returns it."}
    )

    turns: tuple[Said, ...]


class Problem(BaseModel):
    """A violation of one rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ProblemName
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


_EXAM = re.compile(
    r"\b(?:option|choice|answer)\s+[A-J]\b|\bmultiple[- ]choice\b|\bwhich (?:one )?of the following\b|"
    r"\bcorrect answer\b|\bexam(?:ination)? question\b|\bquestion stem\b|^\s*\(?[A-J][.)]\s|"
    r"الخيار\s+[(]?[A-Jأبجده]\b|أي\s+مما\s+يلي|الإجابة\s+الصحيحة|سؤال\s+(?:ال)?امتحان|متعدد\s+(?:ال)?خيارات",
    re.MULTILINE,
)
_QUESTION = re.compile(r"[?؟]")
# choices that refer to other choices, and questions that need a picture
_NOT_ALONE = re.compile(
    r"(?i)\b(?:all|none|any|both|neither|some)\s+(?:of\s+)?(?:the\s+)?(?:above|below|these|options|choices)\b|"
    r"^\W*(?:both\s+)?[a-e]\W*(?:and|&|,)\W*[a-e]\W*(?:only\W*)?$|جميع\s+ما|كل\s+ما\s+(?:سبق|ذكر)|لا\s+شيء\s+مما|"
    r"ليس\s+أيا\s+مما|كلاهما"
)
_YES_NO = frozenset("yes no maybe true false نعم لا ربما صواب خطأ".split())
_PICTURE = re.compile(
    r"(?i)\b(?:shown|depicted|pictured|seen|illustrated|labell?ed|marked)\s+(?:in|on|by|below|above)\b.{0,30}"
    r"\b(?:image|figure|picture|photograph|diagram|arrow|radiograph)|"
    r"\bthe (?:image|figure|picture|photograph|diagram) (?:shown|below|above|shows)\b|"
    r"في\s+(?:الصورة|الشكل)\s+(?:التالي|المرفق|أدناه|المبين)"
)
_EMPTY_WORDS = frozenset(
    "a an the of to in on for with and or by at from is are be as its it this that which patient patients treatment "
    "use using most likely في من على الى عن مع او ان هو هي التي الذي".split()
)


def unsuitable(record: Record) -> str | None:
    """Why no chat can be written on a question, or None."""
    if record.choices is None or record.answer is None:
        return "it is not a multiple-choice question"
    if any(_NOT_ALONE.search(choice) for choice in record.choices):
        return "a choice refers to other choices"
    if all(choice.strip().casefold() in _YES_NO for choice in record.choices):
        return "its choices are only yes and no"
    if any(_PICTURE.search(turn.value) for turn in record.conversations if turn.speaker == "human"):
        return "it needs a picture"
    return None


def why_no_dialogue(dialogue: Dialogue) -> str | None:
    """Why a reply is not a consultation, or None: blank turns, or two turns in a row of one speaker."""
    if not dialogue.turns:
        return "there are no turns"
    for number, turn in enumerate(dialogue.turns):
        expected = "doctor" if number % 2 else "patient"
        if turn.speaker != expected:
            return f"turn {number + 1} is the {turn.speaker}'s and must be the {expected}'s"
        if not turn.text.strip():
            return f"turn {number + 1} is blank"
    return "the doctor must have the last word" if len(dialogue.turns) % 2 else None


def problems(record: Record, shape: ChatShape, dialogue: Dialogue) -> list[Problem]:
    """All violations, in a fixed order."""
    found = [*_turns(shape, dialogue), *_languages(shape, dialogue), *_questions(shape, dialogue)]
    found += [*_answer(record, shape, dialogue), *_exam(dialogue), *_repeated(dialogue)]
    return found


def _turns(shape: ChatShape, dialogue: Dialogue) -> Iterable[Problem]:
    if len(dialogue.turns) != 2 * shape.exchanges:
        yield Problem(name="turns", detail=f"{len(dialogue.turns)} turns, the plan has {2 * shape.exchanges}")


def _languages(shape: ChatShape, dialogue: Dialogue) -> Iterable[Problem]:
    for number, turn in enumerate(dialogue.turns):
        wanted = shape.languages[min(number // 2, shape.exchanges - 1)]
        share = arabic_share(plain(turn.text))
        wrong = share is not None and (share < LEAST_ARABIC if wanted == "ar" else share > MOST_LATIN)
        if turn.language != wanted or wrong:
            name = {"en": "English", "ar": "Arabic"}[wanted]
            yield Problem(name="language", detail=f"turn {number + 1} must be in {name}")


def _questions(shape: ChatShape, dialogue: Dialogue) -> Iterable[Problem]:
    for exchange, turn in enumerate(_doctor(dialogue), start=1):
        if exchange < shape.answer and not _QUESTION.search(turn.text):
            yield Problem(name="no_question", detail=f"the doctor asks nothing in exchange {exchange}")


def _answer(record: Record, shape: ChatShape, dialogue: Dialogue) -> Iterable[Problem]:
    """Whether the doctor names the right choice. Only turns in the language of the question count."""
    assert record.choices is not None
    assert record.answer is not None
    right = record.choices[record.answer]
    doctor = _doctor(dialogue)
    early = [turn for turn in doctor[: shape.answer - 1] if turn.language == record.language]
    for turn in early:
        told = [part for part in sentences(plain(turn.text)) if not _QUESTION.search(part)]
        if any(support(right, part) == 1 for part in told) and len(_content(right)) > 1:
            yield Problem(name="answer_early", detail=f"the doctor concludes {right!r} before exchange {shape.answer}")
            break
    answering = doctor[shape.answer - 1 :]
    if not answering or answering[0].language != record.language or not _content(right):
        return
    late = "\n".join(turn.text for turn in answering if turn.language == record.language)
    said = support(right, late)
    if said < SUPPORTED:
        yield Problem(name="answer_missing", detail=f"the doctor does not say {right!r}")
        return
    for letter, choice in zip(LETTERS, record.choices, strict=False):
        if choice != right and said < 1 and support(choice, late) == 1 and len(_content(choice)) > 1:
            yield Problem(name="another_choice", detail=f"the doctor says {choice!r} ({letter}) rather than {right!r}")


def support(choice: str, text: str) -> float:
    """Share of a choice's words and numbers that occur in a text, inflected or not; 1 for a choice without any."""
    wanted = _content(choice)
    if not wanted:
        return 1.0
    have = {stem for word in words(plain(text)) for stem in _forms(word)}
    values = {value for number in in_digits(plain(text)) for value in number.readings}
    return sum(bool(forms & have) or _is_value(forms, values) for forms in wanted) / len(wanted)


def _content(text: str) -> list[frozenset[str]]:
    """The words of a text except `_EMPTY_WORDS`, each as the set of its forms."""
    return [frozenset(_forms(word)) for word in dict.fromkeys(words(plain(text))) if word not in _EMPTY_WORDS]


def _forms(word: str) -> set[str]:
    """A word with and without English inflection or Arabic prefixes and suffixes."""
    if word.isascii():
        found = {word, *word.split("-")}
        for ending in ("s", "es", "ed", "d", "ing", "ion", "ation", "al", "ic", "ically", "ly", "y", "e"):
            if word.endswith(ending) and len(word) - len(ending) >= 4:
                found.add(word[: -len(ending)])
        return found
    found = set(stems(word))
    return found | {stem[: -len(end)] for stem in found for end in ("ه", "ات", "ين", "ون", "ا") if
                    stem.endswith(end) and len(stem) - len(end) >= 3}  # fmt: skip


def _is_value(forms: frozenset[str], values: set[float]) -> bool:
    return any(form.replace(".", "", 1).isdigit() and float(form) in values for form in forms if form.isascii())


def _exam(dialogue: Dialogue) -> Iterable[Problem]:
    for number, turn in enumerate(dialogue.turns, start=1):
        match = _EXAM.search(turn.text)
        if match:
            yield Problem(name="exam_talk", detail=f"turn {number} says {match.group().strip()!r}")


def _repeated(dialogue: Dialogue) -> Iterable[Problem]:
    seen: dict[tuple[str, ...], int] = {}
    for number, turn in enumerate(dialogue.turns, start=1):
        said = tuple(words(plain(turn.text)))
        if len(said) > 3 and said in seen:
            yield Problem(name="repetition", detail=f"turn {number} is turn {seen[said]} again")
        seen.setdefault(said, number)


def _doctor(dialogue: Dialogue) -> list[Said]:
    return [turn for turn in dialogue.turns if turn.speaker == "doctor"]
