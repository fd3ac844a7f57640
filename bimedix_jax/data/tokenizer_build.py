"""The files of a tokenizer -> an engine of the `tokenizers` library with the ids of transformers 5.

transformers builds some tokenizers from the vocabulary, the merges and the class that tokenizer_config.json names, and
not from what tokenizer.json says about spaces, digits and normalisation. The classes that do so and that Llama-like
models use are handled here: LlamaTokenizer (with `legacy` and `add_prefix_space`), GPT2Tokenizer and Qwen2Tokenizer
(with `add_prefix_space`). Others that do so are refused. Every other class reads tokenizer.json as it is.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from bimedix_jax import files
from bimedix_jax.data.run_folder import base_of, is_run
from bimedix_jax.data.tokenizer_added import declared, text_of
from bimedix_jax.data.tokenizer_files import (
    REBUILT,
    ROLES,
    SpecialTokens,
    TokenIds,
    TokenizerConfig,
    read_if_present,
)
from bimedix_jax.errors import BimedixError
from bimedix_jax.files import peek_json

log = logging.getLogger(__name__)

LITERAL, LLAMA, GPT2, QWEN2 = "TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"
DEFAULTS = {
    LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    GPT2: {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    QWEN2: {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
}
"""Special tokens that a class has where its files lack the key."""

REGISTERED = {"gpt2": GPT2, "qwen2": QWEN2, "qwen2_moe": QWEN2}
"""model_type of a config.json -> the class where no file names one."""

READ_LITERALLY = ("mistral", "mixtral", "ministral", "ministral3")
"""model_type with which transformers reads tokenizer.json as it is, whatever class is named."""

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATCHED_SIZE = 100_000  # with `fix_mistral_regex`, transformers changes how larger vocabularies split text


@dataclass(frozen=True)
class Built:
    """An engine, the special tokens by role, and the SHA-256 of what determines the ids."""

    engine: tokenizers.Tokenizer
    special: dict[str, str]
    fingerprint: str


def build(folder: Path) -> Built:
    """The tokenizer of a checkpoint folder.

    Raises:
        BimedixError: the folder has neither tokenizer.json nor a SentencePiece BPE model, they cannot be read, or
            transformers reads them in a way that is not implemented here.
    """
    config = read_if_present(folder / "tokenizer_config.json", TokenizerConfig)
    _check_supported(folder, config)
    if (folder / "tokenizer.json").is_file():
        engine, roles, changed = _from_json(folder, config)
        decisive = [folder / "tokenizer.json"]
    elif (folder / "tokenizer.model").is_file():
        engine, roles, changed = _from_sentencepiece(folder, config)
        decisive = [path for name in ("tokenizer.model", "tokenizer_config.json") if (path := folder / name).is_file()]
    else:
        raise BimedixError(_no_tokenizer(folder))
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in decisive]
    fingerprint = hashlib.sha256(b"".join(digests) + changed.encode()).hexdigest()
    return Built(engine, _roles(folder, roles, engine), fingerprint)


def _check_supported(folder: Path, config: TokenizerConfig) -> None:
    path = folder / "tokenizer_config.json"
    if config.split_special_tokens:
        raise BimedixError(f"{path} has split_special_tokens = true, with which no chat template works; remove the key")
    if config.fast_tokenizer_files:
        raise BimedixError(
            f"{path} has fast_tokenizer_files, by which every version of transformers reads its own file; remove the "
            "key and keep the tokenizer.json that you want to use"
        )


def _class(folder: Path, config: TokenizerConfig, byte_level: bool) -> str:
    """The class with which transformers' AutoTokenizer reads the folder: LITERAL, LLAMA, GPT2 or QWEN2.

    Raises:
        BimedixError: another one that does not read tokenizer.json as it is.
    """
    model = peek_json(folder / "config.json")
    kind, family = config.tokenizer_class or model.get("tokenizer_class"), model.get("model_type")
    if family in READ_LITERALLY:
        return LITERAL
    if not isinstance(kind, str):
        return REGISTERED.get(str(family), LITERAL)
    kind = kind.removesuffix("Fast")
    if kind.removesuffix("Tokenizer") in REBUILT:
        raise BimedixError(
            f"{folder} has the tokenizer_class {kind}, which transformers builds in its own way and which is not "
            f'implemented here; write "tokenizer_class": "PreTrainedTokenizerFast" into '
            f"{folder / 'tokenizer_config.json'} to read its tokenizer.json as it is"
        )
    return kind if kind in DEFAULTS and not (kind == LLAMA and byte_level) else LITERAL


def _no_tokenizer(folder: Path) -> str:
    """The sentence for a folder without a tokenizer that can be read; names what is there instead."""
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        return f"{folder} {found}; name a folder with a tokenizer"
    if is_run(folder):
        base = base_of(folder)
        if isinstance(base, str):
            remedy = f"`--tokenizer {base}`" if Path(base).is_dir() else f"--tokenizer and a folder with that of {base}"
        else:
            remedy = "--tokenizer and the folder with which its data were packed"
        return f"{folder} is a training run, which has no tokenizer; pass {remedy}"
    other = [name for name in ("vocab.json", "tekken.json", "vocab.txt", "spiece.model") if (folder / name).is_file()]
    found = f" (found {other[0]}, which is not read)" if other else ""
    remedy = (
        "save it with transformers' save_pretrained, which writes tokenizer.json"
        if other
        else "name a folder with a tokenizer"
    )
    return f"{folder} has neither tokenizer.json nor tokenizer.model{found}; {remedy}"


def _from_json(folder: Path, config: TokenizerConfig) -> tuple[tokenizers.Tokenizer, dict[str, str], str]:
    """The engine of tokenizer.json, roles, and what differs from the file ("" if nothing does)."""
    path = folder / "tokenizer.json"
    text = files.read_text(path)
    try:
        literal = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises bare Exception
        raise BimedixError(f"{path} cannot be read as a tokenizer ({error}); fetch it again") from error
    spec = json.loads(text)
    kind = _class(folder, config, byte_level='"ByteLevel"' in text)
    _strip(literal)
    if config.fix_mistral_regex and literal.get_vocab_size() > PATCHED_SIZE:
        raise BimedixError(
            f"{folder / 'tokenizer_config.json'} has fix_mistral_regex = true, which is not implemented; save the "
            "tokenizer with transformers' save_pretrained, which writes the corrected pattern, and remove the key"
        )
    engine = literal if kind == LITERAL else _rebuilt(spec, kind, config, path)
    before = _settings(literal)
    defaults = dict(DEFAULTS.get(kind, {}))
    if spec.get("padding"):
        defaults.setdefault("pad_token", spec["padding"]["pad_token"])
    found = declared(folder, config, spec.get("added_tokens") or [], defaults, older=True)
    engine.add_tokens(found.tokens(engine))
    if kind == QWEN2:  # without the flags of their objects
        names = [text_of(token) for token in [*found.named.values(), *(found.unnamed or [])]]
        engine.add_tokens([AddedToken(text, special=True) for text in dict.fromkeys(names)])
    found.check_ids(engine, folder)
    roles = {role: text_of(found.named[key]) for role in ROLES if (key := f"{role}_token") in found.named}
    after = _settings(engine)
    return engine, roles, "" if after == before else after


def _settings(engine: tokenizers.Tokenizer) -> str:
    """What determines the ids besides the vocabulary and the merges."""
    parts = [engine.normalizer, engine.pre_tokenizer]
    states = [None if part is None else json.loads(part.__getstate__()) for part in parts]
    names = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
    names += ("continuing_subword_prefix", "end_of_word_suffix")
    flags = [getattr(engine.model, name, None) or None for name in names]
    added = [[number, repr(token)] for number, token in sorted(engine.get_added_tokens_decoder().items())]
    return json.dumps([states, flags, added], sort_keys=True)


def _strip(engine: tokenizers.Tokenizer) -> None:
    """Removes what adds special tokens, trims leading spaces from the offsets, pads or truncates."""
    engine.post_processor = None
    engine.no_padding()
    engine.no_truncation()


def _rebuilt(spec: dict[str, Any], kind: str, config: TokenizerConfig, path: Path) -> tokenizers.Tokenizer:
    """An engine with the vocabulary and merges of a tokenizer.json, and everything else as the class has it."""
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise BimedixError(
            f"{path} is a {model['type']} model, but the tokenizer_class {kind} is BPE; write "
            f'"tokenizer_class": "PreTrainedTokenizerFast" into {path.with_name("tokenizer_config.json")}'
        )
    merged = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    pairs = [(left, right) for left, right in merged]
    if kind == LLAMA:
        engine = tokenizers.Tokenizer(models.BPE(vocab=model["vocab"], merges=pairs, fuse_unk=True, byte_fallback=True))
        _mark_words(engine, config)
        return engine
    engine = tokenizers.Tokenizer(
        models.BPE(vocab=model["vocab"], merges=pairs, continuing_subword_prefix="", end_of_word_suffix="")
    )
    prefix = config.add_prefix_space is True
    engine.decoder = decoders.ByteLevel()
    if kind == GPT2:
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        return engine
    engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    return engine


def _mark_words(engine: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Word-start marks as LlamaTokenizer sets them: with `legacy`, after every special token too."""
    prefix = config.add_prefix_space is not False
    scheme = ("always" if config.legacy is True else "first") if prefix else "never"
    engine.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]  # pyright: ignore
    )


def _from_sentencepiece(folder: Path, config: TokenizerConfig) -> tuple[tokenizers.Tokenizer, dict[str, str], str]:
    """The engine of a SentencePiece BPE model, roles, and what the older files change ("" if nothing).

    Only LlamaTokenizer has the word-start mark at the start of a text. Where another class is named, or the model is a
    Mixtral, transformers reads the model without it; so do we, and say it.
    """
    import sentencepiece

    path = folder / "tokenizer.model"
    files.require_content(path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise BimedixError(
            f"{path} is not a SentencePiece model ({error}); fetch it again, or add a tokenizer.json to the folder if "
            "it is a tiktoken file"
        ) from error
    kind = _sentencepiece_class(folder, config)
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    pairs = merges(vocabulary)
    engine = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=True, byte_fallback=True))
    marked = _check_plain(engine, model, path)
    unknown = pieces[model.unk_id()]
    if kind == LLAMA:
        _mark_words(engine, config)
        defaults = DEFAULTS[LLAMA]
    else:
        engine = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        engine.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
        engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        defaults = {key: pieces[number] for key, number in ids.items() if number >= 0}
        if marked:
            log.warning(
                "%s starts a text with a word-start mark, but transformers reads it without one, and so do we; add the "
                "model's tokenizer.json to keep the mark.",
                path,
            )
    own = _declared(path, pieces)
    found, plain = (declared(folder, config, [], defaults, older) for older in (True, False))
    added, without = found.tokens(engine, own), plain.tokens(engine, own)
    engine.add_tokens(added)
    found.check_ids(engine, folder)
    roles = {role: text_of(found.named[key]) for role in ROLES if (key := f"{role}_token") in found.named}
    changed = "" if kind == LLAMA else kind
    return engine, roles, changed if repr(added) == repr(without) else changed + repr(added)


def _sentencepiece_class(folder: Path, config: TokenizerConfig) -> str:
    """LLAMA or LITERAL. A folder without any configuration is LLAMA, which gives the ids of SentencePiece itself."""
    kind = _class(folder, config, byte_level=False)
    if kind in (GPT2, QWEN2):
        raise BimedixError(
            f"{folder} has the tokenizer_class {kind}, which cannot read its tokenizer.model; correct the class in "
            f"{folder / 'tokenizer_config.json'}, or add the model's tokenizer.json"
        )
    configured = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    return kind if configured else LLAMA


def _check_plain(engine: tokenizers.Tokenizer, model: Any, path: Path) -> bool:
    """Checks that the engine gives the ids of SentencePiece itself; whether with a mark at the start of a text.

    Raises:
        BimedixError: it does not, because the model normalises text or is not BPE.
    """
    probe = "Take 2 tablets (500 mg), twice daily.\nخذ قرصين مرتين يوميًا؛ 1.5 mg/kg — naïve β-blocker 😀"
    expected = model.encode(probe)
    for prefix in (True, False):  # a model may have been trained without the mark
        _mark_words(engine, TokenizerConfig(add_prefix_space=prefix))
        if engine.encode(probe, add_special_tokens=False).ids == expected:
            return prefix
    raise BimedixError(f"{path} is not a plain SentencePiece BPE model; add a tokenizer.json to the folder")


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


def _roles(folder: Path, named: dict[str, str], engine: tokenizers.Tokenizer) -> dict[str, str]:
    """Role -> text. Roles that transformers lacks are filled from files that it ignores: a role is better than none."""
    texts = dict(named)
    older = read_if_present(folder / "special_tokens_map.json", SpecialTokens)
    for role in ROLES:
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
    added = engine.get_added_tokens_decoder()
    missing = [text for text in texts.values() if engine.token_to_id(text) not in added]
    engine.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in missing])
    return texts
