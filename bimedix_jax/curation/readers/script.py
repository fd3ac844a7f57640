"""The language of a record compared with its script: an Arabic text is never labelled English, nor the reverse."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.data.records import Language, Record, Turn

MIXED = 0.1
"""Share of Arabic letters from which a text may be Arabic with foreign terms."""

FEW_LETTERS = 8
"""A text with fewer letters than this may be a formula, a name or an abbreviation in either language."""

FEW_FOREIGN = 3
"""Letters of another language from which a text is doubtful. A name has fewer."""

ACCENTED = 0.015
"""Share of accented letters from which a text in Latin script is doubtful. English has almost none."""

NAMES = {"en": "English", "ar": "Arabic"}

_ASCII = re.compile(r"[A-Za-z]+")
_ARABIC = re.compile(r"[\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc]+")
_URDU = re.compile("[ٹڈڑںے]")
_ACCENTED = re.compile(r"[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]")
_LETTERS = re.compile(r"[^\W\d_]+")
_LATIN_OR_GREEK = re.compile(r"[A-Za-z\u00aa\u00ba\u00c0-\u024f\u0370-\u03ff\u1e00-\u1eff]+")


@dataclass(frozen=True)
class Letters:
    """Numbers of letters of a text: Arabic ones, Latin and Greek ones, and all."""

    arabic: int
    latin: int
    all: int

    def __add__(self, other: "Letters") -> "Letters":
        return Letters(self.arabic + other.arabic, self.latin + other.latin, self.all + other.all)

    @property
    def share(self) -> float:
        """Share of Arabic among Arabic and Latin letters; 0 for a text without either."""
        return self.arabic / max(1, self.arabic + self.latin)


def letters_of(text: str) -> Letters:
    """The letters of a text by script."""
    if text.isascii():
        number = sum(map(len, _ASCII.findall(text)))
        return Letters(0, number, number)
    arabic, latin, every = (sum(map(len, kind.findall(text))) for kind in (_ARABIC, _LATIN_OR_GREEK, _LETTERS))
    return Letters(arabic, latin, max(every, arabic + latin))


def language_of(*texts: str) -> Language:
    """The language of the first text that has letters, by its script."""
    for text in texts:
        found = letters_of(text)
        if found.all:
            return "ar" if found.share >= 0.5 else "en"
    return "en"


def language_of_exam(question: str, choices: Sequence[str]) -> Language:
    """The language of a question with choices: Arabic if the question is, or else all of it together."""
    return "ar" if "ar" in (language_of(question), language_of(" ".join((question, *choices)))) else "en"


def settled(
    record: Record, account: SourceAccount, *, stated: bool, from_script: bool = False, own: bool = False
) -> Record:
    """`record` if its language agrees with its script, with a language of their own for turns in the other script.

    Args:
        stated: the language was stated by an option.
        from_script: the language was taken from the script.
        own: the record is in the format of this project: its language is corrected unless one is stated, and its turns
            stay as they are.

    Raises:
        ValueError: the script is that of the other language, or of neither.
    """
    # the answer to a question with choices begins with words of ours, in the stated language
    unread = ("system", "gpt") if record.kind == "mcqa" else ("system",)
    turns = [turn for turn in record.conversations if turn.language is None and turn.speaker not in unread]
    found = [letters_of(turn.value) for turn in turns]
    total = sum(found, Letters(0, 0, 0))
    if total.all >= FEW_LETTERS and 2 * (total.arabic + total.latin) < total.all:
        raise ValueError("the text is neither in Latin nor in Arabic script")
    if not from_script and _contradicts(record.language, turns, found, total):
        if own and not stated:
            account.changes["records whose language was corrected, since their script contradicts it"] += 1
            return record.model_copy(update={"language": "ar" if record.language == "en" else "en"})
        script = "Arabic" if record.language == "en" else "Latin"
        raise ValueError(
            f"the text is in {script} script, but its language is stated to be {NAMES[record.language]} "
            f"({record.language})"
        )
    if from_script:
        account.languages[record.language] += 1
        _note_doubts(record.language, turns, found, account)
    if own or record.kind == "mcqa":
        return record
    return _with_other_turns(record, account)


def _note_doubts(language: Language, turns: Sequence[Turn], found: Sequence[Letters], account: SourceAccount) -> None:
    """Count a record whose language the script may not tell. It keeps its language."""
    asked, told = (
        sum((n for turn, n in zip(turns, found, strict=True) if turn.speaker == side), Letters(0, 0, 0))
        for side in ("human", "gpt")
    )
    if min(asked.all, told.all) >= FEW_LETTERS and (asked.share >= 0.5) != (told.share >= 0.5):
        account.changes["records whose question and answer are in different scripts"] += 1
    text = " ".join(turn.value for turn in turns)
    if text.isascii():
        return
    if language == "ar" and len(_URDU.findall(text)) >= FEW_FOREIGN:
        account.changes["doubtful: records in Arabic script with letters of Urdu, labelled ar"] += 1
    accented = len(_ACCENTED.findall(text))
    if language == "en" and accented >= max(FEW_FOREIGN, ACCENTED * sum(n.latin for n in found)):
        account.changes["doubtful: records in Latin script with many accented letters, labelled en"] += 1


def _contradicts(language: Language, turns: Sequence[Turn], found: Sequence[Letters], total: Letters) -> bool:
    if language == "en":
        asked = sum((n for turn, n in zip(turns, found, strict=True) if turn.speaker == "human"), Letters(0, 0, 0))
        return total.share >= 0.5 and (asked.share >= 0.5 or not asked.all)
    return total.latin >= FEW_LETTERS and all(letters.share < MIXED for letters in found)


def _with_other_turns(record: Record, account: SourceAccount) -> Record:
    """`record` with the language of each turn that is in the script of the other language."""
    other: Language = "en" if record.language == "ar" else "ar"
    turns = []
    for turn in record.conversations:
        found = letters_of(turn.value) if turn.language is None else Letters(0, 0, 0)
        away = found.share >= 0.5 if other == "ar" else found.share < MIXED
        if away and found.all >= FEW_LETTERS:
            turn = turn.model_copy(update={"language": other})
            account.changes["turns marked as being in the other language"] += 1
        turns.append(turn)
    if all(turn is before for turn, before in zip(turns, record.conversations, strict=True)):
        return record
    return record.model_copy(update={"conversations": tuple(turns)})
