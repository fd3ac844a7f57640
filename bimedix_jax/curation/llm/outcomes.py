"""How an attempt ended, and whether its reply can be used."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from bimedix_jax.curation.llm.request import Reply, Request, Usage
from bimedix_jax.data.records import explain

# reply: the endpoint answered (and was paid). refused: it rejects this request. denied: it rejects all requests until
# the user corrects something, such as the key. unreachable: there was no connection, so nothing was sent. lost: the
# process ended while the attempt was in flight.
Ending = Literal[
    "reply", "rate_limited", "server_error", "timeout", "cut", "bad_body", "refused", "denied", "unreachable", "lost"
]

# it is unknown whether these were paid for, so budgets count their maximum cost
UNKNOWN_COST: frozenset[Ending] = frozenset({"timeout", "cut", "bad_body", "lost"})

MOST_STARTS = 200  # opening braces to try as the start of an object: a reply that repeats them must not take minutes

LENGTH, CONTENT_FILTER = "length", "content_filter"


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended. `usage` is None if the endpoint did not return it."""

    ending: Ending
    status: int | None = None
    detail: str = ""
    retry_after: float | None = None
    finish_reason: str | None = None
    text: str = ""
    usage: Usage | None = None


def from_body(body: str) -> Attempt:
    """The attempt from the body of an answer with status 200."""
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        message = choice["message"]
        text = message.get("content")
        refusal = message.get("refusal")
        finish_reason = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return Attempt("bad_body", 200, f"the answer is no chat completion ({type(error).__name__}: {error})")
    if refusal and not text:
        finish_reason, text = CONTENT_FILTER, refusal
    # JSON can hold half of a surrogate pair, which cannot be stored as UTF-8
    readable = str(text or "").encode(errors="replace").decode()
    return Attempt("reply", 200, finish_reason=finish_reason, text=readable, usage=_usage(value.get("usage")))


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict) or not isinstance(value.get("prompt_tokens"), int):
        return None
    details = value.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    completion = value.get("completion_tokens")
    return Usage(value["prompt_tokens"], cached or 0, completion if isinstance(completion, int) else 0)


def judge_attempts(attempts: Sequence[Attempt], request: Request, reasks: int, cached: bool) -> Reply | None:
    """The reply of a request from its stored attempts; None if it must be sent (again).

    It depends only on the stored attempts, so that a run that was killed gets the same replies. The first usable one
    counts. After `reasks` repetitions without a usable one, the last reply is returned as a failure.
    """
    known = [attempt.usage for attempt in attempts if attempt.usage is not None]
    usage = Usage(*(sum(getattr(item, name) for item in known) for name in ("prompt", "cached", "completion")))
    answered = [attempt for attempt in attempts if attempt.ending in ("reply", "refused")]
    failure = ""
    for attempt in answered[: reasks + 1]:
        parsed, failure = use(attempt, request.schema, request.accept)
        if not failure:
            return Reply(attempt.text, parsed, attempt.finish_reason, usage, cached)
        if attempt.ending == "refused" or failure == LENGTH:  # repeating the request would not help
            return Reply(attempt.text, None, attempt.finish_reason, usage, cached, failure)
    if len(answered) > reasks:
        last = answered[reasks]
        return Reply(last.text, None, last.finish_reason, usage, cached, failure)
    return None


def use(
    attempt: Attempt, schema: type[BaseModel] | None, accept: Callable[[Any], str | None] | None
) -> tuple[Any, str]:
    """The parsed reply, and why it cannot be used ("" if it can)."""
    if attempt.ending == "refused":
        return None, f"the endpoint refused the request ({attempt.status}): {attempt.detail}"
    if attempt.finish_reason in (LENGTH, CONTENT_FILTER):
        return None, attempt.finish_reason
    if schema is None:
        parsed: Any = attempt.text
        reason = "the reply is empty" if not attempt.text.strip() else ""
    else:
        parsed, reason = parse(attempt.text, schema)
    if not reason and accept is not None:
        reason = accept(parsed) or ""
    return (None, reason) if reason else (parsed, "")


def parse(text: str, schema: type[BaseModel]) -> tuple[BaseModel | None, str]:
    """The only object of `schema` in a reply, or why there is none. Code fences and sentences around it are allowed.

    Different objects that fit are an error, since one of them may be quoted from the text that is discussed.
    """
    found: list[BaseModel] = []
    reason = "the reply holds no JSON object"
    for value in _objects(text):
        try:
            candidate = schema.model_validate(value)
        except ValidationError as error:
            reason = f"schema: {explain(error)}"
            continue
        if candidate not in found:
            found.append(candidate)
    if len(found) > 1:
        return None, f"the reply holds {len(found)} different objects of the schema"
    return (found[0], "") if found else (None, reason)


def _objects(text: str) -> Iterator[Any]:
    """The outermost JSON objects in a text, from left to right."""
    decoder = json.JSONDecoder(strict=False)  # accepts line breaks in strings, which models write
    place = -1
    for _ in range(MOST_STARTS):
        place = text.find("{", place + 1)
        if place < 0:
            return
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        yield value
        place = end - 1
