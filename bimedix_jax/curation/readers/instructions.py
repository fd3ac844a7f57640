"""Instructions with input and output: ChatDoctor, HealthCareMagic and the instructions of PMC-LLaMA."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers.exams import DECISIONS, multiple_choice
from bimedix_jax.curation.readers.reading import Reading
from bimedix_jax.curation.readers.rows import Place, Row, build_all, optional, row_id, rows, said, split_for, tidy
from bimedix_jax.data.records import ANSWER_PREFIX, LETTERS, Record, Split, conversation
from bimedix_jax.errors import BimedixError


def chatdoctor(
    place: Place,
    quarantine: Quarantine,
    *,
    licence: str = "not stated",
    source: str = "chatdoctor",
    reading: Reading | None = None,
) -> Iterator[Record]:
    """ChatDoctor (Li et al. 2023) and data sets of the same form: {instruction, input, output}.

    iCliniq's rows have `answer_icliniq` instead of `output`. The instruction "If you are a doctor, ..." is the same in
    every row and is left out; any other instruction is put before the input. The kind is qa, since there is one
    question and one answer (Table 1 of the paper).
    """

    how, account = reading or Reading(), quarantine.account

    def make(row: Row, fields: dict[str, Any]) -> Record:
        instruction, patient = optional(fields.get("instruction")), optional(fields.get("input"))
        if patient and instruction.casefold().startswith("if you are a doctor"):
            instruction = ""
        answer = tidy(how.reply(fields["output"] if "output" in fields else fields["answer_icliniq"]))
        asked = "\n".join(text for text in (instruction, patient) if text)
        return Record(
            id=row_id(source, row),
            language=how.spoken(patient, instruction, answer),
            kind="qa",
            source=source,
            licence=licence,
            split=split_for(row, how, account),
            conversations=conversation(asked, answer),
        )

    yield from build_all(source, rows(place, reading=how, account=account), quarantine, make, how)


# `source` field -> part of the record's source: the two UMLS subsets are counted together, as on the card
PMC_LLAMA = {
    "medqa_train": "medqa",
    "medmcqa": "medmcqa",
    "pubmedqa.ori_pqaa": "pubmedqa",
    "liveqa": "liveqa",
    "medicationqa": "medicationqa",
    "umls": "umls",
    "umls_relation": "umls",
}

_SECTION = re.compile(r"###\s*([A-Za-z][A-Za-z ]*?)\s*:")
_OPTION = re.compile(r"^\s*([A-J])\s*[.):]\s*(.*)$")
_LETTER = re.compile(r"^\s*OPTION\s+([A-J])\b", re.IGNORECASE)


def pmc_llama(
    place: Place,
    quarantine: Quarantine,
    *,
    licence: str = "openrail",
    instruction: str = "keep",
    reading: Reading | None = None,
) -> Iterator[Record]:
    """PMC-LLaMA's instructions (Wu et al. 2023): {source, instruction, input, output, sample_id}, 513,999 rows.

    Inputs and outputs consist of sections such as `###Question:`, `###Options:`, `###Rationale:`, `###Answer:`. Rows
    with options are mcqa. Rows of PubMedQA with a decision are mcqa too: the paper's 413.6 K multiple-choice samples
    include them. Instructions differ in wording and state whether reasons are wanted, so they are kept.
    `instruction=drop` leaves them out; a question that occurs with two instructions is then a duplicate.
    """
    if instruction not in ("keep", "drop"):
        raise BimedixError(f"instruction={instruction} is neither keep nor drop")
    how, account = reading or Reading(), quarantine.account

    def make(row: Row, fields: dict[str, Any]) -> Record:
        subset = PMC_LLAMA[fields["source"]]
        asked, answered = _sections(fields["input"]), _sections(fields["output"])
        told = optional(fields.get("instruction")) if instruction == "keep" else ""
        source, side = f"pmc_llama/{subset}", split_for(row, how, account, otherwise="train")
        found = _Parts(row_id(source, row), source, licence, told, asked, answered, side, how)
        if "options" in asked:
            return _with_options(found)
        return _free(found) if subset != "pubmedqa" else _with_decision(found)

    for row in rows(place, reading=how, account=account):
        subset = _subset(row)
        yield from build_all("pmc_llama" if subset is None else f"pmc_llama/{subset}", [row], quarantine, make, how)


@dataclass(frozen=True)
class _Parts:
    """A row of PMC-LLaMA. `asked` and `answered` are the sections of its input and of its output."""

    id: str
    source: str
    licence: str
    instruction: str
    asked: dict[str, str]
    answered: dict[str, str]
    split: Split | None
    how: Reading

    @property
    def question(self) -> str:
        """The question without options and context."""
        return self.asked.get("question") or self.asked.get("", "")

    @property
    def reasons(self) -> str:
        """The explanation of the answer."""
        return self.answered.get("rationale") or self.answered.get("", "")

    def record(self, human: str, gpt: str, decision: str | None = None) -> Record:
        """A record without options."""
        self.how.reply(gpt)
        return Record(
            id=self.id,
            language=self.how.spoken(self.question, human, gpt),
            kind="qa" if decision is None else "mcqa",
            source=self.source,
            licence=self.licence,
            split=self.split,
            conversations=conversation(f"{self.instruction}\n{human}" if self.instruction else human, gpt),
            choices=None if decision is None else DECISIONS,
            answer=None if decision is None else DECISIONS.index(decision),
            provenance={"question": self.question},
        )


def _subset(row: Row) -> str | None:
    """The subset under which a row is counted; None if it is unknown, in which case `make` rejects the row."""
    try:
        return PMC_LLAMA.get(row.fields().get("source"))  # pyright: ignore[reportArgumentType] (None is none of them)
    except (ValueError, TypeError):
        return None


def _with_options(parts: _Parts) -> Record:
    choices = _options(parts.asked["options"])
    letter = _LETTER.match(parts.answered.get("answer", ""))
    if letter is None:
        raise ValueError(f"the answer names no option: {parts.answered.get('answer', '')[:60]!r}")
    return multiple_choice(
        parts.id,
        parts.source,
        parts.licence,
        parts.question,
        choices,
        LETTERS.index(letter[1].upper()),
        {},
        parts.split,
        parts.how,
        explanation=parts.reasons,
        instruction=parts.instruction,
    )


def _with_decision(parts: _Parts) -> Record:
    """PubMedQA: context and question -> yes, no or maybe with reasons. A row without decision is an open question."""
    context = parts.asked.get("context")
    human = f"Abstract: {context}\nQuestion: {parts.question}" if context else parts.question
    decision = parts.answered.get("answer", "").strip(" .").casefold()
    if decision in DECISIONS:
        line = f"{ANSWER_PREFIX['en']}{decision}"
        return parts.record(human, f"{line}\n{parts.reasons}" if parts.reasons else line, decision)
    return parts.record(human, "\n".join(text for text in parts.answered.values() if text))


def _free(parts: _Parts) -> Record:
    """An open question. Sections other than the question keep their names."""
    others = [f"{name.capitalize()}: {text}" for name, text in parts.asked.items() if name not in ("", "question")]
    human = "\n".join([text for text in (parts.asked.get(""), parts.asked.get("question")) if text] + others)
    return parts.record(human, "\n".join(text for text in parts.answered.values() if text))


def _sections(text: object) -> dict[str, str]:
    """Texts by the name of their section in lower case; text before the first section has the name ""."""
    plain = said(text)
    pieces = _SECTION.split(plain)
    found = {"": pieces[0].strip()} if pieces[0].strip() else {}
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        if name.casefold() in found:
            raise ValueError(f"there are two sections {name!r}")
        found[name.casefold()] = body.strip()
    return found


def _options(text: str) -> tuple[str, ...]:
    """Lettered options, one per line. A line without a letter continues the line before it."""
    options: list[str] = []
    for line in text.split("\n"):
        match = _OPTION.match(line)
        if match is not None and len(options) < len(LETTERS) and match[1] == LETTERS[len(options)]:
            options.append(match[2])
        elif options:
            options[-1] += f"\n{line}"
        elif line.strip():
            raise ValueError(f"options begin with {line[:40]!r}")
    return tuple(tidy(option) for option in options)
