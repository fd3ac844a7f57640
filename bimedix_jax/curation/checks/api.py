"""All checks of a translation, for two texts, two records or their segments.

They need no model and take about a millisecond.
"""

from collections.abc import Sequence

from bimedix_jax.curation.checks import (
    doses,
    drugs,
    instructed,
    latin,
    negation,
    numbers,
    related,
    structure,
    surface,
    symbols,
)
from bimedix_jax.curation.checks.batch import Batch
from bimedix_jax.curation.checks.flags import FLAG_NAMES, Flag
from bimedix_jax.curation.checks.segments import Pair, Segments, of_records
from bimedix_jax.data.records import LETTERS, Record
from bimedix_jax.errors import BimedixError

__all__ = ["FLAG_NAMES", "Batch", "Flag", "check", "check_segments", "check_text"]

_OF_CHOICES = (
    numbers.check,
    doses.check,
    negation.check,
    drugs.check,
    surface.check_choice,
    symbols.check,
    latin.check,
    related.check,
)
_OF_TEXTS = (
    numbers.check,
    doses.check,
    negation.check,
    structure.check_text,
    drugs.check,
    surface.check,
    instructed.check,
    symbols.check,
    latin.check,
    related.check,
)


def check_text(source: str, translation: str, batch: Batch | None = None) -> list[Flag]:
    """Flags of an Arabic translation of an English text. No flag means that no rule objects, not that it is correct.

    `batch` has all translations of the run; add them with `Batch.add` first.
    """
    if not translation.strip():
        return [Flag(name="length", detail="the translation is empty")] if source.strip() else []
    flags = [flag for rule in _OF_TEXTS for flag in rule(source, translation)]
    shared = batch.check(source, translation) if batch is not None else None
    return flags if shared is None else [*flags, shared]


def check_segments(segments: Segments, batch: Batch | None = None, corpus: related.Corpus | None = None) -> list[Flag]:
    """Flags of the question or turns and of each choice, which are checked one by one, and of the order of the choices.

    `corpus` has all pairs of the file; it finds choices in another order by the words that the file teaches.
    """
    flags = []
    for place, pair in segments.texts:
        flags += _at(place, check_text(*pair, batch))
    for letter, pair in zip(LETTERS, segments.choices, strict=False):
        flags += _at(f"choice {letter}", _check_choice(pair))
    if segments.choices:
        source, translation = zip(*segments.choices, strict=True)
        flags += structure.merged_choices(source, translation)
        flags += related.check_order(source, translation, corpus)
    return flags


def _check_choice(pair: Pair) -> list[Flag]:
    if not pair[1].strip():
        return [Flag(name="options", detail="it is empty")] if pair[0].strip() else []
    return [flag for rule in _OF_CHOICES for flag in rule(*pair)]


def _at(place: str | None, flags: Sequence[Flag]) -> list[Flag]:
    return [flag.model_copy(update={"place": place}) for flag in flags] if place else list(flags)


def check(source: Record, translation: Record, batch: Batch | None = None) -> list[Flag]:
    """Flags of a translated record: of its structure, its question or turns, and each of its choices.

    Raises:
        BimedixError: the source is not English or the translation not Arabic.
    """
    if (source.language, translation.language) != ("en", "ar"):
        raise BimedixError(
            f"{source.id}: the checks support translations from English to Arabic, not {source.language} to "
            f"{translation.language}"
        )
    flags = structure.check_record(source, translation)
    turns = zip(source.conversations, translation.conversations, strict=False)
    for number, (before, after) in enumerate(turns, start=1):
        if before.language != "ar":  # options and the answer key are checked on the whole turn
            flags += _at(f"turn {number}", structure.check_text(before.value, after.value))
    flags += check_segments(of_records(source, translation), batch)
    return list(dict.fromkeys(flags))
