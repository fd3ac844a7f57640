"""The translation of a whole set: what it will cost, doing it, and its outcomes in the order of the input."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bimedix_jax.curation.llm import identity
from bimedix_jax.curation.llm.account import Account
from bimedix_jax.curation.llm.client import open_client
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.estimate import Estimate, Tally, is_stored
from bimedix_jax.curation.llm.request import Request, Usage, likely_tokens
from bimedix_jax.curation.llm.runner import Progress, run_items
from bimedix_jax.curation.llm.store import Store
from bimedix_jax.curation.translate import judge as judging
from bimedix_jax.curation.translate import pipeline
from bimedix_jax.curation.translate.pipeline import Outcome, Settings
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

ARABIC_PER_ENGLISH = 1.6  # tokens of a translation per token of its source, by the rule of thumb of `likely_tokens`
JUDGE_REPLY_TOKENS = 60

Records = Callable[[], Iterable[Record]]


@dataclass(frozen=True)
class Job:
    """What is translated (`records` can be read as often as needed), by whom, judged by whom, and how."""

    records: Records
    translator: LlmConfig
    judge: LlmConfig
    settings: Settings

    @property
    def fingerprint(self) -> str:
        """What outcomes depend on besides records and replies: settings, models, prompts, and the code that decides."""
        parts = [
            dataclasses.asdict(self.settings),
            identity.of_model(self.translator),
            identity.of_model(self.judge),
            identity.of_code(("checks", "translate")),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What each translation says of how it came about, the same for all."""
        return {
            "translator": self.translator.model,
            "judge": self.judge.model,
            "translate_prompts": self.settings.translate.hash[:16],
            "judge_prompts": self.settings.judge.hash[:16],
        }


@dataclass(frozen=True)
class Forecast:
    """Records in all, those that earlier runs finished, and what the others will ask."""

    records: int
    finished: int
    estimates: tuple[Estimate, ...]


def forecast(job: Job, store: Store) -> Forecast:
    """What a run would ask for. At least: one translation and one judgement of each record that is not finished, where
    they are not in the store. At most: all rounds, each with its judgement.

    Raises:
        BimedixError: two records have the same id, or one is not English.
    """
    rounds = job.settings.rounds
    seen: set[str] = set()
    finished = 0
    fingerprint = job.fingerprint
    sums = {stage: Tally() for stage in (pipeline.STAGE, "refine", judging.STAGE)}
    for record in job.records():
        _check(record, seen)
        if store.result(pipeline.result_key(record, fingerprint)) is not None:
            finished += 1
            continue
        asked = pipeline.first_requests(record, job.settings)
        if asked is None:
            continue
        first, judged = asked
        prompt, source = _tokens(first), likely_tokens(first.messages[1]["content"])
        reply = round(ARABIC_PER_ENGLISH * source)
        known = is_stored(first, job.translator, store)
        sums[pipeline.STAGE].add(Usage(prompt, 0, reply), 0 if known else 1, 0 if known else 1)
        sums["refine"].add(Usage(prompt + reply, 0, reply), 0, rounds)
        judged_prompt = _tokens(judged) + reply - source
        sums[judging.STAGE].add(Usage(judged_prompt, 0, JUDGE_REPLY_TOKENS), 0 if known else 1, rounds + 1)
    if not seen:
        raise BimedixError("the sources hold no English record: name others, there is nothing to translate")
    estimates = [
        sums[stage].estimate(stage, job.judge if stage == judging.STAGE else job.translator)
        for stage in sums
        if sums[stage].high_requests
    ]
    return Forecast(len(seen), finished, tuple(estimates))


def _tokens(request: Request) -> int:
    return sum(likely_tokens(message["content"]) for message in request.messages)


def _check(record: Record, seen: set[str]) -> None:
    if record.id in seen:
        raise BimedixError(f"two records have the id {record.id!r}; give each its own, or name the source once")
    if record.language != "en":
        raise BimedixError(
            f"record {record.id!r} is {record.language!r}, and only English is translated; leave it out of the sources"
        )
    seen.add(record.id)


async def translate(job: Job, account: Account, total: int) -> Progress:
    """Work out the outcome of every record that the store does not have.

    Raises:
        Stopped: see `runner.run_items`.
    """
    fingerprint = job.fingerprint
    async with open_client(job.translator, account) as translator, open_client(job.judge, account) as judge:

        async def work(record: Record) -> str:
            outcome = await pipeline.translate_record(record, translator, judge, job.settings)
            return outcome.model_dump_json(by_alias=True)

        items = ((record.id, pipeline.result_key(record, fingerprint), record) for record in job.records())
        return await run_items(items, work, account, (translator, judge), total, "translating")


def outcomes(job: Job, store: Store) -> Callable[[], Iterator[tuple[Record, Outcome | None]]]:
    """Reads each record with its outcome, in the order of the input; None where it got no answer."""
    fingerprint = job.fingerprint

    def read() -> Iterator[tuple[Record, Outcome | None]]:
        for record in job.records():
            value = store.result(pipeline.result_key(record, fingerprint))
            yield record, None if value is None else Outcome.model_validate_json(value)

    return read
