"""One reading for the whole column of answers: labels, letters, numbers from 0 or 1, or the wording of a choice.

Row by row, `B` may be the second choice or the choice "B", and 2 the second or the third. So `Column` looks at all rows
first and counts which readings fit. What two readings fit with different choices is refused, and so is a column that
fits none. A number of JSON or Parquet is never a wording.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from bimedix_jax.curation.quarantine import WrongSource
from bimedix_jax.curation.readers import choices as forms
from bimedix_jax.curation.readers.choices import Choices, label_of
from bimedix_jax.curation.readers.texts import is_missing, says_none

NEARLY_ALL = 0.95
"""Share of the answers that a reading must fit if no reading fits all of them; the others are left out."""

_MARKED = re.compile(r"\s*[(\[]?\s*(\w)\s*(?:[)\].:]|-\s)\s*(.+)", re.DOTALL)


def _label(answer: object, choices: Choices) -> int | None:
    whole = str(answer).strip().casefold()
    if len(whole) > 1 and not whole.isdecimal() and whole in choices.labels:
        return choices.labels.index(whole)
    label = label_of(answer)
    return choices.labels.index(label) if label in choices.labels else _marked(answer, choices, choices.labels)


def _letters(sequence: str) -> Callable[[object, Choices], int | None]:
    def read(answer: object, choices: Choices) -> int | None:
        if not isinstance(answer, str):
            return None
        label, letters = label_of(answer), sequence[: len(choices.texts)]
        if len(label) == 1 and label in letters:
            return letters.index(label)
        return _marked(answer, choices, letters)

    return read


def _marked(answer: object, choices: Choices, letters: str | tuple[str, ...]) -> int | None:
    """The choice that `B. Spleen` names, if its letter and its wording agree."""
    match = _MARKED.fullmatch(answer) if isinstance(answer, str) else None
    if match is None or label_of(match[1]) not in letters:
        return None
    index = letters.index(label_of(match[1]))
    return index if index < len(choices.texts) and _plain(match[2]) == _plain(choices.texts[index]) else None


def _numbers(first: int) -> Callable[[object, Choices], int | None]:
    def read(answer: object, choices: Choices) -> int | None:
        number = number_of(answer)
        return None if number is None or not 0 <= number - first < len(choices.texts) else number - first

    return read


def number_of(answer: object) -> int | None:
    """The whole number that an answer is, in any digits."""
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        return None
    text = str(answer).strip().removesuffix(".0")
    return int(text) if re.fullmatch(r"-?\d{1,4}", text) else None


def _wording(answer: object, choices: Choices) -> int | None:
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return None
    for spelling in (lambda text: " ".join(text.split()), _plain):
        found = [index for index, text in enumerate(choices.texts) if spelling(text) == spelling(str(answer))]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(" .").casefold()


READINGS: dict[str, tuple[str, Callable[[object, Choices], int | None]]] = {
    "label": ("the labels of the choices", _label),
    "letter": ("letters A, B, C", _letters(forms.LATIN)),
    "abjad": ("letters أ ب ج د", _letters(forms.ABJAD)),
    "alphabet": ("letters أ ب ت ث", _letters(forms.ALPHABET)),
    "from0": ("numbers from 0", _numbers(0)),
    "from1": ("numbers from 1", _numbers(1)),
    "text": ("the wording of a choice", _wording),
}


def index_of(reading: str, answer: object, choices: Choices) -> int:
    """The index of the choice that an answer names.

    Raises:
        ValueError: it names none in this reading.
    """
    if is_missing(answer) and not says_none(answer):
        raise ValueError("the answer is missing")
    found = READINGS[reading][1](answer, choices)
    if found is None:
        raise ValueError(f"the answer is not one of the {len(choices.texts)} choices, read as {READINGS[reading][0]}")
    return found


@dataclass
class Column:
    """What was seen of a column of answers. `add` every row, then `decide`.

    Attributes:
      rows: answers that some reading fits.
      fits: number of answers by reading.
      apart: the lines of the first rows in which two readings give different choices, by the pair of readings.
      without: the lines of the first rows that a reading does not fit.
      ones: whether the number 1 occurs.
      zeros, tops: the lines of the first rows with the number 0, and with the number of their choices.
    """

    rows: int = 0
    fits: Counter[str] = field(default_factory=Counter)
    apart: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    without: dict[str, list[int]] = field(default_factory=dict)
    ones: bool = False
    zeros: list[int] = field(default_factory=list)
    tops: list[int] = field(default_factory=list)

    def add(self, line: int, answer: object, choices: Choices) -> None:
        """Note one row."""
        if is_missing(answer) and not says_none(answer):
            return
        found = {name: read(answer, choices) for name, (_, read) in READINGS.items()}
        fitting = {name: index for name, index in found.items() if index is not None}
        if not fitting:
            return
        self.rows += 1
        self.fits.update(fitting.keys())
        self.ones |= number_of(answer) == 1
        if ("from0" in fitting) != ("from1" in fitting):
            _keep(self.zeros if "from0" in fitting else self.tops, line)
        for name in READINGS.keys() - fitting.keys():
            _keep(self.without.setdefault(name, []), line)
        for first, index in fitting.items():
            for second, other in fitting.items():
                if first < second and index != other:
                    _keep(self.apart.setdefault((first, second), []), line)

    def decide(self, name: str, remedy: str | None = None) -> str | None:
        """The reading of the column, None if no answer fits any.

        Args:
          name: of the column, for messages.
          remedy: for messages, in place of the options of the reader `table`.

        Raises:
            WrongSource: two readings fit, or none.
        """
        if not self.rows:
            return None
        numbers = max(self.fits["from0"], self.fits["from1"])
        if self.zeros and self.tops and numbers == max(self.fits.values()):
            raise WrongSource(
                f"column {name} has both 0 (lines {_lines(self.zeros)}) and the number of choices (lines "
                f"{_lines(self.tops)}), so it counts neither from 0 nor from 1; "
                + (remedy or "pass first_option=0 or first_option=1, and the rows that do not fit are left out")
            )
        least = self.rows if self.rows in self.fits.values() else NEARLY_ALL * self.rows
        fitting = [reading for reading in READINGS if self.fits[reading] >= least]
        if not fitting:
            self._refuse_all(name, remedy)
        chosen = fitting[0]
        for other in fitting[1:]:
            lines = self.apart.get((min(chosen, other), max(chosen, other)))
            if lines is None or (chosen == "label" and other in ("from0", "from1", "letter", "abjad", "alphabet")):
                continue
            if (chosen, other) == ("from0", "from1") and not self.ones:
                continue  # numbers count from 0, as documented; a column that counts from 1 would have a 1
            self._refuse(name, chosen, other, lines, remedy)
        return chosen

    def _refuse_all(self, name: str, remedy: str | None) -> None:
        most = self.fits.most_common(1)[0][0]
        counts = ", ".join(
            f"{READINGS[reading][0]} {self.fits[reading]:,}" for reading in READINGS if self.fits[reading]
        )
        raise WrongSource(
            f"column {name} has no reading that fits all its {self.rows:,} answers ({counts}; lines that do not fit "
            f"the first: {_lines(self.without.get(most, []))}); "
            + (remedy or f"choose one with answers={'|'.join(READINGS)}")
        )

    def _refuse(self, name: str, chosen: str, other: str, lines: list[int], remedy: str | None) -> None:
        raise WrongSource(
            f"column {name} has two readings, {READINGS[chosen][0]} and {READINGS[other][0]}, which give different "
            f"choices in lines {_lines(lines)}; {remedy or f'pass answers={chosen} or answers={other}'}"
        )


def _keep(lines: list[int], line: int) -> None:
    if len(lines) < 5:
        lines.append(line)


def _lines(lines: list[int]) -> str:
    return ", ".join(map(str, lines))
