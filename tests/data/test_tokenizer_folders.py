"""Token ids, roles and sizes of many tokenizer folders equal transformers', or the folder is refused by name."""

import ast
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from bimedix_jax.data.tokenizer import load_tokenizer
from bimedix_jax.data.tokenizer_build import merges
from bimedix_jax.data.tokenizer_files import REBUILT
from bimedix_jax.errors import BimedixError

SENTENCES = [
    "The patient takes two tablets of metformin every morning with food.",
    "What are the symptoms of asthma? Wheezing, cough and shortness of breath.",
    "ما هي أعراض الربو؟ الصفير والسعال وضيق التنفس.",
    "[INST] question [/INST] answer User: Assistant: 123 456",
]
TEXTS = [
    "hello asthma",
    " two  spaces ",
    "a<s>b</s> c",
    "<|im_start|>user\nfever<|im_end|>",
    "x <extra> y<extra>z",
    "x <PAD> y",
    "123 4567",
    "الربو <|im_end|> والسعال",
    "[TOOL]a [TOOL] b",
    "<mask> q<sep>",
    "é e\u0301",
    "\n\n a",
    "a  123, I'll <extra>",
    "<PAD> <PAD><sep>x<sep> x",
    "",
    "<|endoftext|>ab <|endoftext|> cd",
]
SIZE = 420  # of the SentencePiece model
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST, GPT2 = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "GPT2Tokenizer"}
QWEN2 = {"tokenizer_class": "Qwen2TokenizerFast"}
ADDED = {"<|im_end|>": SIZE, "<|im_start|>": SIZE + 1}
BACKENDS = ("TokenizersBackend", "SentencePieceBackend", "PreTrainedTokenizer", "PythonBackend")
CHATML = ["<|im_start|>", "<|im_end|>"]
EXTRA = {"__type": "AddedToken", "content": "<extra>", "lstrip": True, "rstrip": True, "normalized": False}


@cache
def piece_model(**options: Any) -> bytes:
    model = io.BytesIO()
    base: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": SIZE,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, **(base | options)
    )
    return model.getvalue()


@cache
def byte_level(digits: bool = False, prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain]) if digits else plain
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>"],
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


@cache
def llama_json(scheme: str) -> Tokenizer:
    """A Llama tokenizer.json: a normaliser that prepends the mark, as Llama 2's has, or a Metaspace."""
    model = sentencepiece.SentencePieceProcessor(model_proto=piece_model())
    vocabulary = {model.id_to_piece(index): index for index in range(SIZE)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme == "normaliser":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ("<unk>", "<s>", "</s>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return tokenizer


def pieces(config: dict, **others: Any) -> dict[str, Any]:
    """A SentencePiece folder; the names of `others` are those of JSON files."""
    return {"tokenizer.model": piece_model(), "tokenizer_config": LLAMA | config, **others}


def rows(*tokens: str, first: int = SIZE, **flags: Any) -> dict[str, Any]:
    return {str(first + i): {"content": token, "special": True} | flags for i, token in enumerate(tokens)}


def with_tokens(tokenizer: Tokenizer, *tokens: str) -> Tokenizer:
    """A copy with added tokens that are not special."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_tokens([AddedToken(token, rstrip=True, single_word=True) for token in tokens])
    return copy


BYTES = byte_level().get_vocab_size()
FOLDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "additional in the configuration": lambda: pieces({"additional_special_tokens": CHATML}),
    "additional, with ids": lambda: pieces({"additional_special_tokens": CHATML}, added_tokens=ADDED),
    "extra in the configuration": lambda: pieces({"extra_special_tokens": CHATML}),
    "extra as an object": lambda: pieces({"extra_special_tokens": {"image_token": "<extra>", "b_token": "<sep>"}}),
    "additional in the map": lambda: pieces(
        {}, special_tokens_map={"additional_special_tokens": CHATML, "pad_token": "<PAD>"}
    ),
    "additional in the map, with ids": lambda: pieces(
        {}, special_tokens_map={"additional_special_tokens": CHATML}, added_tokens=ADDED
    ),
    "extra in the map": lambda: pieces({}, special_tokens_map={"extra_special_tokens": CHATML}),
    "the map precedes the configuration": lambda: pieces({}, special_tokens_map={"eos_token": "<s>"}),
    "a new pad token": lambda: pieces({"pad_token": "<PAD>"}),
    "a new pad token as an object": lambda: pieces({"pad_token": EXTRA | {"content": "<PAD>"}}),
    "mask and separator": lambda: pieces({"mask_token": "<mask>", "sep_token": "<sep>", "pad_token": "<PAD>"}),
    "a token of a model's own": lambda: pieces({"tool_token": "[TOOL]", "add_bos_token": True}),
    "decoder": lambda: pieces({"added_tokens_decoder": rows("<|im_end|>", "<extra>", lstrip=True, rstrip=True)}),
    "decoder, not special": lambda: pieces(
        {"added_tokens_decoder": rows("<|im_end|>", special=False, normalized=True)}
    ),
    "decoder changes flags": lambda: pieces(
        {"added_tokens_decoder": rows("<unk>", "<s>", "</s>", first=0, lstrip=True, rstrip=True)}
    ),
    "decoder precedes the older files": lambda: pieces(
        {"added_tokens_decoder": rows("<|im_end|>")},
        special_tokens_map={"pad_token": "<PAD>", "additional_special_tokens": ["<extra>"]},
        added_tokens={"<mask>": SIZE + 1},
    ),
    "an empty decoder precedes them too": lambda: pieces(
        {"added_tokens_decoder": {}}, special_tokens_map={"pad_token": "<PAD>"}, added_tokens={"<mask>": SIZE}
    ),
    "added tokens that the model has": lambda: pieces({}, added_tokens={"<s>": 1, "</s>": 2, "<mask>": SIZE}),
    "an added token ends": lambda: pieces(
        {"eos_token": "<|im_end|>"}, added_tokens=ADDED, special_tokens_map={"eos_token": "<|im_end|>"}
    ),
    "user-defined pieces": lambda: (
        pieces({}) | {"tokenizer.model": piece_model(user_defined_symbols=("<|im_end|>", "[TOOL]"))}
    ),
    "control pieces": lambda: pieces({}) | {"tokenizer.model": piece_model(control_symbols=("<|im_end|>", "[TOOL]"))},
    "a model without a mark at the start": lambda: (
        pieces({"add_prefix_space": False}) | {"tokenizer.model": piece_model(add_dummy_prefix=False)}
    ),
    "llama with byte level": lambda: {"tokenizer.json": byte_level(), "tokenizer_config": LLAMA | {"unk_token": None}},
    "mixtral's tokenizer.json as it is": lambda: {
        "tokenizer.json": llama_json("normaliser"),
        "tokenizer_config": LLAMA,
        "config": {"model_type": "mixtral"},
    },
    "pieces without a class": lambda: {
        "tokenizer.model": piece_model(),
        "tokenizer_config": {"pad_token": "<PAD>"},
        "added_tokens": ADDED,
    },
    "no configuration": lambda: {"tokenizer.json": llama_json("normaliser"), "tokenizer_config": {}},
    "byte level, older files": lambda: {
        "tokenizer.json": byte_level(),
        "tokenizer_config": FAST,
        "special_tokens_map": {"additional_special_tokens": ["<|im_end|>"], "pad_token": "<PAD>"},
        "added_tokens": {"<|im_end|>": BYTES, "<|im_start|>": BYTES + 1},
    },
    "byte level, configuration": lambda: {
        "tokenizer.json": byte_level(),
        "tokenizer_config": FAST | {"additional_special_tokens": CHATML, "pad_token": "<PAD>"},
    },
    "byte level, map": lambda: {
        "tokenizer.json": byte_level(),
        "tokenizer_config": FAST,
        "special_tokens_map": {"additional_special_tokens": CHATML, "pad_token": EXTRA | {"content": "<PAD>"}},
    },
    "byte level, decoder": lambda: {
        "tokenizer.json": byte_level(),
        "tokenizer_config": FAST
        | {"added_tokens_decoder": rows("<extra>", first=BYTES, lstrip=True) | rows("<|endoftext|>", first=0)},
    },
}
DECODER = {"added_tokens_decoder": rows("<mask>", first=BYTES + 1)}
for _legacy in (True, None):
    for _prefix in (True, False, None):
        _options = {"legacy": _legacy, "add_prefix_space": _prefix}
        _config = {key: value for key, value in _options.items() if value is not None}
        _name = f"legacy {_legacy}, prefix {_prefix}"
        FOLDERS[f"pieces, {_name}"] = lambda config=_config: pieces(config, added_tokens=ADDED)
        for _scheme in ("normaliser", "first", "always", "never"):
            FOLDERS[f"json {_scheme}, {_name}"] = lambda config=_config, scheme=_scheme: {
                "tokenizer.json": llama_json(scheme),
                "tokenizer_config": LLAMA | config,
            }
FLAGS = {"__type": "AddedToken", "single_word": True, "normalized": True}
for _family in ("mixtral", "llama", "mistral"):
    for _class in (LLAMA, GPT2, QWEN2, FAST, {}):
        _name = f"{_family}, {_class.get('tokenizer_class')}"
        FOLDERS[f"byte level, {_name}"] = lambda config=_class, family=_family: {
            "tokenizer.json": byte_level(digits=True, prefix=True),
            "tokenizer_config": {"tokenizer_class": config.get("tokenizer_class")},
            "config": {"model_type": family},
        }
        if _class in (LLAMA, FAST, {}) or _family != "llama":
            FOLDERS[f"pieces, {_name}"] = lambda config=_class, family=_family: {
                "tokenizer.model": piece_model(user_defined_symbols=("<|im_end|>",)),
                "tokenizer_config": config | {"pad_token": "<PAD>"},
                "config": {"model_type": family},
            }
for _class in (LLAMA, GPT2, QWEN2, FAST):
    FOLDERS[f"flags of tokens, {_class['tokenizer_class']}"] = lambda config=_class: {
        "tokenizer.json": with_tokens(byte_level(), "<extra>", "<mask>"),
        "tokenizer_config": config
        | {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": FLAGS | {"content": "<PAD>"}}
        | {"extra_special_tokens": [FLAGS | {"content": "<sep>", "lstrip": True}, "<mask>", "<sep>"]},
        "special_tokens_map": {"mask_token": {"content": "<mask>", "lstrip": True, "normalized": True}},
    }
for _class in (FAST, GPT2, QWEN2, {}):
    for _prefix in (True, False, None):
        for _digits, _own in ((False, False), (False, True), (True, False)):
            _config = dict(_class) | ({} if _prefix is None else {"add_prefix_space": _prefix})
            _name = f"{_class.get('tokenizer_class')}, digits {_digits}, prefix {_own} and {_prefix}"
            FOLDERS[_name] = lambda config=_config, digits=_digits, own=_own: {
                "tokenizer.json": byte_level(digits, own),
                "tokenizer_config": config,
            }


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        if isinstance(content, Tokenizer):
            content.save(str(folder / name))
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_text_roles_and_size_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    write(tmp_path, FOLDERS[name]())
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == theirs.decode(ids), text
    for role in ("bos", "eos", "pad", "unk"):
        assert ours.id_of(role) == getattr(theirs, f"{role}_token_id"), role
    assert ours.engine.get_vocab_size() == len(theirs)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (lambda: pieces({}, added_tokens={"<mask>": SIZE + 5}), r"added_tokens\.json gives '<mask>' the id 425"),
        (lambda: pieces({}, added_tokens={"<s>": 7}), r"added_tokens\.json gives '<s>' the id 7, the vocabulary 1"),
        (lambda: pieces({}, added_tokens=["<s>"]), r"added_tokens\.json is not a JSON object"),
        (lambda: pieces({}, added_tokens={"<s>": "one"}), r"added_tokens\.json has <s> = 'one'"),
        (lambda: pieces({}, added_tokens={"<a>": SIZE, "<b>": SIZE}), "'<a>' and '<b>' the same id 420"),
        (lambda: pieces({}, added_tokens={"<a>": True}), r"added_tokens\.json has <a> = True"),
        (lambda: pieces({}, added_tokens={"<a>": -1}), r"added_tokens\.json has <a> = -1"),
        (lambda: pieces({"pad_token": {"content": "<a>", "lstrip": "no"}}), "pad_token"),
        (lambda: pieces({"split_special_tokens": True}), "split_special_tokens = true"),
        (lambda: pieces({"additional_special_tokens": "<s>"}), "additional_special_tokens"),
        (lambda: pieces({"additional_special_tokens": [1]}), r"additional_special_tokens\.0"),
        (lambda: pieces({"add_prefix_space": "perhaps"}), "add_prefix_space"),
        (lambda: pieces({"eos_token": ""}), "eos_token"),
        (lambda: {"tokenizer.model": piece_model(normalization_rule_name="nmt_nfkc")}, "not a plain SentencePiece BPE"),
        (lambda: pieces({"tokenizer_class": "GPT2Tokenizer"}), "GPT2Tokenizer, which cannot read its tokenizer.model"),
        (lambda: pieces({"tokenizer_class": "GemmaTokenizerFast"}), "tokenizer_class GemmaTokenizer, which"),
        (lambda: pieces({"tokenizer_class": 3}), "tokenizer_class = 3"),
        (lambda: pieces({"fast_tokenizer_files": ["tokenizer.4.json"]}), "fast_tokenizer_files"),
        (
            lambda: {"tokenizer.json": Tokenizer(models.Unigram()), "tokenizer_config": LLAMA},
            "a Unigram model, but the tokenizer_class LlamaTokenizer is BPE",
        ),
        (
            lambda: {"tokenizer.json": with_tokens(byte_level(), "<x>"), "tokenizer_config": GPT2 | DECODER},
            "gives '<mask>' the id 401, the vocabulary 400",
        ),
        (lambda: {"vocab": {}, "tokenizer_config": {}}, r"found vocab\.json, which is not read"),
    ],
)
def test_a_folder_that_would_give_other_ids_raises(files: Callable[[], dict], message: str, tmp_path: Path) -> None:
    with pytest.raises(BimedixError, match=message):
        load_tokenizer(write(tmp_path, files()))


def test_every_class_of_transformers_that_builds_its_own_engine_is_known() -> None:
    """A class with its own __init__ ignores parts of tokenizer.json."""
    folder = Path(str(transformers.__file__)).parent / "models"
    trees = [ast.parse(path.read_text()) for path in folder.glob("*/tokenization_*.py")]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    own = {
        node.name.removesuffix("Tokenizer")
        for node in classes
        if node.name.endswith("Tokenizer") and any(getattr(base, "id", "") in BACKENDS for base in node.bases)
    }
    assert len(own) > 50
    assert own <= REBUILT | {"Llama", "GPT2", "Qwen2"}


def test_a_tokenizer_json_may_lack_added_tokens(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer.json": byte_level(), "tokenizer_config": FAST})
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key[:5] != "added"})
    )
    assert load_tokenizer(tmp_path).encode("a") == byte_level().encode("a").ids


def test_a_model_that_transformers_reads_without_its_mark_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_tokenizer(write(tmp_path, pieces({}) | {"config": {"model_type": "mixtral"}}))
    assert "without one, and so do we; add the model's tokenizer.json" in caplog.text


def test_files_that_change_ids_change_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(name: str, files: dict[str, Any]) -> str:
        (tmp_path / name).mkdir()
        return load_tokenizer(write(tmp_path / name, files)).fingerprint

    plain = fingerprint("plain", pieces({}))
    assert fingerprint("same", pieces({}, special_tokens_map={"eos_token": "</s>"})) == plain
    assert fingerprint("added", pieces({}, added_tokens=ADDED)) != plain
    whole = {"tokenizer.json": byte_level(), "tokenizer_config": GPT2}
    assert fingerprint("json", whole) == fingerprint("literal", whole | {"tokenizer_config": FAST})
    assert fingerprint("prefix", whole | {"tokenizer_config": GPT2 | {"add_prefix_space": True}}) != fingerprint(
        "none", whole
    )


def test_a_user_cannot_write_an_added_token_that_is_not_special(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, pieces({}, added_tokens=ADDED)))
    text = "a<|im_end|>b"
    assert SIZE in tokenizer.encode(text)
    literal = tokenizer.encode_with_offsets(text, literal=True).ids
    assert SIZE not in literal
    assert tokenizer.decode(literal) == text
