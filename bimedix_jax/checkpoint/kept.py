"""The checkpoints that a run has kept: what they are, whether they are intact, and which can be removed."""

import dataclasses
import datetime
from pathlib import Path

from bimedix_jax.checkpoint.integrity import MANIFEST, find_damage
from bimedix_jax.checkpoint.steps import remove, step_folder, steps_in
from bimedix_jax.errors import BimedixError, listed


@dataclasses.dataclass(frozen=True)
class Kept:
    """One checkpoint.

    Attributes:
      bytes: of all its files.
      saved: time of its last change, in UTC.
      damage: the problem of its first damaged file; None if it is intact.
    """

    step: int
    folder: Path
    bytes: int
    saved: str
    damage: str | None


def read_kept(checkpoints: Path, hashes: bool) -> list[Kept]:
    """The checkpoints in a folder, by step.

    Args:
      hashes: compare the content of every file with the manifest, which reads all of them; otherwise only names and
        sizes are compared.

    Raises:
      BimedixError: there is none.
    """
    steps = steps_in(checkpoints)
    if not steps:
        below = sorted(path.parent for path in checkpoints.parent.rglob(checkpoints.name) if steps_in(path))
        shown = [str(path) for path in below[:3]] + ([f"{len(below) - 3} more"] if len(below) > 3 else [])
        remedy = (
            f"name the folder of one run: {listed(shown)}" if below else "name the folder of a run that has saved one"
        )
        raise BimedixError(f"{checkpoints} contains no checkpoint; {remedy}.")
    return [kept_at(step_folder(checkpoints, step), step, hashes) for step in steps]


def kept_at(folder: Path, step: int, hashes: bool) -> Kept:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    manifest = folder / MANIFEST
    changed = (manifest if manifest.is_file() else folder).stat().st_mtime
    saved = datetime.datetime.fromtimestamp(changed, datetime.UTC).isoformat(timespec="seconds")
    return Kept(step, folder, size, saved, find_damage(folder, hashes))


def to_prune(kept: list[Kept], keep: int) -> list[Kept]:
    """Damaged checkpoints, and all intact ones but the newest `keep`.

    Raises:
      BimedixError: none is intact, so that a damaged one may be all that is left of the run.
    """
    intact = [one for one in kept if one.damage is None]
    if not intact:
        raise BimedixError(
            f"No checkpoint in {kept[0].folder.parent} is intact, so none is removed (step {kept[-1].step}: "
            f"{kept[-1].damage}); restore one from a copy."
        )
    return [one for one in kept if one.damage is not None or one not in intact[-keep:]]


def prune(doomed: list[Kept]) -> None:
    for one in doomed:
        remove(one.folder)
