"""Several data sets into one training set and one held-out set that share no record, in one pass and one process.

The output folder holds `train.jsonl`, `heldout.jsonl`, `quarantine.jsonl` (one line for each row that was left out:
source, file, line, reason, detail) and `report.json`. Near-duplicates and language ratios are handled later, by
`bimedix data mix`, and packing by `bimedix data pack`.

Records are written to disk as they are read. What stays in memory is the id and a digest of the text of each record,
about 400 bytes. docs/results/data_throughput.md has the time and memory that 1.3 million records take.
"""

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bimedix_jax import files
from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.curation.assembly import disjoint
from bimedix_jax.curation.assembly.disjoint import Identities, assert_disjoint
from bimedix_jax.curation.assembly.recipe import ResolvedRecipe, ResolvedSource, describe
from bimedix_jax.curation.assembly.sources import pinned, read_source, unexpected
from bimedix_jax.curation.quarantine import Quarantine, Rejected, left_out
from bimedix_jax.curation.readers.hub import HubSet
from bimedix_jax.data import records as record_files
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

TRAIN, HELDOUT, QUARANTINE, REPORT = "train.jsonl", "heldout.jsonl", "quarantine.jsonl", "report.json"

DUPLICATE_ID = "another record has the same id"
DUPLICATE_TEXT = "another record has the same text"
IN_EVALUATION = "the evaluation set has the same record or question"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A training record that may still overlap a held-out or an evaluation record.

    Attributes:
      number: of its source in the recipe.
      keys: as disjoint.keys gives them.
      line: the record as a line of JSON.
    """

    number: int
    source: str
    id: str
    keys: tuple[tuple[str, bytes], ...]
    line: bytes

    def to_bytes(self) -> bytes:
        """One line."""
        keys = [[by, key.hex()] for by, key in self.keys]
        return json.dumps([self.number, self.source, self.id, keys]).encode() + b"\t" + self.line + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> "Candidate":
        """The inverse of `to_bytes`."""
        head, _, line = data.rstrip(b"\n").partition(b"\t")
        number, source, name, pairs = json.loads(head)
        keys = tuple((by, bytes.fromhex(key)) for by, key in pairs)
        return cls(number=number, source=source, id=name, keys=keys, line=line)


def assemble(recipe: ResolvedRecipe, folder: Path, allow_counts: bool = False) -> dict[str, Any]:
    """Read all sources of a recipe and write the two sets into an existing folder; return the report.

    A record without a split gets one by the hash of its id, or of the group that its source puts it in. Of records with
    one id or one text, the first is kept; records that a source itself holds out, as a benchmark does, may have equal
    texts. A training record is left out if a held-out or an evaluation record has the same id, PubMed id or question.

    Raises:
        BimedixError: a source cannot be read or differs from what the recipe states; or training and evaluation
            overlap after all this.
    """
    evaluation_counts: list[dict[str, Any]] = []
    known = Identities(_evaluation(recipe, evaluation_counts))
    wrong_evaluation = _check_counts(recipe, recipe.evaluation, evaluation_counts, allow_counts)
    kept: Counter[tuple[str, str]] = Counter()
    with (folder / QUARANTINE).open("w", encoding="utf-8") as file:

        def write(row: Rejected) -> None:
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")

        quarantine = Quarantine(sink=write)
        counts, accounts = _separate(recipe, folder, known, quarantine, kept)
        wrong = _check_counts(recipe, recipe.sources, counts, allow_counts) + wrong_evaluation
        _filter(folder, known, quarantine, kept, accounts)
    counts = [{**count, **account.to_dict()} for count, account in zip(counts, accounts, strict=True)]
    heldout_and_evaluation = itertools.chain(record_files.read_jsonl(folder / HELDOUT), _evaluation(recipe, []))
    assert_disjoint(record_files.read_jsonl(folder / TRAIN), heldout_and_evaluation)
    report = _report(recipe, counts, evaluation_counts, wrong, kept, quarantine)
    report["sha256"] = {name: files.sha256(folder / name) for name in (TRAIN, HELDOUT)}
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return report


def _check_counts(
    recipe: ResolvedRecipe, sources: Sequence[ResolvedSource], counts: list[dict[str, Any]], allowed: bool
) -> list[str]:
    """Sentences about counts that differ from the recipe; raises unless `allowed`. A limit switches the check off."""
    if recipe.limit is not None:
        return []
    wrong = [sentence for source, count in zip(sources, counts, strict=True) for sentence in unexpected(source, count)]
    if wrong and not allowed:
        raise BimedixError(
            f"{'; '.join(wrong)}: the recipe was written for another state of this data; fetch it again at the "
            "recipe's revision, correct the recipe, or pass --allow-counts"
        )
    return wrong


def _evaluation(recipe: ResolvedRecipe, counts: list[dict[str, Any]]) -> Iterator[Record]:
    """Evaluation records, without those that their source marks for training. Appends the counts of each source."""
    for source in recipe.evaluation:
        quarantine = Quarantine()
        made: Counter[str] = Counter()
        for record in read_source(source, pinned(source), quarantine):
            made[record.source] += 1
            if record.split != "train":
                yield record
        found = {"read": dict(quarantine.read), "records": dict(made), "rejected": quarantine.count}
        counts.append({**found, **quarantine.account.to_dict()})


def _separate(
    recipe: ResolvedRecipe, folder: Path, known: Identities, quarantine: Quarantine, kept: Counter[tuple[str, str]]
) -> tuple[list[dict[str, Any]], list[SourceAccount]]:
    """Write held-out records to their file and the others to a file of candidates, without duplicates.

    Held-out records are added to `known`. Returns the revision and the counts of each source, and its account.
    """
    ids: set[str] = set()
    texts: dict[bytes, str] = {}  # digest -> id of the first record with that text
    duplicates: list[Rejected] = []
    counts, accounts = [], []
    with (folder / "candidates").open("wb") as train, (folder / HELDOUT).open("wb") as heldout:
        for number, source in enumerate(recipe.sources):
            place = pinned(source)
            rows = Quarantine(limit=recipe.limit, sink=quarantine.note)
            made: Counter[str] = Counter()
            for unsplit in read_source(source, place, rows):
                made[unsplit.source] += 1
                record = _with_split(unsplit, recipe.seed, recipe.heldout_fraction)
                duplicate = _duplicate(record, ids, texts, benchmark=unsplit.split == "heldout")
                if duplicate is not None:
                    duplicates.append(duplicate)
                    rows.account.removed += 1
                    continue
                keys, line = tuple(disjoint.keys(record)), record.to_json().encode()
                if record.split == "heldout":
                    known.add_keys(record.id, keys)
                    kept[record.source, "heldout"] += 1
                    heldout.write(line + b"\n")
                else:
                    candidate = Candidate(number=number, source=record.source, id=record.id, keys=keys, line=line)
                    train.write(candidate.to_bytes())
            revision = place.revision if isinstance(place, HubSet) else None
            read, records = (dict(sorted(counter.items())) for counter in (rows.read, made))
            counts.append({"revision": revision, "read": read, "records": records, "rejected": rows.count})
            accounts.append(rows.account)
    for duplicate in duplicates:  # after the rows that could not be read, in quarantine.jsonl
        quarantine.note(duplicate)
    return counts, accounts


def _with_split(record: Record, seed: int, heldout_fraction: float) -> Record:
    """A record without a split gets one by the hash of its id, or of the group that its source puts it in."""
    if record.split is not None:
        return record
    key = str(record.provenance.get("group", record.id))
    return record.model_copy(update={"split": record_files.assign_split(key, seed, heldout_fraction)})


def _duplicate(record: Record, ids: set[str], texts: dict[bytes, str], benchmark: bool) -> Rejected | None:
    """The rejection of a record whose id is not new, or whose text is not new within its split.

    Records that their source holds out are a benchmark, whose size is known: equal texts stay.
    """
    if record.id in ids:
        return left_out(record.source, record.id, DUPLICATE_ID, record.id)
    if not benchmark:
        said = f"{record.split}\0" + "\0".join(f"{turn.speaker}\0{turn.value}" for turn in record.conversations)
        first = texts.setdefault(hashlib.blake2b(said.encode(), digest_size=16).digest(), record.id)
        if first != record.id:
            return left_out(record.source, record.id, DUPLICATE_TEXT, first)
    ids.add(record.id)
    return None


def _filter(
    folder: Path,
    known: Identities,
    quarantine: Quarantine,
    kept: Counter[tuple[str, str]],
    accounts: Sequence[SourceAccount],
) -> None:
    """Write the candidates that share nothing with a held-out or evaluation record to the training file."""
    candidates = folder / "candidates"
    with candidates.open("rb") as lines, (folder / TRAIN).open("wb") as train:
        for line in tqdm(lines, desc="evaluation", unit=" records", disable=None):
            candidate = Candidate.from_bytes(line)
            overlap = known.find_keys(candidate.id, candidate.keys)
            if overlap is None:
                kept[candidate.source, "train"] += 1
                train.write(candidate.line + b"\n")
            else:
                accounts[candidate.number].removed += 1
                detail = f"{overlap.evaluation}, by {overlap.by}"
                quarantine.note(left_out(candidate.source, candidate.id, IN_EVALUATION, detail))
    candidates.unlink()


def _report(
    recipe: ResolvedRecipe,
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
    sources = [{**describe(source), **count} for source, count in zip(recipe.sources, counts, strict=True)]
    others = [{**describe(source), **count} for source, count in zip(recipe.evaluation, evaluation_counts, strict=True)]
    read: Counter[str] = sum((Counter(count["read"]) for count in counts), Counter())
    return {
        "recipe": recipe.name,
        "left_out": list(recipe.left_out),
        "sources": sources,
        "evaluation": others,
        "seed": recipe.seed,
        "heldout_fraction": recipe.heldout_fraction,
        "limit": recipe.limit,
        "unexpected": wrong,
        "read": dict(sorted(read.items())),
        "records": splits,
        "train": sum(row["train"] for row in splits.values()),
        "heldout": sum(row["heldout"] for row in splits.values()),
        "quarantined": quarantine.count,
        "reasons": [{"source": source, "reason": reason, "rows": n} for (source, reason), n in reasons],
    }
