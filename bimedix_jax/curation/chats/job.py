"""Chats for a whole set of questions: what they will cost, writing them, their outcomes in the order of the input."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.chats import pipeline
from bimedix_jax.curation.chats.pipeline import Outcome, Settings
from bimedix_jax.curation.chats.rules import unsuitable
from bimedix_jax.curation.chats.shapes import draw
from bimedix_jax.curation.llm import identity
from bimedix_jax.curation.llm.account import Account
from bimedix_jax.curation.llm.client import open_client
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.estimate import Estimate, Tally, is_stored
from bimedix_jax.curation.llm.request import Usage, likely_tokens
from bimedix_jax.curation.llm.runner import Progress, run_items
from bimedix_jax.curation.llm.store import Store
from bimedix_jax.data.records import Language, Record
from bimedix_jax.errors import BimedixError

# Tokens of an exchange in a reply: 85 in the paper's English chats (Table 7: 73.6 M / 184.8 K / 4.71) and as many
# characters in Arabic at two a token, each with 30 of JSON around its two turns
TOKENS_PER_EXCHANGE: dict[Language, int] = {"en": 115, "ar": 180}
JUDGE_REPLY_TOKENS = 60
SAME_QUESTION = "another question has the same words"


@dataclass(frozen=True)
class Job:
    """Which questions (`records` can be read as often as needed), who writes, who judges, and how."""

    records: Callable[[], Iterable[Record]]
    writer: LlmConfig
    judge: LlmConfig
    settings: Settings

    @property
    def fingerprint(self) -> str:
        """What outcomes depend on besides records and replies: settings, models, prompts, and the code that decides."""
        parts = [
            dataclasses.asdict(self.settings),
            identity.of_model(self.writer),
            identity.of_model(self.judge),
            identity.of_code(("checks", "chats")),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What each chat says of how it came about, the same for all."""
        return {
            "generator": self.writer.model,
            "judge": self.judge.model,
            "chat_prompts": self.settings.write.hash[:16],
            "judge_prompts": self.settings.judge.hash[:16],
        }


def questions(job: Job, left_out: Counter[str] | None = None) -> Iterator[Record]:
    """The records that a chat is built on, each question once; `left_out` counts the others by reason.

    Raises:
        BimedixError: two records have the same id.
    """
    ids: set[int] = set()
    asked: set[int] = set()
    for record in job.records():
        name = fingerprints.digest(record.id)
        if name in ids:
            raise BimedixError(f"two records have the id {record.id!r}; give each its own, or name the source once")
        ids.add(name)
        reason = unsuitable(record)
        if reason is None:
            human = next(turn.value for turn in record.conversations if turn.speaker == "human")
            text = fingerprints.whole(fingerprints.words(human))
            reason = SAME_QUESTION if text in asked else None
            asked.add(text)
        if reason is None:
            yield record
        elif left_out is not None:
            left_out[reason] += 1


@dataclass(frozen=True)
class Forecast:
    """Questions in all, those that earlier runs finished, exchanges planned in all, and what the others will ask."""

    questions: int
    finished: int
    exchanges: int
    left_out: Counter[str]
    estimates: tuple[Estimate, ...]


def forecast(job: Job, store: Store) -> Forecast:
    """What a run would ask for. At least: each chat once and one judgement. At most: all rounds, each judged.

    Raises:
        BimedixError: no question is left, or two records have the same id.
    """
    rounds = job.settings.rounds
    fingerprint = job.fingerprint
    number, finished, exchanges = 0, 0, 0
    left_out: Counter[str] = Counter()
    tallies = {stage: Tally() for stage in (pipeline.STAGE, "revise", pipeline.JUDGE)}
    for record in questions(job, left_out):
        number += 1
        plan = draw(record, job.settings.style)
        exchanges += plan.exchanges
        if store.result(result_key(record, fingerprint)) is not None:
            finished += 1
            continue
        request = pipeline.write_request(record, plan, 0, [], job.settings)
        first = 0 if is_stored(request, job.writer, store) else 1
        prompt = sum(likely_tokens(message["content"]) for message in request.messages)
        reply = sum(TOKENS_PER_EXCHANGE[language] for language in plan.languages)
        tallies[pipeline.STAGE].add(Usage(prompt, 0, reply), first, first)
        tallies["revise"].add(Usage(prompt + reply, 0, reply), 0, rounds)
        tallies[pipeline.JUDGE].add(Usage(prompt // 2 + reply, 0, JUDGE_REPLY_TOKENS), first, rounds + 1)
    if not number:
        said = "; ".join(f"{count:,}: {reason}" for reason, count in left_out.most_common(3))
        raise BimedixError(f"no question to build a chat on ({said or 'the sources are empty'}); name other sources")
    estimates = [
        tally.estimate(stage, job.judge if stage == pipeline.JUDGE else job.writer)
        for stage, tally in tallies.items()
        if tally.high_requests
    ]
    return Forecast(number, finished, exchanges, left_out, tuple(estimates))


def result_key(record: Record, fingerprint: str) -> str:
    """The key under which a question's outcome is kept."""
    return hashlib.sha256(f"{pipeline.STAGE}\0{fingerprint}\0{record.to_json()}".encode()).hexdigest()


async def write_chats(job: Job, account: Account, total: int) -> Progress:
    """Work out the outcome of every question that the store does not have.

    Raises:
        Stopped: see `runner.run_items`.
    """
    fingerprint = job.fingerprint
    async with open_client(job.writer, account) as writer, open_client(job.judge, account) as judge:

        async def work(record: Record) -> str:
            return (await pipeline.write_chat(record, writer, judge, job.settings)).model_dump_json()

        items = ((record.id, result_key(record, fingerprint), record) for record in questions(job))
        return await run_items(items, work, account, (writer, judge), total, "writing chats")


def outcomes(job: Job, store: Store) -> Iterator[tuple[Record, Outcome | None]]:
    """Each question with its outcome, in the order of the input; None where it got no answer."""
    fingerprint = job.fingerprint
    for record in questions(job):
        value = store.result(result_key(record, fingerprint))
        yield record, None if value is None else Outcome.model_validate_json(value)
