"""The flags that the checks of a translation can raise."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

FlagName = Literal[
    "numbers",
    "doses",
    "negations",
    "options",
    "answer_key",
    "drug_names",
    "symbols",
    "latin_words",
    "unrelated",
    "choice_order",
    "arabic_share",
    "length",
    "untranslated",
    "repetition",
    "same_translation",
    "answer_leak",
    "instruction_obeyed",
]

FLAG_NAMES: tuple[FlagName, ...] = get_args(FlagName)


class Flag(BaseModel):
    """A problem of a translation that a rule found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: FlagName
    detail: str  # the problem, with the words or numbers concerned
    place: str | None = None  # "turn 2", "choice B"; None for the whole text

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        return f"{self.name}{where}: {self.detail}"
