"""How a source is read: the options that all readers share, and the split that the name of a file implies."""

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.curation.quarantine import WrongSource
from bimedix_jax.curation.readers import script, texts
from bimedix_jax.data.records import Language, Split

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}

_HELD_OUT = {
    "test",
    "tests",
    "testing",
    "dev",
    "devel",
    "development",
    "val",
    "valid",
    "validation",
    "eval",
    "evaluation",
}
_HELD_OUT |= {"heldout", "holdout", "testset", "devset", "valset"}
_TRAIN = {"train", "training", "trainset"}
_BOTH = {"trainval", "traindev", "traintest", "trainvalid", "devtest"}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# a test of the body, not of a model: blood_test, test_results
_OF_THE_BODY = {"blood", "lab", "labs", "laboratory", "urine", "skin", "stress", "diagnostic"}
_OF_THE_BODY |= {"function", "screening", "allergy", "genetic", "pregnancy", "result", "results", "report", "reports"}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options of a source that do not depend on its reader.

    Attributes:
      language: of all records; None takes it from the script of each.
      split: of all records; None takes it from the name of the file, or leaves it undecided.
      key: of the rows in a JSON file that is one object, with a dot for each level.
      delimiter: between the columns of a text file; None finds it.
      encoding: of text files; None is UTF-8.
      html: whether markup is dropped from texts.
      placeholders: whether rows whose answer says only that there is none are dropped.
      missing: whether words such as NA and NULL, which programs write for an empty cell, are missing values or texts.
    """

    language: Language | None = None
    split: Split | None = None
    key: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    html: Literal["drop", "keep"] = "drop"
    placeholders: Literal["drop", "keep"] = "drop"
    missing: Literal["drop", "keep"] = "drop"

    def spoken(self, *values: str) -> Language:
        """The language of a record: the stated one, or that of the first text with letters."""
        return self.language or script.language_of(*values)

    def spoken_in_exam(self, question: str, choices: Sequence[str]) -> Language:
        """The language of a question with choices."""
        return self.language or script.language_of_exam(question, choices)

    def reply(self, value: object) -> object:
        """An answer, for `said`. Raises ValueError if it is missing or a placeholder."""
        if texts.is_missing(value):
            raise ValueError("the answer is missing")
        if self.placeholders == "drop" and isinstance(value, str) and texts.is_placeholder(value):
            raise ValueError("the answer is a placeholder")
        return value

    def clean(self, values: dict[str, Any], account: SourceAccount) -> dict[str, Any]:
        """The fields of a row, without markup unless that is kept. Raises ValueError for a row not to be learned."""
        for name in ("weight", "train"):
            if name in values and _is_off(values[name]):
                raise ValueError(f"the row asks not to be learned ({name})")
        if self.html == "drop":
            values = texts.cleaned(values, account)
        return texts.kept(values) if self.missing == "keep" else values


COMMON = tuple(option.name for option in fields(Reading))


def parse_reading(options: Mapping[str, str]) -> Reading:
    """The shared options of a source.

    Raises:
        WrongSource: a value is not one that the option takes.
    """
    language, split = options.get("language"), options.get("split")
    if language not in (None, "en", "ar"):
        raise WrongSource(f"language={language} is not a known language; write language=en or language=ar")
    if split not in (None, "train", "heldout"):
        raise WrongSource(f"split={split} is not a split; write split=train or split=heldout")
    delimiter = options.get("delimiter")
    if delimiter is not None:
        delimiter = DELIMITERS.get(delimiter, delimiter)
        if len(delimiter) != 1:
            raise WrongSource(f"delimiter={delimiter} is neither one character nor one of {', '.join(DELIMITERS)}")
    encoding = options.get("encoding")
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise WrongSource(f"encoding={encoding} is unknown; write one such as windows-1256 or utf-16") from None
    for name in ("html", "placeholders", "missing"):
        if options.get(name, "drop") not in ("drop", "keep"):
            raise WrongSource(f"{name}={options[name]} is neither drop nor keep")
    if options.get("key") == "":
        raise WrongSource("key= is empty; write the key of the rows, with a dot for each level, as in key=data.train")
    return Reading(
        language=language,  # pyright: ignore[reportArgumentType] (checked above)
        split=split,  # pyright: ignore[reportArgumentType]
        key=options.get("key"),
        delimiter=delimiter,
        encoding=encoding,
        html=options.get("html", "drop"),  # pyright: ignore[reportArgumentType]
        placeholders=options.get("placeholders", "drop"),  # pyright: ignore[reportArgumentType]
        missing=options.get("missing", "drop"),  # pyright: ignore[reportArgumentType]
    )


def split_of(name: str) -> tuple[Split | None, bool]:
    """The split that the name of a file or hub split implies, None for none; and whether the name says two.

    Validation and test parts are held out, since models are compared on them.
    """
    said: set[Split] = set()
    words = [word.lower() for word in _WORDS.findall(re.sub("held[-_ ]out", "heldout", name, flags=re.IGNORECASE))]
    if _BOTH & set(words):
        return None, True
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if word in _TRAIN:
            said.add("train")
        elif word in _HELD_OUT and not (word.startswith("test") and {before, after} & _OF_THE_BODY):
            said.add("heldout")
    return (said.pop() if len(said) == 1 else None), len(said) > 1


def _is_off(value: object) -> bool:
    return value in (0, False) or (isinstance(value, str) and value.strip().casefold() in ("0", "0.0", "false"))
