"""Samples, exchanges and tokens of a set by kind and language: the rows of Tables 7 and 8 of the BiMediX paper."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.data.tokenizer_words import WordEncoder

KINDS = ("qa", "mcqa", "chat")
LANGUAGES = ("ar", "en")
TITLES = {"qa": "QA", "mcqa": "MCQA", "chat": "Chat"}


@dataclass
class Count:
    """Sums over records. `exchanges` counts answers, which the paper calls turns (its QA has 1.00)."""

    samples: int = 0
    exchanges: int = 0
    tokens: int = 0
    learned: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


class TokenCounter:
    """Counts the tokens of a text, without those of a chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = WordEncoder(tokenizer) if WordEncoder.supports(tokenizer) else None

    def __call__(self, text: str) -> int:
        if self._words is None:
            return len(self._tokenizer.encode_with_offsets(text, literal=True).ids)
        return len(self._words.encode(text)) // 4  # bytes of an int32


Counts = Mapping[tuple[str, str], Count]  # (kind, language)


def tables(counts: Counts) -> list[dict[str, Any]]:
    """Rows QA, MCQA, Chat and Total of a table each for English, Arabic and both. Empty tables are left out.

    `average_turns` is exchanges per sample; `set` names the table of the row.
    """
    sets = {"English": ("en",), "Arabic": ("ar",), "bilingual": ("ar", "en")}
    found = []
    for name, languages in sets.items():
        rows = [total(counts, (kind,), languages) for kind in KINDS]
        if not sum(row.samples for row in rows) or (name == "bilingual" and len(_languages(counts)) < 2):
            continue
        for title, row in zip((*TITLES.values(), "Total"), (*rows, total(counts, KINDS, languages)), strict=True):
            turns = row.exchanges / row.samples if row.samples else None
            line = {"set": name, "data": title, "samples": row.samples, "average_turns": turns}
            found.append({**line, "tokens": row.tokens, "learned_tokens": row.learned})
    return found


def ratios(counts: Counts) -> list[dict[str, Any]]:
    """The ratio n of 1:n of Arabic to English `samples`, `tokens` and `learned_tokens`, by kind and in total.

    None if the Arabic side is empty.
    """
    found = []
    for name, kinds in (*((kind, (kind,)) for kind in KINDS), ("all", KINDS)):
        arabic, english = (total(counts, kinds, (language,)) for language in LANGUAGES)
        if not arabic.samples and not english.samples:
            continue
        found.append(
            {
                "kind": name,
                "arabic_samples": arabic.samples,
                "english_samples": english.samples,
                "samples": _quotient(english.samples, arabic.samples),
                "tokens": _quotient(english.tokens, arabic.tokens),
                "learned_tokens": _quotient(english.learned, arabic.learned),
            }
        )
    return found


def total(counts: Counts, kinds: Iterable[str], languages: Iterable[str]) -> Count:
    """The sum over kinds and languages."""
    chosen = tuple(languages)
    return sum((counts.get((kind, language), Count()) for kind in kinds for language in chosen), Count())


def shown_ratio(english: float | None) -> str:
    """A ratio in the format of the paper, `1:1.84`."""
    return "no Arabic" if english is None else f"1:{english:.2f}"


def _languages(counts: Counts) -> set[str]:
    return {language for (_, language), count in counts.items() if count.samples}


def _quotient(english: int, arabic: int) -> float | None:
    return english / arabic if arabic else None
