"""Options and answers: same number of options, same correct answer, and no hint in the question."""

import re
from difflib import SequenceMatcher

from bimedix_jax.curation.arabic import letters, plain, words
from bimedix_jax.curation.checks.flags import Flag
from bimedix_jax.data.records import LETTERS, Record

# labels of options in the order in which Arabic exams use them
_ARABIC_LABELS = "ابجدهوزحطي"
_LABEL = re.compile(
    r"(?m)^[ \t]*(?:[*\-•][ \t]*)?[(\[{]?([A-Ja-jأابجدهوزحطي]|\d{1,2}(?![.،:\-–]\d))[.)\]}:\-–،][ \t]*(.*)$"
)
_INLINE = re.compile(r"[(\[]([A-Jأابجدهوزحطي])[)\]][ \t]*([^()\[\]\n]*)")
_ANSWER_EN = re.compile(
    r"\b(?:(?:the )?(?:correct |right |best )?(?:answer|option|choice)(?: is)?)\s*[:=]?\s*[(\[]?"
    r"((?-i:[A-HJ]))(?![\w'’])",  # capitals only, without I: "answer a question", "the answer I gave"
    re.IGNORECASE,
)
_ANSWER_AR = re.compile(
    r"(?:الإجابة|الاجابة|الجواب|الخيار|الاختيار)(?:\s+(?:الصحيح|الأصح|الافضل|الأفضل)ة?)?(?:\s+ه[يو])?\s*[:=]?\s*[(\[]?"
    r"([A-Ja-jأابجدهوزحطي])(?![\w])"
)
# marks of the correct option in a translation
_MARK = re.compile(r"[✓✔☑✅]|\((?:صحيح|صحيحة|الصحيح|الإجابة الصحيحة|correct)\)|←\s*(?:الصحيح|صحيح)")
_TELLS = re.compile(
    r"(?:الإجابة|الاجابة|الجواب|الخيار)\s+(?:الصحيح|الأصح)ة?\s*(?:ه[يو]\s*)?[:：]|(?:^|\n)\s*(?:الإجابة|الجواب)\s*:"
)
_ASKS_FOR_ANSWER = re.compile(r"\b(?:correct|right|answers?|best|true)\b", re.IGNORECASE)


def check_text(source: str, translation: str) -> list[Flag]:
    """Flag lost options, another answer key, and hints at the answer, for sources with lettered or numbered options."""
    source, translation = plain(source), plain(translation)
    flags = _options(source, translation)
    key = _key(_ANSWER_EN, source)
    if key is not None and key != (other := _key(_ANSWER_AR, translation) or _key(_ANSWER_EN, translation)):
        flags.append(Flag(name="answer_key", detail=f"{key} in the source, {other or 'none'} in the translation"))
    if key is None and (leak := _leak(source, translation)):
        flags.append(leak)
    return flags


def check_record(source: Record, translation: Record) -> list[Flag]:
    """Flag differences in turns, choices and answer, and hints in the question. `check_text` checks the texts."""
    flags = []
    if [turn.speaker for turn in source.conversations] != [turn.speaker for turn in translation.conversations]:
        detail = f"{len(source.conversations)} turns became {len(translation.conversations)}, or other speakers"
        flags.append(Flag(name="options", detail=detail))
    if source.choices is None or source.answer is None:
        return flags
    if translation.choices is None or len(translation.choices) != len(source.choices):
        got = len(translation.choices or ())
        return [*flags, Flag(name="options", detail=f"{len(source.choices)} choices became {got}")]
    if translation.answer != source.answer:
        got = None if translation.answer is None else LETTERS[translation.answer]
        flags.append(
            Flag(name="answer_key", detail=f"{LETTERS[source.answer]} is correct, but the translation has {got}")
        )
    flags += merged_choices(source.choices, translation.choices)
    asked, question = source.conversations[-2].value, letters(plain(translation.conversations[-2].value))
    for letter, before, after in zip(LETTERS, source.choices, translation.choices, strict=False):
        if f"\n{letter}. {before}" in asked and letters(plain(after)).strip() not in question:
            flags.append(Flag(name="options", detail="its text is not in the question", place=f"choice {letter}"))
    flags += _stem_leak(source, translation)
    return flags


def _options(source: str, translation: str) -> list[Flag]:
    wanted = labels(source)
    if len(wanted) < 2:
        return []
    given = labels(translation)
    flags = []
    if len(given) != len(wanted):
        flags.append(Flag(name="options", detail=f"{len(wanted)} options became {len(given)}"))
    empty = [LETTERS[i] for i, text in enumerate(given) if not text and i < len(wanted) and wanted[i] and i < 10]
    if empty:
        flags.append(Flag(name="options", detail=f"option {', '.join(empty)} is empty"))
    if len(given) == len(wanted):
        flags += merged_choices(wanted, given)
    return flags


def labels(text: str) -> list[str]:
    """Texts of the options A, B, C ... (or أ, ب, ج ..., or 1, 2, 3 ...) in one run without gaps.

    Returns the longest run that begins with the first label. A label out of order ends the run: without C, two options
    of four remain.
    """
    best: list[str] = []
    for pattern in (_LABEL, _INLINE):
        run: list[str] = []
        for match in pattern.finditer(text):
            place = _place(match.group(1))
            if place == 0:
                run = [match.group(2).strip()]
            elif run and place == len(run):
                run.append(match.group(2).strip())
            else:
                run = []
            if len(run) > len(best):
                best = list(run)
    return best if len(best) >= 2 else []


def _place(label: str) -> int | None:
    if label.isdigit():
        return int(label) - 1
    label = letters(label)
    place = _ARABIC_LABELS.find(label)
    return place if place >= 0 else (LETTERS.find(label.upper()) if label.upper() in LETTERS else None)


def merged_choices(source: tuple[str, ...] | list[str], translation: tuple[str, ...] | list[str]) -> list[Flag]:
    """Options that differ in the source but not in the translation."""
    own = [tuple(words(plain(choice))) for choice in source]
    other = [tuple(words(plain(choice))) for choice in translation]
    return [
        Flag(name="options", detail=f"{LETTERS[i]} and {LETTERS[j]} became the same")
        for i in range(min(len(own), len(LETTERS)))
        for j in range(i)
        if other[i] == other[j] and other[i] and own[i] != own[j]
    ]


def _key(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    if match is None:
        return None
    place = _place(match.group(1))
    return LETTERS[place] if place is not None else None


def _leak(source: str, translation: str) -> Flag | None:
    mark = _MARK.search(translation)
    if mark and not _MARK.search(source):
        return Flag(name="answer_leak", detail=f"an option is marked: {mark.group()}")
    tells = _TELLS.search(translation)
    if tells and not _ASKS_FOR_ANSWER.search(source):
        return Flag(name="answer_leak", detail=f"it states an answer: {tells.group().strip()}")
    return None


def _stem_leak(source: Record, translation: Record) -> list[Flag]:
    """Flag the correct choice in the translated question, if it is not in the source's and no other choice is."""
    if source.choices is None or translation.choices is None or source.answer is None:
        return []
    stems = [_stem(record) for record in (source, translation)]
    inside = [
        [_contains(stem, choice) for choice in choices]
        for stem, choices in zip(stems, (source.choices, translation.choices), strict=True)
    ]
    new = [after and not before for before, after in zip(*inside, strict=True)]
    right = translation.choices[source.answer]
    if new[source.answer] and sum(new) == 1 and len(words(plain(right))) >= 2:
        return [Flag(name="answer_leak", detail=f"the question contains the correct choice: {right}")]
    return []


def _stem(record: Record) -> list[str]:
    """Words of the question before the first option."""
    text = plain(record.conversations[-2].value)
    first = next((m.start() for m in _LABEL.finditer(text) if _place(m.group(1)) == 0), len(text))
    return words(text[:first])


def _contains(stem: list[str], choice: str) -> bool:
    own = words(plain(choice))
    if not own:
        return False
    match = SequenceMatcher(None, stem, own, autojunk=False).find_longest_match()
    return match.size == len(own)
