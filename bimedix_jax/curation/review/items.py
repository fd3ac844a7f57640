"""What goes to a person and what comes back: one line of JSON each.

A `ReviewItem` is written by the translation (`bimedix data translate`); a `Verdict` is what one reviewer said about it,
whether in Label Studio, in a spreadsheet or in a JSONL file.
"""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bimedix_jax.curation.checks.flags import Flag
from bimedix_jax.data.records import Record, explain
from bimedix_jax.errors import BimedixError

Reason = Literal["low score", "flag", "no score", "no translation", "sample"]
"""Why a person has to look. All but `sample` mean that the machine did not accept; `sample` is the random part of what
it did accept, and alone says how often unseen acceptances are wrong."""

Decision = Literal["accept", "edit", "reject"]

SCORE_MIN, SCORE_MAX = 0.0, 100.0


class Version(BaseModel):
    """One translation that was tried: which round wrote it, what the judge and the checks said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int = Field(ge=0)
    translation: Record | None = None  # None: the answer could not be read as a translation
    score: float | None = Field(default=None, ge=SCORE_MIN, le=SCORE_MAX)  # None: there was no score that could be read
    flags: tuple[Flag, ...] = ()
    note: str = ""  # what went wrong, where something did


class ReviewItem(BaseModel):
    """A source, its best translation so far, and everything a reviewer needs to judge it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)  # unique in a file; the source record's id does
    reason: Reason
    source: Record
    translation: Record | None = None
    score: float | None = Field(default=None, ge=SCORE_MIN, le=SCORE_MAX)
    threshold: float | None = Field(default=None, ge=SCORE_MIN, le=SCORE_MAX)
    flags: tuple[Flag, ...] = ()
    history: tuple[Version, ...] = ()  # oldest first
    stratum: str | None = None  # of a sampled item: the group it was drawn from
    stratum_accepted: int | None = Field(default=None, ge=1)  # of a sampled item: how many its group holds
    provenance: dict[str, Any] = Field(default_factory=dict)  # models, prompt hashes, run

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reason == "sample" and self.translation is None:
            raise ValueError("a sampled item was accepted, so it must hold its translation")
        if (self.reason == "no translation") != (self.translation is None):
            raise ValueError(f"reason {self.reason!r} and translation {self.translation and self.translation.id!r}")
        if self.translation is not None and len(self.translation.conversations) != len(self.source.conversations):
            raise ValueError(
                f"the source has {len(self.source.conversations)} turns, "
                f"the translation {len(self.translation.conversations)}"
            )
        return self

    def to_json(self) -> str:
        """The item as one line of JSON, Arabic as itself."""
        return dump(self)


class Verdict(BaseModel):
    """What one reviewer said about one item. `edited` holds the new texts of the segments that were changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item: str = Field(min_length=1)
    reviewer: str = Field(min_length=1)
    time: AwareDatetime
    decision: Decision
    score: float | None = Field(default=None, ge=SCORE_MIN, le=SCORE_MAX)  # the reviewer's own, on the judge's scale
    edited: dict[str, str] | None = None
    comment: str = ""

    @model_validator(mode="after")
    def _edits_belong_to_edit(self) -> Self:
        if bool(self.edited) != (self.decision == "edit"):
            raise ValueError(f"decision {self.decision!r}: changed texts come with 'edit', and only with it")
        if any(not text.strip() for text in (self.edited or {}).values()):
            raise ValueError("an edited text is empty")
        return self


def dump(model: BaseModel) -> str:
    """One line of JSON, Arabic as itself."""
    return json.dumps(model.model_dump(mode="json", by_alias=True), ensure_ascii=False)


def read_items(path: str | Path) -> Iterator[ReviewItem]:
    """Items of a JSONL file, one at a time.

    Raises:
        BimedixError: there is no such file, a line is not an item, or two have the same id (file and line are named).
    """
    source = Path(path)
    if not source.is_file():
        raise BimedixError(f"there is no file {source}; `bimedix data translate` writes review.jsonl")
    seen: dict[str, int] = {}
    with source.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                item = ReviewItem.model_validate_json(line)
            except ValidationError as error:
                raise BimedixError(f"{source}:{number}: {explain(error)}; correct the line or remove it") from error
            if item.id in seen:
                raise BimedixError(f"{source}:{number}: item {item.id!r} stands in line {seen[item.id]} already")
            seen[item.id] = number
            yield item


def now() -> datetime:
    """The time, in this machine's zone, as a verdict keeps it."""
    return datetime.now().astimezone().replace(microsecond=0)
