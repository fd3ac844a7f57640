"""Dialogues in one text: lines or passages that begin with `Doctor:`, `[patient]`, `الطبيب:` or another name."""

import re
from collections.abc import Mapping

from bimedix_jax.curation.readers.rows import tidy
from bimedix_jax.curation.readers.turns import Said, Side, Style, said_by, speaker_name

_DOCTOR = (
    "doctor dr physician clinician provider gp consultant therapist counselor counsellor psychiatrist psychologist"
)
_DOCTOR += " assistant gpt chatgpt bot ai chatbot"
_DOCTOR += " الطبيب طبيب الطبيبة طبيبة الدكتور دكتور الدكتورة دكتورة د ط المعالج المعالجة المساعد"
_PATIENT = "patient pt user human client questioner asker المريض مريض المريضة مريضة م السائل السائلة المستخدم المراجع"
SPEAKERS: Mapping[str, Side] = {
    **dict.fromkeys(_DOCTOR.split(), "gpt"),
    **dict.fromkeys(_PATIENT.split(), "human"),
    "system": "system",
}
"""Names of the two sides in English and Arabic transcripts."""

# people who take part in consultations, whose side only `speakers=` can state
_OTHERS = re.compile(
    r"(?:guest|family|mother|father|mom|mum|dad|parent|wife|husband|son|daughter|brother|sister|caregiver|carer|nurse"
    r"|interpreter|translator|pharmacist|receptionist|student|intern|resident|speaker|person|companion|relative|visitor"
    r"|الأم|الأب|أم|أب|الزوج|الزوجة|الابن|الابنة|الممرض|الممرضة|المرافق|المرافقة|الصيدلي|المتحدث)"
    r"(?:[\s_-]*(?:member|family|clinici?an|doctor|in[\s_-]law|\d{1,2}))*",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[\[<({]\s*([^\W\d_][\w .'-]{0,30}?)\s*[\])>}]\s*[:：]?[ \t]*")
_NAMED = re.compile(r"[\"'*_]*([^\W\d_][\w .'-]{0,30}?)[*_]*\s*[:：][*_]*[ \t]*")
_TITLED = re.compile(
    r"(Dr|Doctor|د|دكتور|دكتورة|الدكتور|الدكتورة|الطبيب|الطبيبة)\.?\s+[^\W\d_][\w.'-]*(?:\s+[\w.'-]+)?"
)
_ABBREVIATED = re.compile(r"(د|ط|م|Dr|Pt)\.[ \t]*[:：]?[ \t]+")  # د. before the words of a doctor
_LINE_START = re.compile(r"^[ \t]*[-–•\"]?[ \t]*", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?؟…\"”])[ \t]+(?=\S)")


def transcript(text: object, style: Style) -> list[Said]:
    """The turns of a dialogue in one text. A line without a name continues the turn before it.

    A name counts at the beginning of a line, and after the end of a sentence if it is capitalised; in brackets anywhere
    if the whole text is one line.

    Raises:
        ValueError: the text does not begin with a name, or another person speaks whose side is not known.
    """
    plain = tidy(text)
    cuts: dict[int, tuple[int, str]] = {}
    for match in _LINE_START.finditer(plain):
        named = _name_at(plain, match.end(), style)
        if named is not None:
            cuts[match.start()] = named
    for match in _SENTENCE_END.finditer(plain):
        named = None if plain[match.end()].islower() else _name_at(plain, match.end(), style)
        if named is not None and len(named[1]) > 1 and named[0] not in {end for end, _ in cuts.values()}:
            cuts[match.end()] = named
    if "\n" not in plain and plain.startswith("["):
        for match in _BRACKETED.finditer(plain):
            known = match[0][0] == "[" and speaker_name(match[1]) in style.speakers
            if known and match.end() not in {end for end, _ in cuts.values()}:
                cuts[match.start()] = (match.end(), match[1])
    starts = sorted(cuts)
    if not starts or plain[: starts[0]].strip():
        raise ValueError("the first line names no speaker")
    turns = [(cuts[at][1], plain[cuts[at][0] : end]) for at, end in zip(starts, [*starts[1:], len(plain)], strict=True)]
    return [said_by(name, said, style) for name, said in turns if said.strip()]


def _name_at(text: str, start: int, style: Style) -> tuple[int, str] | None:
    """Where the name at a position ends, and the name; None if no speaker is named there."""
    for pattern in (_BRACKETED, _NAMED):
        match = pattern.match(text, start)
        if match is None:
            continue
        name = match[1].strip()
        if speaker_name(name) in style.speakers:
            return match.end(), name
        titled = _TITLED.fullmatch(name)
        if titled is not None:
            return match.end(), titled[1]
        if _OTHERS.fullmatch(name):
            raise ValueError(f"{speaker_name(name)!r} speaks, whose side is not known; speakers= names it")
    abbreviated = _ABBREVIATED.match(text, start)
    return None if abbreviated is None else (abbreviated.end(), abbreviated[1])
