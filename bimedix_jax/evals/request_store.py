"""What a model answered to single requests, on disk as it comes, so that a killed evaluation does not start again.

The first line of the file identifies the run; every further line has the answers to one batch. Batches are skipped only
as a whole: what is computed again is computed with the same neighbours, and so with the same rounding.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax.errors import BimedixError

NAME = "requests.jsonl"
"""The file in a folder of results."""
APPLIED = "applied"
"""The key of the counts in a line; those of answers are hashes."""

OPTIONS = {
    "batch_tokens": "--batch-tokens",
    "chat": "--chat",
    "exclude_flagged": "--exclude-flagged",
    "heldout": "--heldout",
    "limit": "--limit",
    "max_length": "--max-length",
    "mesh": "--mesh",
    "num_fewshot": "--num-fewshot",
    "open": "--open or --max-new-tokens",
    "revision": "--revision",
    "task_files": "--task-files",
    "variants": "--orders, --wordings or --seed",
}
"""Value -> the options of `bimedix eval harness` or `bimedix eval run` that set it, for messages."""


def key_of(kind: str, *parts: Any) -> str:
    """Identifies a request: SHA-256 of its kind and its arguments."""
    return hashlib.sha256(json.dumps([kind, *parts], sort_keys=True).encode()).hexdigest()[:32]


class RequestStore:
    """Answers by key. Without a path it keeps nothing. The file is made with the first answers.

    Args:
      run: what the answers depend on: hashes of model, adapter and tokenizer, versions, and what was asked.
      counters: counts that grow with every batch, such as the tokens that rules were applied to; they are restored.

    Raises:
      BimedixError: the file belongs to another run, or has a line that is not ours.
    """

    def __init__(
        self, path: Path | None = None, run: Mapping[str, Any] | None = None, counters: np.ndarray | None = None
    ):
        self.counters = np.zeros(0, np.int64) if counters is None else counters
        self.known: dict[str, Any] = {}
        self.reused = 0
        self._path = path
        self._head: str | None = json.dumps({"run": run or {}}, sort_keys=True)
        if path is None or not path.exists():
            return
        check_run(path, json.loads(self._head)["run"])
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        lines = whole[:end].split(b"\n")[:-1]
        for number, line in enumerate(lines[1:], start=2):
            found = answers_in(line, f"{path}:{number}", len(self.counters))
            self.counters[:] = found.pop(APPLIED, ())
            self.known |= found
        if end < len(whole):  # a kill cut the last line off
            os.truncate(path, end)
        if lines:
            self._head = None

    def has(self, keys: Iterable[str]) -> bool:
        """Whether all of these are answered."""
        return all(key in self.known for key in keys)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keeps the answers to a batch.

        Raises:
          BimedixError: a log-likelihood is NaN or infinite.
        """
        if not all(map(is_answer, answers.values())):
            raise BimedixError("the model computes NaN or infinity; check its weights, or load it with base float32")
        self.known |= answers
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [] if self._head is None else [self._head]
        counts = {APPLIED: self.counters.tolist()} if self.counters.size else {}
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(f"{line}\n" for line in (*lines, json.dumps({**counts, **answers}))))
            file.flush()
            os.fsync(file.fileno())
        self._head = None


def is_answer(value: Any) -> bool:
    """Whether this is a generated text, or a finite log-likelihood and whether it is greedy."""
    if isinstance(value, str):
        return True
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], float | int)
        and math.isfinite(value[0])
        and isinstance(value[1], bool)
    )


def is_counts(value: Any, length: int) -> bool:
    """Whether this is a list of so many counts."""
    return isinstance(value, list) and len(value) == length and all(isinstance(one, int) for one in value)


def answers_in(line: bytes, where: str, counters: int) -> dict[str, Any]:
    """The answers in a line, and the counts under APPLIED if there are `counters` of them. Raises BimedixError, which
    begins with `where`, if it has anything else."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if (
        not isinstance(row, dict)
        or not all(is_counts(value, counters) if key == APPLIED else is_answer(value) for key, value in row.items())
        or (APPLIED in row) != (counters > 0)
    ):
        raise BimedixError(
            f"{where} does not have the answers to a batch of requests; remove this line, and its requests run again, "
            "or pass --overwrite to start again"
        )
    return row


def head_of(path: Path) -> dict[str, Any] | None:
    """What the answers of a file depend on; None if its first line does not say so, {} without a complete line."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return {} if line.startswith(b'{"run"'[: len(line)]) else None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    found = row.get("run") if isinstance(row, dict) else None
    return found if isinstance(found, dict) else None


def check_run(path: Path, run: Mapping[str, Any]) -> None:
    """Checks that the answers in a file, if any, are those of `run`, or of the parts of it that are known.

    Raises:
      BimedixError: they are not; the message names what differs.
    """
    before = head_of(path)
    if before is None:
        raise BimedixError(f"{path} does not have answers to requests; name another folder with --out")
    if not before:
        return
    names = differing({name: before.get(name) for name in run}, run)
    if len(names) > 1 and "questions" in names:  # they follow from the others
        names.remove("questions")
    if names:
        raise BimedixError(
            f"{path} has answers of an evaluation with other values of: {shown(names)}; repeat its command, name "
            "another folder with --out, or pass --overwrite to discard them"
        )


def shown(names: Iterable[str]) -> str:
    """Names of values for a message, those of options as on the command line."""
    return ", ".join(OPTIONS.get(name, name) for name in names)


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the values that differ, sorted; a value may be a mapping of values."""
    found = set()
    for name in {*before, *now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= set(differing(old, new))
        elif old != new:
            found.add(name)
    return sorted(found)
