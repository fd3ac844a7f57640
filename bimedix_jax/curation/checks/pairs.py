"""Checks a file of translations that one already has: a line of JSON with `en` and `ar` for each pair."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bimedix_jax import files
from bimedix_jax.curation.checks import structure
from bimedix_jax.curation.checks.api import check_segments
from bimedix_jax.curation.checks.batch import Batch
from bimedix_jax.curation.checks.flags import FLAG_NAMES, Flag
from bimedix_jax.curation.checks.related import Corpus
from bimedix_jax.curation.checks.segments import Segments, counts, of_objects, of_records
from bimedix_jax.data.records import LETTERS, Record, explain
from bimedix_jax.errors import BimedixError

_OTHER_FORMATS = {"csv": "CSV", "tsv": "TSV", "xlsx": "a spreadsheet", "parquet": "Parquet"}
_NEEDED = 'write JSONL: a line {"en": ..., "ar": ...} for each pair (`jq -c ".[]"` makes it of a JSON array)'


@dataclass(frozen=True)
class Checked:
    """A pair and its flags. `id` is its own, or None; `line` counts from 1."""

    line: int
    id: str | None
    flags: tuple[Flag, ...]

    def to_json(self) -> str:
        """One line of JSON, Arabic as itself."""
        flags = [flag.model_dump(mode="json") for flag in self.flags]
        row = {"line": self.line, "id": self.id, "flagged": bool(flags), "flags": flags}
        return json.dumps(row, ensure_ascii=False)


@dataclass(frozen=True)
class _Read:
    line: int
    id: str | None
    segments: Segments
    flags: tuple[Flag, ...]  # of the structure


def check_file(path: Path, limit: int | None = None) -> list[Checked]:
    """Check all pairs of a file, or the first `limit`. The file is held in memory.

    Raises:
        BimedixError: there is no such file, no pair, or a line that is not a pair.
    """
    found = list(_read(path, limit))
    if not found:
        raise BimedixError(f"{path} has no pair; write a line of JSON with the fields en and ar for each")
    batch = Batch(pair for row in found for _, pair in row.segments.texts)
    corpus = Corpus([row.segments for row in found])
    unrelated = corpus.unrelated()
    checked = []
    for row in found:
        flags = [*row.flags, *check_segments(row.segments, batch, corpus)]
        for place, pair in row.segments.texts:
            if pair in unrelated and not any(flag.name == "unrelated" and flag.place == place for flag in flags):
                detail = "its words do not go with those of the source, as they do in the other pairs"
                flags.append(Flag(name="unrelated", detail=detail, place=place))
        checked.append(Checked(row.line, row.id, tuple(dict.fromkeys(flags))))
    return checked


def is_checked(path: Path) -> bool:
    """Whether a file is what `Checked.to_json` writes, so that it may be replaced."""
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    return not first or first.startswith(b'{"line": 1, "id": ') or b'"flagged": ' in first


def summary(checked: list[Checked]) -> dict[str, Any]:
    """`n` pairs, how many are `flagged`, and how many raise each of `flags`."""
    names = Counter(name for row in checked for name in {flag.name for flag in row.flags})
    return {
        "n": len(checked),
        "flagged": sum(bool(row.flags) for row in checked),
        "flags": {name: names[name] for name in FLAG_NAMES if names[name]},
    }


def _read(path: Path, limit: int | None) -> Iterator[_Read]:
    if not path.is_file():
        raise BimedixError(f"there is no file {path}; name a JSONL file with the fields en and ar")
    ending = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if ending in _OTHER_FORMATS:
        raise BimedixError(f"{path} is {_OTHER_FORMATS[ending]}; {_NEEDED}")
    count = 0
    for number, line in enumerate(files.text_lines(path), start=1):
        if not line.strip():
            continue
        if limit is not None and count >= limit:
            return
        count += 1
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "en" not in row or "ar" not in row:
                raise ValueError(f"a pair has the fields en and ar, but the line is {_kind(row)}")
            name = row.get("id")
            segments, flags = _segments(row["en"], row["ar"])
        except ValidationError as error:
            raise BimedixError(f"{where}: {explain(error)}; correct the line or remove it") from error
        except json.JSONDecodeError as error:
            if line.strip() in (b"[", b"{") or line.lstrip().startswith(b"[{"):
                raise BimedixError(f"{path} is one JSON document over several lines; {_NEEDED}") from error
            remedy = _NEEDED if number == 1 else "correct the line or remove it"
            raise BimedixError(f"{where} is not JSON ({error.msg}); {remedy}") from error
        except (ValueError, RecursionError) as error:
            raise BimedixError(f"{where}: {error}; correct the line or remove it") from error
        yield _Read(number, None if name is None else str(name), segments, tuple(flags))


def _kind(row: Any) -> str:
    """What a line holds instead of a pair."""
    if isinstance(row, list):
        return f"a JSON array; {_NEEDED}"
    return f"an object with {', '.join(map(repr, row)) or 'no fields'}" if isinstance(row, dict) else "no object"


def _segments(source: Any, translation: Any) -> tuple[Segments, list[Flag]]:
    """The segments of a pair, and flags of its structure."""
    if isinstance(source, dict) and "conversations" in source:
        if not isinstance(translation, dict) or "conversations" not in translation:
            raise ValueError("en has conversations, and ar has not")
        one, other = Record.model_validate(source), Record.model_validate(translation)
        return of_records(one, other), structure.check_record(one, other)
    segments, flags = of_objects(source, translation), []
    own, given = counts(source, translation)
    if own != given:
        flags.append(Flag(name="options", detail=f"{own} choices became {given}"))
    keys = [side.get("answer") for side in (source, translation)] if isinstance(source, dict) else [None, None]
    if all(_is_key(key) for key in keys) and keys[0] != keys[1]:
        flags.append(Flag(name="answer_key", detail=f"{keys[0]} in the source, {keys[1]} in the translation"))
    return segments, flags


def _is_key(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and len(key) == 1 and key in LETTERS)
