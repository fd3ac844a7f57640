"""The results of knock-outs in a file: what `--knockout` reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.recording import Recording
from bimedix_jax.routing.tables import Interaction


class KnockoutFile(BaseModel):
    """Interactions of knock-outs with the groups of a question, and what they were measured on.

    Attributes:
      hashes: of model, adapter, data, ... as in the manifest of the recording; those that both know must agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    interactions: tuple[Interaction, ...]
    hashes: Mapping[str, str | None] = {}
    command: str | None = None
    version: str | None = None


def read_interactions(path: Path, recording: Recording) -> tuple[Interaction, ...]:
    """The interactions in a file.

    Raises:
      BimedixError: it cannot be read, or it is of another model or other data than the recording.
    """
    remedy = "name a file that `bimedix routes knockout` wrote"
    content = files.peek_json(path)
    written = {"interaction", "manifest"} <= set(content)
    found = (
        files.validate(of_command(content), KnockoutFile, str(path), remedy)
        if written
        else files.read_json(path, KnockoutFile, remedy)
    )
    known = recording.manifest.hashes
    for name, value in found.hashes.items():
        if None not in (value, known.get(name)) and value != known[name]:
            raise BimedixError(f"{path} was made with another {name} than {recording.folder}; measure both on the same")
    layers = set(recording.layer_numbers)
    for one in found.interactions:
        if one.layer not in layers or not 0 <= one.expert < recording.manifest.experts:
            raise BimedixError(f"{path} has layer {one.layer}, expert {one.expert}, but {recording.folder} has not")
    return found.interactions


def of_command(content: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `bimedix routes knockout` as a `KnockoutFile`.

    Of the meanings of an expert it has the one with the smallest p-value, which is adjusted for all of them. An
    interaction without a p-value was not tested, and is left out.
    """
    tested = [row for row in content["interaction"] if row.get("p_adjusted") is not None]
    least: dict[tuple[Any, ...], Any] = {}
    for row in sorted(tested, key=lambda row: row["p_adjusted"]):
        least.setdefault((row["field"], row["layer"], row["expert"]), row)
    names = ("field", "layer", "expert", "estimate", "p_adjusted")
    manifest = content["manifest"]
    return {
        "interactions": [{name: row[name] for name in names} for row in least.values()],
        "hashes": manifest["hashes"],
        "version": manifest["version"],
    }
