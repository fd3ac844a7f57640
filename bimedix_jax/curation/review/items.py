"""Items for review and verdicts, each one line of JSON.

`bimedix data translate` writes each `ReviewItem`. A `Verdict` is one reviewer's decision on it, made in Label Studio,
in a spreadsheet or in a JSONL file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bimedix_jax import files
from bimedix_jax.curation.checks.flags import Flag
from bimedix_jax.data.records import Record, explain
from bimedix_jax.errors import BimedixError

Reason = Literal["low score", "flag", "no score", "no translation", "sample"]
"""Why a person reviews an item. `sample` is the random part of the accepted translations, which alone tells how often
accepted translations are wrong. All other reasons mean that the translation was not accepted."""

Decision = Literal["accept", "edit", "reject"]

SCORE_MIN, SCORE_MAX = 0.0, 100.0


class Version(BaseModel):
    """One draft of a translation: its round, the judge's score and the flags of the checks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int = Field(ge=0)
    translation: Record | None = None  # None: the reply could not be read as a translation
    score: float | None = Field(default=None, ge=SCORE_MIN, le=SCORE_MAX)  # None: no score could be read
    flags: tuple[Flag, ...] = ()
    note: str = ""  # what went wrong, if anything


class ReviewItem(BaseModel):
    """A source record, its best translation, and what a reviewer needs to judge it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)  # unique in a file: the id of the source record
    reason: Reason
    source: Record
    translation: Record | None = None
    score: float | None = Field(default=None, ge=SCORE_MIN, le=SCORE_MAX)
    threshold: float | None = Field(default=None, ge=SCORE_MIN, le=SCORE_MAX)
    flags: tuple[Flag, ...] = ()
    history: tuple[Version, ...] = ()  # oldest first
    stratum: str | None = None  # of a sampled item: the group it was drawn from
    stratum_accepted: int | None = Field(default=None, ge=1)  # of a sampled item: size of its group
    provenance: dict[str, Any] = Field(default_factory=dict)  # models, prompt hashes, run

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reason == "sample" and self.translation is None:
            raise ValueError("a sampled item was accepted, so it must have a translation")
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
    """One reviewer's decision on one item. `edited` maps the changed segments to their new texts.

    `stated` is the decision that the reviewer chose, where a changed text made it an edit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    item: str = Field(min_length=1)
    reviewer: str = Field(min_length=1)
    time: AwareDatetime
    decision: Decision
    score: float | None = Field(default=None, ge=SCORE_MIN, le=SCORE_MAX)  # the reviewer's own, on the judge's scale
    edited: dict[str, str] | None = None
    comment: str = ""
    stated: Literal["accept"] | None = None

    @model_validator(mode="after")
    def _edits_belong_to_edit(self) -> Self:
        if self.decision == "edit" and not self.edited:
            raise ValueError(
                "the decision is 'edit' and no text is changed; write the corrected text or decide 'accept'"
            )
        if self.edited and self.decision != "edit":
            raise ValueError(f"the decision is {self.decision!r} and a text is changed; only 'edit' changes texts")
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
    for number, line in enumerate(files.text_lines(source), start=1):
        if not line.strip():
            continue
        try:
            item = ReviewItem.model_validate_json(line)
        except ValidationError as error:
            raise BimedixError(f"{source}:{number}: {explain(error)}; correct the line or remove it") from error
        if item.id in seen:
            raise BimedixError(f"{source}:{number}: item {item.id!r} is already in line {seen[item.id]}")
        seen[item.id] = number
        yield item
