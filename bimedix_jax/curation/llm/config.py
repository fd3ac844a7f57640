"""How to reach one model: what the options `--llm.*` and `--judge.*` of the data commands set."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, Literal

from bimedix_jax.errors import BimedixError


@dataclass(frozen=True)
class LlmConfig:
    """One model behind one OpenAI-compatible endpoint (hosted, vLLM, `bimedix serve`), and how fast to ask it."""

    model: str
    """Name of the model, as the endpoint spells it."""

    base_url: str = "https://api.openai.com/v1"
    """Where the endpoint is, up to and with `/v1`."""

    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; "" for an endpoint that wants none."""

    concurrency: int = 8
    """At most so many requests in flight."""

    requests_per_minute: int | None = None
    """Limit of requests per minute, retries included."""

    tokens_per_minute: int | None = None
    """Limit of prompt and completion tokens per minute."""

    timeout: float = 120.0
    """Seconds until an attempt counts as hung."""

    max_attempts: int = 8
    """Attempts of one request that end without a reply (429, 5xx, time-out, cut connection) until it is left undone."""

    max_wait: float = 600.0
    """Longest Retry-After, in seconds, that is waited for; a longer one ends the run."""

    reasks: int = 2
    """How often a request is asked again when its reply came but cannot be used."""

    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How JSON is asked for; `none` for endpoints that refuse the field."""

    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The endpoint's name for the limit of the reply's tokens."""

    extra: str = "{}"
    """JSON object that is added to each request, such as '{"reasoning_effort": "low"}'."""

    batch: bool = False
    """Use the endpoint's batch API (files and batches): slower, and half the price where it is offered."""

    batch_size: int = 10_000
    """Requests per batch."""

    poll_seconds: float = 30.0
    """Seconds between two looks at a batch."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "timeout", "max_attempts", "batch_size", "poll_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if (limit := getattr(self, name)) is not None and limit <= 0:
                raise ValueError(f"{name} must be above 0; leave it out for no limit")
        if self.reasks < 0:
            raise ValueError("reasks must be 0 or more")
        self.extra_fields()

    def extra_fields(self) -> dict[str, Any]:
        """`extra` as an object.

        Raises:
            ValueError: it is none.
        """
        try:
            fields = json.loads(self.extra)
        except json.JSONDecodeError as error:
            raise ValueError(f"extra is not JSON ({error}); give an object such as '{{\"top_p\": 0.9}}'") from error
        if not isinstance(fields, dict):
            raise ValueError("extra must be a JSON object, such as '{\"top_p\": 0.9}'")
        return fields

    def api_key(self) -> str:
        """The key, from the environment and from nowhere else.

        Raises:
            BimedixError: the variable is not set.
        """
        if not self.api_key_env:
            return "none"
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise BimedixError(
                f"the environment variable {self.api_key_env} holds no key for {self.base_url}; set it, name another "
                "with api-key-env, or give api-key-env '' if the endpoint wants no key"
            )
        return key


@dataclass(frozen=True)
class JudgeConfig:
    """The model that judges. What is not given is as for the model that is judged."""

    model: str | None = None
    """Name of the model; a model that judges its own work favours it."""

    base_url: str | None = None
    """Where its endpoint is."""

    api_key_env: str | None = None
    """Environment variable that holds its key."""

    concurrency: int | None = None
    """At most so many requests in flight."""

    requests_per_minute: int | None = None
    """Limit of requests per minute."""

    tokens_per_minute: int | None = None
    """Limit of tokens per minute."""

    timeout: float | None = None
    """Seconds until an attempt counts as hung."""

    response_format: Literal["json_schema", "json_object", "none"] | None = None
    """How JSON is asked for."""

    token_limit_field: Literal["max_tokens", "max_completion_tokens"] | None = None
    """The endpoint's name for the limit of the reply's tokens."""

    extra: str | None = None
    """JSON object that is added to each request."""

    batch: bool | None = None
    """Use the endpoint's batch API."""

    def over(self, base: LlmConfig) -> LlmConfig:
        """`base` with what is given here in its place."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
