"""Several sources into one training set and one held-out set that share nothing, with everything left out on record.

Reading is `shard.write_shard`, in one go or in shards; merging is here and is what concerns all records together: ids
and texts that occur twice, training records that are held out or belong to an evaluation set, counts. The folder holds
`train.jsonl`, `heldout.jsonl`, `quarantine.jsonl` (one line for each row that was left out: source, file, line, reason,
detail) and `report.json`. Near-duplicates, ratios and packing are the next commands' work, on `train.jsonl`.
"""

import dataclasses
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bimedix_jax import __version__, files
from bimedix_jax.curation.assembly import shard as shards
from bimedix_jax.curation.assembly.disjoint import Identities, assert_disjoint
from bimedix_jax.curation.assembly.recipe import Part, Plan, describe
from bimedix_jax.curation.assembly.seen import Seen, seen
from bimedix_jax.curation.assembly.shard import Entry
from bimedix_jax.curation.quarantine import Quarantine, Rejected, left_out
from bimedix_jax.data import records as record_files
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

TRAIN, HELDOUT, QUARANTINE, REPORT = "train.jsonl", "heldout.jsonl", "quarantine.jsonl", "report.json"

DUPLICATE_ID = "another record has the same id"
DUPLICATE_TEXT = "another record has the same text"
IN_EVALUATION = "the evaluation set has the same record or question"


def assemble(plan: Plan, folder: Path, allow_counts: bool = False) -> dict[str, Any]:
    """Read a plan and write its sets into an existing folder; return the report.

    A record without a split gets one by the hash of its id, or of what its source groups records by. Training records
    that also are in the held-out set, or in one of the evaluation sets, are left out of training.

    Raises:
        BimedixError: a source cannot be read or is not what the plan says; or, after all this, training and evaluation
            still overlap.
    """
    part = folder / "shard"
    part.mkdir()
    shards.write_shard(plan, part)
    report = merge(plan, [part], folder, allow_counts)
    for path in part.iterdir():
        path.unlink()
    part.rmdir()
    return report


def merge(plan: Plan, folders: Sequence[Path], folder: Path, allow_counts: bool = False) -> dict[str, Any]:
    """Make of all shards of a plan what `assemble` makes of it in one go; return the report.

    Raises:
        BimedixError: as `assemble`; or the shards are not all of this plan, of this version and of the same revisions.
    """
    counts = _counts(plan, folders)
    wrong = _unexpected(plan.parts, counts) if plan.limit is None else []
    _refuse(wrong, allow_counts)
    evaluation_counts: list[dict[str, Any]] = []
    known = Identities(_evaluation(plan, evaluation_counts))
    if plan.limit is None:
        unmet = _unexpected(plan.evaluation, evaluation_counts)
        _refuse(unmet, allow_counts)
        wrong += unmet
    kept: Counter[tuple[str, str]] = Counter()
    with (folder / QUARANTINE).open("w", encoding="utf-8") as file:

        def note(row: Rejected) -> None:
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")

        quarantine = Quarantine(sink=note)
        for _, row in heapq.merge(
            *(shards.rejected(path / shards.QUARANTINE) for path in folders), key=lambda item: item[0]
        ):
            quarantine.note(row)
        _separate(folders, folder, known, quarantine, kept)
        _filter(folder, known, quarantine, kept)
    heldout_and_evaluation = itertools.chain(record_files.read_jsonl(folder / HELDOUT), _evaluation(plan, []))
    assert_disjoint(record_files.read_jsonl(folder / TRAIN), heldout_and_evaluation)
    report = _report(plan, counts, evaluation_counts, wrong, kept, quarantine)
    report["sha256"] = {name: files.sha256(folder / name) for name in (TRAIN, HELDOUT)}
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return report


def shard_folders(parent: Path, plan: Plan) -> list[Path]:
    """All shards of a plan in a folder, in order.

    Raises:
        BimedixError: some are missing, belong to another plan or version, or to shardings of different sizes.
    """
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(parent.glob(f"*/{shards.MANIFEST}")):
        if path.parent.name.startswith("."):
            continue  # half-written: files.new_folder renames it when it is complete
        manifest = _manifest(path)
        if manifest["plan"] != plan.digest():
            raise BimedixError(
                f"{path.parent} was made by another recipe or with other options; name the same ones with --merge as "
                "with --shard, or delete the folder"
            )
        found[manifest["shard"][0], manifest["shard"][1]] = path.parent
    sizes = {size for _, size in found}
    if len(sizes) > 1:
        raise BimedixError(
            f"{parent} holds shards of {' and of '.join(map(str, sorted(sizes)))}; delete those of one kind"
        )
    if not found:
        raise BimedixError(
            f"there is no shard in {parent}; make them first: the same command with --shard 0/N and so on"
        )
    (size,) = sizes
    missing = [f"{number}/{size}" for number in range(size) if (number, size) not in found]
    if missing:
        raise BimedixError(f"{parent} lacks shards {', '.join(missing[:8])}; make them with --shard {missing[0]}")
    return [found[number, size] for number in range(size)]


def _manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads(path.read_text("utf-8"))
    if manifest.get("format") != shards.FORMAT or manifest.get("version") != __version__:
        raise BimedixError(
            f"{path.parent} was made by bimedix_jax {manifest.get('version')}, this is {__version__}; make it again"
        )
    return manifest


def _counts(plan: Plan, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """For each source of the plan: its revision, and counts summed over the shards."""
    manifests = [_manifest(path / shards.MANIFEST) for path in folders]
    totals = []
    for number, part in enumerate(plan.parts):
        sources = [manifest["sources"][number] for manifest in manifests]
        revisions = sorted({str(source["revision"]) for source in sources})
        if len(revisions) > 1:
            raise BimedixError(
                f"shards read {part.name} at different revisions ({', '.join(revisions)}); name a commit in the recipe "
                "and make them again"
            )
        read, made = (sum((Counter(source[name]) for source in sources), Counter()) for name in ("read", "records"))
        totals.append(
            {
                "revision": sources[0]["revision"],
                "read": dict(sorted(read.items())),
                "records": dict(sorted(made.items())),
                "rejected": sum(source["rejected"] for source in sources),
            }
        )
    return totals


def _unexpected(parts: Sequence[Part], counts: list[dict[str, Any]]) -> list[str]:
    pairs = zip(parts, counts, strict=True)
    return [sentence for part, count in pairs for sentence in shards.unexpected(part, count)]


def _refuse(wrong: list[str], allowed: bool) -> None:
    if wrong and not allowed:
        raise BimedixError(
            f"{'; '.join(wrong)}: a source is not what the recipe was written for; fetch it again at its revision, "
            "correct the recipe, or pass --allow-counts"
        )


def _evaluation(plan: Plan, counts: list[dict[str, Any]]) -> Iterator[Record]:
    """Evaluation records; what a source itself marks for training is not among them. Counts are appended."""
    for part in plan.evaluation:
        quarantine = Quarantine()
        made: Counter[str] = Counter()
        for record in shards.read_part(part, quarantine):
            made[record.source] += 1
            if record.split != "train":
                yield record
        counts.append({"read": dict(quarantine.read), "records": dict(made), "rejected": quarantine.count})


def _separate(
    folders: Sequence[Path], folder: Path, known: Identities, quarantine: Quarantine, kept: Counter[tuple[str, str]]
) -> None:
    """Held-out records into their file and into `known`, the others into a file of candidates, all without copies."""
    merged = heapq.merge(*(shards.entries(path / shards.RECORDS) for path in folders), key=lambda entry: entry.place)
    with (
        seen(folder / "ids.sqlite") as ids,
        seen(folder / "texts.sqlite") as texts,
        (folder / "candidates").open("wb") as train,
        (folder / HELDOUT).open("wb") as heldout,
    ):
        for entry in tqdm(merged, desc="duplicates", unit=" records", disable=None):
            twin = _twin(entry, ids, texts)
            if twin is not None:
                quarantine.note(twin)
            elif entry.split == "heldout":
                known.add_keys(entry.id, entry.keys)
                kept[entry.source, "heldout"] += 1
                heldout.write(entry.line + b"\n")
            else:
                train.write(entry.to_bytes())


def _twin(entry: Entry, ids: Seen, texts: Seen) -> Rejected | None:
    """The rejection of an entry whose id is not new, or whose text is not new within its split."""
    if ids.owner(entry.id.encode()) is not None:
        return left_out(entry.source, entry.id, DUPLICATE_ID, entry.id)
    first = texts.claim(entry.text, entry.id)
    if first is not None:
        return left_out(entry.source, entry.id, DUPLICATE_TEXT, first)
    ids.claim(entry.id.encode(), "")
    return None


def _filter(folder: Path, known: Identities, quarantine: Quarantine, kept: Counter[tuple[str, str]]) -> None:
    """Candidates that no held-out or evaluation record shares anything with, into the training file."""
    candidates = folder / "candidates"
    with (folder / TRAIN).open("wb") as train:
        for entry in tqdm(shards.entries(candidates), desc="evaluation", unit=" records", disable=None):
            overlap = known.find_keys(entry.id, entry.keys)
            if overlap is None:
                kept[entry.source, "train"] += 1
                train.write(entry.line + b"\n")
            else:
                detail = f"{overlap.evaluation}, by {overlap.by}"
                quarantine.note(left_out(entry.source, entry.id, IN_EVALUATION, detail))
    candidates.unlink()


def _report(
    plan: Plan,
    counts: list[dict[str, Any]],
    evaluation_counts: list[dict[str, Any]],
    wrong: list[str],
    kept: Counter[tuple[str, str]],
    quarantine: Quarantine,
) -> dict[str, Any]:
    reasons = sorted(quarantine.reasons().items(), key=lambda item: (-item[1], item[0]))
    splits = {
        source: {split: kept[source, split] for split in ("train", "heldout")}
        for source in sorted({source for source, _ in kept})
    }
    sources = [{**describe(part), **count} for part, count in zip(plan.parts, counts, strict=True)]
    others = [{**describe(part), **count} for part, count in zip(plan.evaluation, evaluation_counts, strict=True)]
    read: Counter[str] = sum((Counter(count["read"]) for count in counts), Counter())
    return {
        "recipe": plan.recipe,
        "left_out": list(plan.left_out),
        "sources": sources,
        "evaluation": others,
        "seed": plan.seed,
        "heldout_fraction": plan.heldout_fraction,
        "limit": plan.limit,
        "unexpected": wrong,
        "read": dict(sorted(read.items())),
        "records": splits,
        "train": sum(row["train"] for row in splits.values()),
        "heldout": sum(row["heldout"] for row in splits.values()),
        "quarantined": quarantine.count,
        "reasons": [{"source": source, "reason": reason, "rows": n} for (source, reason), n in reasons],
    }
