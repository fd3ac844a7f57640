"""`bimedix data review`: export of translations for review, import of verdicts, and their statistics."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from bimedix_jax.curation.review.items import ReviewItem, Verdict
    from bimedix_jax.curation.review.verdicts import Settled

TRANSLATED, VERDICTS, REPORT = "translated.jsonl", "verdicts.jsonl", "report.json"


@dataclass(frozen=True)
class Config:
    """Export translations for review, import verdicts, print agreement, correlation with the judge and error bounds.

        bimedix data review export --items arabic/review.jsonl --out to_review --form csv \\
            --reviewers first second
        bimedix data review import --items arabic/review.jsonl --verdicts first.csv second.csv \\
            --translated arabic/translated.jsonl --out arabic_reviewed
        bimedix data review statistics --items arabic/review.jsonl --verdicts first.csv second.csv

    The file extension of verdicts determines their format: .json is an export of Label Studio; .csv and .jsonl are the
    formats that `export` writes.
    """

    action: Annotated[Literal["export", "import", "statistics"], tyro.conf.Positional]
    """What to do."""

    items: Path
    """review.jsonl of `bimedix data translate`."""

    out: Path | None = None
    """Folder to write. export: files for the reviewers and their guidelines. import: translated.jsonl, verdicts.jsonl,
    report.json."""

    form: Literal["label-studio", "csv", "jsonl"] = "label-studio"
    """export: format of the files. Label Studio also gets its labelling configuration."""

    reviewers: tuple[str, ...] = ()
    """export: names of reviewers, who get one file each; by default one file for all."""

    overlap: float = 0.2
    """export: share of the items that two reviewers get, which is needed for their agreement."""

    show_machine: bool = False
    """export: show the judge's score, the flags and the reason for review. This biases the reviewers. By default they
    see only the texts, in random order."""

    verdicts: tuple[Path, ...] = ()
    """import and statistics: the files with verdicts."""

    translated: Path | None = None
    """import: translated.jsonl of `bimedix data translate`. Its records are copied with the reviewers' edits. Rejected
    translations are left out, and translations that only the reviewers accepted are added."""

    reasons: tuple[Literal["low score", "flag", "no score", "no translation", "sample"], ...] = ()
    """export: only items with one of these reasons; by default all."""

    limit: int | None = None
    """export: maximum number of items."""

    seed: int = 0
    """Seed of the order of items at export and of resampling for intervals."""

    overwrite: bool = False
    """Replace --out if it exists."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 1:
            raise ValueError("overlap must be from 0 to 1")


def run(config: Config, console: Console) -> dict[str, Any]:
    """Do the action."""
    from bimedix_jax.curation.review.items import read_items
    from bimedix_jax.errors import BimedixError

    items = {item.id: item for item in read_items(config.items)}
    if config.action == "export":
        return _export(config, list(items.values()), console)
    if not config.verdicts:
        raise BimedixError(f"{config.action} needs --verdicts: the files that reviewers sent back")
    verdicts = _verdicts(config, items)
    if not verdicts:
        names = ", ".join(map(str, config.verdicts))
        raise BimedixError(f"{names} contains no verdict; fill in the decisions and pass the file again")
    if config.action == "statistics":
        return _statistics(config, items, verdicts, console)
    return _import(config, items, verdicts, console)


def _export(config: Config, items: "list[ReviewItem]", console: Console) -> dict[str, Any]:
    from bimedix_jax import files
    from bimedix_jax.curation.review import export
    from bimedix_jax.errors import BimedixError

    if config.out is None:
        raise BimedixError("export needs --out: the folder for the reviewers' files")
    wanted = [item for item in items if not config.reasons or item.reason in config.reasons]
    chosen = export.in_order(wanted, config.seed)[: config.limit]
    if not chosen:
        raise BimedixError(f"{config.items} holds no item to review" + (" for these reasons" if config.reasons else ""))
    with files.new_folder(config.out, config.overwrite) as folder:
        counts = export.write(folder, chosen, config.form, not config.show_machine, config.reviewers, config.overlap)
    for name, number in counts.items():
        console.print(f"{number:,} items in {config.out / name}", highlight=False)
    if config.form == "label-studio":
        console.print("paste label_studio.xml as the labelling interface, import the tasks, export as JSON")
    return {"output": str(config.out), "items": len(chosen), "files": counts}


def _verdicts(config: Config, items: "dict[str, ReviewItem]") -> "list[Verdict]":
    from bimedix_jax.curation.review.verdicts import read

    return [verdict for path in config.verdicts for verdict in read(path, items)]


def _statistics(
    config: Config, items: "dict[str, ReviewItem]", verdicts: "list[Verdict]", console: Console
) -> dict[str, Any]:
    from bimedix_jax.curation.review.statistics import statistics

    result = statistics(items, verdicts, config.seed)
    _print(result, console)
    return result


def _import(
    config: Config, items: "dict[str, ReviewItem]", verdicts: "list[Verdict]", console: Console
) -> dict[str, Any]:
    from bimedix_jax import files
    from bimedix_jax.curation.review.items import dump
    from bimedix_jax.curation.review.verdicts import counts, latest, merge, settle
    from bimedix_jax.data.records import write_jsonl
    from bimedix_jax.errors import BimedixError

    if config.out is None:
        raise BimedixError("import needs --out: the folder for the reviewed translations")
    settled = settle(items.values(), verdicts)
    with files.new_folder(config.out, config.overwrite) as folder:
        records = write_jsonl(folder / TRANSLATED, merge(config.translated, settled))
        lines = "".join(dump(verdict) + "\n" for verdict in latest(verdicts))
        (folder / VERDICTS).write_text(lines, encoding="utf-8", newline="\n")
        statistics = _statistics(config, items, verdicts, console)
        became = sum(verdict.stated is not None for verdict in latest(verdicts))
        flagged = sum(_flags_left(row) != () for row in settled)
        result = {"records": records, **counts(settled), "accept_became_edit": became, "flagged": flagged}
        result["statistics"] = statistics
        (folder / REPORT).write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    _print_settled(config, settled, result, console)
    return {"output": str(config.out), **result}


def _print_settled(config: Config, settled: "list[Settled]", result: dict[str, Any], console: Console) -> None:
    names = ("accepted", "edited", "rejected", "undecided", "unreviewed")
    console.print(", ".join(f"{result[name]:,} {name}" for name in names), highlight=False)
    console.print(f"{result['records']:,} records in {config.out}", highlight=False)
    if result["undecided"]:
        console.print("[bold yellow]undecided items[/] have equal numbers for and against: ask one more reviewer")
    if result["differing_edits"]:
        console.print(
            f"[bold yellow]{result['differing_edits']:,} items have different edits[/]: the latest edit is used"
        )
    if result["accept_became_edit"]:
        console.print(
            f"[bold yellow]{result['accept_became_edit']:,} verdicts say accept and have a changed text[/]: they count "
            "as edit"
        )
    flagged = [(row.item.id, _flags_left(row)) for row in settled if _flags_left(row)]
    if flagged:
        console.print(
            f"[bold yellow]{len(flagged):,} records that reviewers kept raise flags of the checks[/]: they are in "
            f"{TRANSLATED}; ask a reviewer again, or reject them:"
        )
    for name, flags in flagged[:12]:
        console.print(f"  {name}: {'; '.join(flags)}", highlight=False, markup=False)
    if len(flagged) > 12:
        console.print(f"  and {len(flagged) - 12:,} more (flags_after_review in their provenance)", highlight=False)


def _flags_left(row: "Settled") -> tuple[str, ...]:
    """The flags that the final text of an item raises."""
    return () if row.record is None else tuple(row.record.provenance.get("flags_after_review", ()))


def _print(result: dict[str, Any], console: Console) -> None:
    def number(value: Any) -> str:
        return "undefined" if value is None else f"{value:.2f}"

    def interval(found: dict[str, Any]) -> str:
        return f"{number(found['value'])} [{number(found['low'])}, {number(found['high'])}], n = {found['n']}"

    lines = [f"{result['reviewed']:,} of {result['items']:,} items reviewed, {result['verdicts']:,} verdicts"]
    agreement = result["agreement"]
    lines += [
        f"  {' and '.join(pair['reviewers'])}: same decision in {pair['same']:.0%} of {pair['n']}, Cohen's kappa "
        f"{number(pair['kappa'])}"
        for pair in agreement["pairs"]
    ]
    lines.append(
        f"Krippendorff's alpha on {agreement['items']} items: {number(agreement['alpha_decision'])} of decisions, "
        f"{number(agreement['alpha_score'])} of scores"
    )
    judge = result["judge"]
    lines.append(f"judge's score and decisions, Spearman: {interval(judge['decision']['spearman'])}")
    lines.append(f"judge's score and people's scores, Spearman: {interval(judge['score']['spearman'])}")
    lines.append(
        f"  in the random sample alone, with decisions: {interval(judge['sample_only']['decision']['spearman'])}"
    )
    unseen = result["unseen"]
    for kind in ("rejected", "changed"):
        found = unseen[kind].get("weighted") or unseen[kind]
        lines.append(
            f"accepted without review: people {kind} {unseen[kind]['errors']} of {unseen['seen']} sampled, so at most "
            f"{found['high']:.1%} of all (Wilson, 95 %)"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False)
