"""The tokenizer inside a GGUF file -> tokenizer.json and tokenizer_config.json.

GGUF has the vocabulary, merges, token types and the *name* of a pre-tokenizer. The regular expressions of that name are
in llama.cpp's source (src/llama-vocab.cpp); the table here has those that Llama-architecture models use.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from bimedix_jax.errors import BimedixError
from bimedix_jax.files import validate

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

CONTROL, USER_DEFINED = 3, 4
"""Token types: special tokens, and added tokens that are not special."""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern in Llama 3's own tokenizer.json."""

NO_TOKEN = (-1, 2**32 - 1)
"""What llama.cpp writes for a special token that a model does not have."""

INSTEAD = "convert from the model's safetensors folder instead"


class Keys(BaseModel):
    """The keys `tokenizer.ggml.*` of a GGUF file that determine token ids, without that prefix."""

    tokens: Annotated[list[str], Field(min_length=1)]
    model: str
    pre: str = "missing"
    merges: list[str] = []
    scores: list[float] | None = None
    token_type: list[int] = []
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    unknown_token_id: int | None = None
    padding_token_id: int | None = None
    add_bos_token: bool | None = None
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False
    precompiled_charsmap: list[int] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        size = len(self.tokens)
        if len(set(self.tokens)) < size:
            raise ValueError("a token is twice in tokenizer.ggml.tokens")
        for name in ("scores", "token_type"):
            found = getattr(self, name)
            if found and len(found) != size:
                raise ValueError(f"tokenizer.ggml.{name} has {len(found)} entries for {size} tokens")
        for name, number in self.special().items():
            if not 0 <= number < size:
                raise ValueError(f"tokenizer.ggml.{name}_token_id is {number}, but there are {size} tokens")
        if self.remove_extra_whitespaces or self.precompiled_charsmap:
            raise ValueError("its tokenizer normalises text (remove_extra_whitespaces, precompiled_charsmap)")
        return self

    def special(self) -> dict[str, int]:
        """Ids of the special tokens that the file names, by GGUF's names (bos, eos, unknown, padding)."""
        ids = {name: getattr(self, f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
        return {name: number for name, number in ids.items() if number is not None and number not in NO_TOKEN}


def _gpt2() -> "PreTokenizer":
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> "PreTokenizer":
    """Splits off every digit, then applies GPT-2's pattern: SmolLM, StarCoder."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[], "PreTokenizer"]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "command-r": _single_digits,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
}


def byte_level(tokens: Sequence[str], merges: Sequence[str], pre: str, path: Path) -> "Tokenizer":
    """Byte-level BPE (GGUF model 'gpt2')."""
    from tokenizers import Tokenizer, decoders, models

    if pre not in PRE_TOKENIZERS:
        raise BimedixError(
            f"{path} needs the pre-tokenizer {pre!r}, but only {', '.join(PRE_TOKENIZERS)} are known; {INSTEAD}."
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3 uses a piece that is a whole token without any merge
    whole_first = PRE_TOKENIZERS[pre] is _llama3
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_first)
    except Exception as error:  # the Rust library raises bare Exception
        raise BimedixError(f"{path} has merges that do not fit its vocabulary ({error}); {INSTEAD}.") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(tokens: Sequence[str], scores: Sequence[float], space_prefix: bool, unknown: int) -> "Tokenizer":
    """SentencePiece BPE with byte fall-back (GGUF model 'llama'): merges in the order of their result's score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(vocabulary[a], vocabulary[b], a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        ranked += [(-score, left, right, a, b) for left, right, a, b in sorted(known)]
    ranked.sort(key=lambda entry: entry[0])  # stable: equal scores stay in vocabulary order
    merges = [(a, b) for *_, a, b in ranked]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, path: Path) -> None:
    """tokenizer.json and tokenizer_config.json in `folder`, from the metadata of the GGUF file at `path`.

    Raises BimedixError for a tokenizer model or pre-tokenizer that is not implemented.
    """
    from tokenizers import AddedToken, processors

    if not metadata.get("tokenizer.ggml.tokens"):
        raise BimedixError(f"{path} has no vocabulary; {INSTEAD}.")
    prefix = "tokenizer.ggml."
    found = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    keys = validate(found, Keys, str(path), INSTEAD)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise BimedixError(f"{path} has a tokenizer.chat_template that is not text; {INSTEAD}.")
    tokens, special = keys.tokens, keys.special()
    if keys.model == "gpt2":
        tokenizer = byte_level(tokens, keys.merges, keys.pre, path)
        adds_bos = bool(keys.add_bos_token)
    elif keys.model == "llama" and keys.scores:
        tokenizer = sentencepiece_bpe(tokens, keys.scores, keys.add_space_prefix, special.get("unknown", 0))
        adds_bos = keys.add_bos_token is not False  # llama.cpp's default for SentencePiece
    else:
        raise BimedixError(
            f"{path} has a tokenizer of kind {keys.model!r}; only 'gpt2' and 'llama' (with scores) are implemented."
        )
    for is_special, wanted in ((True, CONTROL), (False, USER_DEFINED)):
        added = [
            AddedToken(t, normalized=False, special=is_special)
            for t, k in zip(tokens, keys.token_type, strict=False)
            if k == wanted
        ]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    names = {
        f"{name}_token": tokens[special[key]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if key in special
    }
    if adds_bos and "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special["bos"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "model_max_length": metadata.get("llama.context_length"),
        **names,
    }
    if template is not None:
        written["chat_template"] = template
    text = json.dumps(written, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")
