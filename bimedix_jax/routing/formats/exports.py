"""A recording of routes in the formats of other programs."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bimedix_jax import files
from bimedix_jax.data.roles import ROLES
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.formats.counts import COLUMNS
from bimedix_jax.routing.formats.jsonl import write_line
from bimedix_jax.routing.parts import TEXTS, UNKNOWN_ROLE
from bimedix_jax.routing.recording import Recording

Format = Literal["jsonl", "olmoe", "counts", "vllm"]
DIGITS = {"float16": 5, "float32": 9}
"""Significant digits of numbers in text, from which the same number is read."""
KEYS = {
    "jsonl": {"id", "input_ids", "experts"},
    "olmoe": {"input_ids", "exp_ids"},
    "vllm": {"id", "prompt_token_ids", "choices"},
}
"""Keys of a line of each format."""
GZIP = b"\x1f\x8b"
"""First bytes of a compressed file."""


def export_routes(recording: Recording, form: Format, out: Path) -> int:
    """Writes a file of a format and returns the number of its lines, without the header of counts.

    Raises:
      BimedixError: the format needs what the recording does not have.
    """
    if recording.manifest.kind == "counts" and form != "counts":
        raise BimedixError(
            f"{recording.folder} has counts only, and {form} needs the routes of single tokens; export --format counts"
        )
    with files.new_file(out) as partial:
        if form == "counts":
            return _write_counts(recording, partial, compressed=out.suffix == ".gz")
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            return sum(1 for line in map(LINES[form], _records(recording, form)) if write_line(file, line) is None)


def is_export(path: Path) -> bool:
    """Whether a file begins as one of the formats that `export_routes` writes."""
    try:
        with path.open("rb") as binary:
            packed = binary.read(2) == GZIP
        with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as file:
            first = file.readline()
        if first.rstrip("\n") == ",".join(COLUMNS):
            return True
        found = json.loads(first)
    except (OSError, EOFError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and any(keys <= set(found) for keys in KEYS.values())


def _records(recording: Recording, form: str) -> Iterator[dict[str, Any]]:
    """Each record: the row of its table, and the columns of its tokens."""
    known = recording.manifest.columns
    wanted = ("weights", "nll", "shuffled_nll") if form == "jsonl" else ()
    columns = ["record", "id", "role", "experts", *(name for name in wanted if name in known)]
    paths = [layer.path for layer in recording.manifest.layers]
    table = recording.records
    for part in recording.parts(*columns):
        numbers, starts = np.unique(part["record"], return_index=True)
        for number, start, end in zip(numbers, starts, [*starts[1:], len(part["record"])], strict=True):
            values = {f"{name}_N": part[name][start:end] for name in columns}
            if (values["id_N"] < 0).any():
                raise BimedixError(
                    f"{recording.folder} does not have the token ids of record {table['id'][number]!r}, which {form} "
                    "needs; record the routes with `bimedix routes record`"
                )
            if (values["experts_N"] < 0).any() and form != "jsonl":
                raise BimedixError(f"{recording.folder} has slots without an expert, which {form} cannot express")
            row = {name: table[name][number] for name in table}
            yield {**row, **values, "layers": None if None in paths else paths}


def _jsonl(record: Mapping[str, Any]) -> dict[str, Any]:
    experts_LNK, roles_N = record["experts_N"].swapaxes(0, 1), record["role_N"]
    if (experts_LNK < 0).any():
        raise BimedixError("the recording has slots without an expert, which jsonl cannot express")
    roles = None if (roles_N == UNKNOWN_ROLE).all() else [None if x == UNKNOWN_ROLE else ROLES[x] for x in roles_N]
    weights_NLK = record.get("weights_N")
    return {
        **{name: record[name] for name in ("id", *TEXTS)},
        "labels": record["labels"] or None,
        "layers": record["layers"],
        "token_hash": record["token_hash"],
        "input_ids": record["id_N"].tolist(),
        "experts": experts_LNK.tolist(),
        "weights": None if weights_NLK is None else rounded(weights_NLK.swapaxes(0, 1)),
        "nll": rounded(record.get("nll_N")),
        "shuffled_nll": rounded(record.get("shuffled_nll_N")),
        "roles": roles,
    }


def rounded(values: np.ndarray | None) -> Any:
    """Nested lists of numbers, None for NaN."""
    if values is None:
        return None
    digits = DIGITS[values.dtype.name]
    flat = [None if np.isnan(x) else float(f"{x:.{digits}g}") for x in values.reshape(-1).tolist()]
    return np.array(flat, object).reshape(values.shape).tolist()


def _olmoe(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"input_ids": record["id_N"].tolist(), "exp_ids": record["experts_N"].swapaxes(1, 2).tolist()}


def _vllm(record: Mapping[str, Any]) -> dict[str, Any]:
    ids_N, answer_N = record["id_N"], record["role_N"] == ROLES.index("answer")
    cut = int(answer_N.argmax()) if answer_N.any() else len(ids_N)
    choice = {"index": 0, "token_ids": ids_N[cut:].tolist(), "routed_experts": record["experts_N"].tolist()}
    return {"id": record["id"], "prompt_token_ids": ids_N[:cut].tolist(), "choices": [choice]}


LINES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"jsonl": _jsonl, "olmoe": _olmoe, "vllm": _vllm}


def _write_counts(recording: Recording, path: Path, compressed: bool) -> int:
    with path.open("wb") as raw:
        # without name and time in the header, so that the bytes depend on the counts only
        binary: Any = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if compressed else raw
        with io.TextIOWrapper(binary, encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            lines = 0
            for row in _count_rows(recording):
                writer.writerow(row)
                lines += 1
    return lines


def _count_rows(recording: Recording) -> Iterator[list[Any]]:
    """Rows of counts by source (or, without any, language), which stand for the domains."""
    labels, numbers = recording.records["labels"], recording.layer_numbers
    if recording.manifest.kind == "counts":
        columns = [values.tolist() for values in recording.counts().values()]
        for record, layer, expert, token, count in zip(*columns, strict=True):
            own = labels[record]
            yield [own.get("model", ""), own.get("domain", ""), numbers[layer], expert, token, count]
        return
    texts = recording.records
    domains = [s or language or "" for s, language in zip(texts["source"], texts["language"], strict=True)]
    names, domain_R = np.unique(domains, return_inverse=True)
    model = str(recording.manifest.options.get("model", "model"))
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in range(len(numbers))}
    for part in recording.parts("record", "id", "experts"):
        for layer in found:
            experts_NK = part["experts"][:, layer]
            domain_NK = np.broadcast_to(domain_R[part["record"]][:, None], experts_NK.shape)
            id_NK = np.broadcast_to(part["id"][:, None], experts_NK.shape)
            rows = np.stack([domain_NK, experts_NK, id_NK], axis=-1).reshape(-1, 3)
            rows = rows[rows[:, 1] >= 0]
            found[layer].append(np.column_stack(np.unique(rows, axis=0, return_counts=True)))
    for layer, parts in found.items():
        rows, where = np.unique(np.concatenate(parts)[:, :3], axis=0, return_inverse=True)
        totals = np.bincount(where.ravel(), np.concatenate(parts)[:, 3]).astype(np.int64)
        for (domain, expert, token), count in zip(rows.tolist(), totals.tolist(), strict=True):
            yield [model, names[domain], numbers[layer], expert, token, count]
