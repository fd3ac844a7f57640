"""The task `translate`: an English record into Arabic, segment by segment, scored by a judge and checked by rules."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from bimedix_jax.curation.annotate.task import (
    FIRST,
    JUDGE,
    JUDGE_MAX_TOKENS,
    MOST_PROBLEMS,
    REVISION,
    Case,
    Draft,
    Outcome,
    Task,
)
from bimedix_jax.curation.checks.api import check
from bimedix_jax.curation.llm.prompts import fence
from bimedix_jax.curation.llm.request import Reply, Request, likely_tokens
from bimedix_jax.curation.llm.scores import parse_score, why_no_score
from bimedix_jax.curation.review.items import Reason, Version
from bimedix_jax.curation.structure import Frame, lost_markup, split_record, why_incomplete
from bimedix_jax.data.records import Record

TOKENS_PER_CHARACTER = 1.25  # Arabic per character of English, with a tokenizer that knows little Arabic
TOKENS_AT_LEAST = 256
ARABIC_PER_ENGLISH = 1.6  # tokens of a translation per token of its source, both by `likely_tokens`


# The descriptions of the three schemas below are sent to the model and are part of the key of every request. They are
# given explicitly, so that a changed docstring does not make paid replies stale.


class SegmentText(BaseModel):
    """A translated segment."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"description": "A translated segment."})

    id: str
    text: str


class Segments(BaseModel):
    """The translator's reply."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"description": "What the translator returns."})

    segments: list[SegmentText]


class Judgement(BaseModel):
    """The judge's reply. `parse_score` reads the score, which models spell in many ways."""

    model_config = ConfigDict(
        # strict endpoints want every property to be "required"; a reply without problems is accepted all the same
        json_schema_serialization_defaults_required=True,
        json_schema_extra={
            "additionalProperties": False,
            "description": "What the judge returns. Models spell scores in many ways; `parse_score` says which are "
            "scores.",
        },
    )

    problems: list[str] = Field(default_factory=list)
    score: StrictInt | StrictFloat | StrictStr


class TranslationOutcome(Outcome[Version]):
    """The versions of a translation and the best of them."""

    def reason(self) -> Reason:
        """Why a person must review it."""
        version = self.version
        if version is None:
            return "no translation"
        if version.flags or version.note:
            return "flag"
        return "no score" if version.score is None else "low score"


@dataclass(frozen=True, kw_only=True)
class Translate(Task[Version]):
    """Accepts a translation with a score of at least `threshold`, no flag and no lost markup."""

    version: ClassVar[int] = 2
    stages: ClassVar[tuple[str, str, str]] = ("translate", "refine", "judge")
    keeps_rejected: ClassVar[bool] = True  # people review it
    outcome: ClassVar[type[Outcome[Any]]] = TranslationOutcome
    provenance_names: ClassVar[tuple[str, str]] = ("translator", "translate_prompts")
    system_values: ClassVar[Mapping[str, str]] = {"source_language": "English", "target_language": "Arabic"}
    items: ClassVar[str] = "records"
    products: ClassVar[str] = "translations"
    progress: ClassVar[str] = "translating"
    nothing_to_do: ClassVar[str] = "there is no English record to translate"
    give_up: ClassVar[str] = "send those records to review"

    def unsuitable(self, record: Record) -> str | None:
        """Only English is translated."""
        return None if record.language == "en" else "it is not English"

    def case(self, record: Record) -> Case[Version]:
        """The record split into segments."""
        return Translation(self, record, split_record(record))


@dataclass(frozen=True)
class Translation(Case[Version]):
    """One record. The content of a draft maps segment ids to Arabic texts."""

    frame: Frame

    def without_requests(self) -> Outcome[Version] | None:
        """A record of numbers alone is copied, and reviewed by a person, since nobody scored it."""
        if self.frame.segments:
            return None
        version = Version(round=0, translation=self._rebuild({}, "none", 0))
        return TranslationOutcome(versions=(version,), best=0, accepted=False)

    def _rebuild(self, texts: dict[str, str], model: str, number: int) -> Record:
        own = {"translation_of": self.record.id, "translator": model, "translation_round": number}
        return self.frame.rebuild(texts, own)

    def write_request(
        self, number: int, drafts: Sequence[Draft[Version]], best: int | None, max_tokens: int | None = None
    ) -> Request:
        """All segments. A revision also names the scores of the drafts after the best one.

        Without these scores, a revision that was no better would be followed by the same request.
        """
        task, segments = self.task, self.frame.segments
        source = fence("source", _segments((s.id, s.role, s.text) for s in segments))
        if best is None:
            user = task.prompts.render("translate", source=source)
        else:
            translation = _segments((s.id, s.role, drafts[best].content[s.id]) for s in segments)
            user = task.prompts.render(
                "refine",
                source=source,
                translation=fence("translation", translation),
                score=_shown(drafts[best].version),
                threshold=f"{task.threshold:g}",
                problems=drafts[best].faults,
                earlier=", ".join(_shown(draft.version) for draft in drafts[best + 1 :]),
            )
        length = sum(len(segment.text) + 40 for segment in segments)
        room = max_tokens or TOKENS_AT_LEAST + int(TOKENS_PER_CHARACTER * length)
        accept = functools.partial(_why_no_translation, self.frame)
        stage = FIRST if best is None else REVISION
        return self.request(stage, number, user, Segments, accept, min(task.max_tokens, room))

    def judge_request(self, content: dict[str, str], number: int) -> Request:
        """Source and translation of each segment side by side, as data."""
        pairs = [
            {"id": segment.id, "role": segment.role, "source": segment.text, "translation": content[segment.id]}
            for segment in self.frame.segments
        ]
        shown = json.dumps({"segments": pairs}, ensure_ascii=False, indent=1)
        user = self.task.judge_prompts.render("judge", pairs=fence("pairs", shown))
        return self.request(JUDGE, number, user, Judgement, _why_no_judgement, JUDGE_MAX_TOKENS)

    def likely_usage(self, first: Request) -> tuple[int, int]:
        """By the length of the source; the judge reads the source and the translation."""
        source = likely_tokens(first.messages[1]["content"])
        reply = round(ARABIC_PER_ENGLISH * source)
        copied = self.judge_request({segment.id: segment.text for segment in self.frame.segments}, 0)
        return reply, sum(likely_tokens(message["content"]) for message in copied.messages) + reply - source

    def failed(self, number: int, failure: str) -> Version:
        """A version without a translation."""
        return Version(round=number, note=f"no translation: {failure}")

    def content(self, parsed: Segments) -> dict[str, str]:
        """Segment id -> Arabic text."""
        return {item.id: item.text.strip() for item in parsed.segments}

    def assess(self, content: dict[str, str], number: int, judgement: Reply, model: str) -> Draft[Version]:
        """The Arabic record with its flags, lost markup and score.

        One without faults is better than one with. Then the score decides; no score is the lowest and never good.
        """
        translation = self._rebuild(content, model, number)
        flags = tuple(check(self.record, translation))
        markup = lost_markup(self.frame, content)
        score, problems = None, []
        if judgement.ok:
            score, problems = parse_score(judgement.parsed.score), judgement.parsed.problems[:MOST_PROBLEMS]
        version = Version(round=number, translation=translation, score=score, flags=flags, note="; ".join(markup))
        faultless, faults = not flags and not markup, (*map(str, flags), *markup, *problems)
        good = faultless and score is not None and score >= self.task.threshold
        return Draft(version, content, faults, rank=(faultless, -1.0 if score is None else score), good=good)


def _why_no_judgement(judgement: Judgement) -> str | None:
    return why_no_score(judgement.score)


def _why_no_translation(frame: Frame, reply: Segments) -> str | None:
    texts = {item.id: item.text for item in reply.segments}
    return why_incomplete(frame, texts, len(reply.segments) - len(texts))


def _shown(version: Version) -> str:
    return "none that could be read" if version.score is None else f"{version.score:g}"


def _segments(rows: Iterable[tuple[str, str, str]]) -> str:
    listed = [{"id": name, "role": role, "text": text} for name, role, text in rows]
    return json.dumps({"segments": listed}, ensure_ascii=False, indent=1)
