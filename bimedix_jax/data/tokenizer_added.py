"""Which tokens the files of a tokenizer folder add to its vocabulary, and in which order, as in transformers 5.

tokenizer_config.json comes first. Without its key `added_tokens_decoder` the files of older versions count too:
special_tokens_map.json precedes the configuration, and added_tokens.json has ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from bimedix_jax.data.tokenizer_files import (
    NAMED,
    AddedTokenFields,
    SpecialTokens,
    Token,
    TokenizerConfig,
    read_added_tokens,
    read_if_present,
)
from bimedix_jax.errors import BimedixError


@dataclass(frozen=True)
class Declared:
    """What the files declare: tokens with ids, special tokens by key, and special tokens without a key."""

    numbered: dict[int, AddedToken]
    named: dict[str, str | AddedToken]  # in transformers' order
    unnamed: list[str | AddedToken] | None  # None: no file has a list
    source: str  # the file that gives the ids

    def tokens(self, engine: tokenizers.Tokenizer, own: Sequence[AddedToken] = ()) -> list[AddedToken]:
        """What transformers adds to this engine, in order. `own` are those of a SentencePiece model."""
        found: list[str | AddedToken] = [self.numbered[number] for number in sorted(self.numbered)]
        known = {text_of(token) for token in [*engine.get_added_tokens_decoder().values(), *found]}
        for token in [*self.named.values(), *(own if self.unnamed is None else self.unnamed)]:
            if text_of(token) not in known and token not in found:
                found.append(token)
        special = {text_of(token) for token in self.named.values()}
        added = [AddedToken(token, special=True) if isinstance(token, str) else token for token in found]
        for token in added:
            token.special = token.special or token.content in special
        return added

    def check_ids(self, engine: tokenizers.Tokenizer, folder: Path) -> None:
        """Raises BimedixError for a token with another id than its file states, which would shift every id after it."""
        for number, token in sorted(self.numbered.items()):
            actual = engine.token_to_id(token.content)
            if actual != number:
                raise BimedixError(
                    f"{self.source} gives {token.content!r} the id {number}, the vocabulary {actual}; use the files of "
                    f"one checkpoint ({folder})"
                )


def declared(
    folder: Path, config: TokenizerConfig, rows: Sequence[Mapping[str, Any]], defaults: Mapping[str, str], older: bool
) -> Declared:
    """What the files of `folder` declare.

    Args:
        rows: `added_tokens` of tokenizer.json; empty for a SentencePiece model.
        defaults: special tokens that the class has where the files lack the key.
        older: whether to read the files of older versions.
    """
    named = {key: _token(token) for key, token in config.named().items()}
    present = set(config.model_fields_set)
    own = config.extra_special_tokens or config.additional_special_tokens
    listed = isinstance(config.extra_special_tokens, list) or "additional_special_tokens" in present
    unnamed = [_token(token) for token in own if not isinstance(own, dict)] if own else [] if listed else None
    source, numbered = "tokenizer_config.json", {}
    if config.added_tokens_decoder is not None:
        numbered = {number: _object(row) for number, row in config.added_tokens_decoder.items()}
    else:
        if older:
            source, unnamed = _older(folder, named, present, unnamed, numbered, bool(rows))
        for row in rows:
            numbered[row["id"]] = AddedToken(**{key: value for key, value in row.items() if key != "id"})
    for key, text in defaults.items():
        if key not in present:
            named[key] = text
    exact = {text_of(token): token for token in numbered.values()}
    named = {key: exact.get(text_of(token), token) if key in NAMED else token for key, token in named.items()}
    order = {key: number for number, key in enumerate(NAMED)}
    named = dict(sorted(named.items(), key=lambda item: order.get(item[0], len(order))))
    return Declared(numbered, named, unnamed, source)


def _older(
    folder: Path,
    named: dict[str, str | AddedToken],
    present: set[str],
    unnamed: list[str | AddedToken] | None,
    numbered: dict[int, AddedToken],
    has_json: bool,
) -> tuple[str, list[str | AddedToken] | None]:
    """Adds what the files of older versions declare; returns the file with ids, and the tokens without a key."""
    found = read_if_present(folder / "special_tokens_map.json", SpecialTokens)
    named |= {key: _token(token, special=True) for key, token in found.named().items()}
    for key in found.model_fields_set:
        present.add(key)
        if getattr(found, key) is None:
            named.pop(key, None)
    if isinstance(found.extra_special_tokens, list):
        more = [_token(token, special=True) for token in found.extra_special_tokens]
        unnamed = [*(unnamed or []), *(token for token in more if token not in (unnamed or []))]
    additional = [_token(token, special=True) for token in found.additional_special_tokens or []]
    if unnamed is None and additional and has_json:
        # transformers forgets this list for a SentencePiece model, where added_tokens.json gives the ids
        unnamed = additional
    special = {text_of(token) for token in [*named.values(), *(unnamed or [])]}
    either = special | {text_of(token) for token in additional}
    path = folder / "added_tokens.json"
    for text, number in read_added_tokens(path).items():
        numbered[number] = AddedToken(text, normalized=text not in special, special=text in either)
    return path.name if path.is_file() else "tokenizer.json", unnamed


def _token(token: Token, special: bool | None = None) -> str | AddedToken:
    """A token as transformers passes it on; keys that its object lacks have the defaults of `AddedToken`."""
    return token if isinstance(token, str) else _object(token, special)


def _object(token: AddedTokenFields, special: bool | None = None) -> AddedToken:
    fields: dict[str, Any] = token.model_dump(exclude_unset=True, exclude_none=True)
    if special is not None:
        fields["special"] = special
    return AddedToken(**fields)


def text_of(token: str | AddedToken | AddedTokenFields) -> str:
    """The text of a token in either form."""
    return token if isinstance(token, str) else token.content
