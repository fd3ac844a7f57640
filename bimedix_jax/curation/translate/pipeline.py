"""One record: translate, check, score, refine while that is not enough, and keep the best version.

What comes out is a function of the record, the settings and the replies. The replies are in the store, so a run that
was killed comes to the same.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from bimedix_jax.curation.checks.api import check
from bimedix_jax.curation.llm.client import Client
from bimedix_jax.curation.llm.outcomes import LENGTH
from bimedix_jax.curation.llm.prompts import Prompts, fence
from bimedix_jax.curation.llm.request import Reply, Request
from bimedix_jax.curation.llm.scores import parse_score
from bimedix_jax.curation.review.items import Reason, Version
from bimedix_jax.curation.translate.judge import MOST_PROBLEMS, judge_request
from bimedix_jax.curation.translate.structure import Frame, lost_markup, reason_against, take_apart
from bimedix_jax.data.records import Record

STAGE = "translate"
TOKENS_PER_CHARACTER = 1.25  # Arabic per character of English, with a tokenizer that knows little Arabic
TOKENS_AT_LEAST = 256


class SegmentText(BaseModel):
    """A translated segment."""

    model_config = ConfigDict(extra="forbid")

    id: str
    text: str


class Segments(BaseModel):
    """What the translator returns."""

    model_config = ConfigDict(extra="forbid")

    segments: list[SegmentText]


@dataclass(frozen=True)
class Settings:
    """When a translation is good enough, and how often it may be tried.

    `threshold` is the lowest score that is accepted, where the checks raise no flag and no markup is lost; `rounds` is
    how many refinements follow the first translation.
    """

    threshold: float
    rounds: int
    max_tokens: int
    temperature: float | None
    translate: Prompts
    judge: Prompts


class Outcome(BaseModel):
    """What became of a record. `best` is the index in `versions` of the one that counts, None if there is none."""

    model_config = ConfigDict(extra="forbid")

    versions: tuple[Version, ...]
    best: int | None
    accepted: bool

    @property
    def version(self) -> Version | None:
        """The version that counts."""
        return None if self.best is None else self.versions[self.best]

    def reason(self) -> Reason:
        """Why a person must look at it."""
        version = self.version
        if version is None:
            return "no translation"
        if version.flags or version.note:
            return "flag"
        return "no score" if version.score is None else "low score"


@dataclass(frozen=True)
class _Try:
    """A version with its texts by segment and what was found wrong with it, in words."""

    version: Version
    texts: dict[str, str]
    problems: list[str]


async def translate_record(record: Record, translator: Client, judge: Client, settings: Settings) -> Outcome:
    """Translate one English record.

    Raises:
        Unanswered, Stopped: see Client.ask.
    """
    frame = take_apart(record)
    if not frame.segments:
        return _nothing_to_translate(frame)
    tries: list[_Try] = []
    best: int | None = None
    for number in range(settings.rounds + 1):
        present = None if best is None else tries[best]
        earlier = [] if best is None else tries[best + 1 :]
        reply = await _translate(frame, number, present, earlier, translator, settings)
        if not reply.ok:
            tries.append(_Try(Version(round=number, note=f"no translation: {reply.failure}"), {}, []))
            if best is not None or reply.failure == LENGTH:
                break
            continue  # the next round asks anew
        texts = {item.id: item.text.strip() for item in reply.parsed.segments}
        if any(texts == other.texts for other in tries):
            break  # it has nothing better to say
        tries.append(await _assess(frame, texts, number, judge, translator.config.model, settings))
        if best is None or _rank(tries[-1].version) > _rank(tries[best].version):
            best = len(tries) - 1
        if _good_enough(tries[-1].version, settings):
            break
    accepted = best is not None and _good_enough(tries[best].version, settings)
    return Outcome(versions=tuple(item.version for item in tries), best=best, accepted=accepted)


def first_requests(record: Record, settings: Settings) -> tuple[Request, Request] | None:
    """The first translation's request, and the judge's if the translation were as long as the source.

    For estimates; None where nothing is to be translated.
    """
    frame = take_apart(record)
    if not frame.segments:
        return None
    texts = {segment.id: segment.text for segment in frame.segments}
    return _request(frame, 0, None, (), settings), judge_request(frame, texts, 0, settings.judge, settings.temperature)


def result_key(record: Record, fingerprint: str) -> str:
    """The key under which a record's outcome is kept: what it depends on besides the replies."""
    return hashlib.sha256(f"{STAGE}\0{fingerprint}\0{record.to_json()}".encode()).hexdigest()


def _rank(version: Version) -> tuple[bool, float]:
    """Better is higher: nothing found wrong first, then the score; one without a score is the worst of its kind."""
    return not version.flags and not version.note, -1.0 if version.score is None else version.score


def _good_enough(version: Version, settings: Settings) -> bool:
    """Score, flags and markup decide together; no score is never good enough."""
    return version.score is not None and version.score >= settings.threshold and not version.flags and not version.note


def _nothing_to_translate(frame: Frame) -> Outcome:
    """Numbers alone: the record as it is, for a person to look at, since nobody scored it."""
    version = Version(round=0, translation=frame.rebuild({}, _provenance(frame.record, "none", 0)))
    return Outcome(versions=(version,), best=0, accepted=False)


def _provenance(record: Record, model: str, number: int) -> dict[str, Any]:
    return {"translation_of": record.id, "translator": model, "translation_round": number}


async def _assess(
    frame: Frame, texts: dict[str, str], number: int, judge: Client, model: str, settings: Settings
) -> _Try:
    """A version with its flags and score, and all problems in words, for the next round."""
    translation = frame.rebuild(texts, _provenance(frame.record, model, number))
    flags = tuple(check(frame.record, translation))
    markup = lost_markup(frame, texts)
    reply = await judge.ask(judge_request(frame, texts, number, settings.judge, settings.temperature))
    score, said = None, []
    if reply.ok:
        score, said = parse_score(reply.parsed.score), list(reply.parsed.problems)[:MOST_PROBLEMS]
    version = Version(round=number, translation=translation, score=score, flags=flags, note="; ".join(markup))
    return _Try(version, texts, [*map(str, flags), *markup, *said])


async def _translate(
    frame: Frame,
    number: int,
    present: _Try | None,
    earlier: Sequence[_Try],
    translator: Client,
    settings: Settings,
) -> Reply:
    """A reply with all segments; where it was cut off, once more with the most room there is."""
    request = _request(frame, number, present, earlier, settings)
    reply = await translator.ask(request)
    if reply.failure == LENGTH and request.max_tokens < settings.max_tokens:
        reply = await translator.ask(_request(frame, number, present, earlier, settings, settings.max_tokens))
    return reply


def _request(
    frame: Frame,
    number: int,
    present: _Try | None,
    earlier: Sequence[_Try],
    settings: Settings,
    max_tokens: int | None = None,
) -> Request:
    """What is asked in a round. `present`: the best version so far, to be refined; `earlier`: what that came to before.

    Without `earlier`, a refinement that was no better would be followed by the same question.
    """
    source = fence("source", _segments([(s.id, s.role, s.text) for s in frame.segments]))
    if present is None:
        user = settings.translate.render("translate", source=source)
    else:
        translation = _segments([(s.id, s.role, present.texts[s.id]) for s in frame.segments])
        user = settings.translate.render(
            "refine",
            source=source,
            translation=fence("translation", translation),
            score=_shown(present.version),
            threshold=f"{settings.threshold:g}",
            problems=present.problems,
            earlier=", ".join(_shown(item.version) for item in earlier),
        )
    length = sum(len(segment.text) + 40 for segment in frame.segments)
    room = TOKENS_AT_LEAST + int(TOKENS_PER_CHARACTER * length)

    def accept(reply: Segments) -> str | None:
        texts = {item.id: item.text for item in reply.segments}
        return reason_against(frame, texts, len(reply.segments) - len(texts))

    return Request(
        stage=STAGE if present is None else "refine",
        item=frame.record.id,
        round=number,
        messages=(
            {
                "role": "system",
                "content": settings.translate.render("system", source_language="English", target_language="Arabic"),
            },
            {"role": "user", "content": user},
        ),
        prompt_hash=settings.translate.hash,
        max_tokens=min(settings.max_tokens, max_tokens or room),
        temperature=settings.temperature,
        schema=Segments,
        accept=accept,
    )


def _shown(version: Version) -> str:
    return "none that could be read" if version.score is None else f"{version.score:g}"


def _segments(rows: Sequence[tuple[str, str, str]]) -> str:
    listed = [{"id": name, "role": role, "text": text} for name, role, text in rows]
    return json.dumps({"segments": listed}, ensure_ascii=False, indent=1)
