"""The results of knock-outs in a file: what `--knockout` reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.recording import Recording
from bimedix_jax.routing.tables import Interaction

M = TypeVar("M", bound="Measured")

Probability = Annotated[float, Field(ge=0, le=1)]


class Measured(BaseModel):
    """What a knock-out of an expert changes, as tables.Interaction."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    field: str
    layer: int
    expert: Annotated[int, Field(ge=0)]
    estimate: Annotated[float, Field(allow_inf_nan=False)]

    @property
    def cell(self) -> str:
        return f"{self.field}, layer {self.layer}, expert {self.expert}"


class Adjusted(Measured):
    """A line of `KnockoutFile`."""

    p_adjusted: Probability


class Tried(Measured):
    """A line of the result of `bimedix routes knockout`, which has further keys."""

    model_config = ConfigDict(extra="ignore")

    groups: list[str]
    meaning: str
    p_adjusted: Probability | None

    @property
    def cell(self) -> str:
        return f"{super().cell}, {self.meaning}, {' and '.join(self.groups)}"


def distinct(interactions: tuple[M, ...]) -> tuple[M, ...]:
    seen: set[str] = set()
    for one in interactions:
        if one.cell in seen:
            raise ValueError(f"it has the interaction of {one.cell} twice; keep one of them")
        seen.add(one.cell)
    return interactions


class KnockoutFile(BaseModel):
    """Interactions of knock-outs with the groups of a question, and what they were measured on.

    Attributes:
      hashes: of model, adapter, data, ... as in the manifest of the recording; those that both know must agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    interactions: Annotated[tuple[Adjusted, ...], AfterValidator(distinct)]
    hashes: Mapping[str, str | None] = {}
    command: str | None = None
    version: str | None = None


class CommandManifest(BaseModel):
    """What is read of the manifest of a result."""

    hashes: Mapping[str, str | None]
    version: str | None = None


class CommandFile(BaseModel):
    """What is read of the result of `bimedix routes knockout`."""

    interaction: Annotated[tuple[Tried, ...], AfterValidator(distinct)]
    manifest: CommandManifest


def read_interactions(path: Path, recording: Recording) -> tuple[Interaction, ...]:
    """The interactions in a file.

    Raises:
      BimedixError: it cannot be read, it is of another model or other data than the recording, or it has a field, a
        layer or an expert that the recording has not.
    """
    remedy = "name a file that `bimedix routes knockout` wrote"
    content = files.peek_json(path)
    written = {"interaction", "manifest"} <= set(content)
    found = (
        of_command(files.validate(content, CommandFile, str(path), remedy))
        if written
        else files.read_json(path, KnockoutFile, remedy)
    )
    known = recording.manifest.hashes
    for name, value in found.hashes.items():
        if None not in (value, known.get(name)) and value != known[name]:
            raise BimedixError(f"{path} was made with another {name} than {recording.folder}; measure both on the same")
    layers, fields = set(recording.layer_numbers), sorted(recording.groups())
    for one in found.interactions:
        if one.field not in fields:
            raise BimedixError(
                f"{path} has interactions of the field {one.field!r}, but {recording.folder} has "
                f"{', '.join(fields) or 'no field'}; correct it"
            )
        if one.layer not in layers or not 0 <= one.expert < recording.manifest.experts:
            raise BimedixError(f"{path} has layer {one.layer}, expert {one.expert}, but {recording.folder} has not")
    return tuple(Interaction(**one.model_dump()) for one in found.interactions)


def of_command(content: CommandFile) -> KnockoutFile:
    """The result of `bimedix routes knockout` as a `KnockoutFile`.

    Of the meanings of an expert it has the one with the smallest p-value, which is adjusted for all of them. An
    interaction without a p-value was not tested, and is left out.
    """
    tested = [
        row.model_dump(exclude={"groups", "meaning"}) for row in content.interaction if row.p_adjusted is not None
    ]
    least: dict[tuple[str, int, int], Adjusted] = {}
    for row in sorted((Adjusted(**row) for row in tested), key=lambda row: row.p_adjusted):
        least.setdefault((row.field, row.layer, row.expert), row)
    return KnockoutFile(
        interactions=tuple(least.values()), hashes=content.manifest.hashes, version=content.manifest.version
    )
