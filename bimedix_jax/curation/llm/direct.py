"""Sends one HTTP request for each attempt and classifies how it ended."""

import asyncio
import email.utils
import os
import time
from typing import Any

from bimedix_jax.curation.llm.account import Account
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.outcomes import Attempt, Ending, from_body
from bimedix_jax.curation.llm.store import Heading

# after these all requests will fail: wrong key, no such model, no credit
_DENIED_STATUS = {401, 403, 404}
_DENIED_CODES = {"insufficient_quota", "billing_hard_limit_reached", "invalid_api_key"}
_TRANSIENT_STATUS = {408, 409, 425}

CONNECT_SECONDS = 10.0
"""Longest wait for a connection; an answer may take longer."""


class DirectTransport:
    """Chat completions, one request each, through the `openai` client without its own retries."""

    def __init__(self, config: LlmConfig, account: Account) -> None:
        self._config, self._store = config, account.store
        self._key = config.api_key()
        self._openai = new_openai(config, self._key)

    def is_under_way(self, key: str) -> bool:
        """Never: a request ends when its connection closes."""
        del key
        return False

    async def send(self, heading: Heading, payload: dict[str, Any]) -> Attempt:
        """See client.Transport."""
        (number,) = self._store.begin([heading])
        attempt = await self._post(payload)
        self._store.finish([(heading.key, number, attempt)])
        return attempt

    async def _post(self, payload: dict[str, Any]) -> Attempt:
        import httpx2
        import openai

        try:
            # the client's own time-out is per read, so a server that sends a byte at a time would never reach it
            async with asyncio.timeout(self._config.timeout):
                response = await self._openai.post("/chat/completions", body=payload, cast_to=httpx2.Response)
        except (TimeoutError, openai.APITimeoutError) as error:
            if (reason := no_connection(error)) is not None:
                return Attempt("unreachable", detail=scrub(reason, self._key))
            return Attempt("timeout", detail=f"no answer within {self._config.timeout:g} s")
        except openai.APIStatusError as error:
            return from_status(error, self._key)
        except openai.APIConnectionError as error:
            if (reason := no_connection(error)) is not None:
                return Attempt("unreachable", detail=scrub(reason, self._key))
            return Attempt("cut", detail=scrub(f"{error.__cause__ or error}", self._key))
        return from_body(response.text)

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()


def new_openai(config: LlmConfig, key: str) -> Any:
    """The SDK's client without its retries, which would be neither counted nor paced nor stored."""
    import openai

    timeout = openai.Timeout(config.timeout, connect=min(CONNECT_SECONDS, config.timeout))
    return openai.AsyncOpenAI(base_url=config.base_url, api_key=key, max_retries=0, timeout=timeout)


def no_connection(error: BaseException) -> str | None:
    """Why there was no connection, so that nothing was sent; None if a connection broke later."""
    import httpx2

    never_sent = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)
    cause = error.__cause__
    if not isinstance(cause, never_sent):
        return None
    if isinstance(cause, httpx2.ConnectTimeout):
        return "no connection in time"
    deepest: BaseException | None = cause
    while deepest is not None:
        if isinstance(deepest, OSError) and deepest.errno:
            # asyncio replaces the system's message by the address; errors of name look-ups have negative numbers
            return (os.strerror(deepest.errno) if deepest.errno > 0 else f"{deepest.strerror}").lower()
        deepest = deepest.__cause__ or deepest.__context__
    return f"{cause}" or type(cause).__name__


def from_status(error: Any, key: str) -> Attempt:
    """The attempt that ended with the status of an `openai.APIStatusError`."""
    ending = ending_of(error.status_code, error.code)
    detail = scrub(f"{error.status_code} {error.message}", key)[:500]
    return Attempt(ending, error.status_code, detail, retry_after=retry_after(error.response.headers))


def ending_of(status: int, code: str | None) -> Ending:
    """How an attempt ended, from a status other than 200 and the code of its error."""
    if status in _DENIED_STATUS or code in _DENIED_CODES:
        return "denied"
    if status == 429:
        return "rate_limited"
    return "server_error" if status >= 500 or status in _TRANSIENT_STATUS else "refused"


def retry_after(headers: Any) -> float | None:
    """Seconds to wait by `retry-after-ms` or `Retry-After` (seconds or an HTTP date); None without either."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            try:
                return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
            except ValueError:
                continue
    return None


def scrub(text: str, key: str) -> str:
    """`text` without the API key, which some servers repeat in their messages."""
    return text.replace(key, "[key]") if len(key) >= 8 else text
