"""What is asked, what comes back, and the key that says whether it was asked before."""

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
    """Tokens of one attempt. `cached` is the part of `prompt` that the endpoint had in its cache."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Request:
    """One question to a model.

    `stage` and `item` (a record's id) only say in the ledger what it was for. `round` and `prompt_hash`
    (`Prompts.hash`) are part of the key. With `schema`, the reply must hold a JSON object that the model accepts; with
    `accept`, what that gives (the object, or the text without `schema`) must also pass: `accept` returns why not, or
    None.
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
        """SHA-256 of model, payload, prompt hash and round: the same key is never paid for twice."""
        parts = [config.model, self.payload(config), self.prompt_hash, self.round]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def most_tokens(self, config: LlmConfig) -> Usage:
        """Tokens that the request can cost at most: no byte-level tokenizer gives more tokens than there are bytes."""
        overhead = 32 + 16 * len(self.messages)  # roles and markers of the chat template
        prompt = len(json.dumps(self.payload(config), ensure_ascii=False).encode()) + overhead
        return Usage(prompt=prompt, completion=self.max_tokens)


@functools.cache
def _json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """As it is written, where pydantic calls fields with defaults required: strict endpoints want all of them so."""
    return schema.model_json_schema(mode="serialization")


def likely_tokens(text: str) -> int:
    """Rough number of tokens of a text, for estimates and pace: four Latin or two other characters a token.

    Tokenizers differ: English medical text has 4-5 characters a token, Arabic 1.5-3. Whatever has been paid for is
    counted by the endpoint, not by this.
    """
    others = min(len(text), len(text.encode(errors="replace")) - len(text))  # Arabic letters are two bytes each
    return -(-(len(text) - others) // 4) + -(-others // 2)


@dataclass(frozen=True)
class Reply:
    """What came back. `failure` says why a reply that was paid for cannot be used; then `parsed` is None.

    `cached` is True where nothing was sent because the answer was in the store; `usage` sums all attempts.
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
