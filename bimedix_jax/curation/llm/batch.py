"""The batch API: uploads many requests in one file and fetches the results later, for about half the price.

A random mark is stored before a batch is created and sent as its metadata. The batch's id is committed before waiting
for results. A run that was killed therefore finds its batches again, even those whose id it never received, and sends
no request twice.
"""

import asyncio
import json
import secrets
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from bimedix_jax.curation.llm.account import Account, Stopped
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.direct import ending_of, new_openai, no_connection, scrub
from bimedix_jax.curation.llm.outcomes import Attempt, from_body
from bimedix_jax.curation.llm.store import Heading

GATHER_SECONDS = 0.5  # a batch is sent after so long without a new request, or when it is full
MOST_BYTES = 100_000_000  # hosted endpoints take files of up to 200 MB
MARK = "bimedix_mark"  # the metadata field with our mark
_ENDED = {"completed", "failed", "expired", "cancelled"}


class BatchTransport:
    """See client.Transport."""

    def __init__(self, config: LlmConfig, account: Account) -> None:
        self._config, self._account, self._store = config, account, account.store
        self._key = config.api_key()
        self._openai = new_openai(config, self._key)
        self._pending: dict[str, tuple[Heading, dict[str, Any]]] = {}
        self._answers: dict[str, asyncio.Future[Attempt]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._gathering: asyncio.TimerHandle | None = None
        self._earlier = dict(self._store.batches(config.base_url))
        self._members = {mark: self._store.batch_members(mark) for mark in self._earlier}
        self._batch_of = {key: mark for mark, members in self._members.items() for key in members}

    def is_under_way(self, key: str) -> bool:
        """Whether a batch of an earlier process contains the request and is not fetched yet."""
        return key in self._batch_of

    async def send(self, heading: Heading, payload: dict[str, Any]) -> Attempt:
        """Add the request to a batch and wait for its line of the results."""
        answer = self._answers[heading.key] = asyncio.get_running_loop().create_future()
        mark = self._batch_of.get(heading.key)
        if mark is not None:
            if mark not in self._tasks:
                self._tasks[mark] = asyncio.create_task(self._guarded(mark, self._resume(mark)))
        else:
            self._pending[heading.key] = (heading, payload)
            if self._gathering is not None:
                self._gathering.cancel()
            if len(self._pending) >= self._config.batch_size:
                self._send_pending()
            else:
                self._gathering = asyncio.get_running_loop().call_later(GATHER_SECONDS, self._send_pending)
        try:
            return await answer
        finally:
            self._answers.pop(heading.key, None)

    async def close(self) -> None:
        """Stop waiting. Batches that were created continue at the endpoint."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._openai.close()

    def _send_pending(self) -> None:
        for part in _parts(self._pending.values()):
            mark = secrets.token_hex(16)
            self._tasks[mark] = asyncio.create_task(self._guarded(mark, self._new(mark, part)))
        self._pending = {}

    async def _guarded(self, mark: str, work: Any) -> None:
        """Pass an error in the work on a batch to the requests that wait for it."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 - not swallowed: each waiting request raises it
            for key in self._members.get(mark, {}):
                answer = self._answers.get(key)
                if answer is not None and not answer.done():
                    answer.set_exception(error)

    async def _new(self, mark: str, part: list[tuple[Heading, dict[str, Any]]]) -> None:
        headings = [heading for heading, _ in part]
        self._members[mark] = {heading.key: 0 for heading in headings}
        self._account.check()
        self._store.note_batch(mark, self._config.base_url)
        numbers = self._store.begin(headings, batch=mark)
        self._members[mark] = dict(zip((heading.key for heading in headings), numbers, strict=True))
        import openai

        try:
            file = await self._openai.files.create(file=(f"{mark}.jsonl", _lines(part)), purpose="batch")
            batch = await self._openai.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={MARK: mark},
            )
        except openai.APIStatusError as error:
            ending = ending_of(error.status_code, error.code)
            self._end(mark, {}, Attempt(ending, error.status_code, scrub(f"{error.message}", self._key)[:500]))
        except openai.APIConnectionError as error:
            if (reason := no_connection(error)) is not None:
                self._end(mark, {}, Attempt("unreachable", detail=scrub(reason, self._key)))
            else:
                await self._resume(mark)  # the batch may have been created before the connection broke
        else:
            await self._watch(mark, batch.id)

    async def _resume(self, mark: str) -> None:
        """Resume a batch from its mark, and its id if that is known."""
        identity = self._earlier.get(mark)
        if identity is None:
            import openai

            try:
                async for batch in self._openai.batches.list(limit=100):
                    if (batch.metadata or {}).get(MARK) == mark:
                        identity = batch.id
                        break
            except openai.APIError as error:
                message = f"cannot ask {self._config.base_url} for its batches ({scrub(str(error), self._key)})"
                self._account.stop(Stopped(f"{message}; one of them may belong to this run: try again later"))
                self._account.check()
        if identity is None:
            self._end(mark, {}, Attempt("server_error", detail="the batch was never created"))
        else:
            await self._watch(mark, identity)

    async def _watch(self, mark: str, identity: str) -> None:
        """Wait for the end of a batch, fetch its results and commit them."""
        import openai

        self._store.note_batch(mark, self._config.base_url, identity)
        failures = 0
        while True:
            try:
                batch = await self._openai.batches.retrieve(identity)
                if batch.status in _ENDED:
                    results = [
                        (await self._openai.files.content(name)).text
                        for name in (batch.output_file_id, batch.error_file_id)
                        if name
                    ]
                    break
                failures = 0
            except openai.APIError as error:
                failures += 1
                print(f"batch {identity}: {scrub(str(error), self._key)}", file=sys.stderr)
                if failures >= self._config.max_attempts:
                    self._account.stop(
                        Stopped(f"batch {identity} cannot be reached. It continues at the endpoint: run again later")
                    )
            await self._account.pause(self._config.poll_seconds)
        attempts = dict(_read(line, self._key) for text in results for line in text.splitlines() if line.strip())
        self._end(mark, attempts, Attempt("server_error", detail=f"the batch {batch.status} without a result for it"))

    def _end(self, mark: str, attempts: dict[str, Attempt], otherwise: Attempt) -> None:
        """Commit how the requests of a batch ended, and return this to the waiting tasks."""
        members = self._members.pop(mark)
        ends = {key: attempts.get(key, otherwise) for key in members}
        self._store.finish((key, members[key], attempt) for key, attempt in ends.items())
        self._store.note_batch(mark, self._config.base_url, done=True)
        for key, attempt in ends.items():
            self._batch_of.pop(key, None)
            answer = self._answers.get(key)
            if answer is not None and not answer.done():
                answer.set_result(attempt)


def _parts(pending: Iterable[tuple[Heading, dict[str, Any]]]) -> Iterator[list[tuple[Heading, dict[str, Any]]]]:
    """Pending requests in batches of at most MOST_BYTES."""
    part: list[tuple[Heading, dict[str, Any]]] = []
    size = 0
    for item in pending:
        length = len(json.dumps(item[1]))
        if part and size + length > MOST_BYTES:
            yield part
            part, size = [], 0
        part.append(item)
        size += length
    if part:
        yield part


def _lines(part: list[tuple[Heading, dict[str, Any]]]) -> bytes:
    rows = (
        {"custom_id": heading.key, "method": "POST", "url": "/v1/chat/completions", "body": payload}
        for heading, payload in part
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _read(line: str, key: str) -> tuple[str, Attempt]:
    """custom_id and attempt of one line of a batch's results."""
    row = json.loads(line)
    response = row.get("response")
    if not response:
        detail = json.dumps(row.get("error"), ensure_ascii=False)
        return row["custom_id"], Attempt("server_error", detail=scrub(detail, key)[:500])
    status, body = response["status_code"], response["body"]
    if status == 200:
        return row["custom_id"], from_body(json.dumps(body))
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return row["custom_id"], Attempt(ending_of(status, code), status, scrub(json.dumps(body), key)[:500])
