"""The JSON files that describe a checkpoint's tokenizer, checked as they are read.

Only the keys that determine token ids, special tokens or the chat template are declared. Other libraries write these
files with many more keys, which are ignored.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from bimedix_jax.files import read_json

ROLES = ("bos", "eos", "pad", "unk")


class AddedTokenFields(BaseModel):
    """A token that is written as an object."""

    content: str
    normalized: bool = False
    special: bool = False


class NamedTemplate(BaseModel):
    """One of several chat templates."""

    name: str
    template: str


class SpecialTokens(BaseModel):
    """special_tokens_map.json."""

    bos_token: str | AddedTokenFields | None = None
    eos_token: str | AddedTokenFields | None = None
    pad_token: str | AddedTokenFields | None = None
    unk_token: str | AddedTokenFields | None = None

    def text(self, role: str) -> str | None:
        """The token of a role (bos, eos, pad, unk); None if the file does not name one."""
        value = getattr(self, f"{role}_token")
        return value.content if isinstance(value, AddedTokenFields) else value


class TokenizerConfig(SpecialTokens):
    """tokenizer_config.json."""

    legacy: bool | None = None
    added_tokens_decoder: dict[int, AddedTokenFields] = {}
    chat_template: str | list[NamedTemplate] | None = None


class TokenIds(BaseModel):
    """generation_config.json, and the part of config.json with the ids of special tokens."""

    model_config = ConfigDict(strict=True)  # True is not the token 1

    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None
    unk_token_id: int | list[int] | None = None

    def ids(self, role: str) -> list[int]:
        """The ids of a role (bos, eos, pad, unk); empty if the file does not give one."""
        value = getattr(self, f"{role}_token_id")
        return [value] if isinstance(value, int) else value or []


Schema = TypeVar("Schema", bound=BaseModel)


def read_if_present(path: Path, schema: type[Schema]) -> Schema:
    """The file as `schema`; the schema's defaults if there is no such file.

    Raises:
        BimedixError: it is not JSON, or a key has another type; the message names both.
    """
    return read_json(path, schema, "fetch it again") if path.is_file() else schema()
