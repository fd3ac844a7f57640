"""The task `chats`: a consultation on an exam question, checked by rules and by a judge, and revised where needed.

The judge sees the question and its choices without the key, and names the choice that the doctor arrived at. Without
the key, it cannot simply agree. The chat keeps the answer if that is the right choice and the rules find no problem.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.annotate.chat_rules import Dialogue, Problem, problems, unsuitable, why_no_dialogue
from bimedix_jax.curation.annotate.chat_shapes import ChatShape, ChatStyle, draw
from bimedix_jax.curation.annotate.task import FIRST, JUDGE, JUDGE_MAX_TOKENS, MOST_PROBLEMS, Case, Draft, Outcome, Task
from bimedix_jax.curation.llm.prompts import fence
from bimedix_jax.curation.llm.request import Reply, Request, likely_tokens
from bimedix_jax.curation.llm.scores import parse_score, why_no_score
from bimedix_jax.data.records import (
    LETTERS,
    Language,
    Record,
    Turn,
    multiple_choice_answer,
    multiple_choice_question,
)

ROOM_PER_EXCHANGE = 400  # token limit of the reply, Arabic and JSON included; the paper's have 85 (English), Table 7
ROOM_AT_LEAST = 600
# Likely tokens of an exchange in a reply: 85 in the paper's English chats (Table 7: 73.6 M / 184.8 K / 4.71) and as
# many characters in Arabic at two a token, each with 30 of JSON around its two turns
TOKENS_PER_EXCHANGE: dict[Language, int] = {"en": 115, "ar": 180}


class Judgement(BaseModel):
    """The judge's reply. Its explicit description is sent, as in translation.py."""

    model_config = ConfigDict(
        json_schema_serialization_defaults_required=True,
        json_schema_extra={
            "additionalProperties": False,
            "description": "What the judge returns; `parse_score` says which scores are scores.",
        },
    )

    choice: StrictStr
    problems: list[str] = Field(default_factory=list)
    score: StrictInt | StrictFloat | StrictStr


class ChatVersion(BaseModel):
    """One draft of a chat: `problems` by rule; `choice`, `score` and `said` by the judge.

    `failure` says why it is not accepted, and is empty where it is.
    """

    model_config = ConfigDict(extra="forbid")

    round: int
    dialogue: Dialogue | None
    problems: tuple[Problem, ...] = ()
    choice: str | None = None
    score: float | None = None
    said: tuple[str, ...] = ()
    failure: str = ""


class ChatOutcome(Outcome[ChatVersion]):
    """The drafts of a chat. `best` is the last one that could be read."""

    def reasons(self) -> list[str]:
        """Why the last draft is not accepted, in words; empty where one is."""
        last = None if self.accepted or not self.versions else self.versions[-1]
        return [] if last is None else [last.failure, *last.said]


@dataclass(frozen=True, kw_only=True)
class WriteChats(Task[ChatVersion]):
    """Accepts a chat that keeps its answer, that the rules find no problem in, and whose score is high enough."""

    version: ClassVar[int] = 1
    stages: ClassVar[tuple[str, str, str]] = ("chats", "revise", "chats_judge")
    keeps_rejected: ClassVar[bool] = False
    outcome: ClassVar[type[Outcome[Any]]] = ChatOutcome
    provenance_names: ClassVar[tuple[str, str]] = ("generator", "chat_prompts")
    items: ClassVar[str] = "questions"
    products: ClassVar[str] = "chats"
    progress: ClassVar[str] = "writing chats"
    nothing_to_do: ClassVar[str] = "there is no question to build a chat on"
    give_up: ClassVar[str] = "count them as rejected"

    style: ChatStyle = field(default_factory=ChatStyle)

    def unsuitable(self, record: Record) -> str | None:
        """See `chat_rules.unsuitable`."""
        return unsuitable(record)

    def same_text(self, record: Record) -> int | None:
        """Compares the words of the question."""
        return fingerprints.whole(fingerprints.words(_asked(record)))

    def exchanges(self, record: Record) -> int:
        """As many as are drawn for the chat."""
        return draw(record, self.style).exchanges

    def case(self, record: Record) -> Case[ChatVersion]:
        """The question with the shape of its chat."""
        return Consultation(self, record, draw(record, self.style))


@dataclass(frozen=True)
class Consultation(Case[ChatVersion]):
    """One question. The content of a draft is a `Dialogue`."""

    shape: ChatShape

    def write_request(
        self, number: int, drafts: Sequence[Draft[ChatVersion]], best: int | None, max_tokens: int | None = None
    ) -> Request:
        """A chat, or the last one that could be read with its faults."""
        task = self.task
        shown = {
            "question": fence("question", _question(self.record, with_key=True)),
            "plan": fence("plan", json.dumps({"turns": self.shape.turns()}, indent=1)),
        }
        if best is None:
            user = task.prompts.render("chat", **shown)
        else:
            score = drafts[best].version.score
            user = task.prompts.render(
                "revise",
                **shown,
                dialogue=fence("dialogue", _shown(drafts[best].content)),
                problems=drafts[best].faults,
                score="" if score is None else f"{score:g}",
                threshold=f"{task.threshold:g}",
            )
        room = max_tokens or ROOM_AT_LEAST + ROOM_PER_EXCHANGE * self.shape.exchanges
        return self.request(FIRST, number, user, Dialogue, why_no_dialogue, min(task.max_tokens, room))

    def judge_request(self, content: Dialogue, number: int) -> Request:
        """The judge is not told which choice is right."""
        user = self.task.judge_prompts.render(
            "judge",
            question=fence("question", _question(self.record, with_key=False)),
            dialogue=fence("dialogue", _shown(content)),
        )
        accept = functools.partial(_why_no_judgement, self._letters)
        return self.request(JUDGE, number, user, Judgement, accept, JUDGE_MAX_TOKENS)

    def likely_usage(self, first: Request) -> tuple[int, int]:
        """By the drawn length and languages."""
        reply = sum(TOKENS_PER_EXCHANGE[language] for language in self.shape.languages)
        return reply, sum(likely_tokens(message["content"]) for message in first.messages) // 2 + reply

    def failed(self, number: int, failure: str) -> ChatVersion:
        """A version without a chat."""
        return ChatVersion(round=number, dialogue=None, failure=f"no chat: {failure}")

    def assess(self, content: Dialogue, number: int, judgement: Reply, model: str) -> Draft[ChatVersion]:
        """The chat with the problems that the rules find, and the judge's choice and score.

        A later draft has a higher rank: each revision starts from the last chat that could be read.
        """
        del model
        found = tuple(problems(self.record, self.shape, content))
        version = ChatVersion(round=number, dialogue=content, problems=found)
        if not judgement.ok:
            failed = version.model_copy(update={"failure": f"no judgement: {judgement.failure}"})
            return Draft(failed, content, tuple(map(str, found)), rank=(number,))
        score = parse_score(judgement.parsed.score)
        choice = letter_of(judgement.parsed.choice, self._letters)
        said = tuple(judgement.parsed.problems[:MOST_PROBLEMS])
        faults = [*map(str, found), *self._another_choice(choice)]
        low = score is None or score < self.task.threshold
        failure = "; ".join([*faults, *([f"score {score} is below {self.task.threshold:g}"] if low else [])])
        judged = version.model_copy(update={"choice": choice, "score": score, "said": said, "failure": failure})
        return Draft(judged, content, (*faults, *said), rank=(number,), good=not failure)

    @property
    def _letters(self) -> str:
        return LETTERS[: len(self.record.choices or ())]

    def _another_choice(self, choice: str | None) -> list[str]:
        """A sentence where the judge read another conclusion than the right one."""
        assert self.record.answer is not None
        right = LETTERS[self.record.answer]
        if choice is None or choice == right:
            return []
        what = "no single choice" if choice == "none" else f"choice {choice}"
        return [f"the doctor's conclusion reads as {what}, not as {right}"]


def _why_no_judgement(letters: str, judgement: Judgement) -> str | None:
    if (reason := why_no_score(judgement.score)) is not None:
        return reason
    known = letter_of(judgement.choice, letters) is not None
    return None if known else f"no choice of {', '.join(letters)}: {judgement.choice!r}"


def letter_of(choice: str, letters: str) -> str | None:
    """The letter in `B`, `b.` or `(B)`; "none" for that word; None for anything else."""
    bare = choice.strip().strip("().:").casefold()
    if bare == "none":
        return "none"
    return bare.upper() if len(bare) == 1 and bare.upper() in letters else None


def _asked(record: Record) -> str:
    return next(turn.value for turn in record.conversations if turn.speaker == "human")


def _question(record: Record, with_key: bool) -> str:
    """The question as it was asked, with its answer and explanation or with the bare choices."""
    asked = _asked(record)
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
    turns = [turn.model_dump() for turn in dialogue.turns]
    return json.dumps({"turns": turns}, ensure_ascii=False, indent=1)


def to_record(record: Record, shape: ChatShape, version: ChatVersion, provenance: dict[str, Any]) -> Record:
    """An accepted version as a chat, in the split and the group of its question.

    `provenance["source_id"]` is the question's id: decontamination and splits find a question's chats by it.
    """
    assert version.dialogue is not None
    speakers: dict[str, Literal["human", "gpt"]] = {"patient": "human", "doctor": "gpt"}
    turns = tuple(
        Turn.model_validate(
            {
                "from": speakers[turn.speaker],
                "value": turn.text.strip(),
                "language": None if turn.language == shape.language else turn.language,
            }
        )
        for turn in version.dialogue.turns
    )
    own = {key: record.provenance[key] for key in ("group", "pmid") if key in record.provenance}
    own = {"group": record.id, **own, "source_id": record.id, "answer_turn": shape.answer}
    if shape.switch is not None:
        own["switch_turn"] = shape.switch
    return Record(
        id=f"{record.id}/chat" + ("" if shape.language == record.language else f"-{shape.language}"),
        language=shape.language,
        kind="chat",
        source=record.source,
        licence=record.licence,
        specialty=record.specialty,
        split=record.split,
        conversations=turns,
        provenance={**own, "chat_score": version.score, "chat_round": version.round, **provenance},
    )
