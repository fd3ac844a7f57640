"""The results of knock-outs in a file: what `--knockout` reads."""

from collections.abc import Mapping
from pathlib import Path

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
    found = files.read_json(path, KnockoutFile, "name a file of knock-outs as docs/routing.md describes it")
    known = recording.manifest.hashes
    for name, value in found.hashes.items():
        if None not in (value, known.get(name)) and value != known[name]:
            raise BimedixError(f"{path} was made with another {name} than {recording.folder}; measure both on the same")
    layers = set(recording.layer_numbers)
    for one in found.interactions:
        if one.layer not in layers or not 0 <= one.expert < recording.manifest.experts:
            raise BimedixError(f"{path} has layer {one.layer}, expert {one.expert}, but {recording.folder} has not")
    return found.interactions
