"""One question: write its chat, check it by rule and by judge, write it again while that is not enough.

The judge sees the question and its choices without the key, and says which choice the doctor arrived at: it cannot
agree out of politeness. The answer is preserved where that is the right one and the rules agree.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from bimedix_jax.curation.chats.rules import Dialogue, Problem, problems, why_no_dialogue
from bimedix_jax.curation.chats.shapes import Plan, Style, draw
from bimedix_jax.curation.llm.client import Client
from bimedix_jax.curation.llm.outcomes import LENGTH
from bimedix_jax.curation.llm.prompts import Prompts, fence
from bimedix_jax.curation.llm.request import Reply, Request
from bimedix_jax.curation.llm.scores import parse_score
from bimedix_jax.data.records import LETTERS, Record, Turn, multiple_choice_answer, multiple_choice_question

STAGE, JUDGE = "chats", "chats_judge"
TOKENS_PER_EXCHANGE = 400  # room in the reply, Arabic and JSON included; the paper's have 85 (English), Table 7
TOKENS_AT_LEAST = 600
JUDGE_TOKENS = 600


class Judgement(BaseModel):
    """What the judge returns; `parse_score` says which scores are scores."""

    model_config = ConfigDict(
        json_schema_serialization_defaults_required=True, json_schema_extra={"additionalProperties": False}
    )

    choice: StrictStr
    problems: list[str] = Field(default_factory=list)
    score: StrictInt | StrictFloat | StrictStr


class Try(BaseModel):
    """One chat that was written, and what was found: by rule (`problems`), by judge (`choice`, `score`, `said`)."""

    model_config = ConfigDict(extra="forbid")

    round: int
    dialogue: Dialogue | None
    problems: tuple[Problem, ...] = ()
    choice: str | None = None
    score: float | None = None
    said: tuple[str, ...] = ()
    failure: str = ""


class Outcome(BaseModel):
    """What became of a question: the tries, and the index of the one that is accepted."""

    model_config = ConfigDict(extra="forbid")

    tries: tuple[Try, ...]
    accepted: int | None

    def reasons(self) -> list[str]:
        """Why the last try is not accepted, in words; nothing where one is."""
        if self.accepted is not None or not self.tries:
            return []
        return [self.tries[-1].failure, *self.tries[-1].said]


@dataclass(frozen=True)
class Settings:
    """How chats are written: `rounds` is how often one may be written again, `threshold` the judge's least score."""

    style: Style
    threshold: float
    rounds: int
    max_tokens: int
    temperature: float | None
    write: Prompts
    judge: Prompts


async def write_chat(record: Record, writer: Client, judge: Client, settings: Settings) -> Outcome:
    """The chat of one question that `rules.unsuitable` lets through.

    Raises:
        Unanswered, Stopped: see Client.ask.
    """
    plan = draw(record, settings.style)
    tries: list[Try] = []
    for number in range(settings.rounds + 1):
        reply = await _write(record, plan, number, tries, writer, settings)
        if not reply.ok:
            tries.append(Try(round=number, dialogue=None, failure=f"no chat: {reply.failure}"))
            if reply.failure == LENGTH:
                break
            continue
        dialogue: Dialogue = reply.parsed
        if any(other.dialogue == dialogue for other in tries):
            break  # it has nothing better to say
        tries.append(await _assess(record, plan, dialogue, number, judge, settings))
        if not tries[-1].failure:
            return Outcome(tries=tuple(tries), accepted=len(tries) - 1)
    return Outcome(tries=tuple(tries), accepted=None)


async def _write(
    record: Record, plan: Plan, number: int, tries: list[Try], writer: Client, settings: Settings
) -> Reply:
    """A reply with a consultation; where it was cut off, once more with the most room there is."""
    request = write_request(record, plan, number, tries, settings)
    reply = await writer.ask(request)
    if reply.failure == LENGTH and request.max_tokens < settings.max_tokens:
        reply = await writer.ask(write_request(record, plan, number, tries, settings, settings.max_tokens))
    return reply


def write_request(
    record: Record, plan: Plan, number: int, tries: list[Try], settings: Settings, max_tokens: int | None = None
) -> Request:
    """What is asked in a round: a chat, or the last one that could be read without its faults."""
    question = fence("question", _question(record, with_key=True))
    shape = fence("plan", json.dumps({"turns": plan.turns()}, indent=1))
    last = next((one for one in reversed(tries) if one.dialogue is not None), None)
    if last is None or last.dialogue is None:
        user = settings.write.render("chat", question=question, plan=shape)
    else:
        user = settings.write.render(
            "revise",
            question=question,
            plan=shape,
            dialogue=fence("dialogue", _shown(last.dialogue)),
            problems=[*map(str, last.problems), *_about(last, record), *last.said],
            score="" if last.score is None else f"{last.score:g}",
            threshold=f"{settings.threshold:g}",
        )
    room = TOKENS_AT_LEAST + TOKENS_PER_EXCHANGE * plan.exchanges
    return Request(
        stage=STAGE,
        item=record.id,
        round=number,
        messages=(
            {"role": "system", "content": settings.write.render("system")},
            {"role": "user", "content": user},
        ),
        prompt_hash=settings.write.hash,
        max_tokens=min(settings.max_tokens, max_tokens or room),
        temperature=settings.temperature,
        schema=Dialogue,
        accept=why_no_dialogue,
    )


def judge_request(record: Record, dialogue: Dialogue, number: int, settings: Settings) -> Request:
    """The question to the judge, who is not told which choice is right."""
    user = settings.judge.render(
        "judge",
        question=fence("question", _question(record, with_key=False)),
        dialogue=fence("dialogue", _shown(dialogue)),
    )
    letters = LETTERS[: len(record.choices or ())]

    def accept(judgement: Judgement) -> str | None:
        if parse_score(judgement.score) is None:
            return f"no score from 0 to 100: {judgement.score!r}"
        return (
            None if _letter(judgement.choice, letters) else f"no choice of {', '.join(letters)}: {judgement.choice!r}"
        )

    return Request(
        stage=JUDGE,
        item=record.id,
        round=number,
        messages=({"role": "system", "content": settings.judge.render("system")}, {"role": "user", "content": user}),
        prompt_hash=settings.judge.hash,
        max_tokens=JUDGE_TOKENS,
        schema=Judgement,
        accept=accept,
    )


async def _assess(
    record: Record, plan: Plan, dialogue: Dialogue, number: int, judge: Client, settings: Settings
) -> Try:
    """A try with everything that was found; `failure` is empty where it is good enough."""
    found = tuple(problems(record, plan, dialogue))
    reply = await judge.ask(judge_request(record, dialogue, number, settings))
    if not reply.ok:
        return Try(round=number, dialogue=dialogue, problems=found, failure=f"no judgement: {reply.failure}")
    judgement: Judgement = reply.parsed
    score = parse_score(judgement.score)
    choice = _letter(judgement.choice, LETTERS[: len(record.choices or ())])
    one = Try(
        round=number,
        dialogue=dialogue,
        problems=found,
        choice=choice,
        score=score,
        said=tuple(judgement.problems[:5]),
    )
    return one.model_copy(update={"failure": "; ".join([*map(str, found), *_about(one, record, settings.threshold)])})


def _about(one: Try, record: Record, threshold: float | None = None) -> list[str]:
    """What the judge's choice and score say against a try, in words."""
    assert record.answer is not None
    said = []
    if one.choice is not None and one.choice != LETTERS[record.answer]:
        what = "no single choice" if one.choice == "none" else f"choice {one.choice}"
        said.append(f"the doctor's conclusion reads as {what}, not as {LETTERS[record.answer]}")
    if threshold is not None and (one.score is None or one.score < threshold):
        said.append(f"score {one.score} is below {threshold:g}")
    return said


def _letter(choice: str, letters: str) -> str | None:
    """`B`, `b.`, `(B)` or `none`; None for anything else."""
    bare = choice.strip().strip("().:").casefold()
    if bare == "none":
        return "none"
    return bare.upper() if len(bare) == 1 and bare.upper() in letters else None


def _question(record: Record, with_key: bool) -> str:
    """The question as it was asked, with its answer and explanation or with the bare choices."""
    asked = next(turn.value for turn in record.conversations if turn.speaker == "human")
    assert record.choices is not None
    assert record.answer is not None
    listed = multiple_choice_question("", record.choices)
    text = asked if asked.endswith(listed) else asked + listed
    if not with_key:
        return text
    answered = record.conversations[-1].value
    key = multiple_choice_answer(record.choices, record.answer, record.language)
    return "\n\n".join([text, answered] if answered.startswith(key) else [text, key, answered])


def _shown(dialogue: Dialogue) -> str:
    turns: list[dict[str, Any]] = [turn.model_dump() for turn in dialogue.turns]
    return json.dumps({"turns": turns}, ensure_ascii=False, indent=1)


def to_record(record: Record, plan: Plan, one: Try, provenance: dict[str, Any]) -> Record:
    """An accepted try as a chat, which belongs to the split and the group of its question.

    `provenance["source_id"]` is the question's id: decontamination and splits find a question's chats by it.
    """
    assert one.dialogue is not None
    speakers: dict[str, Literal["human", "gpt"]] = {"patient": "human", "doctor": "gpt"}
    turns = tuple(
        Turn.model_validate(
            {
                "from": speakers[turn.speaker],
                "value": turn.text.strip(),
                "language": None if turn.language == plan.language else turn.language,
            }
        )
        for turn in one.dialogue.turns
    )
    own = {key: record.provenance[key] for key in ("group", "pmid") if key in record.provenance}
    own = {"group": record.id, **own, "source_id": record.id, "answer_turn": plan.answer}
    if plan.switch is not None:
        own["switch_turn"] = plan.switch
    return Record(
        id=f"{record.id}/chat" + ("" if plan.language == record.language else f"-{plan.language}"),
        language=plan.language,
        kind="chat",
        source=record.source,
        licence=record.licence,
        specialty=record.specialty,
        split=record.split,
        conversations=turns,
        provenance={**own, "chat_score": one.score, "chat_round": one.round, **provenance},
    )
