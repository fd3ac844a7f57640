"""How one attempt ended, and whether the reply that it brought can be used."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from bimedix_jax.curation.llm.request import Reply, Request, Usage
from bimedix_jax.data.records import explain

# reply: the endpoint answered (and was paid). refused: it will not answer this request. denied: it will not answer any,
# until the user sets something right. lost: the process ended while the attempt was in flight.
Ending = Literal["reply", "rate_limited", "server_error", "timeout", "cut", "bad_body", "refused", "denied", "lost"]

# nobody can know whether these were paid for: budgets count them at their most
UNKNOWN_COST: frozenset[Ending] = frozenset({"timeout", "cut", "bad_body", "lost"})

MOST_STARTS = 200  # opening braces at which an object is looked for: a model that repeats them must not cost minutes

LENGTH, CONTENT_FILTER = "length", "content_filter"


@dataclass(frozen=True)
class Attempt:
    """One attempt's end. `usage` is None where the endpoint did not say."""

    ending: Ending
    status: int | None = None
    detail: str = ""
    retry_after: float | None = None
    finish_reason: str | None = None
    text: str = ""
    usage: Usage | None = None


def from_body(body: str) -> Attempt:
    """The attempt whose answer (status 200) has this body."""
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
    # half of a surrogate pair, which JSON can spell, is no text: it could not even be stored
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
    """The reply that a request's stored attempts amount to; None if it must be sent (again).

    A function of what is stored alone, so that a run that was killed comes to the same replies: the first usable one
    counts; after `reasks` more that are not, the last one, as a failure.
    """
    known = [attempt.usage for attempt in attempts if attempt.usage is not None]
    usage = Usage(*(sum(getattr(item, name) for item in known) for name in ("prompt", "cached", "completion")))
    answered = [attempt for attempt in attempts if attempt.ending in ("reply", "refused")]
    failure = ""
    for attempt in answered[: reasks + 1]:
        parsed, failure = use(attempt, request.schema, request.accept)
        if not failure:
            return Reply(attempt.text, parsed, attempt.finish_reason, usage, cached)
        if attempt.ending == "refused" or failure == LENGTH:  # the same request would meet the same end
            return Reply(attempt.text, None, attempt.finish_reason, usage, cached, failure)
    if len(answered) > reasks:
        last = answered[reasks]
        return Reply(last.text, None, last.finish_reason, usage, cached, failure)
    return None


def use(
    attempt: Attempt, schema: type[BaseModel] | None, accept: Callable[[Any], str | None] | None
) -> tuple[Any, str]:
    """What a reply holds, and "" or why it cannot be used."""
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
    """The one object of `schema` in a reply, in a code fence or between sentences too, or why there is none.

    Several different objects that fit are as bad as none: one of them may be quoted from the text under discussion.
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
    """JSON objects in a text, outermost ones only, from left to right."""
    decoder = json.JSONDecoder(strict=False)  # models write line breaks into strings
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
