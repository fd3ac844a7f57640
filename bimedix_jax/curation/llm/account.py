"""Prices, the budget and what has been spent; also the switch that stops all clients of a run."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console

from bimedix_jax.curation.llm.request import Usage
from bimedix_jax.curation.llm.store import Store
from bimedix_jax.errors import BimedixError
from bimedix_jax.process.terminal import FittedTable


class Stopped(BimedixError):
    """No more requests are sent. Those in flight have ended and are committed to the store."""


class BudgetReached(Stopped):
    """The next request could exceed the budget."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens. `batch` is the factor for the batch API."""

    prompt: float
    cached: float
    completion: float
    batch: float = 0.5

    def cost(self, usage: Usage, batched: bool = False) -> float:
        """US dollars for so many tokens."""
        fresh = usage.prompt - usage.cached
        dollars = fresh * self.prompt + usage.cached * self.cached + usage.completion * self.completion
        return dollars * (self.batch if batched else 1.0) / 1e6


def parse_prices(options: Sequence[str]) -> dict[str, Price]:
    """Prices by model, from `MODEL=PROMPT/CACHED/COMPLETION` or JSON files {model: {prompt, cached, completion}}.

    Raises:
        BimedixError: an option is neither.
    """
    prices: dict[str, Price] = {}
    named = set[str]()
    for option in options:
        if option.endswith(".json"):
            prices.update(_price_file(Path(option)))
            continue
        model, _, numbers = option.rpartition("=")
        try:
            prompt, cached, completion = (float(number) for number in numbers.split("/"))
        except ValueError as error:
            raise BimedixError(
                f"price {option!r} is not MODEL=PROMPT/CACHED/COMPLETION in US dollars per million tokens, "
                "such as small-model=0.15/0.075/0.60, nor a .json file"
            ) from error
        if model in named:
            raise BimedixError(f"--prices {model} is given twice; give it once")
        named.add(model)
        prices[model] = Price(prompt, cached, completion)
    return prices


def _price_file(path: Path) -> dict[str, Price]:
    try:
        rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {model: Price(**{name: float(value) for name, value in row.items()}) for model, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BimedixError(
            f"cannot read prices from {path} ({error}); write an object that maps a model to its prompt, cached and "
            "completion prices in US dollars per million tokens"
        ) from error


@dataclass
class Account:
    """The store, its prices and its budget, shared by all clients of a run.

    The budget counts everything in the store, including earlier runs. Requests in flight count at their maximum cost.
    So do requests that may have been paid for without a reply (cut connections, time-outs, kills). The budget is
    therefore never exceeded.
    """

    store: Store
    prices: dict[str, Price] = field(default_factory=dict)
    budget_usd: float | None = None
    budget_tokens: int | None = None
    stopped: BaseException | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.lost = self.store.close_lost()
        self._tokens = 0
        self._dollars = 0.0
        self._reserved: list[tuple[int, float]] = []
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        for row in self.store.ledger():
            for usage in (row.usage, row.unknown_tokens):
                self._tokens += usage.total
                self._dollars += self._cost(row.model, usage, row.batched)

    def _cost(self, model: str, usage: Usage, batched: bool) -> float:
        """US dollars; 0 for an unknown price, which `check_model` allows only without a budget in dollars."""
        price = self.prices.get(model)
        return 0.0 if price is None else price.cost(usage, batched)

    @property
    def tokens(self) -> int:
        """Tokens that were spent or may have been, without those in flight."""
        return self._tokens

    @property
    def dollars(self) -> float:
        """US dollars for these tokens, where the prices are known."""
        return self._dollars

    def check_model(self, model: str) -> None:
        """Check that the budget can be enforced for this model.

        Raises:
            BimedixError: the budget is in dollars and the model has no price.
        """
        if self.budget_usd is not None and model not in self.prices:
            raise BimedixError(
                f"a budget in US dollars needs the price of {model}; give --prices "
                f"{model}=PROMPT/CACHED/COMPLETION, or a budget in tokens"
            )

    def stop(self, reason: BaseException) -> None:
        """Stop all clients. They raise `reason`, or that of the first call."""
        self.stopped = self.stopped or reason
        self._stopping.set()
        self._changed.set()

    def check(self) -> None:
        """Raise the reason of `stop`, if it was called."""
        if self.stopped is not None:
            raise self.stopped

    async def pause(self, seconds: float) -> None:
        """Sleep. If the clients are stopped before or meanwhile, raise the reason."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return
        self.check()

    async def reserve(self, model: str, most: Usage, batched: bool = False) -> tuple[int, float]:
        """Reserve the maximum cost of a request, for `release`. If it exceeds the budget, wait for requests in flight.

        Raises:
            BudgetReached: it exceeds the budget, and no request is in flight any more.
        """
        wanted = (most.total, self._cost(model, most, batched))
        while True:
            self.check()
            tokens = self._tokens + sum(reserved[0] for reserved in self._reserved) + wanted[0]
            dollars = self._dollars + sum(reserved[1] for reserved in self._reserved) + wanted[1]
            too_much = (self.budget_tokens is not None and tokens > self.budget_tokens) or (
                self.budget_usd is not None and dollars > self.budget_usd
            )
            if not too_much:
                self._reserved.append(wanted)
                return wanted
            if not self._reserved:
                self.stop(self._budget_reached(model, wanted))
            else:
                self._changed.clear()
                await self._changed.wait()

    def resume(self, model: str, most: Usage, batched: bool) -> tuple[int, float]:
        """Reserve the maximum cost of an attempt in a batch that an earlier run sent and that is still running."""
        reserved = (most.total, self._cost(model, most, batched))
        self._tokens -= reserved[0]
        self._dollars -= reserved[1]
        self._reserved.append(reserved)
        return reserved

    def release(
        self, reserved: tuple[int, float], model: str, usage: Usage | None, paid: bool, batched: bool = False
    ) -> None:
        """Replace a reservation by the real cost: nothing if not `paid`, the maximum if `usage` is None."""
        self._reserved.remove(reserved)
        if paid and usage is None:
            self._tokens += reserved[0]
            self._dollars += reserved[1]
        elif paid and usage is not None:
            self._tokens += usage.total
            self._dollars += self._cost(model, usage, batched)
        self._changed.set()

    def _budget_reached(self, model: str, wanted: tuple[int, float]) -> BudgetReached:
        spent = f"{self._tokens:,} tokens"
        cap = f"{self.budget_tokens:,} tokens" if self.budget_tokens is not None else ""
        if self.budget_usd is not None:
            spent += f" (${self._dollars:,.4f})"
            cap += f"{' and ' if cap else ''}${self.budget_usd:,.4f}"
        return BudgetReached(
            f"the budget of {cap} would be exceeded: {spent} are spent or may be, and the next request to {model} can "
            f"take {wanted[0]:,} tokens. All replies are kept: run the same command with a higher budget to resume"
        )

    def rows(self) -> list[dict[str, Any]]:
        """The ledger as plain rows; `usd` is None where the price is unknown."""
        found = []
        for row in self.store.ledger():
            price = self.prices.get(row.model)
            found.append(
                {
                    "stage": row.stage,
                    "model": row.model,
                    "batched": row.batched,
                    "requests": row.requests,
                    "attempts": row.attempts,
                    "replies": row.replies,
                    "failed_attempts": row.failed,
                    "unknown_cost_attempts": row.unknown,
                    "unknown_cost_most_tokens": row.unknown_tokens.total,
                    "replies_without_usage": row.without_usage,
                    "prompt_tokens": row.usage.prompt,
                    "cached_tokens": row.usage.cached,
                    "completion_tokens": row.usage.completion,
                    "usd": None if price is None else price.cost(row.usage, row.batched),
                }
            )
        return found

    def print(self, console: Console) -> None:
        """Print the ledger as a table, and below it what has no known price or usage."""
        names = {
            "requests": "asked",
            "attempts": "sent",
            "failed_attempts": "failed",
            "prompt_tokens": "prompt",
            "cached_tokens": "cached",
            "completion_tokens": "reply",
        }
        title = f"ledger of {self.store.path}: requests and tokens"
        table = FittedTable(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("stage")
        table.add_column("model")
        for name in (*names.values(), "US$"):
            table.add_column(name, justify="right")
        rows = self.rows()
        if not rows:
            return
        for row in rows:
            dollars = "unknown" if row["usd"] is None else f"{row['usd']:,.4f}"
            model = f"{row['model']}{' (batch)' if row['batched'] else ''}"
            table.add_row(row["stage"], model, *(f"{row[name]:,}" for name in names), dollars)
        console.print(table)
        for model in sorted({row["model"] for row in rows if row["usd"] is None}):
            console.print(f"[bold yellow]the price of {model} is unknown[/]: give --prices to have its cost")
        unknown = sum(row["unknown_cost_attempts"] for row in rows)
        if unknown:
            most = sum(row["unknown_cost_most_tokens"] for row in rows)
            console.print(
                f"[bold yellow]{unknown:,} attempts returned no reply or no usage and may have been paid for[/]: at "
                f"most {most:,} tokens, which the budget counts"
            )
