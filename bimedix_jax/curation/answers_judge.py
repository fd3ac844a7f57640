"""A judge compares a model's answers with others, through the client of the translations. It is off unless asked.

Each pair is judged twice, once in each order, since judges favour a position. An answer wins if it is better in both
orders. If the verdicts differ, or both are ties, the pair is a tie. The conversations and answers are sent to the
judge's endpoint, so they leave this machine.
"""

import asyncio
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictStr

from bimedix_jax.curation.llm.account import Account
from bimedix_jax.curation.llm.client import Client, open_client
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.prompts import Prompts, fence, load_prompts
from bimedix_jax.curation.llm.request import Request
from bimedix_jax.curation.llm.runner import Interrupted, run_items
from bimedix_jax.curation.llm.store import open_store
from bimedix_jax.errors import BimedixError

STAGE = "answers_judge"
MAX_TOKENS = 200
Outcome = Literal["win", "tie", "loss"]


class Verdict(BaseModel):
    """The judge's reply. Its explicit description is sent, as in annotate/chats.py."""

    model_config = ConfigDict(
        json_schema_serialization_defaults_required=True,
        json_schema_extra={"additionalProperties": False, "description": "Which answer is better, and why."},
    )

    reason: StrictStr = ""
    better: StrictStr


@dataclass(frozen=True)
class Pair:
    """A conversation as (speaker, text) with two answers to its last message."""

    id: str
    language: str
    turns: tuple[tuple[str, str], ...]
    answer: str
    other: str


@dataclass(frozen=True)
class Judged:
    """The verdicts of one pair: in the order as given (A is the answer), and in the other order (B is the answer)."""

    id: str
    language: str
    first: str
    second: str

    @property
    def outcome(self) -> Outcome:
        """A win or loss only if both orders agree."""
        votes = {choice(self.first, ours="a"), choice(self.second, ours="b")}
        return "win" if votes == {"win"} else "loss" if votes == {"loss"} else "tie"

    @property
    def contradictory(self) -> bool:
        """Whether the verdict follows the position: A in both orders, or B in both."""
        return self.first == self.second != "tie"


def choice(better: str, ours: str) -> Outcome:
    return "tie" if better == "tie" else "win" if better == ours else "loss"


def normal(better: str) -> str:
    """ "a", "b", "tie", or another text that is no verdict."""
    return better.strip().strip(".\"'").casefold()


def why_no_verdict(found: Verdict) -> str | None:
    """Why a reply cannot be used, or None."""
    return None if normal(found.better) in ("a", "b", "tie") else f"no verdict: {found.better!r}"


def request_of(pair: Pair, swapped: bool, prompts: Prompts) -> Request:
    """The request in one order. The judge is not told which answer is whose."""
    answers = (pair.other, pair.answer) if swapped else (pair.answer, pair.other)
    shown = "\n\n".join(f"{speaker}: {text}" for speaker, text in pair.turns)
    user = prompts.render(
        "judge",
        conversation=fence("conversation", shown),
        first=fence("answer A", answers[0]),
        second=fence("answer B", answers[1]),
    )
    messages = ({"role": "system", "content": prompts.render("system")}, {"role": "user", "content": user})
    return Request(
        STAGE, pair.id, int(swapped), messages, prompts.hash, MAX_TOKENS, schema=Verdict, accept=why_no_verdict
    )


async def judge_pair(pair: Pair, prompts: Prompts, client: Client) -> str:
    """Both verdicts, "a b"; "none" for a verdict that could not be read."""
    replies = await asyncio.gather(*(client.ask(request_of(pair, swapped, prompts)) for swapped in (False, True)))
    return " ".join(normal(reply.parsed.better) if reply.ok else "none" for reply in replies)


def judge(
    pairs: Sequence[Pair], config: LlmConfig, store: Path, prompts: Path | None = None, budget_tokens: int | None = None
) -> tuple[list[Judged], dict[str, Any]]:
    """The verdicts of pairs whose replies can be read, and how many could not; replies are kept in `store`.

    Raises:
      BimedixError: the endpoint does not answer, or the budget is reached.
    """
    loaded = load_prompts(STAGE, prompts)
    keys = {pair.id: key_of(pair, config, loaded) for pair in pairs}
    with open_store(store) as opened:
        account = Account(opened, budget_tokens=budget_tokens)

        async def ask_all() -> None:
            async with open_client(config, account) as client:
                work = functools.partial(judge_pair, prompts=loaded, client=client)
                items = ((pair.id, keys[pair.id], pair) for pair in pairs)
                progress = await run_items(items, work, account, (client,), len(pairs), "judging answers")
            if progress.unanswered:
                name, why = progress.unanswered[0]
                raise BimedixError(
                    f"{len(progress.unanswered)} of {len(pairs)} pairs have no verdict, for example {name}: {why}. All "
                    "replies are kept: run the same command again"
                )

        try:
            asyncio.run(ask_all())
        except Interrupted as stop:
            raise KeyboardInterrupt(str(stop)) from stop
        verdicts = {pair.id: (opened.result(keys[pair.id]) or "none none").split() for pair in pairs}
    judged = [Judged(pair.id, pair.language, *verdicts[pair.id]) for pair in pairs if "none" not in verdicts[pair.id]]
    facts = {"judge": config.model, "prompts": loaded.hash[:16], "unreadable": len(pairs) - len(judged)}
    return judged, facts


def key_of(pair: Pair, config: LlmConfig, prompts: Prompts) -> str:
    """The key under which the store keeps the verdicts."""
    requests = [request_of(pair, swapped, prompts).key(config) for swapped in (False, True)]
    return hashlib.sha256("\0".join([STAGE, *requests]).encode()).hexdigest()


def tally(judged: Iterable[Judged]) -> dict[str, Any]:
    """Wins, ties and losses by language, and `all`; `score` is the share of wins with half of the ties.

    `first_position` is the share of A among verdicts that name a position: 0.5 for a judge without a bias.
    """
    groups: dict[str, list[Judged]] = {}
    for one in judged:
        for group in (one.language, "all"):
            groups.setdefault(group, []).append(one)
    return {group: counts(found) for group, found in sorted(groups.items())}


def counts(judged: Sequence[Judged]) -> dict[str, Any]:
    numbers = Counter(one.outcome for one in judged)
    positions = Counter(verdict for one in judged for verdict in (one.first, one.second))
    named = positions["a"] + positions["b"]
    return {
        "n": len(judged),
        "wins": numbers["win"],
        "ties": numbers["tie"],
        "losses": numbers["loss"],
        "score": (numbers["win"] + numbers["tie"] / 2) / len(judged),
        "contradictory": sum(one.contradictory for one in judged),
        "first_position": positions["a"] / named if named else None,
    }
