"""`async with open_client(config, account) as client: reply = await client.ask(request)`.

A request whose reply is in the store is answered from there. Others are sent, and retried where that can help. Each
attempt is committed to the store before its reply is used. The SDK's own retries are off, so that every attempt is
counted, paced and checked against the budget.
"""

import asyncio
import random
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from bimedix_jax.curation.llm.account import Account, Stopped
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.outcomes import UNKNOWN_COST, Attempt, judge_attempts
from bimedix_jax.curation.llm.pace import Pace
from bimedix_jax.curation.llm.request import Reply, Request, Usage, likely_tokens
from bimedix_jax.curation.llm.store import Heading
from bimedix_jax.errors import BimedixError

# after so many requests in a row without a reply, each after all its attempts, the endpoint counts as down
EXHAUSTED_IN_A_ROW = 5
# after so many refusals (400, 422, ...) and no reply, the options must be wrong and not the texts
REFUSED_AT_FIRST = 3
# attempts of one request to connect before any reply, with waits of 0.5, 1 and 2 s: then nothing listens there
CONNECT_AT_FIRST = 4


class Unanswered(BimedixError):
    """One request got no reply in `max_attempts` attempts. A later run sends it again."""


class Transport(Protocol):
    """Sends a request, commits how it ended to the store, and returns that."""

    def is_under_way(self, key: str) -> bool:
        """Whether a batch of an earlier process that is still running contains the request."""
        ...

    async def send(self, heading: Heading, payload: dict[str, Any]) -> Attempt:
        """Store the attempt as open, send it, wait, and commit how it ended."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class Client:
    """One model behind one endpoint. Use `open_client`."""

    def __init__(
        self,
        config: LlmConfig,
        account: Account,
        transport: Transport,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        self.config = config
        self.account = account
        self.sent = 0
        self.from_store = 0
        self._transport = transport
        self._clock = clock
        self._sleep = sleep or account.pause
        self._slots = asyncio.Semaphore(config.batch_size if config.batch else config.concurrency)
        self._requests = Pace(None if config.batch else config.requests_per_minute, clock, self._sleep)
        self._tokens = Pace(None if config.batch else config.tokens_per_minute, clock, self._sleep)
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._resume_at = clock()
        self._exhausted = 0
        self._replies = 0
        self._refusals = 0

    async def ask(self, request: Request) -> Reply:
        """The reply, from the store if it is there. `reply.failure` is why it cannot be used, or None.

        Raises:
            Unanswered: this request got no reply; other requests may still get one.
            Stopped: no client sends anything more: the budget is reached, the key is wrong, the user stopped, ...
        """
        key = request.key(self.config)
        reply = self._known(key, request, cached=True)
        if reply is not None:
            self.from_store += 1
            return reply
        if key in self._waiting:  # another item has sent the same request
            return await asyncio.shield(self._waiting[key])
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        try:
            reply = await self._ask(key, request)
        except BaseException as error:
            future.set_exception(
                Stopped("the same request, asked elsewhere, was cancelled") if _is_cancel(error) else error
            )
            future.exception()  # retrieved, or asyncio warns if nobody waits for it
            raise
        else:
            future.set_result(reply)
            return reply
        finally:
            del self._waiting[key]

    def _known(self, key: str, request: Request, cached: bool) -> Reply | None:
        attempts = self.account.store.attempts(key)
        return judge_attempts(attempts, request, self.config.reasks, cached) if attempts else None

    async def _ask(self, key: str, request: Request) -> Reply:
        payload = request.payload(self.config)
        heading = Heading(
            key,
            request.stage,
            self.config.model,
            request.item,
            request.round,
            request.prompt_hash,
            request.most_tokens(self.config),
        )
        likely = sum(likely_tokens(message["content"]) for message in request.messages) + request.max_tokens // 2
        without_reply = 0
        async with self._slots:
            while True:
                attempt = await self._attempt(heading, payload, likely)
                reply = self._known(key, request, cached=False)
                if reply is not None:
                    self._exhausted = 0
                    return reply
                if attempt.ending != "reply":
                    without_reply += 1
                    await self._wait_after(attempt, without_reply)

    async def _attempt(self, heading: Heading, payload: dict[str, Any], likely: int) -> Attempt:
        """One attempt within the limits per minute and the budget."""
        if self._transport.is_under_way(heading.key):
            reserved = self.account.resume(heading.model, heading.most, self.config.batch)
        else:
            await self._requests.take(1)
            await self._tokens.take(likely)
            while (early := self._resume_at - self._clock()) > 0:
                await self._sleep(early)
            reserved = await self.account.reserve(heading.model, heading.most, self.config.batch)
        self.sent += 1
        attempt = Attempt("lost")  # if the task is cancelled while it waits
        try:
            attempt = await self._transport.send(heading, payload)
        except sqlite3.Error as error:
            self.account.stop(
                Stopped(f"cannot write {self.account.store.path} ({error}); free some space and run again")
            )
            raise
        finally:
            paid = attempt.ending == "reply" or attempt.ending in UNKNOWN_COST
            self.account.release(reserved, heading.model, attempt.usage, paid, self.config.batch)
        self._tokens.correct(likely - (attempt.usage or Usage()).total if paid else likely)
        self._replies += attempt.ending == "reply"
        self._refusals += attempt.ending == "refused"
        if attempt.ending == "denied":
            advice = "correct this (key, model name, base-url, credit)"
        elif self._refusals >= REFUSED_AT_FIRST and not self._replies:
            advice = "every request was refused: correct the options (response-format, token-limit-field, extra)"
            self.account.store.deny_refused(heading.model)
        else:
            return attempt
        where = f"{self.config.base_url} ({self.config.model}): {attempt.detail}"
        self.account.stop(Stopped(f"{where}; {advice} and run the same command again"))
        self.account.check()
        return attempt

    async def _wait_after(self, attempt: Attempt, without_reply: int) -> None:
        """Wait as long as the endpoint asks, or with exponential back-off. After the last attempt, raise."""
        never_reached = attempt.ending == "unreachable" and not self._replies
        if never_reached and without_reply >= min(CONNECT_AT_FIRST, self.config.max_attempts):
            self.account.stop(
                Stopped(
                    f"{self.config.base_url} cannot be reached ({attempt.detail}) and nothing was sent; start the "
                    "server or correct base-url, and run the same command again"
                )
            )
            self.account.check()
        if without_reply >= self.config.max_attempts:
            self._exhausted += 1
            error = (
                f"{self.config.base_url} gave no reply in {without_reply} attempts, the last one: {attempt.ending} "
                f"{attempt.detail}".rstrip()
            )
            if self._exhausted >= EXHAUSTED_IN_A_ROW:
                self.account.stop(
                    Stopped(f"{error}; {self._exhausted} requests in a row got no reply: try again later")
                )
                self.account.check()
            raise Unanswered(error)
        if self.config.batch and not never_reached:  # all wait equally long, so that one batch collects them again
            await self._sleep(self.config.poll_seconds)
            return
        wait = min(60.0, 0.5 * 2 ** (without_reply - 1)) * random.uniform(0.75, 1.25)
        if attempt.retry_after is not None:
            wait = max(wait, attempt.retry_after)
            self._hold_back(attempt.retry_after)
        await self._sleep(wait)

    def _hold_back(self, seconds: float) -> None:
        """Pause all requests, since a 429 concerns the account and not one request."""
        if seconds > self.config.max_wait:
            self.account.stop(
                Stopped(
                    f"{self.config.base_url} asks to wait {seconds:,.0f} s, longer than max-wait "
                    f"({self.config.max_wait:,.0f} s); all replies are kept, run the same command later"
                )
            )
            self.account.check()
        until = self._clock() + seconds
        if seconds >= 10 and until > self._resume_at + 1:
            print(f"{self.config.base_url} asks to wait {seconds:,.0f} s", file=sys.stderr)
        self._resume_at = max(self._resume_at, until)


def _is_cancel(error: BaseException) -> bool:
    return isinstance(error, asyncio.CancelledError)


@asynccontextmanager
async def open_client(config: LlmConfig, account: Account) -> AsyncIterator[Client]:
    """A client that is open inside the `with`.

    Raises:
        BimedixError: the environment variable of the key is not set, or a budget in dollars lacks the model's price.
    """
    from bimedix_jax.curation.llm.batch import BatchTransport
    from bimedix_jax.curation.llm.direct import DirectTransport

    account.check_model(config.model)
    make = BatchTransport if config.batch else DirectTransport
    transport: Transport = make(config, account)
    try:
        yield Client(config, account, transport)
    finally:
        await transport.close()
