"""Conversations as tokens with a loss mask: one at a time (encode_chat) or many in worker processes (EncodeLines)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bimedix_jax.data.records import Record, Turn, parse
from bimedix_jax.data.roles import FIRST, ROLES
from bimedix_jax.data.templates import ChatTemplate, Span, split_wrapper
from bimedix_jax.data.tokenizer import Encoding, Tokenizer, load_tokenizer
from bimedix_jax.data.tokenizer_words import WordEncoder
from bimedix_jax.errors import BimedixError


@dataclass(frozen=True)
class Example:
    """One conversation as tokens; `learned` marks the supervised tokens, which are the assistant's."""

    id: str
    language: str
    kind: str
    source: str
    tokens: np.ndarray  # int32 [N]
    learned: np.ndarray  # bool [N]


def encode_chat(
    tokenizer: Tokenizer, turns: Sequence[Turn], add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is supervised: the assistant's words and their end token.

    The ids are those of transformers' `apply_chat_template`, with two exceptions. A special token spelled out inside a
    turn stays ordinary text, so that a user can neither end their turn nor start another. And no token spans the end of
    a prompt and the start of an answer, since the two are separate when the model answers.
    """
    encoding, spans = _encode_spans(tokenizer, turns, add_generation_prompt)
    return encoding.ids, _learned_mask(encoding, spans)


def roles_of_chat(tokenizer: Tokenizer, turns: Sequence[Turn], add_generation_prompt: bool = False) -> np.ndarray:
    """uint8 [N]: the index in ROLES of each token of `encode_chat`.

    The end token of an answer belongs to the answer. A token with any text of a turn is not of the template.
    """
    encoding, spans = _encode_spans(tokenizer, turns, add_generation_prompt)
    said = np.repeat([not span.markup for span in spans], [len(span.text) for span in spans])
    before = np.concatenate([[0], np.cumsum(said)])  # characters that speakers wrote before each one
    offsets = np.asarray(encoding.offsets, int).reshape(-1, 2)
    has_text = before[offsets[:, 1]] > before[offsets[:, 0]]
    roles = np.where(has_text, ROLES.index("prompt"), ROLES.index("template"))
    roles[np.asarray(_learned_mask(encoding, spans), bool)] = ROLES.index("answer")
    roles[:FIRST] = ROLES.index("first")
    return roles.astype(np.uint8)


def _encode_spans(
    tokenizer: Tokenizer, turns: Sequence[Turn], add_generation_prompt: bool
) -> tuple[Encoding, list[Span]]:
    bos, eos = tokenizer.special.get("bos", ""), tokenizer.special.get("eos", "")
    template = tokenizer.template
    require_tokens(tokenizer, template, bos, eos)
    spans = template.render(turns, bos, eos, add_generation_prompt)
    text = "".join(span.text for span in spans)
    special = _markup_specials(spans, tokenizer.special_texts)
    encoding = _without_blanks(tokenizer, text, tokenizer.encode_with_offsets(text))
    cuts = {edge for span in _learned_ranges(spans) for edge in span if _is_inside_a_token(edge, encoding)}
    if cuts or _special_ranges(tokenizer, encoding) != special:
        encoding = _encode_in_pieces(tokenizer, text, special, cuts)
    return encoding, spans


def _learned_mask(encoding: Encoding, spans: Sequence[Span]) -> list[bool]:
    learned = _learned_ranges(spans)
    return [any(low <= start < high for low, high in learned) for start, _ in encoding.offsets]


def require_tokens(tokenizer: Tokenizer, template: ChatTemplate, bos: str, eos: str) -> None:
    """Raise BimedixError unless the tokenizer has each special token of the template as one token."""
    parts = template.start + (template.system or "") + template.human + template.answer
    for text, role in ((bos, "bos"), (eos, "eos")):
        if "{" + role + "}" in parts and not text:
            raise BimedixError(
                f"the {template.name} template needs a {role}_token, which {tokenizer.folder} lacks; add it"
            )
    for text in tokenizer.special_texts:
        if text in parts.replace("{bos}", bos).replace("{eos}", eos) and tokenizer.flags(text).single_word:
            raise BimedixError(
                f"the {template.name} template needs the token {text}, which {tokenizer.folder} declares as a "
                "single_word, so that it is no token beside a word; remove that flag"
            )
    for text in re.findall(r"<\|im_\w+\|>", parts):
        if tokenizer.token_id(text) is None:
            raise BimedixError(
                f"the {template.name} template needs the token {text}, which {tokenizer.folder} lacks; "
                "name another template"
            )


def _learned_ranges(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Character ranges that the loss counts; adjacent ones are joined."""
    ranges: list[tuple[int, int]] = []
    position = 0
    for span in spans:
        end = position + len(span.text)
        if span.learned and ranges and ranges[-1][1] == position:
            ranges[-1] = (ranges[-1][0], end)
        elif span.learned:
            ranges.append((position, end))
        position = end
    return ranges


def _markup_specials(spans: Iterable[Span], special_texts: Sequence[str]) -> list[tuple[int, int]]:
    """Character ranges of the special tokens that the template itself wrote."""
    if not special_texts:
        return []
    pattern = re.compile("|".join(map(re.escape, special_texts)))
    ranges, position = [], 0
    for span in spans:
        if span.markup:
            ranges += [(position + match.start(), position + match.end()) for match in pattern.finditer(span.text)]
        position += len(span.text)
    return ranges


BLANK = r"[^\S\x1c-\x1f]*"
"""What a token with `lstrip` or `rstrip` takes with it: Unicode's White_Space, without what only Python adds."""


def _without_blanks(tokenizer: Tokenizer, text: str, encoding: Encoding) -> Encoding:
    """The offsets of tokens that take blanks with them, without those blanks."""
    if not tokenizer.stripping_ids:
        return encoding
    offsets = list(encoding.offsets)
    for number, token in enumerate(encoding.ids):
        if token in tokenizer.stripping_ids:
            low, high = offsets[number]
            found = text[low:high]
            low += len(found) - len(found.lstrip())
            offsets[number] = low, low + len(found.strip())
    return Encoding(encoding.ids, offsets)


def _special_ranges(tokenizer: Tokenizer, encoding: Encoding) -> list[tuple[int, int]]:
    special = tokenizer.special_ids
    return [offset for token, offset in zip(encoding.ids, encoding.offsets, strict=True) if token in special]


def _is_inside_a_token(edge: int, encoding: Encoding) -> bool:
    return any(start < edge < end for start, end in encoding.offsets)


def _encode_in_pieces(
    tokenizer: Tokenizer, text: str, special: Sequence[tuple[int, int]], cuts: Iterable[int]
) -> Encoding:
    """Encode the text between the template's special tokens, cut at `cuts` too; each piece alone, as ordinary text."""
    tokens = dict(special)
    edges = sorted({0, len(text), *cuts, *(edge for span in special for edge in span)})
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in zip(edges, edges[1:], strict=False):
        if tokens.get(start) == end:
            found = tokenizer.token_id(text[start:end])
            assert found is not None  # it is one of the tokenizer's own special texts
            ids.append(found)
            offsets.append((start, end))
            continue
        follows_special = any(stop == start for _, stop in special)
        if tokenizer.stripping_ids:
            before = next((text[low:high] for low, high in special if high == start), None)
            after = text[end : tokens[end]] if end in tokens else None
            if before is not None and tokenizer.flags(before).rstrip:
                start += len(re.match(BLANK, text[start:end])[0])  # pyright: ignore  # it always matches
            if after is not None and tokenizer.flags(after).lstrip:
                end = start + len(re.sub(BLANK + r"\Z", "", text[start:end]))
        opens = start == 0 or (follows_special and tokenizer.restarts_after_special)
        piece = (
            tokenizer.encode_with_offsets(text[start:end], literal=True)
            if opens
            else _continue(tokenizer, text[start:end])
        )
        ids += piece.ids
        offsets += [(start + low, start + high) for low, high in piece.offsets]
    return Encoding(ids, offsets)


def _continue(tokenizer: Tokenizer, text: str) -> Encoding:
    """Encode text that continues other text, without the word-start mark that SentencePiece puts before a text."""
    joined = tokenizer.encode_with_offsets("\n" + text, literal=True)
    if _is_inside_a_token(1, joined):
        return tokenizer.encode_with_offsets(text, literal=True)
    kept = [
        (token, low - 1, high - 1) for token, (low, high) in zip(joined.ids, joined.offsets, strict=True) if low >= 1
    ]
    return Encoding([token for token, *_ in kept], [(low, high) for _, low, high in kept])


@dataclass(frozen=True)
class Encoded:
    """A batch of conversations with their tokens in one array, which is cheap to send between processes."""

    names: list[tuple[str, str, str, str]]  # id, language, kind, source
    lengths: np.ndarray  # int64 [N]
    tokens: np.ndarray  # int32 [sum of lengths]
    learned: np.ndarray  # bool [sum of lengths]

    def examples(self) -> Iterator[Example]:
        """The conversations as copies: a view would keep the whole batch in memory until its row is full."""
        end = 0
        for names, length in zip(self.names, self.lengths.tolist(), strict=True):
            start, end = end, end + length
            yield Example(*names, self.tokens[start:end].copy(), self.learned[start:end].copy())


class ChatEncoder:
    """The tokens and loss masks of `encode_chat`, faster where the ids of words can be cached (tokenizer_words.py)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._template = template = tokenizer.template
        self._words = WordEncoder(tokenizer) if WordEncoder.supports(tokenizer) else None
        bos, eos = tokenizer.special.get("bos", ""), tokenizer.special.get("eos", "")
        require_tokens(tokenizer, template, bos, eos)
        wrappers = (template.start, template.system, template.human)
        answer = (template.answer_opening, template.answer, template.answer_closing)
        self._wrappers = {wrapper: self._pieces(wrapper, bos, eos) for wrapper in (*wrappers, *answer) if wrapper}

    def encode(self, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [N] and whether each is learned, bool [N]."""
        if self._words is None:
            ids, mask = encode_chat(self.tokenizer, turns)
            return np.asarray(ids, np.int32), np.asarray(mask, bool)
        pieces = self._cached_pieces(turns, self._words)
        tokens = np.frombuffer(b"".join([ids for ids, _ in pieces]), np.int32)
        sizes = [len(ids) // 4 for ids, _ in pieces]
        return tokens, np.repeat([learned for _, learned in pieces], sizes)

    def _cached_pieces(self, turns: Sequence[Turn], words: WordEncoder) -> list[tuple[bytes, bool]]:
        """Ids and whether they are learned, for each piece between special tokens and edges of learned text.

        Cutting at an edge changes no token: encode_chat cuts there as well if a token would span the edge, and if none
        does, encoding the two sides separately gives the same tokens.
        """
        found = []
        opens, stretch, was_learned = True, "", False
        for wrapper, value, learned in self._template.parts(turns):
            for text, special in self._wrappers.get(wrapper, ()):
                if stretch and (special is not None or learned != was_learned):
                    found.append((words.encode(stretch, opens), was_learned))
                    opens, stretch = False, ""
                if special is None:
                    stretch, was_learned = stretch + (value if text is None else text), learned
                else:
                    found.append((special, learned))
                    opens = self.tokenizer.restarts_after_special
        if stretch:
            found.append((words.encode(stretch, opens), was_learned))
        return found

    def _pieces(self, wrapper: str, bos: str, eos: str) -> list[tuple[str | None, bytes | None]]:
        """A wrapper as (text, None) and (special token, its id) in order; (None, None) is the text of the turn."""
        texts = self.tokenizer.special_texts
        pattern = re.compile(f"({'|'.join(map(re.escape, texts))})" if texts else r"(?!)")
        sides = [
            [(part, self._special(part) if part in texts else None) for part in pattern.split(side) if part]
            for side in split_wrapper(wrapper, bos, eos)
        ]
        return [*sides[0], *([(None, None)] if "{text}" in wrapper else []), *sides[1]]

    def _special(self, text: str) -> bytes:
        found = self.tokenizer.token_id(text)
        assert found is not None  # it is one of the tokenizer's own special texts
        return np.int32(found).tobytes()


@dataclass(frozen=True)
class EncodeLines:
    """What a worker process does: lines of JSON to `Encoded`. The tokenizer is loaded in that process."""

    tokenizer: str  # folder
    template: str | None
    file: str  # where the lines come from, for error messages
    split: str | None  # encode only records of this split; None: all

    @cached_property
    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(load_tokenizer(self.tokenizer, self.template))

    def __call__(self, lines: Sequence[tuple[int, bytes]]) -> Encoded:
        """Encode the records of a batch of lines, each given with its byte offset in the file.

        Raises:
            BimedixError: a line is not a record.
        """
        records = [parse(line, f"{self.file} at byte {offset}") for offset, line in lines]
        return encode_records(self._encoder, [r for r in records if self.split in (None, r.split)])


def encode_records(encoder: ChatEncoder, records: Sequence[Record]) -> Encoded:
    """A list of records as one `Encoded`."""
    found = [encoder.encode(record.conversations) for record in records]
    return Encoded(
        [(record.id, record.language, record.kind, record.source) for record in records],
        np.array([len(tokens) for tokens, _ in found], np.int64),
        np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in found)]),
        np.concatenate([np.empty(0, bool), *(learned for _, learned in found)]),
    )
