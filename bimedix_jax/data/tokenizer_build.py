"""The files of a tokenizer -> an engine of the `tokenizers` library with the ids of transformers.

transformers 5 builds some tokenizers from the vocabulary and the class that tokenizer_config.json names, not from what
tokenizer.json says about spaces. The classes that it rebuilds and that Llama-like models use are handled here:
LlamaTokenizer (with `legacy` and `add_prefix_space`), GPT2Tokenizer and Qwen2Tokenizer (`add_prefix_space`). Every
other class is read from tokenizer.json as it is.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from bimedix_jax import files
from bimedix_jax.data.tokenizer_files import (
    ROLES,
    AddedTokenFields,
    SpecialTokens,
    Token,
    TokenIds,
    TokenizerConfig,
    read_added_tokens,
    read_if_present,
)
from bimedix_jax.errors import BimedixError
from bimedix_jax.files import peek_json

DEFAULTS = {
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "GPT2Tokenizer": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"},
}
"""Special tokens that a class of transformers has where its files name none. Used if the vocabulary has them."""

READ_LITERALLY = ("mistral", "mixtral")
"""model_type of a config.json with which transformers reads tokenizer.json as it is, also for LlamaTokenizer."""


@dataclass(frozen=True)
class Built:
    """An engine, the special tokens by role, and the SHA-256 of what determines the ids."""

    engine: tokenizers.Tokenizer
    special: dict[str, str]
    fingerprint: str


@dataclass(frozen=True)
class _Added:
    """What the files add to the vocabulary, in transformers' order: tokens with ids, then special tokens without."""

    numbered: dict[int, AddedTokenFields]
    special: list[Token]
    roles: dict[str, str]
    files: list[Path]  # those besides tokenizer_config.json that were read


def build(folder: Path) -> Built:
    """The tokenizer of a checkpoint folder.

    Raises:
        BimedixError: the folder has neither tokenizer.json nor a SentencePiece BPE model, or they cannot be read.
    """
    config = read_if_present(folder / "tokenizer_config.json", TokenizerConfig)
    if config.split_special_tokens:
        raise BimedixError(
            f"{folder / 'tokenizer_config.json'} has split_special_tokens = true, with which no chat template works; "
            "remove the key"
        )
    kind = (config.tokenizer_class or "").removesuffix("Fast")
    own: list[AddedToken] = []
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        engine, changed = _from_json(path, kind, config)
    elif (folder / "tokenizer.model").is_file():
        path = folder / "tokenizer.model"
        engine, own = _from_sentencepiece(path, config)
        kind, changed = "LlamaTokenizer", ""
    else:
        raise BimedixError(_no_tokenizer(folder))
    engine.post_processor = None  # it would add special tokens and trim leading spaces from the offsets
    engine.no_padding()
    engine.no_truncation()
    added = _added(folder, config)
    before = _added_rows(engine)
    _add(engine, folder, added, own if not _has_extras(config) else [])
    decisive = [path]
    if path.name == "tokenizer.model" and (folder / "tokenizer_config.json").is_file():
        decisive.append(folder / "tokenizer_config.json")
    if path.name == "tokenizer.json" or added.files:  # otherwise the configuration, which is hashed, has them all
        changed += "".join(row for row in _added_rows(engine) if row not in before)
    digests = [hashlib.sha256(p.read_bytes()).digest() for p in decisive]
    roles = _roles(folder, added.roles, engine, kind)
    return Built(engine, roles, hashlib.sha256(b"".join(digests) + changed.encode()).hexdigest())


def _added_rows(engine: tokenizers.Tokenizer) -> list[str]:
    return [json.dumps(row, sort_keys=True) for row in json.loads(engine.to_str())["added_tokens"]]


def _no_tokenizer(folder: Path) -> str:
    """The sentence for a folder without a tokenizer that can be read; names what is there instead."""
    experiment = peek_json(folder / "config.json")
    if "optimiser" in experiment:  # a folder that `bimedix train` wrote
        model = experiment.get("model")
        base = model.get("path") if isinstance(model, dict) else None
        where = f"that of its base, for instance `--tokenizer {base}`" if base else "that of its base with --tokenizer"
        return f"{folder} is a training run, which has no tokenizer; name {where}"
    other = [name for name in ("vocab.json", "tekken.json", "vocab.txt", "spiece.model") if (folder / name).is_file()]
    found = f" (found {other[0]}, which is not read)" if other else ""
    remedy = (
        "save it with transformers' save_pretrained, which writes tokenizer.json"
        if other
        else "name a folder with a tokenizer"
    )
    return f"{folder} has neither tokenizer.json nor tokenizer.model{found}; {remedy}"


def _from_json(path: Path, kind: str, config: TokenizerConfig) -> tuple[tokenizers.Tokenizer, str]:
    """tokenizer.json as transformers' class reads it, and what differs from the file ("" if nothing does)."""
    text = files.read_text(path)
    try:
        engine = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises bare Exception
        raise BimedixError(f"{path} cannot be read as a tokenizer ({error}); fetch it again") from error
    spec = json.loads(engine.to_str())
    if kind == "LlamaTokenizer" and spec["model"]["type"] == "BPE" and not _byte_level(spec):
        if peek_json(path.parent / "config.json").get("model_type") in READ_LITERALLY:
            return engine, ""
        _as_llama(spec, config)
    elif kind in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        for part in _byte_level(spec):
            part["add_prefix_space"] = config.add_prefix_space is True
    rebuilt = tokenizers.Tokenizer.from_str(json.dumps(spec))
    if rebuilt.to_str() == engine.to_str():
        return engine, ""
    return rebuilt, json.dumps([spec["pre_tokenizer"], spec["normalizer"]], sort_keys=True)


def _byte_level(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The ByteLevel pre-tokenizers of a tokenizer.json."""
    top = spec["pre_tokenizer"]
    parts = [] if top is None else top.get("pretokenizers", [top])
    return [part for part in parts if part["type"] == "ByteLevel"]


def _as_llama(spec: dict[str, Any], config: TokenizerConfig) -> None:
    """Replaces what tokenizer.json says about spaces by what LlamaTokenizer does: the `legacy` key decides."""
    plain = tokenizers.Tokenizer(models.BPE())
    _mark_words(plain, config)
    parts = json.loads(plain.to_str())
    spec["normalizer"] = None
    spec["pre_tokenizer"], spec["decoder"] = parts["pre_tokenizer"], parts["decoder"]
    spec["model"] |= {"fuse_unk": True, "byte_fallback": True, "unk_token": None}


def _mark_words(engine: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Word-start marks as LlamaTokenizer sets them: with `legacy`, after every special token too."""
    prefix = config.add_prefix_space is not False
    scheme = ("always" if config.legacy is True else "first") if prefix else "never"
    engine.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]  # pyright: ignore
    )


def _from_sentencepiece(path: Path, config: TokenizerConfig) -> tuple[tokenizers.Tokenizer, list[AddedToken]]:
    """A SentencePiece BPE model, after transformers 5 (LlamaTokenizer, generate_merges), and the tokens it declares."""
    import sentencepiece

    files.require_content(path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise BimedixError(
            f"{path} is not a SentencePiece model ({error}); fetch it again, or add a tokenizer.json to the folder if "
            "it is a tiktoken file"
        ) from error
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    engine = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges(vocabulary), fuse_unk=True, byte_fallback=True)
    )
    probe = "Take 2 tablets (500 mg), twice daily.\nخذ قرصين مرتين يوميًا؛ 1.5 mg/kg — naïve β-blocker 😀"
    expected = model.encode(probe)
    for prefix in (True, False):  # a model may have been trained without the mark at the start of a text
        _mark_words(engine, TokenizerConfig(add_prefix_space=prefix))
        if engine.encode(probe, add_special_tokens=False).ids == expected:
            break
    else:
        raise BimedixError(f"{path} is not a plain SentencePiece BPE model; add a tokenizer.json to the folder")
    _mark_words(engine, config)
    declared = _declared(path, pieces)
    engine.add_special_tokens([AddedToken(pieces[model.unk_id()], normalized=False, special=True)])
    return engine, declared


def _declared(path: Path, pieces: Sequence[str]) -> list[AddedToken]:
    """Control pieces, which are special, and user-defined pieces of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore
    model.ParseFromString(path.read_bytes())
    control, user_defined = 3, 4
    return [
        AddedToken(piece, normalized=False, special=row.type == control)
        for piece, row in zip(pieces, model.pieces, strict=True)
        if row.type in (control, user_defined)
    ]


def merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that BPE merges, in order: by the id of the result, then by the lengths of the two."""
    found = []
    for piece, rank in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((rank, len(left), len(right), left, right))
    return [(left, right) for *_, left, right in sorted(found, key=lambda pair: pair[:3])]


def _has_extras(config: TokenizerConfig) -> bool:
    return bool({"additional_special_tokens", "extra_special_tokens"} & config.model_fields_set)


def _added(folder: Path, config: TokenizerConfig) -> _Added:
    """What tokenizer_config.json adds; if it has no `added_tokens_decoder`, also the two older files.

    special_tokens_map.json then precedes the configuration, and added_tokens.json has the ids.
    """
    extras = config.extra_special_tokens or config.additional_special_tokens or []
    extras = list(extras) if isinstance(extras, list) else []
    named = config.named()
    roles = {role: text for role in ROLES if (text := config.text(role)) is not None}
    if config.added_tokens_decoder is not None:
        return _Added(config.added_tokens_decoder, [*named.values(), *extras], roles, [])
    files = [path for name in ("special_tokens_map.json", "added_tokens.json") if (path := folder / name).is_file()]
    older = read_if_present(folder / "special_tokens_map.json", SpecialTokens)
    named |= older.named()
    roles |= {role: text for role in ROLES if (text := older.text(role)) is not None}
    more = older.extra_special_tokens if isinstance(older.extra_special_tokens, list) else []
    extras += [token for token in more if token not in extras]
    if not _has_extras(config) and not more and (folder / "tokenizer.json").is_file():
        # transformers forgets this list for a SentencePiece model, where added_tokens.json gives the ids
        extras = list(older.additional_special_tokens or [])
    special = {_text(token) for token in [*named.values(), *extras]}
    known = special | {_text(token) for token in older.additional_special_tokens or []}
    numbered = {
        number: AddedTokenFields(content=text, normalized=text not in special, special=text in known)
        for text, number in read_added_tokens(folder / "added_tokens.json").items()
    }
    return _Added(numbered, [*named.values(), *extras], roles, files)


def _text(token: Token) -> str:
    return token if isinstance(token, str) else token.content


def _add(engine: tokenizers.Tokenizer, folder: Path, added: _Added, own: Sequence[AddedToken]) -> None:
    """Adds tokens in the order of transformers.

    Raises:
        BimedixError: a token gets another id than its file states, which would shift every id after it.
    """
    source = added.files[-1].name if added.files else "tokenizer_config.json"
    names = {_text(token) for token in added.special}
    for number, row in sorted(added.numbered.items()):
        special = row.special or row.content in names
        normalized = not special if row.normalized is None else row.normalized
        token = AddedToken(
            row.content,
            single_word=row.single_word,
            lstrip=row.lstrip,
            rstrip=row.rstrip,
            normalized=normalized,
            special=special,
        )
        engine.add_tokens([token])
        actual = engine.token_to_id(row.content)
        if actual != number:
            raise BimedixError(
                f"{source} gives {row.content!r} the id {number}, the vocabulary {actual}; use the files of one "
                f"checkpoint ({folder})"
            )
    for token in [*added.special, *own]:
        known = {found.content for found in engine.get_added_tokens_decoder().values()}
        if isinstance(token, AddedToken):
            engine.add_tokens([token] if token.content not in known else [])
        elif _text(token) not in known:
            fields = token if isinstance(token, AddedTokenFields) else AddedTokenFields(content=token)
            flags = {"single_word": fields.single_word, "lstrip": fields.lstrip, "rstrip": fields.rstrip}
            normalized = bool(fields.normalized)
            engine.add_tokens([AddedToken(fields.content, normalized=normalized, special=True, **flags)])


def _roles(folder: Path, named: dict[str, str], engine: tokenizers.Tokenizer, kind: str) -> dict[str, str]:
    """Role -> text: the tokenizer's own files, then the ids of the two model configurations, then the class."""
    texts = dict(named)
    older = read_if_present(folder / "special_tokens_map.json", SpecialTokens)
    for role in ROLES:  # ignored by transformers beside `added_tokens_decoder`, but a role is better than none
        text = older.text(role)
        if text is not None and engine.token_to_id(text) is not None:
            texts.setdefault(role, text)
    for name in ("generation_config.json", "config.json"):
        source = read_if_present(folder / name, TokenIds)
        for role in ROLES:
            ids = source.ids(role)
            text = engine.id_to_token(ids[0]) if ids else None
            if text is not None:
                texts.setdefault(role, text)
    for role, text in DEFAULTS.get(kind, {}).items():
        if engine.token_to_id(text) is not None:
            texts.setdefault(role, text)
    added = engine.get_added_tokens_decoder()
    missing = [text for text in texts.values() if engine.token_to_id(text) not in added]
    engine.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in missing])
    return texts
