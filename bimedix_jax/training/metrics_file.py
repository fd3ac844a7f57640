"""metrics.jsonl: one line for each step. It is only rewritten when a run resumes from an earlier step.

No JAX is imported here: reports of sweeps read the file too.
"""

import json
from pathlib import Path
from typing import Any

from bimedix_jax.errors import BimedixError
from bimedix_jax.files import write_text

METRICS = "metrics.jsonl"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run, in order. An incomplete last line, after a kill, is left out.

    Raises:
      BimedixError: another line is not the JSON of a step.
    """
    path = Path(folder) / METRICS
    lines = [line for line in path.read_text("utf-8", "replace").splitlines(keepends=True) if line.endswith("\n")]
    found = [_step(line) for line in lines]
    if None in found:
        raise BimedixError(
            f"{path}, line {found.index(None) + 1}, is not the JSON of a step; restore the file from a copy, or remove "
            "the folder of this run and train it again."
        )
    return [value for value in found if value is not None]


def _step(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "step" in value else None


def readable(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file and their values, up to the first that is no complete JSON, after a kill or a power loss."""
    found = []
    for line in path.read_text("utf-8", "replace").splitlines(keepends=True) if path.is_file() else ():
        value = _step(line) if line.endswith("\n") else None
        if value is None:
            break
        found.append((line, value))
    return found


def rewind(folder: Path, step: int) -> Path | None:
    """Moves the lines of later steps, and what follows the last readable line, from metrics.jsonl to another file.

    The run repeats these steps, with the same losses.

    Returns: the other file; None if there was nothing to move.
    """
    path = folder / METRICS
    if not path.exists():
        return None
    kept = [line for line, value in readable(path) if value["step"] <= step]
    moved = path.read_text("utf-8", "replace").splitlines(keepends=True)[len(kept) :]
    if not moved:
        return None
    number = 1
    while (side := folder / f"metrics.superseded-{number}.jsonl").exists():
        number += 1
    write_text(side, "".join(moved))  # first, so that a kill in between loses nothing
    write_text(path, "".join(kept))
    return side
