"""Estimates requests, tokens and cost before anything is sent."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console

from bimedix_jax.curation.llm.account import Price
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.outcomes import judge_attempts
from bimedix_jax.curation.llm.request import Request, Usage
from bimedix_jax.curation.llm.store import Store
from bimedix_jax.process.terminal import FittedTable


@dataclass(frozen=True)
class Estimate:
    """Requests of one stage that are not in the store, and their tokens: minimum (`low`) and maximum (`high`)."""

    stage: str
    model: str
    low_requests: int
    high_requests: int
    low: Usage
    high: Usage
    batched: bool = False

    def row(self, prices: dict[str, Price]) -> dict[str, Any]:
        """The estimate with its cost in US dollars, None if the price is unknown."""
        price = prices.get(self.model)
        return {
            "stage": self.stage,
            "model": self.model,
            "batched": self.batched,
            "requests": [self.low_requests, self.high_requests],
            "prompt_tokens": [self.low.prompt, self.high.prompt],
            "completion_tokens": [self.low.completion, self.high.completion],
            "usd": None if price is None else [price.cost(self.low, self.batched), price.cost(self.high, self.batched)],
        }


@dataclass
class Tally:
    """Adds up the requests of one stage, each with its tokens."""

    low_requests: int = 0
    high_requests: int = 0
    low: Usage = field(default_factory=Usage)
    high: Usage = field(default_factory=Usage)

    def add(self, each: Usage, low: int, high: int) -> None:
        """Between `low` and `high` requests of `each` tokens."""
        self.low_requests += low
        self.high_requests += high
        self.low = Usage(self.low.prompt + low * each.prompt, 0, self.low.completion + low * each.completion)
        self.high = Usage(self.high.prompt + high * each.prompt, 0, self.high.completion + high * each.completion)

    def estimate(self, stage: str, config: LlmConfig) -> Estimate:
        """The sum for a stage with the model of `config`."""
        return Estimate(
            stage, config.model, self.low_requests, self.high_requests, self.low, self.high, batched=config.batch
        )


def is_stored(request: Request, config: LlmConfig, store: Store) -> bool:
    """Whether a request would be answered from the store."""
    attempts = store.attempts(request.key(config))
    return bool(attempts) and judge_attempts(attempts, request, config.reasks, cached=True) is not None


def show(estimates: Sequence[Estimate], prices: dict[str, Price], console: Console) -> list[dict[str, Any]]:
    """Print the estimates as a table with minimum and maximum, and return them as rows."""
    table = FittedTable(title="estimate (at least - at most): requests and tokens", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    table.add_column("model")
    for name in ("requests", "prompt", "reply", "US$"):
        table.add_column(name, justify="right")
    rows = [estimate.row(prices) for estimate in estimates]
    for row in rows:
        names = ("requests", "prompt_tokens", "completion_tokens")
        counts = (" - ".join(_short(number) for number in row[name]) for name in names)
        dollars = "unknown" if row["usd"] is None else "{:,.2f} - {:,.2f}".format(*row["usd"])
        table.add_row(row["stage"], row["model"], *counts, dollars)
    console.print(table)
    console.print("tokens are counted by rule of thumb: 4 Latin or 2 other characters each", highlight=False)
    for model in sorted({row["model"] for row in rows if row["usd"] is None}):
        console.print(f"[bold yellow]the price of {model} is unknown[/]: give --prices to have its cost")
    return rows


def _short(number: int) -> str:
    """184, 145k, 2.4M, 1,250M: estimates are no more precise."""
    if number < 10_000:
        return f"{number:,}"
    return f"{number / 1e3:,.0f}k" if number < 1e6 else f"{number / 1e6:,.{1 if number < 1e8 else 0}f}M"
