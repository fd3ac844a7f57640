"""One task over a whole set of records: its estimate, the run, and the outcomes in the order of the input."""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.annotate.task import Outcome, Task, annotate_record
from bimedix_jax.curation.llm.account import Account
from bimedix_jax.curation.llm.client import open_client
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.estimate import Estimate, Tally, is_stored
from bimedix_jax.curation.llm.request import Usage, likely_tokens
from bimedix_jax.curation.llm.runner import Progress, run_items
from bimedix_jax.curation.llm.store import Store
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

JUDGE_REPLY_TOKENS = 60
SAME_TEXT = "another question has the same words"

Outcomes = Callable[[], Iterator[tuple[Record, Any]]]
"""Reads each record with its `Outcome`, None where it got no answer, in the order of the input."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Which records (`records` may be called several times), what to do with them, and with which models."""

    records: Callable[[], Iterable[Record]]
    task: Task[Any]
    writer: LlmConfig
    judge: LlmConfig

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of what outcomes depend on besides records and replies: options, prompts, models, version of the rules.

        Rules count by their version and not by their source, so that a new comment leaves all outcomes valid.
        """
        parts = [
            *(self.task.stages[0], self.task.version, dataclasses.asdict(self.task)),
            *(self.writer.reply_fields(), self.judge.reply_fields()),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def result_key(self, record: Record) -> str:
        """The key under which the store keeps a record's outcome."""
        return hashlib.sha256(f"{self.task.stages[0]}\0{self.fingerprint}\0{record.to_json()}".encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Models and prompts, added to the provenance of every record that is written."""
        writer, prompts = self.task.provenance_names
        return {
            writer: self.writer.model,
            "judge": self.judge.model,
            prompts: self.task.prompts.hash[:16],
            "judge_prompts": self.task.judge_prompts.hash[:16],
        }


def select(job: Job, left_out: Counter[str] | None = None) -> Iterator[Record]:
    """The records to annotate; `left_out` counts the others by reason.

    Raises:
        BimedixError: two records have the same id.
    """
    ids: set[int] = set()
    texts: set[int] = set()
    for record in job.records():
        name = fingerprints.digest(record.id)
        if name in ids:
            raise BimedixError(f"two records have the id {record.id!r}; give each its own, or name the source once")
        ids.add(name)
        reason = job.task.unsuitable(record)
        if reason is None and (text := job.task.same_text(record)) is not None:
            reason = SAME_TEXT if text in texts else None
            texts.add(text)
        if reason is None:
            yield record
        elif left_out is not None:
            left_out[reason] += 1


@dataclass(frozen=True)
class Forecast:
    """How many records there are, how many earlier runs finished, and what the others will ask.

    `exchanges` counts those of all conversations that come out; `left_out` counts unsuitable records by reason.
    """

    records: int
    finished: int
    exchanges: int
    left_out: Counter[str]
    estimates: tuple[Estimate, ...]


def forecast(job: Job, store: Store) -> Forecast:
    """What a run would ask for.

    At least: for each record that is not finished, one draft and its judgement where they are not in the store.
    At most: all rounds, each with its judgement.

    Raises:
        BimedixError: no record can be annotated, or two have the same id.
    """
    task = job.task
    number, finished, exchanges = 0, 0, 0
    left_out: Counter[str] = Counter()
    writing, revision, judgement = tallies = (Tally(), Tally(), Tally())
    for record in select(job, left_out):
        number += 1
        exchanges += task.exchanges(record)
        if store.result(job.result_key(record)) is not None:
            finished += 1
            continue
        case = task.case(record)
        if case.without_requests() is not None:
            continue
        request = case.write_request(0, (), None)
        reply, judged = case.likely_usage(request)
        prompt = sum(likely_tokens(message["content"]) for message in request.messages)
        first = 0 if is_stored(request, job.writer, store) else 1
        writing.add(Usage(prompt, 0, reply), first, first)
        revision.add(Usage(prompt + reply, 0, reply), 0, task.rounds)
        judgement.add(Usage(judged, 0, JUDGE_REPLY_TOKENS), first, task.rounds + 1)
    if not number:
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in left_out.most_common(3))
        raise BimedixError(f"{task.nothing_to_do} ({reasons or 'the sources are empty'}); name other sources")
    estimates = [
        tally.estimate(stage, job.judge if tally is judgement else job.writer)
        for stage, tally in zip(task.stages, tallies, strict=True)
        if tally.high_requests
    ]
    return Forecast(number, finished, exchanges, left_out, tuple(estimates))


async def annotate(job: Job, account: Account, total: int) -> Progress:
    """Compute the outcome of every record that the store does not have.

    Raises:
        Stopped: see `runner.run_items`.
    """
    async with open_client(job.writer, account) as writer, open_client(job.judge, account) as judge:

        async def work(record: Record) -> str:
            return (await annotate_record(job.task, record, writer, judge)).model_dump_json(by_alias=True)

        items = ((record.id, job.result_key(record), record) for record in select(job))
        return await run_items(items, work, account, (writer, judge), total, job.task.progress)


def outcomes(job: Job, store: Store) -> Outcomes:
    """A function that reads the outcomes from the store."""

    def read() -> Iterator[tuple[Record, Outcome[Any] | None]]:
        for record in select(job):
            value = store.result(job.result_key(record))
            yield record, None if value is None else job.task.outcome.model_validate_json(value)

    return read
