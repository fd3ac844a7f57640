"""What a check of a translation can say, by name."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

FlagName = Literal[
    "numbers",
    "doses",
    "negations",
    "options",
    "answer_key",
    "drug_names",
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
    """One thing that is wrong with a translation, found without a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: FlagName
    detail: str  # what was found, with the words or numbers in question
    place: str | None = None  # "turn 2", "choice B"; None where it is the whole text

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        return f"{self.name}{where}: {self.detail}"
