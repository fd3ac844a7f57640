"""What the two annotation tasks share for one record: write a draft, judge it, revise it, keep the best one.

The outcome is a function of the record, the task and the replies. All replies are in the store, so a run that was
killed and resumed computes the same outcome.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from bimedix_jax.curation.llm.client import Client
from bimedix_jax.curation.llm.outcomes import LENGTH
from bimedix_jax.curation.llm.prompts import Prompts
from bimedix_jax.curation.llm.request import Reply, Request
from bimedix_jax.data.records import Record

V = TypeVar("V", bound=BaseModel)
Accept = Callable[[Any], str | None]  # see Request.accept

MOST_PROBLEMS = 5  # of the problems that a judge lists
JUDGE_MAX_TOKENS = 600  # five problems of a sentence each and a number
FIRST, REVISION, JUDGE = range(3)  # indices of `Task.stages`


class Outcome(BaseModel, Generic[V]):
    """The result for one record. `best` is the index of the best of `versions`, None if none could be read."""

    model_config = ConfigDict(extra="forbid")

    versions: tuple[V, ...]
    best: int | None
    accepted: bool

    @property
    def version(self) -> V | None:
        """The best version."""
        return None if self.best is None else self.versions[self.best]


@dataclass(frozen=True)
class Draft(Generic[V]):
    """The result of one round: the version that is stored, what the model wrote, and its faults in words.

    `content` is None where the reply could not be used. A higher `rank` is better; `good` means accepted.
    """

    version: V
    content: Any = None
    faults: tuple[str, ...] = ()
    rank: tuple[float, ...] = ()
    good: bool = False


@dataclass(frozen=True, kw_only=True)
class Task(ABC, Generic[V]):
    """What `translate` and `chats` differ in: prompts, rules, and how an answer becomes a record.

    `threshold` is the lowest accepted score, `rounds` the number of revisions after the first draft, `max_tokens` the
    limit of a reply. A temperature of None is not sent.
    """

    version: ClassVar[int]  # of the rules: raise it with their behaviour, see tests/curation/test_annotate_versions.py
    stages: ClassVar[tuple[str, str, str]]  # first draft, revision and judgement, in ledger and estimate
    keeps_rejected: ClassVar[bool]  # the best version is of use even if it is not accepted
    outcome: ClassVar[type[Outcome[Any]]]
    provenance_names: ClassVar[tuple[str, str]]  # fields for the writer's model and for the hash of its prompts
    system_values: ClassVar[Mapping[str, str]] = {}  # for the system prompts
    items: ClassVar[str]  # this and the following are words for messages
    products: ClassVar[str]
    progress: ClassVar[str]
    nothing_to_do: ClassVar[str]
    give_up: ClassVar[str]  # what --give-up does with records without an answer

    threshold: float
    rounds: int
    max_tokens: int
    temperature: float | None
    judge_temperature: float | None = 0.0
    prompts: Prompts
    judge_prompts: Prompts

    @abstractmethod
    def unsuitable(self, record: Record) -> str | None:
        """Why a record cannot be annotated, or None."""

    @abstractmethod
    def case(self, record: Record) -> "Case[V]":
        """The requests for a record, and how to read their replies."""

    def same_text(self, record: Record) -> int | None:
        """A hash that records with the same text share: only the first is used. None: use all."""
        del record
        return None

    def exchanges(self, record: Record) -> int:
        """Exchanges (a turn and its reply) of the conversation that comes out."""
        return len(record.conversations) // 2


@dataclass(frozen=True)
class Case(ABC, Generic[V]):
    """One record of a task: the requests it needs, and what their replies amount to."""

    task: Task[V]
    record: Record

    def request(
        self, stage: int, number: int, user: str, schema: type[BaseModel], accept: Accept, max_tokens: int
    ) -> Request:
        """The request of a stage (an index of `task.stages`) with the prompt `user`."""
        task = self.task
        prompts = task.judge_prompts if stage == JUDGE else task.prompts
        system = prompts.render("system", **task.system_values)
        return Request(
            stage=task.stages[stage],
            item=self.record.id,
            round=number,
            messages=({"role": "system", "content": system}, {"role": "user", "content": user}),
            prompt_hash=prompts.hash,
            max_tokens=max_tokens,
            temperature=task.judge_temperature if stage == JUDGE else task.temperature,
            schema=schema,
            accept=accept,
        )

    def without_requests(self) -> Outcome[V] | None:
        """The outcome of a record that needs no request, or None."""
        return None

    @abstractmethod
    def write_request(
        self, number: int, drafts: Sequence[Draft[V]], best: int | None, max_tokens: int | None = None
    ) -> Request:
        """The request of round `number`: a first draft, or a revision of `drafts[best]`.

        `max_tokens` replaces the limit that is estimated from the length of the record.
        """

    @abstractmethod
    def judge_request(self, content: Any, number: int) -> Request:
        """The request to score what round `number` wrote."""

    @abstractmethod
    def likely_usage(self, first: Request) -> tuple[int, int]:
        """Likely tokens of the reply to the first request, and of the prompt of its judgement."""

    @abstractmethod
    def failed(self, number: int, failure: str) -> V:
        """The version of a round without a usable reply."""

    def content(self, parsed: Any) -> Any:
        """What a reply wrote. Two rounds with equal content end the revisions."""
        return parsed

    @abstractmethod
    def assess(self, content: Any, number: int, judgement: Reply, model: str) -> Draft[V]:
        """The draft with everything that rules and judge found; `model` wrote it."""


async def annotate_record(task: Task[V], record: Record, writer: Client, judge: Client) -> Outcome[V]:
    """Write, judge and revise until a version is accepted or the rounds are used up.

    Raises:
        Unanswered, Stopped: see Client.ask.
    """
    case = task.case(record)
    if (outcome := case.without_requests()) is not None:
        return outcome
    drafts: list[Draft[V]] = []
    best: int | None = None
    for number in range(task.rounds + 1):
        request = case.write_request(number, drafts, best)
        reply = await writer.ask(request)
        if reply.failure == LENGTH and request.max_tokens < task.max_tokens:  # cut off: ask again with the full limit
            reply = await writer.ask(case.write_request(number, drafts, best, task.max_tokens))
        if not reply.ok:
            drafts.append(Draft(case.failed(number, reply.failure or "")))
            if reply.failure == LENGTH or (best is not None and task.keeps_rejected):
                break
            continue
        content = case.content(reply.parsed)
        if any(content == draft.content for draft in drafts):
            break  # the model repeats itself
        judgement = await judge.ask(case.judge_request(content, number))
        drafts.append(case.assess(content, number, judgement, writer.config.model))
        if best is None or drafts[-1].rank > drafts[best].rank:
            best = len(drafts) - 1
        if drafts[-1].good:
            break
    accepted = best is not None and drafts[best].good
    return task.outcome(versions=tuple(draft.version for draft in drafts), best=best, accepted=accepted)
