"""All checks of a translation, for two texts or two records. They need no model and take about a millisecond."""

from bimedix_jax.curation.checks import doses, drugs, instructed, negation, numbers, structure, surface
from bimedix_jax.curation.checks.batch import Batch
from bimedix_jax.curation.checks.flags import FLAG_NAMES, Flag
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

__all__ = ["FLAG_NAMES", "Batch", "Flag", "check", "check_text"]

_OF_TEXTS = (
    numbers.check,
    doses.check,
    negation.check,
    structure.check_text,
    drugs.check,
    surface.check,
    instructed.check,
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


def check(source: Record, translation: Record, batch: Batch | None = None) -> list[Flag]:
    """Flags of a translated record: of the text of each turn, and of the structure of the record.

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
        if before.language == "ar":  # the patient switched to Arabic in this turn, so it was not translated
            continue
        found = check_text(before.value, after.value, batch)
        flags += [flag.model_copy(update={"place": f"turn {number}"}) for flag in found]
    return flags
