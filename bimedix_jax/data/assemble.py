"""Several sources into one training set and one held-out set that share nothing, with everything left out on record.

The folder holds `train.jsonl`, `heldout.jsonl`, `quarantine.jsonl` (one line for each row that was left out: source,
file, line, reason, detail) and `report.json`.
"""

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bimedix_jax.data import records as record_files
from bimedix_jax.data.disjoint import Identities, assert_disjoint
from bimedix_jax.data.quarantine import Quarantine
from bimedix_jax.data.readers import read
from bimedix_jax.data.records import Record

TRAIN, HELDOUT, QUARANTINE, REPORT = "train.jsonl", "heldout.jsonl", "quarantine.jsonl", "report.json"

DUPLICATE_ID = "another record has the same id"
DUPLICATE_TEXT = "another record has the same text"
IN_EVALUATION = "the evaluation set has the same record or question"


def assemble(
    sources: Sequence[str],
    folder: Path,
    evaluation: Sequence[str] = (),
    seed: int = 0,
    heldout_fraction: float = 0.02,
    limit: int | None = None,
) -> dict[str, Any]:
    """Write the records of `sources` (see readers.read) into an existing folder; return the report.

    A record without a split gets one by the hash of its id, or of what its source groups records by. Training records
    that also are in the held-out set, or in one of the `evaluation` sources, are left out of training. `limit` bounds
    the records taken of each source.

    Raises:
        BimedixError: a source cannot be read; or, after all this, training and evaluation still overlap.
    """
    quarantine = Quarantine()
    known = Identities(_heldout(evaluation))
    everything = itertools.chain.from_iterable(itertools.islice(read(source, quarantine), limit) for source in sources)
    counts: Counter[tuple[str, str]] = Counter()
    candidates = folder / "candidates.jsonl"
    with candidates.open("w", encoding="utf-8") as train, (folder / HELDOUT).open("w", encoding="utf-8") as heldout:
        for record in _distinct((_with_split(record, seed, heldout_fraction) for record in everything), quarantine):
            if record.split == "heldout":
                known.add(record)
                counts[record.source, "heldout"] += 1
            (train if record.split == "train" else heldout).write(record.to_json() + "\n")

    def kept() -> Iterator[Record]:
        for record in record_files.read_jsonl(candidates):
            overlap = known.find(record)
            if overlap is None:
                counts[record.source, "train"] += 1
                yield record
            else:
                quarantine.leave_out(record, IN_EVALUATION, f"{overlap.evaluation}, by {overlap.by}")

    record_files.write_jsonl(folder / TRAIN, kept())
    candidates.unlink()
    heldout_and_evaluation = itertools.chain(record_files.read_jsonl(folder / HELDOUT), _heldout(evaluation))
    assert_disjoint(record_files.read_jsonl(folder / TRAIN), heldout_and_evaluation)
    with (folder / QUARANTINE).open("w", encoding="utf-8") as file:
        for row in quarantine.rejected:
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")
    report = _report(sources, evaluation, seed, heldout_fraction, limit, counts, quarantine)
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return report


def _heldout(evaluation: Sequence[str]) -> Iterator[Record]:
    """Evaluation records of the named sources; what such a source itself marks for training is not among them."""
    for source in evaluation:
        yield from (record for record in read(source, Quarantine()) if record.split != "train")


def _distinct(everything: Iterable[Record], quarantine: Quarantine) -> Iterator[Record]:
    """Records whose id is new, and whose text is new within their split."""
    ids: set[bytes] = set()
    texts: dict[bytes, str] = {}
    for record in everything:
        name = hashlib.blake2b(record.id.encode(), digest_size=16).digest()
        said = f"{record.split}\0" + "\0".join(f"{turn.speaker}\0{turn.value}" for turn in record.conversations)
        text = hashlib.blake2b(said.encode(), digest_size=16).digest()
        if name in ids:
            quarantine.leave_out(record, DUPLICATE_ID, record.id)
        elif text in texts:
            quarantine.leave_out(record, DUPLICATE_TEXT, texts[text])
        else:
            ids.add(name)
            texts[text] = record.id
            yield record


def _with_split(record: Record, seed: int, heldout_fraction: float) -> Record:
    if record.split is not None:
        return record
    key = str(record.provenance.get("group", record.id))
    return record.model_copy(update={"split": record_files.assign_split(key, seed, heldout_fraction)})


def _report(
    sources: Sequence[str],
    evaluation: Sequence[str],
    seed: int,
    heldout_fraction: float,
    limit: int | None,
    counts: Counter[tuple[str, str]],
    quarantine: Quarantine,
) -> dict[str, Any]:
    reasons = [
        {"source": source, "reason": reason, "rows": n} for (source, reason), n in quarantine.reasons().most_common()
    ]
    splits = {
        source: {split: counts[source, split] for split in ("train", "heldout")}
        for source in sorted({source for source, _ in counts})
    }
    return {
        "sources": list(sources),
        "evaluation": list(evaluation),
        "seed": seed,
        "heldout_fraction": heldout_fraction,
        "limit": limit,
        "read": dict(quarantine.read),
        "records": splits,
        "train": sum(row["train"] for row in splits.values()),
        "heldout": sum(row["heldout"] for row in splits.values()),
        "quarantined": len(quarantine.rejected),
        "reasons": reasons,
    }
