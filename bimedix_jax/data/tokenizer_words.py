"""A cache of the ids of words for a SentencePiece BPE tokenizer: the same ids, several times as fast.

Mixtral's tokenizer has no pre-tokenizer, so BPE merges a whole text at a time. But no piece of its vocabulary has a
word-start mark after another character. No merge can therefore span the beginning of a word, and merging each word
alone gives the same pieces. Words repeat, so their ids are cached. `WordEncoder.supports` checks these conditions;
other tokenizers are run by the library itself.
"""

import array
import json
import re
from collections.abc import Callable

import tokenizers

from bimedix_jax.data.tokenizer import Tokenizer

MARK = "▁"
"""SentencePiece's sign for the space before a word."""

LETTERS, PUNCTUATION = "A-Za-z\u0621-\u064a", r".,;:!?)\]\n"
"""If no piece has punctuation after a letter, a new word is encoded as its letters and its punctuation separately."""

CACHED_WORDS = 200_000
"""Words in a generation of the cache. A full generation becomes the older one. Words of the older one are dropped
unless they were used again, so frequent words stay. Both generations take at most about 90 MB."""

_stretches: Callable[[str], list[str]] = re.compile(f"[ {MARK}]*[^ {MARK}]+|[ {MARK}]+$").findall


class WordEncoder(dict[str, bytes]):
    """Text to ids for a tokenizer that `supports` accepts. Special tokens spelled out in a text stay ordinary text.

    The dictionary is the cache. A key without a leading MARK is a word after a space; a key with one is the text after
    the MARK, without a space before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._older: dict[str, bytes] = {}
        description = json.loads(tokenizer.engine.to_str())
        normalizer, metaspace = description["normalizer"], description["pre_tokenizer"]
        self._prefixes_all = normalizer is not None and any(p["type"] == "Prepend" for p in _parts(normalizer))
        self._prefixes_bare = metaspace is not None and metaspace["prepend_scheme"] != "never"
        for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            description[name] = None
        description["added_tokens"] = []
        self._model = tokenizers.Tokenizer.from_str(json.dumps(description)).model
        crossing = re.compile(f"[{LETTERS}][{PUNCTUATION}]")
        cuts = not any(crossing.search(piece) for piece in description["model"]["vocab"])
        self._cut = re.compile(f"([^{PUNCTUATION}]*[{LETTERS}])([{PUNCTUATION}].*)" if cuts else "(?!)", re.DOTALL)

    @staticmethod
    def supports(tokenizer: Tokenizer) -> bool:
        """Whether words can be encoded separately without changing an id."""
        description = json.loads(tokenizer.engine.to_str())
        model = description["model"]
        normalizer, pre_tokenizer = description["normalizer"], description["pre_tokenizer"]
        if (
            model["type"] != "BPE"
            or model["dropout"]
            or model["continuing_subword_prefix"]
            or model["end_of_word_suffix"]
        ):
            return False
        if any(
            not token["special"] or token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in description["added_tokens"]
        ):
            return False
        marks_words = normalizer is not None or pre_tokenizer is not None
        if normalizer is not None and not all(_marks_words(part) for part in _parts(normalizer)):
            return False
        if pre_tokenizer is not None and (
            pre_tokenizer["type"] != "Metaspace" or pre_tokenizer["split"] or pre_tokenizer["replacement"] != MARK
        ):
            return False
        crossing = re.compile(f"[^{MARK}]{MARK}|.\n|\n.", re.DOTALL)
        return marks_words and MARK in model["vocab"] and not any(crossing.search(piece) for piece in model["vocab"])

    def __missing__(self, word: str) -> bytes:
        if len(self) >= CACHED_WORDS:
            self._older = dict(self)
            self.clear()
        packed = self._older.get(word)
        if packed is None:
            parts = self._cut.fullmatch(word)
            packed = self._merged(word) if parts is None else self[parts[1]] + self[MARK + parts[2]]
        self[word] = packed
        return packed

    def _merged(self, word: str) -> bytes:
        text = word[1:].replace(" ", MARK) if word[0] == MARK else MARK + word
        return array.array("i", [token.id for token in self._model.tokenize(text)]).tobytes()

    def encode(self, text: str, opens: bool = True) -> bytes:
        """Ids of `text` as int32 bytes; `opens` where the tokenizer would put a word-start mark before the text."""
        if opens and text and (self._prefixes_all or (self._prefixes_bare and text[0] not in f" {MARK}")):
            text = f" {text}"
        if "  " in text or MARK in text or text.endswith(" "):
            return b"".join([self[MARK + stretch] for stretch in _stretches(text)])
        first, *words = text.split(" ")
        found = b"".join(map(self.__getitem__, words))
        return self[MARK + first] + found if first else found


def _parts(normalizer: dict) -> list[dict]:
    return normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]


def _marks_words(part: dict) -> bool:
    """Whether a normaliser only writes word-start marks, as those of Llama and Mixtral do."""
    if part["type"] == "Prepend":
        return part["prepend"] == MARK
    return part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == MARK
