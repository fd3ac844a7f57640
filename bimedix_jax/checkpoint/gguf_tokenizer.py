"""The tokenizer inside a GGUF file -> tokenizer.json and tokenizer_config.json.

GGUF has the vocabulary, merges, token types and the *name* of a pre-tokenizer. The regular expressions of that name are
in llama.cpp's source (src/llama-vocab.cpp); the table here has those that Llama-architecture models use.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimedix_jax.errors import BimedixError

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
            f"{path} needs the pre-tokenizer {pre!r}, but only {', '.join(PRE_TOKENIZERS)} are known; convert from the "
            "model's safetensors folder instead."
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3 uses a piece that is a whole token without any merge
    whole_first = PRE_TOKENIZERS[pre] is _llama3
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_first))
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

    keys = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens = keys.get("tokens")
    if not tokens:
        raise BimedixError(f"{path} has no vocabulary; convert from the model's safetensors folder instead.")
    kind = keys.get("model")
    if kind == "gpt2":
        tokenizer = byte_level(tokens, keys.get("merges", ()), keys.get("pre", "missing"), path)
        adds_bos = bool(keys.get("add_bos_token", False))
    elif kind == "llama" and len(keys.get("scores", ())) == len(tokens):
        unknown = keys.get("unknown_token_id", 0)
        tokenizer = sentencepiece_bpe(tokens, keys["scores"], bool(keys.get("add_space_prefix", True)), unknown)
        adds_bos = bool(keys.get("add_bos_token", True))  # llama.cpp's default for SentencePiece
    else:
        raise BimedixError(
            f"{path} has a tokenizer of kind {kind!r}; only 'gpt2' and 'llama' (with scores) are implemented."
        )
    types = keys.get("token_type", ())
    for special, wanted in ((True, CONTROL), (False, USER_DEFINED)):
        added = [
            AddedToken(t, normalized=False, special=special) for t, k in zip(tokens, types, strict=False) if k == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    names = {
        f"{name}_token": tokens[keys[f"{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"{key}_token_id" in keys
    }
    if adds_bos and "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, keys["bos_token_id"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "model_max_length": metadata.get("llama.context_length"),
        **names,
    }
    if "tokenizer.chat_template" in metadata:
        written["chat_template"] = metadata["tokenizer.chat_template"]
    text = json.dumps(written, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")
