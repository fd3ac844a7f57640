"""What a model answered to single requests, on disk as it comes, so that a killed evaluation does not start again.

The first line of the file identifies the run; every further line has the answers to one batch. Batches are skipped only
as a whole: what is computed again is computed with the same neighbours, and so with the same rounding.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bimedix_jax.errors import BimedixError

NAME = "requests.jsonl"
"""The file in a folder of results."""


def key_of(kind: str, *parts: Any) -> str:
    """Identifies a request: SHA-256 of its kind and its arguments."""
    return hashlib.sha256(json.dumps([kind, *parts], sort_keys=True).encode()).hexdigest()[:32]


class RequestStore:
    """Answers by key. Without a path it keeps nothing.

    Args:
      run: what the answers depend on: hashes of model, adapter and tokenizer, and versions.

    Raises:
      BimedixError: the file belongs to another run.
    """

    def __init__(self, path: Path | None = None, run: Mapping[str, Any] | None = None):
        self.known: dict[str, Any] = {}
        self.reused = 0
        self._path = path
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"run": run or {}}, sort_keys=True)
        lines = self._complete(path)
        if lines and json.loads(lines[0]) != json.loads(head):
            raise BimedixError(
                f"{path} has answers of another model or version; name another folder with --out, or pass --overwrite"
            )
        for line in lines[1:]:
            self.known |= json.loads(line)
        if not lines:
            self._append(head)

    @staticmethod
    def _complete(path: Path) -> list[str]:
        """The complete lines; a last one that a kill cut off is removed from the file."""
        if not path.exists():
            return []
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(path, end)
        return whole[:end].decode().splitlines()

    def _append(self, line: str) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def has(self, keys: Iterable[str]) -> bool:
        """Whether all of these are answered."""
        return all(key in self.known for key in keys)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keeps the answers to a batch."""
        self.known |= answers
        self._append(json.dumps(dict(answers)))
