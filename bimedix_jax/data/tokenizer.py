"""One tokenizer interface over a checkpoint's own files: `tokenizer.json`, or a SentencePiece `tokenizer.model`.

Both run in the `tokenizers` library. A SentencePiece BPE model is read with `sentencepiece` and rebuilt there exactly
as transformers' LlamaTokenizer does it (tokenizer_build.py), so ids, special tokens and character offsets are those of
Hugging Face.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from bimedix_jax.data import templates
from bimedix_jax.data.template_detection import detect
from bimedix_jax.data.templates import ChatTemplate
from bimedix_jax.data.tokenizer_build import build
from bimedix_jax.data.tokenizer_files import TokenIds, read_if_present
from bimedix_jax.errors import BimedixError

MARKUP = re.compile(r"<\|.+\|>|<(start|end)_of_turn>", re.DOTALL)
"""Added tokens that a chat template writes, and a user must not be able to write."""


@dataclass(frozen=True)
class Encoding:
    """Token ids, and for each the half-open range of characters that it covers."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Build one with `load_tokenizer`."""

    folder: Path
    engine: tokenizers.Tokenizer
    special: dict[str, str]  # role (bos, eos, pad, unk) -> text, where the checkpoint names one
    stop_ids: tuple[int, ...]  # ids that end generation: eos, those of generation_config.json, and the end of a turn
    fingerprint: str  # SHA-256 of the files that determine the ids
    template_name: str | None = field(default=None)  # the template to use instead of the checkpoint's own

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.engine.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, None where the checkpoint has none."""
        return self.id_of("bos")

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token.

        Raises:
            BimedixError: the checkpoint names none.
        """
        found = self.id_of("eos")
        if found is None:
            raise BimedixError(f"{self.folder} names no eos_token; add one to its tokenizer_config.json")
        return found

    @property
    def pad_id(self) -> int:
        """Id at padding: the pad token, else eos. Segment id 0 marks padding, so any id would do."""
        found = self.id_of("pad")
        return self.eos_id if found is None else found

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Every text that `encode` turns into one special token, longest first."""
        added = self.engine.get_added_tokens_decoder().values()
        return tuple(sorted({token.content for token in added}, key=lambda text: (-len(text), text)))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of `special_texts`."""
        return frozenset(self.engine.get_added_tokens_decoder())

    @cached_property
    def stripping_ids(self) -> frozenset[int]:
        """Those of `special_ids` that take the blanks beside them with them (`lstrip`, `rstrip`)."""
        return frozenset(number for number, token in self._added.items() if token.lstrip or token.rstrip)

    def flags(self, text: str) -> AddedToken:
        """One of `special_texts` with its flags (`lstrip`, `rstrip`, `single_word`)."""
        number = self.engine.token_to_id(text)
        assert number is not None
        return self._added[number]

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.engine.get_added_tokens_decoder()

    @cached_property
    def restarts_after_special(self) -> bool:
        """Whether text after a special token gets SentencePiece's word-start mark, as at the start of a text."""
        alone = self.engine.encode("a", add_special_tokens=False).ids
        return all(
            self.engine.encode(f"{text}a", add_special_tokens=False).ids[1:] == alone for text in self.special_texts[:1]
        )

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template: the one that was named, or else the checkpoint's own; see template_detection.detect."""
        if self.template_name is not None:
            return templates.named(self.template_name)
        return detect(self.folder, self.special)

    def token_id(self, text: str) -> int | None:
        """Id of a token by its exact text, None if the vocabulary lacks it."""
        return self.engine.token_to_id(text)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of `text`, as transformers' `encode(text, add_special_tokens=False)`.

        Special tokens spelled out in `text` become those tokens; use `encode_chat` for text from a user.
        """
        ids = self.engine.encode(text, add_special_tokens=False).ids
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise BimedixError(f"{self.folder} names no bos_token; call encode without add_bos")
        return [self.bos_id, *ids]

    def encode_with_offsets(self, text: str, literal: bool = False) -> Encoding:
        """Ids and character offsets. With `literal`, special tokens spelled out in `text` stay ordinary text."""
        encoding = (self._literal_engine if literal else self.engine).encode(text, add_special_tokens=False)
        return Encoding(encoding.ids, encoding.offsets)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.engine.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @cached_property
    def _literal_engine(self) -> tokenizers.Tokenizer:
        """A copy of the engine that treats special tokens as text; switching the engine itself is not thread-safe.

        Some checkpoints declare `<|im_start|>` as an added token that is not special; it is treated as text too.
        """
        spec = json.loads(self.engine.to_str())
        for token in spec["added_tokens"]:
            token["special"] |= bool(MARKUP.fullmatch(token["content"]))
        engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        engine.encode_special_tokens = True
        return engine

    def id_of(self, role: str) -> int | None:
        """Id of the special token of a role (bos, eos, pad, unk), None where the checkpoint names none."""
        text = self.special.get(role)
        return None if text is None else self.engine.token_to_id(text)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether `load_tokenizer` finds the files of a tokenizer in `folder`."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(folder: str | Path, template: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder. `template` names a chat template to use instead of the folder's own.

    Raises:
        BimedixError: the folder has neither tokenizer.json nor a SentencePiece BPE model, or they cannot be read.
    """
    place = Path(folder)
    built = build(place)
    bare = Tokenizer(place, built.engine, built.special, (), built.fingerprint, template)
    return dataclasses.replace(bare, stop_ids=_stop_ids(place, bare))


def fertility(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """Tokens per whitespace-separated word and per UTF-8 byte of `texts`, with the three counts."""
    tokens = words = size = 0
    for text in texts:
        tokens += len(tokenizer.encode_with_offsets(text, literal=True).ids)
        words += len(text.split())
        size += len(text.encode())
    if not size or not words:
        raise BimedixError("fertility needs a text with at least one word; give one")
    return {"tokens": tokens, "words": words, "bytes": size, "per_word": tokens / words, "per_byte": tokens / size}


def byte_tokenizer(folder: str | Path) -> Tokenizer:
    """Write a byte-level tokenizer (304 ids: 256 bytes, 4 special tokens, 44 reserved) with a ChatML template.

    It needs no download and no training. Tests and the offline smoke run use it.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    engine = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", *(f"<|reserved_{i}|>" for i in range(44))]
    engine.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    engine.save(str(place / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": templates.named("chatml").jinja,
    }
    (place / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return load_tokenizer(place)


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    found = [tokenizer.id_of("eos"), *read_if_present(folder / "generation_config.json", TokenIds).ids("eos")]
    for text in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"):
        if text in tokenizer.special_texts:
            found.append(tokenizer.token_id(text))
    return tuple(dict.fromkeys(i for i in found if i is not None))
