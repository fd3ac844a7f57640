"""`bimedix data mix`: mix records in both languages into one training set at an exact ratio."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console


@dataclass(frozen=True)
class Config:
    """Mix records at an exact ratio of Arabic to English in each kind, without near-duplicates.

    A record that overlaps an evaluation set is left out, together with its source, its translations and the chats made
    from it.
    """

    sources: tuple[str, ...]
    """Sources to mix: NAME=PLACE with the name of a reader, `sample`, or paths of JSONL files of records. Of records
    with the same id or nearly the same text, the first is kept."""

    out: Path
    """Folder to write: train.jsonl, README.md (the data card), report.json, and lists of the removed records."""

    evaluation: tuple[str, ...] = ()
    """Sources, in either language, that the set must not overlap. Records that they mark for training are ignored."""

    benchmarks: Path | None = None
    """Folder with the files of the paper's nine tasks, as in `bimedix eval run`. They are further evaluation sets."""

    ratio: str = "1:2"
    """Arabic to English, in each kind."""

    preset: Literal["paper", "paper-english", "paper-arabic"] | None = None
    """Use the counts of the paper instead of a ratio: its bilingual, its English or its Arabic set."""

    scale: bool = False
    """With a preset: if there are too few records, keep its proportions instead of stopping."""

    near_duplicates: float = 0.8
    """Two records are near-duplicates if they have at least this share of runs of five words in common; 0 keeps all
    records."""

    ngram: int = 8
    """Number of words in the runs that are compared with evaluation questions."""

    overlap: float = 0.5
    """A record is left out if it contains at least this share of the runs of an evaluation question."""

    tokenizer: Path | None = None
    """Checkpoint folder whose tokenizer counts tokens; the ratio is then also printed by tokens."""

    template: str | None = None
    """Chat template by name (mixtral, mixtral-2023, chatml, plain) instead of the checkpoint's."""

    limit: int | None = None
    """Maximum number of records to read from each source, for a trial."""

    seed: int = 0
    """Seed of the choice of records and of their order."""

    workers: int | None = None
    """Number of worker processes, by default one per core; 0 uses none. The result does not depend on it."""

    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Mix and report."""
    from bimedix_jax import files
    from bimedix_jax.curation.mix import targets
    from bimedix_jax.curation.mix.build import mix
    from bimedix_jax.curation.mix.config import MixConfig
    from bimedix_jax.curation.mix.decontaminate import benchmark_sources
    from bimedix_jax.data.parallel import workers_of
    from bimedix_jax.errors import BimedixError

    if not 0 <= config.near_duplicates <= 1 or not 0 < config.overlap <= 1 or config.ngram < 1:
        raise BimedixError("--near-duplicates must be in [0, 1], --overlap in (0, 1] and --ngram at least 1")
    if config.scale and config.preset is None:
        raise BimedixError("--scale needs a preset; name one with --preset, or leave --scale out")
    if config.preset is not None and config.ratio != Config.ratio:
        raise BimedixError("a preset sets the ratio; give --ratio or --preset, not both")
    benchmarks = () if config.benchmarks is None else benchmark_sources(config.benchmarks)
    mix_config = MixConfig(
        sources=config.sources,
        evaluation=(*config.evaluation, *benchmarks),
        ratio=targets.parse_ratio(config.ratio),
        preset=config.preset,
        scale=config.scale,
        near_duplicates=config.near_duplicates,
        ngram=config.ngram,
        share=config.overlap,
        limit=config.limit,
        seed=config.seed,
        tokenizer=None if config.tokenizer is None else str(config.tokenizer),
        template=config.template,
        workers=workers_of(config.workers),
    )
    with files.new_folder(config.out, config.overwrite) as folder:
        report = mix(mix_config, folder)
    _print(report, config, console)
    return {"output": str(config.out), **report}


def _print(report: dict[str, Any], config: Config, console: Console) -> None:
    from bimedix_jax.commands.data_stats import print_tables
    from bimedix_jax.curation.counts import shown_ratio
    from bimedix_jax.curation.mix.candidates import MEANING, Decision
    from bimedix_jax.process.terminal import FittedTable

    print_tables(report["tables"], config.tokenizer is not None, console)
    measures = {"samples": "by samples", "tokens": "by tokens", "learned_tokens": "by supervised tokens"}
    shown = list(measures) if config.tokenizer is not None else ["samples"]
    table = FittedTable("kind", *(measures[name] for name in shown), title=f"Arabic to English in {config.out}")
    for row in report["ratios"]:
        table.add_row(row["kind"], *(shown_ratio(row[name]) for name in shown))
    console.print(table)
    for decision, meaning in MEANING.items():
        count = report["decisions"][decision.name.lower()]
        if decision != Decision.KEPT and count:
            console.print(f"[bold yellow]{count:,}[/] left out: {meaning}")
    if report["rejected_rows"] or report["evaluation"]["rejected_rows"]:
        console.print(
            f"[bold yellow]{report['rejected_rows']:,} rows of the sources and "
            f"{report['evaluation']['rejected_rows']:,} of the evaluation sets could not be read[/]"
        )
    for name in report["kinds_left_out"]:
        console.print(f"[bold yellow]{name} is left out of the set: there are too few records in one language[/]")
    if not report["evaluation"]["sets"]:
        console.print(
            "[bold yellow]no evaluation set was given, so overlap was not checked; see --evaluation, --benchmarks[/]"
        )
    if config.tokenizer is None:
        console.print("give --tokenizer to print the ratio by tokens and supervised tokens as well")
