"""Requests, replies, and the key under which the store keeps a request's replies."""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from bimedix_jax.curation.llm.config import LlmConfig

Message = dict[str, str]


@dataclass(frozen=True)
class Usage:
    """Tokens of one attempt. `cached` is the part of `prompt` that was in the endpoint's cache."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Request:
    """One request to a model.

    `stage` and `item` (a record's id) are for the ledger only. `round` and `prompt_hash` (`Prompts.hash`) are part of
    the key. With `schema`, the reply must contain a JSON object that this class validates. `accept` gets that object,
    or the text if there is no `schema`, and returns why it cannot be used, or None.
    """

    stage: str
    item: str
    round: int
    messages: tuple[Message, ...]
    prompt_hash: str
    max_tokens: int
    temperature: float | None = 0.0
    schema: type[BaseModel] | None = None
    accept: Callable[[Any], str | None] | None = field(default=None, compare=False)

    def payload(self, config: LlmConfig) -> dict[str, Any]:
        """The body that is sent to `/chat/completions`."""
        body: dict[str, Any] = {
            "model": config.model,
            "messages": list(self.messages),
            config.token_limit_field: self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.schema is not None and config.response_format == "json_schema":
            described = {"name": self.schema.__name__, "schema": _json_schema(self.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        elif self.schema is not None and config.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return {**body, **config.extra_fields()}

    def key(self, config: LlmConfig) -> str:
        """SHA-256 of model, payload, prompt hash and round. The same key is never paid for twice."""
        parts = [config.model, self.payload(config), self.prompt_hash, self.round]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def most_tokens(self, config: LlmConfig) -> Usage:
        """Maximum tokens of the request: a byte-level tokenizer gives at most one token for each byte."""
        overhead = 32 + 16 * len(self.messages)  # for the roles and markers of the chat template
        prompt = len(json.dumps(self.payload(config), ensure_ascii=False).encode()) + overhead
        return Usage(prompt=prompt, completion=self.max_tokens)


@functools.cache
def _json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """In serialization mode, fields with defaults can count as required, as strict endpoints demand."""
    return schema.model_json_schema(mode="serialization")


def likely_tokens(text: str) -> int:
    """Rough number of tokens of a text, for estimates and limits per minute: 4 Latin or 2 other characters a token.

    Tokenizers differ: English medical text has 4-5 characters a token, Arabic 1.5-3. What has been paid for is counted
    by the endpoint.
    """
    others = min(len(text), len(text.encode(errors="replace")) - len(text))  # Arabic letters are two bytes each
    return -(-(len(text) - others) // 4) + -(-others // 2)


@dataclass(frozen=True)
class Reply:
    """The reply to a request. `failure` is why it cannot be used, or None; if it is set, `parsed` is None.

    `cached` is True if the reply was in the store and nothing was sent. `usage` is the sum over all attempts.
    """

    text: str
    parsed: Any
    finish_reason: str | None
    usage: Usage
    cached: bool
    failure: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the reply can be used."""
        return self.failure is None
