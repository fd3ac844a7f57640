"""The results of an evaluation as they come, on disk, so that a killed evaluation continues where it was.

While `bimedix eval run --out NAME.json` works, the folder `.NAME.json.evaluation` next to it has two files:
`identity.json`, everything that the results depend on, and `results.jsonl` with a line for each result. The lines of a
batch are complete or they are left out. A continued evaluation runs the batches that are missing, each with the same
questions as before, so that its results have the same bits. The folder is removed when the result is written, and when
an evaluation fails before its first result.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.request_store import shown
from bimedix_jax.process import folders, signals

log = logging.getLogger(__name__)

IDENTITY, RESULTS = "identity.json", "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Part:
    """One list of records or questions of an evaluation. The default keeps nothing.

    Attributes:
      found: results of an earlier start, by the number of the record. Its batches need not run again.
      write: keeps the results of one batch.
    """

    found: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    write: Callable[[Mapping[int, Any]], None] = lambda results: None


@dataclasses.dataclass(frozen=True)
class Journal:
    """The parts of an evaluation by name.

    Attributes:
      counters: counts that grow with every batch, such as the tokens that rules were applied to; they are restored.
    """

    file: IO[str]
    found: dict[str, dict[int, Any]]
    counters: np.ndarray

    def part(self, name: str) -> Part:
        """The part of this name."""
        return Part(self.found.get(name, {}), lambda results: self._write(name, results))

    def _write(self, name: str, results: Mapping[int, Any]) -> None:
        state = {"of": len(results), "counters": self.counters.tolist()}
        rows = [{"part": name, "number": number, "result": result, **state} for number, result in results.items()]
        self.file.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())


def nothing(_: str) -> Part:
    """The parts of an evaluation that keeps nothing."""
    return Part()


def folder_of(out: Path) -> Path:
    """Where the evaluation that writes `out` keeps its results until it is finished."""
    target = out.resolve()
    return target.with_name(f".{target.name}.evaluation")


def is_unfinished(out: Path) -> bool:
    """Whether an evaluation that writes `out` was killed before it finished."""
    return (folder_of(out) / IDENTITY).exists()


@contextmanager
def journal(
    out: Path, identity: Mapping[str, Any], overwrite: bool, counters: np.ndarray | None = None
) -> Iterator[Journal]:
    """Opens the journal of the evaluation that writes `out`, new or to continue; removed at the end of the block.

    Args:
      identity: everything that the results depend on, as JSON values.
      overwrite: discard the journal of another evaluation.
      counters: see Journal; changed in place.

    Raises:
      BimedixError: another process writes it, or it is of another evaluation.
    """
    folder = folder_of(out)
    with folders.made_parents(folder):
        try:
            with folders.one_writer(folder, "evaluates"):
                known = json.loads(json.dumps(identity, default=str))
                _claim(folder, known, overwrite, out)
                counters = np.zeros(0, np.int64) if counters is None else counters
                with (folder / RESULTS).open("a+", encoding="utf-8", newline="\n") as file:
                    found = _restored(folder / RESULTS, counters)
                    count = sum(map(len, found.values()))
                    if count:
                        log.warning("%s continues with %d results of an earlier start.", out, count)
                    with signals.hint("continue with the same command"), _removed_if_empty(folder):
                        yield Journal(file, found, counters)
                (folder / IDENTITY).unlink()  # first: what remains without it is not continued
        finally:
            if (folder / RESULTS).exists() and not (folder / IDENTITY).exists():
                shutil.rmtree(folder)


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """A failed evaluation without a single result does not stay, so that the corrected command can start."""
    try:
        yield
    except Exception:
        if not (folder / RESULTS).stat().st_size:
            (folder / IDENTITY).unlink()
        raise


def _claim(folder: Path, identity: dict[str, Any], overwrite: bool, out: Path) -> None:
    before = files.peek_json(folder / IDENTITY)
    if before == identity:
        return
    results = folder / RESULTS
    if before and not overwrite and results.exists() and results.stat().st_size:
        differing = sorted(name for name in {*before, *identity} if before.get(name) != identity.get(name))
        raise BimedixError(
            f"{out} has an unfinished evaluation with other values of: {shown(differing)}; repeat its command to "
            "finish it, name another file, or pass --overwrite to discard it"
        )
    results.unlink(missing_ok=True)
    files.write_text(folder / IDENTITY, json.dumps(identity, ensure_ascii=False, indent=2) + "\n")


def _restored(path: Path, counters: np.ndarray) -> dict[str, dict[int, Any]]:
    """The results of all complete batches; what follows them is cut off."""
    found: dict[str, dict[int, Any]] = {}
    batch: list[dict[str, Any]] = []
    end = position = 0
    for line in path.read_bytes().splitlines(keepends=True):
        position += len(line)
        row = _row(line)
        if row is None or (batch and (row["part"], row["of"]) != (batch[0]["part"], batch[0]["of"])):
            break
        batch.append(row)
        if len(batch) == row["of"]:
            found.setdefault(row["part"], {}).update({row["number"]: row["result"] for row in batch})
            counters[:] = row["counters"]
            batch, end = [], position
    os.truncate(path, end)
    return found


def _row(line: bytes) -> dict[str, Any] | None:
    """None for a line that a kill or a full disk cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if line.endswith(b"\n") and isinstance(row, dict) and {"part", "number", "of"} <= set(row) else None
