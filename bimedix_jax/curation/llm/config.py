"""Model, endpoint and limits: the options `--llm.*` and `--judge.*` of the data commands."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from bimedix_jax.errors import BimedixError


def check_url(url: str) -> None:
    """Checks that requests can be sent to paths below `url`.

    Raises:
        ValueError: it is not an http or https URL of a host, or it names more than the endpoint.
    """
    example = "such as http://127.0.0.1:8000/v1"
    if "://" not in url:
        raise ValueError(f"base_url is {url!r}; begin it with http:// or https://, {example}")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"base_url is {url!r} ({error}); give a URL {example}") from error
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"base_url is {url!r}; begin it with http:// or https://, {example}")
    if not host or not url.isprintable() or " " in url:
        raise ValueError(f"base_url is {url!r}, which names no host or contains a space; give a URL {example}")
    if parts.query or parts.fragment:
        raise ValueError(f"base_url is {url!r}; leave out what follows the path, {example}")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ValueError(f"base_url is {url!r}; leave out /chat/completions, {example}")


@dataclass(frozen=True)
class LlmConfig:
    """One model behind one OpenAI-compatible endpoint (hosted or local, such as vLLM), and the limits on requests."""

    model: str
    """Name of the model, as the endpoint spells it."""

    base_url: str = "https://api.openai.com/v1"
    """URL of the endpoint, including `/v1`."""

    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API key; "" for an endpoint that needs none."""

    concurrency: int = 8
    """Maximum number of requests in flight."""

    requests_per_minute: int | None = None
    """Limit of requests per minute, retries included."""

    tokens_per_minute: int | None = None
    """Limit of prompt and completion tokens per minute."""

    timeout: float = 120.0
    """Time-out of an attempt in seconds."""

    max_attempts: int = 8
    """Give up on a request after this many attempts without a reply (429, 5xx, time-out, cut connection)."""

    max_wait: float = 600.0
    """Longest Retry-After in seconds to wait for; a longer one ends the run."""

    reasks: int = 2
    """How often to repeat a request whose reply cannot be used."""

    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """The `response_format` field of requests for JSON; `none` for endpoints that reject the field."""

    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The endpoint's name for the maximum number of tokens in a reply."""

    extra: str = "{}"
    """JSON object to add to each request, such as '{"reasoning_effort": "low"}'."""

    batch: bool = False
    """Use the endpoint's batch API (files and batches): slower, and usually half the price."""

    batch_size: int = 10_000
    """Requests per batch."""

    poll_seconds: float = 30.0
    """Seconds between two requests for a batch's status."""

    def __post_init__(self) -> None:
        check_url(self.base_url)
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
            ValueError: it is not a JSON object.
        """
        try:
            fields = json.loads(self.extra)
        except json.JSONDecodeError as error:
            raise ValueError(f"extra is not JSON ({error}); give an object such as '{{\"top_p\": 0.9}}'") from error
        if not isinstance(fields, dict):
            raise ValueError("extra must be a JSON object, such as '{\"top_p\": 0.9}'")
        return fields

    def reply_fields(self) -> dict[str, Any]:
        """The fields that can change a reply."""
        names = ("model", "response_format", "token_limit_field", "extra", "reasks")
        return {name: getattr(self, name) for name in names}

    def api_key(self) -> str:
        """The key, which is read from the environment only.

        Raises:
            BimedixError: the variable is not set.
        """
        if not self.api_key_env:
            return "none"
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise BimedixError(
                f"the environment variable {self.api_key_env} holds no key for {self.base_url}; set it, name another "
                "with api-key-env, or give api-key-env '' if the endpoint needs no key"
            )
        return key


@dataclass(frozen=True)
class JudgeConfig:
    """The model that judges. Options that are not given are those of the model that is judged."""

    model: str | None = None
    """Name of the model. A model favours its own work, so give another one."""

    base_url: str | None = None
    """URL of its endpoint."""

    api_key_env: str | None = None
    """Environment variable with its API key."""

    concurrency: int | None = None
    """Maximum number of requests in flight."""

    requests_per_minute: int | None = None
    """Limit of requests per minute."""

    tokens_per_minute: int | None = None
    """Limit of tokens per minute."""

    timeout: float | None = None
    """Time-out of an attempt in seconds."""

    response_format: Literal["json_schema", "json_object", "none"] | None = None
    """The `response_format` field of requests for JSON."""

    token_limit_field: Literal["max_tokens", "max_completion_tokens"] | None = None
    """The endpoint's name for the maximum number of tokens in a reply."""

    extra: str | None = None
    """JSON object to add to each request."""

    batch: bool | None = None
    """Use the endpoint's batch API."""

    def __post_init__(self) -> None:
        if self.base_url is not None:
            check_url(self.base_url)

    def over(self, base: LlmConfig) -> LlmConfig:
        """`base` with the options that are given here."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
