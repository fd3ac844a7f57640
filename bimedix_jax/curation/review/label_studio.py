"""Review in Label Studio: writes tasks for its import and reads annotations from its export (JSON, not JSON-MIN).

The labelling configuration is `assets/review/label_studio.xml`; it shows Arabic from right to left.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bimedix_jax.curation.review.items import ReviewItem, Verdict
from bimedix_jax.curation.review.presentation import changes, editable, side_by_side
from bimedix_jax.curation.review.segments import digest, has_digest, segments
from bimedix_jax.data.records import explain
from bimedix_jax.errors import BimedixError

CONFIG = "label_studio.xml"
FIELDS = ("decision", "edited", "score", "comment")


def labelling_config() -> str:
    """The XML to paste into the project's labelling interface."""
    return (resources.files("bimedix_jax") / "assets" / "review" / CONFIG).read_text("utf-8")


def tasks(items: Iterable[ReviewItem], blind: bool) -> list[dict[str, Any]]:
    """Tasks in Label Studio's import format. A prediction fills the field for the corrected text in advance."""
    found = []
    for item in items:
        text = editable(segments(item))
        filled = {
            "id": "edited",
            "from_name": "edited",
            "to_name": "pair",
            "type": "textarea",
            "value": {"text": [text]},
        }
        found.append(
            {
                "data": {
                    "item": item.id,
                    "digest": digest(item),
                    "title": item.id,
                    "html": side_by_side(item, blind),
                },
                "predictions": [{"model_version": "translation", "result": [filled]}],
            }
        )
    return found


class _Result(BaseModel):
    """The value of one control of the labelling interface."""

    model_config = ConfigDict(extra="ignore")  # position, origin and what later versions add

    from_name: str
    value: dict[str, Any]


class _Annotation(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: int | str | None = None
    completed_by: int | str | dict[str, Any] | None = None
    was_cancelled: bool = False
    created_at: datetime | None = None
    updated_at: datetime | None = None
    result: list[_Result] = Field(default_factory=list)


class _Task(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: dict[str, Any]
    annotations: list[_Annotation]


def verdicts(text: str, where: str, items: Mapping[str, ReviewItem]) -> list[Verdict]:
    """The verdicts of an export, without cancelled (skipped) annotations.

    Raises:
        BimedixError: it is not such an export, or an annotation does not fit its item; `where` names the file.
    """
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BimedixError(f"{where} is not JSON ({error}); export the project as JSON") from error
    if not isinstance(document, list):
        raise BimedixError(
            f"{where} holds a {type(document).__name__}, not a list of tasks; export the project as JSON"
        )
    found = []
    for number, entry in enumerate(document, start=1):
        place = f"{where}, task {number}"
        if not isinstance(entry, dict) or "annotations" not in entry:
            raise BimedixError(f"{place} has no annotations; export the project as JSON, not as JSON-MIN or CSV")
        try:
            task = _Task.model_validate(entry)
        except (ValidationError, RecursionError) as error:
            said = explain(error) if isinstance(error, ValidationError) else "it is nested too deeply"
            raise BimedixError(f"{place}: {said}; export the project as JSON") from error
        item = _item(task, place, items)
        found += [_verdict(annotation, item, place) for annotation in task.annotations if not annotation.was_cancelled]
    return found


def _item(task: _Task, place: str, items: Mapping[str, ReviewItem]) -> ReviewItem:
    name = task.data.get("item")
    item = items.get(name) if isinstance(name, str) else None
    if item is None:
        raise BimedixError(f"{place}: there is no item {name!r} in the review file; give the file that was exported")
    if not has_digest(item, task.data.get("digest")):
        raise BimedixError(f"{place}: item {name!r} has been translated again since it was exported; export it again")
    return item


def _verdict(annotation: _Annotation, item: ReviewItem, place: str) -> Verdict:
    given: dict[str, Any] = {}
    for result in annotation.result:
        if result.from_name not in FIELDS:
            raise BimedixError(f"{place}: unknown control {result.from_name!r}; use the labelling config {CONFIG}")
        given[result.from_name] = _value(result, place)
    if not given.get("decision"):
        raise BimedixError(f"{place}: an annotation has no decision; make one in Label Studio and export again")
    edited = changes(given["edited"], item) if given.get("edited") and given["decision"] != "reject" else {}
    decision = "edit" if edited else given["decision"]  # a changed text is an edit, even if `accept` was clicked
    when = annotation.updated_at or annotation.created_at
    if when is None:
        raise BimedixError(f"{place}: an annotation has neither updated_at nor created_at; export the project as JSON")
    try:
        return Verdict.model_validate(
            {
                "item": item.id,
                "reviewer": _reviewer(annotation.completed_by, place),
                "time": when.isoformat() if when.tzinfo else f"{when.isoformat()}+00:00",  # Label Studio writes UTC
                "decision": decision,
                "score": given.get("score"),
                "edited": edited or None,
                "comment": given.get("comment", ""),
                "stated": "accept" if edited and given["decision"] == "accept" else None,
            }
        )
    except ValidationError as error:
        raise BimedixError(f"{place}: {explain(error)}; correct it in Label Studio and export again") from error


def _value(result: _Result, place: str) -> Any:
    """The choice, number or text of a control."""
    for key in ("choices", "text", "number"):
        if key in result.value:
            value = result.value[key]
            if key == "number":
                return value
            lines = value if isinstance(value, list) else [value]
            if all(isinstance(line, str) for line in lines) and lines:
                return "\n".join(lines)
    raise BimedixError(f"{place}: {result.from_name!r} holds neither a choice nor a text nor a number")


def _reviewer(completed_by: int | str | dict[str, Any] | None, place: str) -> str:
    """The reviewer's name: the e-mail address if the export has it, else the number."""
    if isinstance(completed_by, dict):
        completed_by = completed_by.get("email") or completed_by.get("id")
    if completed_by in (None, ""):
        raise BimedixError(f"{place}: completed_by is missing, so the reviewer is unknown; export the project as JSON")
    return f"user {completed_by}" if isinstance(completed_by, int) else str(completed_by)
