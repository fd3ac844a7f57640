"""Which results of `bimedix eval run` can be compared: those of one model, limit and protocol."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

log = logging.getLogger(__name__)

HARNESS = "bimedix eval run, protocol 1"
"""What computes the scores of questions. Its number changes when a change of the code may change a score."""

LABELS = {
    "model": "model",
    "revision": "revision",
    "weights": "hash of the model's weights",
    "limit": "limit",
    "harness": "program",
    "template": "chat template",
    "max_length": "maximum length",
    "tokenizer": "tokenizer",
}
"""What must be equal, besides the records: key of a result -> description."""
NESTED = (
    ("hashes", "prompt", "hash of the prompts"),
    ("versions", "bimedix_jax", "version of bimedix_jax"),
    ("versions", "jax", "version of JAX"),
)
"""What must be equal, too: part of a result, key in it, description."""
EXPLAINED = {"base": "base", "dtype": "dtype", "router": "router"}
"""What may differ, with a warning, because the change in the tables includes its effect."""


def digest(records: Iterable[Record]) -> str:
    """SHA-256 of records."""
    found = hashlib.sha256()
    for record in records:
        found.update(record.model_dump_json(by_alias=True).encode() + b"\n")
    return found.hexdigest()


def located(model: Any) -> Any:
    """A model's folder as an absolute path, so that two ways to write it are equal; a hub id is unchanged."""
    return str(Path(model).expanduser().resolve()) if isinstance(model, str) and Path(model).exists() else model


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Descriptions of everything that both results record and that must be equal, but differs."""
    found = []
    for key, label in LABELS.items():
        if key in before and key in now and located(before[key]) != located(now[key]):
            found.append(f"the {label} is {shown(before[key])} there and {shown(now[key])} here")
    for part, key, label in NESTED:
        values = [(result.get(part) or {}).get(key) for result in (before, now)]
        if None not in values and values[0] != values[1]:
            found.append(f"the {label} is {shown(values[0])} there and {shown(values[1])} here")
    for name, value in records_of(before).items():
        if records_of(now).get(name, value) != value:
            found.append(f"the records of {name} differ")
    return found


def shown(value: Any) -> str:
    """A value for a message; a hash by its beginning."""
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def records_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Digest of the records of each part of a result."""
    found = result.get("records")
    return found if isinstance(found, dict) else {}


def parts_of(result: Mapping[str, Any]) -> set[str]:
    """The parts of a result that a table can compare: heldout, and each task."""
    tasks = result.get("tasks")
    return {name for name in ("heldout", "choice", "open") if name in result} | set(
        tasks if isinstance(tasks, dict) else ()
    )


def check(before: Mapping[str, Any], now: Mapping[str, Any], parts: set[str], source: Path, force: bool) -> None:
    """Refuses to compare with the result `before`, which the file `source` contains, unless `force`.

    Args:
      now: what is known of the new result, `parts` the parts that it will have.
    Raises:
      BimedixError: it is of another model, limit or protocol, or has no part in common with the new result.
    """
    found = differing(before, now)
    if not parts & parts_of(before):
        found.append("it has none of the records and tasks of this run")
    if found and not force:
        raise BimedixError(
            f"{source} cannot be compared with this run: {'; '.join(found)}. Evaluate again in the same way, or pass "
            "--force to compare anyway."
        )
    if found:
        log.warning("%s is compared although it differs: %s.", source, "; ".join(found))


def check_weights(before: Mapping[str, Any], now: Mapping[str, Any], source: Path, force: bool) -> None:
    """Like `check`, for the weights, prompts, program and versions, which are known later. Warns of differences whose
    effect is included in the change, and of what an older result does not record."""
    known = {key: now[key] for key in ("weights", "harness", "hashes", "versions") if key in now}
    check(before, known, parts_of(before), source, force)
    changes = [
        f"{label} {before[key]} there and {now[key]} here"
        for key, label in EXPLAINED.items()
        if before.get(key) is not None and before[key] != now[key]
    ]
    if changes:
        log.warning(
            "%s has another storage or router (%s), which accounts for a part of the change.",
            source,
            "; ".join(changes),
        )
    missing = [label for key, label in {**LABELS, "records": "records"}.items() if key not in before]
    if missing:
        log.warning("%s does not record its %s, so these were not compared.", source, ", ".join(missing))
