"""One tokenizer interface over a checkpoint's own files: `tokenizer.json`, or a SentencePiece `tokenizer.model`.

Both run in the `tokenizers` library. A SentencePiece BPE model is read with `sentencepiece` and rebuilt there exactly
as transformers' LlamaTokenizer does it, so ids, special tokens and character offsets are those of Hugging Face.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from bimedix_jax.data import templates
from bimedix_jax.data.templates import ChatTemplate
from bimedix_jax.errors import BimedixError

ROLES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class Encoding:
    """Token ids and, for each, the half-open range of characters it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Build one with `load_tokenizer`."""

    folder: Path
    engine: tokenizers.Tokenizer
    special: dict[str, str]  # role (bos, eos, pad, unk) -> text, where the checkpoint names one
    stop_ids: tuple[int, ...]  # ids that end generation: eos, what generation_config.json adds, and the end of a turn
    fingerprint: str  # SHA-256 over the files that decide the ids
    template_name: str | None = field(default=None)  # overrides what the checkpoint's own template says

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.engine.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, None where the checkpoint has none."""
        return self._id("bos")

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token.

        Raises:
            BimedixError: the checkpoint names none.
        """
        found = self._id("eos")
        if found is None:
            raise BimedixError(f"{self.folder} names no eos_token; add one to its tokenizer_config.json")
        return found

    @property
    def pad_id(self) -> int:
        """Id to fill rows with: the pad token, else eos. Segment id 0 marks padding, so any id would do."""
        found = self._id("pad")
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
    def restarts_after_special(self) -> bool:
        """Whether text after a special token is encoded as at the start of a text (SentencePiece's word-start mark)."""
        alone = self.engine.encode("a", add_special_tokens=False).ids
        return all(
            self.engine.encode(f"{text}a", add_special_tokens=False).ids[1:] == alone for text in self.special_texts[:1]
        )

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template: the one that was named, or else the checkpoint's own; see templates.detect."""
        if self.template_name is not None:
            return templates.named(self.template_name)
        return templates.detect(self.folder, bos=self.special.get("bos", ""), eos=self.special.get("eos", ""))

    def token_id(self, text: str) -> int | None:
        """Id of a token by its exact text, None if the vocabulary lacks it."""
        return self.engine.token_to_id(text)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of `text`, as transformers' `encode(text, add_special_tokens=False)`.

        Special tokens spelled out in `text` become those tokens: for text that is not ours use `encode_chat`.
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
        """A copy that does not look for special tokens; a copy, since that switch would be shared between threads."""
        engine = tokenizers.Tokenizer.from_str(self.engine.to_str())
        engine.encode_special_tokens = True
        return engine

    def _id(self, role: str) -> int | None:
        text = self.special.get(role)
        return None if text is None else self.engine.token_to_id(text)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether `load_tokenizer` finds the files of a tokenizer in `folder`."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(folder: str | Path, template: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder. `template` names a chat template instead of recognising the folder's own.

    Raises:
        BimedixError: the folder holds neither tokenizer.json nor a SentencePiece BPE model, or they cannot be read.
    """
    place = Path(folder)
    config = _json(place / "tokenizer_config.json")
    if (place / "tokenizer.json").is_file():
        path = place / "tokenizer.json"
        try:
            engine = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise BimedixError(f"{path} is not a tokenizer that can be read ({error}); fetch it again") from error
    elif (place / "tokenizer.model").is_file():
        path = place / "tokenizer.model"
        engine = _from_sentencepiece(path, legacy=config.get("legacy") is True)
    else:
        raise BimedixError(f"{place} holds neither tokenizer.json nor tokenizer.model; name a folder with a tokenizer")
    engine.post_processor = None  # it would add special tokens and cut leading spaces out of the offsets
    engine.no_padding()
    engine.no_truncation()
    special = _special_texts(place, config, engine)
    _add_missing(engine, config, special)
    decisive = [
        path,
        *(p for p in (place / "tokenizer_config.json",) if path.name == "tokenizer.model" and p.is_file()),
    ]
    digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in decisive)).hexdigest()
    bare = Tokenizer(place, engine, special, (), digest, template)
    return Tokenizer(place, engine, special, _stop_ids(place, bare), digest, template)


def fertility(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """Tokens per whitespace-separated word and per UTF-8 byte of `texts`, and the three counts."""
    tokens = words = size = 0
    for text in texts:
        tokens += len(tokenizer.encode_with_offsets(text, literal=True).ids)
        words += len(text.split())
        size += len(text.encode())
    if not size or not words:
        raise BimedixError("there is no text to measure fertility on; give at least one word")
    return {"tokens": tokens, "words": words, "bytes": size, "per_word": tokens / words, "per_byte": tokens / size}


def byte_tokenizer(folder: str | Path) -> Tokenizer:
    """Write a byte-level tokenizer (304 ids: 256 bytes, 4 special tokens, 44 reserved) with a ChatML template.

    It needs no download and no training, and serves tests and the offline smoke run.
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


def _from_sentencepiece(path: Path, legacy: bool) -> tokenizers.Tokenizer:
    """A SentencePiece BPE model in the `tokenizers` library, after transformers 5 (LlamaTokenizer, generate_merges).

    `legacy` (tokenizer_config.json) puts the word-start mark after every special token instead of only at the start.
    """
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise BimedixError(f"{path} is not a SentencePiece model ({error}); fetch it again") from error
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    engine = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(vocabulary), fuse_unk=True, byte_fallback=True)
    )
    engine.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always" if legacy else "first", split=False)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    control = [piece for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
    engine.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    probe = "Take 2 tablets (500 mg), twice daily.\nخذ قرصين مرتين يوميًا؛ 1.5 mg/kg — naïve β-blocker 😀"
    if engine.encode(probe, add_special_tokens=False).ids != model.encode(probe):
        raise BimedixError(f"{path} is not a plain SentencePiece BPE model; put a tokenizer.json beside it")
    return engine


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, in the order in which BPE joins them: by the result's id, then by length."""
    found = []
    for piece, rank in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((rank, len(left), len(right), left, right))
    return [(left, right) for *_, left, right in sorted(found, key=lambda pair: pair[:3])]


def _special_texts(folder: Path, config: dict[str, Any], engine: tokenizers.Tokenizer) -> dict[str, str]:
    """Role -> text: tokenizer_config.json, then special_tokens_map.json, then the ids of the two model configs."""
    texts: dict[str, str] = {}
    for source in (config, _json(folder / "special_tokens_map.json")):
        for role in ROLES:
            value = source.get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                texts.setdefault(role, text)
    for source in (_json(folder / "generation_config.json"), _json(folder / "config.json")):
        for role in ROLES:
            ids = _ids(source.get(f"{role}_token_id"))
            text = engine.id_to_token(ids[0]) if ids else None
            if text is not None:
                texts.setdefault(role, text)
    if (folder / "tokenizer.model").is_file():  # transformers' LlamaTokenizer has these defaults
        for role, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>")):
            if engine.token_to_id(text) is not None:
                texts.setdefault(role, text)
    return texts


def _add_missing(engine: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str]) -> None:
    """Make the named special tokens special, and add those of `added_tokens_decoder` that the vocabulary lacks.

    Raises:
        BimedixError: an added token's id is not the one its file states: every id after it would be shifted.
    """
    for name, row in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if engine.token_to_id(row["content"]) is None:
            token = AddedToken(row["content"], normalized=bool(row.get("normalized")), special=bool(row.get("special")))
            (engine.add_special_tokens if token.special else engine.add_tokens)([token])
        if engine.token_to_id(row["content"]) != int(name):
            actual = engine.token_to_id(row["content"])
            raise BimedixError(f"tokenizer_config.json gives {row['content']!r} the id {name}, the vocabulary {actual}")
    for role, text in special.items():
        if engine.token_to_id(text) is None:
            raise BimedixError(f"the {role}_token {text!r} is not in the vocabulary; correct tokenizer_config.json")
        if engine.token_to_id(text) not in engine.get_added_tokens_decoder():
            engine.add_special_tokens([AddedToken(text, normalized=False, special=True)])


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    found: list[int | None] = [
        tokenizer._id("eos"),
        *_ids(_json(folder / "generation_config.json").get("eos_token_id")),
    ]
    for text in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"):
        if text in tokenizer.special_texts:
            found.append(tokenizer.token_id(text))
    return tuple(dict.fromkeys(i for i in found if i is not None))


def _ids(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BimedixError(f"{path} is not valid JSON ({error}); fetch it again") from error
